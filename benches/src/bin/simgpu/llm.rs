//! A language model with continuous batching, as vLLM serves it: the GPU works in steps, and sequences join and leave between
//! them.
//!
//! A step makes one token for each sequence whose prompt has been read, and reads a bounded number of prompt tokens of the
//! others (chunked prefill); it lasts a fixed time, a time for each sequence and a time for each prompt token. What the
//! prefix cache has need not be read again. When memory runs out, the sequence that joined last gives up its own and starts
//! over later (preemption by recomputation).

use std::collections::VecDeque;
use std::time::Duration;

use super::kv::{Blocks, Name};
use super::model::{Counts, Id, Model, Told};
use super::pace::Pace;

/// Tokens of a block.
pub(crate) const BLOCK: u32 = 16;

/// What a step costs on a GPU of speed 1, and what fits into it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Seconds, whatever is in it.
    pub(crate) step: f64,
    /// Seconds more for each sequence that gets a token.
    pub(crate) sequence: f64,
    /// Seconds more for each prompt token.
    pub(crate) prompt_token: f64,
    /// Sequences at most.
    pub(crate) max_sequences: usize,
    /// Tokens at most, of prompts and answers.
    pub(crate) max_tokens: u32,
    /// Memory, in blocks.
    pub(crate) blocks: usize,
}

/// What a request asks for.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    /// The full blocks of its prompt.
    pub(crate) blocks: Vec<Name>,
    /// Tokens of its prompt.
    pub(crate) tokens: u32,
    /// Tokens that the answer will have, at least 1.
    pub(crate) output: u32,
}

struct Sequence {
    id: Id,
    prompt: Prompt,
    /// Tokens of the answer so far.
    made: u32,
    /// Tokens that must be read before the next can be made: the prompt, and after a preemption the answer so far.
    to_read: u32,
    /// Tokens of them that have been read, or were in the cache.
    read: u32,
    /// Blocks of its own.
    own: usize,
    /// What the step under way does for it.
    reads: u32,
    makes: bool,
}

impl Sequence {
    /// Blocks of its own that it needs for one more token.
    fn needs(&self) -> usize {
        let all = (self.prompt.tokens + self.made + 1).div_ceil(BLOCK) as usize;
        all - self.prompt.blocks.len()
    }
}

struct Step {
    began: Duration,
    ends: Duration,
}

/// The model.
pub(crate) struct Engine {
    cost: Cost,
    pace: Pace,
    memory: Blocks,
    waiting: VecDeque<Sequence>,
    /// In the order in which they joined.
    running: Vec<Sequence>,
    step: Option<Step>,
    counts: Counts,
}

impl Engine {
    pub(crate) fn new(cost: Cost, pace: Pace) -> Self {
        Self {
            cost,
            pace,
            memory: Blocks::new(cost.blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            step: None,
            counts: Counts::default(),
        }
    }

    /// Whether a sequence of so many tokens can ever be served.
    pub(crate) fn fits(&self, tokens: u32) -> bool {
        (tokens.div_ceil(BLOCK) as usize) < self.memory.capacity()
    }

    /// Begins a step if there is work and none is under way.
    fn begin(&mut self, now: Duration) {
        if self.step.is_some() || (self.running.is_empty() && self.waiting.is_empty()) {
            return;
        }
        let preempted = self.counts.preemptions;
        let making = self.plan_tokens();
        // Who has just given up its memory must not take it back at once from those whom it was given to.
        let room = if self.counts.preemptions == preempted { self.cost.max_sequences } else { 0 };
        let reading = self.plan_prompts(self.cost.max_tokens.saturating_sub(making), room);
        let work = self.cost.step
            + self.cost.sequence * f64::from(making)
            + self.cost.prompt_token * f64::from(reading);
        self.step = Some(Step { began: now, ends: self.pace.finish(now, work) });
    }

    /// Plans a token for each sequence that has been read, oldest first; who has no memory for it takes it from the youngest.
    fn plan_tokens(&mut self) -> u32 {
        let (mut at, mut planned) = (0, 0);
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            (sequence.reads, sequence.makes) = (0, sequence.read == sequence.to_read);
            if !sequence.makes {
                at += 1;
            } else if sequence.own >= sequence.needs() || self.memory.grow() {
                sequence.own = sequence.own.max(sequence.needs());
                planned += 1;
                at += 1;
            } else {
                self.preempt_youngest();
            }
        }
        planned
    }

    fn preempt_youngest(&mut self) {
        let Some(mut youngest) = self.running.pop() else { return };
        self.memory.give(&youngest.prompt.blocks, youngest.own);
        (youngest.own, youngest.read) = (0, 0);
        self.counts.preemptions += 1;
        self.waiting.push_front(youngest);
    }

    /// Plans the reading of prompts: first of those that have begun, then of those that wait while there are fewer than
    /// `room` sequences.
    fn plan_prompts(&mut self, budget: u32, room: usize) -> u32 {
        let mut left = budget;
        for sequence in &mut self.running {
            sequence.reads = left.min(sequence.to_read - sequence.read);
            left -= sequence.reads;
        }
        while left > 0 && self.running.len() < room {
            let Some(mut next) = self.waiting.pop_front() else { break };
            let own = next.needs();
            let Some(hits) = self.memory.take(&next.prompt.blocks, own) else {
                self.waiting.push_front(next);
                break;
            };
            next.own = own;
            next.to_read = next.prompt.tokens + next.made;
            // The last token must be read even when the cache has it all: it is what the first answer follows from.
            next.read = (hits as u32 * BLOCK).min(next.to_read - 1);
            self.counts.prompt_tokens += u64::from(next.to_read);
            self.counts.cached_tokens += u64::from(next.read);
            (next.reads, next.makes) = (left.min(next.to_read - next.read), false);
            left -= next.reads;
            self.running.push(next);
        }
        budget - left
    }

    fn end(&mut self, told: &mut Vec<Told>) {
        let memory = &mut self.memory;
        let counts = &mut self.counts;
        self.running.retain_mut(|sequence| {
            let was_read = sequence.read;
            sequence.read += sequence.reads;
            counts.units += u64::from(sequence.reads);
            let first =
                sequence.reads > 0 && sequence.read == sequence.to_read && was_read < sequence.to_read;
            if !sequence.makes && !first {
                return true;
            }
            sequence.made += 1;
            counts.units += 1;
            counts.output_tokens += 1;
            let done = sequence.made >= sequence.prompt.output;
            told.push(Told { id: sequence.id, done });
            if done {
                counts.requests += 1;
                memory.give(&sequence.prompt.blocks, sequence.own);
            }
            !done
        });
    }
}

impl Model for Engine {
    type Job = Prompt;

    fn arrive(&mut self, now: Duration, id: Id, prompt: Prompt) {
        let to_read = prompt.tokens;
        self.waiting.push_back(Sequence {
            id,
            prompt,
            made: 0,
            to_read,
            read: 0,
            own: 0,
            reads: 0,
            makes: false,
        });
        self.begin(now);
    }

    fn abandon(&mut self, id: Id) {
        self.waiting.retain(|sequence| sequence.id != id);
        let memory = &mut self.memory;
        self.running.retain(|sequence| {
            if sequence.id == id {
                memory.give(&sequence.prompt.blocks, sequence.own);
            }
            sequence.id != id
        });
    }

    fn next(&self) -> Option<Duration> {
        self.step.as_ref().map(|step| step.ends)
    }

    fn advance(&mut self, now: Duration, told: &mut Vec<Told>) {
        while let Some(step) = self.step.take_if(|step| step.ends <= now) {
            self.counts.executions += 1;
            self.counts.busy_s += (step.ends - step.began).as_secs_f64();
            self.end(told);
            self.begin(step.ends);
        }
    }

    fn reset(&mut self) {
        *self = Self::new(self.cost, self.pace.clone());
    }

    fn counts(&self) -> Counts {
        Counts {
            waiting: self.waiting.len(),
            running: self.running.len(),
            kv_usage: self.memory.usage(),
            ..self.counts
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Cost = Cost {
        step: 0.010,
        sequence: 0.001,
        prompt_token: 0.0001,
        max_sequences: 4,
        max_tokens: 128,
        blocks: 100,
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn engine(cost: Cost) -> Engine {
        Engine::new(cost, Pace::new(1.0, Vec::new()))
    }

    /// A prompt of `blocks` and one token more.
    fn prompt(blocks: &[Name], output: u32) -> Prompt {
        Prompt { blocks: blocks.to_vec(), tokens: blocks.len() as u32 * BLOCK + 1, output }
    }

    fn told(engine: &mut Engine, now: Duration) -> Vec<(Id, bool)> {
        let mut told = Vec::new();
        engine.advance(now, &mut told);
        told.iter().map(|told| (told.id, told.done)).collect()
    }

    fn to_the_end(engine: &mut Engine) -> Vec<(Id, bool)> {
        let mut all = Vec::new();
        while let Some(next) = engine.next() {
            all.extend(told(engine, next));
        }
        all
    }

    #[test]
    fn the_first_token_comes_when_the_prompt_is_read_and_then_one_with_each_step() {
        let mut engine = engine(COST);
        engine.arrive(ms(0), 1, prompt(&[], 3));
        // One prompt token: 10 ms and 0.1 ms.
        assert_eq!(engine.next(), Some(Duration::from_micros(10_100)));
        assert_eq!(told(&mut engine, ms(11)), [(1, false)]);
        assert_eq!(engine.next(), Some(Duration::from_micros(21_100)));
        assert_eq!(to_the_end(&mut engine), [(1, false), (1, true)]);
        assert_eq!(engine.counts().kv_usage, 0.0);
    }

    #[test]
    fn a_long_prompt_is_read_in_parts_while_others_get_their_tokens() {
        let mut engine = engine(COST);
        engine.arrive(ms(0), 1, prompt(&[], 10));
        engine.arrive(ms(1), 2, prompt(&(1..=16).collect::<Vec<_>>(), 1));
        // 257 tokens: 127 beside the other's token, twice, and then 3.
        let mut firsts = Vec::new();
        for _ in 0..4 {
            let next = engine.next().unwrap();
            firsts.push(told(&mut engine, next));
        }
        assert_eq!(firsts[1..], [vec![(1, false)], vec![(1, false)], vec![(1, false), (2, true)]]);
    }

    #[test]
    fn what_the_cache_has_is_not_read_again() {
        let mut engine = engine(COST);
        engine.arrive(ms(0), 1, prompt(&[1, 2, 3], 1));
        to_the_end(&mut engine);
        let before = engine.counts();
        engine.arrive(ms(100), 2, prompt(&[1, 2, 9], 1));
        to_the_end(&mut engine);
        let after = engine.counts();
        assert_eq!(after.cached_tokens - before.cached_tokens, 32);
        assert_eq!(after.units - before.units, 17 + 1);
    }

    #[test]
    fn a_prompt_that_is_cached_whole_still_reads_its_last_token() {
        let mut engine = engine(COST);
        for (at, id) in [(0, 1), (100, 2)] {
            engine.arrive(ms(at), id, Prompt { blocks: vec![1, 2], tokens: 32, output: 1 });
            assert_eq!(to_the_end(&mut engine), [(id, true)]);
        }
        assert_eq!(engine.counts().cached_tokens, 31);
    }

    #[test]
    fn who_finds_no_place_waits_in_the_order_of_arrival() {
        let mut engine = engine(Cost { max_sequences: 1, ..COST });
        (1..=3).for_each(|id| engine.arrive(ms(0), id, prompt(&[], 1)));
        assert_eq!(engine.counts().waiting, 2);
        assert_eq!(to_the_end(&mut engine), [(1, true), (2, true), (3, true)]);
    }

    #[test]
    fn the_youngest_gives_up_its_memory_and_all_are_answered_in_the_end() {
        let mut engine = engine(Cost { blocks: 6, ..COST });
        engine.arrive(ms(0), 1, prompt(&[1], 40));
        engine.arrive(ms(0), 2, prompt(&[2], 40));
        let told = to_the_end(&mut engine);
        assert!(engine.counts().preemptions > 0);
        for id in [1, 2] {
            assert_eq!(told.iter().filter(|told| told.0 == id).count(), 40, "each token is told once");
            assert_eq!(told.iter().filter(|told| **told == (id, true)).count(), 1);
        }
        assert_eq!((engine.counts().kv_usage, engine.counts().requests), (0.0, 2));
    }

    #[test]
    fn who_leaves_gives_its_memory_back() {
        let mut engine = engine(COST);
        (1..=6).for_each(|id| engine.arrive(ms(0), id, prompt(&[id], 50)));
        told(&mut engine, ms(30));
        (1..=6).for_each(|id| engine.abandon(id));
        assert_eq!((engine.counts().kv_usage, engine.counts().running), (0.0, 0));
        assert!(to_the_end(&mut engine).is_empty());
    }
}
