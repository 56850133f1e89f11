//! Diaries of Canaries in a cluster: the statuses of the objects, written by the holder of the Lease.
//!
//! What was written is told by the watch some milliseconds later; until then this replica goes on from what it wrote. A write names the
//! version that it rests on: whoever has changed the object meanwhile is looked at first.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result};
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use metrics::counter;
use penstock_api::v1::{SeenReply, SeenRequest};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::replicas::{self, Answer, Others};
use super::{Outcome as Written, Place, written};
use crate::canary::{Command, Diary, Entry, Home, Phase};
use crate::conditions::Reach;
use crate::events::{Event, Events, Regarding};
use crate::fleet::Tally;
use crate::metric;
use crate::objects::{Object, ObjectId};
use crate::source::kubernetes::{Known, Statuses, Watched};

/// Who writes, in `managedFields`.
const WRITER: &str = "penstock-control-canary";
/// A replica that takes longer is not waited for: a canary that fails goes back at once.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);

/// The cluster's diaries.
#[derive(Debug)]
pub(super) struct InCluster {
    pub(super) place: Place,
    pub(super) statuses: Statuses,
    pub(super) others: Others,
    pub(super) events: Events,
    pub(super) leads: watch::Receiver<bool>,
    /// What the other replicas said last.
    pub(super) answers: Vec<Answer>,
    /// What was written, and on which version it rested.
    pub(super) written: BTreeMap<ObjectId, (String, Diary)>,
}

impl InCluster {
    fn known(&self, id: &ObjectId) -> Option<(Known, Diary)> {
        let known = self.statuses.known(id)?;
        if let Some((on, diary)) = self.written.get(id)
            && *on == known.version
        {
            return Some((known, diary.clone()));
        }
        // A status that somebody else has broken is begun anew, by the rules of a new run.
        let diary = serde_json::from_value(known.status.clone()).unwrap_or_default();
        Some((known, diary))
    }
}

impl Home for InCluster {
    fn leads(&self) -> bool {
        *self.leads.borrow()
    }

    fn diary(&self, id: &ObjectId) -> Option<Diary> {
        self.known(id).map(|(_, diary)| diary)
    }

    /// Statuses go with their objects.
    async fn only(&mut self, keep: &(dyn Fn(&ObjectId) -> bool + Sync)) -> Result<()> {
        self.written.retain(|id, _| keep(id));
        Ok(())
    }

    fn command(&self, object: &Object) -> Command {
        Command::of(object)
    }

    async fn reach(&mut self) {
        self.answers = self.others.ask().await;
    }

    fn joined(&self, id: &ObjectId, own: Tally, version: &str) -> Reach {
        replicas::joined(id, own, version, &self.answers)
    }

    async fn seen(&self, service: &str, windows: &[Duration]) -> Vec<SeenReply> {
        let ms = |window: &Duration| u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        let windows_ms = windows.iter().map(ms).collect();
        self.others.seen(SeenRequest { services: vec![service.to_owned()], windows_ms }).await
    }

    async fn write(&mut self, id: &ObjectId, diary: &Diary) -> Result<bool> {
        let Some((known, before)) = self.known(id) else { return Ok(false) };
        // Of what was written the watch has not told yet: a second write would rest on a version that is gone.
        if self.written.get(id).is_some_and(|(on, _)| *on == known.version) && before.course == diary.course {
            return Ok(false);
        }
        let watched = Watched::of(id.kind).context("no kind that is watched")?;
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.place.client.clone(), &id.namespace, &watched.resource());
        let status = replacing(&known.status, &serde_json::to_value(diary)?);
        let patch = Patch::Merge(json!({"metadata": {"resourceVersion": known.version}, "status": status}));
        let params = PatchParams { field_manager: Some(WRITER.to_owned()), ..PatchParams::default() };
        let outcome = match written(api.patch_status(&id.name, &params, &patch)).await {
            Ok(Written::Done(_)) => {
                self.written.insert(id.clone(), (known.version, diary.clone()));
                Ok("written")
            }
            Ok(Written::Overtaken) => {
                self.written.remove(id);
                Ok("overtaken")
            }
            Err(error) => Err(error),
        };
        counter!(metric::STATUSES.name, "outcome" => *outcome.as_ref().unwrap_or(&"failed")).increment(1);
        outcome.map(|outcome| outcome == "written")
    }

    fn tell(&self, object: &Object, entry: &Entry) {
        let Some(known) = self.statuses.known(&object.id) else { return };
        let Some(watched) = Watched::of(object.id.kind) else { return };
        let (reason, warning) = match entry.phase {
            Phase::Waiting => ("Waiting", false),
            Phase::Progressing => ("Progressing", false),
            Phase::Paused => ("Paused", false),
            Phase::Promoting => ("Promoting", false),
            Phase::Succeeded => ("Succeeded", false),
            Phase::RollingBack => ("RollingBack", true),
            Phase::RolledBack => ("RolledBack", true),
            Phase::Invalid => ("Invalid", true),
        };
        let event = Event {
            regarding: Regarding {
                api_version: watched.api_version(),
                kind: format!("{:?}", object.id.kind),
                namespace: object.id.namespace.clone(),
                name: object.id.name.clone(),
                uid: known.uid,
            },
            reason,
            action: "Canary",
            warning,
            note: format!("weight {}: {} ({})", entry.weight, entry.message, entry.at),
            each: true,
        };
        // Too many wait: what happened stands in the history of the status too.
        self.events.tell(event);
    }
}

/// A merge patch that leaves of `known` nothing that `wanted` has not: what is not named is set to null.
fn replacing(known: &Value, wanted: &Value) -> Value {
    let (Some(before), Some(after)) = (known.as_object(), wanted.as_object()) else { return wanted.clone() };
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let of = |key: &String| match (before.get(key), after.get(key)) {
        (Some(before), Some(after)) => replacing(before, after),
        (_, after) => after.cloned().unwrap_or_default(),
    };
    Value::Object(keys.into_iter().map(|key| (key.clone(), of(key))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_longer_said_is_taken_away() {
        let known = json!({"phase": "Progressing", "shadow": {"sent": 1, "agreement": 9.0}, "history": [1]});
        let wanted = json!({"phase": "Paused", "shadow": {"sent": 2}, "history": [1, 2]});
        let patch = replacing(&known, &wanted);
        assert_eq!(
            patch,
            json!({"phase": "Paused", "shadow": {"sent": 2, "agreement": null}, "history": [1, 2]})
        );
        assert_eq!(replacing(&Value::Null, &wanted), wanted);
    }
}
