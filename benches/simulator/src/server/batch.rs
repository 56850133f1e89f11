//! A tensor model: the oldest requests that fit run as one batch, which takes `fixed + per_row × rows`.

use std::collections::VecDeque;

use rand::rngs::SmallRng;

use super::{Clock, Did, Job, Nanos};
use crate::random::log_normal;

/// What a batch costs.
#[derive(Clone, Copy, Debug)]
pub struct BatchCost {
    /// Nanoseconds to a batch.
    pub fixed: f64,
    /// Nanoseconds to a row.
    pub per_row: f64,
    /// The most rows in a batch.
    pub max_rows: f32,
    /// Spread of a batch's time (sigma of a log-normal factor).
    pub sigma: f64,
    /// How many times as long the first batch takes; later ones less, over about a dozen.
    pub cold: f64,
}

impl BatchCost {
    /// Nanoseconds of a batch.
    pub fn of(&self, rows: f32) -> f64 {
        self.fixed + self.per_row * f64::from(rows)
    }

    /// Rows a second at full batches.
    pub fn capacity(&self) -> f64 {
        f64::from(self.max_rows) / self.of(self.max_rows) * 1e9
    }
}

/// The server.
#[derive(Debug)]
pub struct Batching {
    cost: BatchCost,
    queue: VecDeque<Job>,
    running: Vec<usize>,
    pub(super) clock: Clock,
    batches: u32,
    random: SmallRng,
}

impl Batching {
    /// Idle, at rate 1.
    pub fn new(cost: BatchCost, random: SmallRng) -> Self {
        let clock = Clock { rate: 1.0, ..Clock::default() };
        Self { cost, queue: VecDeque::new(), running: Vec::new(), clock, batches: 0, random }
    }

    pub(super) fn arrive(&mut self, job: Job, now: Nanos) {
        self.queue.push_back(job);
        if self.running.is_empty() {
            self.begin(now);
        }
    }

    fn begin(&mut self, now: Nanos) {
        let mut rows = 0.0;
        while let Some(job) = self.queue.front() {
            if rows > 0.0 && rows + job.rows > self.cost.max_rows {
                break;
            }
            rows += job.rows;
            self.running.push(job.request);
            self.queue.pop_front();
        }
        if rows > 0.0 {
            let cold = 1.0 + (self.cost.cold - 1.0) * (-f64::from(self.batches) / 4.0).exp();
            self.batches += 1;
            let noise = log_normal(&mut self.random, 1.0, self.cost.sigma);
            self.clock.begin(self.cost.of(rows) * noise * cold, now);
        }
    }

    pub(super) fn due(&self) -> Option<Nanos> {
        self.clock.due()
    }

    pub(super) fn advance(&mut self, now: Nanos, did: &mut Vec<Did>) {
        self.clock.end(now);
        did.extend(self.running.drain(..).flat_map(|request| [Did::First(request), Did::Last(request)]));
        self.begin(now);
    }

    pub(super) fn in_flight(&self) -> usize {
        self.queue.len() + self.running.len()
    }

    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn foresee(&self, coming: &[Job], job: &Job, rate: f64, now: Nanos) -> f64 {
        let cold = 1.0 + (self.cost.cold - 1.0) * (-f64::from(self.batches) / 4.0).exp();
        let mut work = self.clock.left(now);
        let mut rows = 0.0;
        for rows_of_one in self.queue.iter().chain(coming).chain([job]).map(|job| job.rows) {
            if rows > 0.0 && rows + rows_of_one > self.cost.max_rows {
                work += self.cost.of(rows);
                rows = 0.0;
            }
            rows += rows_of_one;
        }
        (work + self.cost.of(rows) * cold) / rate / 1e9
    }
}
