//! The control plane: a source's objects become one versioned snapshot, which is pushed to the proxies that ask for
//! parts of it; identities are signed; what proxies report is kept for the command line.

pub mod api;
pub mod canary;
pub mod cluster;
pub mod compile;
pub mod conditions;
pub mod events;
pub mod fleet;
pub mod identity;
pub mod metric;
pub mod namespaces;
pub mod objects;
pub mod outcome;
pub mod push;
pub mod serve;
pub mod snapshot;
pub mod source;
mod trouble;
pub mod webhook;
