//! The buckets of a limit: a fixed number of places, each for one key as long as it has something to remember.
//!
//! In: the hash of a key, and the time. Out: the place where it is counted. Clients choose keys (identities, models), so there is an
//! end: when all places are taken, further keys share one. A place whose buckets are full and that nobody holds says nothing that a
//! new one would not say, so the next key takes it.
//!
//! There is no lock. Where two workers take a place at the same moment, a request may be counted in the place of another key, once:
//! that is one too many for the one and one too few for the other, and is gone when the bucket is full again.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use super::bucket::Bucket;

/// Keys that a limit tells apart at a time: 32 KiB. All of a cluster's service accounts, or models with adapters, that call one pod
/// within what it takes a bucket to fill.
pub const PLACES: usize = 1024;

/// How often a worker that loses a place to another looks for one again.
const TRIES: usize = 3;

/// What is counted for one key.
#[derive(Debug, Default)]
pub struct Place {
    /// The hash of the key; 0: it was never taken.
    key: AtomicU64,
    /// Requests in a time.
    pub requests: Bucket,
    /// Tokens in a time.
    pub tokens: Bucket,
    in_flight: AtomicU32,
}

impl Place {
    /// One more is in flight, if that is no more than `most`.
    pub fn enter(&self, most: u32) -> bool {
        let enter = |count: u32| (count < most).then_some(count + 1);
        self.in_flight.fetch_update(AcqRel, Acquire, enter).is_ok()
    }

    /// One less is.
    pub fn leave(&self) {
        self.in_flight.fetch_sub(1, AcqRel);
    }

    fn is_idle(&self, now: Duration) -> bool {
        self.in_flight.load(Acquire) == 0 && self.requests.is_full(now) && self.tokens.is_full(now)
    }
}

/// All places of a limit.
#[derive(Debug)]
pub struct Table {
    /// A power of two of them, or none.
    places: Box<[Place]>,
    /// Of all keys that have no place.
    rest: Place,
}

/// Which place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At(usize);

impl Table {
    /// With a place for each key, or with one for all.
    pub fn new(keyed: bool) -> Self {
        let count = if keyed { PLACES } else { 0 };
        Self { places: (0..count).map(|_| Place::default()).collect(), rest: Place::default() }
    }

    /// The place.
    pub fn get(&self, At(at): At) -> &Place {
        self.places.get(at).unwrap_or(&self.rest)
    }

    /// Whether keys share that place although they would be told apart.
    pub fn is_shared(&self, At(at): At) -> bool {
        !self.places.is_empty() && at >= self.places.len()
    }

    /// Where a key is counted.
    pub fn find(&self, key: u64, now: Duration) -> At {
        // 0 says that nobody was there.
        let key = key.max(1);
        for _ in 0..TRIES {
            let (at, known) = match self.look(key, now) {
                Look::Known(at) => return at,
                Look::Free(at, known) => (at, known),
                Look::Full => break,
            };
            if self.places[at].key.compare_exchange(known, key, AcqRel, Relaxed).is_ok() {
                return At(at);
            }
        }
        At(self.places.len())
    }

    fn look(&self, key: u64, now: Duration) -> Look {
        let mut free = None;
        let mask = self.places.len().wrapping_sub(1);
        for step in 0..self.places.len() {
            let at = (key as usize).wrapping_add(step) & mask;
            let known = self.places[at].key.load(Acquire);
            if known == key {
                return Look::Known(At(at));
            }
            // Places are never given up, only taken over, so a key lies before the first that was never taken.
            if known == 0 {
                free = free.or(Some((at, known)));
                break;
            }
            if free.is_none() && self.places[at].is_idle(now) {
                free = Some((at, known));
            }
        }
        free.map_or(Look::Full, |(at, known)| Look::Free(at, known))
    }
}

enum Look {
    Known(At),
    /// It may take that place, whose key is this.
    Free(usize, u64),
    Full,
}

#[cfg(test)]
mod tests {
    use penstock_api::access::Rate;

    use super::super::bucket::Pace;
    use super::*;

    const NOW: Duration = Duration::from_secs(1_000);

    /// A key that is known by its number, spread as hashes are.
    fn key(number: u64) -> u64 {
        number.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    #[test]
    fn a_key_stays_where_it_is_and_others_are_elsewhere() {
        let table = Table::new(true);
        let places: Vec<_> = (1..=500)
            .map(|number| {
                let at = table.find(key(number), NOW);
                assert!(table.get(at).enter(1), "{number} has a place of its own");
                at
            })
            .collect();
        for (number, at) in (1..=500).zip(places) {
            assert_eq!(table.find(key(number), NOW), at, "{number}");
        }
    }

    #[test]
    fn keys_have_an_end_and_further_ones_share_one_place() {
        let table = Table::new(true);
        for number in 1..=PLACES as u64 {
            let at = table.find(key(number), NOW);
            assert!(!table.is_shared(at) && table.get(at).enter(1), "{number}");
        }
        let more: Vec<_> = (1..=3).map(|number| table.find(key(1 << 20 | number), NOW)).collect();
        assert!(more.iter().all(|at| *at == more[0] && table.is_shared(*at)));
        // The first that leaves makes room.
        let left = table.find(key(7), NOW);
        table.get(left).leave();
        assert_eq!(table.find(key(1 << 20), NOW), left);
    }

    #[test]
    fn a_place_is_taken_over_once_it_has_nothing_to_remember() {
        let pace = Pace::new(Rate { count: 1, period: Duration::from_secs(1), burst: 2 });
        let table = Table::new(true);
        for number in 1..=PLACES as u64 {
            table.get(table.find(key(number), NOW)).requests.take(&pace, NOW).unwrap();
        }
        assert!(table.is_shared(table.find(key(1 << 20), NOW)));
        let later = NOW + Duration::from_secs(1);
        let at = table.find(key(1 << 20), later);
        assert!(!table.is_shared(at));
        assert_eq!(table.find(key(1 << 20), later), at);
    }

    #[test]
    fn without_keys_there_is_one_place() {
        let table = Table::new(false);
        let at = table.find(key(1), NOW);
        assert_eq!(at, table.find(key(2), NOW));
        assert!(!table.is_shared(at));
        assert!(table.get(at).enter(2) && table.get(at).enter(2) && !table.get(at).enter(2));
        table.get(at).leave();
        assert!(table.get(at).enter(2));
    }

    #[test]
    fn workers_that_come_at_once_are_counted_to_the_last() {
        let table = Table::new(true);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..2_000 {
                        let at = table.find(key(round % 50 + 1), NOW);
                        if table.get(at).enter(u32::MAX) {
                            table.get(at).leave();
                        }
                    }
                });
            }
        });
        assert!((0..PLACES).all(|at| table.get(At(at)).is_idle(NOW)));
    }
}
