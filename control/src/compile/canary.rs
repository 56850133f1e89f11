//! What a Canary makes of the rules of its Service: the weights of the step that it is in, copies for its candidate, and a way for requests that
//! it asks by header.
//!
//! In: the Canaries, of which the course says where requests go, and to which two versions. Out: what a rule sends to the Service, to its stable or
//! to its candidate version, divided between the last two. What a rule sends elsewhere stays. Before there is any course the stable
//! version gets everything, if it is there. The candidate is a backend at weight 0 too, so that every proxy knows its endpoints before the first request goes there. The share of a version whose
//! Service is gone goes to the other. While a template of a Deployment is promoted each of its pods gets
//! what each pod got before: the first of them could not serve everything, and once there are as many nothing goes to pods that Kubernetes ends at once.

use std::collections::BTreeMap;

use penstock_api::ServiceName;
use penstock_api::resource::{Kind, WHOLE, weights_name};
use penstock_api::v1::{self, StringMatch, string_match};

use super::annotations::{self, header_name};
use super::consumers;
use super::endpoints::Joined;
use super::faults::Faults;
use super::services::{ServiceModel, Services};
use super::view::{Of, View};
use crate::canary::Plan;
use crate::objects::Object;
use crate::objects::canary::{Canary, Course};
use crate::outcome::Reason;
use crate::snapshot::Builder;

/// The Canaries in force, by the Service that clients ask.
#[derive(Default)]
pub(super) struct Canaries<'a>(BTreeMap<ServiceName, Overlay<'a>>);

/// One of them.
pub(super) struct Overlay<'a> {
    object: &'a Object,
    canary: &'a Canary,
    course: Course,
    service: &'a ServiceModel<'a>,
    /// At least one of the two is there.
    stable: Option<&'a ServiceModel<'a>>,
    candidate: Option<&'a ServiceModel<'a>>,
    /// Of a hundred requests, how many go to the candidate by what is there.
    weight: u32,
    /// The Service, and all that its course or its `spec` names: what a rule sends to one of them is divided.
    ours: Vec<&'a ServiceModel<'a>>,
    sticky: Option<v1::Sticky>,
    matches: Vec<Vec<v1::NamedMatch>>,
    /// Of the weights that it divides, the name; and of those of the way by header.
    divided: BTreeMap<String, Option<String>>,
}

/// The weights of a rule, divided.
struct Divided {
    backends: Vec<v1::Backend>,
    mirrors: Vec<v1::Mirror>,
    /// Where requests go that the canary asks for by header.
    matched: Option<Vec<v1::Backend>>,
}

/// Reads the Canaries.
pub(super) fn read<'a>(
    view: &View<'a>,
    services: &'a Services<'a>,
    joined: &Joined,
    faults: &mut Faults,
) -> Canaries<'a> {
    let mut canaries = Canaries::default();
    let mut taken: BTreeMap<ServiceName, &Object> = BTreeMap::new();
    for (object, canary) in oldest_first(view) {
        let overlay = overlay(object, canary, services, joined, faults);
        let Ok(name) = ServiceName::new(&object.id.namespace, &canary.spec.service) else { continue };
        if let Some(first) = taken.get(&name) {
            let message = format!("{} is about the Service {name} already; remove one of the two", first.id);
            faults.refuse_as(Reason::Conflicted, object, "/spec/service", message);
            continue;
        }
        taken.insert(name.clone(), object);
        canaries.0.extend(overlay.map(|overlay| (name, overlay)));
    }
    canaries
}

/// All of them: the older one stays in force when a second is made for the same Service or Deployment.
pub(super) fn oldest_first<'a>(view: &View<'a>) -> Vec<Of<'a, Canary>> {
    let mut all = view.canaries.clone();
    all.sort_by_key(|(object, _)| {
        (object.metadata().creation_timestamp.as_ref().map(|time| time.0), object.id.clone())
    });
    all
}

fn overlay<'a>(
    object: &'a Object,
    canary: &'a Canary,
    services: &'a Services<'a>,
    joined: &Joined,
    faults: &mut Faults,
) -> Option<Overlay<'a>> {
    let spec = &canary.spec;
    if let Err(wrong) = Plan::read(&object.id.namespace, spec) {
        for (pointer, message) in wrong {
            faults.refuse(object, pointer, message);
        }
    }
    let find = |name: &str| {
        let name = format!("{}/{name}", object.id.namespace).parse::<ServiceName>().ok();
        name.and_then(|name| services.get(&name))
    };
    let mut named = Vec::new();
    let versions = [("stable", &spec.stable), ("candidate", &spec.candidate)];
    let versions = versions.into_iter().filter(|_| spec.deployment.is_none());
    for (field, name) in [("service", &spec.service)].into_iter().chain(versions) {
        let found = find(name);
        if found.is_none() {
            let message = format!(
                "the Service {}/{name} does not exist; create it, or correct the name",
                object.id.namespace
            );
            faults.note_as(Reason::TargetNotFound, object, format!("/spec/{field}"), message);
        }
        named.extend(found);
    }
    let sticky = match spec.sticky.as_deref().map(annotations::sticky) {
        None => None,
        Some(Ok(sticky)) => Some(sticky),
        Some(Err(error)) => {
            faults.refuse(object, "/spec/sticky", error);
            None
        }
    };
    let mut matches = Vec::new();
    for (at, one) in spec.matches.iter().enumerate() {
        let mut headers = Vec::new();
        for (header_at, header) in one.headers.iter().enumerate() {
            match header_name(&header.name) {
                Ok(name) => headers.push(v1::NamedMatch {
                    name,
                    value: Some(StringMatch { kind: Some(string_match::Kind::Exact(header.value.clone())) }),
                }),
                Err(error) => {
                    faults.refuse(object, format!("/spec/match/{at}/headers/{header_at}/name"), error);
                }
            }
        }
        // One without headers would match everything.
        if headers.len() == one.headers.len() && !headers.is_empty() {
            matches.push(headers);
        }
    }
    let service = find(&spec.service)?;
    if let Some(problem) = named.iter().find_map(|target| unreachable(service, target)) {
        faults.refuse(object, "/spec/candidate", problem);
    }
    let first = || {
        let serves = find(&spec.stable).is_some_and(|stable| joined.ready(&stable.name) > 0);
        serves.then(|| Course::stable_alone(spec.run_id(), spec))
    };
    let course = canary.status.course.clone().or_else(first)?;
    let reachable = |name: &str| find(name).filter(|target| unreachable(service, target).is_none());
    // What an older control has written names no versions.
    let named_in = |course: &'a Course| (&course.stable, &course.candidate);
    let told = canary.status.course.as_ref().filter(|course| !course.stable.is_empty());
    let (stable, candidate) = told.map_or((&spec.stable, &spec.candidate), named_in);
    // Of a Deployment both are one as long as there is nothing to divide.
    let divides = candidate != stable;
    let (stable, candidate) = (reachable(stable), reachable(candidate).filter(|_| divides));
    let weight = match (stable, candidate) {
        (None, _) => 100,
        (_, None) => 0,
        // Nothing is sent to where nobody is, if anybody is elsewhere who gets requests at all.
        (Some(stable), Some(candidate)) => {
            match (joined.ready(&stable.name), joined.ready(&candidate.name)) {
                (0, 1..) if course.weight > 0 => 100,
                (1.., 0) => 0,
                (_, ready) if course.open > 0 => share(ready, course.open),
                _ => course.weight.min(100),
            }
        }
    };
    let mut ours = named;
    ours.extend(stable.into_iter().chain(candidate));
    (stable.is_some() || candidate.is_some()).then_some(Overlay {
        object,
        canary,
        course,
        service,
        stable,
        candidate,
        weight,
        ours,
        sticky,
        matches,
        divided: BTreeMap::new(),
    })
}

/// Of a hundred, what so many pods get if each gets what each of `before` got.
fn share(pods: usize, before: u32) -> u32 {
    let percent = u32::try_from(pods).unwrap_or(u32::MAX).saturating_mul(100).checked_div(before);
    percent.unwrap_or(100).min(100)
}

/// Why a port of the Service cannot be served by `target`.
fn unreachable(service: &ServiceModel<'_>, target: &ServiceModel<'_>) -> Option<String> {
    let missing = service.ports.iter().find(|port| target.port_for(port).is_none())?;
    Some(format!(
        "the Service {} has no port for {} of {} (it has: {}); give both the same ports",
        target.name,
        missing.port,
        service.name,
        target.ports_in_words()
    ))
}

impl<'a> Canaries<'a> {
    /// Whether a Service has one.
    pub(super) fn has(&self, service: &ServiceName) -> bool {
        self.0.contains_key(service)
    }

    /// Adds the weights of a rule of `parent`, divided if that has a canary which they concern.
    pub(super) fn weigh(
        &mut self,
        parent: &ServiceName,
        name: &str,
        mut weights: v1::Weights,
        builder: &mut Builder,
    ) {
        let overlay = self.0.get_mut(parent);
        if let Some((overlay, divided)) =
            overlay.and_then(|one| one.divide(&weights.backends).map(|divided| (one, divided)))
        {
            builder.part_of(&overlay.object.id, Kind::Weights, name);
            builder.takes(&overlay.object.id, &overlay.course);
            let matched = divided.matched.map(|backends| {
                let route = format!("{}:matched", weights.route);
                let name = weights_name(parent, &route, weights.rule);
                let matched = v1::Weights { backends, ..weights.clone() };
                builder.add(Kind::Weights, name.as_str(), &matched);
                builder.part_of(&overlay.object.id, Kind::Weights, name.as_str());
                builder.part_of(&overlay.object.id, Kind::Routes, parent.as_str());
                name
            });
            overlay.divided.insert(name.to_owned(), matched);
            weights.backends = divided.backends;
            weights.mirrors.extend(divided.mirrors);
        }
        for backend in weights.backends.iter().filter(|backend| backend.invalid.is_empty()) {
            consumers::leads_to(parent, &weights.route, &backend.service, builder);
        }
        for mirror in weights.mirrors.iter().filter(|mirror| mirror.invalid.is_empty()) {
            consumers::leads_to(parent, &weights.route, &mirror.service, builder);
        }
        builder.add(Kind::Weights, name, &weights);
    }

    /// Adds the ways by header before the rules that they are exceptions of, and says whom rules keep on one version.
    pub(super) fn finish(&self, service: &ServiceName, rules: Vec<v1::Rule>) -> Vec<v1::Rule> {
        let Some(overlay) = self.0.get(service) else { return rules };
        rules.into_iter().flat_map(|rule| overlay.finish(rule)).collect()
    }
}

impl Overlay<'_> {
    /// Divides what a rule sends to the Service or to one of its two versions; `None`: it sends them nothing.
    fn divide(&self, backends: &[v1::Backend]) -> Option<Divided> {
        let ours = |backend: &&v1::Backend| self.ours.iter().any(|one| one.name.as_str() == backend.service);
        let first = backends.iter().find(|backend| ours(backend) && backend.invalid.is_empty())?;
        let total: u32 = backends.iter().filter(ours).fold(0, |sum, one| sum.saturating_add(one.weight));
        let asked = self.port_of(first)?;
        let to = |target: &ServiceModel<'_>, weight: u32| v1::Backend {
            service: target.name.to_string(),
            port: target.port_for(asked).map_or(0, |port| port.port),
            weight: total.saturating_mul(weight),
            filters: first.filters.clone(),
            invalid: String::new(),
        };
        let of_stable = self.stable.map(|stable| to(stable, 100 - self.weight));
        let of_candidate = self.candidate.map(|candidate| to(candidate, self.weight));
        let mut divided: Vec<_> = of_stable.into_iter().chain(of_candidate).collect();
        divided.extend(
            backends
                .iter()
                .filter(|backend| !ours(backend))
                .map(|backend| v1::Backend { weight: backend.weight.saturating_mul(100), ..backend.clone() }),
        );
        let share_ppm = self.course.shadow.min(100) * (WHOLE / 100);
        let mirror = self.candidate.filter(|_| share_ppm > 0).map(|candidate| v1::Mirror {
            service: candidate.name.to_string(),
            port: candidate.port_for(asked).map_or(0, |port| port.port),
            share_ppm,
            compare: Some(self.compare()),
            invalid: String::new(),
        });
        let matching = self.candidate.filter(|_| self.course.matching && !self.matches.is_empty());
        let matched = matching.map(|candidate| vec![to(candidate, 1)]);
        Some(Divided { backends: divided, mirrors: mirror.into_iter().collect(), matched })
    }

    /// The port of the Service that a backend stands for.
    fn port_of(&self, backend: &v1::Backend) -> Option<&v1::ServicePort> {
        let of = |target: &ServiceModel<'_>| {
            self.service
                .ports
                .iter()
                .find(|port| target.port_for(port).is_some_and(|found| found.port == backend.port))
        };
        self.ours.iter().copied().find(|target| target.name.as_str() == backend.service).and_then(of)
    }

    fn compare(&self) -> v1::Compare {
        let shadow = self.canary.spec.shadow.clone().unwrap_or_default();
        v1::Compare {
            absolute: shadow.absolute.unwrap_or(1e-3),
            relative: shadow.relative.unwrap_or(1e-2),
            outputs: shadow.outputs,
            max_bytes: 0,
        }
    }

    fn finish(&self, mut rule: v1::Rule) -> Vec<v1::Rule> {
        let Some(matched) = self.divided.get(&rule.weights) else { return vec![rule] };
        if rule.sticky.is_none() {
            rule.sticky.clone_from(&self.sticky);
        }
        let mut rules = Vec::new();
        if let Some(matched) = matched {
            for headers in &self.matches {
                let mut exception = v1::Rule { weights: matched.clone(), ..rule.clone() };
                if exception.matches.is_empty() {
                    exception.matches.push(v1::Match::default());
                }
                for matched in &mut exception.matches {
                    matched.headers.extend(headers.iter().cloned());
                }
                rules.push(exception);
            }
        }
        rules.push(rule);
        rules
    }
}
