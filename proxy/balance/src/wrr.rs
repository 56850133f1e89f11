//! Weighted round robin on load reports, as gRFC A58 (`client_side_weighted_round_robin`) describes it.
//!
//! `weight = rps / (utilization + eps / rps × penalty)`. A weight counts only after a blackout of 10 s of continuous
//! reports, expires after 3 minutes of silence, and is refreshed once a second. With fewer than two usable weights it is
//! plain round robin; an endpoint without one gets the mean. The order is earliest deadline first with a random start,
//! by the static stride schedule: in each round an endpoint of weight `w` is skipped unless `w` pushes it over the edge,
//! so a pick costs a few looks, no lock and no heap.

use std::time::Duration;

use crate::cell::{AtomicU32, AtomicU64, Float, Ordering};
use crate::micros;
use crate::pick::Candidate;
use crate::report::LoadReport;
use Ordering::Relaxed;

/// Reports are believed after so long.
pub const BLACKOUT: Duration = Duration::from_secs(10);
/// A weight without news is dropped after so long.
pub const EXPIRY: Duration = Duration::from_secs(180);
/// How much the share of errors adds to the utilisation.
pub const ERROR_PENALTY: f32 = 1.0;

/// The largest stride: the endpoint of the largest weight is picked in every round.
const FULL: u32 = u16::MAX as u32;

/// One endpoint's weight.
#[derive(Debug, Default)]
pub(crate) struct Weight {
    value: Float,
    /// Microseconds since the epoch plus one; 0 = no news.
    since: AtomicU64,
    updated: AtomicU64,
    /// Plus one; 0 = not scheduled yet.
    stride: AtomicU32,
}

impl Weight {
    pub(crate) fn told(&self, report: &LoadReport, now: Duration) {
        let (Some(rps), Some(utilization)) = (report.rps, report.utilization) else { return };
        if rps <= 0.0 || utilization <= 0.0 {
            return;
        }
        let errors = report.eps.unwrap_or(0.0) / rps;
        let value = rps / (utilization + errors * ERROR_PENALTY);
        if !value.is_finite() || value <= 0.0 {
            return;
        }
        let at = micros(now) + 1;
        let last = self.updated.swap(at, Relaxed);
        if last == 0 || at.saturating_sub(last) > EXPIRY.as_micros() as u64 {
            self.since.store(at, Relaxed);
        }
        self.value.set(value);
    }

    fn usable(&self, now: Duration) -> Option<f32> {
        let (at, since, updated) = (micros(now) + 1, self.since.load(Relaxed), self.updated.load(Relaxed));
        let news = updated != 0 && at.saturating_sub(updated) <= EXPIRY.as_micros() as u64;
        (news && at.saturating_sub(since) >= BLACKOUT.as_micros() as u64).then(|| self.value.get())
    }
}

/// Lays out the schedule anew; once a second.
pub(crate) fn schedule<C: Candidate>(candidates: &[C], now: Duration) {
    let weight = |c: &C| c.state().weight.usable(now);
    let (mut sum, mut count, mut max) = (0.0f64, 0u32, 0.0f32);
    for value in candidates.iter().filter_map(weight) {
        sum += f64::from(value);
        count += 1;
        max = max.max(value);
    }
    let mean = if count > 0 { (sum / f64::from(count)) as f32 } else { 0.0 };
    for candidate in candidates {
        let share = if count < 2 { 1.0 } else { weight(candidate).unwrap_or(mean) / max };
        let stride = ((share * FULL as f32) as u32).clamp(1, FULL);
        candidate.state().weight.stride.store(stride + 1, Relaxed);
    }
}

/// The next in the schedule for which `usable` holds, in at most `looks` looks.
pub(crate) fn next<C: Candidate>(
    candidates: &[C],
    turn: &AtomicU32,
    looks: usize,
    usable: impl Fn(usize) -> bool,
) -> Option<usize> {
    let n = candidates.len() as u32;
    for _ in 0..looks {
        let step = turn.fetch_add(1, Relaxed);
        let (round, i) = (u64::from(step / n), step % n);
        let stride =
            candidates[i as usize].state().weight.stride.load(Relaxed).checked_sub(1).unwrap_or(FULL);
        // Each endpoint starts its round elsewhere, so that equal weights are not skipped together.
        let offset = u64::from(i.wrapping_mul(FULL / 2));
        let over = (u64::from(stride) * round + offset) % u64::from(FULL);
        if over >= u64::from(FULL - stride) && usable(i as usize) {
            return Some(i as usize);
        }
    }
    None
}
