//! `penstock demo`: the whole mesh on one machine, with real requests, in under a minute.
//!
//! Control, three model servers and a client, each with its own sidecar, all as separate processes. A canary goes
//! from 0 to 100 % while one replica is restarted, one is killed and certificates rotate; then a crowd comes, and photographs. In
//! the order of a run:
//!
//! - [`topology`]: which pods exist, and the YAML that says so
//! - [`processes`]: starting, watching and ending programs
//! - [`stage`]: the running mesh: push a change and wait, restart a pod
//! - [`load`] and [`digits`]: the client and its questions
//! - [`phases`]: the script; [`sharing`] and [`photos`]: its end, and what the sidecars say of it
//! - [`screen`] and [`summary`]: what a person sees meanwhile and in the end

mod certificates;
mod digits;
mod load;
mod phases;
mod photos;
pub(crate) mod processes;
mod screen;
mod sharing;
mod stage;
mod summary;
mod topology;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use self::processes::Programs;
use self::screen::Screen;
use self::stage::Stage;
use self::summary::Summary;
use crate::failure::{Failure, exit};
use crate::interruption::Interruption;
use crate::output::{Format, Output};
use crate::terminal::Terminal;

/// What `--stay` sends, so that there is something to look at and the machine stays usable.
const STAY_RATE: u32 = 100;
const STAY_CONNECTIONS: usize = 4;
/// How often the processes are looked after while the demo stays.
const LOOK: Duration = Duration::from_secs(1);

/// The arguments.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Print only the summary, as JSON (the same as --output json)
    #[arg(long)]
    json: bool,
    /// Keep everything running afterwards, until Ctrl-C, and print where to look
    #[arg(long)]
    stay: bool,
    /// How long the four phases take together, without the start and the ramps between them
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(8..=3600))]
    seconds: u32,
    /// Requests a second that the client sends, if the machine can
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(10..=100_000))]
    rate: u32,
    /// Keep the directory with the YAML, the certificates' state and the logs
    #[arg(long)]
    keep_dir: bool,
}

/// Runs the command.
pub(crate) async fn run(args: &Args, output: Output) -> Result<u8, Failure> {
    let mut interruption = Interruption::listen()?;
    let output = if args.json { Output { format: Format::Json, ..output } } else { output };
    let programs = Programs::find()?;
    let directory = tempfile::Builder::new().prefix("penstock-demo-").tempdir();
    let directory =
        directory.map_err(|e| Failure::Problem(format!("no temporary directory for the demo: {e}")))?;
    let quiet = output.format != Format::Table;
    let mut screen = Screen::new(Terminal::of(&std::io::stderr()), quiet);
    let mut stage = Stage::new(programs, directory.path())?;
    let length = Duration::from_secs(args.seconds.into());

    let played = tokio::select! {
        played = phases::play(&mut stage, &screen, args.rate, length) => played,
        () = interruption.comes() => Err(Failure::Interrupted),
    };
    screen.end();
    let finished = match played {
        Ok(summary) => show(&summary, args, &mut stage, directory.path(), output, &mut interruption).await,
        // A control that died is told as such, with what it said last.
        Err(Failure::Unreachable { url, cause }) => Err(match stage.processes.must_live() {
            Err(dead) => dead,
            Ok(()) => Failure::Problem(format!("the demo's control at {url} does not answer: {cause}")),
        }),
        Err(failure) => Err(failure),
    };
    stage.end().await;

    let spoiled = !matches!(finished, Ok(exit::FINE) | Err(Failure::Interrupted));
    let kept = keep(directory, args.keep_dir || spoiled);
    match (finished, kept) {
        (Err(Failure::Problem(told)), Some(kept)) => {
            Err(Failure::Problem(format!("{told}\nThe demo's files and logs are in {}", kept.display())))
        }
        (finished, Some(kept)) => {
            eprintln!("The demo's files and logs are in {}", kept.display());
            finished
        }
        (finished, None) => finished,
    }
}

/// Prints the summary, stays if that was asked for, and says how the demo ended.
async fn show(
    summary: &Summary,
    args: &Args,
    stage: &mut Stage,
    directory: &Path,
    output: Output,
    interruption: &mut Interruption,
) -> Result<u8, Failure> {
    output.page(summary, |summary, terminal| summary.page(terminal))?;
    if args.stay {
        stay(stage, directory, output, interruption).await?;
    }
    Ok(if summary.is_fine() { exit::FINE } else { exit::PROBLEM })
}

/// Keeps the directory or lets it go.
fn keep(directory: TempDir, wanted: bool) -> Option<PathBuf> {
    wanted.then(|| directory.keep())
}

/// Goes on at a low rate until Ctrl-C.
async fn stay(
    stage: &mut Stage,
    directory: &Path,
    output: Output,
    interruption: &mut Interruption,
) -> Result<(), Failure> {
    let mut load = phases::client(stage, STAY_CONNECTIONS, STAY_RATE)?;
    let guide = guide(stage, directory);
    if output.format == Format::Table {
        output.text(&guide)?
    } else {
        eprint!("{guide}")
    }
    loop {
        tokio::select! {
            () = interruption.comes() => break,
            () = tokio::time::sleep(LOOK) => stage.processes.must_live()?,
        }
    }
    load.finish().await;
    Ok(())
}

/// Where to look, with commands that work when pasted.
fn guide(stage: &Stage, directory: &Path) -> String {
    let (url, client) = (stage.control_url(), stage.client());
    let penstock = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("penstock"));
    let penstock = format!("{} --control {url}", penstock.display());
    let split = stage.split_file();
    format!(
        "\nEverything runs on, with {STAY_RATE} requests a second, until Ctrl-C. In another terminal:\n\n  \
         {penstock} status\n  \
         {penstock} stat --watch\n  \
         {penstock} routes digits\n  \
         {penstock} endpoints digits\n  \
         {penstock} tap digits --limit 20\n  \
         {penstock} check\n\n  \
         Send a request as the client:   curl -H 'Host: {host}' http://{outbound}/v2/models/digits\n  \
         Move the split and wait:        sed -i 's/digits-v1=[^\"]*/digits-v1=50,digits-v2=50/' {split} && {penstock} status --wait\n  \
         The client's sidecar:           http://{admin}/config  /endpoints  /certs  /metrics\n  \
         Control's API:                  {url}/status  /stat  /routes  /endpoints  /metrics\n  \
         YAML, state and logs:           {directory}\n",
        host = topology::HOST,
        outbound = client.outbound,
        admin = client.admin,
        split = split.display(),
        directory = directory.display(),
    )
}
