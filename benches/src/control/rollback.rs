//! The case `rollback`: how long a candidate that has begun to fail a fifth of its requests goes on getting any.
//!
//! Control and ten clients' sidecars are real processes; a hundred requests a second go to a Service whose canary is at half. The two versions answer in
//! this process. Time runs from when the candidate begins to fail until control knows from every sidecar that it has a weight of 0.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use hyper::Method;
use penstock_api::names::port;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{SUBJECT, issue_token, outside, start_with_api};
use crate::load::{self, h1};
use crate::mesh::client::ask;
use crate::mesh::sidecars::{self, NAMESPACE, Pod};
use crate::process;
use crate::report::{Named, Row, Summary};

const CASE: &str = "rollback";
const SECONDS: Named = ("seconds_from_fault_to_zero_weight", "s");
const FAILED: Named = ("failed", "requests");

const CLIENTS: u8 = 10;
/// Of each client: ten a second, and a hundred together.
const EVERY: Duration = Duration::from_millis(100);
/// How long all is well at the step before the candidate fails.
const WELL: Duration = Duration::from_secs(15);
/// Each fifth.
const FAILS: u64 = 5;
/// Nobody waits longer for a canary to move.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at control.
const LOOK: Duration = Duration::from_millis(5);

struct Rolled {
    seconds: f64,
    failed: u64,
}

/// All runs.
pub(super) async fn rows(control: &Path, proxy: &Path, runs: usize) -> Vec<Row> {
    let (mut seconds, mut failed) = (Vec::new(), Vec::new());
    for turn in 1..=runs {
        match once(control, proxy).await {
            Ok(rolled) => {
                eprintln!(
                    "{CASE}  run {turn}/{runs}  {:.2} s, {} requests failed",
                    rolled.seconds, rolled.failed
                );
                seconds.push(rolled.seconds);
                failed.push(rolled.failed as f64);
            }
            Err(error) => {
                eprintln!("{CASE}  run {turn}/{runs}  failed: {error:#}");
                return vec![Row::failed(CASE, SUBJECT, SECONDS, format!("{error:#}"))];
            }
        }
    }
    let summaries = [(SECONDS, seconds), (FAILED, failed)].into_iter();
    summaries
        .filter_map(|(named, values)| Some(Row::measured(CASE, SUBJECT, named, &Summary::of(values)?)))
        .collect()
}

async fn once(control: &Path, proxy: &Path) -> Result<Rolled> {
    let dir = tempfile::Builder::new().prefix("penstock-bench-").tempdir()?;
    let source = dir.path().join("source");
    fs::create_dir(&source)?;
    let servers = [server().await?, server().await?];
    let addresses = [servers[0].local_addr()?, servers[1].local_addr()?];
    let clients: Vec<Pod> = (0..CLIENTS)
        .map(|at| Pod {
            name: format!("client-{at}"),
            ip: Ipv4Addr::new(127, 79, 1, at + 1),
            account: "client",
        })
        .collect();
    fs::write(source.join("mesh.yaml"), objects(&clients, addresses))?;
    let (mut running, push, api) = start_with_api(control, dir.path(), &source).await?;
    let token = dir.path().join("token");
    fs::write(&token, issue_token(control, dir.path(), "client").await?)?;
    let (failing, failed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut tasks = JoinSet::new();
    for (version, server) in servers.into_iter().enumerate() {
        let failing = if version == 1 { failing.clone() } else { Arc::default() };
        let asked = AtomicU64::new(0);
        // Each fifth, while it fails.
        let status = move || {
            let fifth = asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(FAILS);
            if fifth && failing.load(Ordering::Relaxed) { "500 Failed" } else { "200 OK" }
        };
        tasks.spawn(outside::answer(server, status));
    }
    let (mut processes, mut asking) = (Vec::new(), JoinSet::new());
    let rolled = async {
        for client in &clients {
            let args = sidecars::arguments(client, push, &dir.path().join("state/anchors.pem"), &token);
            let mut sidecar = process::spawn(None, &client.name, proxy, &args, dir.path(), false)?;
            LocalSet::new().run_until(sidecars::ready(client, &mut sidecar)).await?;
            processes.push(sidecar);
            asking.spawn(requests(client.at(port::OUTBOUND), failed.clone()));
        }
        moved(api, "Progressing").await?;
        tokio::time::sleep(WELL).await;
        ensure!(failed.load(Ordering::Relaxed) == 0, "requests failed while all was well");
        failing.store(true, Ordering::Relaxed);
        let began = Instant::now();
        moved(api, "RolledBack").await?;
        // A client that has ended has not asked.
        if let Some(ended) = asking.try_join_next() {
            ended??;
        }
        Ok(Rolled { seconds: began.elapsed().as_secs_f64(), failed: failed.load(Ordering::Relaxed) })
    }
    .await;
    tasks.abort_all();
    for sidecar in processes {
        sidecar.stop().await;
    }
    running.check()?;
    running.stop().await;
    rolled
}

/// Waits until control says that the canary has come to a phase.
async fn moved(api: SocketAddr, phase: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let page = ask(Method::GET, api, "control", "/canaries", Bytes::new(), PATIENCE);
        // The client's connection is a task of its thread.
        let (_, page) = LocalSet::new().run_until(page).await?;
        let page: Value = serde_json::from_slice(&page).context("control's /canaries")?;
        let status = &page["items"][0]["status"];
        if status["phase"] == phase {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the canary is not {phase} within {PATIENCE:?}: {status}");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Asks ten times a second, until it is ended.
async fn requests(outbound: SocketAddr, failed: Arc<AtomicU64>) -> Result<()> {
    let head = format!("GET / HTTP/1.1\r\nhost: model.{NAMESPACE}\r\n\r\n");
    let request = h1::Request::of_bytes(head.into_bytes());
    let mut connection = h1::Connection::new(load::connect(outbound).await?);
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if connection.exchange(&request).await?.status != 200 {
            failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn server() -> Result<TcpListener> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?)
}

/// The clients, a Service with two versions outside of the mesh, and a canary that stays at half.
fn objects(clients: &[Pod], versions: [SocketAddr; 2]) -> String {
    let mut yaml: String = clients.iter().map(outside::client).collect();
    yaml += &outside::service("model", 80);
    for (version, at) in (1..).zip(versions) {
        yaml += &outside::served(&format!("model-v{version}"), at);
    }
    yaml + &format!(
        "---
apiVersion: penstock.io/v1alpha1
kind: Canary
metadata: {{name: model, namespace: {NAMESPACE}}}
spec:
  service: model
  stable: model-v1
  candidate: model-v2
  steps: [{{weight: 50, hold: 1h}}]
"
    )
}
