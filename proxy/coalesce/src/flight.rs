//! Single flight: of requests that are the same one is executed, and the others wait for its answer.
//!
//! The first is the leader. A leader that leaves is followed by the oldest of those who wait; a follower that leaves is
//! missed by nobody. Both numbers are bounded: what is above goes on its own.

use std::collections::VecDeque;

use ahash::AHashMap;

use crate::key::Hash;

/// Flights at once.
pub const MAX_FLIGHTS: usize = 65_536;
/// Followers of one flight.
pub const MAX_FOLLOWERS: usize = 4096;

/// A place in a flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat(u64);

/// How a request takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// It is to be executed; end it with [`Flights::done`].
    Lead(Seat),
    /// It waits.
    Follow(Seat),
    /// It goes on its own.
    Apart,
}

#[derive(Debug)]
struct Flight<W> {
    leader: Seat,
    followers: VecDeque<(Seat, W)>,
}

/// All flights.
#[derive(Debug)]
pub struct Flights<W> {
    by_key: AHashMap<Hash, Flight<W>>,
    next: u64,
}

impl<W> Default for Flights<W> {
    fn default() -> Self {
        Self { by_key: AHashMap::new(), next: 0 }
    }
}

impl<W> Flights<W> {
    /// A request comes; `waiter` is kept if it follows.
    pub fn join(&mut self, key: Hash, waiter: impl FnOnce() -> W) -> Joined {
        self.next += 1;
        let seat = Seat(self.next);
        if let Some(flight) = self.by_key.get_mut(&key) {
            if flight.followers.len() >= MAX_FOLLOWERS {
                return Joined::Apart;
            }
            flight.followers.push_back((seat, waiter()));
            return Joined::Follow(seat);
        }
        if self.by_key.len() >= MAX_FLIGHTS {
            return Joined::Apart;
        }
        self.by_key.insert(key, Flight { leader: seat, followers: VecDeque::new() });
        Joined::Lead(seat)
    }

    /// Somebody leaves. If it led, the one that leads now is returned, with its seat, to be told so.
    pub fn leave(&mut self, key: Hash, seat: Seat) -> Option<(Seat, W)> {
        let flight = self.by_key.get_mut(&key)?;
        if flight.leader != seat {
            flight.followers.retain(|(other, _)| *other != seat);
            return None;
        }
        let Some((next, waiter)) = flight.followers.pop_front() else {
            self.by_key.remove(&key);
            return None;
        };
        flight.leader = next;
        Some((next, waiter))
    }

    /// The leader has its answer: everybody who waits for it. Nobody, if it does not lead any more.
    pub fn done(&mut self, key: Hash, leader: Seat) -> impl Iterator<Item = W> + use<W> {
        let led = self.by_key.get(&key).is_some_and(|flight| flight.leader == leader);
        let flight = led.then(|| self.by_key.remove(&key)).flatten();
        flight.into_iter().flat_map(|flight| flight.followers).map(|(_, waiter)| waiter)
    }

    /// Flights under way.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Hash = [7; 32];

    fn follow(flights: &mut Flights<u32>, waiter: u32) -> Seat {
        match flights.join(KEY, || waiter) {
            Joined::Follow(seat) => seat,
            other => panic!("{waiter}: {other:?}"),
        }
    }

    fn lead(flights: &mut Flights<u32>) -> Seat {
        match flights.join(KEY, || 0) {
            Joined::Lead(seat) => seat,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_is_executed_and_all_get_its_answer() {
        let mut flights = Flights::default();
        let leader = lead(&mut flights);
        for waiter in 1..=3 {
            follow(&mut flights, waiter);
        }
        assert_eq!(flights.done(KEY, leader).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(flights.is_empty());
        lead(&mut flights);
    }

    #[test]
    fn a_leader_that_leaves_is_followed_by_the_oldest() {
        let mut flights = Flights::default();
        let leader = lead(&mut flights);
        let (first, second) = (follow(&mut flights, 1), follow(&mut flights, 2));
        assert_eq!(flights.leave(KEY, leader), Some((first, 1)));
        // What the old leader says afterwards is heard by nobody.
        assert_eq!(flights.done(KEY, leader).count(), 0);
        assert_eq!(flights.leave(KEY, first), Some((second, 2)));
        assert_eq!(flights.leave(KEY, second), None);
        assert!(flights.is_empty());
    }

    #[test]
    fn a_follower_that_leaves_is_missed_by_nobody() {
        let mut flights = Flights::default();
        let leader = lead(&mut flights);
        let (first, _) = (follow(&mut flights, 1), follow(&mut flights, 2));
        assert_eq!(flights.leave(KEY, first), None);
        assert_eq!(flights.done(KEY, leader).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn what_is_above_the_bound_goes_on_its_own() {
        let mut flights = Flights::default();
        lead(&mut flights);
        for waiter in 0..MAX_FOLLOWERS as u32 {
            follow(&mut flights, waiter);
        }
        assert_eq!(flights.join(KEY, || 0), Joined::Apart);
    }

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Join(u8),
        Leave(proptest::sample::Index),
        Done(proptest::sample::Index),
    }

    proptest::proptest! {
        /// Each flight has one leader, who is told so exactly once, and nobody is answered twice or forgotten.
        #[test]
        fn everybody_leads_or_is_answered_once(ops in proptest::collection::vec(op(), 1..80)) {
            let mut flights = Flights::default();
            // Who is aboard, by seat, and whether he leads.
            let mut aboard: Vec<(Hash, Seat, u32, bool)> = Vec::new();
            let mut next = 0;
            for op in ops {
                match op {
                    Op::Join(key) => {
                        let key = [key; 32];
                        next += 1;
                        let under_way = aboard.iter().any(|(other, ..)| *other == key);
                        match flights.join(key, || next) {
                            Joined::Lead(seat) if !under_way => aboard.push((key, seat, next, true)),
                            Joined::Follow(seat) if under_way => aboard.push((key, seat, next, false)),
                            other => panic!("{other:?}"),
                        }
                    }
                    Op::Leave(at) if !aboard.is_empty() => {
                        let (key, seat, _, led) = aboard.remove(at.index(aboard.len()));
                        let oldest = aboard.iter_mut().find(|(other, ..)| *other == key);
                        match (flights.leave(key, seat), oldest) {
                            (Some((seat, waiter)), Some(oldest)) if led => {
                                assert_eq!((oldest.1, oldest.2), (seat, waiter), "the oldest leads");
                                oldest.3 = true;
                            }
                            (None, oldest) => assert!(!led || oldest.is_none(), "nobody leads"),
                            other => panic!("{other:?}"),
                        }
                    }
                    Op::Done(at) if !aboard.is_empty() => {
                        let (key, seat, who, led) = aboard[at.index(aboard.len())];
                        let answered: Vec<u32> = flights.done(key, seat).collect();
                        if led {
                            let of_key = aboard.iter().filter(|(other, _, other_who, _)| *other == key && *other_who != who);
                            assert_eq!(answered, of_key.map(|(_, _, who, _)| *who).collect::<Vec<_>>());
                            aboard.retain(|(other, ..)| *other != key);
                        } else {
                            assert!(answered.is_empty(), "a follower has no answer to give");
                        }
                    }
                    Op::Leave(_) | Op::Done(_) => {}
                }
                let keys: std::collections::BTreeSet<_> = aboard.iter().map(|(key, ..)| *key).collect();
                assert_eq!(flights.len(), keys.len());
            }
        }
    }

    fn op() -> impl proptest::strategy::Strategy<Value = Op> {
        use proptest::prelude::*;
        prop_oneof![
            3 => (0..3_u8).prop_map(Op::Join),
            1 => any::<prop::sample::Index>().prop_map(Op::Leave),
            1 => any::<prop::sample::Index>().prop_map(Op::Done),
        ]
    }
}
