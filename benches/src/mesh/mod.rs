//! `penstock-bench mesh`: who sends each request where it is served soonest, with real processes, sockets and protocols
//! over replicas whose GPUs are SIMULATED.
//!
//! Eight processes of `penstock-simgpu` are the replicas. Several clients send an open loop through Penstock (a sidecar
//! beside each client and each replica, mutual TLS between them, by policy), through Envoy (one beside each client), and through
//! HAProxy, nginx and the routers of SGLang and vLLM (one for all clients, as they are deployed). All of them run at once;
//! the runs are interleaved (A B C, B C A, …), all replicas are emptied before each, and all subjects are asked the same at
//! the same moments. A subject that does not start has an `error`; the bed goes on.
//!
//! Service times are slept, so the machine must stay mostly idle for the figures to be about balancing: how busy it was is
//! measured and told.

mod case;
pub(crate) mod client;
mod figures;
pub(crate) mod fleet;
mod peers;
pub(crate) mod sidecars;
mod stage;
mod subject;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep_until};

use crate::subject::Programs;
use crate::{bed, install, report, usage};
use case::{CASES, Case};
use figures::{Busy, Round, Run};
use stage::{Stage, Tools};
use subject::Subject;
use workload::Arrival;

/// How long answers may take after the last request of a run.
const PATIENCE: Duration = Duration::from_millis(2500);
/// What a run costs besides its seconds, and a case besides its runs. For the estimate only.
const AROUND_RUN: f64 = 0.6;
const AROUND_CASE: f64 = 4.0;
/// When a replica stalls and for how long, over the measured time.
const STALL: (f64, f64) = (0.2, 0.5);
/// The case that `stalled` is compared with.
const STEADY: &str = "steady";
/// Of `--quick`.
const QUICK: f64 = 0.4;

/// Arguments of `penstock-bench mesh`.
#[derive(Args, Clone, Debug)]
pub(crate) struct MeshArgs {
    /// Only these cases, e.g. stalled,chat
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Only these subjects; ratios need envoy among them
    #[arg(long, value_delimiter = ',', value_enum)]
    subjects: Vec<Subject>,
    /// Seconds measured in each run; conversations take twice as long
    #[arg(long, default_value_t = 2.2)]
    seconds: f64,
    /// Seconds of load before that
    #[arg(long, default_value_t = 0.8)]
    warm_up: f64,
    /// Runs of each subject in each case
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// One short run of each, less than two minutes in all: shows that it works, and no figure to rely on
    #[arg(long)]
    quick: bool,
    /// Clients, each with a sidecar and an Envoy of its own
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=20))]
    clients: u8,
    /// Requests a second, over those that the cases say
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    rate: f64,
    /// What is asked when follows from this
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where our programs are; by default beside this one
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Where the rows go
    #[arg(long, value_name = "FILE", default_value = "target/bench/mesh.json")]
    out: PathBuf,
}

/// For the help.
pub(crate) fn case_list() -> String {
    crate::cases(CASES.iter().map(|case| (case.name, case.says)))
}

/// How long the parts of a run take.
#[derive(Clone, Copy, Debug)]
struct Times {
    warm_up: Duration,
    measured: Duration,
}

impl Times {
    fn of(args: &MeshArgs, case: &Case) -> Self {
        let of = |seconds: f64| Duration::from_secs_f64(seconds * case.longer);
        Self { warm_up: of(args.warm_up), measured: of(args.seconds) }
    }

    fn all(self) -> Duration {
        self.warm_up + self.measured
    }

    fn stall(self) -> (Duration, Duration) {
        (self.warm_up + self.measured.mul_f64(STALL.0), self.measured.mul_f64(STALL.1))
    }
}

/// Runs the bed.
pub(crate) async fn run(mut args: MeshArgs) -> Result<()> {
    ensure!(
        args.runs > 0 && args.seconds > 0.0 && args.warm_up >= 0.0 && args.rate > 0.0,
        "--runs, --seconds and --rate must be above 0"
    );
    if args.quick {
        (args.runs, args.seconds, args.warm_up) = (1, args.seconds * QUICK, args.warm_up * QUICK);
    }
    let cases = chosen(&args.cases)?;
    let _lock = bed::alone()?;
    let tools = tools(&args).await?;
    let seconds: f64 = cases
        .iter()
        .map(|case| {
            let runs = takers(&args, case).len() as f64 * f64::from(args.runs);
            runs * (Times::of(&args, case).all().as_secs_f64() + AROUND_RUN) + AROUND_CASE
        })
        .sum();
    eprintln!("cases: {}; about {:.0} min; the GPUs are simulated", cases.len(), (seconds / 60.0).ceil());

    let mut rows = Vec::new();
    let mut steady: Option<Round> = None;
    for case in &cases {
        eprintln!("\n{}: {}", case.name, case.says);
        let round = LocalSet::new().run_until(measure(&args, case, &tools)).await?;
        let told = figures::rows(case, &round, steady.as_ref().filter(|_| case.stalled.is_some()));
        println!("\n{}", figures::table(case, &told));
        rows.extend(told);
        report::write(&args.out, &rows)?;
        if case.name == STEADY {
            steady = Some(round);
        }
    }
    eprintln!("{} rows in {}", rows.len(), args.out.display());
    Ok(())
}

async fn tools(args: &MeshArgs) -> Result<Tools> {
    let this = std::env::current_exe().context("where this program is")?;
    let beside = this.parent().map(PathBuf::from).unwrap_or_default();
    let ours = args.programs.clone().unwrap_or(beside);
    for name in ["penstock-simgpu", "penstock-control", "penstock-proxy"] {
        ensure!(
            ours.join(name).is_file(),
            "{name} is not in {}; build it with: cargo build --release -p penstock-benches -p penstock-control -p \
             penstock-proxy",
            ours.display()
        );
    }
    let envoy = install::envoy().await.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        "envoy".into()
    });
    let python = install::routers().await.map_err(|error| format!("{error:#}"));
    let (haproxy, nginx) = install::debian().await;
    let penstock = ours.join("penstock-proxy");
    Ok(Tools { ours, peers: Programs { penstock, envoy, haproxy, nginx }, python })
}

/// The named cases, or all.
fn chosen(names: &[String]) -> Result<Vec<Case>> {
    crate::case::chosen(&CASES, |case| case.name, names)
}

fn takers(args: &MeshArgs, case: &Case) -> Vec<Subject> {
    let wanted = |subject: &&Subject| args.subjects.is_empty() || args.subjects.contains(subject);
    case.subjects.iter().filter(wanted).copied().collect()
}

/// All runs of a case.
async fn measure(args: &MeshArgs, case: &Case, tools: &Tools) -> Result<Round> {
    let times = Times::of(args, case);
    let takers = takers(args, case);
    let mut stage = Stage::start(case, &takers, args.clients, times.stall(), tools).await?;
    let mut round: Round = takers.iter().map(|subject| (*subject, Ok(Vec::new()))).collect();
    for turn in 0..args.runs {
        for at in 0..takers.len() {
            let subject = takers[(at + turn as usize) % takers.len()];
            let Some(Ok(runs)) = round.get_mut(&subject) else { continue };
            let label = format!("{:<10} run {}/{}  {:<22}", case.name, turn + 1, args.runs, subject.name());
            let arrivals = workload::arrivals(case, args.rate, times.all(), args.seed + u64::from(turn));
            match once(&mut stage, case, subject, times, &arrivals).await {
                Ok(run) => {
                    eprintln!("{label}{}", run.told(case));
                    runs.push(run);
                }
                Err(error) => {
                    eprintln!("{label}  failed: {error:#}");
                    round.insert(subject, Err(format!("{error:#}")));
                }
            }
        }
    }
    stage.stop().await;
    Ok(round)
}

/// One run.
async fn once(
    stage: &mut Stage,
    case: &Case,
    subject: Subject,
    times: Times,
    arrivals: &[Arrival],
) -> Result<Run> {
    let target = stage.target(subject).map_err(anyhow::Error::msg)?;
    stage.fleet.reset().await?;
    let began = Instant::now();
    let watched = async {
        sleep_until(began + times.warm_up).await;
        let before = stage.fleet.states().await?;
        anyhow::Ok((before, busy(began + times.all()).await?))
    };
    let (outcomes, watched) = tokio::join!(client::run(&target, arrivals, began, PATIENCE), watched);
    let (before, busy) = watched?;
    let after = stage.fleet.states().await?;
    stage.check()?;
    let run = Run::of(case, &outcomes, times.warm_up, times.measured, (&before, &after), busy);
    ensure!(
        run.failed < run.asked,
        "not one of {} requests was answered: {}",
        run.asked,
        run.error.unwrap_or_default()
    );
    Ok(run)
}

/// How busy the cores are from now until then.
async fn busy(until: Instant) -> Result<Busy> {
    let cores: Vec<usize> = (0..std::thread::available_parallelism()?.get()).collect();
    let reading =
        || anyhow::Ok((usage::cores_busy(&cores)?, usage::cpu_seconds(&usage::tree(std::process::id()))?));
    let (began, before) = (Instant::now(), reading()?);
    sleep_until(until).await;
    let (after, all) = (reading()?, began.elapsed().as_secs_f64() * cores.len() as f64);
    Ok(Busy { machine: (after.0 - before.0) / all, bed: (after.1 - before.1) / all })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_lies_within_the_measured_time() {
        let times = Times { warm_up: Duration::from_millis(800), measured: Duration::from_millis(2500) };
        let (from, lasts) = times.stall();
        assert!(from > times.warm_up && from + lasts < times.all());
    }

    #[test]
    fn an_unknown_case_is_named_with_those_that_there_are() {
        let error = chosen(&["hetero".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("hetero-80"), "{error}");
    }
}
