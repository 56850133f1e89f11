//! What is known of one endpoint: our own requests in flight, its load reports, its drain, its ejection.
//!
//! Comes in: [`sent`](EndpointState::sent), [`first_byte`](EndpointState::first_byte), [`over`](EndpointState::over)
//! of our own requests, and [`told`](EndpointState::told) for a report. Goes out: [`predict`](EndpointState::predict),
//! the milliseconds after which a request sent now would be answered.
//!
//! What we do ourselves is known exactly and counts at once. What others do is known from the last report and ages: it
//! relaxes towards its own mean, so that an old report becomes "as usual" and neither "idle" nor "as it was then".
//! A report is many words, each an atomic of its own. A reader may see some of the last report and some of the one
//! before; both were true a moment ago.

use std::time::Duration;

use crate::cell::{AtomicBool, AtomicU32, AtomicU64, Float, Ordering, Told, Units};
use crate::estimate::{Cost, Estimator, Watched};
use crate::outlier::Ejection;
use crate::report::{GpuHealth, LoadReport};
use crate::{micros, millis};
use Ordering::Relaxed;

/// A report older than this says nothing any more; between, it fades.
pub const REPORT_EXPIRY: Duration = Duration::from_secs(10);
/// How long an endpoint's own word that it is leaving holds. By then control has said so too, or the endpoint has
/// changed its mind (a restart that was faster than the news of it).
pub const LEAVING_EXPIRY: Duration = Duration::from_secs(10);
/// Over how long the usual backlog of others is averaged, in milliseconds.
const USUAL_MS: f32 = 1000.0;
/// A failure counts as this many times the usual time, so that a replica that fails fast never looks fast.
const FAILURE_COSTS: f32 = 20.0;
/// How long failures are remembered, in seconds.
const FAILURE_MEMORY: f32 = 10.0;
/// Own answers until an endpoint's slow start is over.
const SLOW_START: u32 = 8;

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
    /// What was predicted for it, and for the best of the others.
    pub(crate) predicted_ms: f32,
    pub(crate) runner_up_ms: f32,
    pub(crate) both: (f32, f32),
}

/// What a request would meet at an endpoint, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// Until its first byte.
    pub ms: f32,
    /// Of that, work of others.
    pub others_ms: f32,
    /// Of that, our own work in flight.
    pub own_ms: f32,
    /// Of that, this request.
    pub this_ms: f32,
    /// Of that, how long an answer of ours is overdue.
    pub overdue_ms: f32,
    /// Requests in flight, ours and others'.
    pub in_flight: f32,
    /// The share of our requests that failed lately.
    pub failing: f32,
    /// Age of the report; nothing if there is none.
    pub age_ms: Option<f32>,
    /// Known, stale.
    pub both: (f32, f32),
}

/// What is usual in a pool, for where nothing better is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usual {
    /// Cost.
    pub cost: Cost,
    /// How much the newest reports are worth against the usual, 0 to 1.
    pub trust: f32,
    /// ms
    pub ms: f32,
}

/// One endpoint's state, shared by all workers.
#[derive(Debug, Default)]
pub struct EndpointState {
    /// Requests counted by [`begin`](Self::begin).
    begun: AtomicU32,
    draining: AtomicBool,
    /// Milliseconds since the epoch until which its own word that it is leaving holds.
    leaving_until: AtomicU64,

    /// Our own requests here, measured as the endpoint itself would: the source of costs if it tells none.
    own: Estimator,
    /// Own requests without their first byte.
    pending: AtomicU32,
    /// Own units sent lately, decaying.
    recent: Float,
    recent_at: AtomicU64,
    /// Own units ever sent, and how many when the last report came.
    sent: Units,
    sent_at_report: Float,
    drains_ms: Float,
    closes_ms: Float,
    /// Usual backlog and units at reports, ours and others'.
    usual_drains: Float,
    usual_units: Float,
    usual_own: Float,
    /// Microseconds since the epoch by which the next answer to us should be here.
    expected_by: AtomicU64,
    failing: Float,
    failed_at: AtomicU64,

    /// Backlog of others in milliseconds and their requests, when the report came; the first also on average.
    others_ms: Float,
    others: Float,
    usual_ms: Float,
    usual: Float,
    /// Microseconds since the epoch, plus one; 0 = never.
    reported_at: AtomicU64,
    words: Words,
    /// Consecutive failures and the time until which the endpoint is out.
    pub ejection: Ejection,
    pub(crate) weight: crate::wrr::Weight,
    /// The next replica on the same physical GPU, by index plus one, in a circle; 0 = alone.
    pub(crate) sibling: AtomicU32,
}

/// The words of the last report as they were told.
#[derive(Debug, Default)]
struct Words {
    fixed_ms: Told,
    unit_ms: Told,
    queue_wait_ms: Told,
    room: Told,
    closes_ms: Told,
    waiting: Told,
    kv_usage: Told,
    memory: Told,
    utilization: Told,
    rps: Told,
    eps: Told,
    /// Plus one; 0 = not told.
    gpu: AtomicU64,
    /// 0 not told, 1 well, 2 throttled, 3 failed.
    health: AtomicU32,
}

impl EndpointState {
    /// A request begins here. Call [`end`](Self::end) when its response's last byte has passed.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Relaxed);
    }

    /// A request is over.
    pub fn end(&self) {
        self.begun.fetch_sub(1, Relaxed);
    }

    /// A request with so many units of work is sent here.
    pub fn sent(&self, units: f32, now: Duration) -> Sent {
        let predicted_ms = self.predict(units, Usual::default(), now).ms;
        self.sent_as(units, predicted_ms, f32::INFINITY, (0.0, 0.0), 0.0, now)
    }

    pub(crate) fn sent_as(&self, units: f32, predicted_ms: f32, runner_up_ms: f32, both: (f32, f32), ms: f32, now: Duration) -> Sent {
        if self.pending.fetch_add(1, Relaxed) == 0 {
            self.expect(predicted_ms, now);
        }
        self.recent.set(self.recent(now, ms) + units);
        self.sent.add(units);
        self.recent_at.store(micros(now), Relaxed);
        Sent { watched: self.own.arrived(units, now), pending: true, predicted_ms, runner_up_ms, both }
    }

    /// The head of its response has come; says after how many milliseconds, the first time.
    pub fn first_byte(&self, sent: &mut Sent, now: Duration) -> Option<f32> {
        if !std::mem::take(&mut sent.pending) {
            return None;
        }
        let took_ms = self.own.started(&mut sent.watched, now);
        self.answered(now);
        Some(took_ms)
    }

    /// It is over.
    pub fn over(&self, mut sent: Sent, outcome: Outcome, now: Duration) {
        if outcome == Outcome::Served {
            self.first_byte(&mut sent, now);
            if self.failing.get() != 0.0 {
                self.failing.set(self.failing(now) * 0.875);
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
    }

    /// An answer came: the next one is expected within the time that what is still pending should take.
    fn answered(&self, now: Duration) {
        if self.pending.fetch_sub(1, Relaxed) > 1 {
            self.expect(self.predict(0.0, Usual::default(), now).ms, now);
        }
    }

    fn expect(&self, ms: f32, now: Duration) {
        self.expected_by.store(micros(now) + (ms * 1e3) as u64, Relaxed);
    }

    fn own_smooth(&self, now: Duration, ms: f32) -> f32 {
        self.own.units() * crate::knob(2, "GOWN", 1.0) + crate::knob(3, "G", 1.0) * self.recent(now, ms)
    }

    fn recent(&self, now: Duration, ms: f32) -> f32 {
        let age = micros(now).saturating_sub(self.recent_at.load(Relaxed)) as f32 / 1e3;
        self.recent.get() * (-age / (crate::knob(1, "TW", 2.0) * ms).max(1.0)).exp()
    }

    fn overdue_ms(&self, now: Duration) -> f32 {
        if self.pending.load(Relaxed) == 0 {
            return 0.0;
        }
        micros(now).saturating_sub(self.expected_by.load(Relaxed)) as f32 / 1e3
    }

    /// The share of our requests here that failed lately.
    pub fn failing(&self, now: Duration) -> f32 {
        let failing = self.failing.get();
        if failing == 0.0 {
            return 0.0;
        }
        let age = micros(now).saturating_sub(self.failed_at.load(Relaxed)) as f32 / 1e6;
        failing * (-age / FAILURE_MEMORY).exp()
    }

    /// Our own requests in flight here.
    pub fn in_flight(&self) -> u32 {
        self.begun.load(Relaxed) + self.own.in_flight()
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
        self.words.health.load(Relaxed) == 3
    }

    /// The physical GPU that serves it, if told.
    pub fn gpu(&self) -> Option<u64> {
        self.words.gpu.load(Relaxed).checked_sub(1)
    }

    /// Whether too few of our requests were answered here yet to trust what they say.
    pub fn is_new(&self) -> bool {
        self.own.samples() < SLOW_START
    }

    /// Whether a new endpoint already has as many requests of ours as its answers so far allow: as in TCP's slow
    /// start each answer allows one more.
    pub(crate) fn holds_back(&self) -> bool {
        let answered = self.own.samples();
        answered < SLOW_START && self.pending.load(Relaxed) > answered
    }

    /// Takes in a report. Values that are not finite or below zero count as zero.
    pub fn report(&self, report: Report, now: Duration) {
        self.told(
            LoadReport {
                in_flight: Some(if report.in_flight.is_finite() { report.in_flight.max(0.0) } else { 0.0 }),
                queue_wait_ms: Some(report.queue_wait.as_secs_f32() * 1e3),
                rps: Some(report.rps),
                eps: Some(report.eps),
                ..LoadReport::default()
            },
            0.0,
            now,
        );
    }

    /// Takes in a report. Values that are not finite or below zero count as not told.
    pub fn told(&self, report: LoadReport, usual_pool_ms: f32, now: Duration) {
        let report = report.sane();
        let words = &self.words;
        words.fixed_ms.set(report.fixed_ms);
        words.unit_ms.set(report.unit_ms);
        words.queue_wait_ms.set(report.queue_wait_ms);
        words.room.set(report.room);
        words.closes_ms.set(report.closes_ms);
        words.waiting.set(report.waiting);
        words.kv_usage.set(report.kv_usage);
        words.memory.set(report.memory);
        words.utilization.set(report.utilization);
        words.rps.set(report.rps);
        words.eps.set(report.eps);
        words.gpu.store(report.gpu.map_or(0, |gpu| gpu.saturating_add(1)), Relaxed);
        words.health.store(report.health.map_or(0, |health| health as u32 + 1), Relaxed);
        self.weight.told(&report, now);

        // The report counts the request it rides on and our others; those are known better here.
        let own = self.in_flight() as f32;
        let others = report.in_flight.map_or(0.0, |all| (all - own).max(0.0));
        let unit_ms = self.cost().map_or(0.0, |cost| cost.unit_ms);
        let units = report.units.map_or(others, |all| (all - self.own.units()).max(0.0));
        let others_ms = match report.backlog_ms {
            Some(all) => (all - unit_ms * self.own.units()).max(0.0),
            None => units * unit_ms,
        };
        let before = self.reported_at.swap(micros(now) + 1, Relaxed);
        let share = match before.checked_sub(1) {
            None => 1.0,
            Some(at) => 1.0 - (-(micros(now).saturating_sub(at) as f32 / 1e3) / USUAL_MS).exp(),
        };
        self.sent_at_report.set(self.sent.get());
        let drains = report.backlog_ms.unwrap_or(others_ms + unit_ms * self.own.units());
        self.drains_ms.set(drains);
        self.closes_ms.set(report.closes_ms.unwrap_or(drains));
        self.usual_drains.approach(drains, share);
        self.usual_own.approach(self.own_smooth(now, usual_pool_ms), share);
        self.usual_units.approach(report.units.unwrap_or(others + own), share);
        self.usual_ms.approach(others_ms, share);
        self.usual.approach(others, share);
        self.others_ms.set(others_ms);
        self.others.set(others);
    }

    /// The two-parameter cost here: as told, else as measured on our own requests.
    pub fn cost(&self) -> Option<Cost> {
        match (self.words.fixed_ms.get(), self.words.unit_ms.get()) {
            (Some(fixed_ms), Some(unit_ms)) if self.reported_at.load(Relaxed) != 0 => {
                Some(Cost { fixed_ms, unit_ms })
            }
            _ => self.own.cost(),
        }
    }

    /// What a request with so many units of work would meet, sent now. `prior` is the cost to assume where nothing is
    /// known yet.
    pub fn predict(&self, units: f32, prior: Usual, now: Duration) -> Prediction {
        let cost = self.cost().unwrap_or(prior.cost);
        let age_ms = self.age_ms(now);
        let k = crate::knob;
        let trust = prior.trust;
        let mut both = (0.0, 0.0);
        let s = if self.usual_units.get() > 0.01 { self.usual_drains.get() / self.usual_units.get() } else { cost.unit_ms + cost.fixed_ms };
        let own_ms = s * self.own.units();
        let this_ms = cost.fixed_ms + cost.unit_ms * units;
        let (others_ms, others) = match age_ms {
            None => (0.0, 0.0),
            Some(age) => {
                let uo = self.usual_own.get();
                let a = (self.usual_units.get() / uo.max(0.01)).clamp(1.0, k(5, "AMAX", 16.0));
                let stale = this_ms + (self.usual_drains.get() + s * a * (self.own_smooth(now, prior.ms) - uo)).max(0.0);
                let rate = self.words.rps.get().unwrap_or(0.0) / 1e3 * k(4, "LAM", 1.0);
                let own_since = (self.sent.get() - self.sent_at_report.get()).max(0.0);
                let (drains, mut closes) = (self.drains_ms.get(), self.closes_ms.get());
                let mut open = if drains > closes { (drains - closes - cost.fixed_ms).max(0.0) / cost.unit_ms.max(1e-6) } else { 0.0 };
                let mut begun = 0.0;
                for _ in 0..2 {
                    if age < closes { break; }
                    open += rate * (closes - begun);
                    begun = closes;
                    closes += cost.fixed_ms + cost.unit_ms * open;
                    open = 0.0;
                }
                open += rate * (age - begun).max(0.0);
                let known = (closes - age).max(0.0) + this_ms + cost.unit_ms * (open + own_since);
                let fresh = trust * (-age / (k(0, "TAU", 1.0) * (self.usual_drains.get() + this_ms)).max(1.0)).exp();
                both = (known, stale);
                (known * fresh + stale * (1.0 - fresh) - own_ms - this_ms, self.others.get())
            }
        };
        let overdue_ms = self.overdue_ms(now);
        let failing = self.failing(now);
        let ms = (this_ms + own_ms + others_ms + overdue_ms) * (1.0 + FAILURE_COSTS * failing);
        Prediction {
            ms,
            others_ms,
            own_ms,
            this_ms,
            overdue_ms,
            in_flight: others + self.in_flight() as f32,
            failing,
            age_ms,
            both,
        }
    }

    /// How old the last report is, in milliseconds.
    pub fn age_ms(&self, now: Duration) -> Option<f32> {
        let at = self.reported_at.load(Relaxed).checked_sub(1)?;
        Some(micros(now).saturating_sub(at) as f32 / 1e3)
    }

    /// Requests of others when the last report came.
    pub(crate) fn others(&self) -> f32 {
        self.others.get()
    }

    /// The newest report and its age; its `in_flight` is what others have there.
    pub fn last_report(&self, now: Duration) -> Option<(Report, Duration)> {
        let at = self.reported_at.load(Relaxed).checked_sub(1)?;
        let report = Report {
            in_flight: self.others.get(),
            queue_wait: Duration::from_secs_f32(self.words.queue_wait_ms.get().unwrap_or(0.0) / 1e3),
            rps: self.words.rps.get().unwrap_or(0.0),
            eps: self.words.eps.get().unwrap_or(0.0),
        };
        Some((report, now.saturating_sub(Duration::from_micros(at))))
    }

    /// The words of the newest report, with what others have there in `in_flight` and `backlog_ms`, and its age.
    pub fn last_told(&self, now: Duration) -> Option<(LoadReport, Duration)> {
        let at = self.reported_at.load(Relaxed).checked_sub(1)?;
        let words = &self.words;
        let report = LoadReport {
            in_flight: Some(self.others.get()),
            units: None,
            backlog_ms: Some(self.others_ms.get()),
            fixed_ms: words.fixed_ms.get(),
            unit_ms: words.unit_ms.get(),
            queue_wait_ms: words.queue_wait_ms.get(),
            room: words.room.get(),
            closes_ms: words.closes_ms.get(),
            waiting: words.waiting.get(),
            kv_usage: words.kv_usage.get(),
            memory: words.memory.get(),
            utilization: words.utilization.get(),
            rps: words.rps.get(),
            eps: words.eps.get(),
            gpu: self.gpu(),
            health: match words.health.load(Relaxed) {
                1 => Some(GpuHealth::Well),
                2 => Some(GpuHealth::Throttled),
                3 => Some(GpuHealth::Failed),
                _ => None,
            },
        };
        Some((report, now.saturating_sub(Duration::from_micros(at))))
    }

    /// The requests that a new one would find here: our own, exactly, and those of others as last reported, which
    /// count for less as the report ages.
    pub fn work(&self, now: Duration) -> f32 {
        let own = self.in_flight() as f32;
        let Some(age) = self.age_ms(now) else { return own };
        let fresh = 1.0 - age / REPORT_EXPIRY.as_millis() as f32;
        if fresh <= 0.0 { own } else { own + self.others.get() * fresh }
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
