//! What is known of one endpoint: our own requests in flight, its load reports, its drain, its ejection.
//!
//! Comes in: `first_byte` and `over` of the requests that
//! [`Pool::pick`](crate::Pool::pick) sent here, and reports. Goes out: [`predict`](EndpointState::predict), the
//! milliseconds after which a request sent now would have its first byte.
//!
//! What we do ourselves is known exactly and counts at once. What others do is known from reports, and an endpoint that
//! makes none is measured on our own requests alone.

use std::time::Duration;

use crate::cell::{AtomicBool, AtomicU32, AtomicU64, Float, Ordering, Units};
use crate::estimate::{Cost, Estimator, Watched};
use crate::heard::{Heard, Own, Views};
use crate::outlier::{Ejection, Standing};
use crate::report::{GpuHealth, LoadReport};
use crate::{micros, millis};
use Ordering::Relaxed;

pub use crate::heard::REPORT_EXPIRY;

/// How long an endpoint's own word that it is leaving holds. By then control has said so too, or the endpoint has
/// changed its mind (a restart that was faster than the news of it).
pub const LEAVING_EXPIRY: Duration = Duration::from_secs(10);
/// A failure counts as this many times the usual time, so that a replica that fails fast never looks fast.
const FAILURE_COSTS: f32 = 20.0;
/// How long failures are remembered, in seconds.
const FAILURE_MEMORY: f32 = 10.0;
/// One that is avoided for its failures and was not asked for so long is asked once: otherwise nobody would know when it is well again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// A share of failures below this is none: among endpoints that are equal otherwise even the least would keep one without requests.
const HARDLY_FAILING: f32 = 1.0 / 32.0;
/// Own answers until an endpoint's slow start is over.
const SLOW_START: u32 = 8;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered.
    Served,
    /// It failed by the endpoint's fault.
    Failed,
    /// It ended by somebody else's doing: the client left, the request was bad. It says nothing about the endpoint.
    Abandoned,
}

/// A request that was sent to an endpoint. Give it back to the same endpoint when it is over.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    watched: Watched,
    /// Still without its first byte.
    pending: bool,
    /// It finds out whether the endpoint is well again.
    probes: bool,
    pub(crate) foretold: Foretold,
}

/// What a decision foretold, to be compared with what came.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Foretold {
    pub(crate) ms: f32,
    /// For the best of the endpoints that were not picked.
    pub(crate) runner_up_ms: f32,
    pub(crate) views: Option<Views>,
}

/// What is usual in a cluster, for where nothing better is known.
#[derive(Clone, Copy, Debug)]
pub struct Usual {
    /// What a request costs.
    pub cost: Cost,
    /// How long it takes, in milliseconds.
    pub ms: f32,
    /// Its units of work.
    pub units: f32,
    /// How much of what the last report says comes true: 0 nothing, 1 all of it.
    pub trust: f32,
}

impl Default for Usual {
    fn default() -> Self {
        Self { cost: Cost::default(), ms: 0.0, units: 1.0, trust: 1.0 }
    }
}

/// What a request would meet at an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// Milliseconds until its first byte.
    pub ms: f32,
    /// Of that, for itself: what it would take if nothing were there.
    pub this_ms: f32,
    /// How much later others behind it are served.
    pub work_ms: f32,
    /// Of that, how long an answer of ours is overdue.
    pub overdue_ms: f32,
    /// Requests in flight, ours and others'.
    pub in_flight: f32,
    /// The share of our requests that failed lately.
    pub failing: f32,
    /// Age of the report in milliseconds; nothing if there is none.
    pub age_ms: Option<f32>,
    pub(crate) views: Option<Views>,
}

/// One endpoint's state, shared by all workers.
#[derive(Debug, Default)]
pub struct EndpointState {
    draining: AtomicBool,
    /// Milliseconds since the epoch until which its own word that it is leaving holds.
    leaving_until: AtomicU64,

    /// Our own requests here, measured as the endpoint itself would.
    own: Estimator,
    /// Own requests without their first byte.
    pending: AtomicU32,
    /// Own units sent ever, and lately: the latter fade.
    sent: Units,
    lately: Float,
    lately_at: AtomicU64,
    /// Microseconds since the epoch by which the next answer to us should be here.
    expected_by: AtomicU64,
    /// Microseconds since the epoch plus one of the last answer; 0 = none.
    answered_at: AtomicU64,
    failing: Float,
    failed_at: AtomicU64,
    /// Own answers before its slow start.
    start: AtomicU32,

    pub(crate) heard: Heard,
    /// Consecutive failures and the time until which the endpoint is out.
    pub ejection: Ejection,
    pub(crate) weight: crate::wrr::Weight,
    /// The next replica on the same physical GPU, by index plus one, in a circle; 0 = alone.
    pub(crate) sibling: AtomicU32,
}

impl EndpointState {
    /// A request with so many units of work is sent here.
    pub(crate) fn send(&self, units: f32, foretold: Foretold, usual: &Usual, now: Duration) -> Sent {
        if self.pending.fetch_add(1, Relaxed) == 0 {
            self.expect(foretold.ms, now);
        }
        self.sent.add(units);
        self.lately.set(self.lately(usual, now) + units);
        self.lately_at.store(micros(now), Relaxed);
        let probes = self.ejection.sent(now);
        Sent { watched: self.own.arrived(units, now), pending: true, probes, foretold }
    }

    /// The head of its response has come; says after how many milliseconds, the first time.
    pub(crate) fn first_byte(&self, sent: &mut Sent, now: Duration) -> Option<f32> {
        if !std::mem::take(&mut sent.pending) {
            return None;
        }
        let took_ms = self.own.started(&mut sent.watched, now);
        self.answered(now);
        if sent.probes {
            self.comes_back();
        }
        Some(took_ms)
    }

    /// It is over.
    pub(crate) fn over(&self, mut sent: Sent, outcome: Outcome, now: Duration) {
        if outcome == Outcome::Served {
            self.first_byte(&mut sent, now);
            if self.failing.get() != 0.0 {
                // The first answer after a while says more than one of many.
                let share = if self.unasked(now) >= ASK_AGAIN { 0.5 } else { 0.875 };
                self.failing.set(self.failing(now) * share);
                self.failed_at.store(micros(now), Relaxed);
            }
        } else if std::mem::take(&mut sent.pending) {
            self.answered(now);
        }
        if outcome == Outcome::Failed {
            let before = self.failing(now);
            self.failing.set(before + (1.0 - before) / 8.0);
            self.failed_at.store(micros(now), Relaxed);
        }
        self.own.finished(sent.watched, outcome != Outcome::Served, now);
        if sent.probes {
            self.ejection.probed(now);
        }
    }

    /// It has answered after an ejection. What it was before that says nothing any more; it starts slowly, like a new one.
    fn comes_back(&self) {
        self.failing.set(0.0);
        self.start.store(self.own.samples().saturating_sub(1), Relaxed);
    }

    /// An answer came: the next one is expected within the time that what is still pending should take.
    fn answered(&self, now: Duration) {
        self.answered_at.store(micros(now) + 1, Relaxed);
        if self.pending.fetch_sub(1, Relaxed) > 1 {
            self.expect(self.predict(0.0, &Usual::default(), now).ms, now);
        }
    }

    fn expect(&self, ms: f32, now: Duration) {
        self.expected_by.store(micros(now).saturating_add((ms * 1e3) as u64), Relaxed);
    }

    /// How long an answer to us is overdue.
    pub(crate) fn overdue_ms(&self, now: Duration) -> f32 {
        if self.pending.load(Relaxed) == 0 {
            return 0.0;
        }
        micros(now).saturating_sub(self.expected_by.load(Relaxed)) as f32 / 1e3
    }

    /// How long ago it answered us last, in milliseconds.
    pub(crate) fn silence_ms(&self, now: Duration) -> f32 {
        match self.answered_at.load(Relaxed).checked_sub(1) {
            Some(at) => micros(now).saturating_sub(at) as f32 / 1e3,
            None => f32::INFINITY,
        }
    }

    /// The share of our requests here that failed lately.
    pub fn failing(&self, now: Duration) -> f32 {
        let failing = self.failing.get();
        if failing == 0.0 {
            return 0.0;
        }
        let left = failing * (-self.unasked(now).as_secs_f32() / FAILURE_MEMORY).exp();
        if left < HARDLY_FAILING { 0.0 } else { left }
    }

    /// How long ago a request found out whether it still fails.
    fn unasked(&self, now: Duration) -> Duration {
        Duration::from_micros(micros(now).saturating_sub(self.failed_at.load(Relaxed)))
    }

    /// Whether the next request should find out how it is: it was ejected, and the time for that is over; or it is avoided for its
    /// failures, and for a while nothing of ours has gone there.
    pub(crate) fn is_due(&self, now: Duration) -> bool {
        match self.ejection.standing(now) {
            Standing::Due => true,
            Standing::Out => false,
            Standing::In => {
                self.failing(now) > 0.0 && self.in_flight() == 0 && self.unasked(now) >= ASK_AGAIN
            }
        }
    }

    /// Microseconds since the epoch of what we sent here last.
    pub(crate) fn sent_at(&self) -> u64 {
        self.lately_at.load(Relaxed)
    }

    /// Own units sent within about the time that a request takes.
    fn lately(&self, usual: &Usual, now: Duration) -> f32 {
        let age = micros(now).saturating_sub(self.lately_at.load(Relaxed)) as f32 / 1e3;
        self.lately.get() * (-age / usual.ms.max(1.0)).exp()
    }

    /// Our part: what is in flight counts, and what was sent lately counts too, which makes a client whose requests are
    /// few take turns rather than draw lots.
    fn ours(&self, usual: &Usual, now: Duration) -> Own {
        Own {
            requests: self.in_flight() as f32,
            units: self.own.units() + self.lately(usual, now),
            sent: self.sent.parts(),
        }
    }

    /// Our own requests in flight here.
    pub fn in_flight(&self) -> u32 {
        self.own.in_flight()
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

    /// Whether its GPU has said that it is broken.
    pub fn gpu_failed(&self) -> bool {
        self.heard.health() == Some(GpuHealth::Failed)
    }

    /// The physical GPU that serves it, if told.
    pub fn gpu(&self) -> Option<u64> {
        self.heard.gpu()
    }

    /// Whether a new endpoint already has as many requests of ours as its answers so far allow: as in TCP's slow
    /// start each answer allows one more.
    pub(crate) fn holds_back(&self) -> bool {
        let answered = self.own.samples().saturating_sub(self.start.load(Relaxed));
        answered < SLOW_START && self.pending.load(Relaxed) > answered
    }

    /// Takes in a report. Values that are not finite or below zero count as not told.
    pub(crate) fn told(&self, report: LoadReport, usual: &Usual, now: Duration) {
        let report = report.sane();
        self.weight.told(&report, now);
        self.heard.take(&report, self.ours(usual, now), now);
    }

    /// The two-parameter cost here: as told, else as measured on our own requests.
    pub fn cost(&self) -> Option<Cost> {
        self.heard.cost().or_else(|| self.own.cost())
    }

    /// What a request with so many units of work would meet, sent now.
    pub fn predict(&self, units: f32, usual: &Usual, now: Duration) -> Prediction {
        let cost = self.cost().unwrap_or(usual.cost);
        let work_ms = cost.of(units);
        let views = self.heard.views(units, self.ours(usual, now), usual, now);
        let (wait_ms, this_ms) = match views {
            Some(views) => (views.ms(), views.alone_ms),
            None if self.own.samples() > 0 => {
                let own_ms = self.own.predict(units, now) + self.own.beyond_ms();
                (own_ms + cost.of(1.0) * self.lately(usual, now), self.own.alone_ms(cost, units))
            }
            None => (work_ms + cost.unit_ms * self.own.units(), work_ms),
        };
        let (overdue_ms, failing) = (self.overdue_ms(now), self.failing(now));
        Prediction {
            ms: (wait_ms + overdue_ms) * (1.0 + FAILURE_COSTS * failing),
            this_ms,
            work_ms,
            overdue_ms,
            in_flight: self.heard.others() + self.in_flight() as f32,
            failing,
            age_ms: self.heard.age_ms(now),
            views,
        }
    }

    /// The newest report as it was told, and its age.
    pub fn last_told(&self, now: Duration) -> Option<(LoadReport, Duration)> {
        self.heard.last(now)
    }

    /// The requests that a new one would find here: our own, exactly, and those of others as last reported, which
    /// count for less as the report ages.
    pub fn work(&self, now: Duration) -> f32 {
        let own = self.in_flight() as f32;
        let Some(age) = self.heard.age_ms(now) else { return own };
        let fresh = 1.0 - age / REPORT_EXPIRY.as_millis() as f32;
        if fresh <= 0.0 { own } else { own + self.heard.others() * fresh }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn report(in_flight: f32) -> LoadReport {
        LoadReport { in_flight: Some(in_flight), ..LoadReport::default() }
    }

    fn send(state: &EndpointState) -> Sent {
        state.send(1.0, Foretold::default(), &Usual::default(), s(100))
    }

    #[test]
    fn others_are_what_the_report_says_less_our_own() {
        let state = EndpointState::default();
        let (first, _second) = (send(&state), send(&state));
        state.told(report(7.0), &Usual::default(), s(100));
        assert_eq!(state.work(s(100)), 7.0);
        state.over(first, Outcome::Served, s(100));
        assert_eq!(state.work(s(100)), 6.0);
    }

    #[test]
    fn a_report_fades_and_expires() {
        let state = EndpointState::default();
        state.told(report(8.0), &Usual::default(), s(0));
        assert_eq!(state.work(s(5)), 4.0);
        assert_eq!(state.work(s(10)), 0.0);
        assert_eq!(state.work(s(1000)), 0.0);
    }

    #[test]
    fn nonsense_counts_as_not_told() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -3.0] {
            let state = EndpointState::default();
            let report =
                LoadReport { rps: Some(bad), unit_ms: Some(bad), fixed_ms: Some(1.0), ..report(bad) };
            state.told(report, &Usual::default(), s(1));
            assert_eq!(state.work(s(1)), 0.0, "{bad}");
            let (told, age) = state.last_told(s(2)).unwrap();
            assert_eq!((told.rps, told.unit_ms, told.fixed_ms, age), (None, None, Some(1.0), s(1)));
            assert_eq!(state.cost(), None);
        }
    }
}
