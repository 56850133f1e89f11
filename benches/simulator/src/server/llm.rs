//! An LLM server with continuous batching, chunked prefill, a paged KV cache with prefix reuse, and preemption by
//! recomputation, in the manner of vLLM (Kwon et al. 2023; Agrawal et al. 2024 for chunked prefill).
//!
//! A step takes `step + decode × sequences + prefill × prompt tokens + read × tokens in the cache`. Blocks of finished
//! requests stay in the cache until the room is needed, least recently used first.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use rand::rngs::SmallRng;

use super::{BLOCK, Clock, Did, Job, Nanos};
use crate::random::log_normal;

/// What a step costs, in nanoseconds, and what fits.
#[derive(Clone, Copy, Debug)]
pub struct StepCost {
    /// A step.
    pub step: f64,
    /// A sequence that decodes a token.
    pub decode: f64,
    /// A token of a prompt.
    pub prefill: f64,
    /// A token in the cache that is read.
    pub read: f64,
    /// The most prompt tokens and sequences in a step.
    pub budget: u32,
    /// The most sequences that run.
    pub sequences: usize,
    /// Blocks in the cache.
    pub blocks: usize,
    /// Spread of a step's time.
    pub sigma: f64,
}

#[derive(Debug)]
struct Sequence {
    job: Job,
    /// Prompt tokens still to be computed; after a preemption with what was generated before.
    prefill: u32,
    generated: u32,
    /// Blocks of the job that it holds a reference to.
    held: usize,
    begun: bool,
}

#[derive(Debug, Default)]
struct Cached {
    references: u32,
    stamp: u64,
}

/// The server.
#[derive(Debug)]
pub struct Llm {
    cost: StepCost,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    cache: HashMap<u64, Cached>,
    /// Released blocks in the order of their release; an entry whose stamp is outdated means nothing.
    released: VecDeque<(u64, u64)>,
    /// Cached blocks that nobody references.
    free: usize,
    stamp: u64,
    pub(super) clock: Clock,
    random: SmallRng,
    /// Prompt tokens found in the cache, and all.
    pub hits: (u64, u64),
    /// Preemptions so far.
    pub preempted: u64,
}

impl Llm {
    /// Idle, with an empty cache.
    pub fn new(cost: StepCost, random: SmallRng) -> Self {
        Self {
            cost,
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache: HashMap::new(),
            released: VecDeque::new(),
            free: 0,
            stamp: 0,
            clock: Clock { rate: 1.0, ..Clock::default() },
            random,
            hits: (0, 0),
            preempted: 0,
        }
    }

    pub(super) fn arrive(&mut self, job: Job, now: Nanos) {
        let sequence = Sequence { prefill: 0, generated: 0, held: 0, begun: false, job };
        self.waiting.push_back(sequence);
        if self.clock.remaining.is_none() {
            self.begin(now);
        }
    }

    fn begin(&mut self, now: Nanos) {
        self.admit();
        if self.running.is_empty() {
            return;
        }
        let decoding = self.running.iter().filter(|s| s.prefill == 0).count() as u32;
        let mut budget = self.cost.budget.saturating_sub(decoding);
        let mut prompt = 0;
        for sequence in &self.running {
            let chunk = sequence.prefill.min(budget);
            budget -= chunk;
            prompt += chunk;
        }
        let tokens = (self.cache.len() - self.free) as f64 * f64::from(BLOCK);
        let work = self.cost.step
            + self.cost.decode * f64::from(decoding)
            + self.cost.prefill * f64::from(prompt)
            + self.cost.read * tokens;
        self.clock.begin(work * log_normal(&mut self.random, 1.0, self.cost.sigma), now);
    }

    /// Lets in who waits, in order, while there is room for the prompt.
    fn admit(&mut self) {
        while self.running.len() < self.cost.sequences
            && let Some(next) = self.waiting.front()
        {
            let tokens = next.job.prompt + next.generated;
            let blocks = Rc::clone(&next.job.blocks);
            let needed = (tokens.div_ceil(BLOCK) as usize).min(blocks.len());
            let matched = self.matched(&blocks[..needed]);
            let unreferenced = blocks[..matched]
                .iter()
                .filter(|b| self.cache.get(*b).is_some_and(|c| c.references == 0))
                .count();
            if needed - matched > self.room() - unreferenced.min(self.room()) && !self.running.is_empty() {
                break;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            if !sequence.begun {
                sequence.begun = true;
                self.hits.0 += u64::from((matched as u32 * BLOCK).min(tokens));
                self.hits.1 += u64::from(tokens);
            }
            // The last token is always computed, to have something to decode from.
            sequence.prefill = tokens.saturating_sub(matched as u32 * BLOCK).max(1);
            for block in &blocks[..needed] {
                self.hold(*block);
            }
            sequence.held = needed;
            self.running.push(sequence);
        }
    }

    fn matched(&self, blocks: &[u64]) -> usize {
        blocks.iter().take_while(|block| self.cache.contains_key(block)).count()
    }

    fn room(&self) -> usize {
        self.cost.blocks.saturating_sub(self.cache.len() - self.free)
    }

    fn hold(&mut self, block: u64) {
        let before = self.cache.len();
        let cached = self.cache.entry(block).or_default();
        if cached.references == 0 && self.cache.len() == before {
            self.free -= 1;
        }
        if let Some(cached) = self.cache.get_mut(&block) {
            cached.references += 1;
        }
        while self.cache.len() > self.cost.blocks && self.free > 0 {
            self.evict();
        }
    }

    fn evict(&mut self) {
        while let Some((block, stamp)) = self.released.pop_front() {
            if self.cache.get(&block).is_some_and(|c| c.references == 0 && c.stamp == stamp) {
                self.cache.remove(&block);
                self.free -= 1;
                return;
            }
        }
    }

    fn release(&mut self, blocks: &[u64]) {
        // The end of a prompt is worth less than its beginning: it goes first.
        for block in blocks.iter().rev() {
            self.stamp += 1;
            if let Some(cached) = self.cache.get_mut(block) {
                cached.references -= 1;
                cached.stamp = self.stamp;
                if cached.references == 0 {
                    self.free += 1;
                    self.released.push_back((*block, self.stamp));
                }
            }
        }
    }

    pub(super) fn due(&self) -> Option<Nanos> {
        self.clock.due()
    }

    pub(super) fn advance(&mut self, now: Nanos, did: &mut Vec<Did>) {
        self.clock.end(now);
        let decoding = self.running.iter().filter(|s| s.prefill == 0).count() as u32;
        let mut budget = self.cost.budget.saturating_sub(decoding);
        let mut finished = Vec::new();
        let mut growing = Vec::new();
        for (i, sequence) in self.running.iter_mut().enumerate() {
            if sequence.prefill > 0 {
                let chunk = sequence.prefill.min(budget);
                budget -= chunk;
                sequence.prefill -= chunk;
                if sequence.prefill > 0 {
                    continue;
                }
            }
            sequence.generated += 1;
            if sequence.generated == 1 {
                did.push(Did::First(sequence.job.request));
            }
            if sequence.generated >= sequence.job.output {
                did.push(Did::Last(sequence.job.request));
                finished.push(i);
            } else {
                growing.push(sequence.job.request);
            }
        }
        for i in finished.into_iter().rev() {
            let sequence = self.running.remove(i);
            self.release(&sequence.job.blocks[..sequence.held]);
        }
        for request in growing {
            self.grow(request);
        }
        self.begin(now);
    }

    /// Makes room for the next token; the youngest has to go if there is none.
    fn grow(&mut self, request: usize) {
        let Some(i) = self.running.iter().position(|s| s.job.request == request) else { return };
        let sequence = &self.running[i];
        let needed = ((sequence.job.prompt + sequence.generated) / BLOCK) as usize + 1;
        if needed <= sequence.held || sequence.held >= sequence.job.blocks.len() {
            return;
        }
        let block = sequence.job.blocks[sequence.held];
        if self.room() == 0 && self.running.len() > 1 {
            let Some(mut youngest) = self.running.pop() else { return };
            self.release(&youngest.job.blocks[..youngest.held]);
            youngest.held = 0;
            youngest.prefill = 0;
            self.preempted += 1;
            let itself = youngest.job.request == request;
            self.waiting.push_front(youngest);
            if itself {
                return;
            }
        }
        self.hold(block);
        if let Some(sequence) = self.running.iter_mut().find(|s| s.job.request == request) {
            sequence.held += 1;
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn kv_usage(&self) -> f64 {
        (self.cache.len() - self.free) as f64 / self.cost.blocks as f64
    }

    fn uncached(&self, job: &Job) -> u32 {
        let prompt_blocks = (job.prompt / BLOCK) as usize;
        let matched = self.matched(&job.blocks[..prompt_blocks.min(job.blocks.len())]) as u32;
        job.prompt.saturating_sub(matched * BLOCK).max(1)
    }

    pub(super) fn foresee(&self, coming: &[Job], job: &Job, rate: f64, now: Nanos) -> f64 {
        let mut tokens: u32 = self.running.iter().map(|s| s.prefill).sum();
        tokens += self
            .waiting
            .iter()
            .map(|s| &s.job)
            .chain(coming)
            .chain([job])
            .map(|job| self.uncached(job))
            .sum::<u32>();
        let decoding = self.running.len() as f64;
        let held = (self.cache.len() - self.free) as f64 * f64::from(BLOCK);
        let step = self.cost.step + self.cost.decode * decoding + self.cost.read * held;
        let steps = (f64::from(tokens) / f64::from(self.cost.budget)).ceil();
        // What does not fit waits for the answers under way to end: a rough tenth of a second for a block.
        let blocks = (f64::from(tokens) / f64::from(BLOCK)).ceil();
        let short = (blocks - self.room() as f64).max(0.0);
        (self.clock.left(now) + steps * step + f64::from(tokens) * self.cost.prefill) / rate / 1e9
            + short * 0.1
    }
}
