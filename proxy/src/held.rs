//! Bodies that are held whole, under one budget.
//!
//! In: a request whose body has to be known whole before something can be decided: whether it shares an execution, which
//! model it is for. Out: the body, and a claim on the budget for as long as it is held. Whoever has no room is told so and
//! does without: the body is still there to be passed on as it comes.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use penstock_inference::oip;

use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::kept;
use crate::telemetry::metric;

/// Bytes of bodies that are held at once, over all requests.
const MAX_HELD: u64 = 256 << 20;
/// How long a body may take to come in.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What is held now.
#[derive(Debug, Default)]
pub struct Budget(AtomicU64);

impl Budget {
    /// Tells the metrics.
    pub fn tell(&self) {
        metrics::gauge!(metric::COALESCE_HELD.name).set(self.0.load(Relaxed) as f64);
    }
}

/// Bytes that are held.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Held {
    fn none(budget: &Arc<Budget>) -> Self {
        Self { budget: Arc::clone(budget), bytes: 0 }
    }

    /// Holds so many more; `false`: now too many are held, over all requests.
    fn grow(&mut self, more: u64) -> bool {
        self.bytes += more;
        self.budget.0.fetch_add(more, Relaxed) + more <= MAX_HELD
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.bytes, Relaxed);
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
    let mut held = Held::none(&exchange.worker.shared.held);
    // Counted as it comes: many that come in at once are not in memory before anybody has counted them.
    let pieces = kept::whole(body, exchange, limit, patience, |more| held.grow(more as u64)).await?;
    Some((oip::whole(pieces), held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_bounded_while_it_comes_in_and_let_go_with_its_request() {
        let budget = Arc::new(Budget::default());
        let (mut one, mut other) = (Held::none(&budget), Held::none(&budget));
        for _ in 0..2 {
            assert!(one.grow(MAX_HELD / 4) && other.grow(MAX_HELD / 4));
        }
        assert!(!other.grow(1));
        drop(other);
        assert!(one.grow(MAX_HELD / 2));
        drop(one);
        assert_eq!(budget.0.load(Relaxed), 0);
    }
}
