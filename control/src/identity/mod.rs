//! Who is who: the certificate authority, the tokens that workloads prove themselves with, and the TLS that control
//! itself serves.
//!
//! In: a state directory, CSRs with bearer tokens, TLS handshakes. Out: short-lived certificates for
//! `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`, trust anchors, verified peers. What can go wrong
//! has a reason that names the workload and what to do.

mod authority;
mod ca;
pub mod csr;
pub mod material;
pub mod replica;
pub mod review;
pub mod rotation;
mod service;
pub mod state;
pub mod tls;
pub mod token;

use std::time::SystemTime;

pub use authority::{ANCHORS, Authority, Trust, rotate_root};
pub use ca::{Issuing, Leaf};
pub(crate) use ca::{set_validity, validity};
pub use service::IdentityService;

/// Seconds since the epoch.
pub fn epoch(now: SystemTime) -> i64 {
    now.duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .unwrap_or_default()
}
