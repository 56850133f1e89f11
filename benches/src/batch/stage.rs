//! What runs during one run: a model server with an address of its own, and a subject before it.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

use super::case::{Body, Case, Kind, Subject};
use super::request::{self, MODEL};
use super::sidecar;
use crate::bed::PROXY_CORE;
use crate::case::CASES as PROXY_CASES;
use crate::load::{self, h1};
use crate::mesh::client::ask;
use crate::mesh::fleet;
use crate::process::{self, Process};
use crate::subject::{Programs, Subject as Proxy, free_port};
use crate::upstream::Addresses;

/// The port of every model server.
const HTTP: u16 = 8000;
/// The last byte of the first server's address.
const FIRST: u8 = 61;
/// How long Python and a proxy may take to be ready, and a server to end in good order.
const START: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(8);
/// How much of a wrong answer is told.
const TOLD: usize = 400;

/// Where programs are.
pub(crate) struct Tools {
    /// This program.
    pub(crate) this: PathBuf,
    /// The folder of ours.
    pub(crate) ours: PathBuf,
    /// `launch.py`, which becomes a real model server.
    pub(crate) launch: PathBuf,
    /// Envoy.
    pub(crate) envoy: PathBuf,
}

/// Running processes, and where requests go.
pub(crate) struct Stage {
    pub(crate) front: SocketAddr,
    pub(crate) host: String,
    /// Whether requests are in KServe's V1.
    pub(crate) v1: bool,
    pub(crate) dir: TempDir,
    server: Process,
    at: SocketAddr,
    /// Before the server; the first, if any, is the one whose CPU counts.
    proxies: Vec<Process>,
}

impl Stage {
    /// Starts server and subject, and waits until a request is answered rightly.
    pub(crate) async fn start(case: &Case, subject: Subject, tools: &Tools) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("penstock-bench-").tempdir()?;
        // One after the other: a port of an address that was in use a moment ago is not free at once.
        static NEXT: AtomicU8 = AtomicU8::new(FIRST);
        let ip = fleet::ip(NEXT.fetch_add(1, Ordering::Relaxed).max(FIRST));
        let at = SocketAddr::new(IpAddr::V4(ip), HTTP);
        let server = serve(case, subject, ip, tools, dir.path())?;
        let host = at.to_string();
        let mut stage = Self { front: at, host, v1: false, dir, server, at, proxies: Vec::new() };
        match stage.prepare(case, subject, ip, tools).await {
            Ok(()) => Ok(stage),
            Err(error) => {
                stage.stop().await;
                Err(error)
            }
        }
    }

    async fn prepare(&mut self, case: &Case, subject: Subject, ip: Ipv4Addr, tools: &Tools) -> Result<()> {
        self.is_up().await?;
        self.put_before(case, subject, ip, tools).await?;
        self.answers(case.body).await
    }

    /// The processes whose CPU counts.
    pub(crate) fn watched(&self) -> Vec<u32> {
        self.proxies.first().into_iter().chain([&self.server]).map(Process::pid).collect()
    }

    /// Of the proxy alone.
    pub(crate) fn proxy(&self) -> Vec<u32> {
        self.proxies.first().map(Process::pid).into_iter().collect()
    }

    /// How often the model was executed, and how many rows that were, if the server tells.
    pub(crate) async fn executions(&self) -> Option<(u64, u64)> {
        let page = self.page(&format!("/v2/models/{MODEL}/stats")).await.ok()?;
        let count = |field: &str| page["model_stats"][0][field].as_u64();
        Some((count("execution_count")?, count("inference_count")?))
    }

    /// Fails if a process has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.server.check()?;
        self.proxies.iter_mut().try_for_each(Process::check)
    }

    /// Ends everything; the server in good order, since it keeps files in shared memory.
    pub(crate) async fn stop(mut self) {
        for proxy in self.proxies {
            proxy.stop().await;
        }
        if let Some(pid) = i32::try_from(self.server.pid()).ok().and_then(Pid::from_raw) {
            // It has ended already if this fails.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + END;
        while self.server.check().is_ok() && Instant::now() < deadline {
            sleep(Duration::from_millis(20)).await;
        }
        self.server.stop().await;
    }

    async fn page(&self, path: &str) -> Result<Value> {
        let limit = Duration::from_secs(5);
        let (status, body) = ask(Method::GET, self.at, "server", path, Bytes::new(), limit).await?;
        ensure!(status == 200, "{path} was answered with {status}");
        Ok(serde_json::from_slice(&body)?)
    }

    async fn is_up(&mut self) -> Result<()> {
        let deadline = Instant::now() + START;
        while self.page(&format!("/v2/models/{MODEL}")).await.is_err() {
            self.server.check()?;
            if Instant::now() > deadline {
                bail!(self.server.story(&format!("was not ready within {START:?}")));
            }
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    async fn put_before(&mut self, case: &Case, subject: Subject, ip: Ipv4Addr, tools: &Tools) -> Result<()> {
        let dir = self.dir.path().to_owned();
        match subject {
            Subject::Direct | Subject::Mlserver => {}
            Subject::Penstock | Subject::PassThrough => {
                let annotations = if subject == Subject::Penstock { case.annotations } else { &[] };
                let sidecar = sidecar::start(ip, HTTP, annotations, &tools.ours, &dir).await?;
                (self.front, self.host) = (sidecar.inbound, sidecar::host());
                self.proxies = vec![sidecar.proxy, sidecar.control];
            }
            Subject::Envoy => {
                let programs = Programs {
                    penstock: PathBuf::new(),
                    envoy: tools.envoy.clone(),
                    haproxy: PathBuf::new(),
                    nginx: PathBuf::new(),
                };
                let plain = PROXY_CASES.first().context("the proxy bed's plain case")?;
                let upstream = Addresses { h1: self.at, h2: self.at };
                let running = Proxy::Envoy.start(plain, &programs, upstream, &dir, PROXY_CORE, None)?;
                self.front = running.front;
                self.proxies = running.processes;
            }
            Subject::Kserve | Subject::KserveTuned => {
                let patience = subject.patience().unwrap_or_default();
                let listen = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), free_port()?);
                let args = [
                    "kserve-batcher".to_owned(),
                    format!("--listen={listen}"),
                    format!("--upstream={}", self.at),
                    format!("--patience={}ms", patience.as_millis()),
                ]
                .map(OsString::from);
                self.proxies = vec![process::spawn(None, subject.name(), &tools.this, &args, &dir, false)?];
                (self.front, self.v1) = (listen, true);
            }
        }
        Ok(())
    }

    /// Waits until the subject answers, and checks that it answers rightly.
    async fn answers(&mut self, body: Body) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            self.check()?;
            match self.once(body).await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// One request, over the same bytes as the load's.
    pub(crate) async fn once(&self, body: Body) -> Result<()> {
        let mut connection = h1::Connection::new(load::connect(self.front).await?);
        let request = h1::Request::of_bytes(request::bytes(&self.host, body, self.v1));
        let answer = timeout(START, connection.exchange(&request)).await.context("no answer came")??;
        let (total, text) = (request::total(body.values()), String::from_utf8_lossy(answer.body));
        ensure!(
            answer.status == 200 && text.contains(&format!("[{total}]")),
            "the total must be {total}; the answer was {}: {}",
            answer.status,
            text.chars().take(TOLD).collect::<String>()
        );
        Ok(())
    }
}

/// Starts the case's server.
fn serve(case: &Case, subject: Subject, ip: Ipv4Addr, tools: &Tools, dir: &Path) -> Result<Process> {
    let (name, batches) = match case.kind {
        Kind::Simulated { instances } => {
            let args = [
                "model".to_owned(),
                format!("--listen={ip}:{HTTP}"),
                format!("--fixed={}us", case.fixed.as_micros()),
                format!("--row={}us", case.row.as_micros()),
                format!("--instances={instances}"),
            ]
            .map(OsString::from);
            return process::spawn(None, "model", &tools.this, &args, dir, false);
        }
        Kind::Triton { dynamic } => ("triton", dynamic),
        Kind::MlServer => ("mlserver", subject == Subject::Mlserver),
    };
    let model = json!([{
        "name": MODEL,
        "batches": batches,
        // Triton batches whatever waits by itself; MLServer waits for a time, of which a few milliseconds serve it best.
        "delay_us": if case.kind == Kind::MlServer { 5000 } else { 0 },
        "fixed_us": u64::try_from(case.fixed.as_micros())?,
        "row_us": u64::try_from(case.row.as_micros())?,
    }]);
    let args: Vec<OsString> = vec![
        tools.launch.clone().into(),
        name.into(),
        "--dir".into(),
        dir.into(),
        "--ip".into(),
        ip.to_string().into(),
        "--models".into(),
        model.to_string().into(),
    ];
    process::spawn(None, name, Path::new("python3"), &args, dir, false)
}
