//! `make bench-balance`: runs the cases under the policies and writes what came out.
//!
//! Every run is a case, a subject and a seed; runs are independent and share the cores. Rows go to
//! `target/bench/balance.json`, a table of each case to standard output, plots beside the rows.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::Context;
use clap::Parser;
use penstock_simulator::measure::Figures;
use penstock_simulator::report::{Results, rows, table};
use penstock_simulator::{cases, plot, policies, world};

/// Balancing policies on simulated GPUs: the same requests under ours and those of the peers.
///
/// Example: penstock-bench-balance --cases hetero-80,chat --subjects penstock,oracle,least-request --seeds 1
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// Only these cases; `--list` names them.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Only these policies.
    #[arg(long, value_delimiter = ',')]
    subjects: Vec<String>,
    /// Seeds: each is a run of every case under every policy.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4,5")]
    seeds: Vec<u64>,
    /// Where the rows and the plots go.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Name the cases and the policies.
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let asked = |names: &[String], name: &str| names.is_empty() || names.iter().any(|asked| asked == name);
    let all = cases::all();
    if arguments.list {
        all.iter().for_each(|case| println!("{:16} {}", case.name, case.about));
        println!("\n{}", policies::SUBJECTS.join(" "));
        return Ok(());
    }
    let known = |name: &String| all.iter().any(|case| case.name == name);
    anyhow::ensure!(arguments.cases.iter().all(known), "no such case; --list names them");
    let subject = |name: &String| policies::SUBJECTS.contains(&name.as_str());
    anyhow::ensure!(arguments.subjects.iter().all(subject), "no such policy; --list names them");

    let cases: Vec<_> = all.into_iter().filter(|case| asked(&arguments.cases, case.name)).collect();
    let mut runs = Vec::new();
    for (c, _) in cases.iter().enumerate() {
        for subject in policies::SUBJECTS.into_iter().filter(|subject| asked(&arguments.subjects, subject)) {
            runs.extend(arguments.seeds.iter().map(|seed| (c, subject, *seed)));
        }
    }
    let done: Mutex<Vec<(usize, &str, u64, Figures)>> = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((c, subject, seed)) = runs.get(next.fetch_add(1, Relaxed)) {
                    let case = &cases[*c];
                    let policy = policies::of(subject, case.clients, case.replicas.len(), case.is_chat());
                    let Some(mut policy) = policy else { continue };
                    let figures = world::run(case, policy.as_mut(), *seed);
                    if let Ok(mut done) = done.lock() {
                        done.push((*c, subject, *seed, figures));
                    }
                }
            });
        }
    });

    let mut done = done.into_inner().unwrap_or_default();
    done.sort_by_key(|(case, _, seed, _)| (*case, *seed));
    std::fs::create_dir_all(&arguments.out)
        .with_context(|| format!("cannot make the folder {} for the rows", arguments.out.display()))?;
    let mut all_rows = Vec::new();
    for (c, case) in cases.iter().enumerate() {
        let mut results = Results::new();
        for (_, subject, _, figures) in done.iter().filter(|run| run.0 == c) {
            results.entry(subject).or_default().push(figures.clone());
        }
        println!("{}", table(case, &results));
        all_rows.extend(rows(case, &results));
        write(arguments.out.join(format!("balance-{}.svg", case.name)), &plot::curve(case, &results))?;
    }
    let path = arguments.out.join("balance.json");
    write(path.clone(), &serde_json::to_string_pretty(&all_rows)?)?;
    println!(
        "Simulated GPUs, seeds {:?}. {} rows are in {}.",
        arguments.seeds,
        all_rows.len(),
        path.display()
    );
    Ok(())
}

fn write(path: PathBuf, text: &str) -> anyhow::Result<()> {
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}
