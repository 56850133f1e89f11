//! What an endpoint has said of itself: its last report, word by word, and what its reports usually say.
//!
//! A report is true of the moment it was made. From then on two views of the endpoint are kept apart:
//!
//! * *known*: the last report carried forward. The group that ran then is done when it said; the work that waited joins
//!   the next group; others keep sending as before; what we have sent since is added.
//! * *usual*: the mean of its reports, moved by how much more of our own work is there than usual. Everybody balances as we
//!   do, so our own deviation stands for theirs as well, and is multiplied: without that, many clients that each correct
//!   a little correct too much together.
//!
//! The known view fades into the usual one within about half the time that the endpoint takes for its work, and counts
//! for no more than it has been worth lately (`Usual::trust`): reports that come late turn out to foretell nothing.
//!
//! A report is many words, each an atomic of its own. A reader may see some of the last report and some of the one
//! before; both were true a moment ago.

use std::time::Duration;

use crate::cell::{AtomicU32, AtomicU64, Float, Ordering, Told};
use crate::estimate::Cost;
use crate::load::Usual;
use crate::micros;
use crate::report::{GpuHealth, LoadReport};
use Ordering::Relaxed;

/// A report older than this says nothing any more.
pub const REPORT_EXPIRY: Duration = Duration::from_secs(10);
/// Over how long the usual is averaged, in milliseconds.
const USUAL_MS: f32 = 1000.0;
/// The known view fades over this share of the time for the endpoint's work.
const FADES: f32 = 0.5;
/// The most that our own deviation is multiplied by: beyond, the chance in our few requests is multiplied too.
const STANDS_FOR: f32 = 4.0;
/// Less work than this is none.
const LEAST: f32 = 0.0625;
/// Groups that the last report is carried forward by.
const GROUPS_AHEAD: usize = 2;

/// What was heard of an endpoint.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Microseconds since the epoch, plus one; 0 = never.
    at: AtomicU64,
    words: Words,
    /// Requests of others when the report came.
    others: Float,
    drains_ms: Float,
    closes_ms: Float,
    /// Units that waited in the open group, and the most that fits into one; 0 = not told.
    open: Float,
    fits: Float,
    /// Our units sent until then, in sixteenths.
    sent: AtomicU64,
    usual_drains_ms: Float,
    usual_units: Float,
    usual_own: Float,
}

/// The words of the last report as they were told.
#[derive(Debug, Default)]
struct Words {
    in_flight: Told,
    units: Told,
    backlog_ms: Told,
    fixed_ms: Told,
    unit_ms: Told,
    at_once: Told,
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

/// Our own part in an endpoint's load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Own {
    /// Requests in flight.
    pub(crate) requests: f32,
    /// Units that wait for their first byte, and those sent lately.
    pub(crate) units: f32,
    /// Units sent ever, in sixteenths.
    pub(crate) sent: u64,
}

/// The two views, in milliseconds until the first byte.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Views {
    pub(crate) known_ms: f32,
    pub(crate) usual_ms: f32,
    /// What it would be if nothing were there; neither is less.
    pub(crate) alone_ms: f32,
    /// How much the first counts.
    pub(crate) fresh: f32,
}

impl Views {
    pub(crate) fn ms(&self) -> f32 {
        self.usual_ms + (self.known_ms - self.usual_ms) * self.fresh
    }
}

impl Heard {
    /// Takes in a report; `own` is our part when it came.
    pub(crate) fn take(&self, report: &LoadReport, own: Own, now: Duration) {
        let words = &self.words;
        words.in_flight.set(report.in_flight);
        words.units.set(report.units);
        words.backlog_ms.set(report.backlog_ms);
        words.fixed_ms.set(report.fixed_ms);
        words.unit_ms.set(report.unit_ms);
        words.at_once.set(report.at_once);
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

        let cost = report.cost().unwrap_or_default();
        let units = report.units.or(report.in_flight).unwrap_or(own.units);
        let drains_ms = report.backlog_ms.unwrap_or(cost.unit_ms * units);
        let closes_ms = report.closes_ms.unwrap_or(drains_ms).min(drains_ms);
        let open = (drains_ms - closes_ms - cost.fixed_ms) / cost.unit_ms.max(f32::MIN_POSITIVE);
        let open = if open.is_finite() { open.clamp(0.0, units) } else { 0.0 };
        self.others.set(report.in_flight.map_or(0.0, |all| (all - own.requests).max(0.0)));
        self.drains_ms.set(drains_ms);
        self.closes_ms.set(closes_ms);
        self.open.set(open);
        self.fits.set(report.room.map_or(0.0, |room| (room + open).max(LEAST)));
        self.sent.store(own.sent, Relaxed);

        let share = match self.at.swap(micros(now) + 1, Relaxed).checked_sub(1) {
            None => 1.0,
            Some(at) => 1.0 - (-(micros(now).saturating_sub(at) as f32 / 1e3) / USUAL_MS).exp(),
        };
        self.usual_drains_ms.approach(drains_ms, share);
        self.usual_units.approach(units, share);
        self.usual_own.approach(own.units, share);
    }

    /// How old the last report is, in milliseconds.
    pub(crate) fn age_ms(&self, now: Duration) -> Option<f32> {
        let at = self.at.load(Relaxed).checked_sub(1)?;
        Some(micros(now).saturating_sub(at) as f32 / 1e3)
    }

    /// Requests of others when the last report came.
    pub(crate) fn others(&self) -> f32 {
        self.others.get()
    }

    pub(crate) fn gpu(&self) -> Option<u64> {
        self.words.gpu.load(Relaxed).checked_sub(1)
    }

    pub(crate) fn health(&self) -> Option<GpuHealth> {
        match self.words.health.load(Relaxed) {
            1 => Some(GpuHealth::Well),
            2 => Some(GpuHealth::Throttled),
            3 => Some(GpuHealth::Failed),
            _ => None,
        }
    }

    /// The cost as told.
    pub(crate) fn cost(&self) -> Option<Cost> {
        Some(Cost { fixed_ms: self.words.fixed_ms.get()?, unit_ms: self.words.unit_ms.get()? })
    }

    /// What a request of so many units would meet; nothing if there is no report of use.
    pub(crate) fn views(&self, units: f32, own: Own, usual: &Usual, now: Duration) -> Option<Views> {
        let (age, cost) = (self.age_ms(now)?, self.cost()?);
        if age > REPORT_EXPIRY.as_millis() as f32 {
            return None;
        }
        let this_ms = cost.of(units);
        let alone_ms = cost.alone(units, self.words.at_once.get().unwrap_or(1.0), usual.units);
        let known_ms = self.known(age, cost, units, own, usual);
        let (drains, all, ours) = (self.usual_drains_ms.get(), self.usual_units.get(), self.usual_own.get());
        let each_ms = if all > LEAST { drains / all } else { cost.of(1.0) };
        let stands_for = (all / ours.max(LEAST)).clamp(1.0, STANDS_FOR);
        let usual_ms = this_ms + (drains + stands_for * each_ms * (own.units - ours)).max(0.0);
        // Nothing takes less than it would alone.
        let (known_ms, usual_ms) = (known_ms.max(alone_ms), usual_ms.max(alone_ms));
        let fresh = usual.trust * (-age / (FADES * (drains + this_ms)).max(1.0)).exp();
        Some(Views { known_ms, usual_ms, alone_ms, fresh })
    }

    /// The last report carried forward by `age` milliseconds.
    fn known(&self, age: f32, cost: Cost, units: f32, own: Own, usual: &Usual) -> f32 {
        // Others are nearly everybody; what they send is what the endpoint serves.
        let per_ms = self.words.rps.get().unwrap_or(0.0) / 1e3 * usual.units;
        let (mut closes, mut open, mut begun) = (self.closes_ms.get(), self.open.get(), 0.0);
        for _ in 0..GROUPS_AHEAD {
            if age < closes {
                break;
            }
            open += per_ms * (closes - begun);
            begun = closes;
            closes += cost.of(open);
            open = 0.0;
        }
        open += per_ms * (age - begun).max(0.0);
        let since = own.sent.saturating_sub(self.sent.load(Relaxed)) as f32 / crate::cell::SIXTEENTHS;
        let joined = open + since + units;
        let fits = self.fits.get();
        let groups = if fits > 0.0 { (joined / fits).ceil().max(1.0) } else { 1.0 };
        (closes - age).max(0.0) + groups * cost.fixed_ms + cost.unit_ms * joined
    }

    /// The words of the last report and its age.
    pub(crate) fn last(&self, now: Duration) -> Option<(LoadReport, Duration)> {
        let at = self.at.load(Relaxed).checked_sub(1)?;
        let words = &self.words;
        let report = LoadReport {
            in_flight: words.in_flight.get(),
            units: words.units.get(),
            backlog_ms: words.backlog_ms.get(),
            fixed_ms: words.fixed_ms.get(),
            unit_ms: words.unit_ms.get(),
            at_once: words.at_once.get(),
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
            health: self.health(),
        };
        Some((report, now.saturating_sub(Duration::from_micros(at))))
    }
}
