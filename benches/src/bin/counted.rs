//! `penstock-counted`: the sidecar's static start with another allocator, one that counts. It exists for the proxy bed, which has it
//! carry requests and divides. Counting costs what the sidecar itself should not pay, so nothing is timed with it.
//!
//! It says on standard output how often it has allocated so far, at each SIGUSR1: one line, `allocations: N`. An allocation that
//! grows counts as another one.

use std::alloc::System;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use penstock_proxy::config::{Store, static_file};
use penstock_proxy::identity::Identity;
use penstock_proxy::limits::Limits;
use penstock_proxy::run::{self, Proxy, Setup};
use penstock_proxy::signals;
use penstock_proxy::telemetry::level::Level;
use penstock_proxy::telemetry::{Options, Telemetry};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How it names itself to itself.
const NODE: &str = "static/proxy";

/// The sidecar's static start, with an allocator that counts
#[derive(Parser)]
#[command(name = "penstock-counted", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until it is killed, and print at each SIGUSR1 how often it has allocated.
    ///   penstock-counted run --static proxy.yaml
    #[command(verbatim_doc_comment)]
    Run {
        /// The file of `penstock-proxy run --static`
        #[arg(long = "static", value_name = "FILE")]
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let Command::Run { file } = Cli::parse().command;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.context("cannot start a runtime").and_then(|runtime| runtime.block_on(serve(file))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-counted: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(file: PathBuf) -> Result<()> {
    let _level = Level::install("info")?;
    let mut asked = signal(SignalKind::user_defined1())?;
    let file = static_file::read(&file)?;
    let identity = match &file.identity {
        Some([certificate, key, anchors]) => Identity::from_files(certificate, key, anchors)?,
        None => Identity::new(),
    };
    let telemetry = Telemetry::new(&Options {
        access_log: file.access_log,
        node: NODE.to_owned(),
        service: "penstock-proxy".to_owned(),
        ..Options::default()
    })?;
    let store = Arc::new(Store::default());
    store.set_ready();
    let _proxy = Proxy::start(Setup {
        listen: run::static_listeners(&file),
        workers: file.workers,
        node: NODE.to_owned(),
        limits: Limits::default(),
        store,
        identity: Arc::new(identity),
        telemetry: Arc::new(telemetry),
        signals: signals::Config { server: signals::Where::Off, ..signals::Config::default() },
        cuda_driver: "libcuda.so.1".into(),
        nvjpeg: None,
    })?;
    while asked.recv().await.is_some() {
        let stats = ALLOCATOR.stats();
        let mut out = std::io::stdout().lock();
        writeln!(out, "allocations: {}", stats.allocations + stats.reallocations)?;
        out.flush()?;
    }
    Ok(())
}
