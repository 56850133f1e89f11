//! What both kinds of model have in common: work arrives, time passes, and whoever waits is told.
//!
//! Time is an argument, counted from the last reset. A model never looks at a clock and never waits.

use std::time::Duration;

/// Who is told.
pub(crate) type Id = u64;

/// What a waiting client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Who.
    pub(crate) id: Id,
    /// Whether this was all.
    pub(crate) done: bool,
}

/// What has been counted since the last reset, and what is the case now.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub(crate) struct Counts {
    /// Requests that were answered.
    pub(crate) requests: u64,
    /// Units of work that were done: rows, or tokens of prompts (cached ones are no work) and answers.
    pub(crate) units: u64,
    /// Batches, or steps.
    pub(crate) executions: u64,
    /// Seconds in which something was being executed.
    pub(crate) busy_s: f64,
    /// Tokens of prompts.
    pub(crate) prompt_tokens: u64,
    /// Those of them that the prefix cache had.
    pub(crate) cached_tokens: u64,
    /// Tokens of answers.
    pub(crate) output_tokens: u64,
    /// Sequences that had to give up their memory to others.
    pub(crate) preemptions: u64,
    /// Requests that wait for their execution to begin.
    pub(crate) waiting: usize,
    /// Requests that are being executed.
    pub(crate) running: usize,
    /// Share of the memory for keys and values that is in use.
    pub(crate) kv_usage: f64,
}

/// A model on a GPU.
pub(crate) trait Model {
    /// What a request asks for.
    type Job;

    /// A request arrives.
    fn arrive(&mut self, now: Duration, id: Id, job: Self::Job);

    /// Its client has left.
    fn abandon(&mut self, id: Id);

    /// When there will be something to tell.
    fn next(&self) -> Option<Duration>;

    /// Does all that is done by `now`. Work that follows on other work begins when that ended, not when somebody looked, so that
    /// a late timer costs no throughput.
    fn advance(&mut self, now: Duration, told: &mut Vec<Told>);

    /// Forgets all work, caches and counts, as a new process would.
    fn reset(&mut self);

    /// What was counted.
    fn counts(&self) -> Counts;
}
