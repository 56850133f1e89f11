//! How many requests the application gets at once. Pure.
//!
//! Declared, or found out: the gradient method of Netflix's *concurrency-limits* (`Gradient2Limit`, 2018), which Envoy's
//! adaptive concurrency filter uses too. As long as answers take no longer than [`TOLERANCE`] times what they take on an
//! idle application, the limit grows by the square root of itself; when they take longer, it shrinks in proportion:
//!
//! ```text
//! gradient = clamp(TOLERANCE × unloaded / observed, 0.5, 1)
//! next     = limit × gradient + √limit        smoothed by a fifth
//! ```
//!
//! It settles where observed = TOLERANCE × unloaded × limit / (limit − √limit). A tolerance above 1 is what leaves a batching
//! server room to batch: its answers take longer the more it has at once, and it is the better for it. What the originals
//! measure as the unloaded time (a long average; a probe at concurrency 3 that costs throughput) is here what the
//! caller predicts for a request of that much work, where he can, since requests to models differ in size by orders of
//! magnitude; else the shortest time of the last [`MEMORY`], in the way of BBR (Cardwell et al., ACM Queue 2016).

use std::time::Duration;

/// How much longer than on an idle application answers may take.
pub const TOLERANCE: f64 = 2.0;
/// Answers are looked at together for so long at least, and until there are [`SAMPLES`].
pub const WINDOW: Duration = Duration::from_millis(100);
/// One answer says little.
pub const SAMPLES: u32 = 10;
/// How much of a step is taken at once.
const SMOOTHING: f64 = 0.2;
/// How far back the shortest time is remembered: at least half, at most all of it. Under an overload that never pauses for
/// so long it becomes that of the overload, and the limit drifts up to its end; a prediction, or a declared limit, keeps
/// it from that. The originals keep it by probes, which cost a server of long requests seconds of its throughput.
pub const MEMORY: Duration = Duration::from_secs(600);

/// A limit.
#[derive(Clone, Debug)]
pub enum Limit {
    /// As declared.
    Fixed(u32),
    /// Found out.
    Adaptive(Adaptive),
}

impl Limit {
    /// The limit now, at least one.
    pub fn now(&self) -> u32 {
        match self {
            Self::Fixed(limit) => (*limit).max(1),
            Self::Adaptive(adaptive) => adaptive.now(),
        }
    }

    /// Whether it wants to know how long answers take.
    pub fn is_adaptive(&self) -> bool {
        matches!(self, Self::Adaptive(_))
    }

    /// Takes in a window of answers.
    pub fn step(&mut self, window: &Window, now: Duration) {
        if let Self::Adaptive(adaptive) = self {
            adaptive.step(window, now);
        }
    }
}

/// Requests that were answered well. Failures say nothing about how busy the application is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    /// Those of which it was known what they take on an idle application: what they took together, and that.
    pub known: Duration,
    /// What they would have taken on an idle application.
    pub unloaded: Duration,
    /// The others: how many,
    pub unknown_count: u32,
    /// and what they took together.
    pub unknown: Duration,
    /// The shortest of all.
    pub shortest: Duration,
    /// The most that were in flight.
    pub most: u32,
}

impl Window {
    /// Adds an answer that took `took` among `in_flight`; `unloaded`: what it takes on an idle application, if that is
    /// known.
    pub fn add(&mut self, took: Duration, unloaded: Option<Duration>, in_flight: u32) {
        let first = self.known.is_zero() && self.unknown_count == 0;
        self.shortest = if first { took } else { self.shortest.min(took) };
        self.most = self.most.max(in_flight);
        match unloaded.filter(|unloaded| !unloaded.is_zero()) {
            Some(unloaded) => {
                self.known = self.known.saturating_add(took);
                self.unloaded = self.unloaded.saturating_add(unloaded);
            }
            None => {
                self.unknown_count += 1;
                self.unknown = self.unknown.saturating_add(took);
            }
        }
    }
}

/// Finds out.
#[derive(Clone, Debug)]
pub struct Adaptive {
    limit: f64,
    range: (f64, f64),
    /// The shortest time, in seconds, of this half of the memory and of the half before.
    shortest: [Option<f64>; 2],
    half_since: Duration,
}

impl Adaptive {
    /// Begins at `start`, and stays within `least` and `most`.
    pub fn new(start: u32, least: u32, most: u32) -> Self {
        let least = f64::from(least.max(1));
        let range = (least, f64::from(most).max(least));
        let limit = f64::from(start).clamp(range.0, range.1);
        Self { limit, range, shortest: [None; 2], half_since: Duration::ZERO }
    }

    /// The limit now.
    pub fn now(&self) -> u32 {
        self.limit as u32
    }

    fn step(&mut self, window: &Window, now: Duration) {
        let shortest = self.remember(window.shortest.as_secs_f64(), now);
        let observed = window.known.as_secs_f64() + window.unknown.as_secs_f64();
        let unloaded = window.unloaded.as_secs_f64() + f64::from(window.unknown_count) * shortest;
        if observed <= 0.0 {
            return;
        }
        let gradient = (TOLERANCE * unloaded / observed).clamp(0.5, 1.0);
        let next = self.limit * gradient + self.limit.sqrt();
        // What was never used proves nothing: a quiet hour must not raise the limit.
        if next > self.limit && f64::from(window.most) < self.limit / 2.0 {
            return;
        }
        self.limit = (self.limit + SMOOTHING * (next - self.limit)).clamp(self.range.0, self.range.1);
    }

    fn remember(&mut self, took: f64, now: Duration) -> f64 {
        if now.saturating_sub(self.half_since) >= MEMORY / 2 {
            self.shortest = [None, self.shortest[0]];
            self.half_since = now;
        }
        let shortest = self.shortest.into_iter().flatten().fold(took, f64::min);
        self.shortest[0] = Some(self.shortest[0].map_or(took, |known| known.min(took)));
        shortest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests come as fast as the limit lets them; an answer takes what the server needs for `in_flight` at once.
    fn settled(server: impl Fn(f64) -> f64, predicted: bool, demand: u32) -> u32 {
        let mut limit = Limit::Adaptive(Adaptive::new(4, 1, 1000));
        let mut now = Duration::ZERO;
        for _ in 0..2_000 {
            let in_flight = limit.now().min(demand);
            let took = Duration::from_secs_f64(server(f64::from(in_flight)));
            let unloaded = predicted.then(|| Duration::from_secs_f64(server(1.0)));
            let mut window = Window::default();
            for _ in 0..SAMPLES {
                now += took / in_flight;
                window.add(took, unloaded, in_flight);
            }
            limit.step(&window, now);
        }
        limit.now()
    }

    #[test]
    fn a_server_that_does_k_at_once_gets_about_what_doubles_its_time() {
        // 8 at once, 20 ms each; more wait.
        let server = |n: f64| 0.02 * (n / 8.0).max(1.0);
        let limit = settled(server, true, u32::MAX);
        assert!((16..=30).contains(&limit), "{limit}");
    }

    #[test]
    fn a_server_that_batches_gets_batches() {
        // 10 ms and 0.2 ms a row: at the tolerance it has fifty at once.
        let server = |n: f64| 0.01 + 0.0002 * n;
        let limit = settled(server, true, u32::MAX);
        assert!((50..=80).contains(&limit), "{limit}");
    }

    #[test]
    fn a_limit_that_is_never_reached_does_not_grow() {
        assert!(settled(|_| 0.01, true, 3) <= 8, "{}", settled(|_| 0.01, true, 3));
    }

    #[test]
    fn it_stays_within_its_range_whatever_comes() {
        let mut limit = Limit::Adaptive(Adaptive::new(10, 4, 20));
        for i in 0..1_000_u32 {
            let took = if i < 500 { Duration::MAX / 2 } else { Duration::from_nanos(1) };
            let mut window = Window::default();
            window.add(took, Some(Duration::from_millis(1)), 20);
            limit.step(&window, Duration::from_millis(u64::from(i) * 20));
            assert!((4..=20).contains(&limit.now()), "{}", limit.now());
        }
        limit.step(&Window::default(), Duration::from_secs(60));
        assert_eq!(limit.now(), 20);
        assert_eq!(Limit::Fixed(0).now(), 1, "none at all would never end");
    }

    #[test]
    fn without_a_prediction_the_shortest_time_of_late_stands_for_it() {
        let limit = settled(|n| 0.02 * (n / 8.0).max(1.0), false, u32::MAX);
        assert!((16..=30).contains(&limit), "{limit}");
    }
}
