//! Log lines whose rate somebody else decides.
//!
//! A stranger who makes connections must not fill the log, and an operator must not miss what they do: such a line is written once in a while,
//! with how often it would have been.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// Something that is told once in so many seconds. Workers share it.
#[derive(Debug)]
pub struct Seldom<const SECONDS: u64> {
    began: Instant,
    /// Microseconds since the beginning until which nothing is told.
    quiet_until: AtomicU64,
    untold: AtomicU64,
}

impl<const SECONDS: u64> Default for Seldom<SECONDS> {
    fn default() -> Self {
        Self { began: Instant::now(), quiet_until: AtomicU64::new(0), untold: AtomicU64::new(0) }
    }
}

impl<const SECONDS: u64> Seldom<SECONDS> {
    /// It happened. If that is to be told now: how often it has, since it was told last.
    pub fn happened(&self, now: Instant) -> Option<u64> {
        self.untold.fetch_add(1, Relaxed);
        let since = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let now = since(now.saturating_duration_since(self.began));
        let quiet_until = self.quiet_until.load(Relaxed);
        let quiet = now.saturating_add(since(Duration::from_secs(SECONDS)));
        let told = now >= quiet_until
            && self.quiet_until.compare_exchange(quiet_until, quiet, Relaxed, Relaxed).is_ok();
        told.then(|| self.untold.swap(0, Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_happens_without_end_is_told_once_in_a_while_with_its_count() {
        let seldom = Seldom::<1>::default();
        let mut told = Vec::new();
        for _ in 0..60 {
            told.extend(seldom.happened(Instant::now()));
            tokio::time::advance(Duration::from_millis(50)).await;
        }
        assert_eq!(told, [1, 20, 20]);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(seldom.happened(Instant::now()), Some(20), "the 19 before it among them");
        assert_eq!(seldom.happened(Instant::now()), None);
    }
}
