//! A file of shared memory, under a name by which a model server finds it.
//!
//! In: a name, who may open it, and a size. Out: a file that has all of its pages, and is locked for as long as its owner
//! lives. It is made without a name, sized and locked, and only then linked: whoever sees the name sees a file that is
//! complete. The lock is what tells a file in use from one whose process is dead: process ids say nothing across
//! containers that share `/dev/shm`.

use std::fs::{DirEntry, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags};

use super::{Access, Error};

/// Where `shm_open` keeps its objects, and the only place where a model server looks for them.
const DIR: &str = "/dev/shm";
/// What the name of every file of ours begins with.
const PREFIX: &str = "penstock-";
/// The most of a node's or an arena's name that goes into the name of its file, which has 255 bytes at most.
const PART: usize = 96;

/// A file; dropping it takes its name away.
#[derive(Debug)]
pub(super) struct SharedFile {
    pub(super) file: File,
    path: PathBuf,
    /// Its name as `shm_open` wants it.
    pub(super) key: String,
}

impl SharedFile {
    pub(super) fn create(node: &str, name: &str, access: Access, bytes: usize) -> Result<Self, Error> {
        sweep();
        let name = format!("{PREFIX}{}-{}-{}", word(node), std::process::id(), word(name));
        let path = Path::new(DIR).join(&name);
        let step = |doing: &'static str| {
            let path = path.clone();
            move |source: io::Error| Error::File { path, doing, source }
        };

        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let opened = rustix::fs::open(DIR, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(opened.map_err(|source| step("made")(source.into()))?);
        file.try_lock().map_err(|error| step("locked")(error.into()))?;
        // Every page now: one that is missing later would be a signal in the middle of a request.
        let full = |source: io::Error| Error::Full { dir: DIR, bytes, free: free(), source };
        loop {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes as u64) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(full(error.into())),
            }
        }
        let (mode, group) = match access {
            Access::Group(group) => (0o660, group),
            Access::Everyone => (0o666, None),
        };
        if group.is_some() {
            std::os::unix::fs::fchown(&file, None, group).map_err(step("given to its group"))?;
        }
        file.set_permissions(Permissions::from_mode(mode)).map_err(step("opened to others"))?;

        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        let linked = rustix::fs::linkat(CWD, unnamed, CWD, &path, AtFlags::SYMLINK_FOLLOW);
        match linked.map_err(io::Error::from) {
            Ok(()) => Ok(Self { file, path, key: format!("/{name}") }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(Error::Taken { path }),
            Err(error) => Err(step("named")(error)),
        }
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // If somebody was faster, the name is gone all the same.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes the shared memory of Penstock's processes that are dead, of whatever node, and returns the names. `/dev/shm`
/// outlives containers. What may not be opened or removed stays.
pub fn sweep() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(DIR) else { return Vec::new() };
    let ours = |entry: &DirEntry| entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes());
    let swept = entries.flatten().filter(ours).filter_map(|entry| {
        // Held until the name is gone: nobody else removes it meanwhile, and nobody takes it anew.
        let _lock = lock_of_dead(&entry).ok().flatten()?;
        std::fs::remove_file(entry.path()).ok()?;
        Some(entry.file_name().to_string_lossy().into_owned())
    });
    swept.collect()
}

/// The file, locked, if nobody else holds its lock.
fn lock_of_dead(entry: &DirEntry) -> io::Result<Option<File>> {
    // Opening something else than a file could wait, or do more than open it.
    if !entry.file_type()?.is_file() {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(entry.path(), flags, Mode::empty())?);
    if file.try_lock().is_err() {
        return Ok(None);
    }
    // The name may have been another's by now.
    let named = std::fs::symlink_metadata(entry.path())?.ino();
    Ok((named == file.metadata()?.ino()).then_some(file))
}

/// A part of a file's name: no slash, which `shm_open` does not know, and no more than fits.
fn word(name: &str) -> String {
    let keeps = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.chars().take(PART).map(|c| if keeps(c) { c } else { '_' }).collect()
}

/// Bytes that are free there.
fn free() -> u64 {
    rustix::fs::statvfs(DIR).map_or(0, |stat| stat.f_bavail * stat.f_frsize)
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    fn file(name: &str, access: Access, bytes: usize) -> Result<SharedFile, Error> {
        SharedFile::create("test/of the files", name, access, bytes)
    }

    #[test]
    fn a_file_has_its_size_its_mode_and_a_flat_name() {
        let shared = file("size", Access::Everyone, 12_288).unwrap();
        assert_eq!(shared.key, format!("/penstock-test_of_the_files-{}-size", std::process::id()));
        let found = std::fs::metadata(&shared.path).unwrap();
        assert_eq!((found.len(), found.mode() & 0o777), (12_288, 0o666));
        assert!(found.blocks() * 512 >= 12_288, "pages are there");
        let group = found.gid();
        let grouped = file("group", Access::Group(Some(group)), 4096).unwrap();
        let found = std::fs::metadata(&grouped.path).unwrap();
        assert_eq!((found.gid(), found.mode() & 0o777), (group, 0o660));
    }

    #[test]
    fn a_file_goes_with_its_owner() {
        let shared = file("goes", Access::Everyone, 4096).unwrap();
        let path = shared.path.clone();
        assert!(path.exists());
        drop(shared);
        assert!(!path.exists());
    }

    #[test]
    fn what_the_dead_left_is_swept_and_what_is_in_use_is_not() {
        let living = file("living", Access::Everyone, 4096).unwrap();
        let left = format!("{PREFIX}another-node-1-left-{}", std::process::id());
        let path = Path::new(DIR).join(&left);
        std::fs::write(&path, [0; 64]).unwrap();
        // Another test's sweep may hold its lock just now.
        let gone = (0..10_000).any(|_| {
            sweep();
            std::thread::yield_now();
            !path.exists()
        });
        assert!(gone);
        assert!(living.path.exists());
        let error = file("living", Access::Everyone, 4096).unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
    }

    #[test]
    fn a_full_dev_shm_is_an_error_at_the_start() {
        let error = file("huge", Access::Everyone, 1 << 45).unwrap_err();
        let told = error.to_string();
        assert!(told.starts_with("/dev/shm has no room for an arena of 35184372088832 bytes"), "{told}");
        assert!(told.contains("emptyDir"), "{told}");
    }
}
