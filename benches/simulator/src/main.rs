//! `make bench-balance`: runs the cases under the policies and writes what came out.

use clap::Parser;
use penstock_simulator::{cases, policies, world};

/// Balancing policies on simulated GPUs.
#[derive(Parser)]
struct Arguments {
    /// Only these cases.
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Only these policies.
    #[arg(long, value_delimiter = ',')]
    subjects: Vec<String>,
    /// Seeds.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
}

fn main() {
    let arguments = Arguments::parse();
    for case in cases::all() {
        if !arguments.cases.is_empty() && !arguments.cases.iter().any(|name| name == case.name) {
            continue;
        }
        println!("{}: {}", case.name, case.about);
        for subject in policies::SUBJECTS {
            if !arguments.subjects.is_empty() && !arguments.subjects.iter().any(|name| name == subject) {
                continue;
            }
            for seed in &arguments.seeds {
                let Some(mut policy) = policies::of(subject, case.clients, case.replicas.len()) else {
                    continue;
                };
                let f = world::run(&case, policy.as_mut(), *seed);
                println!(
                    "  {subject:16} p50 {:8.1} p99 {:8.1} p99.9 {:8.1} mean {:7.1} good {:7.1} tput {:7.1} hit {:.2} unfair {:.2} lost {}",
                    f.p50,
                    f.p99,
                    f.p999,
                    f.mean,
                    f.goodput,
                    f.throughput,
                    f.hit_rate,
                    f.unfairness,
                    f.unanswered
                );
            }
        }
    }
}
