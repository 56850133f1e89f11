//! Which endpoint has seen which block of a prompt: a table of fixed size that forgets.
//!
//! Two facts are kept of a block: that an endpoint has it, and which endpoint had it last. Both are one atomic word in
//! a table of lines of eight; a new fact takes the place of the oldest in its line, much as an LRU cache would. A wrong
//! answer (a collision of 24 bits) costs one prefill.

use std::time::Duration;

use crate::cell::{AtomicU64, Ordering};
use crate::rendezvous::mix;
use Ordering::Relaxed;

/// Lines, each of the size of a cache line; 512 KiB.
const LINES: usize = 1 << 13;
const FACTS: usize = 8;
/// A fact older than this is forgotten: the model server has most likely evicted the block.
pub const EXPIRY: Duration = Duration::from_secs(180);

/// A fact is written anew once it is older than this.
const RENEWAL: Duration = Duration::from_secs(30);

/// The table.
#[derive(Debug)]
pub struct Memory {
    lines: Box<[[AtomicU64; FACTS]]>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { lines: (0..LINES).map(|_| std::array::from_fn(|_| AtomicU64::new(0))).collect() }
    }
}

/// A fact is `tag:24 | value:24 | seconds:16`.
impl Memory {
    /// The endpoint has, from now on, all the blocks. What is known lately is not written again.
    pub fn remember(&self, blocks: &[u64], endpoint: u32, now: Duration) {
        let known = match blocks.first().and_then(|first| self.age_of(has(*first, endpoint), now)) {
            Some(age) if age <= RENEWAL.as_secs() => self.matched(blocks, endpoint, now),
            _ => 0,
        };
        for block in &blocks[known.saturating_sub(1)..] {
            self.put(*block, endpoint, now);
            self.put(has(*block, endpoint), endpoint, now);
        }
    }

    /// How many of the blocks the endpoint has, from the first on. Prefixes nest, so it is a binary search.
    pub fn matched(&self, blocks: &[u64], endpoint: u32, now: Duration) -> usize {
        let known = |block: &u64| self.get(has(*block, endpoint), now).is_some();
        // Most endpoints have nothing of it.
        if blocks.first().is_some_and(known) { blocks.partition_point(known) } else { 0 }
    }

    /// The endpoint that last saw the longest known part of the blocks.
    pub fn holder(&self, blocks: &[u64], now: Duration) -> Option<u32> {
        let known = blocks.partition_point(|block| self.get(*block, now).is_some());
        self.get(*blocks.get(known.checked_sub(1)?)?, now)
    }

    fn age_of(&self, key: u64, now: Duration) -> Option<u64> {
        let facts = self.lines[key as usize % LINES].iter().map(|slot| slot.load(Relaxed));
        facts.filter(|fact| *fact != 0 && fact >> 40 == key >> 40).map(|fact| age(fact, now)).min()
    }

    fn put(&self, key: u64, value: u32, now: Duration) {
        let fact = (key >> 40 << 40) | (u64::from(value) & 0xff_ffff) << 16 | (now.as_secs() & 0xffff);
        let line = &self.lines[key as usize % LINES];
        let mut oldest = (0, &line[0]);
        for slot in line {
            let old = slot.load(Relaxed);
            if old >> 40 == key >> 40 || old == 0 {
                slot.store(fact, Relaxed);
                return;
            }
            if age(old, now) >= oldest.0 {
                oldest = (age(old, now), slot);
            }
        }
        oldest.1.store(fact, Relaxed);
    }

    fn get(&self, key: u64, now: Duration) -> Option<u32> {
        let facts = self.lines[key as usize % LINES].iter().map(|slot| slot.load(Relaxed));
        let mut known = facts.filter(|fact| *fact != 0 && fact >> 40 == key >> 40);
        known.find(|fact| age(*fact, now) <= EXPIRY.as_secs()).map(|fact| (fact >> 16) as u32 & 0xff_ffff)
    }
}

fn age(fact: u64, now: Duration) -> u64 {
    now.as_secs().wrapping_sub(fact) & 0xffff
}

fn has(block: u64, endpoint: u32) -> u64 {
    mix(block ^ mix(u64::from(endpoint) + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn blocks(conversation: u64, n: u64) -> Vec<u64> {
        (0..n).map(|i| mix(conversation * 1000 + i)).collect()
    }

    #[test]
    fn the_longest_known_prefix_is_found() {
        let memory = Memory::default();
        memory.remember(&blocks(1, 10), 7, s(5));
        assert_eq!(memory.matched(&blocks(1, 14), 7, s(6)), 10);
        assert_eq!(memory.matched(&blocks(1, 4), 7, s(6)), 4);
        assert_eq!(memory.matched(&blocks(1, 14), 8, s(6)), 0);
        assert_eq!(memory.matched(&blocks(2, 14), 7, s(6)), 0);
        assert_eq!(memory.holder(&blocks(1, 14), s(6)), Some(7));
        memory.remember(&blocks(1, 12), 8, s(7));
        assert_eq!(memory.holder(&blocks(1, 14), s(8)), Some(8));
        assert_eq!(memory.matched(&blocks(1, 14), 7, s(8)), 10, "the first still has it");
        assert_eq!(memory.holder(&[], s(8)), None);
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let memory = Memory::default();
        memory.remember(&blocks(1, 3), 7, s(65_530));
        assert_eq!(memory.matched(&blocks(1, 3), 7, s(65_540)), 3, "seconds wrap");
        assert_eq!(memory.matched(&blocks(1, 3), 7, s(65_530) + EXPIRY + s(1)), 0);
    }
}
