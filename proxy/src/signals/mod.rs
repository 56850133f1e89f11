//! What the model server and the GPU behind us say of themselves.
//!
//! In: the pod's ports, and what the operator declared. Out: [`Signals`], which the inbound report reads on every
//! response without a lock. What can go wrong: a source is missing, late, or speaks nonsense. Then its numbers are "not
//! told", the gauge [`SIGNAL_SOURCE_UP`](crate::telemetry::metric::SIGNAL_SOURCE_UP) says so, and one log line says why; nothing waits and nothing fails.
//!
//! ```text
//! find    which port of the pod has a model server's metrics page   (pure)
//! fetch   one page, bounded in bytes and time
//! server  looks at it every 250 ms                                  → Signals
//! nvml    the driver's library, on a thread of its own, if it loads ┐
//! dcgm    else an exporter's page, if one is declared               ┴ gpus → Signals
//! health  what a GPU's readings mean                                (pure)
//! ```
//!
//! Everything here runs on the control runtime: a slow page costs no request anything.

pub mod fetch;
pub mod find;
mod gpus;
pub mod health;
mod nvml;
mod server;
mod source;
mod state;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use penstock_api::v1::Protocol;
use tokio::time::Instant;

use crate::config::Store;
pub use find::{Port, Where};
pub use gpus::Owned;
pub use state::{GpuSeen, ServerSeen, Signals};

/// What is looked at, and how often.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the model server's page is.
    pub server: Where,
    /// How often it is looked at. The gauges of a queue are old after a few requests, so this is short; a page that
    /// takes long is looked at less often.
    pub every: Duration,
    /// How long one look may take.
    pub timeout: Duration,
    /// The driver's library; `None`: not looked for.
    pub nvml: Option<PathBuf>,
    /// A DCGM exporter's page, `host:port/path`, for when the library is not there.
    pub dcgm: Option<String>,
    /// Which GPUs are this pod's.
    pub owned: Owned,
}

/// What the NVIDIA driver calls its library.
pub const NVML_LIBRARY: &str = "libnvidia-ml.so.1";

impl Default for Config {
    fn default() -> Self {
        Self {
            server: Where::Detect,
            every: Duration::from_millis(250),
            timeout: Duration::from_secs(1),
            nvml: Some(NVML_LIBRARY.into()),
            dcgm: None,
            owned: Owned::default(),
        }
    }
}

/// Looks at every source, for ever. `ports` says which ports the pod has now (see [`ports`]); `epoch` is that of every
/// `now`.
pub async fn run(config: Config, signals: Arc<Signals>, ports: impl Fn() -> Vec<Port>, epoch: Instant) {
    tokio::join!(server::watch(&config, &signals, ports, epoch), gpus::watch(&config, &signals, epoch),);
}

/// The ports of our own pod that may have a metrics page: those that are declared to speak HTTP/1, and those of which
/// nobody said what they speak. Control tells them, so they change.
pub fn ports(store: &Store) -> Vec<Port> {
    let snapshot = store.snapshot();
    let Some(workload) = &snapshot.workload else { return Vec::new() };
    let mut ports = Vec::new();
    for port in &workload.ports {
        let declared = match port.protocol {
            Protocol::Http | Protocol::Http1 => true,
            Protocol::Detect => false,
            Protocol::Http2 | Protocol::Grpc | Protocol::Opaque | Protocol::Tls => continue,
        };
        let endpoints = port.cluster.endpoints();
        let address: Option<SocketAddr> = endpoints.first().map(|application| application.address);
        ports.extend(address.map(|address| Port { address, declared }));
    }
    ports
}
