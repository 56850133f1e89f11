//! What is counted of copies: by the Service that was asked for and the one that the copies went to.
//!
//! As with [`outcome`](super::outcome) and [`ledger`](super::ledger): a cell belongs to one worker, which adds to it; readers sum up
//! what came since they last looked, into totals for the metrics page and rows for control.

use std::array;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, Ordering::Relaxed, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use penstock_api::ServiceName;
use penstock_api::latency::{self, BUCKETS, Histogram};

use super::metric::{self, Metric};
use super::page::{head, line};

/// Readings after which a pair that nobody counts for any more is forgotten, as in the ledger.
const FORGET_AFTER: u32 = 900;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    /// Copies that the mirror answered, and well.
    Answered,
    /// Copies that it answered by a failure, or not at all.
    Failed,
    /// Copies that were not sent, or not to their end: there was no room.
    Dropped,
    /// Copies whose original broke off.
    Abandoned,
    /// Pairs of answers that were held against each other.
    Compared,
    /// Of them, those that agree.
    Agreed,
    /// Pairs of which both have a greatest element in each compared row.
    Ranked,
    /// Of them, those that have it at the same place.
    SameTop,
    /// Bytes of the copies' answers that were compared.
    Bytes,
    /// Bytes of the clients'.
    ClientBytes,
}

const COUNTS: usize = Count::ClientBytes as usize + 1;

/// A series of the metrics page: its metric, the label that tells it from others of that, and its value.
type Series = (&'static Metric, &'static str, &'static str, fn(&Counts) -> u64);

/// Whose copies.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Parties {
    /// The Service that was asked for.
    pub service: ServiceName,
    /// The one that the copies go to.
    pub mirror: ServiceName,
}

/// The counters of one worker for one pair.
#[derive(Debug)]
pub struct Shadow {
    parties: Parties,
    counts: [AtomicU64; COUNTS],
    /// The largest difference since it was last read, as the bits of a number that is not negative: they are in its order.
    difference: AtomicU64,
    latency: [[AtomicU32; BUCKETS]; 2],
}

impl Shadow {
    fn new(parties: Parties) -> Self {
        Self {
            parties,
            counts: array::from_fn(|_| AtomicU64::new(0)),
            difference: AtomicU64::new(0),
            latency: array::from_fn(|_| array::from_fn(|_| AtomicU32::new(0))),
        }
    }

    /// Counts one.
    pub fn count(&self, what: Count) {
        self.add(what, 1);
    }

    /// Counts so many.
    pub fn add(&self, what: Count, more: u64) {
        // One worker writes.
        let counter = &self.counts[what as usize];
        counter.store(counter.load(Relaxed) + more, Relaxed);
    }

    /// Both answers' headers have come, after so long.
    pub fn took(&self, copy: Duration, client: Duration) {
        for (buckets, took) in self.latency.iter().zip([copy, client]) {
            let bucket = &buckets[latency::bucket_of(took)];
            bucket.store(bucket.load(Relaxed).wrapping_add(1), Relaxed);
        }
    }

    /// Two numbers were so far apart.
    pub fn differed(&self, by: f64) {
        if by > 0.0 {
            self.difference.fetch_max(by.to_bits(), Relaxed);
        }
    }

    fn counts(&self) -> [u64; COUNTS] {
        array::from_fn(|at| self.counts[at].load(Relaxed))
    }
}

/// All cells of the process.
#[derive(Debug, Default)]
pub struct Shadows {
    cells: Mutex<Vec<Arc<Shadow>>>,
    accounts: Mutex<Accounts>,
}

/// What was counted of a pair.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    counts: [u64; COUNTS],
    /// The largest difference of two numbers.
    pub largest_difference: f64,
    /// Time to the copies' headers.
    pub latency: Histogram,
    /// Of the same requests, time to the clients'.
    pub client_latency: Histogram,
}

impl Counts {
    /// So many.
    pub fn of(&self, what: Count) -> u64 {
        self.counts[what as usize]
    }

    fn add(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
        self.largest_difference = self.largest_difference.max(other.largest_difference);
        self.latency.merge(&other.latency);
        self.client_latency.merge(&other.client_latency);
    }

    fn is_empty(&self) -> bool {
        self.counts == [0; COUNTS] && self.latency.total() == 0
    }
}

#[derive(Debug, Default)]
struct Accounts {
    /// By the cell's address, what it said when it was last read.
    seen: HashMap<usize, Reading>,
    totals: BTreeMap<Parties, Total>,
    rows: BTreeMap<Parties, Counts>,
}

#[derive(Debug, Default)]
struct Total {
    counts: Counts,
    idle: u32,
}

#[derive(Debug)]
struct Reading {
    counts: [u64; COUNTS],
    latency: [[u32; BUCKETS]; 2],
}

impl Default for Reading {
    fn default() -> Self {
        Self { counts: [0; COUNTS], latency: [[0; BUCKETS]; 2] }
    }
}

impl Reading {
    fn advance(&mut self, cell: &Shadow) -> Counts {
        let now = cell.counts();
        let before = std::mem::replace(&mut self.counts, now);
        let mut since = Counts {
            counts: array::from_fn(|at| now[at].wrapping_sub(before[at])),
            largest_difference: f64::from_bits(cell.difference.swap(0, Relaxed)),
            ..Counts::default()
        };
        let into = [&mut since.latency, &mut since.client_latency];
        for ((seen, counters), into) in self.latency.iter_mut().zip(&cell.latency).zip(into) {
            for (bucket, (seen, counter)) in seen.iter_mut().zip(counters).enumerate() {
                let now = counter.load(Relaxed);
                let more = now.wrapping_sub(std::mem::replace(seen, now));
                if more > 0 {
                    into.add(bucket, u64::from(more));
                }
            }
        }
        since
    }
}

impl Shadows {
    /// A new cell for one worker.
    pub fn cell(&self, parties: Parties) -> Arc<Shadow> {
        let cell = Arc::new(Shadow::new(parties));
        self.cells().push(Arc::clone(&cell));
        cell
    }

    /// What happened since the last call, of each pair of which anything did.
    pub fn take_rows(&self) -> Vec<(Parties, Counts)> {
        std::mem::take(&mut self.read().rows).into_iter().collect()
    }

    /// Adds its part to the metrics page.
    pub fn render(&self, page: &mut String) {
        let accounts = self.read();
        if accounts.totals.is_empty() {
            return;
        }
        let series: [Series; 6] = [
            (&metric::MIRROR_REQUESTS, "outcome", "answered", |counts| counts.of(Count::Answered)),
            (&metric::MIRROR_REQUESTS, "outcome", "failed", |counts| counts.of(Count::Failed)),
            (&metric::MIRROR_REQUESTS, "outcome", "dropped", |counts| counts.of(Count::Dropped)),
            (&metric::MIRROR_REQUESTS, "outcome", "abandoned", |counts| counts.of(Count::Abandoned)),
            (&metric::MIRROR_COMPARED, "result", "agreed", |counts| counts.of(Count::Agreed)),
            (&metric::MIRROR_COMPARED, "result", "differed", |counts| {
                counts.of(Count::Compared) - counts.of(Count::Agreed)
            }),
        ];
        let mut last = "";
        for (metric, label, value, count) in series {
            if std::mem::replace(&mut last, metric.name) != metric.name {
                head(page, metric);
            }
            for (Parties { service, mirror }, total) in &accounts.totals {
                let labels = format!("service=\"{service}\",mirror=\"{mirror}\",{label}=\"{value}\"");
                line(page, metric.name, &labels, count(&total.counts));
            }
        }
    }

    fn read(&self) -> MutexGuard<'_, Accounts> {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let Accounts { seen, totals, rows } = &mut *accounts;
        totals.values_mut().for_each(|total| total.idle += 1);
        let mut cells = self.cells();
        cells.retain(|cell| {
            // Asked before it is read: what nobody holds then moves no more.
            let final_now = Arc::strong_count(cell) == 1;
            fence(Ordering::Acquire);
            let address = Arc::as_ptr(cell).addr();
            let since = seen.entry(address).or_default().advance(cell);
            let total = totals.entry(cell.parties.clone()).or_default();
            total.idle = 0;
            if !since.is_empty() {
                total.counts.add(&since);
                rows.entry(cell.parties.clone()).or_default().add(&since);
            }
            if final_now {
                seen.remove(&address);
            }
            !final_now
        });
        drop(cells);
        totals.retain(|_, total| total.idle < FORGET_AFTER);
        accounts
    }

    fn cells(&self) -> MutexGuard<'_, Vec<Arc<Shadow>>> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parties() -> Parties {
        Parties { service: "a/digits".parse().unwrap(), mirror: "a/digits-v2".parse().unwrap() }
    }

    #[test]
    fn workers_add_up_and_a_row_is_told_once() {
        let shadows = Shadows::default();
        let cells = [shadows.cell(parties()), shadows.cell(parties())];
        for (cell, difference) in cells.iter().zip([0.5, 0.25]) {
            cell.count(Count::Answered);
            cell.add(Count::Bytes, 10);
            cell.took(Duration::from_millis(2), Duration::from_millis(1));
            cell.differed(difference);
        }
        let rows = shadows.take_rows();
        assert_eq!(rows.len(), 1);
        let counts = &rows[0].1;
        assert_eq!((counts.of(Count::Answered), counts.of(Count::Bytes)), (2, 20));
        assert_eq!((counts.latency.total(), counts.client_latency.total()), (2, 2));
        assert_eq!(counts.largest_difference, 0.5);
        assert!(shadows.take_rows().is_empty());
        cells[0].count(Count::Dropped);
        let rows = shadows.take_rows();
        assert_eq!((rows[0].1.of(Count::Dropped), rows[0].1.largest_difference), (1, 0.0));
    }

    #[test]
    fn a_total_outlives_its_cells_and_is_forgotten_at_last() {
        let shadows = Shadows::default();
        let cell = shadows.cell(parties());
        cell.count(Count::Failed);
        drop(cell);
        shadows.cell(parties()).count(Count::Failed);
        let mut page = String::new();
        shadows.render(&mut page);
        let series = "penstock_mirror_requests_total{service=\"a/digits\",mirror=\"a/digits-v2\",outcome=\"failed\"} 2";
        assert!(page.contains(series), "{page}");
        assert!(shadows.cells().is_empty() && shadows.read().seen.is_empty());
        for _ in 0..FORGET_AFTER {
            drop(shadows.read());
        }
        page.clear();
        shadows.render(&mut page);
        assert!(page.is_empty(), "{page}");
    }
}
