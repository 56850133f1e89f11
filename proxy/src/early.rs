//! Connections that come before this proxy can serve them.
//!
//! The application may speak as soon as it runs, and the redirect leads here from the first moment. Until certificate
//! and first configuration are in force a connection is held rather than refused: the client sees one that is slow to
//! answer. Held is a bounded number, for a bounded time ([`Limits`](crate::limits::Limits)); what is above either
//! goes on as it is, and is told what is missing.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::telemetry::metric;
use crate::worker::Shared;

/// How many connections are held.
#[derive(Debug, Default)]
pub struct Early(AtomicU32);

struct Held<'a>(&'a Early);

impl Early {
    /// A place, if there is one.
    fn take(&self, limit: u32) -> Option<Held<'_>> {
        let taken = self.0.fetch_update(Relaxed, Relaxed, |held| (held < limit).then(|| held + 1));
        taken.is_ok().then(|| Held(self))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

/// Returns when the proxy is ready or leaves, or the connection has to go on without that.
pub async fn hold(shared: &Shared, listener: &'static str) {
    let mut ready = shared.store.ready();
    if *ready.borrow() {
        return;
    }
    let limits = &shared.limits;
    let Some(_held) = shared.early.take(limits.early) else {
        tracing::warn!(listener, limit = limits.early, "not ready, and no more connections are held");
        return;
    };
    metrics::counter!(metric::EARLY.name, "listener" => listener).increment(1);
    let mut leaving = shared.drain.subscribe();
    // An error of either means that its sender is gone, and there is nothing left to wait for.
    tokio::select! {
        _ = ready.wait_for(|ready| *ready) => {}
        _ = leaving.wait_for(|leaving| *leaving) => {}
        () = tokio::time::sleep(limits.early_time) => {
            tracing::warn!(listener, held = ?limits.early_time, "still not ready; a held connection goes on without");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_given_back() {
        let early = Early::default();
        let (first, second) = (early.take(2), early.take(2));
        assert!(first.is_some() && second.is_some() && early.take(2).is_none());
        drop(first);
        assert!(early.take(2).is_some());
    }
}
