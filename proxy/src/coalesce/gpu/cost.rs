//! Whether a GPU's memory is the faster way to the model server. Pure: time and chance are arguments.
//!
//! In: how long executions took that went either way, by their size. Out: which way the next of that size goes. Each way is
//! measured [`LEAST`] times before one of them is preferred, in turns; from then on the slower is tried now and then, more
//! often when its last measurement is old, so that a way that has become the faster one is noticed.
//!
//! What is measured is the whole execution, from the tensors as they came to the answer: what a copy to the GPU saves is
//! saved in the server. So the model's own time and its queue are in both figures, and noise; that is why a mean over some
//! tens of executions is compared, and why the GPU has to be faster by [`MARGIN`] to be preferred: it costs the model a
//! share of its GPU that no clock here sees.

use std::time::Duration;

/// Measurements of each way before one is preferred.
pub const LEAST: u32 = 8;
/// By how much the GPU's way has to be faster.
pub const MARGIN: f64 = 0.03;
/// How often the slower way is tried.
const EXPLORED: f64 = 0.02;
/// And how often if it was not measured for [`OLD`].
const EXPLORED_OLD: f64 = 0.2;
/// When a measurement is old.
const OLD: Duration = Duration::from_secs(60);
/// The share of a new measurement in the mean, if the one before it is not long ago.
const SHARE: f64 = 1.0 / 16.0;
/// After so long a silence what was measured before counts no more than half.
const FADES: Duration = Duration::from_secs(10);
/// A measurement counts as no more than so many times the mean: one stall of the server says nothing of the way.
const OUTLIER: f64 = 4.0;
/// Sizes are told apart by their power of two, from 16 KiB: below, no memory is shared at all.
const SMALLEST: u32 = 14;
const SIZES: usize = 16;

/// A way to the model server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Shared memory of the host, or bytes.
    Host,
    /// Memory of the GPU.
    Device,
}

/// What one way took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Measured {
    seconds: f64,
    count: u32,
    at: Duration,
}

impl Measured {
    fn add(&mut self, seconds: f64, now: Duration) {
        let silence = now.saturating_sub(self.at).as_secs_f64() / FADES.as_secs_f64();
        self.count = self.count.saturating_add(1);
        self.at = now;
        if self.count == 1 {
            self.seconds = seconds;
            return;
        }
        let seconds = seconds.min(self.seconds * OUTLIER);
        let share = SHARE.max(1.0 / f64::from(self.count)).max(silence.min(1.0) / 2.0);
        self.seconds += (seconds - self.seconds) * share;
    }
}

/// What is known of one model on one server.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost([[Measured; 2]; SIZES]);

fn size(bytes: usize) -> usize {
    let power = usize::BITS - bytes.max(1).leading_zeros() - 1;
    (power.saturating_sub(SMALLEST) as usize).min(SIZES - 1)
}

impl Cost {
    /// Which way an execution of so many bytes goes. `chance` is between 0 and 1.
    pub fn choose(&self, bytes: usize, now: Duration, chance: f64) -> Way {
        let [host, device] = &self.0[size(bytes)];
        // In turns, the known way first.
        if host.count.min(device.count) < LEAST {
            return if device.count < host.count { Way::Device } else { Way::Host };
        }
        let device_is_faster = device.seconds < host.seconds * (1.0 - MARGIN);
        let (better, other, measured) = match device_is_faster {
            true => (Way::Device, Way::Host, host),
            false => (Way::Host, Way::Device, device),
        };
        let old = now.saturating_sub(measured.at) >= OLD;
        if chance < if old { EXPLORED_OLD } else { EXPLORED } { other } else { better }
    }

    /// An execution of so many bytes took so long.
    pub fn took(&mut self, bytes: usize, way: Way, took: Duration, now: Duration) {
        self.0[size(bytes)][way as usize].add(took.as_secs_f64(), now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng as _, SeedableRng as _};

    const MIB: usize = 1 << 20;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// A thousand executions, one each tenth of a second; how many of the second half went over the GPU.
    fn simulate(seed: u64, took: impl Fn(Way, f64) -> f64) -> u32 {
        let mut random = SmallRng::seed_from_u64(seed);
        let (mut cost, mut over_gpu) = (Cost::default(), 0);
        for nth in 0..1000 {
            let now = at(f64::from(nth) * 0.1);
            let way = cost.choose(MIB, now, random.random());
            let seconds = took(way, f64::from(nth)) * (0.7 + 0.6 * random.random::<f64>());
            cost.took(MIB, way, at(seconds), now);
            over_gpu += u32::from(nth >= 500 && way == Way::Device);
        }
        over_gpu
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_is_tried_now_and_then() {
        for seed in 0..20 {
            let slower = simulate(seed, |way, _| if way == Way::Device { 0.012 } else { 0.010 });
            assert!((1..50).contains(&slower), "seed {seed}: {slower} of 500 over a slower GPU");
            let faster = simulate(seed, |way, _| if way == Way::Device { 0.008 } else { 0.010 });
            assert!((450..500).contains(&faster), "seed {seed}: {faster} of 500 over a faster GPU");
        }
    }

    #[test]
    fn a_way_that_becomes_the_faster_one_is_noticed() {
        for seed in 0..20 {
            let found = simulate(seed, |way, nth| match way {
                Way::Host => 0.010,
                Way::Device if nth < 100.0 => 0.020,
                Way::Device => 0.003,
            });
            assert!(found > 250, "seed {seed}: {found} of 500");
        }
    }

    #[test]
    fn both_are_measured_in_turns_first_and_an_equal_gpu_is_left_alone() {
        let mut cost = Cost::default();
        for nth in 0..2 * LEAST {
            let way = if nth % 2 == 0 { Way::Host } else { Way::Device };
            assert_eq!(cost.choose(MIB, at(1.0), 0.999), way);
            cost.took(MIB, way, at(0.010), at(1.0));
        }
        assert_eq!(cost.choose(MIB, at(1.0), 0.999), Way::Host);
        assert_eq!(cost.choose(MIB, at(1.0), 0.0), Way::Device, "tried now and then");
        assert_eq!(cost.choose(MIB, at(1.0), 0.1), Way::Host);
        assert_eq!(cost.choose(MIB, at(100.0), 0.1), Way::Device, "more often when it is long ago");
    }

    #[test]
    fn sizes_are_apart_and_one_stall_says_nothing() {
        let mut cost = Cost::default();
        for _ in 0..LEAST {
            for (bytes, device) in [(64 << 10, 0.020), (8 * MIB, 0.005)] {
                cost.took(bytes, Way::Host, at(0.010), at(1.0));
                cost.took(bytes, Way::Device, at(device), at(1.0));
            }
        }
        cost.took(8 * MIB, Way::Device, at(30.0), at(1.0));
        assert_eq!(cost.choose(64 << 10, at(1.0), 0.5), Way::Host);
        assert_eq!(cost.choose(8 * MIB, at(1.0), 0.5), Way::Device);
        assert_eq!((size(0), size(16 << 10), size(usize::MAX)), (0, 0, SIZES - 1));
    }
}
