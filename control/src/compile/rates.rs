//! Rate limits: which workloads each is about, and what it gives them.
//!
//! They lie beside the access policies in what a pod's proxy is told, since they match by the same language; a change of
//! either resends nothing else. A limit that cannot be understood is refused as every object is, and its last good version
//! stays in force. Where there is none, nothing is limited: a limit protects from too much, not from the wrong people.

use std::collections::BTreeSet;

use penstock_api::resource::Kind;
use penstock_api::service::is_label;
use penstock_api::v1;

use super::access::{self, Memory, Mesh, Reading, Told};
use super::faults::Faults;
use crate::objects::Object;
use crate::objects::access::Rule;
use crate::objects::rate::{By, Limit, Rate, RateLimit};
use crate::snapshot::Builder;

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;

const NOTHING: &str = "write 1 or more; who may ask for nothing is denied by an AccessPolicy";

/// Adds the limits of each pod to what it is told, and what their Services lead to to `memory`.
pub(super) fn add(
    mesh: &Mesh<'_, '_>,
    of_pods: &mut Told<'_>,
    memory: &mut Memory,
    builder: &mut Builder,
    faults: &mut Faults,
) {
    for (object, rates) in &mesh.view.rates {
        let (selector, refs) = (rates.spec.selector.as_ref(), rates.spec.target_refs.as_deref());
        let targets = access::targets(object, selector, refs, mesh, memory, faults);
        let compiled = compiled(object, rates, faults);
        let (Some(targets), Some(compiled)) = (targets, compiled) else { continue };
        let mut selects = false;
        for (pod, ports) in targets {
            let Some(told) = of_pods.get_mut(pod) else { continue };
            selects = true;
            builder.part_of(&object.id, Kind::Access, pod);
            access::past_proxy(object, pod, &ports, mesh.pods, faults);
            let ports: Vec<_> = ports.into_iter().map(u32::from).collect();
            let here = compiled.iter().map(|limit| v1::RateLimit { ports: ports.clone(), ..limit.clone() });
            told.limits.extend(here);
        }
        if !selects {
            faults.note(
                object,
                "/spec",
                "no workload of the mesh is one that it is about, so it limits nothing",
            );
        }
    }
}

/// The limits as proxies take them; `None`: they make no sense.
fn compiled(object: &Object, rates: &RateLimit, faults: &mut Faults) -> Option<Vec<v1::RateLimit>> {
    let limits = &rates.spec.limits;
    if limits.is_empty() {
        faults.refuse(object, "/spec/limits", "it limits nothing; write a limit, or delete it");
        return None;
    }
    let mut names = BTreeSet::new();
    let mut sound = true;
    let mut written = Vec::new();
    for (index, limit) in limits.iter().enumerate() {
        let pointer = format!("/spec/limits/{index}");
        if !names.insert(limit.name.as_str()) {
            let message =
                "another limit above has this name, and answers and metrics name it; give it its own";
            faults.refuse(object, format!("{pointer}/name"), message);
            sound = false;
        }
        let (limit, good) = read(object, limit, &pointer, faults);
        written.push(limit);
        sound &= good;
    }
    sound.then_some(written)
}

/// One limit, and whether it makes sense.
fn read(object: &Object, limit: &Limit, pointer: &str, faults: &mut Faults) -> (v1::RateLimit, bool) {
    let matching = limit.r#match.as_ref();
    let mut reading = Reading::new(object, faults, format!("{pointer}/match"));
    let matches = matching.map(|matching| {
        let (from, to, when) = (matching.from.clone(), matching.to.clone(), matching.when.clone());
        reading.rule(&Rule { name: None, from, to, when })
    });
    let matches_well = reading.sound;

    let mut reading = Reading::new(object, faults, pointer.to_owned());
    if !is_label(&limit.name) {
        reading
            .refuse("name", "write a short name of a-z, 0-9 and inner hyphens; answers and metrics have it");
    }
    let by = |what: By| limit.by.iter().flatten().any(|by| *by == what);
    if by(By::Route) && matching.is_none_or(|matching| matching.to.is_none()) {
        reading.refuse(
            "by",
            "a route is an entry of match.to, and there is none; write match.to, or leave it out",
        );
    }
    if limit.requests.is_none() && limit.concurrent.is_none() && limit.tokens.is_none() {
        reading.refuse("requests", "it says nothing of how much; write requests, concurrent or tokens");
    }
    if limit.concurrent == Some(0) {
        reading.refuse("concurrent", NOTHING);
    }
    let requests = limit.requests.and_then(|asked| rate(&mut reading, "requests", asked));
    let tokens = limit.tokens.and_then(|asked| rate(&mut reading, "tokens", asked));
    let written = v1::RateLimit {
        policy: object.id.qualified(),
        name: limit.name.clone(),
        ports: Vec::new(),
        r#match: matches,
        by_identity: by(By::Identity),
        by_model: by(By::Model),
        by_route: by(By::Route),
        requests,
        concurrent: limit.concurrent.unwrap_or_default(),
        tokens,
    };
    (written, matches_well && reading.sound)
}

/// A rate; `None`: it makes no sense.
fn rate(reading: &mut Reading<'_, '_>, field: &str, asked: Rate) -> Option<v1::Rate> {
    let (count, period_ms) = match (asked.per_second, asked.per_minute) {
        (Some(count), None) => (count, SECOND),
        (None, Some(count)) => (count, MINUTE),
        _ => {
            reading.refuse(field, "write either perSecond or perMinute");
            return None;
        }
    };
    let burst = asked.burst.unwrap_or(count);
    if count == 0 || burst == 0 {
        reading.refuse(field, NOTHING);
        return None;
    }
    Some(v1::Rate { count: count.into(), period_ms, burst: burst.into() })
}
