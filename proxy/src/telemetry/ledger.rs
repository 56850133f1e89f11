//! What the cells add up to, over workers and over time.
//!
//! Cells come and go with workers, endpoints and routes, and their narrow counters may wrap; the ledger reads the
//! difference since it last looked, and adds it to two accounts: the totals by (direction, service, backend, route),
//! for the metrics page, and the rows since the last report, endpoint included, for control. So a total never falls
//! while anyone may still read it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use penstock_api::latency::{BUCKETS, Histogram};
use penstock_api::v1::Direction;
use penstock_api::{Reason, ServiceName};

use super::{Labels, Outcome, Outcomes};

/// Readings after which a combination that no cell counts for any more is forgotten: longer than a scraper's
/// interval even when control's reports read each second.
const FORGET_AFTER: u32 = 900;

/// What was counted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are those of Outcome")]
pub struct Counts {
    pub by_class: [u64; 6],
    pub by_reason: [u64; Reason::ALL.len()],
    pub failures: u64,
    pub mtls: u64,
    pub retries: u64,
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub latency: Histogram,
    pub latency_sum_us: u64,
    /// Now, rather than since.
    pub in_flight: u64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            by_class: [0; 6],
            by_reason: [0; Reason::ALL.len()],
            failures: 0,
            mtls: 0,
            retries: 0,
            request_bytes: 0,
            response_bytes: 0,
            latency: Histogram::default(),
            latency_sum_us: 0,
            in_flight: 0,
        }
    }
}

impl Counts {
    /// Requests, of any class.
    pub fn requests(&self) -> u64 {
        self.by_class.iter().sum()
    }

    fn add(&mut self, other: &Self) {
        let sum = |mine: &mut [u64], theirs: &[u64]| {
            mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine += theirs);
        };
        sum(&mut self.by_class, &other.by_class);
        sum(&mut self.by_reason, &other.by_reason);
        self.failures += other.failures;
        self.mtls += other.mtls;
        self.retries += other.retries;
        self.request_bytes += other.request_bytes;
        self.response_bytes += other.response_bytes;
        self.latency.merge(&other.latency);
        self.latency_sum_us += other.latency_sum_us;
    }
}

/// A row for control.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What it counts for.
    pub labels: Labels,
    /// What was counted.
    pub counts: Counts,
}

/// What the metrics page has a series for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the fields are those of Labels")]
pub struct Key {
    pub direction: Direction,
    pub service: ServiceName,
    pub backend: ServiceName,
    pub route: Arc<str>,
}

impl Key {
    fn of(labels: &Labels) -> Self {
        Self {
            direction: labels.direction,
            service: labels.service.clone(),
            backend: labels.backend.clone(),
            route: Arc::clone(&labels.route),
        }
    }
}

#[derive(Debug, Default)]
struct Total {
    counts: Counts,
    /// Readings without a cell.
    idle: u32,
    alive: bool,
}

/// The accounts.
#[derive(Debug, Default)]
pub struct Ledger {
    /// By the cell's address, what it said when it was last read.
    seen: HashMap<usize, Reading>,
    totals: BTreeMap<Key, Total>,
    rows: BTreeMap<Labels, Counts>,
}

impl Ledger {
    /// Reads all cells, and forgets those that no worker holds any more.
    pub fn read(&mut self, outcomes: &Outcomes) {
        for total in self.totals.values_mut() {
            total.counts.in_flight = 0;
            total.alive = false;
        }
        for row in self.rows.values_mut() {
            row.in_flight = 0;
        }
        for cell in outcomes.cells() {
            let delta = self.seen.entry(address(&cell)).or_default().advance(&cell);
            let in_flight = u64::from(cell.in_flight.load(Relaxed));
            let total = self.totals.entry(Key::of(&cell.labels)).or_default();
            total.alive = true;
            total.counts.in_flight += in_flight;
            if delta.requests() > 0 {
                total.counts.add(&delta);
            }
            if delta.requests() > 0 || in_flight > 0 {
                let row = self.rows.entry(cell.labels.clone()).or_default();
                row.add(&delta);
                row.in_flight += in_flight;
            }
        }
        outcomes.sweep(|cell| {
            // Nobody holds it, so it is final; if it moved since the reading above, the next one takes it in.
            let settled = self.seen.get(&address(cell)).is_some_and(|reading| reading.is_current(cell));
            if settled {
                self.seen.remove(&address(cell));
            }
            settled
        });
        self.totals.retain(|_, total| {
            total.idle = if total.alive { 0 } else { total.idle + 1 };
            total.idle < FORGET_AFTER
        });
    }

    /// The totals by key, as of the last reading.
    pub fn totals(&self) -> Vec<(&Key, &Counts)> {
        self.totals.iter().map(|(key, total)| (key, &total.counts)).collect()
    }

    /// Reads, and takes the rows since they were last taken.
    pub fn take(&mut self, outcomes: &Outcomes) -> Vec<Row> {
        self.read(outcomes);
        std::mem::take(&mut self.rows).into_iter().map(|(labels, counts)| Row { labels, counts }).collect()
    }
}

fn address(cell: &Outcome) -> usize {
    std::ptr::from_ref(cell).addr()
}

/// A cell's counters when they were last read, as narrow as the cell has them.
#[derive(Debug)]
struct Reading {
    counts: Vec<u64>,
    latency: [u32; BUCKETS],
}

impl Default for Reading {
    fn default() -> Self {
        Self { counts: vec![0; wide(|_| 0).len()], latency: [0; BUCKETS] }
    }
}

const REASONS: usize = Reason::ALL.len();

/// The wide counters of a cell in one row: classes, reasons, then the rest in the order of [`Counts`].
fn wide<T>(mut take: impl FnMut(usize) -> T) -> [T; 6 + REASONS + 6] {
    std::array::from_fn(&mut take)
}

fn wide_of(cell: &Outcome) -> [u64; 6 + REASONS + 6] {
    wide(|i| {
        let counter = match i {
            0..6 => &cell.by_class[i],
            i if i < 6 + REASONS => &cell.by_reason[i - 6],
            i => match i - 6 - REASONS {
                0 => &cell.failures,
                1 => &cell.mtls,
                2 => &cell.retries,
                3 => &cell.request_bytes,
                4 => &cell.response_bytes,
                _ => &cell.latency_sum_us,
            },
        };
        counter.load(Relaxed)
    })
}

impl Reading {
    /// Reads the cell; returns what came since.
    fn advance(&mut self, cell: &Outcome) -> Counts {
        let mut delta = Counts::default();
        for (i, now) in wide_of(cell).into_iter().enumerate() {
            let since = now.wrapping_sub(std::mem::replace(&mut self.counts[i], now));
            let field = match i {
                0..6 => &mut delta.by_class[i],
                i if i < 6 + REASONS => &mut delta.by_reason[i - 6],
                i => match i - 6 - REASONS {
                    0 => &mut delta.failures,
                    1 => &mut delta.mtls,
                    2 => &mut delta.retries,
                    3 => &mut delta.request_bytes,
                    4 => &mut delta.response_bytes,
                    _ => &mut delta.latency_sum_us,
                },
            };
            *field = since;
        }
        for (bucket, counter) in cell.latency.iter().enumerate() {
            let now = counter.load(Relaxed);
            let since = now.wrapping_sub(std::mem::replace(&mut self.latency[bucket], now));
            if since > 0 {
                delta.latency.add(bucket, u64::from(since));
            }
        }
        delta
    }

    fn is_current(&self, cell: &Outcome) -> bool {
        wide_of(cell) == *self.counts
            && cell.latency.iter().zip(&self.latency).all(|(counter, seen)| counter.load(Relaxed) == *seen)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::telemetry::End;

    fn labels(endpoint: &str) -> Labels {
        Labels {
            direction: Direction::Outbound,
            service: "a/digits".parse().unwrap(),
            backend: "a/digits-v1".parse().unwrap(),
            endpoint: endpoint.into(),
            route: "a/canary#0".into(),
        }
    }

    fn end(status: u16) -> End {
        End {
            status,
            reason: (status == 503).then_some(Reason::NoEndpoint),
            failed: status >= 500,
            mtls: true,
            tries: 2,
            headers: Duration::from_millis(3),
            total: Duration::from_millis(4),
            request_bytes: 10,
            response_bytes: 20,
        }
    }

    #[test]
    fn workers_add_up_and_endpoints_fold_into_their_route() {
        let (outcomes, mut ledger) = (Outcomes::default(), Ledger::default());
        let cells = [labels("a/one"), labels("a/one"), labels("a/two")].map(|labels| outcomes.cell(labels));
        for cell in &cells {
            cell.finish(&end(200));
        }
        cells[2].finish(&end(503));
        cells[2].in_flight.store(4, Relaxed);
        let rows = ledger.take(&outcomes);
        let requests: Vec<_> =
            rows.iter().map(|row| (&*row.labels.endpoint, row.counts.requests())).collect();
        assert_eq!(requests, [("a/one", 2), ("a/two", 2)]);
        assert_eq!(rows[1].counts.by_reason[Reason::NoEndpoint as usize], 1);
        let totals = ledger.totals();
        assert_eq!(totals.len(), 1);
        let counts = totals[0].1;
        assert_eq!((counts.requests(), counts.failures, counts.retries, counts.mtls), (4, 1, 4, 4));
        assert_eq!((counts.request_bytes, counts.response_bytes, counts.in_flight), (40, 80, 4));
        assert_eq!((counts.latency.total(), counts.latency_sum_us), (4, 12_000));
    }

    #[test]
    fn a_row_is_told_once_unless_requests_are_in_flight() {
        let (outcomes, mut ledger) = (Outcomes::default(), Ledger::default());
        let cell = outcomes.cell(labels("a/one"));
        cell.finish(&end(200));
        assert_eq!(ledger.take(&outcomes).len(), 1);
        assert_eq!(ledger.take(&outcomes).len(), 0);
        cell.in_flight.store(1, Relaxed);
        let rows = ledger.take(&outcomes);
        assert_eq!((rows.len(), rows[0].counts.requests(), rows[0].counts.in_flight), (1, 0, 1));
        assert_eq!(ledger.totals()[0].1.requests(), 1, "totals stay");
    }

    #[test]
    fn a_total_outlives_its_cells_and_counters_may_wrap() {
        let (outcomes, mut ledger) = (Outcomes::default(), Ledger::default());
        let cell = outcomes.cell(labels("a/one"));
        cell.latency[5].store(u32::MAX, Relaxed);
        cell.by_class[2].store(1, Relaxed);
        ledger.read(&outcomes);
        cell.latency[5].store(1, Relaxed);
        cell.by_class[2].store(3, Relaxed);
        drop(cell);
        ledger.read(&outcomes);
        assert!(outcomes.cells().is_empty(), "swept once it is read");
        ledger.read(&outcomes);
        let counts = ledger.totals()[0].1.clone();
        assert_eq!(counts.requests(), 3);
        assert_eq!(counts.latency.total(), u64::from(u32::MAX) + 2);
        for _ in 0..FORGET_AFTER {
            ledger.read(&outcomes);
        }
        assert!(ledger.totals().is_empty(), "forgotten at last");
        assert!(ledger.seen.is_empty());
    }
}
