//! The memory for keys and values, in blocks: those of prompts are known by their content and kept for the next prompt that
//! begins alike, as vLLM's automatic prefix caching does; the rest belongs to one sequence alone.
//!
//! A block's name is chained, so it stands for all that comes before it, too. Blocks that nobody uses are dropped when
//! the room is needed, those first that were used longest ago, and of one prompt the last first, since those before it are of use
//! without it.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

/// A block's name: a hash over its content and that of all blocks before it.
pub(crate) type Name = u64;

struct Block {
    users: u32,
    /// Counts uses.
    used: u64,
    /// Its place in the prompt.
    place: usize,
}

impl Block {
    /// Who goes first goes first here.
    fn turn(&self, name: Name) -> (u64, Reverse<usize>, Name) {
        (self.used, Reverse(self.place), name)
    }
}

/// The memory.
pub(crate) struct Blocks {
    capacity: usize,
    named: HashMap<Name, Block>,
    /// Those without users, in the order in which they go.
    idle: BTreeSet<(u64, Reverse<usize>, Name)>,
    own: usize,
    uses: u64,
}

impl Blocks {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, named: HashMap::new(), idle: BTreeSet::new(), own: 0, uses: 0 }
    }

    /// All blocks.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Takes the blocks of a prompt and `own` more. Returns how many leading ones were there already, or nothing, and takes nothing, if
    /// there is no room.
    pub(crate) fn take(&mut self, names: &[Name], own: usize) -> Option<usize> {
        let hits = names.iter().take_while(|name| self.named.contains_key(name)).count();
        let revived = names[..hits].iter().filter(|name| self.named[name].users == 0).count();
        let known = names[hits..].iter().filter(|name| self.named.contains_key(name)).count();
        let wanted = names.len() - hits - known + own;
        // What is idle and will be used by this prompt cannot make room for it.
        let idle_after = self.idle.len().saturating_sub(revived + known);
        if wanted > self.capacity - self.named.len() - self.own + idle_after {
            return None;
        }
        self.uses += 1;
        for (place, name) in names.iter().enumerate() {
            let block = self.named.entry(*name).or_insert(Block { users: 0, used: self.uses, place });
            self.idle.remove(&block.turn(*name));
            block.users += 1;
            block.used = self.uses;
        }
        self.own += own;
        self.make_room();
        Some(hits)
    }

    /// Takes one more block of a sequence's own, if there is room.
    pub(crate) fn grow(&mut self) -> bool {
        if self.used() == self.capacity {
            return false;
        }
        self.own += 1;
        self.make_room();
        true
    }

    /// Gives back what a sequence took.
    pub(crate) fn give(&mut self, names: &[Name], own: usize) {
        self.own -= own;
        for name in names {
            if let Some(block) = self.named.get_mut(name) {
                block.users -= 1;
                if block.users == 0 {
                    self.idle.insert(block.turn(*name));
                }
            }
        }
    }

    /// Blocks that somebody uses.
    fn used(&self) -> usize {
        self.named.len() - self.idle.len() + self.own
    }

    /// Share of the blocks that somebody uses.
    pub(crate) fn usage(&self) -> f64 {
        self.used() as f64 / self.capacity as f64
    }

    fn make_room(&mut self) {
        while self.named.len() + self.own > self.capacity
            && let Some((_, _, name)) = self.idle.pop_first()
        {
            self.named.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_begins_alike_finds_the_blocks_of_the_one_before() {
        let mut blocks = Blocks::new(8);
        assert_eq!(blocks.take(&[1, 2, 3], 1), Some(0));
        blocks.give(&[1, 2, 3], 1);
        assert_eq!(blocks.usage(), 0.0);
        assert_eq!(blocks.take(&[1, 2, 4], 1), Some(2));
        assert_eq!(blocks.usage(), 0.5);
    }

    #[test]
    fn what_was_used_longest_ago_makes_room_first() {
        let mut blocks = Blocks::new(4);
        for prompt in [[1, 2], [3, 4], [1, 2]] {
            blocks.take(&prompt, 0);
            blocks.give(&prompt, 0);
        }
        assert_eq!(blocks.take(&[5, 6], 0), Some(0));
        blocks.give(&[5, 6], 0);
        assert_eq!(blocks.take(&[1, 2], 0), Some(2));
        assert_eq!(blocks.take(&[3, 4], 0), Some(0), "3 and 4 had to go");
    }

    #[test]
    fn the_end_of_a_prompt_goes_before_its_beginning() {
        let mut blocks = Blocks::new(4);
        blocks.take(&[1, 2, 3, 4], 0);
        blocks.give(&[1, 2, 3, 4], 0);
        assert_eq!(blocks.take(&[9], 1), Some(0));
        blocks.give(&[9], 1);
        assert_eq!(blocks.take(&[1, 2, 3, 4], 0), Some(2));
    }

    #[test]
    fn without_room_nothing_is_taken() {
        let mut blocks = Blocks::new(4);
        assert_eq!(blocks.take(&[1, 2], 1), Some(0));
        assert_eq!(blocks.take(&[1, 3, 4], 0), None);
        assert_eq!(blocks.usage(), 0.75);
        assert!(blocks.grow());
        assert!(!blocks.grow());
        blocks.give(&[1, 2], 2);
        assert_eq!(blocks.usage(), 0.0);
        assert_eq!(blocks.take(&[1, 3, 4], 1), Some(1));
    }

    #[test]
    fn a_prompt_cannot_make_room_for_itself_by_dropping_its_own_beginning() {
        let mut blocks = Blocks::new(3);
        blocks.take(&[1, 2], 0);
        blocks.give(&[1, 2], 0);
        assert_eq!(blocks.take(&[1, 2, 3], 1), None);
        assert_eq!(blocks.take(&[1, 2, 3], 0), Some(2));
    }
}
