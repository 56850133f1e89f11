//! Which slots of an arena are free. Pure: it knows numbers, not memory.
//!
//! In: requests for so many slots in a row, and slots that come back. Out: ranges that never overlap while they are out.
//! Slots whose reader may still be reading stay in quarantine until an amnesty. The lowest gap that is large enough is
//! taken, which keeps the upper end free for large runs; a gap list is as long as there are runs, some tens.

use std::collections::BTreeMap;
use std::ops::Range;

/// A range of slots.
pub(super) type Slots = Range<usize>;

/// To whom slots were handed, and after how many amnesties of his.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lent {
    server: u64,
    era: u64,
}

/// The slots of an arena.
#[derive(Debug)]
pub(super) struct Space {
    /// Ascending; no two touch.
    gaps: Vec<Slots>,
    quarantine: Vec<(Lent, Slots)>,
    /// How many amnesties each server has had, if any.
    eras: BTreeMap<u64, u64>,
    /// Slots that are not free, those in quarantine among them.
    pub(super) in_use: usize,
    /// The most that were ever in use.
    pub(super) peak: usize,
    /// Ranges that are out.
    pub(super) runs: usize,
    /// Requests that found no room.
    pub(super) refused: u64,
}

impl Space {
    pub(super) fn new(slots: usize) -> Self {
        let whole = 0..slots;
        let gaps = if whole.is_empty() { Vec::new() } else { vec![whole] };
        Self { gaps, quarantine: Vec::new(), eras: BTreeMap::new(), in_use: 0, peak: 0, runs: 0, refused: 0 }
    }

    /// So many slots in a row, at least one; `None`: there are none.
    pub(super) fn take(&mut self, slots: usize) -> Option<Slots> {
        let slots = slots.max(1);
        let Some(at) = self.gaps.iter().position(|gap| gap.len() >= slots) else {
            self.refused += 1;
            return None;
        };
        let gap = &mut self.gaps[at];
        let taken = gap.start..gap.start + slots;
        gap.start = taken.end;
        if gap.start == gap.end {
            self.gaps.remove(at);
        }
        self.runs += 1;
        self.in_use += slots;
        self.peak = self.peak.max(self.in_use);
        Some(taken)
    }

    /// Slots come back. `lent`: to somebody who never gave them back.
    pub(super) fn give(&mut self, slots: Slots, lent: Option<Lent>) {
        self.runs -= 1;
        match lent.filter(|lent| *lent == self.lend(lent.server)) {
            Some(lent) => self.quarantine.push((lent, slots)),
            None => self.free(slots),
        }
    }

    /// What is handed to this server now.
    pub(super) fn lend(&self, server: u64) -> Lent {
        Lent { server, era: self.eras.get(&server).copied().unwrap_or_default() }
    }

    /// Slots in quarantine.
    pub(super) fn quarantined(&self) -> usize {
        self.quarantine.iter().map(|(_, slots)| slots.len()).sum()
    }

    /// This server is gone: what is in quarantine because of it is free again, and what it was handed until now will not
    /// enter it. Returns how many slots that freed.
    pub(super) fn amnesty(&mut self, server: u64) -> usize {
        *self.eras.entry(server).or_default() += 1;
        let freed: Vec<_> = self.quarantine.extract_if(.., |(lent, _)| lent.server == server).collect();
        let before = self.in_use;
        freed.into_iter().for_each(|(_, slots)| self.free(slots));
        before - self.in_use
    }

    fn free(&mut self, mut slots: Slots) {
        self.in_use -= slots.len();
        let at = self.gaps.partition_point(|gap| gap.end < slots.start);
        // Gaps that it touches become one with it: at most one on each side.
        let touching = self.gaps[at..].iter().take_while(|gap| gap.start <= slots.end).count();
        for gap in self.gaps.drain(at..at + touching) {
            slots = slots.start.min(gap.start)..slots.end.max(gap.end);
        }
        self.gaps.insert(at, slots);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_gap_that_is_large_enough_is_found_again() {
        let mut space = Space::new(10);
        let (a, b, c) = (space.take(3).unwrap(), space.take(4).unwrap(), space.take(3).unwrap());
        assert_eq!((a.clone(), b.clone(), c.clone()), (0..3, 3..7, 7..10));
        assert_eq!(space.take(1), None);
        assert_eq!(space.refused, 1);
        space.give(a, None);
        space.give(c, None);
        assert_eq!(space.take(4), None, "3 + 3 free slots are not 4 in a row");
        space.give(b, None);
        assert_eq!(space.take(10), Some(0..10));
        assert_eq!(space.peak, 10);
    }

    #[test]
    fn what_was_lent_and_not_returned_waits_for_an_amnesty() {
        const ONE: u64 = 1;
        let mut space = Space::new(4);
        let (old, new) = (space.take(2).unwrap(), space.take(1).unwrap());
        let before = space.lend(ONE);
        space.give(old, Some(before));
        assert_eq!((space.quarantined(), space.in_use, space.runs), (2, 3, 1));
        assert_eq!(space.take(2), None);
        assert_eq!(space.amnesty(2), 0, "another server's");
        assert_eq!(space.amnesty(ONE), 2);
        // Handed to the one that is gone, noticed only afterwards.
        space.give(new, Some(before));
        assert_eq!((space.quarantined(), space.in_use, space.runs), (0, 0, 0));
        assert_eq!(space.take(4), Some(0..4));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take(usize),
        Give(prop::sample::Index),
        Lose(prop::sample::Index, u64),
        Amnesty(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0usize..9).prop_map(Step::Take),
            3 => any::<prop::sample::Index>().prop_map(Step::Give),
            1 => (any::<prop::sample::Index>(), 0u64..2).prop_map(|(which, to)| Step::Lose(which, to)),
            1 => (0u64..2).prop_map(Step::Amnesty),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn nothing_overlaps_and_all_that_comes_back_is_free(steps in prop::collection::vec(step(), 0..200)) {
            let mut space = Space::new(32);
            let (mut out, mut lost): (Vec<Slots>, Vec<(u64, Slots)>) = (Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Take(slots) => {
                        let taken = space.take(slots);
                        let all = || out.iter().chain(lost.iter().map(|(_, slots)| slots));
                        match taken {
                            Some(taken) => {
                                prop_assert!(taken.end <= 32 && taken.len() == slots.max(1));
                                prop_assert!(all().all(|other| other.end <= taken.start || taken.end <= other.start));
                                out.push(taken);
                            }
                            None => {
                                // Nowhere is there a hole of that size.
                                let used = |slot: &usize| all().any(|range| range.contains(slot));
                                let slots = slots.max(1);
                                for at in 0..=32 - slots {
                                    prop_assert!((at..at + slots).any(|slot| used(&slot)));
                                }
                            }
                        }
                    }
                    Step::Give(which) if !out.is_empty() => {
                        let slots = out.swap_remove(which.index(out.len()));
                        space.give(slots, None);
                    }
                    Step::Lose(which, to) if !out.is_empty() => {
                        let slots = out.swap_remove(which.index(out.len()));
                        let lent = space.lend(to);
                        space.give(slots.clone(), Some(lent));
                        lost.push((to, slots));
                    }
                    Step::Amnesty(to) => {
                        let freed: usize = lost.extract_if(.., |(of, _)| *of == to).map(|(_, slots)| slots.len()).sum();
                        prop_assert_eq!(space.amnesty(to), freed);
                    }
                    Step::Give(_) | Step::Lose(..) => {}
                }
                let used: usize = out.iter().chain(lost.iter().map(|(_, slots)| slots)).map(ExactSizeIterator::len).sum();
                prop_assert_eq!((space.in_use, space.runs), (used, out.len()));
                prop_assert!(space.peak >= used);
            }
            out.into_iter().for_each(|slots| space.give(slots, None));
            for to in 0..2 {
                space.amnesty(to);
            }
            prop_assert_eq!(space.take(32), Some(0..32));
        }
    }
}
