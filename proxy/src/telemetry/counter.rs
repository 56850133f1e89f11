//! A count over all workers, for what is counted too rarely to have cells of its own.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts on, and returns the new count.
    pub fn add(&self, count: u64) -> u64 {
        self.0.fetch_add(count, Relaxed) + count
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}
