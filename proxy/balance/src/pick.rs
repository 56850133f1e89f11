//! Which endpoint serves the request.
//!
//! Power of two choices: of two endpoints drawn at random the one with less work wins. It needs two looks however
//! many endpoints there are, and no client herds, because each draws its own two (Mitzenmacher 2001).

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use rand::Rng;

use crate::load::EndpointState;
use crate::pool::Ask;

/// How to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Two choices, least work.
    #[default]
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// The least predicted time until it is answered.
    Gpu,
    /// The same, with what an endpoint has of the prompt taken off the work.
    Prefix,
    /// By a key, with bounded load.
    RingHash,
    /// In turn, weighted by load reports (gRFC A58).
    OrcaWrr,
}

/// Something that can be picked.
pub trait Candidate {
    /// Its state.
    fn state(&self) -> &EndpointState;

    /// Its name as a number that is the same in every sidecar, a hash of its address say.
    fn name(&self) -> u64 {
        0
    }

    /// Whether it can serve the request at all: the model and the adapter are loaded, its weight is not zero.
    fn serves(&self, _ask: &Ask<'_>) -> bool {
        true
    }

    /// What the way there costs more than the nearest way, in milliseconds: another zone.
    fn distance_ms(&self) -> f32 {
        0.0
    }
}

/// Why nothing was picked; prints well in an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NonePicked {
    /// Endpoints there are.
    pub total: usize,
    /// Of them, draining.
    pub draining: usize,
    /// Of them, ejected.
    pub ejected: usize,
    /// Of them, tried already by this request.
    pub tried: usize,
    /// Of them, without what the request needs: its model, its adapter.
    pub unfit: usize,
}

impl std::fmt::Display for NonePicked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "0 of {} ready", self.total)?;
        let parts = [
            (self.draining, "draining"),
            (self.ejected, "ejected"),
            (self.tried, "tried already"),
            (self.unfit, "without the model"),
        ];
        let mut separator = ": ";
        for (count, word) in parts.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, "{separator}{count} {word}")?;
            separator = ", ";
        }
        Ok(())
    }
}

impl<C: Candidate> Candidate for std::sync::Arc<C> {
    fn state(&self) -> &EndpointState {
        (**self).state()
    }

    fn name(&self) -> u64 {
        (**self).name()
    }

    fn serves(&self, ask: &Ask<'_>) -> bool {
        (**self).serves(ask)
    }

    fn distance_ms(&self) -> f32 {
        (**self).distance_ms()
    }
}

/// Draws before the endpoints are scanned one by one.
const DRAWS: usize = 4;

/// Picks an endpoint, by index.
///
/// `avoid` are the indices that this request has tried; they are picked again only if nothing else is there.
/// Endpoints that control says are draining are never picked, those that say so themselves only if nothing else is
/// there. If more endpoints are ejected than `max_ejected_percent` allows, ejections
/// are ignored (panic: a few failing endpoints are better than none).
pub fn pick<C: Candidate>(
    candidates: &[C],
    policy: Policy,
    max_ejected_percent: u32,
    avoid: &[usize],
    turn: &AtomicU32,
    now: Duration,
    random: &mut impl Rng,
) -> Result<usize, NonePicked> {
    let n = candidates.len();
    let usable = |i: usize| {
        let state = candidates[i].state();
        !state.draining() && !state.is_leaving(now) && !state.ejection.is_out(now) && !avoid.contains(&i)
    };
    match policy {
        Policy::RoundRobin => {
            for _ in 0..n.min(DRAWS) {
                let i = turn.fetch_add(1, Relaxed) as usize % n;
                if usable(i) {
                    return Ok(i);
                }
            }
        }
        _ if n == 1 && usable(0) => return Ok(0),
        _ if n > 1 => {
            let mut best: Option<(usize, f32)> = None;
            let mut found = 0;
            let mut last = usize::MAX;
            for _ in 0..DRAWS {
                let i = random.random_range(0..n);
                if i == last || !usable(i) {
                    continue;
                }
                last = i;
                found += 1;
                let work = candidates[i].state().work(now);
                if best.is_none_or(|(_, least)| work < least) {
                    best = Some((i, work));
                }
                if found == 2 {
                    break;
                }
            }
            if let Some((i, _)) = best {
                return Ok(i);
            }
        }
        // The others are served by `Pool::pick`.
        _ => {}
    }
    scan(candidates, max_ejected_percent, avoid, now, random)
}

/// The slow path: look at every endpoint, from a random one on.
fn scan<C: Candidate>(
    candidates: &[C],
    max_ejected_percent: u32,
    avoid: &[usize],
    now: Duration,
    random: &mut impl Rng,
) -> Result<usize, NonePicked> {
    let n = candidates.len();
    let mut none = NonePicked { total: n, ..NonePicked::default() };
    let mut ejected_one = None;
    let mut leaving_one = None;
    let mut tried_one = None;
    let start = if n > 1 { random.random_range(0..n) } else { 0 };
    for i in (start..n).chain(0..start) {
        let state = candidates[i].state();
        if state.draining() {
            none.draining += 1;
        } else if state.ejection.is_out(now) {
            none.ejected += 1;
            ejected_one.get_or_insert(i);
        } else if avoid.contains(&i) {
            none.tried += 1;
            tried_one.get_or_insert(i);
        } else if state.is_leaving(now) {
            leaving_one.get_or_insert(i);
        } else {
            return Ok(i);
        }
    }
    let panic = none.ejected * 100 > n * max_ejected_percent as usize;
    leaving_one.or(tried_one).or(ejected_one.filter(|_| panic)).ok_or(none)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Report;
    use crate::outlier::OutlierPolicy;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    struct Replica(EndpointState);

    impl Candidate for Replica {
        fn state(&self) -> &EndpointState {
            &self.0
        }
    }

    fn replicas(in_flight: &[u32]) -> Vec<Replica> {
        let replica = |n: &u32| {
            let state = EndpointState::default();
            (0..*n).for_each(|_| state.begin());
            Replica(state)
        };
        in_flight.iter().map(replica).collect()
    }

    fn eject(replica: &Replica) {
        for _ in 0..5 {
            replica.0.ejection.failure(&OutlierPolicy::default(), Duration::ZERO);
        }
    }

    fn least(all: &[Replica], avoid: &[usize], seed: u64) -> Result<usize, NonePicked> {
        let mut random = SmallRng::seed_from_u64(seed);
        pick(all, Policy::LeastRequest, 50, avoid, &AtomicU32::new(0), Duration::ZERO, &mut random)
    }

    #[test]
    fn of_two_the_less_loaded_gets_nearly_everything() {
        let all = replicas(&[9, 1]);
        let to_second = (0..1000).filter(|seed| least(&all, &[], *seed) == Ok(1)).count();
        assert!(to_second > 850, "{to_second} of 1000");
    }

    #[test]
    fn what_others_do_counts_too() {
        let all = replicas(&[1, 2]);
        all[0].0.report(Report { in_flight: 40.0, ..Report::default() }, Duration::ZERO);
        let to_second = (0..1000).filter(|seed| least(&all, &[], *seed) == Ok(1)).count();
        assert!(to_second > 850, "{to_second} of 1000");
    }

    #[test]
    fn a_retry_goes_elsewhere_unless_there_is_no_elsewhere() {
        let all = replicas(&[0, 50]);
        assert!((0..100).all(|seed| least(&all, &[0], seed) == Ok(1)));
        assert!(least(&all, &[0, 1], 1).is_ok());
    }

    #[test]
    fn one_that_is_leaving_is_a_last_resort() {
        let all = replicas(&[0, 50]);
        all[0].0.leaving(Duration::ZERO);
        assert!((0..100).all(|seed| least(&all, &[], seed) == Ok(1)));
        all[1].0.set_draining(true);
        assert_eq!(least(&all, &[], 1), Ok(0));
    }

    #[test]
    fn nothing_ready_says_why() {
        let all = replicas(&[0, 0, 0]);
        all[0].0.set_draining(true);
        all[1].0.set_draining(true);
        eject(&all[2]);
        let none = least(&all, &[], 1).unwrap_err();
        assert_eq!(none.to_string(), "0 of 3 ready: 2 draining, 1 ejected");
        assert_eq!(least(&[], &[], 1).unwrap_err().to_string(), "0 of 0 ready");
    }

    #[test]
    fn too_many_ejections_are_ignored() {
        let all = replicas(&[0, 0, 0]);
        all.iter().for_each(eject);
        assert!(least(&all, &[], 1).is_ok());
    }

    #[test]
    fn round_robin_takes_turns_and_skips_the_draining() {
        let all = replicas(&[0, 0, 0]);
        all[1].0.set_draining(true);
        let (turn, mut random) = (AtomicU32::new(0), SmallRng::seed_from_u64(1));
        let mut next =
            || pick(&all, Policy::RoundRobin, 50, &[], &turn, Duration::ZERO, &mut random).unwrap();
        assert_eq!([next(), next(), next(), next()], [0, 2, 0, 2]);
    }

    proptest! {
        #[test]
        fn never_an_endpoint_that_drains(
            loads in prop::collection::vec((0u32..50, any::<bool>(), any::<bool>()), 0..20),
            round_robin: bool,
            seed: u64,
        ) {
            let all = replicas(&loads.iter().map(|l| l.0).collect::<Vec<_>>());
            for (replica, (_, draining, ejected)) in all.iter().zip(&loads) {
                replica.0.set_draining(*draining);
                if *ejected {
                    eject(replica);
                }
            }
            let policy = if round_robin { Policy::RoundRobin } else { Policy::LeastRequest };
            let mut random = SmallRng::seed_from_u64(seed);
            let turn = AtomicU32::new(seed as u32);
            match pick(&all, policy, 50, &[], &turn, Duration::ZERO, &mut random) {
                Ok(i) => {
                    prop_assert!(!loads[i].1);
                    let ready = loads.iter().any(|l| !l.1 && !l.2);
                    prop_assert!(!(ready && loads[i].2), "an ejected one although another was ready");
                }
                Err(none) => prop_assert_eq!(none.draining + none.ejected, loads.len()),
            }
        }
    }
}
