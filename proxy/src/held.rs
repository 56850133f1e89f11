//! Bodies that are held whole, under one budget.
//!
//! In: a request whose body has to be known whole before something can be decided: whether it shares an execution, which
//! model it is for, what its inputs become. Out: the body, and a claim on the budget for as long as it is held. Whoever has no
//! room is told so and does without: the body is still there to be passed on as it comes ([`whole`]). Who cannot do without is
//! told [`Why`] ([`needed`]).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use penstock_inference::oip;
use tokio::time::Instant;

use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::kept;
use crate::telemetry::metric;

/// Bytes of bodies that are held at once, over all requests.
const MAX_HELD: u64 = 256 << 20;
/// How long a body may take to come in that could do without; and how long nothing may come of one that cannot.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long a body may take that cannot do without, as long as bytes move: 64 MiB at 5 Mbit/s.
pub const LONGEST: Duration = Duration::from_secs(120);

/// What is held now, and by whom.
#[derive(Debug)]
pub struct Budget {
    most: u64,
    held: AtomicU64,
    /// Of callers that have no more than their share; nobody else asks for this lock.
    callers: Mutex<HashMap<u64, u64>>,
}

impl Default for Budget {
    /// The one for bodies.
    fn default() -> Self {
        Self::new(MAX_HELD)
    }
}

impl Budget {
    /// Of so many bytes.
    pub fn new(most: u64) -> Self {
        Self { most, held: AtomicU64::new(0), callers: Mutex::default() }
    }

    fn callers(&self) -> MutexGuard<'_, HashMap<u64, u64>> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the metrics.
    pub fn tell(&self) {
        metrics::gauge!(metric::COALESCE_HELD.name).set(self.held.load(Relaxed) as f64);
    }

    /// A claim of this caller on so many bytes, if there is room for them.
    pub fn claim(self: &Arc<Self>, caller: u64, bytes: u64) -> Option<Held> {
        let mut held = Held::none(self, Some(caller));
        held.grow(bytes).then_some(held)
    }
}

/// Bytes that are held.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    /// Whose they are, where a caller has no more than its share.
    caller: Option<u64>,
    bytes: u64,
}

impl Held {
    fn none(budget: &Arc<Budget>, caller: Option<u64>) -> Self {
        Self { budget: Arc::clone(budget), caller, bytes: 0 }
    }

    /// Holds so many more; `false`: now too many are held, over all requests, or by this caller: nobody may hold more than is
    /// still free then, which is half for who is alone, and always leaves something for another.
    fn grow(&mut self, more: u64) -> bool {
        self.bytes += more;
        let all = self.budget.held.fetch_add(more, Relaxed) + more;
        let own = self.caller.map_or(0, |caller| {
            let mut callers = self.budget.callers();
            let own = callers.entry(caller).or_default();
            *own += more;
            *own
        });
        all + own <= self.budget.most
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.bytes, Relaxed);
        if let Some(caller) = self.caller
            && let Entry::Occupied(mut own) = self.budget.callers().entry(caller)
        {
            *own.get_mut() -= self.bytes;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

/// A request's body, whole, and held. `None`: it is larger than `limit` or too slow, or too much is held already.
pub async fn whole(exchange: &Rc<Exchange>, body: &mut RequestBody, limit: usize) -> Option<(Bytes, Held)> {
    whole_within(exchange, body, limit, PATIENCE).await
}

/// The same, for who waits no longer than `patience`.
pub async fn whole_within(
    exchange: &Rc<Exchange>,
    body: &mut RequestBody,
    limit: usize,
    patience: Duration,
) -> Option<(Bytes, Held)> {
    let mut held = Held::none(&exchange.worker.shared.held, None);
    // Counted as it comes: many that come in at once are not in memory before anybody has counted them.
    let pieces = kept::whole(body, exchange, limit, patience, |more| held.grow(more as u64)).await?;
    Some((oip::whole(pieces), held))
}

/// Why a body is not here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is larger than the limit.
    Large,
    /// Nothing has come for [`PATIENCE`], or it is not here after [`LONGEST`].
    Slow,
    /// Too much is held already, by all or by its caller.
    Full,
    /// It broke off, or has trailers.
    Broken,
}

/// The same for a request that cannot do without, of this caller: it is waited for as long as bytes move. `waits` is asked whether
/// it is worth it with what has come in the first [`PATIENCE`].
pub async fn needed(
    exchange: &Rc<Exchange>,
    body: &mut RequestBody,
    caller: u64,
    limit: usize,
    waits: impl Fn(&mut RequestBody) -> bool,
) -> Result<(Bytes, Held), Why> {
    if http_body::Body::size_hint(body).lower() > limit as u64 {
        return Err(Why::Large);
    }
    let mut held = Held::none(&exchange.worker.shared.held, Some(caller));
    let begun = Instant::now();
    loop {
        let before = held.bytes;
        let (mut seen, mut full, turn) = (0_u64, false, Instant::now());
        let room = |more: usize| {
            seen += more as u64;
            // What came in an earlier turn is told again, and held already.
            full = !held.grow(seen.saturating_sub(held.bytes));
            !full
        };
        if let Some(pieces) = kept::whole(body, exchange, limit, PATIENCE, room).await {
            return Ok((oip::whole(pieces), held));
        }
        match () {
            () if full => return Err(Why::Full),
            () if seen > limit as u64 => return Err(Why::Large),
            () if turn.elapsed() < PATIENCE => return Err(Why::Broken),
            () if held.bytes == before || begun.elapsed() >= LONGEST || !waits(body) => {
                return Err(Why::Slow);
            }
            () => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_bounded_while_it_comes_in_and_let_go_with_its_request() {
        let budget = Arc::new(Budget::default());
        let (mut one, mut other) = (Held::none(&budget, None), Held::none(&budget, None));
        for _ in 0..2 {
            assert!(one.grow(MAX_HELD / 4) && other.grow(MAX_HELD / 4));
        }
        assert!(!other.grow(1));
        drop(other);
        assert!(one.grow(MAX_HELD / 2));
        drop(one);
        assert_eq!(budget.held.load(Relaxed), 0);
    }

    #[test]
    fn a_caller_leaves_room_for_others() {
        let budget = Arc::new(Budget::new(900));
        let mut one = budget.claim(1, 450).expect("half is for who is alone");
        assert!(budget.claim(1, 1).is_none());
        let other = budget.claim(2, 225).expect("half of what is left is for another");
        assert!(budget.claim(2, 1).is_none() && budget.claim(3, 110).is_some());
        assert!(!one.grow(1));
        drop((one, other));
        assert!(budget.held.load(Relaxed) == 0 && budget.callers().is_empty());
    }
}
