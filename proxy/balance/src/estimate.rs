//! What work costs at a server that can only be watched: arrivals, first bytes and completions of one model.
//!
//! What comes in: [`Estimator::arrived`], [`Estimator::started`], [`Estimator::finished`]. What goes out: a [`Cost`],
//! the backlog in milliseconds and the busy share. The server may serve one by one, `k` at a time, in batches or share
//! its time; none of that is told. One linear law holds for all of them near the point where they work (Little):
//!
//! ```text
//! time until answered = fixed + unit × (units in flight on arrival + own units)
//! ```
//!
//! A queue served one by one has `fixed` 0 and `unit` the service time; `k` servers a `unit` of the k-th part; a batching
//! one a `fixed` of about a batch. Both are found by a least-squares line over the last requests with exponential
//! forgetting. At a steady load a line through a cloud says little about its slope, so the slope leans on a second
//! view, in which load does not matter: the time between departures while the server is busy, per unit that departs.
//!
//! A sample that comes while another worker takes one in is dropped: it is one of many, and nobody waits.

use std::time::Duration;

use crate::cell::{AtomicBool, AtomicU32, AtomicU64, Float, Ordering, Units};
use crate::micros;
use Ordering::{Acquire, Relaxed, Release};

/// Requests over which the past is forgotten.
const MEMORY: f32 = 48.0;
/// How strongly the slope leans on the busy view, against a spread of the load of its own size.
const LEAN: f32 = 0.3;
/// The window of the busy share and the rates.
const WINDOW: Duration = Duration::from_secs(1);

/// The two-parameter cost of one model's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Milliseconds to a request, whatever its size.
    pub fixed_ms: f32,
    /// Milliseconds to a unit of work.
    pub unit_ms: f32,
}

/// How busy a server is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// The share of the time in which there was work; more than 1 if a queue grows.
    pub utilization: f32,
    /// Requests a second.
    pub rps: f32,
    /// Errors a second.
    pub eps: f32,
}

/// A request that the estimator watches.
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    at: Duration,
    /// Units in flight on arrival, with its own.
    found: f32,
    /// Its own that wait for the first byte, in parts.
    parts: u32,
    started: bool,
}

/// Watches one model at one server.
#[derive(Debug, Default)]
pub struct Estimator {
    in_flight: AtomicU32,
    units: Units,
    /// Microseconds since the epoch at which the server last became busy or let a request go.
    since: AtomicU64,
    taking: AtomicBool,
    samples: AtomicU32,
    mean_found: Float,
    mean_ms: Float,
    spread: Float,
    together: Float,
    /// Busy milliseconds and units to a departure.
    busy_ms: Float,
    busy_units: Float,
    /// Microseconds since the epoch plus one from which on the server has been busy; 0 = idle.
    busy_from: AtomicU64,
    window_from: AtomicU64,
    window_busy_us: AtomicU64,
    window_finished: AtomicU32,
    window_failed: AtomicU32,
    utilization: Float,
    rps: Float,
    eps: Float,
}

impl Estimator {
    /// A request with so many units of work before its first byte arrives and goes on to the server.
    pub fn arrived(&self, units: f32, now: Duration) -> Watched {
        let ahead = self.units.get();
        let parts = self.units.add(units);
        if self.in_flight.fetch_add(1, Relaxed) == 0 {
            self.since.store(micros(now), Relaxed);
            self.busy_from.store(micros(now) + 1, Relaxed);
        }
        Watched { at: now, found: ahead + units, parts, started: false }
    }

    /// Its first byte has come: the work that it waited for is done. Returns how many milliseconds it took.
    pub fn started(&self, watched: &mut Watched, now: Duration) -> f32 {
        let waited_ms = millis(now.saturating_sub(watched.at));
        let parts = std::mem::take(&mut watched.parts);
        if std::mem::replace(&mut watched.started, true) {
            return waited_ms;
        }
        self.units.take(parts);
        let units = Units::of(parts);
        let since = self.since.swap(micros(now), Relaxed);
        let gap_us = micros(now).saturating_sub(since.max(1)) as f32;
        if self.taking.compare_exchange(false, true, Acquire, Relaxed).is_ok() {
            self.take_in(watched.found, waited_ms, gap_us / 1e3, units);
            self.taking.store(false, Release);
        }
        waited_ms
    }

    /// It is over, `failed` or not. A failure is no measurement: it would make a broken server look fast.
    pub fn finished(&self, mut watched: Watched, failed: bool, now: Duration) {
        if failed {
            self.units.take(std::mem::take(&mut watched.parts));
        } else {
            self.started(&mut watched, now);
        }
        self.window_finished.fetch_add(1, Relaxed);
        if failed {
            self.window_failed.fetch_add(1, Relaxed);
        }
        if self.in_flight.fetch_sub(1, Relaxed) == 1 {
            let from = self.busy_from.swap(0, Relaxed);
            if from != 0 {
                self.window_busy_us.fetch_add((micros(now) + 1).saturating_sub(from), Relaxed);
            }
        }
    }

    fn take_in(&self, found: f32, ms: f32, gap_ms: f32, units: f32) {
        let n = self.samples.load(Relaxed);
        self.samples.store(n.saturating_add(1), Relaxed);
        // The first samples count equally; later ones push the oldest out.
        let share = (1.0 / (n as f32 + 1.0)).max(1.0 / MEMORY);
        let (dx, dy) = (found - self.mean_found.get(), ms - self.mean_ms.get());
        self.mean_found.approach(found, share);
        self.mean_ms.approach(ms, share);
        // Welford's update with forgetting (West 1979).
        self.spread.set((1.0 - share) * (self.spread.get() + share * dx * dx));
        self.together.set((1.0 - share) * (self.together.get() + share * dx * dy));
        self.busy_ms.approach(gap_ms, share);
        self.busy_units.approach(units, share);
    }

    /// The cost, once there was a request.
    pub fn cost(&self) -> Option<Cost> {
        if self.samples.load(Relaxed) == 0 {
            return None;
        }
        let (x, y) = (self.mean_found.get().max(1e-3), self.mean_ms.get());
        let busy = self.busy_ms.get() / self.busy_units.get().max(1e-3);
        let lean = LEAN * x * x;
        let slope = (self.together.get() + lean * busy) / (self.spread.get() + lean);
        // Neither below zero: a slope of more than y/x would need a negative fixed cost.
        let unit_ms = slope.clamp(0.02 * y / x, y / x);
        Some(Cost { fixed_ms: (y - unit_ms * x).max(0.0), unit_ms })
    }

    /// Busy share, requests and errors a second, over the last full second.
    ///
    /// The busy share counts idle time exactly; a server that is never idle is told apart by its backlog beyond the
    /// usual wait, so that it may exceed 1 as `application_utilization` may.
    pub fn rates(&self, now: Duration) -> Rates {
        let (at, from) = (micros(now), self.window_from.load(Relaxed));
        let elapsed = at.saturating_sub(from);
        if elapsed >= WINDOW.as_micros() as u64
            && self.window_from.compare_exchange(from, at, Relaxed, Relaxed).is_ok()
        {
            let mut busy = self.window_busy_us.swap(0, Relaxed);
            let since = self.busy_from.load(Relaxed);
            if since != 0 && self.busy_from.compare_exchange(since, at + 1, Relaxed, Relaxed).is_ok() {
                busy += (at + 1).saturating_sub(since);
            }
            let per_second = 1e6 / elapsed as f32;
            let excess = self.mean_ms().map_or(0.0, |mean| (self.backlog_ms(now) - mean).max(0.0) / 1e3);
            self.utilization.set((busy as f32 / elapsed as f32).min(1.0) + excess);
            self.rps.set(self.window_finished.swap(0, Relaxed) as f32 * per_second);
            self.eps.set(self.window_failed.swap(0, Relaxed) as f32 * per_second);
        }
        Rates { utilization: self.utilization.get(), rps: self.rps.get(), eps: self.eps.get() }
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Units of work in flight that wait for their first byte.
    pub fn units(&self) -> f32 {
        self.units.get()
    }

    /// Milliseconds until the work in flight is done.
    pub fn backlog_ms(&self, _now: Duration) -> f32 {
        self.cost().map_or(0.0, |cost| cost.unit_ms * self.units.get())
    }

    /// The mean time to the first byte of the last requests.
    pub fn mean_ms(&self) -> Option<f32> {
        (self.samples.load(Relaxed) > 0).then(|| self.mean_ms.get())
    }

    /// How many requests have been measured.
    pub fn samples(&self) -> u32 {
        self.samples.load(Relaxed)
    }
}

fn millis(time: Duration) -> f32 {
    time.as_secs_f32() * 1e3
}
