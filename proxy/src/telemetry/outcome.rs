//! Outcome cells: what the request path counts, once, for every reader.
//!
//! A cell belongs to one worker and one (direction, service, backend, endpoint, route); the worker adds to it with
//! uncontended atomics, and the readers (the metrics page, the fleet stream, `stat`) sum the cells whenever they
//! like. Nothing is looked up by text on the request path.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use penstock_api::latency::{self, BUCKETS};
use penstock_api::v1::Direction;
use penstock_api::{Reason, ServiceName};

/// What a cell counts for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels {
    /// Outbound or inbound.
    pub direction: Direction,
    /// The Service that was asked for.
    pub service: ServiceName,
    /// The Service that the split chose.
    pub backend: ServiceName,
    /// The endpoint's name.
    pub endpoint: Arc<str>,
    /// The rule's label.
    pub route: Arc<str>,
}

/// The counters of one cell.
#[derive(Debug)]
pub struct Outcome {
    /// What it counts for.
    pub labels: Labels,
    /// Requests by the first digit of their status, 1 to 5; 0 for those without one.
    pub by_class: [AtomicU64; 6],
    /// Answers that the proxy made itself, by reason.
    pub by_reason: [AtomicU64; Reason::ALL.len()],
    /// Responses that count as the server's failure.
    pub failures: AtomicU64,
    /// Requests over mutual TLS.
    pub mtls: AtomicU64,
    /// Tries after the first.
    pub retries: AtomicU64,
    /// Bytes of request bodies.
    pub request_bytes: AtomicU64,
    /// Bytes of response bodies.
    pub response_bytes: AtomicU64,
    /// Requests in flight.
    pub in_flight: AtomicU32,
    /// Time to the response's headers, in the buckets of [`latency`].
    pub latency: [AtomicU32; BUCKETS],
    /// The same, summed, microseconds.
    pub latency_sum_us: AtomicU64,
}

impl Outcome {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            by_class: Default::default(),
            by_reason: std::array::from_fn(|_| AtomicU64::new(0)),
            failures: AtomicU64::new(0),
            mtls: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            request_bytes: AtomicU64::new(0),
            response_bytes: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
            latency: std::array::from_fn(|_| AtomicU32::new(0)),
            latency_sum_us: AtomicU64::new(0),
        }
    }

    /// Counts a request that is over.
    pub fn finish(&self, end: &End) {
        add(&self.by_class[usize::from(end.status / 100).min(5)], 1);
        if let Some(reason) = end.reason {
            add(&self.by_reason[reason as usize], 1);
        }
        if end.failed {
            add(&self.failures, 1);
        }
        if end.mtls {
            add(&self.mtls, 1);
        }
        if end.tries > 1 {
            add(&self.retries, u64::from(end.tries - 1));
        }
        if end.request_bytes > 0 {
            add(&self.request_bytes, end.request_bytes);
        }
        if end.response_bytes > 0 {
            add(&self.response_bytes, end.response_bytes);
        }
        let bucket = &self.latency[latency::bucket_of(end.headers)];
        bucket.store(bucket.load(Relaxed).wrapping_add(1), Relaxed);
        add(&self.latency_sum_us, end.headers.as_micros() as u64);
    }
}

/// A cell has one writer, so a load and a store do what a locked add would, for a fraction of the price.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed) + n, Relaxed);
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// The response's status; 0 when there was none.
    pub status: u16,
    /// Why the proxy answered itself.
    pub reason: Option<Reason>,
    /// Whether it counts as the server's failure: 5xx, a failing gRPC status, or an answer of our own that is not
    /// the client's fault.
    pub failed: bool,
    /// Whether it went over mutual TLS.
    pub mtls: bool,
    /// Tries it took.
    pub tries: u32,
    /// Time to the response's headers.
    pub headers: Duration,
    /// Time to the end of the response.
    pub total: Duration,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Bytes of the response's body.
    pub response_bytes: u64,
}

/// All cells of the process.
#[derive(Debug, Default)]
pub struct Outcomes {
    cells: Mutex<Vec<Arc<Outcome>>>,
}

impl Outcomes {
    /// A new cell for one worker. Called when a worker first meets a combination, not on every request.
    pub fn cell(&self, labels: Labels) -> Arc<Outcome> {
        let cell = Arc::new(Outcome::new(labels));
        self.lock().push(Arc::clone(&cell));
        cell
    }

    /// The cells now.
    pub fn cells(&self) -> Vec<Arc<Outcome>> {
        self.lock().clone()
    }

    /// Drops cells that no worker holds any more and that nobody has yet to read (`read` says so).
    pub fn sweep(&self, mut read: impl FnMut(&Outcome) -> bool) {
        self.lock().retain(|cell| Arc::strong_count(cell) > 1 || !read(cell));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Outcome>>> {
        // A panic while holding it cannot leave the list half-written.
        self.cells.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
