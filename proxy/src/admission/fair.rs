//! Who is next, so that each gets its share of the work. Pure.
//!
//! Each flow (a tenant, a class of priority) has a counter of the work that it was given, divided by its weight; of those
//! that have something waiting, the one with the smallest counter goes next. A flow that comes back after a pause is
//! lifted to where the others are, so that nobody saves up for later by being quiet. This is the virtual token counter
//! of Sheng et al., *Fairness in Serving Large Language Models* (OSDI 2024, algorithm 2), where work is tokens; with
//! weights it is start-time fair queueing (Goyal et al., SIGCOMM 1996) without tags on the requests.
//!
//! What it promises: between two flows of the same weight that both have something waiting all the time, the work that
//! they were given differs by at most two of the largest requests, over any time (theorem 4.4 of the former).

use std::collections::{BTreeMap, BTreeSet};

/// Work on a scale of whole numbers, so that counters order without NaN and add without loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Work(u64);

/// Parts of one unit of work. A counter that grows by a million units a second lasts for centuries.
const PARTS: f64 = 1024.0;

impl Work {
    /// What takes nothing.
    pub const NONE: Self = Self(0);

    /// Units of work: rows, tokens, or 1 for a request of which nothing is known. What is no number, or none above
    /// zero, counts as the least there is: every request costs something.
    pub fn units(units: f64) -> Self {
        // `as` saturates, and makes NaN 0.
        Self(((units * PARTS) as u64).clamp(1, u64::MAX >> 16))
    }

    /// As units again.
    pub fn as_units(self) -> f64 {
        self.0 as f64 / PARTS
    }

    /// The sum.
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, or none.
    pub fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    fn over(self, weight: u32) -> Self {
        Self(self.0 / u64::from(weight.max(1)))
    }

    fn times(self, weight: u32) -> Self {
        Self(self.0.saturating_mul(u64::from(weight.max(1))))
    }
}

#[derive(Clone, Copy, Debug)]
struct Flow {
    counter: Work,
    weight: u32,
    /// What it has waiting; `None` when nothing waits.
    waiting: Option<Work>,
}

/// Counters of flows.
#[derive(Clone, Debug)]
pub struct Fair<K> {
    flows: BTreeMap<K, Flow>,
    /// Those that have something waiting, by their counters.
    turns: BTreeSet<(Work, K)>,
    /// Where the counters are: what flows are lifted to when nobody waits.
    level: Work,
}

impl<K> Default for Fair<K> {
    fn default() -> Self {
        Self { flows: BTreeMap::new(), turns: BTreeSet::new(), level: Work::NONE }
    }
}

/// Flows that are remembered though nothing of theirs waits, beside as many as wait. One that is forgotten may at most
/// have its counter lifted as if it had been quiet.
const REMEMBERED: usize = 1024;

impl<K: Copy + Ord> Fair<K> {
    /// Something of the flow begins to wait, or more of it.
    pub fn waits(&mut self, key: K, weight: u32, work: Work) {
        let lifted = self.lifted(key);
        let flow = self.flows.entry(key).or_insert(Flow { counter: lifted, weight, waiting: None });
        flow.weight = weight;
        match &mut flow.waiting {
            Some(waiting) => *waiting = waiting.plus(work),
            None => {
                flow.waiting = Some(work);
                flow.counter = lifted;
                self.turns.insert((lifted, key));
            }
        }
        self.forget();
    }

    /// Something of the flow that waited goes away, unserved; `last`: nothing of it waits any more.
    pub fn leaves(&mut self, key: K, work: Work, last: bool) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let Some(waiting) = flow.waiting else { return };
        flow.waiting = (!last).then(|| waiting.minus(work));
        if last {
            self.turns.remove(&(flow.counter, key));
            // Who leaves last leaves the level for whoever comes next.
            if self.turns.is_empty() {
                self.level = self.level.max(flow.counter);
            }
        }
    }

    /// Something of the flow that waited is served.
    pub fn served(&mut self, key: K, work: Work, last: bool) {
        self.charge(key, work);
        self.leaves(key, work, last);
    }

    /// The flow was given more work than was thought.
    pub fn charge(&mut self, key: K, work: Work) {
        self.count(key, |counter, weight| counter.plus(work.over(weight)));
    }

    /// The flow was given less work than was thought.
    pub fn refund(&mut self, key: K, work: Work) {
        self.count(key, |counter, weight| counter.minus(work.over(weight)));
    }

    fn count(&mut self, key: K, change: impl FnOnce(Work, u32) -> Work) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let before = flow.counter;
        flow.counter = change(before, flow.weight);
        if flow.waiting.is_some() {
            self.turns.remove(&(before, key));
            self.turns.insert((flow.counter, key));
        }
    }

    /// Whose turn it is, among those that have something waiting.
    pub fn next(&self) -> Option<K> {
        self.turns.first().map(|(_, key)| *key)
    }

    /// How much work goes before the last of `work` of this flow, that work included, if nobody else comes: `work`
    /// itself, and of each other flow what it is behind plus its share meanwhile.
    pub fn ahead(&self, key: K, weight: u32, work: Work) -> Work {
        let until = self.lifted(key).plus(work.over(weight));
        let before = self.turns.iter().take_while(|(counter, _)| *counter < until);
        before.filter(|(_, other)| *other != key).fold(work, |ahead, (counter, other)| {
            let Some(Flow { weight, waiting: Some(waiting), .. }) = self.flows.get(other) else {
                return ahead;
            };
            ahead.plus(until.minus(*counter).times(*weight).min(*waiting))
        })
    }

    /// What the flow has waiting.
    pub fn waiting(&self, key: K) -> Work {
        self.flows.get(&key).and_then(|flow| flow.waiting).unwrap_or(Work::NONE)
    }

    /// The flow's counter if it waited from now on.
    fn lifted(&self, key: K) -> Work {
        let lowest = self.turns.first().map_or(self.level, |(counter, _)| *counter);
        match self.flows.get(&key) {
            Some(Flow { counter, waiting: Some(_), .. }) => *counter,
            Some(Flow { counter, .. }) => (*counter).max(lowest),
            None => lowest,
        }
    }

    /// Keeps memory bounded. A counter at or below the others' means nothing; more than that is forgotten only when
    /// there are too many.
    fn forget(&mut self) {
        let bound = 2 * self.turns.len() + REMEMBERED;
        if self.flows.len() <= bound {
            return;
        }
        let lowest = self.turns.first().map_or(self.level, |(counter, _)| *counter);
        self.flows.retain(|_, flow| flow.waiting.is_some() || flow.counter > lowest);
        if self.flows.len() > bound {
            self.flows.retain(|_, flow| flow.waiting.is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(units: f64) -> Work {
        Work::units(units)
    }

    #[test]
    fn nonsense_costs_the_least_there_is() {
        for bad in [f64::NAN, f64::NEG_INFINITY, -1.0, 0.0] {
            assert_eq!(Work::units(bad), Work(1), "{bad}");
        }
        assert!(Work::units(f64::INFINITY).plus(Work::units(f64::INFINITY)).as_units().is_finite());
    }

    #[test]
    fn the_one_that_was_given_least_goes_next_and_weights_divide() {
        let mut fair = Fair::default();
        for (key, weight) in [('a', 1), ('b', 3)] {
            fair.waits(key, weight, units(100.0));
        }
        let mut given = String::new();
        for _ in 0..8 {
            let next = fair.next().unwrap();
            fair.served(next, units(3.0), false);
            given.push(next);
        }
        assert_eq!(given.matches('b').count(), 6, "{given}");
    }

    #[test]
    fn who_was_quiet_has_saved_nothing() {
        let mut fair = Fair::default();
        fair.waits('a', 1, units(1000.0));
        for _ in 0..100 {
            fair.served('a', units(10.0), false);
        }
        fair.waits('b', 1, units(1000.0));
        let mut given = [0, 0];
        for _ in 0..10 {
            let next = fair.next().unwrap();
            fair.served(next, units(10.0), false);
            given[usize::from(next == 'b')] += 1;
        }
        assert_eq!(given, [5, 5]);
    }

    #[test]
    fn who_left_last_leaves_the_level() {
        let mut fair = Fair::default();
        fair.waits('a', 1, units(5.0));
        fair.served('a', units(5.0), true);
        fair.waits('b', 1, units(1.0));
        fair.waits('a', 1, units(1.0));
        assert_eq!(fair.lifted('a'), fair.lifted('b'));
    }

    #[test]
    fn what_goes_before_is_ones_own_work_and_the_others_share() {
        let mut fair = Fair::default();
        fair.waits('a', 1, units(30.0));
        fair.waits('b', 1, units(4.0));
        // c has 10 of its own; a gets as much meanwhile, b all that it has.
        assert_eq!(fair.ahead('c', 1, units(10.0)).as_units(), 24.0);
        // With thrice the weight, a third of it.
        assert!((fair.ahead('c', 3, units(9.0)).as_units() - 15.0).abs() < 0.1);
    }

    #[test]
    fn memory_does_not_grow_with_strangers() {
        let mut fair = Fair::default();
        for stranger in 0..100_000_u32 {
            fair.waits(stranger, 1, units(1.0));
            fair.served(stranger, units(f64::from(stranger % 7)), true);
        }
        assert!(fair.flows.len() <= REMEMBERED + 2, "{}", fair.flows.len());
        assert!(fair.turns.is_empty());
    }
}
