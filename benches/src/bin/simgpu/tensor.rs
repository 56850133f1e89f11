//! A model of tensors behind a dynamic batcher, as Triton serves it: a queue in the order of arrival, and one batch at a time.
//!
//! A batch takes from the front of the queue what fits into it and lasts a fixed time and a time for each row. It never
//! waits for more rows while the GPU is idle.

use std::collections::VecDeque;
use std::time::Duration;

use super::model::{Counts, Id, Model, Told};
use super::pace::Pace;

/// What a batch costs on a GPU of speed 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Seconds, whatever is in it.
    pub(crate) fixed: f64,
    /// Seconds more for each row.
    pub(crate) row: f64,
    /// Rows at most. A request with more of them gets a batch to itself.
    pub(crate) max_batch: u32,
}

struct Request {
    id: Id,
    rows: u32,
}

struct Batch {
    requests: Vec<Request>,
    rows: u32,
    began: Duration,
    ends: Duration,
}

/// The model.
pub(crate) struct Batcher {
    cost: Cost,
    pace: Pace,
    queue: VecDeque<Request>,
    batch: Option<Batch>,
    counts: Counts,
}

impl Batcher {
    pub(crate) fn new(cost: Cost, pace: Pace) -> Self {
        Self { cost, pace, queue: VecDeque::new(), batch: None, counts: Counts::default() }
    }

    /// Begins a batch if there is work and none is under way.
    fn begin(&mut self, now: Duration) {
        if self.batch.is_some() || self.queue.is_empty() {
            return;
        }
        let (mut requests, mut rows) = (Vec::new(), 0);
        while let Some(next) = self.queue.front()
            && (requests.is_empty() || rows + next.rows <= self.cost.max_batch)
        {
            rows += next.rows;
            requests.extend(self.queue.pop_front());
        }
        let work = self.cost.fixed + self.cost.row * f64::from(rows);
        self.batch = Some(Batch { requests, rows, began: now, ends: self.pace.finish(now, work) });
    }
}

impl Model for Batcher {
    /// Rows.
    type Job = u32;

    fn arrive(&mut self, now: Duration, id: Id, rows: u32) {
        self.queue.push_back(Request { id, rows });
        self.begin(now);
    }

    /// What is being executed is executed to its end; a GPU cannot take a row out of a batch.
    fn abandon(&mut self, id: Id) {
        self.queue.retain(|request| request.id != id);
    }

    fn next(&self) -> Option<Duration> {
        self.batch.as_ref().map(|batch| batch.ends)
    }

    fn advance(&mut self, now: Duration, told: &mut Vec<Told>) {
        while let Some(batch) = self.batch.take_if(|batch| batch.ends <= now) {
            self.counts.executions += 1;
            self.counts.units += u64::from(batch.rows);
            self.counts.requests += batch.requests.len() as u64;
            self.counts.busy_s += (batch.ends - batch.began).as_secs_f64();
            told.extend(batch.requests.iter().map(|request| Told { id: request.id, done: true }));
            self.begin(batch.ends);
        }
    }

    fn reset(&mut self) {
        *self = Self::new(self.cost, self.pace.clone());
    }

    fn counts(&self) -> Counts {
        let running = self.batch.as_ref().map_or(0, |batch| batch.requests.len());
        Counts { waiting: self.queue.len(), running, ..self.counts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn batcher() -> Batcher {
        Batcher::new(Cost { fixed: 0.010, row: 0.005, max_batch: 4 }, Pace::new(1.0, Vec::new()))
    }

    fn told(batcher: &mut Batcher, now: Duration) -> Vec<Id> {
        let mut told = Vec::new();
        batcher.advance(now, &mut told);
        told.iter().map(|told| told.id).collect()
    }

    #[test]
    fn a_request_alone_does_not_wait_for_company() {
        let mut batcher = batcher();
        batcher.arrive(ms(100), 1, 1);
        assert_eq!(batcher.next(), Some(ms(115)));
        assert!(told(&mut batcher, ms(114)).is_empty());
        assert_eq!(told(&mut batcher, ms(115)), [1]);
        assert_eq!(batcher.next(), None);
    }

    #[test]
    fn what_arrives_meanwhile_shares_the_next_batch_up_to_its_limit() {
        let mut batcher = batcher();
        for id in 1..=6 {
            batcher.arrive(ms(0), id, 1);
        }
        assert_eq!(told(&mut batcher, ms(15)), [1]);
        assert_eq!(batcher.next(), Some(ms(15 + 30)), "four rows");
        assert_eq!(told(&mut batcher, ms(45)), [2, 3, 4, 5]);
        assert_eq!(told(&mut batcher, ms(60)), [6]);
        let counts = batcher.counts();
        assert_eq!((counts.units, counts.executions, counts.requests), (6, 3, 6));
        assert!((counts.busy_s - 0.060).abs() < 1e-9);
    }

    #[test]
    fn who_looks_late_loses_no_time() {
        let mut batcher = batcher();
        (1..=5).for_each(|id| batcher.arrive(ms(0), id, 1));
        assert_eq!(told(&mut batcher, ms(90)), [1, 2, 3, 4, 5]);
        assert!((batcher.counts().busy_s - 0.045).abs() < 1e-9);
    }

    #[test]
    fn a_request_larger_than_a_batch_has_one_to_itself() {
        let mut batcher = batcher();
        batcher.arrive(ms(0), 1, 9);
        batcher.arrive(ms(0), 2, 1);
        assert_eq!(batcher.next(), Some(ms(10 + 45)));
        assert_eq!(told(&mut batcher, ms(55)), [1]);
    }

    #[test]
    fn who_left_before_its_batch_costs_nothing() {
        let mut batcher = batcher();
        (1..=3).for_each(|id| batcher.arrive(ms(0), id, 1));
        batcher.abandon(2);
        batcher.abandon(1);
        assert_eq!(told(&mut batcher, ms(30)), [1, 3]);
        assert_eq!(batcher.counts().units, 2);
    }
}
