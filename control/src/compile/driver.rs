//! Compiles whenever the source or the trust anchors change, and publishes what is new.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use penstock_api::view::Problem;
use tokio::sync::watch;

use super::{State, TrustAnchors, compile, memory};
use crate::objects::ObjectSet;
use crate::snapshot::Snapshot;

/// Publishes a snapshot whenever its version, its problems or what became of objects change. The receiver holds the first one already, so a
/// subscriber never mistakes a start for an empty mesh. Ends when the source ends or every receiver is gone.
///
/// `state` is what was accepted before; `State::default()` when there was nothing.
pub fn run(
    objects: watch::Receiver<Arc<ObjectSet>>,
    trust: watch::Receiver<Arc<TrustAnchors>>,
    state: State,
) -> watch::Receiver<Arc<Snapshot>> {
    start(objects, trust, state, None)
}

/// Like [`run`], but goes on from what an earlier life of control accepted, and keeps it in `file`: a file of the
/// source that is broken while control starts takes nothing out of force.
pub fn resume(
    objects: watch::Receiver<Arc<ObjectSet>>,
    trust: watch::Receiver<Arc<TrustAnchors>>,
    file: PathBuf,
) -> watch::Receiver<Arc<Snapshot>> {
    let state = memory::load(&file);
    start(objects, trust, state, Some(file))
}

fn start(
    mut objects: watch::Receiver<Arc<ObjectSet>>,
    mut trust: watch::Receiver<Arc<TrustAnchors>>,
    before: State,
    file: Option<PathBuf>,
) -> watch::Receiver<Arc<Snapshot>> {
    let first = objects.borrow_and_update().clone();
    let anchors = trust.borrow_and_update().clone();
    let (snapshot, mut state) = compile(&first, &before, &anchors);
    tell(&[], &snapshot);
    let (sender, receiver) = watch::channel(Arc::new(snapshot));
    tokio::spawn(async move {
        keep(&before, &state, file.as_ref()).await;
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
            let before = std::mem::replace(&mut state, next);
            sender.send_if_modified(|published| {
                let news = published.version != snapshot.version || published.problems != snapshot.problems;
                // That an object is as good as before in its new version is for its status alone.
                let modified = news || published.outcomes != snapshot.outcomes;
                if news {
                    tell(&published.problems, &snapshot);
                }
                if modified {
                    *published = Arc::new(snapshot);
                }
                modified
            });
            // After publishing: a disk that is slow must not hold a weight back.
            keep(&before, &state, file.as_ref()).await;
        }
    });
    receiver
}

/// Writes what is accepted, if that has changed.
async fn keep(before: &State, now: &State, file: Option<&PathBuf>) {
    let Some(file) = file.cloned() else { return };
    if before == now {
        return;
    }
    let state = now.clone();
    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || memory::store(&state, &file)).await {
        tracing::warn!("{error:#}");
    }
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
