//! Pushing configuration: the delta, aggregated xDS transport with Penstock's own resource types.
//!
//! In: snapshots, and the streams of proxies with a verified identity. Out: to each proxy what it subscribes to, and only what
//! changed. The decisions are in [`Stream`], which does no input or output; [`AdsService`] moves bytes.
//!
//! What a client can rely on, beyond the protocol:
//!
//! - A subscription to a Service's name answers with everything its routes lead to; each resource names the
//!   subscriptions it answers in `aliases`.
//! - Names under which nothing exists are listed in `removed_resources`, so that nobody waits; they stay subscribed.
//! - A type that control does not know answers the same way, and the stream lives on.
//! - In a NACK, the resources whose names the message contains are refused and their siblings count as applied; when
//!   it contains none, all are refused.
//! - A proxy may subscribe to its own `Workload` only; asking for another's ends the stream with `PERMISSION_DENIED`.

pub mod caller;
mod refusal;
mod service;
mod stream;
mod subscription;
#[cfg(test)]
mod tests;

pub use service::{AdsService, publish};
pub use stream::{Fault, Published, Stream};
