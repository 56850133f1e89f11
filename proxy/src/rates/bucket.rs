//! One bucket of a rate, as the generic cell rate algorithm keeps it: one number, the time at which it will be full again. Pure.
//!
//! In: what is taken out, and the time. Out: that it was there, or how long until it will be. A bucket may be overdrawn by what is
//! known only afterwards ([`Bucket::debit`]): then there is nothing to take until that has been made good.
//!
//! `governor` has the same algorithm, but takes only what is there, and keeps the buckets of clients in a map with locks that
//! grows with them.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use penstock_api::access::Rate;

/// The longest that a bucket can be overdrawn for. A server that says nonsense of what it used shuts nobody out for longer.
const MOST: Duration = Duration::from_secs(24 * 3600);

/// How fast a bucket fills, and how much it holds, in nanoseconds: what one and what all of it take to come in.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    rate: Rate,
    one: u64,
    all: u64,
}

impl Pace {
    /// Of a rate.
    pub fn new(rate: Rate) -> Self {
        let mut pace = Self { rate, one: 0, all: 0 };
        pace.one = pace.cost(1);
        pace.all = pace.cost(rate.burst).max(pace.one);
        pace
    }

    /// How long so many take to come in; rather too long than too short.
    fn cost(&self, amount: u64) -> u64 {
        let whole = self.rate.period.as_nanos().saturating_mul(amount.into());
        u64::try_from(whole.div_ceil(self.rate.count.max(1).into())).unwrap_or(u64::MAX)
    }
}

/// What is left of a rate, for all workers. A new one is full.
#[derive(Debug, Default)]
pub struct Bucket(AtomicU64);

impl Bucket {
    /// Takes one out, if it is there; otherwise says how long until it is.
    pub fn take(&self, pace: &Pace, now: Duration) -> Result<(), Duration> {
        let now = nanos(now);
        let take =
            |full: u64| enough(pace, full, now).is_ok().then(|| full.max(now).saturating_add(pace.one));
        match self.0.fetch_update(Relaxed, Relaxed, take) {
            Ok(_) => Ok(()),
            Err(full) => enough(pace, full, now),
        }
    }

    /// Whether one is there; otherwise how long until it is.
    pub fn check(&self, pace: &Pace, now: Duration) -> Result<(), Duration> {
        enough(pace, self.0.load(Relaxed), nanos(now))
    }

    /// Puts back what was taken.
    pub fn give_back(&self, pace: &Pace) {
        let back = |full: u64| Some(full.saturating_sub(pace.one));
        // It always changes.
        let _ = self.0.fetch_update(Relaxed, Relaxed, back);
    }

    /// Takes so many out, whether they are there or not.
    pub fn debit(&self, pace: &Pace, amount: u64, now: Duration) {
        let now = nanos(now);
        let most = now.saturating_add(pace.all).saturating_add(nanos(MOST));
        let debit = |full: u64| Some(full.max(now).saturating_add(pace.cost(amount)).min(most));
        let _ = self.0.fetch_update(Relaxed, Relaxed, debit);
    }

    /// Whether it is full, and so no other than a new one.
    pub fn is_full(&self, now: Duration) -> bool {
        self.0.load(Relaxed) <= nanos(now)
    }
}

/// Whether one is in a bucket that is full again at that time; otherwise how long until it is.
fn enough(pace: &Pace, full: u64, now: u64) -> Result<(), Duration> {
    let used = full.saturating_sub(now).saturating_add(pace.one);
    match used.checked_sub(pace.all) {
        None | Some(0) => Ok(()),
        Some(wait) => Err(Duration::from_nanos(wait)),
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn pace(count: u64, period: Duration, burst: u64) -> Pace {
        Pace::new(Rate { count, period, burst })
    }

    #[test]
    fn a_burst_is_there_at_once_and_then_the_rate() {
        let (pace, bucket) = (pace(10, ms(1_000), 3), Bucket::default());
        let start = ms(5_000);
        for _ in 0..3 {
            assert_eq!(bucket.take(&pace, start), Ok(()));
        }
        assert_eq!(bucket.take(&pace, start), Err(ms(100)));
        assert_eq!(bucket.take(&pace, start + ms(60)), Err(ms(40)), "who was refused has used nothing");
        assert_eq!(bucket.take(&pace, start + ms(100)), Ok(()));
        assert_eq!(bucket.take(&pace, start + ms(100)), Err(ms(100)));
        assert!(!bucket.is_full(start + ms(399)) && bucket.is_full(start + ms(400)));
        // Of a long time without requests no more is kept than the burst.
        let later = start + ms(1_000_000);
        assert_eq!((0..9).filter(|_| bucket.take(&pace, later).is_ok()).count(), 3);
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let (pace, bucket) = (pace(1, ms(1_000), 1), Bucket::default());
        assert_eq!(bucket.take(&pace, ms(1)), Ok(()));
        bucket.give_back(&pace);
        assert_eq!(bucket.take(&pace, ms(1)), Ok(()));
        assert_eq!(bucket.take(&pace, ms(1)), Err(ms(1_000)));
    }

    #[test]
    fn a_bucket_that_is_overdrawn_is_waited_for() {
        // A thousand a minute: one in 60 ms.
        let (pace, bucket) = (pace(1_000, ms(60_000), 500), Bucket::default());
        let now = ms(7_000);
        assert_eq!(bucket.check(&pace, now), Ok(()));
        bucket.debit(&pace, 499, now);
        assert_eq!(bucket.check(&pace, now), Ok(()), "one is left");
        bucket.debit(&pace, 2_001, now);
        // 2,000 below nothing, and one more has to be there.
        assert_eq!(bucket.check(&pace, now), Err(ms(2_001 * 60)));
        assert_eq!(bucket.check(&pace, now + ms(2_000 * 60)), Err(ms(60)));
        assert_eq!(bucket.check(&pace, now + ms(2_001 * 60)), Ok(()));
    }

    #[test]
    fn nonsense_shuts_nobody_out_for_longer_than_a_day() {
        let (pace, bucket) = (pace(1, ms(60_000), 1), Bucket::default());
        bucket.debit(&pace, u64::MAX, ms(1));
        bucket.debit(&pace, u64::MAX, ms(1));
        let wait = bucket.check(&pace, ms(1)).unwrap_err();
        assert!(wait <= MOST + ms(60_000), "{wait:?}");
        assert_eq!(bucket.check(&pace, ms(1) + wait), Ok(()));
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_the_rate(
            count in 1_u64..50,
            burst in 1_u64..20,
            steps in prop::collection::vec(0_u64..400, 1..200),
        ) {
            let (pace, bucket) = (pace(count, ms(1_000), burst), Bucket::default());
            let (mut now, mut taken) = (Duration::ZERO, 0);
            for step in steps {
                now += ms(step);
                taken += u64::from(bucket.take(&pace, now).is_ok());
                let most = burst + now.as_millis() as u64 * count / 1_000;
                prop_assert!(taken <= most, "{taken} of {most} after {now:?}");
                if let Err(wait) = bucket.check(&pace, now) {
                    prop_assert_eq!(bucket.check(&pace, now + wait), Ok(()));
                    prop_assert!(bucket.check(&pace, now + wait - Duration::from_nanos(1)).is_err());
                }
            }
        }
    }
}
