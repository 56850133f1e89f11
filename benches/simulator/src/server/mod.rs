//! Simulated GPUs: what a model server behind a sidecar does with the requests that reach it.
//!
//! Two kinds: one that runs batches of rows one after another, as Triton does with a tensor model, and one that decodes
//! continuously, as vLLM does. Both work off abstract work at a `rate` (speed, throttling, neighbours on the same GPU,
//! a stall), which may change at any moment.

pub mod batch;
pub mod llm;

use std::rc::Rc;

use batch::Batching;
use llm::Llm;

/// Nanoseconds since the start of the run.
pub type Nanos = u64;

/// A millisecond.
pub const MS: u64 = 1_000_000;
/// A second.
pub const S: u64 = 1_000_000_000;

/// Tokens to a block of the prompt.
pub const BLOCK: u32 = 64;

/// A request as a server sees it.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its index in the run.
    pub request: usize,
    /// Batch rows, for tensor models.
    pub rows: f32,
    /// Prompt and answer, for LLMs: hashes of their blocks.
    pub blocks: Rc<[u64]>,
    /// Tokens in the prompt.
    pub prompt: u32,
    /// Tokens of the answer.
    pub output: u32,
}

/// Something a server did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did {
    /// The first byte of the answer to this request.
    First(usize),
    /// The last.
    Last(usize),
}

/// A model server with its GPU.
#[derive(Debug)]
pub enum Server {
    /// Batches of rows.
    Batching(Batching),
    /// Continuous decoding.
    Llm(Llm),
}

impl Server {
    /// A request reaches it.
    pub fn arrive(&mut self, job: Job, now: Nanos) {
        match self {
            Self::Batching(server) => server.arrive(job, now),
            Self::Llm(server) => server.arrive(job, now),
        }
    }

    /// When it next does something, if nothing changes until then.
    pub fn due(&self) -> Option<Nanos> {
        match self {
            Self::Batching(server) => server.due(),
            Self::Llm(server) => server.due(),
        }
    }

    /// Does what is due now.
    pub fn advance(&mut self, now: Nanos, did: &mut Vec<Did>) {
        match self {
            Self::Batching(server) => server.advance(now, did),
            Self::Llm(server) => server.advance(now, did),
        }
    }

    /// From now on it works at this rate; 1 is its model's cost as declared.
    pub fn set_rate(&mut self, rate: f64, now: Nanos) {
        match self {
            Self::Batching(server) => server.clock.set_rate(rate, now),
            Self::Llm(server) => server.clock.set_rate(rate, now),
        }
    }

    /// Whether the GPU has something to do.
    pub fn busy(&self) -> bool {
        self.clock().remaining.is_some()
    }

    fn clock(&self) -> &Clock {
        match self {
            Self::Batching(server) => &server.clock,
            Self::Llm(server) => &server.clock,
        }
    }

    /// Whether it answers token by token.
    pub fn is_llm(&self) -> bool {
        matches!(self, Self::Llm(_))
    }

    /// Requests in it.
    pub fn in_flight(&self) -> usize {
        match self {
            Self::Batching(server) => server.in_flight(),
            Self::Llm(server) => server.in_flight(),
        }
    }

    /// Requests that wait and have not begun.
    pub fn waiting(&self) -> usize {
        match self {
            Self::Batching(server) => server.waiting(),
            Self::Llm(server) => server.waiting(),
        }
    }

    /// The share of the KV cache that running requests hold.
    pub fn kv_usage(&self) -> f64 {
        match self {
            Self::Batching(_) => 0.0,
            Self::Llm(server) => server.kv_usage(),
        }
    }

    /// With perfect knowledge: seconds until the first byte of this job if it arrives now, after those on their way.
    pub fn foresee(&self, coming: &[Job], job: &Job, rate: f64, now: Nanos) -> f64 {
        match self {
            Self::Batching(server) => server.foresee(coming, job, rate, now),
            Self::Llm(server) => server.foresee(coming, job, rate, now),
        }
    }

    /// Busy nanoseconds so far.
    pub fn busy_time(&self, now: Nanos) -> Nanos {
        self.clock().busy_time(now)
    }
}

/// Work under way at a changing rate.
#[derive(Debug, Default)]
pub struct Clock {
    rate: f64,
    last: Nanos,
    /// Nanoseconds of work at rate 1 that the running batch or step still needs.
    remaining: Option<f64>,
    busy: Nanos,
}

impl Clock {
    fn begin(&mut self, work: f64, now: Nanos) {
        self.last = now;
        self.remaining = Some(work);
    }

    fn catch_up(&mut self, now: Nanos) {
        if let Some(remaining) = &mut self.remaining {
            let elapsed = now - self.last;
            *remaining = (*remaining - elapsed as f64 * self.rate).max(0.0);
            self.busy += elapsed;
        }
        self.last = now;
    }

    fn set_rate(&mut self, rate: f64, now: Nanos) {
        self.catch_up(now);
        self.rate = rate;
    }

    fn due(&self) -> Option<Nanos> {
        let remaining = self.remaining?;
        (self.rate > 0.0).then(|| self.last + (remaining / self.rate).ceil() as Nanos)
    }

    fn end(&mut self, now: Nanos) {
        self.catch_up(now);
        self.remaining = None;
    }

    /// Nanoseconds of work still to be done now.
    fn left(&self, now: Nanos) -> f64 {
        self.remaining.map_or(0.0, |remaining| (remaining - (now - self.last) as f64 * self.rate).max(0.0))
    }

    fn busy_time(&self, now: Nanos) -> Nanos {
        self.busy + if self.remaining.is_some() { now - self.last } else { 0 }
    }
}
