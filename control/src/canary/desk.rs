//! What a person sees of Canaries, and what he asks for.
//!
//! In a cluster both go through the object: its status, its annotations, `spec.paused`. On one machine control itself shows them and takes
//! commands, and keeps these with the diaries.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use penstock_api::names::annotation;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Diary;
use crate::objects::canary::Canary;
use crate::objects::{Object, ObjectId};

/// What a person wants done, each a text that no earlier command had: `<run>/<anything>`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Let the step go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promote: Option<String>,
    /// Go back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<String>,
    /// Nothing moves but back; absent: as the object says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
}

impl Command {
    /// As the annotations of an object have it.
    pub fn of(object: &Object) -> Self {
        let said = |key| object.annotation(key).map(str::to_owned);
        Self { promote: said(annotation::PROMOTE), abort: said(annotation::ABORT), paused: None }
    }
}

/// A Canary as it is shown: an object of its kind, as JSON.
pub type Shown = Value;

/// A Canary with its whole status.
pub(super) fn shown(object: &Object, canary: &Canary, diary: &Diary, paused: Option<bool>) -> Shown {
    let mut spec = canary.spec.clone();
    spec.paused = paused.unwrap_or(spec.paused);
    let mut metadata = json!({"namespace": object.id.namespace, "name": object.id.name});
    if let Some(created) = &canary.metadata.creation_timestamp {
        metadata["creationTimestamp"] = json!(created);
    }
    // Commands are about the run that is on, and that is not what a version that is refused asks for.
    let run = if diary.run.is_empty() { canary.spec.run_id() } else { diary.run.clone() };
    json!({
        "apiVersion": canary.api_version, "kind": canary.kind,
        "metadata": metadata,
        "run": run,
        "spec": spec,
        "status": diary,
    })
}

/// Commands that control itself has taken, where no object can carry them.
#[derive(Clone, Debug, Default)]
pub struct Commands(Arc<Mutex<BTreeMap<ObjectId, Command>>>);

impl Commands {
    /// The newest of a Canary.
    pub fn of(&self, id: &ObjectId) -> Command {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned().unwrap_or_default()
    }

    /// Forgets those of others.
    pub(super) fn only(&self, keep: &dyn Fn(&ObjectId) -> bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| keep(id));
    }

    /// Changes them.
    pub fn change(&self, id: &ObjectId, change: impl FnOnce(&mut Command)) {
        change(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(id.clone()).or_default());
    }
}
