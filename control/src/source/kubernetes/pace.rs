//! How soon a watch is opened again.
//!
//! In: how often it failed. Out: a pause. kube's own goes up to half a minute, which after an outage of the API server is how long what
//! somebody changes would wait for its turn, twice, as the first answer then is that the place in the log has expired. A replica has some ten
//! watches, so an API server that struggles gets some questions a second of it at most.

use std::time::Duration;

use kube::runtime::utils::{Backoff, ResetTimerBackoff};

/// The first pause.
const FIRST: Duration = Duration::from_millis(500);
/// The longest.
const LONGEST: Duration = Duration::from_secs(5);
/// What has worked for so long begins anew. A list that is asked for is no success yet, so success alone must not.
const CALM: Duration = Duration::from_secs(60);

/// The pauses of one watch.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    failures: u32,
}

/// For a watch that has just begun.
pub(crate) fn pace() -> ResetTimerBackoff<Pace> {
    ResetTimerBackoff::new(Pace::default(), CALM)
}

/// After so many failures before this one; `random` is between 0 and 1, and spreads watches that failed together.
fn pause(failures: u32, random: f64) -> Duration {
    let whole = FIRST.saturating_mul(1 << failures.min(8)).min(LONGEST);
    whole.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

impl Iterator for Pace {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = pause(self.failures, rand::random());
        self.failures = self.failures.saturating_add(1);
        Some(pause)
    }
}

impl Backoff for Pace {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_five_seconds_and_are_spread() {
        let whole = |failures| pause(failures, 1.0).as_millis();
        assert_eq!([0, 1, 2, 3, 4, 99].map(whole), [500, 1000, 2000, 4000, 5000, 5000]);
        assert_eq!(pause(0, 0.0), Duration::from_millis(250));
        let mut pace = Pace { failures: 7 };
        assert!(pace.next() > Some(Duration::from_secs(2)));
        pace.reset();
        assert!(pace.next() <= Some(FIRST));
    }
}
