//! What the API server has in the statuses of objects, for who writes them.
//!
//! In: the watches, of the kinds that have a status of ours. Out: each object's status and the version that it belongs to. It is kept apart
//! from the objects, which are compiled without it: a status that changes is no new configuration.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kube::api::DynamicObject;
use serde_json::Value;

use super::store::id_of;
use crate::objects::{ObjectId, ObjectKind};

/// An object's status, as it was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// The version of the object: a write rests on it.
    pub version: String,
    /// The number of its specification.
    pub generation: Option<i64>,
    /// Which of the objects that had the name.
    pub uid: String,
    /// The status; null where there is none.
    pub status: Value,
}

/// The statuses of all objects.
#[derive(Clone, Debug, Default)]
pub struct Statuses(Arc<Mutex<HashMap<ObjectId, Known>>>);

impl Statuses {
    /// The status of an object; `None` if there is no such object.
    pub fn known(&self, id: &ObjectId) -> Option<Known> {
        self.locked().get(id).cloned()
    }

    /// Takes note of an object.
    pub(super) fn put(&self, kind: ObjectKind, object: &DynamicObject) {
        if !kind.has_status() {
            return;
        }
        let known = Known {
            version: object.metadata.resource_version.clone().unwrap_or_default(),
            generation: object.metadata.generation,
            uid: object.metadata.uid.clone().unwrap_or_default(),
            status: object.data.get("status").cloned().unwrap_or_default(),
        };
        self.locked().insert(id_of(kind, object), known);
    }

    /// Forgets an object.
    pub(super) fn gone(&self, id: &ObjectId) {
        self.locked().remove(id);
    }

    /// Forgets the objects of a kind that a list did not name.
    pub(super) fn only(&self, kind: ObjectKind, listed: &HashSet<ObjectId>) {
        self.locked().retain(|id, _| id.kind != kind || listed.contains(id));
    }

    /// Held for a look, never across an await.
    fn locked(&self) -> MutexGuard<'_, HashMap<ObjectId, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
