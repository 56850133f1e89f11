//! The replicas: eight processes of `penstock-simgpu`, each with an address of its own on loopback.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use hyper::Method;
use serde::Deserialize;

use super::case::{Case, FIXED_MS, MAX_BATCH, REPLICAS, ROW_MS};
use super::client::ask;
use crate::process::{self, Process};

/// The port of every replica.
pub(crate) const PORT: u16 = 8000;
/// The last byte of the first replica's address.
const FIRST: u8 = 11;
/// How long a page of a replica may take.
const PAGE: Duration = Duration::from_secs(5);

/// What a replica has counted since it was reset.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct State {
    pub(crate) units: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
}

/// Running replicas.
pub(crate) struct Fleet {
    processes: Vec<Process>,
    /// Where they listen.
    pub(crate) addresses: Vec<SocketAddr>,
}

/// An address of loopback that other benches and tests do not use: two bytes of it are this process's number. On one of its own, a
/// listener's port is never taken by a connection of somebody else.
pub(crate) fn ip(last: u8) -> Ipv4Addr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 64 + high % 128, low, last)
}

impl Fleet {
    /// Starts all replicas; the one that stalls does so from `stall.0` for `stall.1`, counted from a reset.
    pub(crate) async fn start(
        case: &Case,
        stall: (Duration, Duration),
        program: &Path,
        dir: &Path,
    ) -> Result<Self> {
        let mut fleet = Self { processes: Vec::new(), addresses: Vec::new() };
        for (replica, last) in (0..REPLICAS).zip(FIRST..) {
            let address = SocketAddr::new(IpAddr::V4(ip(last)), PORT);
            let mut args: Vec<OsString> = vec![if case.is_chat() { "chat" } else { "tensor" }.into()];
            let mut flag =
                |name: &str, value: String| args.extend([format!("--{name}").into(), value.into()]);
            flag("listen", address.to_string());
            flag("speed", case.speeds[replica].to_string());
            if case.is_chat() {
                // A model of some 8 billion parameters on a GPU of the middle class, all four times as fast, so that a run
                // of seconds has enough requests: 20,000 prompt tokens a second, and a token of each answer every 10 ms.
                flag("prompt-token", "50us".to_owned());
                flag("step", "10ms".to_owned());
                flag("sequence", "200us".to_owned());
                flag("mean-output", "32".to_owned());
                flag("blocks", "2048".to_owned());
            } else {
                flag("fixed", format!("{FIXED_MS}ms"));
                flag("row", format!("{ROW_MS}ms"));
                flag("max-batch", MAX_BATCH.to_string());
            }
            if case.stalled == Some(replica) {
                flag("slow", format!("{}ms+{}ms", stall.0.as_millis(), stall.1.as_millis()));
            }
            let name = format!("simgpu-{replica}");
            let mut process = process::spawn(None, &name, program, &args, dir, true)?;
            process.line().await?;
            fleet.processes.push(process);
            fleet.addresses.push(address);
        }
        Ok(fleet)
    }

    /// Empties all queues and caches and starts the clocks of the replicas anew.
    pub(crate) async fn reset(&self) -> Result<()> {
        for address in &self.addresses {
            page(Method::POST, *address, "/sim/reset").await?;
        }
        Ok(())
    }

    /// What each has counted.
    pub(crate) async fn states(&self) -> Result<Vec<State>> {
        let mut states = Vec::new();
        for address in &self.addresses {
            let body = page(Method::GET, *address, "/sim/state").await?;
            states.push(serde_json::from_slice(&body).context("the state of a replica")?);
        }
        Ok(states)
    }

    /// Fails if one has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::check)
    }

    /// Ends all.
    pub(crate) async fn stop(self) {
        for process in self.processes {
            process.stop().await;
        }
    }
}

async fn page(method: Method, address: SocketAddr, path: &str) -> Result<Bytes> {
    match ask(method, address, "sim", path, Bytes::new(), PAGE).await? {
        (200, body) => Ok(body),
        (status, body) => bail!("{address}{path} answered {status}: {}", String::from_utf8_lossy(&body)),
    }
}
