//! The state directory: small files that survive `kill -9` at any moment.
//!
//! A file is written beside its place, synced, renamed over it, and the directory is synced, so that a reader sees
//! the old content or the new, never a part. What a killed process leaves behind are temporary files that nothing
//! reads; the next start sweeps them. Secrets are readable by their owner only from the first byte on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A temporary file older than this belongs to no living writer: writing takes milliseconds.
const ABANDONED: Duration = Duration::from_secs(60);
const TEMPORARY: &str = ".tmp";

/// A directory of state.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

/// What could not be done with which file.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {path} failed: {source}; the state directory must be a local, writable directory of this user", path = path.display())]
pub struct StateError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Its owner.
    Owner,
    /// Everyone who can reach the directory.
    All,
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError { doing, path, source }
}

impl StateDir {
    /// Opens the directory, making it (for its owner only) if needed.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StateError> {
        let path = path.into();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed("creating", &path))?;
        Ok(Self { path })
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A directory inside it, which must exist to be read from.
    pub fn inner(&self, name: &str) -> Self {
        Self { path: self.path(name) }
    }

    /// Whether a file or directory of that name is there.
    pub fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// The content of a file; `None` if there is none.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path(name);
        match fs::read(&path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("reading", &path)(error)),
        }
    }

    /// Replaces a file.
    pub fn write(&self, name: &str, content: &[u8], readers: Readers) -> Result<(), StateError> {
        let path = self.path(name);
        let temporary = self.temporary(name, content, readers)?;
        fs::rename(&temporary, &path).map_err(failed("writing", &path))?;
        self.sync()
    }

    /// Writes a file unless there is one; the content that is there afterwards. Of two processes that start at
    /// the same time, one wins and both go on with its content.
    pub fn write_once(&self, name: &str, content: &[u8], readers: Readers) -> Result<Vec<u8>, StateError> {
        let path = self.path(name);
        let temporary = self.temporary(name, content, readers)?;
        let linked = fs::hard_link(&temporary, &path);
        fs::remove_file(&temporary).map_err(failed("removing", &temporary))?;
        match linked {
            Ok(()) => self.sync()?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("writing", &path)(error)),
        }
        fs::read(&path).map_err(failed("reading", &path))
    }

    /// Makes a directory whose content appears at once: `fill` writes it under another name.
    pub fn create_dir(
        &self,
        name: &str,
        fill: impl FnOnce(&Self) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let path = self.path(name);
        let temporary = self.path(&temporary_name(name));
        let inner = Self::open(&temporary)?;
        fill(&inner)?;
        fs::rename(&temporary, &path).map_err(failed("creating", &path))?;
        self.sync()
    }

    /// Removes a file or a directory, at once: a directory is renamed away before its files go.
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.path(name);
        if path.is_dir() {
            let away = self.path(&temporary_name(name));
            fs::rename(&path, &away).map_err(failed("removing", &path))?;
            self.sync()?;
            return fs::remove_dir_all(&away).map_err(failed("removing", &away));
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("removing", &path)(error)),
            _ => self.sync(),
        }
    }

    /// Removes what killed processes left behind.
    pub fn sweep(&self, now: SystemTime) -> Result<(), StateError> {
        for entry in fs::read_dir(&self.path).map_err(failed("listing", &self.path))? {
            let entry = entry.map_err(failed("listing", &self.path))?;
            let name = entry.file_name();
            if !name.to_string_lossy().starts_with('.') || !name.to_string_lossy().ends_with(TEMPORARY) {
                continue;
            }
            let age = entry.metadata().and_then(|meta| meta.modified()).map(|at| now.duration_since(at));
            if matches!(age, Ok(Ok(age)) if age > ABANDONED) {
                let path = entry.path();
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(failed("removing", &path))?;
            }
        }
        Ok(())
    }

    fn temporary(&self, name: &str, content: &[u8], readers: Readers) -> Result<PathBuf, StateError> {
        let path = self.path(&temporary_name(name));
        let mode = match readers {
            Readers::Owner => 0o600,
            Readers::All => 0o644,
        };
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .map_err(failed("creating", &path))?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(failed("writing", &path))?;
        Ok(path)
    }

    fn sync(&self) -> Result<(), StateError> {
        File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(failed("syncing", &self.path))
    }
}

fn temporary_name(name: &str) -> String {
    format!(".{name}.{}.{:08x}{TEMPORARY}", std::process::id(), rand::random::<u32>())
}

/// Whether others than the owner may read the file.
pub fn is_exposed(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_readable_by_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path().join("state")).unwrap();
        state.write("a.key", b"secret", Readers::Owner).unwrap();
        state.write("a.pem", b"public", Readers::All).unwrap();
        assert!(!is_exposed(&state.path("a.key")) && !is_exposed(&dir.path().join("state")));
        assert!(is_exposed(&state.path("a.pem")));
    }

    #[test]
    fn the_first_of_two_writers_wins() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        assert_eq!(state.write_once("key", b"first", Readers::Owner).unwrap(), b"first");
        assert_eq!(state.write_once("key", b"second", Readers::Owner).unwrap(), b"first");
    }

    #[test]
    fn what_a_killed_writer_left_is_never_read_and_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.write("a.pem", b"whole", Readers::All).unwrap();
        fs::write(dir.path().join(".a.pem.77.00000001.tmp"), b"tor").unwrap();
        fs::create_dir(dir.path().join(".next.77.00000002.tmp")).unwrap();
        assert_eq!(state.read("a.pem").unwrap().as_deref(), Some(&b"whole"[..]));
        state.sweep(SystemTime::now()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "a living writer's files stay");
        state.sweep(SystemTime::now() + 2 * ABANDONED).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
