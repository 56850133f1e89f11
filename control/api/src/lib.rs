//! What control and proxy say to each other: protobuf messages, resource names, annotations, SPIFFE ids,
//! and the closed lists (reasons, headers) that both sides, the command line and the documentation share; and what is
//! read of people's own text before anybody decides by it (annotations, paths, YAML).
//!
//! A fact that two programs must agree on lives here, once.

pub mod access;
pub mod annotation;
pub mod identity;
pub mod latency;
pub mod metric;
pub mod names;
pub mod path;
pub mod reason;
pub mod resource;
pub mod service;
mod shown;
pub mod view;
pub mod yaml;

pub use identity::SpiffeId;
pub use reason::Reason;
pub use service::ServiceName;
pub use shown::shown;

/// The delta, aggregated part of the xDS transport.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}

/// Penstock's own messages: resources, identity, fleet.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("penstock.v1");
}
