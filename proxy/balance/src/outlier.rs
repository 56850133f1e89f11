//! Outlier ejection: an endpoint that fails several times in a row is left out for a while, longer each time.
//!
//! After the time is over the endpoint is on probation: it gets requests again, and one more failure ejects it at
//! once, for twice as long; a success ends the probation and, kept up, forgives the past.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::millis;

/// When and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutlierPolicy {
    /// Failures in a row that eject; 0 = never.
    pub consecutive_failures: u32,
    /// The first ejection; each further one is twice as long.
    pub base: Duration,
    /// The longest ejection.
    pub max: Duration,
    /// The most of the endpoints that may be out at once, percent.
    pub max_ejected_percent: u32,
}

impl Default for OutlierPolicy {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            base: Duration::from_secs(1),
            max: Duration::from_secs(60),
            max_ejected_percent: 50,
        }
    }
}

/// The ejection state of one endpoint.
#[derive(Debug, Default)]
pub struct Ejection {
    failures: AtomicU32,
    /// Ejections so far, forgiven one at a time.
    ejections: AtomicU32,
    /// Milliseconds since the epoch; 0 = never ejected.
    until: AtomicU64,
}

impl Ejection {
    /// A request succeeded.
    pub fn success(&self) {
        // The common case writes nothing.
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
            let ejections = self.ejections.load(Relaxed);
            self.ejections.store(ejections.saturating_sub(1), Relaxed);
        }
    }

    /// A request failed by the endpoint's fault. Returns for how long the endpoint is out, if this ejects it.
    pub fn failure(&self, policy: &OutlierPolicy, now: Duration) -> Option<Duration> {
        if policy.consecutive_failures == 0 || self.is_out(now) {
            return None;
        }
        let ejections = self.ejections.load(Relaxed);
        let allowed = if ejections > 0 { 1 } else { policy.consecutive_failures };
        if self.failures.fetch_add(1, Relaxed) + 1 < allowed {
            return None;
        }
        let time = policy.base.saturating_mul(1 << ejections.min(16)).min(policy.max);
        self.ejections.store(ejections.saturating_add(1), Relaxed);
        // One failure is left standing: the next success forgives it, and one ejection with it.
        self.failures.store(1, Relaxed);
        self.until.store(millis(now + time), Relaxed);
        Some(time)
    }

    /// Whether the endpoint is out.
    pub fn is_out(&self, now: Duration) -> bool {
        let until = self.until.load(Relaxed);
        until != 0 && millis(now) < until
    }

    /// Until when it is or was out.
    pub fn until(&self) -> Option<Duration> {
        match self.until.load(Relaxed) {
            0 => None,
            ms => Some(Duration::from_millis(ms)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn only_failures_in_a_row_eject() {
        let (ejection, policy) = (Ejection::default(), OutlierPolicy::default());
        for _ in 0..4 {
            assert_eq!(ejection.failure(&policy, s(1)), None);
        }
        ejection.success();
        for _ in 0..4 {
            assert_eq!(ejection.failure(&policy, s(1)), None);
        }
        assert_eq!(ejection.failure(&policy, s(1)), Some(s(1)));
        assert!(ejection.is_out(s(1)));
        assert!(!ejection.is_out(s(2)));
    }

    #[test]
    fn probation_doubles_and_success_forgives() {
        let (ejection, policy) = (Ejection::default(), OutlierPolicy::default());
        let mut now = s(0);
        for _ in 0..4 {
            ejection.failure(&policy, now);
        }
        for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(ejection.failure(&policy, now), Some(s(expected)));
            now = ejection.until().unwrap();
        }
        for _ in 0..20 {
            ejection.success();
            ejection.failures.store(1, Relaxed);
        }
        ejection.success();
        assert_eq!(ejection.failure(&policy, now), None, "the past is forgiven");
    }

    #[test]
    fn zero_means_never() {
        let policy = OutlierPolicy { consecutive_failures: 0, ..OutlierPolicy::default() };
        let ejection = Ejection::default();
        assert!((0..1000).all(|_| ejection.failure(&policy, s(1)).is_none()));
    }
}
