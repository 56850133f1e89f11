//! A budget for retries: a share of the requests, over ten seconds, so that retries never multiply an outage.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Retries that are always allowed in a window, so that a quiet client can retry at all.
const FLOOR: u32 = 10;
/// Windows of five seconds: the current and the one before count.
const WINDOW: Duration = Duration::from_secs(5);

/// Counts requests and retries of one cluster.
#[derive(Debug, Default)]
pub struct RetryBudget {
    window: AtomicU64,
    requests: [AtomicU32; 2],
    retries: [AtomicU32; 2],
}

impl RetryBudget {
    /// A request (not a retry) begins.
    pub fn request(&self, now: Duration) {
        self.requests[self.turn(now)].fetch_add(1, Relaxed);
    }

    /// Takes one retry out of the budget, if `percent` of the requests allows it.
    pub fn take(&self, percent: u32, now: Duration) -> bool {
        let slot = self.turn(now);
        let sum = |counts: &[AtomicU32; 2]| counts.iter().map(|c| u64::from(c.load(Relaxed))).sum::<u64>();
        let allowed = sum(&self.requests) * u64::from(percent) / 100;
        if sum(&self.retries) < allowed.max(u64::from(FLOOR)) {
            self.retries[slot].fetch_add(1, Relaxed);
            return true;
        }
        false
    }

    /// Moves to the window of `now`; a race loses a few counts at the border, which a budget can bear.
    fn turn(&self, now: Duration) -> usize {
        let window = now.as_secs() / WINDOW.as_secs() + 1;
        let slot = (window % 2) as usize;
        let seen = self.window.load(Relaxed);
        if seen != window && self.window.compare_exchange(seen, window, Relaxed, Relaxed).is_ok() {
            self.requests[slot].store(0, Relaxed);
            self.retries[slot].store(0, Relaxed);
            if window > seen + 1 {
                self.requests[1 - slot].store(0, Relaxed);
                self.retries[1 - slot].store(0, Relaxed);
            }
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn retries_are_a_share_of_requests() {
        let budget = RetryBudget::default();
        (0..1000).for_each(|_| budget.request(s(100)));
        let allowed = (0..1000).filter(|_| budget.take(20, s(101))).count();
        assert_eq!(allowed, 200);
    }

    #[test]
    fn a_quiet_client_may_retry_a_little() {
        let budget = RetryBudget::default();
        budget.request(s(0));
        assert_eq!((0..100).filter(|_| budget.take(20, s(0))).count(), FLOOR as usize);
    }

    #[test]
    fn what_is_long_past_does_not_count() {
        let budget = RetryBudget::default();
        assert_eq!((0..100).filter(|_| budget.take(20, s(0))).count(), FLOOR as usize);
        assert!(!budget.take(20, s(9)), "the window before still counts");
        assert!(budget.take(20, s(30)));
    }
}
