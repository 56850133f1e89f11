//! Numbers that several workers read and write at once, without a lock.
//!
//! Under `--cfg loom` the atomics are loom's, so that the tests of the orderings try every interleaving.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use Ordering::Relaxed;

/// An `f32` that workers share. Never a NaN unless [`Told`] makes one of it.
#[derive(Debug)]
pub(crate) struct Float(AtomicU32);

impl Float {
    pub(crate) fn new(value: f32) -> Self {
        Self(AtomicU32::new(value.to_bits()))
    }

    pub(crate) fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Relaxed))
    }

    pub(crate) fn set(&self, value: f32) {
        self.0.store(value.to_bits(), Relaxed);
    }

    /// Moves towards `value` by `share` of the way. Of two workers that do it at once one may be forgotten, which an
    /// average can bear.
    pub(crate) fn approach(&self, value: f32, share: f32) {
        let before = self.get();
        self.set(before + (value - before) * share);
    }
}

impl Default for Float {
    fn default() -> Self {
        Self::new(0.0)
    }
}

/// An `f32` that may not have been told; a NaN inside means so.
#[derive(Debug)]
pub(crate) struct Told(Float);

impl Default for Told {
    fn default() -> Self {
        Self(Float::new(f32::NAN))
    }
}

impl Told {
    pub(crate) fn get(&self) -> Option<f32> {
        Some(self.0.get()).filter(|value| !value.is_nan())
    }

    pub(crate) fn set(&self, value: Option<f32>) {
        self.0.set(value.unwrap_or(f32::NAN));
    }
}

/// Units of work in flight: sixteenths in a whole number, so that what goes in comes out again exactly.
#[derive(Debug, Default)]
pub(crate) struct Units(AtomicU64);

pub(crate) const SIXTEENTHS: f32 = 16.0;

impl Units {
    /// Adds; returns what must be taken off again.
    pub(crate) fn add(&self, units: f32) -> u32 {
        let parts = (units.max(0.0) * SIXTEENTHS) as u32;
        self.0.fetch_add(u64::from(parts), Relaxed);
        parts
    }

    /// What `parts` are in units.
    pub(crate) fn of(parts: u32) -> f32 {
        parts as f32 / SIXTEENTHS
    }

    pub(crate) fn take(&self, parts: u32) {
        self.0.fetch_sub(u64::from(parts), Relaxed);
    }

    /// In parts.
    pub(crate) fn parts(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Takes everything.
    pub(crate) fn drain(&self) -> f32 {
        self.0.swap(0, Relaxed) as f32 / SIXTEENTHS
    }

    pub(crate) fn get(&self) -> f32 {
        self.0.load(Relaxed) as f32 / SIXTEENTHS
    }
}

/// Lets one worker at a time write what belongs together. Who comes second is turned away, and does not wait.
#[derive(Debug, Default)]
pub(crate) struct Latch(AtomicBool);

impl Latch {
    /// Runs `work` if nobody else is at it, who has seen everything that the last one wrote; says whether it ran.
    pub(crate) fn try_with(&self, work: impl FnOnce()) -> bool {
        let free = self.0.compare_exchange(false, true, Ordering::Acquire, Relaxed).is_ok();
        if free {
            work();
            self.0.store(false, Ordering::Release);
        }
        free
    }
}

/// `make loom`
#[cfg(all(test, loom))]
mod interleavings {
    use ::loom::sync::Arc;
    use ::loom::thread;

    use super::*;

    /// Two that add to the same number under a latch lose none of what they were let in for.
    #[test]
    fn loom_who_is_let_in_sees_what_the_last_one_wrote() {
        ::loom::model(|| {
            let shared = Arc::new((Latch::default(), Float::default()));
            let add =
                |shared: &(Latch, Float)| u32::from(shared.0.try_with(|| shared.1.set(shared.1.get() + 1.0)));
            let other = {
                let shared = Arc::clone(&shared);
                thread::spawn(move || add(&shared) + add(&shared))
            };
            let here = add(&shared);
            let there = other.join().unwrap();
            assert!(here + there >= 1);
            assert_eq!(shared.1.get(), (here + there) as f32);
        });
    }

    /// What goes into the units in flight comes out again, in every order.
    #[test]
    fn loom_units_come_out_again() {
        ::loom::model(|| {
            let units = Arc::new(Units::default());
            let other = {
                let units = Arc::clone(&units);
                thread::spawn(move || units.take(units.add(3.0)))
            };
            let parts = units.add(2.5);
            let seen = units.get();
            assert!(seen == 2.5 || seen == 5.5, "{seen}");
            units.take(parts);
            other.join().unwrap();
            assert_eq!(units.get(), 0.0);
        });
    }
}
