//! Pods that asked for a sidecar and have none: older than the label of their namespace, made while nothing injected, or
//! asking in a way that the API server does not see.
//!
//! In: the pods that are watched anyway, what namespaces say. Out: how many there are, as a metric, and an Event on each,
//! once. Nothing is written to the pods: starting them anew is for who runs them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use metrics::gauge;
use penstock_api::names::{SYSTEM_NAMESPACE, annotation};
use penstock_inject::{Because, INIT, Namespace, PROXY, asked};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::events::{Event, Events, Regarding};
use crate::metric;
use crate::namespaces::Namespaces;
use crate::objects::{Body, ObjectSet};

/// What is never injected, whatever it says: the API server is told not to ask.
const EXEMPT: [&str; 2] = [SYSTEM_NAMESPACE, "kube-system"];
/// How often pods are looked at, if anything has changed.
const LOOK: Duration = Duration::from_secs(2);
/// For so long it has to be so before it is told: who labels a namespace starts its pods anew right after.
const SETTLED: Duration = Duration::from_secs(10);

/// A pod without the sidecar that it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Missed {
    namespace: String,
    name: String,
    note: String,
}

/// By uid.
type Found = HashMap<String, Missed>;

/// Counts and tells them until told to stop.
pub async fn watch(
    mut objects: watch::Receiver<Arc<ObjectSet>>,
    mut namespaces: Namespaces,
    events: Events,
    stop: CancellationToken,
) {
    let (mut found, mut seen) = (Found::new(), Seen::default());
    let mut first = true;
    loop {
        if namespaces.has_changed() || objects.has_changed().unwrap_or(false) || std::mem::take(&mut first) {
            let set = objects.borrow_and_update().clone();
            found = missed(&set, |name| namespaces.known(name));
            gauge!(metric::PODS_NOT_INJECTED.name).set(found.len() as f64);
        }
        seen.keep(&found, Instant::now());
        if events.writes() {
            for uid in seen.due(Instant::now()) {
                let Some(event) = found.get(&uid).map(|missed| event(&uid, missed)) else { continue };
                if !events.tell(event) {
                    break;
                }
                seen.told(&uid);
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Since when which pods are without, and whether that was told.
#[derive(Debug, Default)]
struct Seen(HashMap<String, (Instant, bool)>);

impl Seen {
    fn keep(&mut self, found: &Found, now: Instant) {
        self.0.retain(|uid, _| found.contains_key(uid));
        for uid in found.keys().filter(|uid| !self.0.contains_key(*uid)).cloned().collect::<Vec<_>>() {
            self.0.insert(uid, (now, false));
        }
    }

    fn due(&self, now: Instant) -> Vec<String> {
        let due = self.0.iter().filter(|(_, (since, told))| !told && now >= *since + SETTLED);
        due.map(|(uid, _)| uid.clone()).collect()
    }

    fn told(&mut self, uid: &str) {
        if let Some((_, told)) = self.0.get_mut(uid) {
            *told = true;
        }
    }
}

fn event(uid: &str, missed: &Missed) -> Event {
    let Missed { namespace, name, note } = missed.clone();
    Event {
        regarding: Regarding {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            namespace,
            name,
            uid: uid.to_owned(),
        },
        reason: "NotInjected",
        action: "Inject",
        warning: true,
        note,
        each: false,
    }
}

fn missed(set: &ObjectSet, known: impl Fn(&str) -> Option<Namespace>) -> Found {
    let pods = set.objects.iter().filter_map(|object| match &object.body {
        Body::Pod(pod) => Some((&object.id, &**pod)),
        _ => None,
    });
    pods.filter_map(|(id, pod)| {
        if EXEMPT.contains(&&*id.namespace) || ends(pod) || has_sidecar(pod) {
            return None;
        }
        let namespace = known(&id.namespace).unwrap_or_default();
        let note = why(pod, &id.namespace, &id.name, &namespace)?;
        let missed = Missed { namespace: id.namespace.clone(), name: id.name.clone(), note };
        Some((pod.metadata.uid.clone()?, missed))
    })
    .collect()
}

/// What is over or on its way out is nobody's concern.
fn ends(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_some() || matches!(phase, Some("Succeeded" | "Failed"))
}

fn has_sidecar(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    all.into_iter().any(|container| [INIT, PROXY].contains(&&*container.name))
}

/// Why it has none and what to do, if it asked for one.
fn why(pod: &Pod, space: &str, name: &str, namespace: &Namespace) -> Option<String> {
    let own = |all: &Option<std::collections::BTreeMap<String, String>>| {
        all.as_ref().and_then(|all| all.get(annotation::INJECT)).cloned()
    };
    let (label, annotated) = (own(&pod.metadata.labels), own(&pod.metadata.annotations));
    let mut metadata = json!({});
    for (kind, said) in [("labels", &label), ("annotations", &annotated)] {
        if let Some(said) = said {
            metadata[kind] = json!({annotation::INJECT: said});
        }
    }
    match asked(&Value::from_iter([("metadata", metadata)]), namespace) {
        Ok(Some(_)) => return None,
        Err(error) => return Some(format!("It has no sidecar: {error}.")),
        Ok(None) => {}
    }
    if pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true) {
        return Some(format!("It asks for a sidecar and cannot have one: {}.", Because::HostNetwork));
    }
    let seen = label.is_some() || namespace.inject.as_deref() == Some("enabled");
    Some(if seen {
        format!(
            "It asks for a sidecar and has none: it is older than the label {} that asks, or was made while nothing \
             injected. Start it anew: kubectl -n {space} delete pod {name}, and whatever owns it makes another.",
            annotation::INJECT
        )
    } else {
        format!(
            "It asks for a sidecar by an annotation, and the API server chooses by labels whom it injects. Write the \
             label {}: enabled into its template.",
            annotation::INJECT
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{Object, ObjectId, ObjectKind, Origin};

    fn set(pods: &[(&str, Value)]) -> ObjectSet {
        let mut set = ObjectSet::default();
        for (name, more) in pods {
            let mut pod = json!({"metadata": {"uid": name}, "spec": {"containers": [{"name": "app"}]}});
            for (key, value) in more.as_object().unwrap() {
                for (field, value) in value.as_object().unwrap() {
                    pod[key][field] = value.clone();
                }
            }
            let id = ObjectId { kind: ObjectKind::Pod, namespace: "team-a".into(), name: (*name).into() };
            let body = Body::Pod(serde_json::from_value(pod).unwrap());
            let origin = Origin { file: "".into(), line: 0 };
            set.objects.push(Arc::new(Object { origin, id, body, lines: None }));
        }
        set
    }

    fn pods() -> ObjectSet {
        set(&[
            ("bare", json!({})),
            ("out", json!({"metadata": {"labels": {"penstock.io/inject": "disabled"}}})),
            ("annotated", json!({"metadata": {"annotations": {"penstock.io/inject": "enabled"}}})),
            ("has", json!({"spec": {"initContainers": [{"name": "penstock-proxy"}]}})),
            ("over", json!({"status": {"phase": "Succeeded"}})),
            ("leaving", json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})),
            ("host", json!({"spec": {"hostNetwork": true}})),
        ])
    }

    #[test]
    fn who_asked_and_has_none_is_found_and_nobody_else() {
        let names = |namespace: Option<Namespace>| {
            let mut found: Vec<_> = missed(&pods(), |_| namespace.clone()).into_keys().collect();
            found.sort();
            found
        };
        assert_eq!(names(None), ["annotated"]);
        let labelled = Namespace { inject: Some("enabled".into()), enforce: None };
        assert_eq!(names(Some(labelled.clone())), ["annotated", "bare", "host"]);
        let found = missed(&pods(), |_| None);
        assert!(found["annotated"].note.contains("Write the label penstock.io/inject: enabled"));
        let found = missed(&pods(), |_| Some(labelled.clone()));
        assert!(found["annotated"].note.contains("older than the label"));
        assert!(found["bare"].note.contains("kubectl -n team-a delete pod bare"));
        assert!(found["host"].note.contains("it has hostNetwork"));
    }

    #[test]
    fn each_is_told_once_and_not_while_its_successor_starts() {
        let missed = Missed { namespace: "team-a".into(), name: "web".into(), note: String::new() };
        let found = Found::from([("1".to_owned(), missed)]);
        let (mut seen, start) = (Seen::default(), Instant::now());
        seen.keep(&found, start);
        assert!(seen.due(start).is_empty());
        seen.keep(&found, start + SETTLED);
        assert_eq!(seen.due(start + SETTLED), ["1"]);
        seen.told("1");
        assert!(seen.due(start + SETTLED * 2).is_empty());
        seen.keep(&Found::new(), start);
        assert!(seen.0.is_empty());
    }
}
