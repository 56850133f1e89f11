//! `penstock-bench batch`: what one execution for many requests is worth, before real model servers.
//!
//! Each run starts a fresh server and a fresh subject before it, checks an answer, and sends the case's load; runs of the
//! subjects are interleaved (A B, B A, …). The service times of the models are slept, so they stand for a GPU's and are
//! labelled SIMULATED; the servers, their protocols and what they cost in CPU are real, but for the two cases that say so. CPU
//! is that of the server and of the proxy before it (`pass-through`: of the proxy alone). A subject that fails has an
//! `error`; the bed goes on.

mod case;
pub(crate) mod kserve;
pub(crate) mod model;
mod request;
mod sidecar;
mod stage;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tokio::task::LocalSet;

use crate::bed::{self, LOAD_CORE};
use crate::load::{self, Measured};
use crate::report::{self, Named, Row, Summary};
use crate::{install, process};
use case::{CASES, CPU_PER_1K, CPU_PER_GB, Case, EXECUTIONS, Kind, Load, P99, RPS, Subject};
use stage::{Stage, Tools};

/// Share of failed requests above which there is nothing to report but the failure.
const FAILED: f64 = 0.01;
/// Connections of an open loop: enough that none is waited for.
const OPEN: usize = 8;
/// What a run costs besides its seconds. For the estimate only.
const AROUND: f64 = 5.0;

/// Arguments of `penstock-bench batch`.
#[derive(Args, Clone, Debug)]
pub(crate) struct BatchArgs {
    /// Only these cases, e.g. triton-unbatched-64,mlserver
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Only these subjects; ratios need the baseline of the case among them
    #[arg(long, value_delimiter = ',', value_enum)]
    subjects: Vec<Subject>,
    /// Seconds measured in each run
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Seconds of load before that
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Runs of each subject in each case
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Where our programs are; by default beside this one
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// What starts the real servers; run from the repository's root, it is found
    #[arg(long, value_name = "FILE", default_value = "tests/tests/servers/launch.py")]
    launch: PathBuf,
    /// Where the rows go
    #[arg(long, value_name = "FILE", default_value = "target/bench/batch.json")]
    out: PathBuf,
}

/// The figures of a run.
#[derive(Clone, Debug, Default)]
struct Run {
    figures: BTreeMap<&'static str, f64>,
    /// Rows an execution had on average.
    rows: Option<f64>,
}

/// The runs of each subject in a case, or why there are none.
type Round = BTreeMap<Subject, Result<Vec<Run>, String>>;

/// For the help.
pub(crate) fn case_list() -> String {
    crate::cases(CASES.iter().map(|case| (case.name, case.says)))
}

/// Runs the bed.
pub(crate) async fn run(args: BatchArgs) -> Result<()> {
    ensure!(args.runs > 0 && args.seconds > 0.0, "--runs and --seconds must be above 0");
    ensure!(
        args.launch.is_file(),
        "{} is not there; run this from the repository's root",
        args.launch.display()
    );
    let cases = crate::case::chosen(&CASES, |case| case.name, &args.cases)?;
    let _lock = bed::alone()?;
    let this = std::env::current_exe().context("where this program is")?;
    let beside = this.parent().map(PathBuf::from).unwrap_or_default();
    let envoy = install::envoy().await.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        "envoy".into()
    });
    let launch = args.launch.canonicalize()?;
    let tools = Tools { this, ours: args.programs.clone().unwrap_or(beside), launch, envoy };
    let seconds: f64 = cases
        .iter()
        .map(|case| {
            let steps = if let Load::Ladder(steps, _) = case.load { steps.len() } else { 1 };
            let one = (args.warm_up + args.seconds) * steps as f64 + AROUND;
            takers(&args, case).len() as f64 * args.runs as f64 * one
        })
        .sum();
    eprintln!(
        "cases: {}; about {:.0} min; the models' service times are simulated",
        cases.len(),
        (seconds / 60.0).ceil()
    );
    let mut rows = Vec::new();
    for case in &cases {
        eprintln!("\n{}: {}", case.name, case.says);
        let round = measure(&args, case, &tools).await;
        let told = rows_of(case, &round);
        println!("\n{}", table(case, &told));
        rows.extend(told);
        report::write(&args.out, &rows)?;
    }
    eprintln!("{} rows in {}", rows.len(), args.out.display());
    Ok(())
}

fn takers(args: &BatchArgs, case: &Case) -> Vec<Subject> {
    let wanted = |subject: &&Subject| args.subjects.is_empty() || args.subjects.contains(subject);
    case.subjects.iter().filter(wanted).copied().collect()
}

/// All runs of a case.
async fn measure(args: &BatchArgs, case: &Case, tools: &Tools) -> Round {
    let takers = takers(args, case);
    let mut round: Round = takers.iter().map(|subject| (*subject, Ok(Vec::new()))).collect();
    for turn in 0..args.runs {
        for at in 0..takers.len() {
            let subject = takers[(at + turn) % takers.len()];
            let Some(Ok(runs)) = round.get_mut(&subject) else { continue };
            let label = format!("{:<20} run {}/{}  {:<13}", case.name, turn + 1, args.runs, subject.name());
            // The clients of the mesh bed, which check answers here, live on one thread.
            match LocalSet::new().run_until(once(args, case, subject, tools)).await {
                Ok(run) => {
                    let told: String = run
                        .figures
                        .iter()
                        .map(|(name, value)| format!("  {name} {}", report::rounded(*value)))
                        .collect();
                    let rows =
                        run.rows.map(|rows| format!("  {rows:.1} rows an execution")).unwrap_or_default();
                    eprintln!("{label}{told}{rows}");
                    runs.push(run);
                }
                Err(error) => {
                    eprintln!("{label}  failed: {error:#}");
                    round.insert(subject, Err(format!("{error:#}")));
                }
            }
        }
    }
    round
}

/// One run, with a server and a subject of its own.
async fn once(args: &BatchArgs, case: &Case, subject: Subject, tools: &Tools) -> Result<Run> {
    // A port may be taken between its choice and its use; that must not cost a subject its rows.
    let mut stage = match Stage::start(case, subject, tools).await {
        Ok(stage) => stage,
        Err(_) => Stage::start(case, subject, tools).await?,
    };
    let before = stage.executions().await;
    let figures = loaded(args, case, &stage, tools).await;
    let after = stage.executions().await;
    let checked = stage.check();
    stage.stop().await;
    let mut run = Run { figures: figures?, rows: None };
    checked?;
    if let (Some(before), Some(after)) = (before, after) {
        let (executions, rows) = (after.0 - before.0, after.1 - before.1);
        run.rows = (executions > 0).then(|| rows as f64 / executions as f64);
        run.figures.insert(EXECUTIONS.0, executions as f64);
    }
    Ok(run)
}

/// Sends the case's load.
async fn loaded(
    args: &BatchArgs,
    case: &Case,
    stage: &Stage,
    tools: &Tools,
) -> Result<BTreeMap<&'static str, f64>> {
    match case.load {
        Load::Closed(clients) => Ok(figures(&send(args, case, stage, tools, clients, 0).await?)),
        Load::Open(rate) => Ok(figures(&send(args, case, stage, tools, OPEN, rate).await?)),
        Load::Burst(requests) => burst(case, stage, requests).await.map(|()| BTreeMap::new()),
        Load::Ladder(steps, p99) => {
            let mut best: Option<Measured> = None;
            let mut last = String::new();
            for clients in steps {
                // Where answers come later than the run lasts, there is nothing to measure, and more clients may help.
                match send(args, case, stage, tools, *clients, 0).await {
                    Ok(run) => {
                        let rps = |run: &Measured| run.requests as f64 / run.seconds;
                        eprintln!(
                            "  {clients} clients: {:.0} requests/s, p99 {:.1} ms",
                            rps(&run),
                            run.p99_us / 1e3
                        );
                        last = format!("p99 {:.0} ms with {clients} clients", run.p99_us / 1e3);
                        if run.p99_us <= p99.as_micros() as f64
                            && best.as_ref().is_none_or(|best| rps(best) < rps(&run))
                        {
                            best = Some(run);
                        }
                    }
                    Err(error) => last = format!("{error:#}"),
                }
            }
            let best = best.with_context(|| format!("no number of clients has a p99 of {p99:?}: {last}"))?;
            Ok(figures(&best))
        }
    }
}

fn figures(run: &Measured) -> BTreeMap<&'static str, f64> {
    let requests = run.requests as f64;
    let mut figures = BTreeMap::from([(RPS.0, requests / run.seconds), (P99.0, run.p99_us)]);
    figures.insert(CPU_PER_1K.0, run.cpu_s / requests * 1e3);
    if run.bytes > 0 {
        figures.insert(CPU_PER_GB.0, run.cpu_s / (run.bytes as f64 / 1e9));
    }
    figures
}

async fn send(
    args: &BatchArgs,
    case: &Case,
    stage: &Stage,
    tools: &Tools,
    clients: usize,
    rate: u32,
) -> Result<Measured> {
    let file = stage.dir.path().join("request");
    std::fs::write(&file, request::bytes(&stage.host, case.body, stage.v1))?;
    let mut flags: Vec<OsString> = vec!["load".into()];
    let mut flag = |name: &str, value: String| flags.extend([format!("--{name}").into(), value.into()]);
    flag("address", stage.front.to_string());
    flag("request", file.display().to_string());
    flag("connections", clients.to_string());
    flag("rate", rate.to_string());
    flag("warm-up", args.warm_up.to_string());
    flag("seconds", args.seconds.to_string());
    // The machinery is the sidecar's; a simulated server's CPU would only hide it.
    let simulated = matches!(case.kind, Kind::Simulated { .. });
    let watched = if simulated { stage.proxy() } else { stage.watched() };
    watched.iter().for_each(|pid| flag("watch", pid.to_string()));
    let limit = Duration::from_secs_f64(args.warm_up + args.seconds + 20.0);
    let load = process::spawn(Some(LOAD_CORE), "load", &tools.this, &flags, stage.dir.path(), true)?;
    let run = load::read(&load.output(limit).await?)?;
    let failed = run.errors as f64 / (run.requests + run.errors) as f64;
    if failed > FAILED {
        bail!(
            "{} of {} requests failed: {}",
            run.errors,
            run.requests + run.errors,
            run.first_error.unwrap_or_default()
        );
    }
    Ok(run)
}

/// Equal requests at one moment, each with a right answer.
async fn burst(case: &Case, stage: &Stage, requests: usize) -> Result<()> {
    let asked = (0..requests).map(|_| stage.once(case.body));
    let answers = futures_util::future::join_all(asked).await;
    let wrong: Vec<String> =
        answers.into_iter().filter_map(|answer| Some(format!("{:#}", answer.err()?))).collect();
    let first = wrong.first().map_or("", String::as_str);
    ensure!(wrong.is_empty(), "{} of {requests} answers were wrong: {first}", wrong.len());
    Ok(())
}

/// The rows of a case.
fn rows_of(case: &Case, round: &Round) -> Vec<Row> {
    let summary = |subject: Subject, (metric, _): Named| {
        let runs = round.get(&subject)?.as_ref().ok()?;
        Summary::of(runs.iter().filter_map(|run| run.figures.get(metric).copied()).collect())
    };
    let mut rows = Vec::new();
    for (subject, runs) in round {
        let baseline = Some(case.baseline.name());
        let runs = match runs {
            Ok(runs) => runs,
            Err(error) => {
                let metric = case.metrics.first().copied().unwrap_or(RPS);
                rows.push(Row { baseline, ..Row::failed(case.name, subject.name(), metric, error.clone()) });
                continue;
            }
        };
        let executed = Summary::of(runs.iter().filter_map(|run| run.rows).collect());
        let note = executed.map(|rows| format!("{:.1} rows an execution", rows.median));
        for metric in case.metrics {
            let Some(figures) = summary(*subject, *metric) else { continue };
            let of = summary(case.baseline, *metric).filter(|baseline| baseline.median > 0.0);
            let ratio = of.map(|baseline| report::rounded(figures.median / baseline.median));
            let row = Row::measured(case.name, subject.name(), *metric, &figures);
            rows.push(Row { baseline, ratio, note: note.clone(), ..row });
        }
    }
    rows
}

/// The medians of a case with their ratios, a line to each subject.
fn table(case: &Case, rows: &[Row]) -> String {
    let mut head = vec![case.name.to_owned()];
    for (metric, unit) in case.metrics {
        head.extend([format!("{metric} [{unit}]"), format!("/ {}", case.baseline.name())]);
    }
    let mut lines = vec![head];
    let mut notes = String::new();
    let mut subjects: Vec<&str> = rows.iter().map(|row| row.subject.as_str()).collect();
    subjects.dedup();
    for subject in subjects {
        let mut line = vec![subject.to_owned()];
        for (metric, _) in case.metrics {
            let row = rows.iter().find(|row| row.subject == subject && row.metric == *metric);
            let told = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value}"));
            line.push(told(row.and_then(|row| row.median)));
            line.push(row.and_then(|row| row.ratio).map_or("-".to_owned(), |ratio| format!("{ratio:.2}")));
        }
        lines.push(line);
        let any = rows.iter().find(|row| row.subject == subject);
        if let Some(why) = any.and_then(|row| row.error.as_deref().or(row.note.as_deref())) {
            notes.push_str(&format!("  {subject}: {why}\n"));
        }
    }
    report::aligned(&lines) + &notes
}
