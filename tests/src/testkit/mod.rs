//! What the tests of the whole system stand on: the real binaries as processes, meshes of them on loopback, origins
//! and clients that can misbehave on purpose.
//!
//! In: what a test wants to exist. Out: addresses to talk to, and what the processes say of themselves. Whatever goes
//! wrong here panics, because it fails the test; the ends of the logs of all processes are shown then. Everything ends
//! when its owner is dropped.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

pub mod ask;
pub mod cases;
pub mod certificates;
pub mod gpu;
pub mod kubernetes;
pub mod load;
pub mod mesh;
pub mod namespace;
pub mod origin;
pub mod peers;
pub mod pods;
pub mod process;
pub mod proxy;
pub mod servers;
pub mod wire;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// How long anything may take that normally takes milliseconds, on a machine that does ten things at once.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds, and panics with `what` if it does not within `limit`.
pub async fn wait_until(what: &str, limit: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An address of loopback that nobody else uses, so that fixed ports never collide: two bytes of it tell this process
/// from others, the last tells its callers apart.
pub fn own_ip() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let last = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(last < 255, "one test binary has used up its addresses");
    Ipv4Addr::new(127, 64 + high % 128, low, last)
}

/// A port of [`own_ip`] that the kernel chooses.
pub fn anywhere() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(own_ip()), 0)
}
