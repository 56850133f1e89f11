//! Compiles whenever the source or the trust anchors change, and publishes what is new.

use std::collections::BTreeSet;
use std::sync::Arc;

use penstock_api::view::Problem;
use tokio::sync::watch;

use super::{State, TrustAnchors, compile};
use crate::objects::ObjectSet;
use crate::snapshot::Snapshot;

/// Publishes a snapshot whenever its version or its problems change. The receiver holds the first one already, so a
/// subscriber never mistakes a start for an empty mesh. Ends when the source ends or every receiver is gone.
///
/// `state` is what an earlier life of control accepted; `State::default()` when there was none.
pub fn run(
    mut objects: watch::Receiver<Arc<ObjectSet>>,
    mut trust: watch::Receiver<Arc<TrustAnchors>>,
    state: State,
) -> watch::Receiver<Arc<Snapshot>> {
    let first = objects.borrow_and_update().clone();
    let anchors = trust.borrow_and_update().clone();
    let (snapshot, mut state) = compile(&first, &state, &anchors);
    tell(&[], &snapshot);
    let (sender, receiver) = watch::channel(Arc::new(snapshot));
    tokio::spawn(async move {
        loop {
            let open = tokio::select! {
                () = sender.closed() => false,
                changed = objects.changed() => changed.is_ok(),
                // Anchors that can no longer change are still anchors.
                Ok(()) = trust.changed() => true,
            };
            if !open {
                return;
            }
            let set = objects.borrow_and_update().clone();
            let anchors = trust.borrow_and_update().clone();
            let (snapshot, next) = compile(&set, &state, &anchors);
            state = next;
            sender.send_if_modified(|published| {
                let modified =
                    published.version != snapshot.version || published.problems != snapshot.problems;
                if modified {
                    tell(&published.problems, &snapshot);
                    *published = Arc::new(snapshot);
                }
                modified
            });
        }
    });
    receiver
}

/// Logs what an operator wants to know: the new version, what went wrong, and what is right again.
fn tell(before: &[Problem], snapshot: &Snapshot) {
    // A line that moved is not news.
    let key = |problem: &Problem| (problem.file.clone(), problem.object.clone(), problem.message.clone());
    let known: BTreeSet<_> = before.iter().map(key).collect();
    let now: BTreeSet<_> = snapshot.problems.iter().map(key).collect();
    for problem in snapshot.problems.iter().filter(|problem| !known.contains(&key(problem))) {
        let Problem { file, line, object, message, last_good_in_force } = problem;
        tracing::warn!(%file, line, %object, last_good_in_force, "{message}");
    }
    for problem in before.iter().filter(|problem| !now.contains(&key(problem))) {
        let Problem { file, object, message, .. } = problem;
        tracing::info!(%file, %object, "no longer a problem: {message}");
    }
    tracing::info!(version = %snapshot.version, problems = snapshot.problems.len(), "new configuration");
}
