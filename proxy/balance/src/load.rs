//! What is known of one endpoint: our own requests in flight, its load reports, its drain, its ejection.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::millis;
use crate::outlier::Ejection;

/// A report older than this says nothing any more; between, it fades linearly.
pub const REPORT_EXPIRY: Duration = Duration::from_secs(10);
/// How long an endpoint's own word that it is leaving holds. By then control has said so too, or the endpoint has
/// changed its mind (a restart that was faster than the news of it).
pub const LEAVING_EXPIRY: Duration = Duration::from_secs(10);

/// What an endpoint says of itself, from the ORCA report on its responses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Requests in flight there, from all clients.
    pub in_flight: f32,
    /// How long requests wait before they reach the application.
    pub queue_wait: Duration,
    /// Requests a second.
    pub rps: f32,
    /// Errors a second.
    pub eps: f32,
}

/// One endpoint's state, shared by all workers.
#[derive(Debug, Default)]
pub struct EndpointState {
    in_flight: AtomicU32,
    draining: AtomicBool,
    /// Milliseconds since the epoch until which its own word that it is leaving holds.
    leaving_until: AtomicU64,
    /// Requests in flight from *others* when the report came, as bits of an `f32`.
    others: AtomicU32,
    queue_wait_us: AtomicU32,
    rps: AtomicU32,
    eps: AtomicU32,
    /// Milliseconds since the epoch, plus one; 0 = never.
    reported_at: AtomicU64,
    /// Consecutive failures and the time until which the endpoint is out.
    pub ejection: Ejection,
}

impl EndpointState {
    /// A request begins here. Call [`end`](Self::end) when its response's last byte has passed.
    pub fn begin(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// A request is over.
    pub fn end(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// Our own requests in flight here.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Control says that the endpoint wants no new requests, or wants them again.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Relaxed);
    }

    /// Whether control says that it wants no new requests.
    pub fn draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// The endpoint itself says, on a response, that it is leaving.
    pub fn leaving(&self, now: Duration) {
        self.leaving_until.store(millis(now + LEAVING_EXPIRY), Relaxed);
    }

    /// Whether the endpoint said lately that it is leaving. It still serves, so it is a last resort.
    pub fn is_leaving(&self, now: Duration) -> bool {
        let until = self.leaving_until.load(Relaxed);
        until != 0 && millis(now) < until
    }

    /// Takes in a report. Values that are not finite or below zero count as zero.
    pub fn report(&self, report: Report, now: Duration) {
        let sane = |value: f32| if value.is_finite() && value > 0.0 { value } else { 0.0 };
        // The report counts the request it rides on and our others; those are known better here.
        let others = sane(report.in_flight - self.in_flight() as f32);
        self.others.store(others.to_bits(), Relaxed);
        self.queue_wait_us.store(u32::try_from(report.queue_wait.as_micros()).unwrap_or(u32::MAX), Relaxed);
        self.rps.store(sane(report.rps).to_bits(), Relaxed);
        self.eps.store(sane(report.eps).to_bits(), Relaxed);
        self.reported_at.store(millis(now) + 1, Relaxed);
    }

    /// The newest report and its age; its `in_flight` is what others have there.
    pub fn last_report(&self, now: Duration) -> Option<(Report, Duration)> {
        let at = self.reported_at.load(Relaxed).checked_sub(1)?;
        let report = Report {
            in_flight: f32::from_bits(self.others.load(Relaxed)),
            queue_wait: Duration::from_micros(u64::from(self.queue_wait_us.load(Relaxed))),
            rps: f32::from_bits(self.rps.load(Relaxed)),
            eps: f32::from_bits(self.eps.load(Relaxed)),
        };
        Some((report, now.saturating_sub(Duration::from_millis(at))))
    }

    /// The work that a new request would find here: our own requests in flight, exactly, and those of others as
    /// last reported, which count for less as the report ages.
    pub fn work(&self, now: Duration) -> f32 {
        let own = self.in_flight() as f32;
        let at = self.reported_at.load(Relaxed);
        if at == 0 {
            return own;
        }
        let age = millis(now).saturating_sub(at - 1) as f32;
        let fresh = 1.0 - age / REPORT_EXPIRY.as_millis() as f32;
        if fresh <= 0.0 { own } else { own + f32::from_bits(self.others.load(Relaxed)) * fresh }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn others_are_what_the_report_says_less_our_own() {
        let state = EndpointState::default();
        state.begin();
        state.begin();
        state.report(Report { in_flight: 7.0, ..Report::default() }, s(100));
        assert_eq!(state.work(s(100)), 7.0);
        state.end();
        assert_eq!(state.work(s(100)), 6.0);
    }

    #[test]
    fn a_report_fades_and_expires() {
        let state = EndpointState::default();
        state.report(Report { in_flight: 8.0, ..Report::default() }, s(0));
        assert_eq!(state.work(s(5)), 4.0);
        assert_eq!(state.work(s(10)), 0.0);
        assert_eq!(state.work(s(1000)), 0.0);
    }

    #[test]
    fn nonsense_counts_as_nothing() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -3.0] {
            let state = EndpointState::default();
            state.report(Report { in_flight: bad, rps: bad, eps: bad, ..Report::default() }, s(1));
            assert_eq!(state.work(s(1)), 0.0, "{bad}");
            let (report, age) = state.last_report(s(2)).unwrap();
            assert_eq!((report.rps, report.eps, age), (0.0, 0.0, s(1)));
        }
    }
}
