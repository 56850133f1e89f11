//! What became of an object: whether it is in force, why not, and which resources it is part of.
//!
//! The compiler makes these beside the resources; statuses and Events are made from them. Nothing here knows of Kubernetes' API.

use std::collections::{BTreeMap, BTreeSet};

use penstock_api::resource::Kind;

use crate::canary::template::Template;
use crate::objects::ObjectId;
use crate::objects::canary::Course;

/// All of which something is to be told.
pub type Outcomes = BTreeMap<ObjectId, Outcome>;

/// What became of the newest version of one object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Which version that is; `None` where it could not be read.
    pub generation: Option<i64>,
    /// Which of the objects that had the name, one after the other.
    pub uid: Option<String>,
    /// What is wrong with it.
    pub findings: Vec<Finding>,
    /// An earlier version is in force instead.
    pub last_good: bool,
    /// Of a route, the parents that are ours.
    pub parents: Vec<Parent>,
    /// The resources that it is part of.
    pub resources: BTreeSet<(Kind, String)>,
    /// Of a Canary, where requests go by what is compiled.
    pub course: Option<Course>,
    /// Of a Canary, the templates of its Deployment.
    pub templates: Vec<Template>,
}

/// A parent of an object, as the object names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its place in `spec.parentRefs`.
    pub index: usize,
    /// The reference, word for word.
    pub reference: serde_json::Value,
}

/// Something that is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Of what kind.
    pub reason: Reason,
    /// The field, a JSON pointer.
    pub pointer: String,
    /// What is wrong and what to do.
    pub message: String,
    /// The object makes no sense; otherwise it is in force, as far as can be.
    pub refused: bool,
}

/// Kinds of what is wrong, as the Gateway API and its policies tell them apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A field that cannot be, or is not supported.
    #[default]
    Value,
    /// Filters of a rule that cannot go together.
    IncompatibleFilters,
    /// There is no such parent; its place in `spec.parentRefs`.
    NoMatchingParent(usize),
    /// A reference into a namespace that does not permit it.
    RefNotPermitted,
    /// A reference to what is no backend.
    InvalidKind,
    /// A reference to what is not there.
    BackendNotFound,
    /// What a policy is for is not there.
    TargetNotFound,
    /// Another policy is in force already.
    Conflicted,
}

impl Reason {
    /// Whether it is about a reference to a backend, so that the object itself is accepted.
    pub fn of_reference(self) -> bool {
        matches!(self, Self::RefNotPermitted | Self::InvalidKind | Self::BackendNotFound)
    }
}
