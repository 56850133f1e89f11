//! The simulator itself: runs repeat, nothing is lost, and simple systems come out as theory says.

use penstock_simulator::cases::{self, Case, Kind, Replica, Work};
use penstock_simulator::measure::Figures;
use penstock_simulator::server::batch::BatchCost;
use penstock_simulator::workload::{Arrivals, Rows};
use penstock_simulator::{policies, world};

fn case(name: &str) -> Case {
    cases::all().into_iter().find(|case| case.name == name).unwrap_or_else(|| panic!("no case {name}"))
}

fn run(case: &Case, subject: &str, seed: u64) -> Figures {
    let policy = policies::of(subject, case.clients, case.replicas.len(), case.is_chat());
    world::run(case, policy.unwrap_or_else(|| panic!("no policy {subject}")).as_mut(), seed)
}

#[test]
fn a_seed_gives_the_same_run_again() {
    let short = Case { seconds: 18.0, ..case("hetero-80") };
    for subject in ["penstock", "prequal", "epp", "least-request"] {
        let (one, two) = (run(&short, subject, 7), run(&short, subject, 7));
        assert_eq!((one.p50, one.p99, one.mean), (two.p50, two.p99, two.mean), "{subject}");
        assert_ne!(one.mean, run(&short, subject, 8).mean, "{subject}");
    }
}

#[test]
fn every_request_is_answered() {
    for name in ["stalled", "cold-start", "shared-gpu"] {
        let figures = run(&Case { seconds: 30.0, ..case(name) }, "penstock", 1);
        assert_eq!(figures.unanswered, 0.0, "{name}");
    }
    let figures = run(&Case { seconds: 60.0, ..case("chat") }, "penstock", 1);
    assert_eq!(figures.unanswered, 0.0);
    assert!(figures.hit_rate > 0.5 && figures.hit_rate < 1.0, "{}", figures.hit_rate);
}

/// One server, one by one, constant service time s at load ρ: the mean wait is ρs / 2(1 - ρ) (Pollaczek and Khinchine).
#[test]
fn a_queue_is_as_long_as_theory_says() {
    let cost = BatchCost { fixed: 0.0, per_row: 10e6, max_rows: 1.0, sigma: 0.0, cold: 1.0 };
    let mut one = case("homo-80");
    one.replicas = vec![Replica { speed: 1.0, gpu: 0, kind: Kind::Tensor(cost) }];
    one.work = Work::Tensors(Arrivals::Poisson, Rows::One, 60.0);
    one.seconds = 2000.0;
    one.network = 0;
    let figures = run(&one, "random", 1);
    let theory = 10.0 + 0.6 * 10.0 / (2.0 * 0.4);
    assert!((figures.mean - theory).abs() < 0.03 * theory, "{} and not {theory}", figures.mean);
}

/// The promise of the whole: with replicas that differ, half of least-request's tail and near the oracle's.
#[test]
fn ours_is_near_the_oracle() {
    let short = Case { seconds: 25.0, ..case("hetero-80") };
    let [ours, oracle, theirs] =
        ["penstock", "oracle", "least-request"].map(|subject| run(&short, subject, 1).p99);
    assert!(ours < 0.5 * theirs, "{ours} against {theirs}");
    assert!(ours < 1.3 * oracle, "{ours} against the oracle's {oracle}");
}
