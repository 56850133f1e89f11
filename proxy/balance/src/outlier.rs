//! Outlier ejection: an endpoint that fails several times in a row is left out for a while, longer each time.
//!
//! After the time is over the endpoint is on probation: the next pick that meets it is its probe, and as long as that has no answer it gets
//! nothing else. One that hangs so costs one request rather than all that come until the first times out, and one that is well again is
//! found out at once rather than when its turn comes. If the probe fails, the endpoint is out for twice as long; if it
//! succeeds, the endpoint is in, and what it was is forgiven as time goes on.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::millis;

/// Of an endpoint that is in, one ejection is forgiven each time that so much has passed.
const FORGIVES: Duration = Duration::from_secs(10);

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

/// How an endpoint stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is in, like any other.
    In,
    /// Its time is over: the next request finds out whether it is well.
    Due,
    /// It is out, or what finds that out has no answer yet.
    Out,
}

/// The ejection state of one endpoint.
#[derive(Debug, Default)]
pub struct Ejection {
    failures: AtomicU32,
    /// Ejections so far that are not forgiven.
    ejections: AtomicU32,
    /// Milliseconds since the epoch; 0 = never ejected.
    until: AtomicU64,
    /// How long it was out, in milliseconds; 0 = it is on no probation.
    probation: AtomicU64,
    /// Milliseconds since the epoch from which on a request may be a probe.
    probe_from: AtomicU64,
}

impl Ejection {
    /// A request succeeded.
    pub fn success(&self) {
        // The common case writes nothing.
        if self.failures.load(Relaxed) != 0 || self.probation.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
            self.probation.store(0, Relaxed);
        }
    }

    /// A request that was sent at `sent` failed by the endpoint's fault. Returns for how long the endpoint is out, if this ejects it. What was
    /// sent before a probation began says nothing of how the endpoint is now.
    pub fn failure(&self, policy: &OutlierPolicy, sent: Duration, now: Duration) -> Option<Duration> {
        if policy.consecutive_failures == 0 || self.is_out(now) {
            return None;
        }
        let (on_probation, mut ejections) = (self.probation.load(Relaxed) != 0, self.ejections.load(Relaxed));
        if on_probation && millis(sent) < self.until.load(Relaxed) {
            return None;
        }
        if !on_probation {
            let well = millis(now).saturating_sub(self.until.load(Relaxed));
            let forgiven = u32::try_from(well / millis(FORGIVES)).unwrap_or(u32::MAX);
            ejections = ejections.saturating_sub(forgiven);
        }
        let allowed = if on_probation { 1 } else { policy.consecutive_failures };
        if self.failures.fetch_add(1, Relaxed) + 1 < allowed {
            return None;
        }
        let time = policy.base.saturating_mul(1 << ejections.min(16)).min(policy.max);
        // What would not make it longer need not be forgiven either.
        self.ejections.store(if time < policy.max { ejections + 1 } else { ejections }, Relaxed);
        let until = millis(now + time);
        self.probe_from.store(until, Relaxed);
        self.probation.store(millis(time).max(1), Relaxed);
        self.until.store(until, Relaxed);
        Some(time)
    }

    /// How the endpoint stands.
    pub fn standing(&self, now: Duration) -> Standing {
        match self.until.load(Relaxed) {
            0 => Standing::In,
            until if millis(now) < until => Standing::Out,
            _ if self.probation.load(Relaxed) == 0 => Standing::In,
            _ if millis(now) < self.probe_from.load(Relaxed) => Standing::Out,
            _ => Standing::Due,
        }
    }

    /// A request goes there. Whether it is the probe, which keeps others away until [`probed`](Self::probed), but no longer than the
    /// endpoint was out: who waits for an answer for minutes does not keep a server out for minutes.
    pub(crate) fn sent(&self, now: Duration) -> bool {
        let probes = self.standing(now) == Standing::Due;
        if probes {
            self.probe_from.store(millis(now).saturating_add(self.probation.load(Relaxed)), Relaxed);
        }
        probes
    }

    /// The probe is over. Unless it was told to be a success or a failure, it says nothing, and the next may go.
    pub(crate) fn probed(&self, now: Duration) {
        if !self.is_out(now) {
            self.probe_from.store(0, Relaxed);
        }
    }

    /// Whether its time is not over.
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
            assert_eq!(ejection.failure(&policy, s(1), s(1)), None);
        }
        ejection.success();
        for _ in 0..4 {
            assert_eq!(ejection.failure(&policy, s(1), s(1)), None);
        }
        assert_eq!(ejection.failure(&policy, s(1), s(1)), Some(s(1)));
        assert!(ejection.is_out(s(1)));
        assert!(!ejection.is_out(s(2)));
    }

    fn ejected(times: u32) -> (Ejection, Duration) {
        let (ejection, policy) = (Ejection::default(), OutlierPolicy::default());
        let mut now = s(0);
        for _ in 0..4 {
            ejection.failure(&policy, now, now);
        }
        for _ in 0..times {
            ejection.failure(&policy, now, now);
            now = ejection.until().unwrap();
        }
        (ejection, now)
    }

    #[test]
    fn a_failure_on_probation_ejects_for_twice_as_long() {
        let (ejection, policy) = (Ejection::default(), OutlierPolicy::default());
        let mut now = s(0);
        for _ in 0..4 {
            ejection.failure(&policy, now, now);
        }
        for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(ejection.failure(&policy, now, now), Some(s(expected)));
            now = ejection.until().unwrap();
        }
    }

    #[test]
    fn what_was_sent_before_a_probation_says_nothing_of_it() {
        let (ejection, now) = ejected(1);
        let policy = OutlierPolicy::default();
        assert!(ejection.sent(now), "it is the probe");
        assert_eq!(ejection.failure(&policy, s(0), now + s(1)), None);
        assert_eq!(ejection.failure(&policy, now, now + s(1)), Some(s(2)));
    }

    #[test]
    fn success_ends_the_probation_and_time_forgives() {
        // (ejections, seconds that it was well, the next ejection takes)
        for (times, well, expected) in
            [(1, 0, 2), (1, 10, 1), (4, 0, 16), (4, 25, 4), (4, 3600, 1), (50, 30, 8)]
        {
            let (policy, (ejection, now)) = (OutlierPolicy::default(), ejected(times));
            ejection.success();
            assert_eq!(ejection.standing(now), Standing::In);
            for _ in 0..4 {
                assert_eq!(
                    ejection.failure(&policy, now + s(well), now + s(well)),
                    None,
                    "it is on no probation any more"
                );
            }
            assert_eq!(
                ejection.failure(&policy, now + s(well), now + s(well)),
                Some(s(expected)),
                "{times} times, {well} s ago"
            );
        }
    }

    #[test]
    fn on_probation_one_request_at_a_time_goes_there() {
        let (ejection, now) = ejected(2);
        assert_eq!(ejection.standing(now - Duration::from_millis(1)), Standing::Out);
        assert!(!ejection.sent(now - Duration::from_millis(1)), "somebody goes there for want of another");
        assert_eq!(ejection.standing(now), Standing::Due);
        assert!(ejection.sent(now));
        assert_eq!(ejection.standing(now), Standing::Out);
        assert!(!ejection.sent(now));
        // Without a word in as long as it was out, another one may go.
        assert_eq!(ejection.standing(now + Duration::from_millis(1999)), Standing::Out);
        assert_eq!(ejection.standing(now + s(2)), Standing::Due);
        // The client left: that said nothing.
        assert!(ejection.sent(now + s(2)));
        ejection.probed(now + s(2));
        assert_eq!(ejection.standing(now + s(2)), Standing::Due);
        // It failed, or succeeded.
        assert!(ejection.sent(now + s(3)));
        assert_eq!(ejection.failure(&OutlierPolicy::default(), now + s(3), now + s(3)), Some(s(4)));
        ejection.probed(now + s(3));
        assert_eq!(ejection.standing(now + s(6)), Standing::Out);
        assert!(ejection.sent(now + s(7)));
        ejection.success();
        ejection.probed(now + s(7));
        assert_eq!(ejection.standing(now + s(7)), Standing::In);
    }

    #[test]
    fn zero_means_never() {
        let policy = OutlierPolicy { consecutive_failures: 0, ..OutlierPolicy::default() };
        let ejection = Ejection::default();
        assert!((0..1000).all(|_| ejection.failure(&policy, s(1), s(1)).is_none()));
    }
}
