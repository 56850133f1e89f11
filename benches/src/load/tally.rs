//! What a load run counts. Answers outside the measured window are not recorded.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use tokio::time::Instant;

use crate::tokens::Arrived;

/// Three digits up to a minute.
const HIGHEST_US: u64 = 60_000_000;

/// Counts of one run, shared by its connections.
pub(crate) struct Tally {
    measuring: Cell<bool>,
    latency: RefCell<Histogram<u64>>,
    stretch: RefCell<Histogram<u64>>,
    bytes: Cell<u64>,
    errors: Cell<u64>,
    first_error: RefCell<Option<String>>,
}

impl Tally {
    /// Nothing counted, not measuring yet.
    pub(crate) fn new() -> Result<Self> {
        let histogram = || Histogram::new_with_bounds(1, HIGHEST_US, 3).context("the histogram");
        Ok(Self {
            measuring: Cell::new(false),
            latency: RefCell::new(histogram()?),
            stretch: RefCell::new(histogram()?),
            bytes: Cell::new(0),
            errors: Cell::new(0),
            first_error: RefCell::new(None),
        })
    }

    /// Opens or closes the measured window.
    pub(crate) fn measure(&self, on: bool) {
        self.measuring.set(on);
    }

    /// An answer to a request that began (or was due) at `began` and carried `body` bytes.
    pub(crate) fn answered(&self, began: Instant, status: u16, body: usize) {
        if status != 200 {
            return self.failed(|| format!("answered with status {status}"));
        }
        if self.measuring.get() {
            self.record(began.elapsed());
            self.bytes.set(self.bytes.get() + body as u64);
        }
    }

    /// A token, which counts as a request.
    pub(crate) fn token(&self, arrived: Arrived) {
        if self.measuring.get() {
            self.record(arrived.way);
            self.stretch.borrow_mut().saturating_record(micros(arrived.stretch));
        }
    }

    /// A request that was due at `due` and never answered: its wait so far still counts as latency.
    pub(crate) fn lost(&self, due: Instant) {
        if self.measuring.get() {
            self.record(due.elapsed());
        }
    }

    /// A request or a connection failed.
    pub(crate) fn failed(&self, why: impl FnOnce() -> String) {
        if self.measuring.get() {
            self.errors.set(self.errors.get() + 1);
        }
        self.first_error.borrow_mut().get_or_insert_with(why);
    }

    fn record(&self, latency: Duration) {
        self.latency.borrow_mut().saturating_record(micros(latency));
    }

    /// Requests answered inside the window.
    pub(crate) fn requests(&self) -> u64 {
        self.latency.borrow().len()
    }

    /// The latency at quantile `q`, in microseconds.
    pub(crate) fn quantile_us(&self, q: f64) -> f64 {
        self.latency.borrow().value_at_quantile(q) as f64
    }

    /// By how much the way stretched the gaps between tokens, at quantile `q`, in microseconds.
    pub(crate) fn stretch_us(&self, q: f64) -> f64 {
        self.stretch.borrow().value_at_quantile(q) as f64
    }

    /// Bytes of request bodies.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Failures inside the window, and the first one ever seen.
    pub(crate) fn errors(&self) -> (u64, Option<String>) {
        (self.errors.get(), self.first_error.borrow().clone())
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(HIGHEST_US).max(1)
}
