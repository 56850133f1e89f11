//! What work costs at a server that can only be watched: arrivals, first bytes and completions of one model.
//!
//! Comes in: [`Estimator::arrived`], [`Estimator::started`], [`Estimator::finished`]. Goes out: a [`Cost`], a
//! [`Backlog`], the busy share. Whether the server takes requests one by one, in batches, several at a time or in steps
//! is told by nobody, so it is read off its departures. Answers that come together are a group; while the server is busy
//! the time from one group to the next is a sample of
//!
//! ```text
//! time of a group = fixed + unit × units of work in the group
//! ```
//!
//! and both are found by a least-squares line with exponential forgetting, neither below zero. A server that works one by
//! one has groups of one; one that works on `k` at a time has departures `k` times as often, so that `fixed + unit` is
//! what a request costs its throughput; a batching one has groups as large as its batches. The largest group of late is
//! taken for the most that fits into one.
//!
//! What runs now follows: at the last departure the server took the next group from what was in flight. So the time until
//! it is done is known, what has arrived since waits for the next group, and that group closes when this one is done.
//!
//! A server that works on several at a time is occupied by a request for a part of the time that it takes. Who comes while
//! nothing is there shows that: what it takes over what it costs is how many are served at once, and nothing is foretold
//! to take less than it would alone. Without that, a server that several clients happen to ask at the same moments would look
//! faster than an idle one, and the more it got the faster it would look. Where the model misses something else, the mean
//! difference between what requests took and what was foretold them is added.
//!
//! A sample that comes while another worker takes one in is dropped: it is one of many, and nobody waits.

use std::time::Duration;

use crate::cell::{AtomicBool, AtomicU32, AtomicU64, Float, Latch, Ordering, Units};
use crate::micros;
use Ordering::Relaxed;

/// Groups, and requests, over which the past is forgotten.
const MEMORY: f32 = 32.0;
/// And seconds of idleness: who is asked seldom is not held slow for ever because it was once.
const MEMORY_S: f32 = 32.0;
/// Answers closer together than this belong together, at least.
const TOGETHER_MS: f32 = 0.25;
/// And than this share of the time of a group.
const TOGETHER: f32 = 0.05;
/// More than so many at once are not told apart.
pub(crate) const MOST_AT_ONCE: f32 = 64.0;
/// A sample by itself counts at most as so many times what the line has for it (or as 1 ms): a server that stood still once, and is well again, is
/// not held slow for many requests more. The next such sample counts whole: it has become slow.
const OUTLIER: f32 = 8.0;
/// How strongly the line leans on its prior (half of the time is fixed), against a spread of its own size.
const LEAN: f32 = 0.02;
/// The window of the busy share and the rates.
const WINDOW: Duration = Duration::from_secs(1);

/// The two-parameter cost of one model's work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Milliseconds to a group, however large: to a request, where they are served one by one.
    pub fixed_ms: f32,
    /// Milliseconds to a unit of work.
    pub unit_ms: f32,
}

impl Cost {
    /// Milliseconds for so many units of work.
    pub fn of(&self, units: f32) -> f32 {
        self.fixed_ms + self.unit_ms * units
    }

    /// The same for a request that comes alone to a server that serves so many at once: it takes no less than one of the usual size
    /// does. What a larger one takes beyond its cost, nobody has seen.
    pub(crate) fn alone(&self, units: f32, at_once: f32, usual_units: f32) -> f32 {
        self.of(units).max(at_once * self.of(units.min(usual_units)))
    }
}

/// What is in flight, in time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Backlog {
    /// Milliseconds until all work in flight is done.
    pub drains_ms: f32,
    /// Milliseconds until the group that new work joins begins.
    pub closes_ms: f32,
    /// Units that it still takes.
    pub room: f32,
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
    /// Nothing for the first.
    foretold_ms: Option<f32>,
    /// Its work that waits for the first byte, in parts.
    parts: u32,
    /// Nothing waited for its first byte when it came.
    alone: bool,
    started: bool,
}

/// Watches one model at one server.
#[derive(Debug, Default)]
pub struct Estimator {
    in_flight: AtomicU32,
    /// Waiting for the first byte: requests and units.
    pending: AtomicU32,
    units: Units,
    line: Line,
    taking: Latch,
    /// Microseconds since the epoch of the last departure, or of becoming busy: since then the running group runs.
    since: AtomicU64,
    running: Float,
    /// The last group to depart: what has gone of it, what should follow at once, and how long it took.
    gone: Float,
    leaving: Float,
    took_ms: Float,
    largest: Float,
    /// What requests took that came while nothing waited for its first byte.
    alone: Line,
    beyond_ms: Float,
    samples: AtomicU32,
    mean_ms: Float,
    /// Microseconds since the epoch plus one from which on the server has been busy; 0 = idle.
    busy_from: AtomicU64,
    window_from: AtomicU64,
    window_busy_us: AtomicU64,
    window_units: Units,
    window_finished: AtomicU32,
    window_failed: AtomicU32,
    utilization: Float,
    rps: Float,
    eps: Float,
}

/// A least-squares line that forgets.
#[derive(Debug, Default)]
struct Line {
    /// Whether there was a sample.
    begun: AtomicBool,
    /// How many samples what is known counts as.
    weight: Float,
    /// How well the last outlier is remembered; 1 = it was the last sample.
    outlier: Float,
    x: Float,
    y: Float,
    xx: Float,
    xy: Float,
}

impl Line {
    fn take_in(&self, x: f32, took_ms: f32) {
        let most = self.cost().map_or(took_ms, |cost| (OUTLIER * cost.of(x)).max(1.0));
        let by_itself = self.outlier.get() < 0.5;
        let y = if by_itself { took_ms.min(most) } else { took_ms };
        self.outlier.set(if took_ms > most { 1.0 } else { self.outlier.get() * (1.0 - 1.0 / MEMORY) });
        self.begun.store(true, Relaxed);
        // The first samples count equally; later ones push the oldest out. Welford's update with forgetting (West 1979).
        let weight = self.weight.get().min(MEMORY - 1.0);
        let share = 1.0 / (weight + 1.0);
        self.weight.set(weight + 1.0);
        let (dx, dy) = (x - self.x.get(), y - self.y.get());
        self.x.approach(x, share);
        self.y.approach(y, share);
        self.xx.set((1.0 - share) * (self.xx.get() + share * dx * dx));
        self.xy.set((1.0 - share) * (self.xy.get() + share * dx * dy));
    }

    /// The server was idle for so long.
    fn rest(&self, seconds: f32) {
        self.weight.set(self.weight.get() * (-seconds / MEMORY_S).exp());
    }

    fn cost(&self) -> Option<Cost> {
        if !self.begun.load(Relaxed) {
            return None;
        }
        let (x, y) = (self.x.get().max(1e-3), self.y.get());
        let lean = LEAN * x * x;
        let slope = (self.xy.get() + lean * 0.5 * y / x) / (self.xx.get() + lean);
        // A slope of more than y/x would need a fixed cost below zero.
        let unit_ms = slope.clamp(0.05 * y / x, y / x);
        Some(Cost { fixed_ms: (y - unit_ms * x).max(0.0), unit_ms })
    }
}

impl Estimator {
    /// A request with so many units of work before its first byte arrives and goes on to the server.
    pub fn arrived(&self, units: f32, now: Duration) -> Watched {
        let foretold_ms = self.cost().map(|cost| self.foretell(cost, units, now));
        let alone = self.pending.fetch_add(1, Relaxed) == 0;
        if alone {
            self.taking.try_with(|| {
                self.group_is_over();
                let idle_s = self.since_ms(now) / 1e3;
                self.line.rest(idle_s);
                self.alone.rest(idle_s);
                self.since.store(micros(now), Relaxed);
                self.running.set(units);
                self.gone.set(0.0);
            });
        }
        let parts = self.units.add(units);
        if self.in_flight.fetch_add(1, Relaxed) == 0 {
            self.busy_from.store(micros(now) + 1, Relaxed);
        }
        Watched { at: now, foretold_ms, parts, alone, started: false }
    }

    /// Its first byte has come: the work that it waited for is done. Returns how many milliseconds it took.
    pub fn started(&self, watched: &mut Watched, now: Duration) -> f32 {
        let waited_ms = millis(now.saturating_sub(watched.at));
        if std::mem::replace(&mut watched.started, true) {
            return waited_ms;
        }
        let parts = std::mem::take(&mut watched.parts);
        self.units.take(parts);
        self.taking.try_with(|| {
            if watched.alone && parts > 0 {
                self.took_alone(Units::of(parts), waited_ms);
            }
            self.departed(Units::of(parts), now);
            self.waited(waited_ms, watched.foretold_ms);
        });
        self.pending.fetch_sub(1, Relaxed);
        waited_ms
    }

    /// It is over, `failed` or not. A failure is no measurement: it would make a broken server look fast.
    pub fn finished(&self, mut watched: Watched, failed: bool, now: Duration) {
        if failed && !watched.started {
            self.units.take(watched.parts);
            self.pending.fetch_sub(1, Relaxed);
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

    /// The last group that departed is complete: a sample.
    fn group_is_over(&self) {
        let gone = self.gone.get();
        if gone > 0.0 {
            self.line.take_in(gone, self.took_ms.get());
            // A group that was larger once is forgotten over some hundreds of groups.
            let largest = self.largest.get();
            self.largest.set(if gone >= largest { gone } else { largest + (gone - largest) * 0.002 });
        }
    }

    fn departed(&self, units: f32, now: Duration) {
        self.window_units.add(units);
        let since_ms = self.since_ms(now);
        let gone = self.gone.get();
        if gone > 0.0 && since_ms < self.together_ms() {
            self.gone.set(gone + units);
            self.leaving.set((self.leaving.get() - units).max(0.0));
        } else {
            self.group_is_over();
            self.took_ms.set(since_ms);
            self.gone.set(units);
            self.leaving.set((self.running.get() - units).max(0.0));
            self.since.store(micros(now), Relaxed);
        }
        let left = (self.units.get() - self.leaving.get()).max(0.0);
        self.running.set(left.min(self.fits()));
    }

    /// Who came behind it may have slowed it down: what it took with them says only that it takes no more alone.
    fn took_alone(&self, units: f32, ms: f32) {
        let known_ms = self.alone.cost().map(|alone| alone.of(units));
        let with_others = self.pending.load(Relaxed) > 1;
        self.alone.take_in(units, known_ms.filter(|_| with_others).map_or(ms, |known_ms| ms.min(known_ms)));
    }

    fn waited(&self, ms: f32, foretold_ms: Option<f32>) {
        let n = self.samples.load(Relaxed);
        self.samples.store(n.saturating_add(1), Relaxed);
        let share = (1.0 / (n as f32 + 1.0)).max(1.0 / (2.0 * MEMORY));
        self.mean_ms.approach(ms, share);
        if let Some(foretold_ms) = foretold_ms {
            self.beyond_ms.approach(ms - foretold_ms, share);
        }
    }

    fn since_ms(&self, now: Duration) -> f32 {
        micros(now).saturating_sub(self.since.load(Relaxed)) as f32 / 1e3
    }

    fn together_ms(&self) -> f32 {
        TOGETHER_MS.max(TOGETHER * self.took_ms.get())
    }

    /// The most units in a group.
    fn fits(&self) -> f32 {
        self.largest.get().max(self.gone.get()).max(1.0)
    }

    /// The cost, once there was a request.
    pub fn cost(&self) -> Option<Cost> {
        // The very first group is a sample before it is known to be complete.
        self.line.cost().or_else(|| {
            let (gone, took_ms) = (self.gone.get(), self.took_ms.get());
            (gone > 0.0).then(|| Cost { fixed_ms: took_ms / 2.0, unit_ms: took_ms / gone / 2.0 })
        })
    }

    /// Milliseconds until all that is in flight now is done, and what comes with it.
    pub fn backlog(&self, now: Duration) -> Backlog {
        let (Some(cost), units, fits) = (self.cost(), self.units.get(), self.fits()) else {
            return Backlog { room: self.fits(), ..Backlog::default() };
        };
        if units <= 0.0 {
            return Backlog { room: fits, ..Backlog::default() };
        }
        let elapsed = self.since_ms(now);
        let leaving = if elapsed < self.together_ms() { self.leaving.get() } else { 0.0 };
        let running = self.running.get().min(units);
        let expected = cost.of(running);
        // What should be over and is not will take as long again (Lindy): a server that stands still is found out.
        let rest = if running <= 0.0 { 0.0 } else { (expected - elapsed).abs() };
        let queued = (units - running - leaving).max(0.0);
        let full = (queued / fits).floor();
        let open = queued - full * fits;
        let closes_ms = rest + full * cost.of(fits);
        let drains_ms = closes_ms + if open > 0.0 { cost.of(open) } else { 0.0 };
        Backlog { drains_ms, closes_ms, room: fits - open }
    }

    /// Milliseconds until so many units of work that arrive now are done.
    pub fn predict(&self, units: f32, now: Duration) -> f32 {
        self.cost().map_or(0.0, |cost| self.foretell(cost, units, now))
    }

    fn foretell(&self, cost: Cost, units: f32, now: Duration) -> f32 {
        self.backlog(now).with(cost, units).max(self.alone_ms(cost, units))
    }

    /// Milliseconds that so many units would take alone, at such a cost.
    pub(crate) fn alone_ms(&self, cost: Cost, units: f32) -> f32 {
        cost.alone(units, self.at_once_at(cost), self.alone.x.get())
    }

    /// How many requests are served at once: what one takes that comes alone over what it costs. 1: one by one, or in batches.
    pub fn at_once(&self) -> f32 {
        self.cost().map_or(1.0, |cost| self.at_once_at(cost))
    }

    fn at_once_at(&self, cost: Cost) -> f32 {
        let Some(alone) = self.alone.cost() else { return 1.0 };
        let usual = self.alone.x.get();
        (alone.of(usual) / cost.of(usual).max(f32::MIN_POSITIVE)).clamp(1.0, MOST_AT_ONCE)
    }

    /// Milliseconds that answers take beyond what the model of groups foretells.
    pub fn beyond_ms(&self) -> f32 {
        self.beyond_ms.get().max(0.0)
    }

    /// Busy share, requests and errors a second, over the last full second.
    ///
    /// The busy share is the smaller of the time in which there was work and of the work over what full groups would
    /// do, so that requests a second over the share are what the server can do, as gRFC A58 wants it. A queue that is
    /// longer than usual adds to it.
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
            let units = self.window_units.drain();
            let ideal = self
                .cost()
                .map_or(f32::INFINITY, |cost| units / self.fits() * cost.of(self.fits()) * per_second / 1e3);
            let excess = (self.backlog(now).drains_ms - 2.0 * self.mean_ms.get()).max(0.0) / 1e3;
            self.utilization.set((busy as f32 / elapsed as f32).min(1.0).min(ideal) + excess);
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

    /// The mean time to the first byte of the last requests.
    pub fn mean_ms(&self) -> Option<f32> {
        (self.samples.load(Relaxed) > 0).then(|| self.mean_ms.get())
    }

    /// How many requests have been measured.
    pub fn samples(&self) -> u32 {
        self.samples.load(Relaxed)
    }
}

impl Backlog {
    /// Milliseconds until so many units of work would be done behind this, beyond what the model knows not counted.
    pub fn with(&self, cost: Cost, units: f32) -> f32 {
        // Work joins the open group if there is one with room; otherwise it begins a group of its own.
        let joins = self.drains_ms > self.closes_ms && units <= self.room;
        self.drains_ms + if joins { 0.0 } else { cost.fixed_ms } + cost.unit_ms * units
    }
}

fn millis(time: Duration) -> f32 {
    time.as_secs_f32() * 1e3
}
