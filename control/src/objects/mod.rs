//! Kubernetes objects, as a source hands them over: typed, named, and with the place they came from.
//!
//! In: text, or later a watch of the Kubernetes API. Out: an [`ObjectSet`]. What cannot be read is part of the set as
//! [`Broken`], so that the compiler can keep the last good version in force and say why.

pub mod access;
pub mod canary;
pub mod decode;
pub mod inference;
pub mod pool;
pub mod rate;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use gateway_api::experimental::grpcroutes::GRPCRoute;
use gateway_api::experimental::httproutes::HTTPRoute;
use gateway_api::referencegrants::ReferenceGrant;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use penstock_api::yaml::Node;
use serde::{Deserialize, Serialize};

use self::access::AccessPolicy;
use self::canary::{Canary, Course};
use self::inference::InferencePolicy;
use self::pool::InferencePool;
use self::rate::RateLimit;

/// Everything that a source knows at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ObjectSet {
    /// In any order; two of the same id are a problem that the compiler reports.
    pub objects: Vec<Arc<Object>>,
    /// What could not be read.
    pub broken: Vec<Broken>,
    /// Where the requests of Canaries go, as far as that does not stand in an object that can be read.
    pub courses: BTreeMap<ObjectId, Course>,
}

/// One object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Object {
    /// Where it stands.
    pub origin: Origin,
    /// What it is and how it is called.
    pub id: ObjectId,
    /// The object itself.
    pub body: Body,
    /// The lines of its fields, when it came from text.
    #[serde(skip)]
    pub lines: Option<Arc<Node>>,
}

/// Where an object, or what should have been one, stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The file.
    pub file: Arc<str>,
    /// From 1; 0 when unknown.
    pub line: usize,
}

/// The kinds that the control plane reads, what is referred to before what refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each variant is the kind of the same name")]
pub enum ObjectKind {
    Pod,
    EndpointSlice,
    ReferenceGrant,
    InferencePolicy,
    Service,
    InferencePool,
    HTTPRoute,
    GRPCRoute,
    Canary,
    AccessPolicy,
    RateLimit,
}

impl ObjectKind {
    /// Whether control writes into its status what became of it.
    pub fn has_status(self) -> bool {
        matches!(
            self,
            Self::InferencePool
                | Self::HTTPRoute
                | Self::GRPCRoute
                | Self::Canary
                | Self::InferencePolicy
                | Self::AccessPolicy
                | Self::RateLimit
        )
    }
}

/// The name of an object; there is at most one object of a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectId {
    /// Its kind.
    pub kind: ObjectKind,
    /// Its namespace, `default` unless said.
    pub namespace: String,
    /// Its name in the namespace.
    pub name: String,
}

/// A typed object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each variant is the kind of the same name")]
pub enum Body {
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Pod(Box<Pod>),
    InferencePool(Box<InferencePool>),
    HTTPRoute(Box<HTTPRoute>),
    GRPCRoute(Box<GRPCRoute>),
    ReferenceGrant(Box<ReferenceGrant>),
    InferencePolicy(Box<InferencePolicy>),
    AccessPolicy(Box<AccessPolicy>),
    RateLimit(Box<RateLimit>),
    Canary(Box<Canary>),
}

/// Something that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Where.
    pub origin: Origin,
    /// What is lost with it.
    pub scope: Scope,
    /// What is wrong and what to do.
    pub message: String,
}

/// Which objects may be missing from a set although nobody deleted them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All: the source itself could not be read.
    Source,
    /// Those of the file, as far as the set doesn't have them.
    File,
    /// This one.
    Object(ObjectId),
}

impl Object {
    /// The line of a field, named by a JSON pointer, or of the nearest thing around it.
    pub fn line_of(&self, pointer: &str) -> usize {
        self.lines.as_ref().map_or(self.origin.line, |node| node.line_of(pointer))
    }

    /// Its metadata.
    pub fn metadata(&self) -> &ObjectMeta {
        match &self.body {
            Body::Service(object) => &object.metadata,
            Body::EndpointSlice(object) => &object.metadata,
            Body::Pod(object) => &object.metadata,
            Body::InferencePool(object) => &object.metadata,
            Body::HTTPRoute(object) => &object.metadata,
            Body::GRPCRoute(object) => &object.metadata,
            Body::ReferenceGrant(object) => &object.metadata,
            Body::InferencePolicy(object) => &object.metadata,
            Body::AccessPolicy(object) => &object.metadata,
            Body::RateLimit(object) => &object.metadata,
            Body::Canary(object) => &object.metadata,
        }
    }

    /// The value of an annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.metadata().annotations.as_ref()?.get(key).map(String::as_str)
    }
}

/// The JSON pointer of an annotation.
pub fn annotation_pointer(key: &str) -> String {
    format!("/metadata/annotations/{}", key.replace('~', "~0").replace('/', "~1"))
}

impl ObjectId {
    /// `<namespace>/<name>`, as resources are named.
    pub fn qualified(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}/{}", self.kind, self.namespace, self.name)
    }
}
