//! What a decision costs: `cargo bench -p penstock-balance`.
//!
//! Every endpoint has a report and requests of ours; the pick, the first byte and the end are measured apart.

use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
use penstock_balance::pick::Candidate;
use penstock_balance::{Ask, EndpointState, LoadReport, Members, Outcome, Policy, Pool, Settings};
use rand::SeedableRng;
use rand::rngs::SmallRng;

struct Replica(u64, EndpointState);

impl Candidate for Replica {
    fn state(&self) -> &EndpointState {
        &self.1
    }

    fn name(&self) -> u64 {
        self.0
    }
}

fn decisions(criterion: &mut Criterion) {
    let blocks: Vec<u64> = (0..64).collect();
    for (name, policy) in [
        ("gpu", Policy::Gpu),
        ("prefix", Policy::Prefix),
        ("least-request", Policy::LeastRequest),
        ("ring-hash", Policy::RingHash),
        ("orca-wrr", Policy::OrcaWrr),
    ] {
        for n in [2u64, 100, 10_000] {
            let members = Members::new((0..n).map(|name| Replica(name, EndpointState::default())).collect());
            let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(1));
            let settings = Settings { policy, ..Settings::default() };
            let now = Duration::from_secs(100);
            for replica in members.iter() {
                let report = LoadReport {
                    in_flight: Some(8.0),
                    units: Some(8.0),
                    backlog_ms: Some(40.0),
                    closes_ms: Some(20.0),
                    fixed_ms: Some(9.0),
                    unit_ms: Some(3.0),
                    room: Some(8.0),
                    rps: Some(100.0),
                    utilization: Some(0.5),
                    ..LoadReport::default()
                };
                pool.told(replica.state(), report, now);
            }
            members.tend(now);
            let ask = Ask { key: 5, units: 4096.0, blocks: &blocks, block_units: 64.0, ..Ask::one(now) };
            let ask = if policy == Policy::Prefix { ask } else { Ask { key: 5, ..Ask::one(now) } };
            criterion.bench_function(&format!("{name}/{n}"), |bencher| {
                bencher.iter(|| {
                    if let Ok(picked) = pool.pick(&members, &settings, black_box(&ask), &mut random) {
                        pool.over(members[picked.index].state(), picked.sent, Outcome::Served, now);
                    }
                });
            });
        }
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    decisions(&mut criterion);
    criterion.final_summary();
}
