//! The gates of pods of which the Deployment has a Canary: Kubernetes goes on with a rolling update when the Canary says so.
//!
//! In: pods that have the gate, which the webhook gave them, and the Canaries in force with where their requests go. Out: the gate's condition in the
//! status of each pod, written by the holder of the Lease alone. What no Canary holds is let go, so that one that is deleted keeps nobody
//! waiting; of a template about which nothing is decided the gate stays as it is, which is closed for pods that were just made. Two who
//! think that they hold the Lease for a moment do no harm: whatever is written is held against what should be, again and again. Can go wrong: the
//! API server is away, or refuses one pod's status; then pods are as ready as they were.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use penstock_api::names::PROMOTED;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Place, written};
use crate::canary::template::{course_of, gate, made};
use crate::objects::{Body, Object, ObjectId, ObjectSet};
use crate::push::Published;
use crate::trouble::Trouble;

/// Who writes, in `managedFields`.
const WRITER: &str = "penstock-control-gate";
/// Between two looks, if anything has changed.
const EVERY: Duration = Duration::from_millis(250);
/// What was written is told by the watch within milliseconds; what was refused is not tried again before.
const AGAIN: Duration = Duration::from_secs(5);

/// A gate that does not say what it should.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Gate {
    pod: ObjectId,
    uid: String,
    open: bool,
    why: String,
    /// Not before the mesh sends requests to it: Kubernetes ends another pod for it, to which then nothing may go.
    later: bool,
}

/// What was done about a gate.
#[derive(Clone, Copy)]
struct Tried {
    open: bool,
    at: Instant,
    written: bool,
}

/// Writes until told to stop.
pub(super) async fn run(
    place: Place,
    mut objects: watch::Receiver<Arc<ObjectSet>>,
    mut published: watch::Receiver<Published>,
    leads: watch::Receiver<bool>,
    stop: CancellationToken,
) -> Result<()> {
    let mut trouble = Trouble::new("gates of pods");
    let mut tried: HashMap<String, Tried> = HashMap::new();
    let mut led = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(EVERY) => {}
        }
        let leading = *leads.borrow();
        let fresh = !std::mem::replace(&mut led, leading) && leading;
        let changed = objects.has_changed().unwrap_or(false) || published.has_changed().unwrap_or(false);
        if !leading || !(fresh || changed || !tried.is_empty()) {
            continue;
        }
        let set = objects.borrow_and_update().clone();
        let snapshot = published.borrow_and_update().snapshot.clone();
        let mut before = std::mem::take(&mut tried);
        for gate in due(&set, &snapshot.canaries) {
            let last = before.remove(&gate.uid).filter(|last| last.open == gate.open);
            let now = Tried { open: gate.open, at: Instant::now(), written: true };
            match last {
                // At the next look the weights are everywhere.
                None if gate.later => {
                    tried.insert(gate.uid, Tried { written: false, ..now });
                    continue;
                }
                Some(last) if last.written && last.at.elapsed() < AGAIN => {
                    tried.insert(gate.uid, last);
                    continue;
                }
                _ => {}
            }
            // A canary that went back meanwhile opens nothing more.
            let overtaken = gate.open && published.borrow().snapshot.canaries != snapshot.canaries;
            if !*leads.borrow() || stop.is_cancelled() || overtaken {
                break;
            }
            tried.insert(gate.uid.clone(), now);
            match write(&place, &gate).await {
                Ok(()) => {
                    trouble.over();
                    let state = if gate.open { "open" } else { "closed" };
                    tracing::info!(pod = %gate.pod.qualified(), "its gate is {state}: {}", gate.why);
                }
                Err(error) => {
                    let away = !matches!(error.downcast_ref(), Some(kube::Error::Api(_)));
                    trouble.met(&error.context(format!("the status of {}", gate.pod)));
                    if away {
                        break;
                    }
                }
            }
        }
    }
}

/// The gates that do not say what they should.
fn due(set: &ObjectSet, canaries: &[Arc<Object>]) -> Vec<Gate> {
    set.objects.iter().filter_map(|object| of_pod(object, canaries)).collect()
}

fn of_pod(object: &Object, canaries: &[Arc<Object>]) -> Option<Gate> {
    let Body::Pod(pod) = &object.body else { return None };
    let gates = pod.spec.as_ref()?.readiness_gates.as_ref()?;
    let ended = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if !gates.iter().any(|gate| gate.condition_type == PROMOTED)
        || pod.metadata.deletion_timestamp.is_some()
        || matches!(ended, Some("Succeeded" | "Failed"))
    {
        return None;
    }
    let said = |kind: &str| {
        let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.find(|one| one.type_ == kind).map(|one| one.status.as_str())
    };
    let (open, why, later) = wanted(object, canaries)?;
    if said(PROMOTED) == Some(word(open)) || (later && said("ContainersReady") != Some("True")) {
        return None;
    }
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    Some(Gate { pod: object.id.clone(), uid, open, why, later })
}

/// Whether a pod's gate is to be open, why, and whether that is for later; `None`: it stays as it is.
fn wanted(pod: &Object, canaries: &[Arc<Object>]) -> Option<(bool, String, bool)> {
    let namespace = &pod.id.namespace;
    let mut all = Some((true, "no Canary holds it".to_owned(), false));
    let Some(made) = made(namespace, pod.metadata()) else { return all };
    for object in canaries.iter().filter(|object| object.id.namespace == *namespace) {
        let Body::Canary(canary) = &object.body else { continue };
        let Some(course) = course_of(canary, made.deployment) else { continue };
        match gate(course, &made.template) {
            Some(false) => {
                return Some((
                    false,
                    format!("{} holds it until its template is promoted", object.id),
                    false,
                ));
            }
            Some(true) => {
                let promoted = made.template.name() != course.stable;
                let why = format!("{} lets its template serve", object.id);
                all = all.map(|(_, _, later)| (true, why, later || promoted));
            }
            None => all = None,
        }
    }
    all
}

fn word(open: bool) -> &'static str {
    if open { "True" } else { "False" }
}

async fn write(place: &Place, gate: &Gate) -> Result<()> {
    let Gate { pod, uid, open, why, .. } = gate;
    let api: Api<Pod> = Api::namespaced(place.client.clone(), &pod.namespace);
    let condition = json!({
        "type": PROMOTED, "status": word(*open), "lastTransitionTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        "reason": if *open { "Promoted" } else { "Held" }, "message": why,
    });
    // Of the conditions of others nothing is said. The uid: no other pod of the name.
    let patch = Patch::Strategic(json!({"metadata": {"uid": uid}, "status": {"conditions": [condition]}}));
    let params = PatchParams { field_manager: Some(WRITER.to_owned()), ..PatchParams::default() };
    written(api.patch_status(&pod.name, &params, &patch)).await.context("it is not written")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::decode;

    /// Of one template, and what its gate says.
    fn pod(hash: &str, said: Option<&str>, more: &str) -> String {
        let said = said.map(|word| format!("{{type: {PROMOTED}, status: \"{word}\"}}")).unwrap_or_default();
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {hash}, namespace: shop, uid: {hash}, labels: {{pod-template-hash: {hash}}}, \
             ownerReferences: [{{apiVersion: apps/v1, kind: ReplicaSet, name: cart-{hash}, uid: u, controller: true}}]{more}}}\n\
             spec: {{containers: [{{name: a}}], readinessGates: [{{conditionType: {PROMOTED}}}]}}\n\
             status: {{phase: Running, conditions: [{said}]}}\n---\n"
        )
    }

    fn canary(name: &str, deployment: &str, status: &str) -> String {
        format!(
            "apiVersion: penstock.io/v1alpha1\nkind: Canary\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{service: cart, deployment: {deployment}, steps: [{{weight: 5}}]}}\nstatus: {{{status}}}\n---\n"
        )
    }

    fn course(stable: &str, candidate: &str, open: u32) -> String {
        format!(
            "course: {{run: r, weight: 0, stable: cart-{stable}.template, candidate: cart-{candidate}.template, open: {open}}}"
        )
    }

    /// `pod open` of each that is due.
    fn found(text: &str) -> Vec<String> {
        let set = decode::file(&"shop.yaml".into(), text);
        assert_eq!(set.broken, []);
        let canary = |object: &&Arc<Object>| matches!(object.body, Body::Canary(_));
        let canaries: Vec<_> = set.objects.iter().filter(canary).cloned().collect();
        due(&set, &canaries).iter().map(|gate| format!("{} {}", gate.pod.name, gate.open)).collect()
    }

    #[test]
    fn what_serves_is_open_what_is_to_is_held_and_what_was_just_made_stays() {
        let pods = ["old", "new", "next"].map(|hash| pod(hash, None, "")).concat();
        let of = |course: &str| found(&format!("{pods}{}", canary("cart", "cart", course)));
        assert_eq!(of(&course("old", "new", 0)), ["old true", "new false"]);
        // The mesh first: as soon as it sends requests to it.
        assert_eq!(of(&course("old", "new", 3)), ["old true"]);
        let ready = pods.replace("conditions: []", "conditions: [{type: ContainersReady, status: \"True\"}]");
        let promoted = format!("{ready}{}", canary("cart", "cart", &course("old", "new", 3)));
        assert_eq!(found(&promoted), ["old true", "new true"]);
        assert_eq!(of(&course("new", "new", 0)), ["new true"]);
    }

    #[test]
    fn a_gate_that_no_canary_holds_is_open() {
        let new = pod("new", Some("False"), "");
        assert_eq!(found(&new), ["new true"]);
        for other in [
            canary("cart", "till", &course("old", "new", 0)),
            canary("cart", "cart", ""),
            canary("cart", "cart", "course: {run: r, weight: 0, stable: cart-v1, candidate: cart-v2}"),
            canary("cart", "cart", &course("old", "new", 0)).replace("shop", "other"),
        ] {
            assert_eq!(found(&format!("{new}{other}")), ["new true"], "{other}");
        }
        // Of two Canaries the one that holds it.
        let two =
            [canary("a", "cart", &course("new", "new", 0)), canary("b", "cart", &course("old", "new", 0))];
        assert_eq!(found(&format!("{}{}", pod("new", Some("True"), ""), two.concat())), ["new false"]);
    }

    #[test]
    fn what_says_so_already_or_is_on_its_way_out_is_left_alone() {
        let canary = canary("cart", "cart", &course("old", "new", 0));
        let ending = ", deletionTimestamp: \"2026-01-01T00:00:00Z\"";
        for pods in [
            pod("old", Some("True"), "") + &pod("new", Some("False"), ""),
            pod("new", Some("True"), ending),
            pod("new", None, "").replace("Running", "Failed"),
            pod("new", None, "").replace(PROMOTED, "other.io/gate"),
        ] {
            assert_eq!(found(&format!("{pods}{canary}")), [""; 0], "{pods}");
        }
        assert_eq!(found(&format!("{}{canary}", pod("new", Some("True"), ""))), ["new false"]);
    }
}
