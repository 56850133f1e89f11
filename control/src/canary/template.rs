//! Of a Deployment's templates, the one that serves and the one that is to. Pure.
//!
//! Kubernetes tells the pods of a Deployment's templates apart by the label `pod-template-hash`, and by their owner, the ReplicaSet
//! `<deployment>-<hash>`. That is all that is asked: nobody reads a Deployment, and nobody writes one. In: the templates that have pods, and where
//! requests went until now. Out: which of them is stable and which is the candidate, which are one where nothing is to change; and of each pod's
//! gate, whether it is open.
//!
//! Can go wrong: the pods that are there do not say all. A template without a pod is forgotten once nothing is going on with it, so a candidate that went
//! back and of which the only pod is taken away by force begins anew.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use penstock_api::ServiceName;

use super::bounds::Plan;
use super::diary::{Diary, Phase};
use crate::objects::canary::{Canary, Course};

/// The label by which a Deployment tells the pods of its templates apart.
const HASH: &str = "pod-template-hash";

/// What a pod was made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made<'a> {
    /// The Deployment.
    pub deployment: &'a str,
    /// The template, as the mesh calls it.
    pub template: ServiceName,
}

/// What a pod of a namespace was made of, if a Deployment has made it.
pub fn made<'a>(namespace: &str, pod: &'a ObjectMeta) -> Option<Made<'a>> {
    let hash = pod.labels.as_ref()?.get(HASH)?;
    let mut owners = pod.owner_references.iter().flatten();
    let owner = owners.find(|one| one.kind == "ReplicaSet" && one.controller == Some(true))?;
    let deployment = owner.name.strip_suffix(hash.as_str())?.strip_suffix('-')?;
    Some(Made { deployment, template: ServiceName::template(namespace, &owner.name).ok()? })
}

/// A template of which there are pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// As the mesh calls it, without the namespace: `resnet-6d4cf56db6.template`.
    pub name: String,
    /// Pods that have not ended and are not being ended.
    pub pods: usize,
    /// When the first of them was made.
    pub since: Option<Timestamp>,
}

/// Which of a Deployment's templates serves, and which is to. One and the same: there is none. Empty: there has been no pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// The one that serves.
    pub stable: String,
    /// The one that is to.
    pub candidate: String,
}

/// What a Canary of a Deployment is about at the moment; `None` as long as there has been no pod.
fn pair(deployment: &str, phase: Phase, course: Option<&Course>, templates: &[Template]) -> Option<Pair> {
    let age = |one: &&Template| (one.since, one.name.clone());
    let living = || templates.iter().filter(|one| one.pods > 0);
    let there = |name: &str| templates.iter().any(|one| one.name == name);
    let since = |name: &str| living().find(|one| one.name == name).and_then(|one| one.since);
    let known = course.filter(|course| of(deployment, &course.stable) && of(deployment, &course.candidate));
    let Some(Course { stable, candidate, open, .. }) = known else {
        let stable = living().min_by_key(age)?.name.clone();
        let candidate = living().max_by_key(age)?.name.clone();
        return Some(Pair { stable, candidate });
    };
    // By its first pod, which is older than those that were made anew since. What is older than the candidate is on its way out.
    let before = since(candidate).or(since(stable));
    let other = living().filter(|one| one.name != *stable && one.name != *candidate && one.since >= before);
    if let Some(next) = other.max_by_key(age) {
        // Of a promotion that another change overtakes, what most of the pods are serves.
        let pods = |name: &str| living().find(|one| one.name == name).map_or(0, |one| one.pods);
        let stable = if *open > 0 && pods(candidate) >= pods(stable) { candidate } else { stable };
        return Some(Pair { stable: stable.clone(), candidate: next.name.clone() });
    }
    let goes_on = phase.judged() || phase == Phase::RollingBack;
    let candidate = if goes_on || there(candidate) { candidate } else { stable };
    Some(Pair { stable: stable.clone(), candidate: candidate.clone() })
}

impl Plan {
    /// The plan of a Canary of a Deployment, as its templates and what has become of it say. A Deployment that has not changed is no other run.
    pub(super) fn between(mut self, namespace: &str, diary: &Diary, templates: &[Template]) -> Self {
        let Some(deployment) = &self.spec.deployment else { return self };
        let pair = pair(deployment, diary.phase, diary.course.as_ref(), templates);
        let pair = pair.unwrap_or_default();
        self.stable = format!("{namespace}/{}", pair.stable);
        self.candidate = format!("{namespace}/{}", pair.candidate);
        // What is known of another Deployment, or of two Services, is of another run.
        let ours = diary.course.as_ref().is_some_and(|course| of(deployment, &course.stable));
        let stays = pair.stable == pair.candidate && !diary.run.is_empty() && ours;
        self.run = if stays { diary.run.clone() } else { self.spec.run_of(&pair.candidate) };
        self.pair = Some(pair);
        self
    }
}

/// How many pods two templates have that have not ended and are not being ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pods {
    /// The one that serves.
    pub stable: usize,
    /// The one that is to.
    pub candidate: usize,
}

impl Pair {
    /// Of these templates.
    pub(super) fn pods(&self, templates: &[Template]) -> Pods {
        let of = |name: &str| templates.iter().find(|one| one.name == name).map_or(0, |one| one.pods);
        Pods { stable: of(&self.stable), candidate: of(&self.candidate) }
    }
}

/// Whether a name is that of a template of a Deployment.
fn of(deployment: &str, name: &str) -> bool {
    let hash = name.strip_prefix(deployment).and_then(|rest| rest.strip_prefix('-'));
    hash.and_then(|rest| rest.strip_suffix(".template")).is_some_and(|hash| !hash.contains(['-', '.']))
}

/// Where the requests of a Canary go, if it is one of this Deployment and has begun.
pub fn course_of<'a>(canary: &'a Canary, deployment: &str) -> Option<&'a Course> {
    let course = canary.status.course.as_ref()?;
    let ours = canary.spec.deployment.as_deref() == Some(deployment) && of(deployment, &course.stable);
    ours.then_some(course)
}

/// Whether the gate of a pod is open: whether Kubernetes may take it for ready, and go on with its rolling update. `None`: as it is, since nothing is
/// decided of its template yet, or any more.
pub fn gate(course: &Course, template: &ServiceName) -> Option<bool> {
    let name = template.name();
    if name == course.stable {
        return Some(true);
    }
    (name == course.candidate).then_some(course.open > 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(hash: &str, pods: usize, since: i64) -> Template {
        let since = (pods > 0).then(|| Timestamp::from_second(since).unwrap());
        Template { name: name(hash), pods, since }
    }

    fn name(hash: &str) -> String {
        format!("resnet-{hash}.template")
    }

    fn course(stable: &str, candidate: &str) -> Course {
        Course { stable: name(stable), candidate: name(candidate), ..Course::default() }
    }

    /// `stable candidate`, by their hashes.
    fn found(phase: Phase, course: Option<&Course>, templates: &[Template]) -> String {
        let short = |name: &str| name.replace("resnet-", "").replace(".template", "");
        let pair = pair("resnet", phase, course, templates);
        pair.map_or(String::new(), |pair| format!("{} {}", short(&pair.stable), short(&pair.candidate)))
    }

    #[test]
    fn a_pod_says_by_its_label_and_its_owner_what_it_was_made_of() {
        let pod = |owner: &str, kind: &str, controller: bool| -> ObjectMeta {
            serde_json::from_value(json!({
                "labels": {"pod-template-hash": "6d4cf56db6"},
                "ownerReferences": [
                    {"apiVersion": "apps/v1", "kind": kind, "name": owner, "uid": "u", "controller": controller},
                ],
            }))
            .unwrap()
        };
        let table = [
            (pod("resnet-6d4cf56db6", "ReplicaSet", true), Some("resnet")),
            (pod("res-net-6d4cf56db6", "ReplicaSet", true), Some("res-net")),
            // Another's ReplicaSet, which has the label of its own pods' template alone.
            (pod("resnet-other", "ReplicaSet", true), None),
            (pod("6d4cf56db6", "ReplicaSet", true), None),
            (pod("resnet-6d4cf56db6", "ReplicaSet", false), None),
            (pod("resnet-6d4cf56db6", "Job", true), None),
            (ObjectMeta::default(), None),
        ];
        for (pod, deployment) in table {
            let made = made("team-a", &pod);
            assert_eq!(made.as_ref().map(|made| made.deployment), deployment, "{pod:?}");
            let template = deployment.map(|name| format!("team-a/{name}-6d4cf56db6.template"));
            assert_eq!(made.map(|made| made.template.to_string()), template);
        }
    }

    #[test]
    fn at_first_sight_the_oldest_serves() {
        assert_eq!(found(Phase::Waiting, None, &[]), "");
        assert_eq!(found(Phase::Waiting, None, &[template("b", 2, 5)]), "b b");
        let all = [template("b", 2, 5), template("c", 1, 9), template("d", 0, 0), template("a", 1, 7)];
        assert_eq!(found(Phase::Waiting, None, &all), "b c");
        // What is known of another Deployment says nothing.
        let other = Course { stable: "resnet-x-c.template".into(), ..course("b", "b") };
        assert_eq!(found(Phase::Waiting, Some(&other), &all), "b c");
    }

    #[test]
    fn another_template_is_another_candidate_and_none_is_none() {
        let (a, b, c) = (template("a", 4, 1), template("b", 1, 50), template("c", 1, 90));
        let gone = |hash: &str| template(hash, 0, 0);
        use Phase::*;
        let table: [(Phase, Course, &[Template], &str); 13] = [
            (Waiting, course("a", "a"), std::slice::from_ref(&a), "a a"),
            (Waiting, course("a", "a"), &[a.clone(), b.clone()], "a b"),
            (Progressing, course("a", "b"), &[a.clone(), b.clone()], "a b"),
            (Progressing, course("a", "b"), &[a.clone(), b.clone(), c.clone()], "a c"),
            // That of which the pods are on their way out is still what it was about, until that is over.
            (Progressing, course("a", "b"), &[a.clone(), gone("b")], "a b"),
            (Progressing, course("a", "b"), std::slice::from_ref(&a), "a b"),
            (RollingBack, course("a", "b"), std::slice::from_ref(&a), "a b"),
            (RolledBack, course("a", "b"), &[a.clone(), gone("b")], "a b"),
            (RolledBack, course("a", "b"), std::slice::from_ref(&a), "a a"),
            (RolledBack, course("a", "b"), &[a.clone(), b.clone()], "a b"),
            (RolledBack, course("a", "b"), &[a.clone(), b.clone(), c.clone()], "a c"),
            // Back to an earlier one after a success: its pods are new.
            (Succeeded, course("b", "b"), &[b.clone(), template("a", 1, 99)], "b a"),
            (Succeeded, course("b", "b"), &[b.clone(), template("a", 1, 1)], "b b"),
        ];
        for (phase, course, templates, expected) in table {
            assert_eq!(
                found(phase, Some(&course), templates),
                expected,
                "{phase:?} {course:?} {templates:?}"
            );
        }
    }

    #[test]
    fn a_change_overtakes_a_promotion_and_what_was_promoted_serves() {
        let promoting = Course { open: 4, ..course("a", "b") };
        let (left, promoted) = (template("a", 1, 1), template("b", 3, 50));
        let next = template("c", 1, 90);
        let all = [left.clone(), promoted.clone(), next];
        assert_eq!(found(Phase::Promoting, Some(&promoting), &all), "b c");
        // What is left of the first is on its way out, and no candidate once the last is gone.
        let after = course("b", "c");
        assert_eq!(found(Phase::Progressing, Some(&after), &all), "b c");
        assert_eq!(found(Phase::RolledBack, Some(&after), &[left, promoted]), "b b");
    }

    #[test]
    fn scaled_to_nothing_it_is_known_what_served() {
        let alone = [template("b", 2, 50)];
        let (idle, begun) = (course("a", "a"), course("a", "b"));
        assert_eq!(found(Phase::Succeeded, Some(&idle), &[]), "a a");
        for (phase, course) in
            [(Phase::Succeeded, &idle), (Phase::Progressing, &begun), (Phase::RolledBack, &begun)]
        {
            assert_eq!(found(phase, Some(course), &alone), "a b");
        }
    }

    #[test]
    fn a_gate_is_open_for_what_serves_and_for_what_is_promoted() {
        let of = |hash: &str| ServiceName::template("team-a", &format!("resnet-{hash}")).unwrap();
        let (held, open) = (course("a", "b"), Course { open: 4, ..course("a", "b") });
        let idle = course("a", "a");
        let table = [
            (&held, "a", Some(true)),
            (&held, "b", Some(false)),
            (&held, "c", None),
            (&open, "b", Some(true)),
            (&open, "c", None),
            (&idle, "a", Some(true)),
            (&idle, "b", None),
        ];
        for (course, hash, expected) in table {
            assert_eq!(gate(course, &of(hash)), expected, "{course:?} {hash}");
        }
    }
}
