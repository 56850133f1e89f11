//! Connections that come before this proxy can serve them.
//!
//! The application may speak as soon as it runs, and the redirect leads here from the first moment. Until certificate
//! and first configuration are in force a connection is held rather than refused: the client sees one that is slow to
//! answer. Held is a bounded number, for a bounded time ([`Limits`](crate::limits::Limits)); what is above either
//! goes on as it is, and is told what is missing.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use tokio::time::Instant;

use crate::outbound;
use crate::telemetry::metric;
use crate::telemetry::seldom::Seldom;
use crate::worker::Shared;

/// How many connections are held: the application's, and the others, which come from anybody and must not take the
/// application's places.
#[derive(Debug, Default)]
pub struct Early {
    outbound: AtomicU32,
    inbound: AtomicU32,
    /// What is said of those that find no place, or are held in vain.
    full: Seldom<1>,
    in_vain: Seldom<1>,
}

struct Held<'a>(&'a AtomicU32);

impl Early {
    /// A place of this listener's, if there is one.
    fn take(&self, listener: &str, limit: u32) -> Option<Held<'_>> {
        let places = if listener == outbound::LISTENER { &self.outbound } else { &self.inbound };
        let taken = places.fetch_update(Relaxed, Relaxed, |held| (held < limit).then(|| held + 1));
        taken.is_ok().then(|| Held(places))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Returns when the proxy is ready or leaves, or the connection has to go on without that.
pub async fn hold(shared: &Shared, listener: &'static str) {
    let mut ready = shared.store.ready();
    if *ready.borrow() {
        return;
    }
    let limits = &shared.limits;
    let Some(_held) = shared.early.take(listener, limits.early) else {
        if let Some(times) = shared.early.full.happened(Instant::now()) {
            let limit = limits.early;
            tracing::warn!(listener, limit, times, "not ready, and no more connections are held");
        }
        return;
    };
    metrics::counter!(metric::EARLY.name, "listener" => listener).increment(1);
    let mut leaving = shared.drain.subscribe();
    // An error of either means that its sender is gone, and there is nothing left to wait for.
    tokio::select! {
        _ = ready.wait_for(|ready| *ready) => {}
        _ = leaving.wait_for(|leaving| *leaving) => {}
        () = tokio::time::sleep(limits.early_time) => {
            if let Some(times) = shared.early.in_vain.happened(Instant::now()) {
                let held = limits.early_time;
                tracing::warn!(listener, ?held, times, "still not ready; a held connection goes on without");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_given_back() {
        let early = Early::default();
        let take = || early.take("inbound", 2);
        let (first, second) = (take(), take());
        assert!(first.is_some() && second.is_some() && take().is_none());
        drop(first);
        assert!(take().is_some());
    }

    #[test]
    fn strangers_do_not_take_the_applications_places() {
        let early = Early::default();
        let _strangers = [early.take("inbound", 2), early.take("inbound", 2)];
        assert!(early.take("inbound", 2).is_none());
        assert!(early.take(outbound::LISTENER, 2).is_some());
    }
}
