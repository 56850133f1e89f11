//! A directory of Kubernetes YAML, watched.
//!
//! In: a path. Out: an [`ObjectSet`] whenever a file has changed. Every look reads all files and parses those whose
//! bytes have changed: comparing bytes is cheap, and cannot be fooled by the clock of a file system as times can.
//! Can go wrong: the directory or a file can't be read, which is part of the set; nothing here panics or gives up.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use crate::objects::{Broken, ObjectSet, Origin, Scope, decode};

/// Events can be lost (queue overflow, network file systems); a look now and then costs a read of the files.
const RESCAN: Duration = Duration::from_secs(5);
/// A file that was just emptied is about to be written; it is believed to be empty only after this.
const SETTLE: Duration = Duration::from_millis(200);

/// Reads the directory and watches it until every receiver is gone.
pub async fn open(path: PathBuf, debounce: Duration) -> Result<watch::Receiver<Arc<ObjectSet>>> {
    ensure!(
        path.is_dir(),
        "there is no directory {} to read objects from: create it, or correct --source",
        path.display()
    );
    let changed = Arc::new(Notify::new());
    // Watching starts before the first look, so that no change falls between the two.
    let watcher = watch_directory(&path, changed.clone())
        .with_context(|| format!("cannot watch {} for changes", path.display()))?;
    let mut files = Files::new(path);
    let (seen, back) = tokio::task::spawn_blocking(move || (files.look().set, files)).await?;
    let (sender, receiver) = watch::channel(Arc::new(seen));
    tokio::spawn(follow(back, watcher, changed, debounce, sender));
    Ok(receiver)
}

/// Reads the directory once.
pub fn read(path: &Path) -> ObjectSet {
    Files::new(path.to_owned()).look().set
}

fn watch_directory(path: &Path, changed: Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading shows up as access; an error means that something was missed.
        let reading = matches!(&event, Ok(event) if matches!(event.kind, EventKind::Access(kind)
            if !matches!(kind, notify::event::AccessKind::Close(notify::event::AccessMode::Write))));
        if !reading {
            changed.notify_one();
        }
    })?;
    watcher.watch(path, RecursiveMode::Recursive)?;
    Ok(watcher)
}

async fn follow(
    mut files: Files,
    _watcher: RecommendedWatcher,
    changed: Arc<Notify>,
    debounce: Duration,
    sender: watch::Sender<Arc<ObjectSet>>,
) {
    let mut next_look = Instant::now() + RESCAN;
    loop {
        tokio::select! {
            () = sender.closed() => return,
            () = sleep_until(next_look) => {}
            () = changed.notified() => super::quiet(&changed, debounce).await,
        }
        let Ok((seen, back)) = tokio::task::spawn_blocking(move || (files.look(), files)).await else {
            tracing::error!("reading the objects failed unexpectedly; the source is no longer followed");
            return;
        };
        files = back;
        next_look =
            Instant::now() + if seen.unsettled { debounce.max(Duration::from_millis(1)) } else { RESCAN };
        if !seen.unsettled {
            sender.send_if_modified(|set| {
                let modified = **set != seen.set;
                if modified {
                    *set = Arc::new(seen.set);
                }
                modified
            });
        }
    }
}

/// The files and what was read from them last.
struct Files {
    root: PathBuf,
    cache: HashMap<PathBuf, (blake3::Hash, ObjectSet)>,
}

/// What a look saw.
struct Seen {
    set: ObjectSet,
    /// A file was being written; look again soon.
    unsettled: bool,
}

impl Files {
    fn new(root: PathBuf) -> Self {
        Self { root, cache: HashMap::new() }
    }

    fn look(&mut self) -> Seen {
        let mut seen = Seen { set: ObjectSet::default(), unsettled: false };
        let mut paths = Vec::new();
        if let Err(error) = list(&self.root, &mut paths) {
            seen.set.broken.push(Broken {
                origin: Origin { file: self.root.to_string_lossy().into(), line: 0 },
                scope: Scope::Source,
                message: format!(
                    "the directory cannot be read: {error}; give it back, or let control read it"
                ),
            });
            return seen;
        }
        paths.sort();
        self.cache.retain(|path, _| paths.binary_search(path).is_ok());
        for path in paths {
            let file: Arc<str> = path.to_string_lossy().into();
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                // Deleted since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.cache.remove(&path);
                    continue;
                }
                Err(error) => {
                    seen.set.broken.push(unreadable(&file, format!("the file cannot be read: {error}")));
                    continue;
                }
            };
            seen.unsettled |= being_written(&path, &bytes);
            let hash = blake3::hash(&bytes);
            let cached = self.cache.get(&path).filter(|(known, _)| *known == hash);
            let set = match cached {
                Some((_, set)) => set.clone(),
                None => {
                    let set = match std::str::from_utf8(&bytes) {
                        Ok(text) => decode::file(&file, text),
                        Err(_) => ObjectSet {
                            broken: vec![unreadable(&file, "the file is not UTF-8 text".to_owned())],
                            ..ObjectSet::default()
                        },
                    };
                    self.cache.insert(path, (hash, set.clone()));
                    set
                }
            };
            seen.set.objects.extend(set.objects);
            seen.set.broken.extend(set.broken);
        }
        seen
    }
}

fn unreadable(file: &Arc<str>, what: String) -> Broken {
    Broken {
        origin: Origin { file: file.clone(), line: 0 },
        scope: Scope::File,
        message: format!("{what}; correct it, or move it out of the directory"),
    }
}

/// Whether somebody has opened the file anew and not yet written: it is empty, and was not a moment ago.
fn being_written(path: &Path, bytes: &[u8]) -> bool {
    bytes.is_empty()
        && fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age < SETTLE))
}

/// All YAML files below `directory`. Hidden names are left out: editors keep their drafts there, and a mounted
/// ConfigMap its versions, to which its visible names link.
fn list(directory: &Path, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            match list(&path, paths) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        } else if path.extension().is_some_and(|ext| ext == "yaml" || ext == "yml") && !path.is_dir() {
            paths.push(path);
        }
    }
    Ok(())
}
