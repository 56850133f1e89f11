//! `penstock-modelserver`: serves ONNX models with the Open Inference Protocol v2, over REST (JSON and binary tensors) and
//! gRPC, on one port. The demo, the tests and the benches use it as the application behind the sidecar.
//!
//! A request goes: [`rest`] or [`grpc`] decode it → [`model`] checks it → [`engine`] queues it and runs it on a thread of
//! its own → the same way back. [`stats`] counts on the way, [`serve`] owns sockets and draining.

mod delay;
mod engine;
mod grpc;
mod memory;
mod model;
mod refusal;
mod rest;
mod serve;
mod stats;

use anyhow::Context as _;
use clap::Parser;
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

const EXAMPLE: &str = "Example:
  penstock-modelserver --repository tests/models/repository --only digits:2 --listen 127.0.0.1:8000
  curl -s 127.0.0.1:8000/v2/models/digits

Exit status: 0 after SIGTERM or SIGINT when all requests in flight were answered, 1 otherwise.";

/// Serves ONNX models with the Open Inference Protocol v2: REST and gRPC
#[derive(Parser)]
#[command(name = "penstock-modelserver", version, after_help = EXAMPLE)]
struct Options {
    /// Directory with NAME/VERSION/model.onnx
    #[arg(long, value_name = "DIR")]
    repository: PathBuf,
    /// Load only this model, or this version of it; may be repeated
    #[arg(long, value_name = "NAME[:VERSION]")]
    only: Vec<String>,
    /// REST, gRPC (h2c) and /metrics, told apart by the request
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// A second address, for clients that want gRPC on its own port
    #[arg(long, value_name = "ADDR")]
    grpc: Option<SocketAddr>,
    /// Executions at a time
    #[arg(long, value_name = "N", default_value = "1")]
    threads: NonZeroUsize,
    /// Requests that may wait for a thread; more are answered 503
    #[arg(long, value_name = "N", default_value = "64")]
    queue: NonZeroUsize,
    /// The most rows in one request
    #[arg(long, value_name = "ROWS", default_value_t = 1024)]
    max_batch: u64,
    /// The largest request, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    max_body: usize,
    /// Read and write tensors in shared memory of the system, over REST
    #[arg(long)]
    shared_memory: bool,
    /// Read tensors in memory of a GPU by CUDA IPC, over REST: the library of its driver. FOR TESTS, with the stand-in
    #[arg(long, value_name = "FILE")]
    cuda_driver: Option<PathBuf>,
    /// SIMULATED service time of a GPU, e.g. fixed=2ms,row=50us: an execution lasts at least this long
    #[arg(long, value_name = "MODEL")]
    delay_model: Option<delay::DelayModel>,
    /// After SIGTERM, go on accepting for this long while telling "not ready"
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    drain_delay: Duration,
    /// After that, wait this long for requests in flight
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    drain_timeout: Duration,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: tracing::Level,
}

/// What every request needs.
struct Server {
    models: model::Repository,
    engine: engine::Engine,
    memory: memory::Memory,
    delay: Option<delay::DelayModel>,
    draining: AtomicBool,
    max_body: usize,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    tracing_subscriber::fmt()
        .with_max_level(options.log_level)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    // Requests are parsed here and run on the engine's threads; two workers keep a large body from blocking the rest.
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run(options))
}

async fn run(options: Options) -> anyhow::Result<()> {
    let models = model::Repository::load(&options.repository, &options.only, options.max_batch)?;
    if let Some(delay) = options.delay_model {
        tracing::warn!("service time is simulated ({delay}): figures taken here are not a GPU's");
    }
    let server = Arc::new(Server {
        models,
        engine: engine::Engine::start(options.threads, options.queue, options.delay_model)?,
        memory: memory::Memory::new(options.shared_memory, options.cuda_driver.as_deref())?,
        delay: options.delay_model,
        draining: AtomicBool::new(false),
        max_body: options.max_body << 20,
    });

    // Before the ports are open, so that whoever sees them may send a signal.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    let mut listeners = tokio::task::JoinSet::new();
    for address in [Some(options.listen), options.grpc].into_iter().flatten() {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        announce(&listener)?;
        let router = rest::router(server.clone());
        listeners.spawn(serve::serve(listener, router, stopped.clone(), options.drain_timeout));
    }

    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    tracing::info!("stopping: not ready from now on");
    server.draining.store(true, std::sync::atomic::Ordering::Relaxed);
    tokio::time::sleep(options.drain_delay).await;
    stop.send_replace(true);
    let mut cut = 0;
    while let Some(left) = listeners.join_next().await {
        cut += left?;
    }
    anyhow::ensure!(
        cut == 0,
        "{cut} connections had requests in flight after {:?} and were cut",
        options.drain_timeout
    );
    Ok(())
}

/// One line on stdout for each port, for whoever started us with port 0.
fn announce(listener: &TcpListener) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "listening on {}", listener.local_addr()?)?;
    Ok(out.flush()?)
}
