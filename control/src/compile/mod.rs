//! From objects to the snapshot that is pushed.
//!
//! In: an [`ObjectSet`], the trust anchors, and what earlier compilations accepted. Out: a [`Snapshot`] with its
//! problems. An object that makes no sense is reported, and its last good version stays in force; an object that has
//! none is in force as far as it makes sense. [`compile`] is pure; [`run`] feeds it and publishes what it makes.

mod driver;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::objects::{Object, ObjectId, ObjectSet};
use crate::snapshot::{Builder, Snapshot};

pub use driver::run;

/// What workload certificates are verified against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustAnchors {
    /// The trust domain, `cluster.local`.
    pub trust_domain: String,
    /// DER certificates.
    pub anchors: Vec<Vec<u8>>,
}

/// What earlier compilations accepted.
#[derive(Clone, Debug, Default)]
pub struct State {
    accepted: BTreeMap<ObjectId, Accepted>,
}

#[derive(Clone, Debug)]
struct Accepted {
    /// The newest version that could be read.
    current: Arc<Object>,
    /// The newest version that made sense.
    good: Option<Arc<Object>>,
}

/// Compiles a set of objects.
pub fn compile(_set: &ObjectSet, previous: &State, _trust: &TrustAnchors) -> (Snapshot, State) {
    (Builder::default().build(Vec::new()), previous.clone())
}
