//! `penstock-bench`: what Penstock costs, measured beside other proxies on the same two cores.
//!
//! `proxy` is the bed that `make bench` runs, `control` that of `make bench-control`, `mesh` that of `make bench-mesh` and
//! `batch` that of `make bench-batch`; `load` and `upstream`, `model` and `kserve-batcher` are ends and peers of beds, processes of
//! their own so that they can be pinned and watched. Exit status 0 if the bed ran to its end (a subject that failed is a row that says
//! so), 1 if it could not, 2 for a wrong command line, 130 if it was interrupted.

mod batch;
mod bed;
mod case;
mod certificates;
mod control;
mod install;
mod load;
mod mesh;
mod process;
mod report;
mod subject;
mod tokens;
mod upstream;
mod usage;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

const INTERRUPTED: u8 = 130;

/// What Penstock costs, measured beside Envoy, HAProxy and nginx on the same two cores
#[derive(Parser)]
#[command(version, about = "What Penstock costs, measured beside Envoy, HAProxy and nginx on the same two cores", after_help = EXAMPLES, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  penstock-bench proxy                             everything: 3 runs of 4 s, about 20 minutes
  penstock-bench proxy --cases h1-small,rest --runs 1 --seconds 1 --once --out /tmp/try.json
  penstock-bench control --proxies 200             20 weights pushed to 200 proxies, three times
  penstock-bench mesh --quick                      every balancer over simulated GPUs, in two minutes
  penstock-bench batch --runs 1                    batching before Triton and MLServer, in five minutes
  penstock-bench upstream                          prints its addresses and serves
  penstock-bench load --address 127.0.0.1:8000 --seconds 2

Figures are only worth something on a machine that does nothing else meanwhile.";

#[derive(Subcommand)]
enum Command {
    /// Measure every proxy in every case; writes target/bench/proxy.json
    #[command(after_help = case_list())]
    Proxy(bed::ProxyArgs),
    /// Measure how fast a pushed weight is in force everywhere; writes target/bench/control.json
    Control(control::ControlArgs),
    /// Compare who balances best over simulated GPUs; writes target/bench/mesh.json
    #[command(after_help = mesh::case_list())]
    Mesh(mesh::MeshArgs),
    /// Compare what batching saves before real model servers; writes target/bench/batch.json
    #[command(after_help = batch::case_list())]
    Batch(batch::BatchArgs),
    /// Serve a simulated model, as a server that the batching bed puts others before
    Model(batch::model::ModelArgs),
    /// Batch as KServe's agent does
    KserveBatcher(batch::kserve::BatcherArgs),
    /// Send requests to one address and print what was measured
    Load(load::LoadArgs),
    /// Serve the short answer that stands behind every proxy
    Upstream(upstream::UpstreamArgs),
}

fn case_list() -> String {
    cases(case::CASES.iter().map(|case| (case.name, case.says)))
}

/// Names of cases and what they are about, for the help of a bed.
pub(crate) fn cases(cases: impl Iterator<Item = (&'static str, &'static str)> + Clone) -> String {
    let width = cases.clone().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines: Vec<String> = cases.map(|(name, says)| format!("  {name:<width$}  {says}")).collect();
    format!("Cases:\n{}", lines.join("\n"))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse().command).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("penstock-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The command, unless it is interrupted; its children end with it.
async fn run(command: Command) -> Result<ExitCode> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let command = async {
        match command {
            Command::Proxy(args) => bed::run(args).await,
            Command::Control(args) => control::run(args).await,
            Command::Mesh(args) => mesh::run(args).await,
            Command::Batch(args) => batch::run(args).await,
            Command::Model(args) => batch::model::run(args).await,
            Command::KserveBatcher(args) => batch::kserve::run(args).await,
            Command::Load(args) => load::run(args).await,
            Command::Upstream(args) => upstream::run(args).await,
        }
    };
    tokio::select! {
        done = command => done.map(|()| ExitCode::SUCCESS),
        _ = interrupt.recv() => Ok(interrupted()),
        _ = terminate.recv() => Ok(interrupted()),
    }
}

fn interrupted() -> ExitCode {
    eprintln!("penstock-bench: interrupted; what was started is being ended, finished cases are on disk");
    ExitCode::from(INTERRUPTED)
}
