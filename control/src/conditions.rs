//! What an object's status has to say: its conditions, from what became of it and how far it has come.
//!
//! In: an [`Outcome`], how many proxies have applied it, the status that is there, the time. Out: the status that should be there. Pure, so
//! that the same words come from whoever writes them. What others have written stays: a Gateway's parents, conditions of other types.
//!
//! `Programmed` is true by truth alone: every connected proxy that the object concerns has acknowledged the newest version of it. While an
//! earlier version is in force, or nothing of it is, it is false however many proxies are content.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::fleet::Tally;
use crate::objects::decode::dotted;
use crate::objects::{ObjectId, ObjectKind};
use crate::outcome::{Finding, Outcome, Parent, Reason};

/// Who says it, in statuses in which several controllers speak.
pub const CONTROLLER: &str = "penstock.io/control";
/// Of a message, in bytes; what is longer helps nobody, and the API server has a bound.
const MESSAGE: usize = 2048;

/// How far an object has come with the proxies of all replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// With those that were heard of.
    pub tally: Tally,
    /// Replicas of control that have not said how far theirs are with this version.
    pub unheard: usize,
}

/// One condition, as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) kind: &'static str,
    pub(crate) status: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Condition {
    pub(crate) fn of(kind: &'static str, holds: bool, reason: &'static str, message: String) -> Self {
        Self { kind, status: if holds { "True" } else { "False" }, reason, message }
    }
}

/// How a status differs from what it should be.
#[derive(Clone, Debug, PartialEq)]
pub enum Difference {
    /// In words alone: numbers of proxies that come and go.
    Words(Value),
    /// In what a program would look at.
    Truth(Value),
}

/// The status that `id` should have, unless it has it.
pub fn difference(
    id: &ObjectId,
    outcome: &Outcome,
    reach: &Reach,
    known: &Value,
    generation: Option<i64>,
    now: Timestamp,
) -> Option<Difference> {
    let settle = Settle { generation: outcome.generation.or(generation), now };
    let wanted = match id.kind {
        ObjectKind::HTTPRoute | ObjectKind::GRPCRoute | ObjectKind::InferencePool => {
            route(outcome, reach, known, &settle)?
        }
        ObjectKind::InferencePolicy | ObjectKind::AccessPolicy | ObjectKind::RateLimit => {
            policy(outcome, reach, known, &settle)
        }
        _ => return None,
    };
    if wanted == *known {
        return None;
    }
    let same = without_words(&wanted) == without_words(known);
    Some(if same { Difference::Words(wanted) } else { Difference::Truth(wanted) })
}

/// What the conditions of a status have to do with.
pub(crate) struct Settle {
    pub(crate) generation: Option<i64>,
    pub(crate) now: Timestamp,
}

impl Settle {
    /// These conditions in the place of those of the same types; the time of one that says the same as before stays.
    pub(crate) fn conditions(&self, known: Option<&Value>, wanted: &[Condition]) -> Value {
        let mut all = known.and_then(Value::as_array).cloned().unwrap_or_default();
        for condition in wanted {
            let at = all.iter().position(|one| one["type"] == condition.kind);
            let before = at.map(|at| &all[at]).filter(|one| one["status"] == condition.status);
            let since = before.and_then(|one| one["lastTransitionTime"].as_str()).map(str::to_owned);
            let mut one = json!({
                "type": condition.kind,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message,
                "lastTransitionTime": since.unwrap_or_else(|| self.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
            });
            if let Some(generation) = self.generation {
                one["observedGeneration"] = generation.into();
            }
            match at {
                Some(at) => all[at] = one,
                None => all.push(one),
            }
        }
        Value::Array(all)
    }
}

/// The status of a route, or of a pool: an entry for each parent of ours, beside those of others. `None`: there is nothing of ours to say.
fn route(outcome: &Outcome, reach: &Reach, known: &Value, settle: &Settle) -> Option<Value> {
    // One that cannot be read has parents that nobody knows.
    outcome.generation?;
    let before = known["parents"].as_array().cloned().unwrap_or_default();
    let ours = |entry: &Value| entry["controllerName"] == CONTROLLER;
    let stays = |entry: &Value| {
        !ours(entry) || outcome.parents.iter().any(|parent| parent.reference == entry["parentRef"])
    };
    let mut parents: Vec<Value> = before.iter().filter(|entry| stays(entry)).cloned().collect();
    for parent in &outcome.parents {
        let is_it = |entry: &&mut Value| ours(entry) && entry["parentRef"] == parent.reference;
        let wanted = of_parent(outcome, parent, reach);
        match parents.iter_mut().find(is_it) {
            Some(entry) => entry["conditions"] = settle.conditions(entry.get("conditions"), &wanted),
            None => parents.push(json!({
                "parentRef": parent.reference,
                "controllerName": CONTROLLER,
                "conditions": settle.conditions(None, &wanted),
            })),
        }
    }
    if parents == before {
        return Some(known.clone());
    }
    let mut status = known.as_object().cloned().unwrap_or_default();
    status.insert("parents".to_owned(), parents.into());
    Some(Value::Object(status))
}

/// What a route has to say of one of its parents.
fn of_parent(outcome: &Outcome, parent: &Parent, reach: &Reach) -> Vec<Condition> {
    let absent = |finding: &&Finding| finding.reason == Reason::NoMatchingParent(parent.index);
    let of_others = |finding: &&Finding| matches!(finding.reason, Reason::NoMatchingParent(_));
    let findings = || outcome.findings.iter();
    let of_route = || findings().filter(|one| !of_others(one) && !one.reason.of_reference());
    let (reason, causes): (_, Vec<&Finding>) = if findings().any(|one| absent(&one)) {
        ("NoMatchingParent", findings().filter(absent).collect())
    } else if of_route().any(|one| one.refused) {
        let filters = of_route().all(|one| one.reason == Reason::IncompatibleFilters);
        let reason = if filters { "IncompatibleFilters" } else { "UnsupportedValue" };
        (reason, of_route().filter(|one| one.refused).collect())
    } else {
        ("Accepted", of_route().collect())
    };
    let accepted = Condition::of("Accepted", reason == "Accepted", reason, words(&causes));
    let unresolved: Vec<&Finding> = findings().filter(|one| one.reason.of_reference()).collect();
    let reason = match unresolved.first().map(|one| one.reason) {
        None => "ResolvedRefs",
        Some(Reason::RefNotPermitted) => "RefNotPermitted",
        Some(Reason::InvalidKind) => "InvalidKind",
        Some(_) => "BackendNotFound",
    };
    let resolved = Condition::of("ResolvedRefs", unresolved.is_empty(), reason, words(&unresolved));
    let nothing = findings().any(|one| absent(&one)) || outcome.resources.is_empty();
    let programmed = programmed(outcome, nothing, reach);
    vec![accepted, resolved, programmed]
}

/// The status of a policy.
fn policy(outcome: &Outcome, reach: &Reach, known: &Value, settle: &Settle) -> Value {
    let of = |reason: Reason| outcome.findings.iter().filter(move |one| one.reason == reason);
    let refused = || outcome.findings.iter().filter(|one| one.refused);
    let (reason, causes): (_, Vec<&Finding>) = if of(Reason::Conflicted).next().is_some() {
        ("Conflicted", of(Reason::Conflicted).collect())
    } else if refused().next().is_some() {
        ("Invalid", refused().collect())
    } else if of(Reason::TargetNotFound).next().is_some() {
        ("TargetNotFound", of(Reason::TargetNotFound).collect())
    } else {
        ("Accepted", outcome.findings.iter().collect())
    };
    let accepted = Condition::of("Accepted", reason == "Accepted", reason, words(&causes));
    // One that is refused may lie somewhere all the same, closed: that is not what it asks for.
    let nothing = refused().next().is_some() || (reason == "TargetNotFound" && outcome.resources.is_empty());
    let wanted = [accepted, programmed(outcome, nothing, reach)];
    let mut status = known.as_object().cloned().unwrap_or_else(Map::new);
    if let Some(generation) = settle.generation {
        status.insert("observedGeneration".to_owned(), generation.into());
    }
    status.insert("conditions".to_owned(), settle.conditions(known.get("conditions"), &wanted));
    Value::Object(status)
}

/// Whether everybody has it. `nothing`: there is nothing of it that anybody could have.
fn programmed(outcome: &Outcome, nothing: bool, reach: &Reach) -> Condition {
    let Tally { concerned, applied, refused } = &reach.tally;
    let told = |status, reason, message| Condition { kind: "Programmed", status, reason, message };
    if outcome.last_good {
        return told(
            "False",
            "Invalid",
            format!(
                "an earlier version of it is in force, applied by {applied} of {concerned} connected proxies that it concerns"
            ),
        );
    }
    if nothing {
        return told("False", "Invalid", "nothing of it is in force".to_owned());
    }
    let counted = match concerned {
        0 => "no connected proxy is concerned".to_owned(),
        _ => format!("applied by {applied} of {concerned} connected proxies that it concerns"),
    };
    match (refused, reach.unheard) {
        (Some(why), _) => told("False", "Pending", cut(format!("{counted}; {why}"))),
        (None, _) if applied < concerned => told("False", "Pending", counted),
        (None, 0) => told("True", "Programmed", counted),
        (None, unheard) => told(
            "Unknown",
            "Pending",
            format!("{counted}; {unheard} of control's replicas have not said how far theirs are"),
        ),
    }
}

/// Findings, each at its field.
fn words(findings: &[&Finding]) -> String {
    let mut all: Vec<String> = findings
        .iter()
        .map(|finding| match finding.pointer.as_str() {
            "" => finding.message.clone(),
            pointer => format!("{}: {}", dotted(pointer), finding.message),
        })
        .collect();
    all.dedup();
    cut(all.join("; "))
}

pub(crate) fn cut(mut text: String) -> String {
    if text.len() > MESSAGE {
        let end = (0..=MESSAGE - 3).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// What is left of a status without messages.
fn without_words(status: &Value) -> Value {
    match status {
        Value::Object(entries) => {
            let rest = entries.iter().filter(|(key, _)| *key != "message");
            Value::Object(rest.map(|(key, value)| (key.clone(), without_words(value))).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(without_words).collect()),
        other => other.clone(),
    }
}

/// What is wrong with an object, for an Event; `None`: nothing that its author has to do something about.
pub fn complaint(outcome: &Outcome) -> Option<String> {
    let refused: Vec<&Finding> = outcome.findings.iter().filter(|one| one.refused).collect();
    if refused.is_empty() {
        return None;
    }
    let rest = if outcome.last_good { " (its last good version is in force)" } else { "" };
    Some(format!("{}{rest}", words(&refused)))
}

#[cfg(test)]
mod tests {
    use penstock_api::resource::Kind;

    use super::*;

    const REFERENCE: &str = r#"{"group": "", "kind": "Service", "name": "resnet"}"#;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn id(kind: ObjectKind) -> ObjectId {
        ObjectId { kind, namespace: "team-a".into(), name: "one".into() }
    }

    fn finding(reason: Reason, pointer: &str, refused: bool) -> Finding {
        Finding { reason, pointer: pointer.into(), message: "it is wrong; mend it".into(), refused }
    }

    /// A route with one parent, in force.
    fn outcome(findings: Vec<Finding>) -> Outcome {
        let reference = serde_json::from_str(REFERENCE).unwrap();
        Outcome {
            generation: Some(7),
            findings,
            parents: vec![Parent { index: 0, reference }],
            resources: [(Kind::Routes, "team-a/resnet".to_owned())].into(),
            ..Outcome::default()
        }
    }

    fn reach(applied: usize, concerned: usize) -> Reach {
        Reach { tally: Tally { concerned, applied, refused: None }, unheard: 0 }
    }

    fn written(difference: Option<Difference>) -> Value {
        match difference {
            Some(Difference::Words(status) | Difference::Truth(status)) => status,
            None => panic!("there is nothing to write"),
        }
    }

    /// `type=status/reason` of each condition.
    fn short(conditions: &Value) -> Vec<String> {
        let all = conditions.as_array().unwrap().iter();
        let word = |one: &Value, key: &str| one[key].as_str().unwrap().to_owned();
        all.map(|one| format!("{}={}/{}", word(one, "type"), word(one, "status"), word(one, "reason")))
            .collect()
    }

    fn of_route(outcome: &Outcome, reach: &Reach) -> Value {
        written(difference(&id(ObjectKind::HTTPRoute), outcome, reach, &Value::Null, None, at(0)))
    }

    #[test]
    fn a_route_says_of_each_parent_whether_it_is_accepted_and_resolved_and_everywhere() {
        let backend = "/spec/rules/0/backendRefs/1/name";
        let held = Outcome { last_good: true, ..outcome(vec![finding(Reason::Value, "/spec/x", true)]) };
        let no_parent = Reason::NoMatchingParent(0);
        let pending =
            ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=False/Pending"];
        let table = [
            (
                outcome(vec![]),
                reach(2, 2),
                ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=True/Programmed"],
            ),
            (outcome(vec![]), reach(1, 2), pending),
            (
                outcome(vec![]),
                Reach { unheard: 1, ..reach(2, 2) },
                ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=Unknown/Pending"],
            ),
            (outcome(vec![]), Reach { unheard: 1, ..reach(1, 2) }, pending),
            (
                outcome(vec![finding(Reason::BackendNotFound, backend, true)]),
                reach(2, 2),
                [
                    "Accepted=True/Accepted",
                    "ResolvedRefs=False/BackendNotFound",
                    "Programmed=True/Programmed",
                ],
            ),
            (
                outcome(vec![finding(Reason::RefNotPermitted, backend, true)]),
                reach(2, 2),
                [
                    "Accepted=True/Accepted",
                    "ResolvedRefs=False/RefNotPermitted",
                    "Programmed=True/Programmed",
                ],
            ),
            (
                outcome(vec![finding(Reason::IncompatibleFilters, "/spec/rules/0/filters", true)]),
                reach(0, 0),
                [
                    "Accepted=False/IncompatibleFilters",
                    "ResolvedRefs=True/ResolvedRefs",
                    "Programmed=True/Programmed",
                ],
            ),
            (
                outcome(vec![finding(Reason::Value, "/spec/rules/0/timeouts", false)]),
                reach(0, 0),
                ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=True/Programmed"],
            ),
            (
                held,
                reach(2, 2),
                [
                    "Accepted=False/UnsupportedValue",
                    "ResolvedRefs=True/ResolvedRefs",
                    "Programmed=False/Invalid",
                ],
            ),
            (
                outcome(vec![finding(no_parent, "/spec/parentRefs/0/name", true)]),
                reach(2, 2),
                [
                    "Accepted=False/NoMatchingParent",
                    "ResolvedRefs=True/ResolvedRefs",
                    "Programmed=False/Invalid",
                ],
            ),
            (
                outcome(vec![finding(Reason::NoMatchingParent(1), "/spec/parentRefs/1/name", true)]),
                reach(2, 2),
                ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=True/Programmed"],
            ),
        ];
        for (outcome, reach, expected) in table {
            let status = of_route(&outcome, &reach);
            assert_eq!(short(&status["parents"][0]["conditions"]), expected, "{outcome:?} {reach:?}");
        }
        let status = of_route(&outcome(vec![]), &reach(1, 2));
        let entry = &status["parents"][0];
        assert_eq!(
            (&entry["controllerName"], &entry["parentRef"]["name"]),
            (&json!(CONTROLLER), &json!("resnet"))
        );
        assert_eq!(entry["conditions"][2]["message"], "applied by 1 of 2 connected proxies that it concerns");
        assert_eq!(entry["conditions"][2]["observedGeneration"], 7);
        let refused =
            Tally { concerned: 2, applied: 1, refused: Some("a/b refused it: no such regex".into()) };
        let status = of_route(&outcome(vec![]), &Reach { tally: refused, unheard: 0 });
        let message = status["parents"][0]["conditions"][2]["message"].as_str().unwrap();
        assert!(message.ends_with("concerns; a/b refused it: no such regex"), "{message}");
    }

    #[test]
    fn what_others_have_written_stays_and_a_parent_that_is_gone_goes() {
        let route = id(ObjectKind::HTTPRoute);
        let gateway =
            json!({"parentRef": {"name": "gw"}, "controllerName": "example.com/gw", "conditions": []});
        let old = json!({"parentRef": {"name": "old"}, "controllerName": CONTROLLER, "conditions": []});
        let known = json!({"parents": [old, gateway]});
        let status = written(difference(&route, &outcome(vec![]), &reach(1, 1), &known, None, at(0)));
        let parents = status["parents"].as_array().unwrap();
        assert_eq!(
            (parents.len(), &parents[0], &parents[1]["parentRef"]["name"]),
            (2, &gateway, &json!("resnet"))
        );
        // A route of a Gateway's alone is none of ours.
        let theirs = Outcome { parents: Vec::new(), ..outcome(vec![]) };
        let known = json!({"parents": [gateway]});
        assert_eq!(difference(&route, &theirs, &reach(0, 0), &known, None, at(0)), None);
        assert_eq!(difference(&route, &theirs, &reach(0, 0), &Value::Null, None, at(0)), None);
    }

    #[test]
    fn nothing_is_written_twice_and_the_time_is_that_of_the_last_change() {
        let route = id(ObjectKind::HTTPRoute);
        let look = |applied, known: &Value, second| {
            difference(&route, &outcome(vec![]), &reach(applied, 2), known, None, at(second))
        };
        let first = written(look(0, &Value::Null, 10));
        assert_eq!(look(0, &first, 20), None);
        // Another number is another word.
        let Some(Difference::Words(second)) = look(1, &first, 20) else { panic!() };
        assert_eq!(second["parents"][0]["conditions"][2]["lastTransitionTime"], "1970-01-01T00:00:10Z");
        let Some(Difference::Truth(third)) = look(2, &second, 30) else { panic!() };
        let conditions = &third["parents"][0]["conditions"];
        assert_eq!(conditions[2]["lastTransitionTime"], "1970-01-01T00:00:30Z");
        assert_eq!(conditions[0]["lastTransitionTime"], "1970-01-01T00:00:10Z");
    }

    #[test]
    fn a_policy_says_why_it_is_not_in_force() {
        let target = "/spec/targetRef/name";
        let nowhere =
            |findings| Outcome { parents: Vec::new(), resources: Default::default(), ..outcome(findings) };
        let table = [
            (outcome(vec![]), ["Accepted=True/Accepted", "Programmed=True/Programmed"]),
            (nowhere(vec![]), ["Accepted=True/Accepted", "Programmed=True/Programmed"]),
            (
                nowhere(vec![finding(Reason::TargetNotFound, target, false)]),
                ["Accepted=False/TargetNotFound", "Programmed=False/Invalid"],
            ),
            (
                nowhere(vec![finding(Reason::Conflicted, target, true)]),
                ["Accepted=False/Conflicted", "Programmed=False/Invalid"],
            ),
            (
                outcome(vec![finding(Reason::Value, "/spec/rules/0", true)]),
                ["Accepted=False/Invalid", "Programmed=False/Invalid"],
            ),
        ];
        for (outcome, expected) in table {
            let policy = id(ObjectKind::AccessPolicy);
            let others = json!({"conditions": [{"type": "Theirs", "status": "True"}]});
            let status = written(difference(&policy, &outcome, &reach(3, 3), &others, None, at(0)));
            assert_eq!(status["observedGeneration"], 7);
            let mut conditions = status["conditions"].clone();
            assert_eq!(conditions.as_array_mut().unwrap().remove(0), others["conditions"][0]);
            assert_eq!(short(&conditions), expected, "{outcome:?}");
        }
        // One that could never be read is told by the number that the API server has.
        let unread = Outcome { generation: None, ..nowhere(vec![finding(Reason::Value, "", true)]) };
        let policy = id(ObjectKind::InferencePolicy);
        let status = written(difference(&policy, &unread, &reach(0, 0), &Value::Null, Some(9), at(0)));
        assert_eq!(status["conditions"][0]["observedGeneration"], 9);
        assert_eq!(status["conditions"][0]["message"], "it is wrong; mend it");
    }

    #[test]
    fn an_event_tells_what_is_refused_and_nothing_else() {
        assert_eq!(complaint(&outcome(vec![finding(Reason::Value, "/spec/x", false)])), None);
        let held = Outcome { last_good: true, ..outcome(vec![finding(Reason::Value, "/spec/x", true)]) };
        assert_eq!(
            complaint(&held).unwrap(),
            "spec.x: it is wrong; mend it (its last good version is in force)"
        );
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let text = cut("é".repeat(MESSAGE));
        assert!(text.len() <= MESSAGE && text.ends_with('…'), "{}", text.len());
    }
}
