//! Which slots of an arena are free. Pure: it knows numbers, not memory.
//!
//! In: requests for so many slots in a row, and slots that come back. Out: ranges that never overlap while they are out.
//! Slots whose reader may still be reading stay in quarantine until an amnesty. The lowest gap that is large enough is
//! taken, which keeps the upper end free for large runs; a gap list is as long as there are runs, some tens.

use std::ops::Range;

/// A range of slots.
pub(super) type Slots = Range<usize>;

/// The slots of an arena.
#[derive(Debug)]
pub(super) struct Space {
    /// Ascending; no two touch.
    gaps: Vec<Slots>,
    quarantine: Vec<Slots>,
    era: u64,
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
        Self { gaps, quarantine: Vec::new(), era: 0, in_use: 0, peak: 0, runs: 0, refused: 0 }
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

    /// Slots come back. `lent`: the era in which they were handed to somebody who never gave them back.
    pub(super) fn give(&mut self, slots: Slots, lent: Option<u64>) {
        self.runs -= 1;
        if lent == Some(self.era) {
            self.quarantine.push(slots);
        } else {
            self.free(slots);
        }
    }

    /// Goes up with each amnesty.
    pub(super) fn era(&self) -> u64 {
        self.era
    }

    /// Slots in quarantine.
    pub(super) fn quarantined(&self) -> usize {
        self.quarantine.iter().map(ExactSizeIterator::len).sum()
    }

    /// Whoever had something is gone: what is in quarantine is free again, and what was handed out before today will not
    /// enter it. Returns how many slots that freed.
    pub(super) fn amnesty(&mut self) -> usize {
        self.era += 1;
        let slots = self.quarantined();
        for slots in std::mem::take(&mut self.quarantine) {
            self.free(slots);
        }
        slots
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
        let mut space = Space::new(4);
        let (old, new) = (space.take(2).unwrap(), space.take(1).unwrap());
        space.give(old, Some(space.era()));
        assert_eq!((space.quarantined(), space.in_use, space.runs), (2, 3, 1));
        assert_eq!(space.take(2), None);
        let before = space.era();
        assert_eq!(space.amnesty(), 2);
        // Handed to the one that is gone, noticed only afterwards.
        space.give(new, Some(before));
        assert_eq!((space.quarantined(), space.in_use, space.runs), (0, 0, 0));
        assert_eq!(space.take(4), Some(0..4));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take(usize),
        Give(prop::sample::Index),
        Lose(prop::sample::Index),
        Amnesty,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0usize..9).prop_map(Step::Take),
            3 => any::<prop::sample::Index>().prop_map(Step::Give),
            1 => any::<prop::sample::Index>().prop_map(Step::Lose),
            1 => Just(Step::Amnesty),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn nothing_overlaps_and_all_that_comes_back_is_free(steps in prop::collection::vec(step(), 0..200)) {
            let mut space = Space::new(32);
            let (mut out, mut lost): (Vec<Slots>, Vec<Slots>) = (Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Take(slots) => {
                        let taken = space.take(slots);
                        let all = || out.iter().chain(&lost);
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
                    Step::Lose(which) if !out.is_empty() => {
                        let slots = out.swap_remove(which.index(out.len()));
                        space.give(slots.clone(), Some(space.era()));
                        lost.push(slots);
                    }
                    Step::Amnesty => {
                        let slots: usize = lost.drain(..).map(|slots| slots.len()).sum();
                        prop_assert_eq!(space.amnesty(), slots);
                    }
                    Step::Give(_) | Step::Lose(_) => {}
                }
                let used: usize = out.iter().chain(&lost).map(ExactSizeIterator::len).sum();
                prop_assert_eq!((space.in_use, space.runs), (used, out.len()));
                prop_assert!(space.peak >= used);
            }
            out.into_iter().for_each(|slots| space.give(slots, None));
            space.amnesty();
            prop_assert_eq!(space.take(32), Some(0..32));
        }
    }
}
