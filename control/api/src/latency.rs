//! The latency buckets that proxies record into and everyone else reads.
//!
//! Log-linear: eight buckets to each power of two of microseconds, so that a percentile read from them is at
//! most 12.5 % above the truth, from 1 µs to over an hour, in [`BUCKETS`] counters. Sums of histograms are
//! exact, which averages of percentiles are not.

use std::time::Duration;

/// Buckets to a power of two, as a power of two.
const SUB_BITS: u32 = 3;
const SUB: u64 = 1 << SUB_BITS;
/// The highest power of two that has buckets of its own: 2^32 µs is 71 minutes.
const MAX_BITS: u32 = 32;

/// How many buckets there are.
pub const BUCKETS: usize = ((MAX_BITS - SUB_BITS + 1) as usize) << SUB_BITS;

/// The bucket that a duration falls into.
pub fn bucket_of(latency: Duration) -> usize {
    let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    if us < SUB {
        return us as usize;
    }
    let bits = 63 - us.leading_zeros();
    if bits >= MAX_BITS {
        return BUCKETS - 1;
    }
    let within = (us >> (bits - SUB_BITS)) & (SUB - 1);
    ((u64::from(bits - SUB_BITS + 1) << SUB_BITS) + within) as usize
}

/// The first duration above the bucket.
pub fn upper_bound(bucket: usize) -> Duration {
    let bucket = bucket.min(BUCKETS - 1) as u64 + 1;
    if bucket <= SUB {
        return Duration::from_micros(bucket);
    }
    let bits = (bucket >> SUB_BITS) as u32 + SUB_BITS - 1;
    let within = bucket & (SUB - 1);
    Duration::from_micros((SUB + within) << (bits - SUB_BITS))
}

/// Counts per bucket, for readers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0 }
    }
}

impl Histogram {
    /// Adds `count` observations to a bucket; a bucket out of range counts as the last.
    pub fn add(&mut self, bucket: usize, count: u64) {
        self.counts[bucket.min(BUCKETS - 1)] += count;
        self.total += count;
    }

    /// Adds one observation.
    pub fn record(&mut self, latency: Duration) {
        self.add(bucket_of(latency), 1);
    }

    /// Adds another histogram's counts.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
    }

    /// How many observations there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The buckets that are not empty, in order.
    pub fn nonzero(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.counts.iter().copied().enumerate().filter(|(_, count)| *count > 0)
    }

    /// The upper bound of the bucket that holds the quantile `q` in 0..=1; `None` without observations.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        if self.total == 0 {
            return None;
        }
        let rank = ((self.total as f64 * q).ceil() as u64).clamp(1, self.total);
        let mut seen = 0;
        for (bucket, count) in self.nonzero() {
            seen += count;
            if seen >= rank {
                return Some(upper_bound(bucket));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_ends_where_the_next_begins() {
        for bucket in 0..BUCKETS - 1 {
            let end = upper_bound(bucket);
            assert_eq!(bucket_of(end), bucket + 1, "bucket {bucket} ends at {end:?}");
            assert_eq!(bucket_of(end - Duration::from_micros(1)), bucket, "bucket {bucket}");
        }
        assert_eq!(bucket_of(Duration::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_quantile_is_at_most_an_eighth_too_high() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        for us in 1..=10_000 {
            histogram.record(Duration::from_micros(us));
        }
        for (q, truth) in [(0.5, 5_000.0), (0.99, 9_900.0), (1.0, 10_000.0)] {
            let got = histogram.quantile(q).unwrap().as_micros() as f64;
            assert!(got >= truth && got <= truth * 1.125 + 1.0, "q{q}: {got} for {truth}");
        }
    }
}
