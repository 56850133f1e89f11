//! Events on objects of the cluster, for who looks with `kubectl describe`.
//!
//! In: what happened, to which object. Out: an Event of events.k8s.io, once for each object and reason (and note, where it says so): its name is made of
//! these, so that the API server itself refuses a second one, of this control, of another replica, or of the next. Events are
//! sent one after the other and at a measured pace, by who writes alone. Can go wrong: the API server is away, and they wait;
//! too many wait, and [`Events::tell`] says so; the API server wants none of one, which is logged.

use std::collections::HashSet;
use std::time::Duration;

use k8s_openapi::api::events::v1 as api;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, PostParams};
use metrics::counter;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::metric;

/// Who it is that tells.
const CONTROLLER: &str = "penstock-control";
/// How many may wait.
const QUEUE: usize = 256;
/// Between two of them: a namespace that is labelled has a thousand pods at once.
const PACE: Duration = Duration::from_millis(50);
/// An API server that has not answered by then is away.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest wait between attempts.
const BACKOFF: Duration = Duration::from_secs(30);
/// Names that are remembered as told, to ask the API server less; it knows the rest.
const REMEMBERED: usize = 8192;
/// Of `note`, as the API server has it, in bytes.
const NOTE: usize = 1024;

/// What an Event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regarding {
    /// `v1`
    pub api_version: String,
    /// `Pod`
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// To whom.
    pub regarding: Regarding,
    /// In one word, `NotInjected`.
    pub reason: &'static str,
    /// What control was doing, `Inject`.
    pub action: &'static str,
    /// Whether somebody should do something.
    pub warning: bool,
    /// What it is and what to do.
    pub note: String,
    /// Whether each note is an Event of its own; otherwise the first of an object and reason is all.
    pub each: bool,
}

impl Event {
    /// The same for each object and reason, and note if each is an Event.
    fn name(&self) -> String {
        let Regarding { kind, uid, name, .. } = &self.regarding;
        let note = if self.each { &*self.note } else { "" };
        let hash = blake3::hash(format!("{kind}/{uid}/{}{note}", self.reason).as_bytes()).to_hex();
        let (name, hash) = (name.get(..200).unwrap_or(name), hash.get(..16).unwrap_or_default());
        format!("{}.{hash}", name.trim_end_matches(['-', '.']))
    }

    fn object(&self, instance: &str, now: &str) -> serde_json::Value {
        let Regarding { api_version, kind, namespace, name, uid } = &self.regarding;
        let mut note = self.note.clone();
        note.truncate((0..=NOTE.min(note.len())).rev().find(|at| note.is_char_boundary(*at)).unwrap_or(0));
        json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": {"name": self.name(), "namespace": namespace},
            "eventTime": now,
            "reportingController": CONTROLLER,
            "reportingInstance": instance,
            "type": if self.warning { "Warning" } else { "Normal" },
            "reason": self.reason,
            "action": self.action,
            "note": note,
            "regarding": {
                "apiVersion": api_version, "kind": kind, "namespace": namespace, "name": name, "uid": uid,
            },
        })
    }
}

/// Takes Events.
#[derive(Clone, Debug)]
pub struct Events {
    sender: mpsc::Sender<Event>,
    writes: watch::Receiver<bool>,
}

impl Events {
    /// Sends by this client while `writes`, in the name of `instance`, until told to stop.
    pub fn start(
        client: Client,
        instance: String,
        writes: watch::Receiver<bool>,
        stop: CancellationToken,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let worker = send_all(client, instance, writes.clone(), receiver);
        tokio::spawn(async move { stop.run_until_cancelled(worker).await });
        Self { sender, writes }
    }

    /// Tells it; whether it is going to be told. If not, another replica writes, or too many wait: ask again later.
    pub fn tell(&self, event: Event) -> bool {
        if !*self.writes.borrow() {
            return false;
        }
        let taken = self.sender.try_send(event).is_ok();
        if !taken {
            count("full");
        }
        taken
    }

    /// Whether this replica is the one that writes.
    pub fn writes(&self) -> bool {
        *self.writes.borrow()
    }
}

fn count(outcome: &'static str) {
    counter!(metric::EVENTS.name, "outcome" => outcome).increment(1);
}

async fn send_all(
    client: Client,
    instance: String,
    writes: watch::Receiver<bool>,
    mut queue: mpsc::Receiver<Event>,
) {
    let mut told = HashSet::new();
    while let Some(event) = queue.recv().await {
        let name = (event.regarding.namespace.clone(), event.name());
        if told.contains(&name) {
            continue;
        }
        let mut wait = Duration::from_secs(1);
        // Who no longer writes leaves it to who does.
        while *writes.borrow() {
            match send(&client, &event, &instance).await {
                Ok(()) => {
                    count("sent");
                    break;
                }
                // The API server's word for a name that it has.
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    count("known");
                    break;
                }
                Err(kube::Error::Api(status)) if (400..500).contains(&status.code) && status.code != 429 => {
                    count("refused");
                    let (what, reason) = (&event.regarding, event.reason);
                    tracing::warn!(
                        "the Kubernetes API wants no event {reason} on {} {}/{}: {}",
                        what.kind,
                        what.namespace,
                        what.name,
                        status.message
                    );
                    break;
                }
                Err(error) => {
                    count("failed");
                    tracing::debug!("an event waits for the Kubernetes API: {error}");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(BACKOFF);
                }
            }
        }
        // Another replica writes now, and tells it.
        if !*writes.borrow() {
            continue;
        }
        if told.len() >= REMEMBERED {
            told.clear();
        }
        told.insert(name);
        tokio::time::sleep(PACE).await;
    }
}

async fn send(client: &Client, event: &Event, instance: &str) -> kube::Result<()> {
    let events: Api<api::Event> = Api::namespaced(client.clone(), &event.regarding.namespace);
    let object = event.object(instance, &Timestamp::now().to_string());
    let object = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
    match timeout(PATIENCE, events.create(&PostParams::default(), &object)).await {
        Ok(answer) => answer.map(drop),
        Err(late) => Err(kube::Error::Service(late.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, uid: &str) -> Event {
        Event {
            regarding: Regarding {
                api_version: "v1".into(),
                kind: "Pod".into(),
                namespace: "team-a".into(),
                name: name.into(),
                uid: uid.into(),
            },
            reason: "NotInjected",
            action: "Inject",
            warning: true,
            note: "é".repeat(NOTE),
            each: false,
        }
    }

    #[test]
    fn an_object_has_one_event_of_a_reason_by_the_name_of_it() {
        let one = event("web-0", "1");
        assert_eq!(one.name(), event("web-0", "1").name());
        assert_ne!(one.name(), event("web-0", "2").name());
        assert_ne!(one.name(), Event { reason: "Other", ..one.clone() }.name());
        let other = Event { note: "other".into(), ..one.clone() };
        assert_eq!(one.name(), other.name());
        assert_ne!(Event { each: true, ..one.clone() }.name(), Event { each: true, ..other }.name());
        let long = event(&format!("{}-{}", "a".repeat(199), "b".repeat(50)), "1").name();
        assert!(long.len() < 253 && !long.contains("-."), "{long}");
        let object = one.object("control-0", "2026-01-01T00:00:00.000000Z");
        assert!(object["note"].as_str().unwrap().len() <= NOTE);
        assert!(serde_json::from_value::<api::Event>(object).is_ok());
    }
}
