//! The case `end-to-end-jpeg`: photographs of 1920 x 1080, from a client to the real Triton.
//!
//! Three kinds of client, all in Python with tritonclient, each in as many processes, one request at a time in each: ours sends the
//! JPEG to its sidecar; one transforms with Pillow and numpy and sends a binary tensor to Triton; one sends the numbers in JSON.
//! Client, sidecars and server share all cores of this machine, so requests a second say what the whole costs; CPU is that of all
//! processes together. Runs are interleaved, and the mean of what the model saw of each
//! photograph must be the same for all.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "the bed has no runtime: it may wait, and its clock is the real one"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::mesh::{HOST, Mesh, Tools};
use crate::peers::{self, Peer};
use crate::report::{Row, Summary};

pub(crate) const NAME: &str = "end-to-end-jpeg";
/// The subjects, and what `clients.py` calls them.
const SUBJECTS: [(&str, &str); 3] =
    [("penstock", "jpeg"), ("pillow-client", "pillow"), ("json-client", "json")];
/// How far the mean element may be from Pillow's: 0.02 is one of 255 of a pixel in these units.
const SAME: f64 = 0.02;
/// A page of metrics is a second old at most.
const PAGE: Duration = Duration::from_millis(1500);
/// Seconds of load before the first round.
const WARM_UP: f64 = 2.0;

const RPS: (&str, &str) = ("rps", "requests/s");
const CPU: (&str, &str) = ("cpu_s_per_request", "s");

/// What the case needs besides.
pub(crate) struct Setting<'a> {
    pub(crate) install: &'a Path,
    pub(crate) launch: &'a Path,
    pub(crate) clients: &'a Path,
    pub(crate) programs: PathBuf,
    /// Where `1080p.jpg` is, and logs go.
    pub(crate) dir: &'a Path,
    pub(crate) runs: usize,
    pub(crate) seconds: f64,
    pub(crate) processes: usize,
}

/// One run of a subject.
#[derive(Default)]
struct Run {
    rps: f64,
    /// CPU seconds for a request: client, sidecars, server.
    cpu: [f64; 3],
    p50: f64,
    p99: f64,
    /// The mean element of each photograph's tensors as the model saw them; of some there may have been none.
    means: Vec<Option<f64>>,
}

/// The rows of the case; if it cannot be run, they say why.
pub(crate) fn rows(setting: &Setting<'_>) -> Vec<Row> {
    let runs = match measure(setting) {
        Ok(runs) => runs,
        Err(error) => {
            let story = format!("{error:#}");
            eprintln!("{NAME}: {story}");
            return SUBJECTS.iter().map(|(subject, _)| Row::failed(NAME, subject, RPS, &story)).collect();
        }
    };
    let mut rows = Vec::new();
    let of = |at: usize, figure: fn(&Run) -> f64| Summary::of(runs[at].iter().map(figure).collect());
    let total: fn(&Run) -> f64 = |run| run.cpu.iter().sum();
    for (at, (subject, _)) in SUBJECTS.iter().enumerate() {
        for (metric, figure) in [(RPS, (|run| run.rps) as fn(&Run) -> f64), (CPU, total)] {
            let (Some(figures), base) = (of(at, figure), of(1, figure).map(|base| base.median)) else {
                continue;
            };
            let mut row = Row::measured(NAME, subject, metric, &figures).against("pillow-client", base);
            let median = |figure: fn(&Run) -> f64| of(at, figure).map_or(0.0, |figures| figures.median);
            row.note = Some(if metric == RPS {
                let (p50, p99) = (median(|run| run.p50), median(|run| run.p99));
                format!("{} processes; p50 {p50:.0} ms, p99 {p99:.0} ms", setting.processes)
            } else {
                let [client, sidecars, server] =
                    [median(|run| run.cpu[0]), median(|run| run.cpu[1]), median(|run| run.cpu[2])];
                format!(
                    "client {:.1} ms, sidecars {:.1} ms, server {:.1} ms",
                    client * 1e3,
                    sidecars * 1e3,
                    server * 1e3
                )
            });
            rows.push(row);
        }
    }
    for (metric, peer) in [("rps_vs_pillow_client", 1), ("rps_vs_json_client", 2)] {
        // Of one round each, so that what slowed a round down slowed both.
        let ratios = runs[0].iter().zip(&runs[peer]).map(|(ours, peer)| ours.rps / peer.rps).collect();
        let row = Summary::of(ratios)
            .map(|ratios| Row::measured(NAME, "penstock", (metric, "x"), &ratios).named(SUBJECTS[peer].0));
        rows.extend(row);
    }
    rows
}

/// All rounds, by subject.
fn measure(setting: &Setting<'_>) -> Result<[Vec<Run>; 3]> {
    peers::installed(setting.install, "triton")?;
    let python = peers::installed(setting.install, "clients")?.join("bin/python");
    let tools = Tools { ours: setting.programs.clone(), launch: setting.launch };
    let mut mesh = Mesh::start(&tools, setting.dir)?;
    let mut clients = Vec::new();
    for (subject, kind) in SUBJECTS {
        let (address, host) = match kind {
            "jpeg" => (mesh.outbound().to_string(), HOST),
            _ => (mesh.server().to_string(), ""),
        };
        let mut command = Command::new(&python);
        command.arg(setting.clients).arg(kind).arg(setting.dir).args([&address, host]);
        command.arg(setting.processes.to_string());
        clients.push(Peer::of(&mut command).with_context(|| format!("the clients of {subject}"))?);
    }
    let mut runs: [Vec<Run>; 3] = Default::default();
    for turn in 0..=setting.runs {
        let mut told: [Run; 3] = Default::default();
        for step in 0..SUBJECTS.len() {
            let at = (step + turn) % SUBJECTS.len();
            let (subject, _) = SUBJECTS[at];
            // The first turn warms up, and is not counted.
            let seconds = if turn == 0 { WARM_UP } else { setting.seconds };
            let run = once(&mut mesh, &mut clients[at], at, seconds).with_context(|| subject.to_owned())?;
            eprintln!(
                "{NAME} round {turn}/{} {subject:<14} {:.1} requests/s, {:.1} ms of CPU a request",
                setting.runs,
                run.rps,
                run.cpu.iter().sum::<f64>() * 1e3
            );
            told[at] = run;
        }
        for (run, (subject, _)) in told.iter().zip(SUBJECTS) {
            for (own, pillow) in run.means.iter().zip(&told[1].means) {
                let (Some(own), Some(pillow)) = (own, pillow) else { continue };
                let same = (own - pillow).abs() <= SAME;
                ensure!(same, "{subject}: the model saw {own:.4} on average, and of Pillow {pillow:.4}");
            }
        }
        if turn > 0 {
            told.into_iter().enumerate().for_each(|(at, run)| runs[at].push(run));
        }
    }
    Ok(runs)
}

/// One run: all processes of a kind of client ask for so long.
fn once(mesh: &mut Mesh, clients: &mut Peer, at: usize, seconds: f64) -> Result<Run> {
    let (before, counted) = (mesh.cpu_s()?, mesh.counted()?);
    let told = clients.ask(&json!(seconds))?;
    let after = mesh.cpu_s()?;
    let figure = |name: &str| told[name].as_f64().with_context(|| format!("no {name} in {told}"));
    let requests = figure("requests")?;
    if at == 0 {
        std::thread::sleep(PAGE);
        let [prepared, placed] = mesh.counted()?;
        let (prepared, placed) = (prepared - counted[0], placed - counted[1]);
        ensure!(prepared >= requests * 0.9, "{prepared} tensors were prepared for {requests} requests");
        eprintln!("{NAME} {requests} photographs, {placed} executions in memory that Triton reads too");
    }
    Ok(Run {
        rps: figure("rps")?,
        cpu: [figure("cpu_s")?, after[0] - before[0], after[1] - before[1]].map(|cpu| cpu / requests),
        p50: figure("p50_ms")?,
        p99: figure("p99_ms")?,
        means: told["means"].as_array().into_iter().flatten().map(serde_json::Value::as_f64).collect(),
    })
}
