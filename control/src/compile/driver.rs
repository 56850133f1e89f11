//! Compiles whenever the source or the trust anchors change, and publishes what is new.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use penstock_api::view::Problem;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::{State, TrustAnchors, compile, memory};
use crate::objects::ObjectSet;
use crate::snapshot::Snapshot;
use crate::trouble::Trouble;

/// Publishes a snapshot whenever its version, its problems, its canaries or what became of objects change. The receiver holds the first one already, so a
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
        let trouble = Trouble::new("what was accepted");
        let mut keeping = Keeping { file, kept: before, due: Instant::now(), trouble };
        let mut unkept = !keeping.keep(&state).await;
        loop {
            tokio::select! {
                () = sender.closed() => break,
                changed = objects.changed() => if changed.is_err() { break },
                // Anchors that can no longer change are still anchors.
                Ok(()) = trust.changed() => {}
                () = sleep_until(keeping.due), if unkept => {
                    unkept = !keeping.keep(&state).await;
                    continue;
                }
            }
            let set = objects.borrow_and_update().clone();
            let anchors = trust.borrow_and_update().clone();
            let (snapshot, next) = compile(&set, &state, &anchors);
            state = next;
            sender.send_if_modified(|published| {
                let news = published.version != snapshot.version || published.problems != snapshot.problems;
                // That an object is as good as before in its new version is for its status alone.
                let modified = news
                    || published.outcomes != snapshot.outcomes
                    || published.canaries != snapshot.canaries;
                if news {
                    tell(&published.problems, &snapshot);
                }
                if modified {
                    *published = Arc::new(snapshot);
                }
                modified
            });
            unkept = true;
            // After publishing: a disk that is slow must not hold a weight back.
            if keeping.due <= Instant::now() {
                unkept = !keeping.keep(&state).await;
            }
        }
        if unkept {
            keeping.keep(&state).await;
        }
    });
    receiver
}

/// What is accepted is written at once, and then at most so often: beside ten thousand pods it is some twelve megabytes, and endpoints come and
/// go all the time. Who is killed meanwhile knows the last good version of some seconds before.
const KEPT_EVERY: Duration = Duration::from_secs(5);

/// Where what is accepted is kept.
struct Keeping {
    file: Option<PathBuf>,
    /// As it was written, or read at first.
    kept: State,
    /// Not before then.
    due: Instant,
    /// Why it could not be written, if it could not.
    trouble: Trouble,
}

impl Keeping {
    /// Writes what is accepted, if that has changed. Whether it is kept then; a disk that is full now may have room later.
    async fn keep(&mut self, now: &State) -> bool {
        let Some(file) = self.file.clone() else { return true };
        if self.kept == *now {
            return true;
        }
        let state = now.clone();
        let stored = tokio::task::spawn_blocking(move || memory::store(&state, &file).map(|()| state)).await;
        self.due = Instant::now() + KEPT_EVERY;
        match stored {
            Ok(Ok(state)) => {
                self.kept = state;
                self.trouble.over();
                return true;
            }
            Ok(Err(error)) => self.trouble.met(&error),
            // The process ends.
            Err(_) => {}
        }
        false
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::decode;

    fn service(port: u16) -> Arc<ObjectSet> {
        let yaml = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: b}}\nspec: {{ports: [{{port: {port}}}]}}\n"
        );
        Arc::new(decode::file(&"a.yaml".into(), &yaml))
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_accepted_is_kept_at_once_and_of_a_burst_only_how_it_ended() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("accepted.json");
        let (objects, receiver) = watch::channel(service(1));
        let (_trust, trust) = watch::channel(Arc::new(TrustAnchors::default()));
        let mut published = resume(receiver, trust, file.clone());
        let kept = || std::fs::read_to_string(&file).unwrap_or_default();
        let has = |port: u16| kept().contains(&format!("\"port\":{port}"));
        while !has(1) {
            tokio::task::yield_now().await;
        }
        for port in 2..=9 {
            objects.send_replace(service(port));
            published.changed().await.unwrap();
            assert!(has(1), "written within {KEPT_EVERY:?}: {}", kept());
        }
        tokio::time::sleep(KEPT_EVERY + Duration::from_millis(1)).await;
        while !has(9) {
            tokio::task::yield_now().await;
        }
        // Who ends with something unkept keeps it first.
        objects.send_replace(service(10));
        published.changed().await.unwrap();
        drop(published);
        drop(objects);
        while !has(10) {
            tokio::task::yield_now().await;
        }
    }
}
