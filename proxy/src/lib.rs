//! The sidecar: routes, balances and secures the traffic of one pod.

pub mod backoff;
pub mod identity;
pub mod telemetry;
