//! `penstock-bench proxy`: every subject through every case, and what came of it in `proxy.json`.
//!
//! Of a case, the runs of the subjects are interleaved (A B C, B C A, …), each with fresh processes that are
//! checked before they are timed. If the main figure of any subject spreads too far, the whole case is run once
//! more, so that the rows of a case always come from one round. A subject that fails has an `error` instead of
//! figures; the bed goes on. System calls and allocations are counted at last, in runs that are not timed.

mod counts;
pub(crate) mod hosts;
mod start;
mod verify;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use crate::case::{CASES, Case, Metric, Shape};
use crate::load::{self, Measured, Protocol, Purpose};
use crate::process::{self, Process};
use crate::report::{self, Row, Summary};
use crate::subject::{Programs, SUBJECTS, Subject};
use crate::upstream::Addresses;
use crate::{certificates, install, usage};

use counts::Counts;
use hosts::{Host, Hosts};
use start::Start;

/// The core of the proxies.
pub(crate) const PROXY_CORE: usize = 0;
/// The core that the load generator and the upstream share.
pub(crate) const LOAD_CORE: usize = 1;

/// (max - min) / median of the main figure, above which a case is run again.
const WIDE: f64 = 0.25;
/// A saturated proxy that used less of its core was not the limit.
const FULL: f64 = 0.85;
/// Share of the two cores that others may use before a row says so.
const FOREIGN: f64 = 0.15;
/// Share of failed requests above which there is nothing to report but the failure.
const FAILED: f64 = 0.01;
/// What a run costs besides its seconds: processes, checks. For the estimate only.
const AROUND: f64 = 0.5;
/// How long a load may take longer than it should; to open thousands of connections is not in its seconds.
const OVERTIME: Duration = Duration::from_secs(60);
/// Files that a proxy may have open: an idle connection each, as many to the upstream, and its own.
const FILES: u64 = 16_384;
/// How long a process rests before its memory is read.
const REST: Duration = Duration::from_secs(1);

/// Arguments of `penstock-bench proxy`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ProxyArgs {
    /// Only these cases, e.g. h1-small,mesh-mtls
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Only these subjects; ratios need envoy among them
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
    /// Do not run a case again whose figures spread too far
    #[arg(long)]
    once: bool,
    /// Our proxy; by default the release binary beside this one
    #[arg(long, value_name = "FILE")]
    penstock: Option<PathBuf>,
    /// Where the rows go
    #[arg(long, value_name = "FILE", default_value = "target/bench/proxy.json")]
    out: PathBuf,
}

/// What all runs share.
struct Bed {
    args: ProxyArgs,
    programs: Programs,
    dir: TempDir,
    this: PathBuf,
    upstream: Process,
    addresses: Addresses,
    answer: String,
    redirected: Option<Redirected>,
    start: Option<Start>,
}

/// The machines of the case `redirected`, with an upstream of their own.
struct Redirected {
    hosts: Hosts,
    upstream: Process,
    addresses: Addresses,
}

/// The runs of each subject in one round of a case, or why there are none.
type Round = BTreeMap<Subject, Result<Vec<Measured>, String>>;

/// Runs the bed.
pub(crate) async fn run(args: ProxyArgs) -> Result<()> {
    let cases = chosen(&args.cases)?;
    let subjects = if args.subjects.is_empty() { SUBJECTS.to_vec() } else { args.subjects.clone() };
    ensure!(args.runs > 0 && args.seconds > 0.0, "--runs and --seconds must be above 0");
    let cores = std::thread::available_parallelism()?.get();
    ensure!(
        cores > LOAD_CORE,
        "this machine lets us use {cores} core; the bed needs two: one for the proxy, one for the load"
    );
    let _lock = alone()?;
    if cases.iter().any(|case| case.purpose == Purpose::Idle) {
        allow_files()?;
    }

    let timed = cases.iter().filter(|case| case.shape != Shape::Start);
    let runs: usize = timed.map(|case| takers(&subjects, case).len() * args.runs).sum();
    let minutes = runs as f64 * (args.warm_up + args.seconds + AROUND) / 60.0;
    eprintln!("cases: {}; runs: {runs}; about {:.0} min if none is run again", cases.len(), minutes.ceil());

    let mut bed = Bed::new(args).await?;
    let mut rows = Vec::new();
    for case in cases {
        let takers = takers(&subjects, &case);
        eprintln!("\n{}: {}", case.name, case.says);
        let first = bed.round(&case, &takers).await?;
        let wide = wide(&case, &first);
        let (round, before) = match bed.args.once || wide.is_empty() {
            true => (first, BTreeMap::new()),
            false => {
                let who: Vec<String> =
                    wide.iter().map(|(who, by)| format!("{} {}", who.name(), percent(*by))).collect();
                eprintln!(
                    "{}: run again, {} spread too far ({})",
                    case.name,
                    case.main.name(),
                    who.join(", ")
                );
                (bed.round(&case, &takers).await?, wide)
            }
        };
        let counts = bed.count(&case, &round).await;
        let told = rows_of(&case, &round, &counts, &before);
        println!("\n{}", report::table(&case, &told));
        rows.extend(told);
        report::write(&bed.args.out, &rows)?;
    }
    eprintln!("{} rows in {}", rows.len(), bed.args.out.display());
    bed.upstream.stop().await;
    if let Some(redirected) = bed.redirected {
        redirected.upstream.stop().await;
    }
    if let Some(start) = bed.start {
        start.stop().await;
    }
    Ok(())
}

impl Bed {
    async fn new(args: ProxyArgs) -> Result<Self> {
        let this = std::env::current_exe().context("where this program is")?;
        let beside = this.with_file_name("penstock-proxy");
        let (haproxy, nginx) = install::debian().await;
        let envoy = install::envoy().await.unwrap_or_else(|error| {
            eprintln!("{error:#}");
            "envoy".into()
        });
        let programs = Programs { penstock: args.penstock.clone().unwrap_or(beside), envoy, haproxy, nginx };

        let dir = tempfile::Builder::new().prefix("penstock-bench-").tempdir()?;
        certificates::make(dir.path())?;
        // Nobody can answer with it who has not asked the upstream.
        let answer = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        let (upstream, addresses) = upstream(&this, &answer, dir.path()).await?;
        let (redirected, start) = (None, None);
        Ok(Self { args, programs, dir, this, upstream, addresses, answer, redirected, start })
    }

    /// What only some cases need is made when the first of them comes.
    async fn prepare(&mut self, case: &Case) -> Result<()> {
        if case.shape == Shape::Redirected && self.redirected.is_none() {
            let hosts = Hosts::new(&self.programs.penstock, self.dir.path())?;
            let (upstream, addresses) = {
                let _away = hosts.enter(Host::Server)?;
                upstream(&self.this, &self.answer, self.dir.path()).await?
            };
            self.redirected = Some(Redirected { hosts, upstream, addresses });
        }
        if case.shape == Shape::Start && self.start.is_none() {
            self.start = Some(Start::new(&self.programs.penstock, self.dir.path()).await?);
        }
        Ok(())
    }

    /// Every subject `--runs` times, interleaved.
    async fn round(&mut self, case: &Case, subjects: &[Subject]) -> Result<Round> {
        let mut round: Round = subjects.iter().map(|subject| (*subject, Ok(Vec::new()))).collect();
        if let Err(error) = self.prepare(case).await {
            eprintln!("{}: {error:#}", case.name);
            round.values_mut().for_each(|runs| *runs = Err(format!("{error:#}")));
        }
        let of = case.runs(self.args.runs);
        for turn in 0..of {
            for at in 0..subjects.len() {
                let subject = subjects[(at + turn) % subjects.len()];
                let Some(Ok(runs)) = round.get_mut(&subject) else { continue };
                let label = format!("{:<16} run {}/{}  {:<9}", case.name, turn + 1, of, subject.name());
                self.upstream.check()?;
                match self.run_twice_at_most(case, subject).await {
                    Ok(run) => {
                        eprintln!("{label}{}", report::progress(case, &run, subject == Subject::Direct));
                        runs.push(run);
                    }
                    Err(error) => {
                        eprintln!("{label}failed: {error:#}");
                        round.insert(subject, Err(format!("{error:#}")));
                    }
                }
            }
        }
        if case.purpose == Purpose::Tokens {
            take_off_direct(&mut round);
        }
        Ok(round)
    }

    /// A port may be taken between its choice and its use; that must not cost a subject its rows.
    async fn run_twice_at_most(&mut self, case: &Case, subject: Subject) -> Result<Measured> {
        match self.run(case, subject).await {
            Ok(run) => Ok(run),
            Err(_) => self.run(case, subject).await,
        }
    }

    async fn run(&mut self, case: &Case, subject: Subject) -> Result<Measured> {
        if case.shape == Shape::Start {
            return self.start.as_mut().context("there is no control")?.run(PROXY_CORE).await;
        }
        let redirected = self.redirected.as_ref();
        let redirected =
            redirected.filter(|_| case.shape == Shape::Redirected && subject == Subject::Penstock);
        let hosts = redirected.map(|redirected| &redirected.hosts);
        let addresses = redirected.map_or(self.addresses, |redirected| redirected.addresses);
        let mut running =
            subject.start(case, &self.programs, addresses, self.dir.path(), PROXY_CORE, hosts)?;
        let check = self.check(case, subject, redirected);
        check.run(&mut running).await?;
        let pids: Vec<u32> = running.processes.iter().map(Process::pid).collect();
        let run = if case.at_rest() {
            tokio::time::sleep(REST).await;
            let memory = usage::memory(&pids.iter().flat_map(|pid| usage::tree(*pid)).collect())?;
            Measured { rss: memory.now, rss_peak: memory.peak, ..Measured::default() }
        } else {
            let address = running.front.to_string();
            let companion = redirected.map_or(&self.upstream, |redirected| &redirected.upstream).pid();
            let _away = hosts.map(|hosts| hosts.enter(Host::Client)).transpose()?;
            let arguments = self.arguments(case, &address, &pids, companion, self.args.seconds);
            self.load(&arguments).await.with_context(|| running.story("was under load").to_string())?
        };
        running.check()?;
        running.stop().await;
        Ok(run)
    }

    /// How `subject` is looked at before it is measured.
    fn check<'a>(
        &'a self,
        case: &'a Case,
        subject: Subject,
        redirected: Option<&'a Redirected>,
    ) -> verify::Check<'a> {
        verify::Check {
            case,
            subject,
            upstream: redirected.map_or(self.addresses, |redirected| redirected.addresses),
            answer: &self.answer,
            certificates: self.dir.path(),
            hosts: redirected.map(|redirected| &redirected.hosts),
        }
    }

    /// What the load generator is told.
    fn arguments(
        &self,
        case: &Case,
        address: &str,
        watch: &[u32],
        companion: u32,
        seconds: f64,
    ) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["load".into()];
        let mut flag = |name: &str, value: String| args.extend([format!("--{name}").into(), value.into()]);
        flag("address", address.to_owned());
        flag("protocol", case.client.flag().to_owned());
        flag("purpose", case.purpose.flag().to_owned());
        flag("connections", case.connections.to_string());
        flag("streams", case.streams.to_string());
        flag("body", case.body.to_string());
        flag("rate", case.rate.to_string());
        flag("warm-up", self.args.warm_up.to_string());
        flag("seconds", seconds.to_string());
        flag("companion", companion.to_string());
        if case.shape == Shape::Tls {
            flag("tls", self.dir.path().display().to_string());
        }
        watch.iter().for_each(|pid| flag("watch", pid.to_string()));
        args
    }

    fn start_load(&self, arguments: &[OsString]) -> Result<Process> {
        process::spawn(Some(LOAD_CORE), "load", &self.this, arguments, self.dir.path(), true)
    }

    async fn load(&self, arguments: &[OsString]) -> Result<Measured> {
        let limit = Duration::from_secs_f64(self.args.warm_up + self.args.seconds) + OVERTIME;
        let run = load::read(&self.start_load(arguments)?.output(limit).await?)?;
        let failed = run.errors as f64 / (run.requests + run.errors) as f64;
        if failed > FAILED {
            let why = run.first_error.unwrap_or_default();
            bail!("{} of {} requests failed: {why}", run.errors, run.requests + run.errors);
        }
        Ok(run)
    }
}

/// Subtracts what the way does to gaps between tokens without a proxy, in the run of the same turn: so what the machine did to those
/// is a part of how far the difference spreads. Without them nobody's figure is known.
fn take_off_direct(round: &mut Round) {
    let direct = round.get(&Subject::Direct).and_then(|runs| runs.as_ref().ok());
    let direct: Option<Vec<f64>> =
        direct.map(|runs| runs.iter().map(|run| Metric::GapWholeP99.of(run)).collect());
    for (_, runs) in round.iter_mut().filter(|(subject, _)| **subject != Subject::Direct) {
        match (&direct, runs.as_mut()) {
            (Some(direct), Ok(runs)) => {
                runs.iter_mut()
                    .zip(direct)
                    .for_each(|(run, direct)| run.gap_p99_us = run.gap_whole_p99_us - direct);
            }
            (None, Ok(_)) => *runs = Err("there is no direct connection to compare it with".to_owned()),
            (_, Err(_)) => {}
        }
    }
}

/// Lets this process and its children have so many files open, or fails if that is not allowed here.
fn allow_files() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= FILES) {
        return Ok(());
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(FILES), ..limit }).with_context(|| {
        format!("thousands of idle connections need {FILES} open files; allow so many (ulimit -Hn), or leave the idle-* cases out")
    })
}

/// An upstream, in the network namespace that this thread is in.
async fn upstream(this: &Path, answer: &str, dir: &Path) -> Result<(Process, Addresses)> {
    let arguments: Vec<OsString> = ["upstream", "--answer", answer].iter().map(OsString::from).collect();
    let mut upstream = process::spawn(Some(LOAD_CORE), "upstream", this, &arguments, dir, true)?;
    let addresses = serde_json::from_str(&upstream.line().await?).context("the upstream's addresses")?;
    Ok((upstream, addresses))
}

/// The named cases, or all.
fn chosen(names: &[String]) -> Result<Vec<Case>> {
    crate::case::chosen(&CASES, |case| case.name, names)
}

/// Who of these takes part; what is added to a direct connection needs one, whoever was asked for.
fn takers(subjects: &[Subject], case: &Case) -> Vec<Subject> {
    let asked = |subject: &Subject| {
        subjects.contains(subject) || (case.purpose == Purpose::Tokens && *subject == Subject::Direct)
    };
    SUBJECTS.into_iter().filter(|subject| asked(subject) && subject.takes_part(case)).collect()
}

/// Two benches at a time spoil each other's figures.
pub(crate) fn alone() -> Result<File> {
    let path = install::cache()?.join("bench.lock");
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    let file = File::create(&path).with_context(|| format!("{}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "another bench is running (it holds {}); two at a time would spoil both, so wait for it",
                path.display()
            )
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("{}", path.display())),
    }
}

/// The subjects whose main figure spreads too far, and by how much.
fn wide(case: &Case, round: &Round) -> BTreeMap<Subject, f64> {
    let spread = |subject: &Subject, runs: &[Measured]| {
        let metric = case.main_of(*subject);
        let summary = Summary::of(runs.iter().map(|run| metric.of(run)).collect())?;
        (summary.spread() > WIDE).then_some((*subject, summary.spread()))
    };
    round.iter().filter_map(|(subject, runs)| spread(subject, runs.as_ref().ok()?)).collect()
}

/// The rows of a case.
fn rows_of(case: &Case, round: &Round, counts: &Counts, before: &BTreeMap<Subject, f64>) -> Vec<Row> {
    let of_baseline = |row: Row, baseline: Option<f64>| Row {
        baseline: Some(case.baseline().name()),
        ratio: baseline
            .filter(|baseline| *baseline > 0.0)
            .zip(row.median)
            .map(|(baseline, median)| report::rounded(median / baseline)),
        ..row
    };
    let summary = |subject: Subject, metric: Metric| {
        let runs = round.get(&subject)?.as_ref().ok()?;
        Summary::of(runs.iter().map(|run| metric.of(run)).collect())
    };
    let mut rows = Vec::new();
    for (subject, runs) in round {
        let runs = match runs {
            Ok(runs) => runs,
            Err(error) => {
                let row = Row::failed(case.name, subject.name(), case.main.named(), error.clone());
                rows.push(of_baseline(row, None));
                continue;
            }
        };
        let note = note(case, *subject, runs, before.get(subject).copied());
        for metric in case.metrics() {
            if *subject == Subject::Direct && metric.of_proxy() {
                continue;
            }
            let Some(figures) = summary(*subject, metric) else { continue };
            let baseline = summary(case.baseline(), metric).map(|baseline| baseline.median);
            let row =
                of_baseline(Row::measured(case.name, subject.name(), metric.named(), &figures), baseline);
            let target = case.target.filter(|_| *subject == Subject::Penstock && metric == case.main);
            rows.push(Row { target, note: note.clone(), ..row });
        }
        for metric in case.counts() {
            let count = |subject: Subject| counts.get(&(subject, *metric));
            let row = match count(*subject) {
                None => continue,
                Some(Ok(counted)) => {
                    let figures = Summary { median: *counted, min: *counted, max: *counted, runs: 1 };
                    Row::measured(case.name, subject.name(), metric.named(), &figures)
                }
                Some(Err(error)) => Row::failed(case.name, subject.name(), metric.named(), error.clone()),
            };
            let baseline = count(case.baseline()).and_then(|counted| counted.as_ref().ok()).copied();
            rows.push(of_baseline(row, baseline));
        }
    }
    rows
}

/// What a reader must know of these runs before trusting them.
fn note(case: &Case, subject: Subject, runs: &[Measured], before: Option<f64>) -> Option<String> {
    let mut notes = Vec::new();
    let metric = case.main_of(subject);
    let spread = Summary::of(runs.iter().map(|run| metric.of(run)).collect()).map_or(0.0, |all| all.spread());
    match before {
        Some(before) if spread > WIDE => {
            notes.push(format!(
                "{} spreads by {}, by {} when run first",
                metric.name(),
                percent(spread),
                percent(before)
            ));
        }
        Some(before) => {
            notes.push(format!("run again, {} spread by {} at first", metric.name(), percent(before)))
        }
        None if spread > WIDE => notes.push(format!("{} spreads by {}", metric.name(), percent(spread))),
        None => {}
    }
    let failed: u64 = runs.iter().map(|run| run.errors).sum();
    if failed > 0 {
        let why = runs.iter().find_map(|run| run.first_error.as_deref()).unwrap_or("for an unknown reason");
        notes.push(format!("{failed} requests failed: {why}"));
    }
    let seconds: f64 = runs.iter().map(|run| run.seconds).sum();
    if seconds > 0.0 {
        let sum = |of: fn(&Measured) -> f64| runs.iter().map(of).sum::<f64>();
        let (proxy, load) = (sum(|run| run.cpu_s) / seconds, sum(|run| run.load_cpu_s) / seconds);
        if case.saturates() && subject != Subject::Direct && proxy < FULL {
            notes.push(format!(
                "its core was only {} busy (the load core {}), so it was not the limit",
                percent(proxy),
                percent(load)
            ));
        }
        let foreign = (sum(|run| run.cores_busy_s) / seconds - proxy - load) / 2.0;
        if foreign > FOREIGN {
            notes.push(format!("others used {} of the two cores", percent(foreign)));
        }
    }
    (!notes.is_empty()).then(|| notes.join("; "))
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// What the two proxies of a mesh speak decides how the check asks for a certificate.
fn guarded_protocol(case: &Case, subject: Subject) -> Protocol {
    if matches!(case.shape, Shape::Mesh | Shape::Redirected) { subject.between() } else { case.client }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(cpu: &[f64]) -> Vec<Measured> {
        let run = |cpu: &f64| Measured {
            seconds: 1.0,
            requests: 1000,
            cpu_s: *cpu,
            load_cpu_s: 0.5,
            cores_busy_s: cpu + 0.5,
            ..Measured::default()
        };
        cpu.iter().map(run).collect()
    }

    #[test]
    fn ratios_are_of_medians_of_the_same_round() {
        let case = CASES[0];
        let round = [
            (Subject::Penstock, Ok(runs(&[0.44, 0.45, 0.46]))),
            (Subject::Envoy, Ok(runs(&[0.85, 0.90, 0.95]))),
            (Subject::Nginx, Err("nginx ended with exit status: 1".to_owned())),
        ];
        let round: Round = round.into_iter().collect();
        let counts = [(Subject::Penstock, 4.0), (Subject::Envoy, 8.0)]
            .map(|(subject, calls)| ((subject, Metric::Syscalls), Ok(calls)));
        let mut counts: Counts = counts.into_iter().collect();
        counts.insert((Subject::Penstock, Metric::Allocations), Err("not built".to_owned()));
        let rows = rows_of(&case, &round, &counts, &BTreeMap::new());
        let main: Vec<&Row> = rows.iter().filter(|row| row.metric == case.main.name()).collect();
        assert_eq!(main.len(), 3);
        assert!((main[0].ratio.unwrap() - 0.5).abs() < 1e-9);
        assert!(main[0].note.as_ref().unwrap().contains("its core was only 45 % busy"));
        assert!(main[1].note.is_none());
        assert!(main[2].error.as_ref().unwrap().contains("exit status"));
        assert_eq!((main[0].target, main[1].target), (case.target, None), "what is wanted is wanted of us");
        let of = |subject: Subject, metric: Metric| {
            rows.iter().find(|row| row.subject == subject.name() && row.metric == metric.name())
        };
        let calls = of(Subject::Penstock, Metric::Syscalls).unwrap();
        assert_eq!((calls.median, calls.ratio, calls.runs), (Some(4.0), Some(0.5), 1));
        assert_eq!(of(Subject::Penstock, Metric::Allocations).unwrap().error.as_deref(), Some("not built"));
        assert!(
            of(Subject::Envoy, Metric::Allocations).is_none()
                && of(Subject::Nginx, Metric::Syscalls).is_none()
        );
    }

    #[test]
    fn what_a_gap_is_without_a_proxy_is_taken_off() {
        let gaps = |gaps: &[f64]| {
            let run = |gap: &f64| Measured { gap_whole_p99_us: *gap, ..Measured::default() };
            gaps.iter().map(run).collect::<Vec<_>>()
        };
        let round = [
            (Subject::Penstock, Ok(gaps(&[150.0, 160.0, 90.0]))),
            (Subject::Nginx, Err("ended".to_owned())),
            (Subject::Direct, Ok(gaps(&[100.0, 60.0, 120.0]))),
        ];
        let mut round: Round = round.into_iter().collect();
        take_off_direct(&mut round);
        let added: Vec<f64> =
            round[&Subject::Penstock].as_ref().unwrap().iter().map(|run| run.gap_p99_us).collect();
        assert_eq!(added, [50.0, 100.0, -30.0]);
        assert_eq!(round[&Subject::Nginx].as_ref().unwrap_err(), "ended");
        round.insert(Subject::Direct, Err("the port was taken".to_owned()));
        take_off_direct(&mut round);
        assert!(round[&Subject::Penstock].as_ref().unwrap_err().contains("no direct connection"));
    }

    #[test]
    fn tokens_are_always_sent_without_a_proxy_too() {
        let tokens = chosen(&["token-stream".to_owned()]).unwrap()[0];
        assert_eq!(takers(&[Subject::Penstock], &tokens), [Subject::Penstock, Subject::Direct]);
        assert_eq!(takers(&[Subject::Penstock], &CASES[0]), [Subject::Penstock]);
        let idle = chosen(&["idle-5000".to_owned()]).unwrap()[0];
        let peers = [Subject::Penstock, Subject::Envoy, Subject::Haproxy, Subject::Nginx];
        assert_eq!(takers(&SUBJECTS, &idle), peers, "without a proxy nobody's memory grows");
    }

    #[test]
    fn a_wide_figure_is_named_before_and_after() {
        let case = CASES[0];
        let round: Round = [(Subject::Envoy, Ok(runs(&[0.9, 0.95, 1.4])))].into_iter().collect();
        let wide = wide(&case, &round);
        assert!(wide[&Subject::Envoy] > 0.5);
        let rows = rows_of(&case, &round, &Counts::new(), &wide);
        assert!(rows[0].note.as_ref().unwrap().contains("spreads by 53 %, by 53 % when run first"));
    }

    #[test]
    fn a_case_that_does_not_exist_names_those_that_do() {
        let error = chosen(&["h3".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("`h3`") && error.contains("mesh-mtls"), "{error}");
    }
}
