//! The endpoints of a cluster as a whole, with what is found out once when they change so that a pick need not.

use std::ops::Deref;
use std::time::Duration;

use crate::cell::Ordering;
use crate::pick::Candidate;
use crate::rendezvous::{Tree, mix};
use crate::wrr;
use Ordering::Relaxed;

/// Endpoints in a fixed order, with their tree.
#[derive(Debug)]
pub struct Members<C> {
    all: Box<[C]>,
    tree: Tree,
    /// Short numbers that are the same in every sidecar, sorted, with indices.
    numbers: Box<[(u32, u32)]>,
}

impl<C> Default for Members<C> {
    fn default() -> Self {
        Self { all: Box::default(), tree: Tree::default(), numbers: Box::default() }
    }
}

impl<C: Candidate> Members<C> {
    /// These endpoints.
    pub fn new(all: Vec<C>) -> Self {
        let tree = Tree::new(all.iter().map(Candidate::name));
        let mut numbers: Box<[(u32, u32)]> = all.iter().map(|c| number(c.name())).zip(0..).collect();
        numbers.sort_unstable();
        let members = Self { all: all.into(), tree, numbers };
        members.join_siblings();
        members
    }

    /// What has to be done now and then, outside of picks: the round-robin schedule of `orca-wrr`, and who shares a
    /// GPU with whom. Call it once a second.
    pub fn tend(&self, now: Duration) {
        wrr::schedule(&self.all, now);
        self.join_siblings();
    }

    /// Joins replicas that share a GPU to circles.
    fn join_siblings(&self) {
        let mut on: Vec<(u64, u32)> =
            self.all.iter().zip(0u32..).filter_map(|(c, i)| Some((c.state().gpu()?, i))).collect();
        on.sort_unstable();
        for circle in on.chunk_by(|a, b| a.0 == b.0) {
            for (k, (_, i)) in circle.iter().enumerate() {
                let next = circle[(k + 1) % circle.len()].1;
                let link = if circle.len() > 1 { next + 1 } else { 0 };
                self.all[*i as usize].state().sibling.store(link, Relaxed);
            }
        }
    }

    /// The other replicas on the same physical GPU; at most eight are looked at.
    pub(crate) fn siblings(&self, i: usize) -> impl Iterator<Item = &C> {
        let follow = |i: usize| {
            let next = self.all.get(i)?.state().sibling.load(Relaxed).checked_sub(1)? as usize;
            (next < self.all.len()).then_some(next)
        };
        std::iter::successors(follow(i), move |j| follow(*j))
            .take_while(move |j| *j != i)
            .take(8)
            .map(|j| &self.all[j])
    }

    /// Where the key is at home.
    pub(crate) fn home(&self, key: u64) -> Option<usize> {
        self.tree.home(key)
    }

    /// The short number of an endpoint.
    pub(crate) fn number(&self, i: usize) -> u32 {
        number(self.all[i].name())
    }

    pub(crate) fn numbered(&self, number: u32) -> Option<usize> {
        let at = self.numbers.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        Some(self.numbers[at].1 as usize)
    }
}

fn number(name: u64) -> u32 {
    (mix(name ^ 0xb10c) >> 40) as u32
}

impl<C> Deref for Members<C> {
    type Target = [C];

    fn deref(&self) -> &[C] {
        &self.all
    }
}
