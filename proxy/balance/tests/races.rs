//! The orderings, in every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p penstock-balance --test races --release`.
#![cfg(loom)]

use std::time::Duration;

use loom::sync::Arc;
use penstock_balance::Estimator;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Work that two workers add and take is gone in the end, whoever loses the race for the sample.
#[test]
fn what_goes_in_comes_out() {
    loom::model(|| {
        let estimator = Arc::new(Estimator::default());
        let other = {
            let estimator = Arc::clone(&estimator);
            loom::thread::spawn(move || {
                let watched = estimator.arrived(3.0, ms(1));
                estimator.finished(watched, false, ms(11));
            })
        };
        let watched = estimator.arrived(2.0, ms(2));
        estimator.finished(watched, false, ms(12));
        other.join().unwrap();
        assert_eq!((estimator.in_flight(), estimator.units()), (0, 0.0));
        assert!(estimator.samples() >= 1, "one of two who try at once gets through");
        let cost = estimator.cost();
        assert!(cost.is_none_or(|cost| cost.fixed_ms.is_finite() && cost.unit_ms.is_finite()));
    });
}
