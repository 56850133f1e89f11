//! `penstock-bench-prepare`: what it costs to make a tensor of an image, beside what people use for it.
//!
//! All subjects work on the same bytes and are pinned to the same core, one after the other, in rounds that begin with another
//! subject each time. What is measured is CPU time of the process, so that whoever else is on the machine counts little; the
//! Python peers live in one process for each venv that stays, so that imports and first calls are not counted. Before the first round every
//! subject's tensor is compared with Pillow's. A peer that cannot be had is a row with an `error`.
//!
//! Exit status 0 if the bed ran to its end, 1 if it could not, 2 for a wrong command line.

mod end_to_end;
mod mesh;
mod peers;
mod receive;
mod report;
mod subject;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use penstock_kernels::allocated::Counting;

use peers::Peers;
use report::{Row, Summary};
use subject::{Ours, cpu_ms};

/// The sidecar's: what is decrypted, decoded and received is allocated as there.
#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

const EXAMPLES: &str = "\
Examples:
  penstock-bench-prepare                         all cases, 9 rounds, four minutes
  penstock-bench-prepare --cases resize --runs 3

Cases:
  jpeg-1080p  a JPEG of 1920 x 1080 to a normalised f16 CHW of 224 x 224 (preset imagenet)
  resize      1920 x 1080 RGB to 224 x 224, antialiased bilinear
  normalise   RGB to a normalised f16 CHW, beside writing as many bytes once: into one slot again and again, and into
              slots that are in no cache (cold)
  receive-plain, receive-mtls
              a tensor of 6 MiB from a connection into the arena, beside a bare read() or rustls' own stream
  end-to-end-jpeg
              JPEGs of 1920 x 1080 from a client through two sidecars and mutual TLS to Triton, beside clients that
              transform with Pillow and send tensors or JSON; on all cores, in wall time";

/// What preprocessing costs, beside Pillow, OpenCV, simplejpeg and DALI
#[derive(Parser)]
#[command(version, about, after_help = EXAMPLES, max_term_width = 110)]
struct Args {
    /// Only these cases
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Rounds of each case
    #[arg(long, default_value_t = 9)]
    runs: usize,
    /// CPU milliseconds that a subject works in a round
    #[arg(long, default_value_t = 300.0)]
    span: f64,
    /// The core on which everybody works
    #[arg(long, default_value_t = 0)]
    core: usize,
    /// Rounds of end-to-end-jpeg, seconds of a subject in each of them, and processes of a client
    #[arg(long, default_value_t = 5)]
    end_to_end_runs: usize,
    #[arg(long, default_value_t = 5.0)]
    end_to_end_seconds: f64,
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Where our programs are; by default beside this one
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// What starts the real Triton
    #[arg(long, value_name = "FILE", default_value = "tests/tests/servers/launch.py")]
    launch: PathBuf,
    /// The clients of end-to-end-jpeg
    #[arg(long, value_name = "FILE", default_value = "benches/prepare/src/clients.py")]
    client_script: PathBuf,
    /// What installs the peers; run from the repository's root, it is found
    #[arg(long, value_name = "FILE", default_value = "tests/tests/servers/install.py")]
    install: PathBuf,
    /// What runs them
    #[arg(long, value_name = "FILE", default_value = "benches/prepare/src/peers.py")]
    peers: PathBuf,
    /// Where the rows go
    #[arg(long, value_name = "FILE", default_value = "target/bench/prepare.json")]
    out: PathBuf,
}

/// A case: its subjects, the first of which is the baseline, and what is told of ours against whom.
struct Case {
    name: &'static str,
    ours: &'static [&'static str],
    peers: &'static [&'static str],
    speeds: &'static [(&'static str, &'static str)],
}

const CASES: [Case; 3] = [
    Case {
        name: "jpeg-1080p",
        ours: &["penstock", "penstock-fast", "penstock-off"],
        peers: &["pillow", "pillow-draft", "best-python", "opencv", "dali-cpu"],
        speeds: &[
            ("speed_vs_pillow", "pillow"),
            ("speed_vs_best_python", "best-python"),
            ("speed_vs_dali_cpu", "dali-cpu"),
        ],
    },
    Case {
        name: "resize",
        ours: &["penstock"],
        peers: &["pillow", "opencv"],
        speeds: &[("speed_vs_pillow", "pillow")],
    },
    Case {
        name: "normalise",
        ours: &[
            "penstock-224",
            "penstock-1080p",
            "penstock-224-cold",
            "penstock-1080p-cold",
            "write-once-224",
            "write-once-1080p",
            "write-once-224-cold",
            "write-once-1080p-cold",
        ],
        peers: &["numpy-224", "numpy-1080p"],
        speeds: &[],
    },
];

/// Milliseconds for an image, one for each round; or why there are none.
type Times = BTreeMap<&'static str, Result<Vec<f64>, String>>;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-bench-prepare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    ensure!(args.runs > 0 && args.span > 0.0, "--runs and --span must be above 0");
    ensure!(args.end_to_end_runs > 0 && args.clients > 0, "--end-to-end-runs and --clients must be above 0");
    let known = |name: &str| {
        name == end_to_end::NAME
            || receive::NAMES.contains(&name)
            || CASES.iter().any(|case| case.name == name)
    };
    let unknown = args.cases.iter().find(|name| !known(name));
    ensure!(unknown.is_none(), "there is no case {}", unknown.map_or("", String::as_str));
    ensure!(
        args.peers.is_file(),
        "{} is not there; run this from the repository's root",
        args.peers.display()
    );
    let wanted = |name: &str| args.cases.is_empty() || args.cases.iter().any(|wanted| wanted == name);
    let mut rows = Vec::new();
    // Who sends needs a core of its own, and nobody else's images or peers.
    for case in receive::NAMES.into_iter().filter(|case| wanted(case)) {
        let told = receive::rows(case, args.runs);
        println!("{}", report::table(case, &told));
        rows.extend(told);
        report::write(&args.out, &rows)?;
    }
    if !args.cases.is_empty() && args.cases.iter().all(|case| receive::NAMES.contains(&case.as_str())) {
        eprintln!("{} rows in {}", rows.len(), args.out.display());
        return Ok(());
    }
    let all = rustix::thread::sched_getaffinity(None)?;
    let mut core = rustix::thread::CpuSet::new();
    core.set(args.core);
    rustix::thread::sched_setaffinity(None, &core)
        .with_context(|| format!("core {} cannot be had", args.core))?;
    let dir = tempfile::tempdir()?;
    let mut peers = Peers::start(&args.install, &args.peers, dir.path());
    let mut ours = Ours::new(dir.path())?;
    eprintln!("JPEG by {}; normalising by {:?}", penstock_prepare::JPEG_DECODER, ours.way());
    for case in CASES.iter().filter(|case| wanted(case.name)) {
        let (times, notes) = measure(args, case, &mut ours, &mut peers);
        let told = rows_of(case, &times, &notes);
        println!("{}", report::table(case.name, &told));
        rows.extend(told);
        report::write(&args.out, &rows)?;
    }
    if wanted(end_to_end::NAME) {
        // This one is about all cores.
        rustix::thread::sched_setaffinity(None, &all)?;
        let this = std::env::current_exe().context("where this program is")?;
        let beside = || this.parent().map(PathBuf::from).unwrap_or_default();
        let told = end_to_end::rows(&end_to_end::Setting {
            install: &args.install,
            launch: &args.launch,
            clients: &args.client_script,
            programs: args.programs.clone().unwrap_or_else(beside),
            dir: dir.path(),
            runs: args.end_to_end_runs,
            seconds: args.end_to_end_seconds,
            processes: args.clients,
        });
        println!("{}", report::table(end_to_end::NAME, &told));
        rows.extend(told);
        report::write(&args.out, &rows)?;
    }
    eprintln!("{} rows in {}", rows.len(), args.out.display());
    Ok(())
}

/// All rounds of a case, and what is to be said of a subject.
fn measure(
    args: &Args,
    case: &Case,
    ours: &mut Ours,
    peers: &mut Peers,
) -> (Times, BTreeMap<&'static str, String>) {
    let subjects: Vec<&'static str> = case.ours.iter().chain(case.peers).copied().collect();
    let mut times: Times = subjects.iter().map(|subject| (*subject, Ok(Vec::new()))).collect();
    let mut counts = BTreeMap::new();
    let mut notes = BTreeMap::new();
    let once = |ours: &mut Ours, peers: &mut Peers, subject: &'static str, count: usize| -> Result<f64> {
        if case.ours.contains(&subject) {
            ours.run(case.name, subject, count)
        } else {
            peers.run(case.name, subject, count)
        }
    };
    for subject in &subjects {
        // The first call warms caches and buffers up, the next tells how many fill the span.
        let found = once(ours, peers, subject, 2).and_then(|_| once(ours, peers, subject, 3));
        match found {
            Ok(ms) => {
                counts.insert(*subject, ((args.span / ms.max(1e-6)) as usize).clamp(1, 100_000));
            }
            Err(error) => {
                eprintln!("{} {subject}: {error:#}", case.name);
                times.insert(subject, Err(format!("{error:#}")));
            }
        }
    }
    for subject in case.ours.iter().filter(|_| case.name != "normalise") {
        let pillow = peers.tensor(case.name, "pillow");
        match pillow.and_then(|pillow| ours.difference(case.name, subject, &pillow)) {
            Ok(mean) => notes.insert(*subject, format!("{mean:.2} of 255 from Pillow's pixels on average")),
            Err(error) => notes.insert(*subject, format!("not compared with Pillow's: {error:#}")),
        };
    }
    for turn in 0..args.runs {
        for at in 0..subjects.len() {
            let subject = subjects[(at + turn) % subjects.len()];
            let Some(Ok(found)) = times.get_mut(subject) else { continue };
            let Some(count) = counts.get(subject) else { continue };
            match once(ours, peers, subject, *count) {
                Ok(ms) => found.push(ms),
                Err(error) => {
                    times.insert(subject, Err(format!("{error:#}")));
                }
            }
        }
        eprintln!("{} round {}/{}, {:.0} ms of CPU so far", case.name, turn + 1, args.runs, cpu_ms());
    }
    (times, notes)
}

fn rows_of(case: &Case, times: &Times, notes: &BTreeMap<&'static str, String>) -> Vec<Row> {
    let mut rows = Vec::new();
    let baseline = *case.peers.first().unwrap_or(&"pillow");
    let of = |subject: &str| times.get(subject).and_then(|times| times.as_ref().ok());
    let median =
        |subject: &str| of(subject).and_then(|times| Summary::of(times.clone())).map(|times| times.median);
    for subject in case.ours.iter().chain(case.peers) {
        let base = match case.name {
            // Each size has its own.
            "normalise" => match subject.split_once('-') {
                Some((_, "224")) => "write-once-224",
                Some((_, "224-cold")) => "write-once-224-cold",
                Some((_, "1080p-cold")) => "write-once-1080p-cold",
                _ if subject.starts_with("write-once") => subject,
                _ => "write-once-1080p",
            },
            _ => baseline,
        };
        let metric = ("cpu_ms", "ms/image");
        match times.get(subject) {
            Some(Ok(times)) => {
                let Some(figures) = Summary::of(times.clone()) else { continue };
                let mut row = Row::measured(case.name, subject, metric, &figures).against(base, median(base));
                row.note = notes.get(subject).cloned();
                rows.push(row);
            }
            Some(Err(error)) => rows.push(Row::failed(case.name, subject, metric, error)),
            None => {}
        }
    }
    for subject in case.ours {
        for (metric, peer) in case.speeds {
            let metric = (*metric, "x");
            let row = match (of(subject), times.get(peer)) {
                (Some(ours), Some(Ok(peer_times))) => {
                    // Of one round each, so that what slowed a round down slowed both.
                    let ratios = peer_times.iter().zip(ours).map(|(peer, ours)| peer / ours).collect();
                    Summary::of(ratios)
                        .map(|ratios| Row::measured(case.name, subject, metric, &ratios).named(peer))
                }
                (_, Some(Err(error))) => {
                    Some(Row::failed(case.name, subject, metric, &format!("{peer}: {error}")))
                }
                _ => None,
            };
            rows.extend(row);
        }
    }
    if case.name == "normalise" {
        for size in ["224", "1080p", "224-cold", "1080p-cold"] {
            let (ours, once) = (format!("penstock-{size}"), format!("write-once-{size}"));
            if let (Some(ours_times), Some(once_times)) = (of(&ours), of(&once)) {
                let ratios = ours_times.iter().zip(once_times).map(|(ours, once)| ours / once).collect();
                let row = Summary::of(ratios).map(|ratios| {
                    Row::measured(case.name, &ours, ("times_of_writing_once", "x"), &ratios).named(&once)
                });
                rows.extend(row);
            }
        }
    }
    rows
}
