//! The estimator against servers whose inside is known here and not to it.

use std::collections::VecDeque;
use std::time::Duration;

use penstock_balance::Estimator;
use penstock_balance::estimate::Watched;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A server that takes up to `most` requests into a batch of `fixed + unit × size` ms.
struct Batches {
    fixed: f64,
    unit: f64,
    most: usize,
}

fn at(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

/// Requests at a rate per ms; returns the mean error of what was foretold on arrival, as a share of the mean time.
fn watch(server: &Batches, rate: f64, count: usize) -> (Estimator, f64, f64) {
    let (estimator, mut random) = (Estimator::default(), SmallRng::seed_from_u64(5));
    let mut queue: VecDeque<(f64, f32, Watched)> = VecDeque::new();
    let mut running: Vec<(f64, f32, Watched)> = Vec::new();
    let (mut next, mut done, mut arrived) = (0.0, f64::INFINITY, 0);
    let (mut error, mut took, mut samples) = (0.0, 0.0, 0.0);
    while arrived < count || done.is_finite() {
        let now = if next < done && arrived < count { next } else { done };
        if now == next && arrived < count {
            arrived += 1;
            next = now - (1.0 - random.random::<f64>()).ln() / rate;
            let foretold = estimator.predict(1.0, at(now)) + estimator.beyond_ms();
            queue.push_back((now, foretold, estimator.arrived(1.0, at(now))));
        } else {
            for (k, (came, foretold, watched)) in running.drain(..).enumerate() {
                // Answers leave one after the other.
                let left = now + 0.01 * k as f64;
                estimator.finished(watched, false, at(left));
                if arrived > count / 2 {
                    error += (f64::from(foretold) - (left - came)).abs();
                    took += left - came;
                    samples += 1.0;
                }
            }
            done = f64::INFINITY;
        }
        if running.is_empty() && !queue.is_empty() {
            running = queue.drain(..queue.len().min(server.most)).collect();
            done = now + server.fixed + server.unit * running.len() as f64;
        }
    }
    (estimator, error / samples, took / samples)
}

#[test]
fn one_by_one() {
    let (estimator, error, took) = watch(&Batches { fixed: 0.0, unit: 10.0, most: 1 }, 0.08, 4000);
    let cost = estimator.cost().unwrap();
    assert!((cost.of(1.0) - 10.0).abs() < 0.2 && estimator.at_once() < 1.05, "{cost:?}");
    assert!(error < 0.02 * took, "off by {error} of {took} ms");
}

#[test]
fn in_batches() {
    let (estimator, error, took) = watch(&Batches { fixed: 9.0, unit: 3.0, most: 16 }, 0.2, 6000);
    let cost = estimator.cost().unwrap();
    assert!((cost.fixed_ms - 9.0).abs() < 1.0 && (cost.unit_ms - 3.0).abs() < 0.2, "{cost:?}");
    // Who comes later and joins the same batch cannot be foretold.
    assert!(error < 0.2 * took, "off by {error} of {took} ms");
}

/// A server that works on all that is there at once, each for `ms`, is asked every 20 ms by so many at nearly the same moment.
fn side_by_side(estimator: &Estimator, ms: f64, many: u8, rounds: std::ops::Range<u16>) {
    for round in rounds {
        let come = |i: u8| 20.0 * f64::from(round) + 0.6 * f64::from(i);
        let watched: Vec<_> = (0..many).map(|i| estimator.arrived(1.0, at(come(i)))).collect();
        for (i, watched) in (0..many).zip(watched) {
            estimator.finished(watched, false, at(come(i) + ms));
        }
    }
}

#[test]
fn side_by_side_nothing_is_foretold_to_take_less_than_it_would_alone() {
    let estimator = Estimator::default();
    for (many, rounds, most) in
        [(1, 0..100, 1.05), (2, 100..300, 2.1), (4, 300..500, 4.1), (1, 500..700, 1.05)]
    {
        side_by_side(&estimator, 7.0, many, rounds.clone());
        let foretold = estimator.predict(1.0, at(20.0 * f64::from(rounds.end)));
        assert!((foretold - 7.0).abs() < 0.7, "{many} at once: {foretold} ms");
        let at_once = estimator.at_once();
        assert!(at_once < most && at_once > most / 1.5, "{many} at once: {at_once}");
    }
}

/// Requests one after the other, one each so many milliseconds, which take so long; what the next is foretold.
fn one_after_the_other(estimator: &Estimator, from: f64, every: f64, took: &[f64]) -> f32 {
    let mut now = from;
    for took in took {
        let watched = estimator.arrived(1.0, at(now));
        estimator.finished(watched, false, at(now + took));
        now += every;
    }
    estimator.predict(1.0, at(now))
}

#[test]
fn a_server_that_stood_still_once_is_not_held_slow_for_long() {
    let estimator = Estimator::default();
    one_after_the_other(&estimator, 0.0, 20.0, &[10.0; 100]);
    one_after_the_other(&estimator, 2_000.0, 20.0, &[5_000.0]);
    let foretold = one_after_the_other(&estimator, 8_000.0, 20.0, &[10.0; 4]);
    assert!(foretold < 13.0, "{foretold}");
    // One that has become slow is known for that.
    let foretold = one_after_the_other(&estimator, 9_000.0, 300.0, &[200.0; 24]);
    assert!(foretold > 100.0, "{foretold}");
}

#[test]
fn what_was_before_a_long_pause_counts_for_little() {
    let estimator = Estimator::default();
    one_after_the_other(&estimator, 0.0, 20.0, &[10.0; 100]);
    one_after_the_other(&estimator, 2_000.0, 20.0, &[5_000.0]);
    let foretold = one_after_the_other(&estimator, 300_000.0, 20.0, &[12.0; 4]);
    assert!((foretold - 12.0).abs() < 0.2, "{foretold}");
}

#[test]
fn who_is_slowed_down_by_those_behind_it_does_not_tell_what_it_would_take_alone() {
    // Three that share a server for 10 ms of work each.
    let estimator = Estimator::default();
    one_after_the_other(&estimator, 0.0, 50.0, &[10.0; 4]);
    for round in 4..200 {
        let come = 50.0 * f64::from(round);
        let watched = [0.0, 1.0, 2.0].map(|behind| estimator.arrived(1.0, at(come + behind)));
        for (watched, over) in watched.into_iter().zip([26.0, 29.0, 30.0]) {
            estimator.finished(watched, false, at(come + over));
        }
    }
    assert!(estimator.at_once() < 1.2, "{}", estimator.at_once());
}

#[test]
fn a_server_that_is_asked_seldom_is_not_held_slow_for_its_start() {
    let estimator = Estimator::default();
    one_after_the_other(&estimator, 0.0, 60.0, &[50.0; 32]);
    let foretold = one_after_the_other(&estimator, 10_000.0, 10_000.0, &[5.0; 20]);
    assert!(foretold < 7.0, "{foretold}");
}

#[test]
fn the_busy_share_is_that_of_full_batches() {
    for (rate, share) in [(0.1, 0.36), (0.2, 0.71)] {
        let (estimator, ..) = watch(&Batches { fixed: 9.0, unit: 3.0, most: 16 }, rate, 6000);
        let mut seen = estimator.rates(at(6000.0 / rate)).utilization;
        seen = seen.min(1.0);
        // What the largest batch of late was is not quite what fits, at little load.
        assert!(f64::from(seen) > share - 0.1 && f64::from(seen) < share + 0.25, "{seen}, not {share}");
    }
}

#[test]
fn a_server_that_stands_still_is_found_out() {
    let estimator = Estimator::default();
    for i in 0..20 {
        let watched = estimator.arrived(1.0, at(20.0 * f64::from(i)));
        estimator.finished(watched, false, at(20.0 * f64::from(i) + 10.0));
    }
    let _stuck = estimator.arrived(1.0, at(1000.0));
    assert!(estimator.predict(1.0, at(1001.0)) < 25.0);
    assert!(estimator.predict(1.0, at(6000.0)) > 4000.0);
}

#[test]
fn failures_are_no_measurement() {
    let estimator = Estimator::default();
    for i in 0..100 {
        let now = 20.0 * f64::from(i);
        let watched = estimator.arrived(1.0, at(now));
        let failed = i % 2 == 0;
        estimator.finished(watched, failed, at(now + if failed { 0.1 } else { 10.0 }));
    }
    let cost = estimator.cost().unwrap();
    assert!((cost.fixed_ms + cost.unit_ms - 10.0).abs() < 0.1, "{cost:?}");
    assert_eq!((estimator.in_flight(), estimator.units()), (0, 0.0));
}
