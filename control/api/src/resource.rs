//! Resource types on the xDS transport: their URLs, their order, and how a version is made.

use prost::Message;

use crate::v1;

/// What a compiled regular expression of a route may take at most, bytes. Control refuses what a proxy would, where
/// the file and the line are known.
pub const REGEX_SIZE: usize = 1 << 20;

/// The types that control pushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// [`v1::TrustBundle`], named by the trust domain.
    TrustBundle,
    /// [`v1::Access`], named `<namespace>/<pod>`.
    Access,
    /// [`v1::Workload`], named `<namespace>/<pod>`.
    Workload,
    /// [`v1::Address`], named `<ip>:<port>`.
    Address,
    /// [`v1::Service`], named `<namespace>/<name>`.
    Service,
    /// [`v1::Endpoints`], named `<namespace>/<service>`.
    Endpoints,
    /// [`v1::Routes`], named `<namespace>/<service>`.
    Routes,
    /// [`v1::Weights`], named `<namespace>/<service>/<route-namespace>/<route>/<rule>`.
    Weights,
}

impl Kind {
    /// All kinds in the order in which control pushes them: what is referred to before what refers to it.
    pub const PUSH_ORDER: [Self; 8] = [
        Self::TrustBundle,
        Self::Access,
        Self::Workload,
        Self::Address,
        Self::Service,
        Self::Endpoints,
        Self::Routes,
        Self::Weights,
    ];

    /// The kinds of which a proxy sees its own pod's only, and without which it cannot begin.
    pub const OF_POD: [Self; 2] = [Self::Access, Self::Workload];

    /// The kinds that a subscription to a service name spans.
    pub const OF_SERVICE: [Self; 4] = [Self::Service, Self::Endpoints, Self::Routes, Self::Weights];

    /// The type URL.
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::TrustBundle => "type.googleapis.com/penstock.v1.TrustBundle",
            Self::Access => "type.googleapis.com/penstock.v1.Access",
            Self::Workload => "type.googleapis.com/penstock.v1.Workload",
            Self::Address => "type.googleapis.com/penstock.v1.Address",
            Self::Service => "type.googleapis.com/penstock.v1.Service",
            Self::Endpoints => "type.googleapis.com/penstock.v1.Endpoints",
            Self::Routes => "type.googleapis.com/penstock.v1.Routes",
            Self::Weights => "type.googleapis.com/penstock.v1.Weights",
        }
    }

    /// The kind of a type URL; `None` must be refused, never acknowledged.
    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::PUSH_ORDER.into_iter().find(|kind| kind.type_url() == url)
    }
}

/// All requests, in the unit of a mirror's share: parts of a million.
pub const WHOLE: u32 = 1_000_000;

/// The name of a [`v1::Weights`] resource.
pub fn weights_name(parent: &crate::ServiceName, route: &str, rule: u32) -> String {
    format!("{parent}/{route}/{rule}")
}

/// The version of a resource: a hash of its bytes, the same on every replica of control and after every restart.
/// Messages that go through here hold no maps, so that their bytes depend on nothing but their content.
pub fn version(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

/// Packs a message for the wire.
pub fn pack<M: Message>(kind: Kind, message: &M) -> prost_types::Any {
    prost_types::Any { type_url: kind.type_url().to_owned(), value: message.encode_to_vec() }
}

/// A resource, unpacked.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is the kind of the same name")]
#[allow(clippy::large_enum_variant, reason = "it is taken apart where it is read")]
pub enum Payload {
    TrustBundle(v1::TrustBundle),
    Access(v1::Access),
    Workload(v1::Workload),
    Address(v1::Address),
    Service(v1::Service),
    Endpoints(v1::Endpoints),
    Routes(v1::Routes),
    Weights(v1::Weights),
}

impl Payload {
    /// Decodes the bytes of a resource of `kind`.
    pub fn decode(kind: Kind, bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        Ok(match kind {
            Kind::TrustBundle => Self::TrustBundle(Message::decode(bytes)?),
            Kind::Access => Self::Access(Message::decode(bytes)?),
            Kind::Workload => Self::Workload(Message::decode(bytes)?),
            Kind::Address => Self::Address(Message::decode(bytes)?),
            Kind::Service => Self::Service(Message::decode(bytes)?),
            Kind::Endpoints => Self::Endpoints(Message::decode(bytes)?),
            Kind::Routes => Self::Routes(Message::decode(bytes)?),
            Kind::Weights => Self::Weights(Message::decode(bytes)?),
        })
    }
}
