//! What sharing was worth, counted over all workers.

use std::time::Duration;

use penstock_coalesce::batch::{Batch, Closed};

use super::batcher::{Executed, Member};
use super::handover::Memory;
use crate::telemetry::counter::Counter;
use crate::telemetry::metric;

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Tally {
    /// Executions at the model server.
    pub executions: Counter,
    /// Those of them whose tensors were handed over in shared memory.
    pub placed: Counter,
    /// Requests whose tensors were received into the arena, without a copy.
    pub received: Counter,
    /// Batches by why they were sent, in the order of [`Closed::ALL`].
    batches: [Counter; 4],
    rows: Counter,
    members: Counter,
    waited_us: Counter,
    /// Batches that were cut because a member of them failed.
    pub bisected: Counter,
    /// Batches that were stopped because everybody had left.
    pub cancelled: Counter,
    /// Answers from the cache.
    pub hits: Counter,
    /// Requests that found nothing there.
    pub misses: Counter,
    /// Answers to requests that were in flight already.
    pub coalesced: Counter,
    /// Requests that passed because they were not understood, or too large, or memory was short.
    pub passed: Counter,
}

impl Tally {
    /// Something of so many rows is executed, for so many requests.
    pub fn execution(&self, rows: u32, members: usize) -> Executed {
        let members = u32::try_from(members).unwrap_or(u32::MAX);
        Executed { id: self.executions.add(1), rows, members, span: None }
    }

    /// A batch is sent.
    pub fn sent(&self, batch: &Batch<Member>) {
        self.batches[batch.closed as usize].add(1);
        self.rows.add(batch.rows.into());
        self.members.add(batch.members.len() as u64);
        self.waited_us.add(batch.waited.as_micros() as u64);
    }

    /// Tells the metrics.
    pub fn tell(&self, memory: &Memory) {
        if let Some(occupancy) = memory.occupancy() {
            for (state, bytes) in
                [("used", occupancy.in_use - occupancy.quarantined), ("quarantined", occupancy.quarantined)]
            {
                metrics::gauge!(metric::ARENA_BYTES.name, "state" => state).set(bytes as f64);
            }
            metrics::counter!(metric::ARENA_REFUSED.name).absolute(occupancy.refused);
        }
        let count = |metric: &metric::Metric, count: &Counter| {
            metrics::counter!(metric.name).absolute(count.get());
        };
        for (closed, batches) in Closed::ALL.iter().zip(&self.batches) {
            metrics::counter!(metric::BATCHES.name, "closed" => closed.as_str()).absolute(batches.get());
        }
        count(&metric::BATCH_ROWS, &self.rows);
        count(&metric::BATCH_MEMBERS, &self.members);
        let waited = Duration::from_micros(self.waited_us.get());
        metrics::gauge!(metric::BATCH_WAIT.name).set(waited.as_secs_f64());
        count(&metric::EXECUTIONS, &self.executions);
        count(&metric::EXECUTIONS_PLACED, &self.placed);
        count(&metric::RECEIVED_IN_PLACE, &self.received);
        count(&metric::BATCH_BISECTIONS, &self.bisected);
        count(&metric::BATCH_CANCELLED, &self.cancelled);
        for (result, counter) in [("hit", &self.hits), ("miss", &self.misses), ("coalesced", &self.coalesced)]
        {
            metrics::counter!(metric::COALESCED.name, "result" => result).absolute(counter.get());
        }
        count(&metric::COALESCE_PASSED, &self.passed);
    }
}
