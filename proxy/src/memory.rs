//! How much memory the proxy may use in all.
//!
//! What a body takes that nobody reads is bounded for its stream and its connection; the number of them is not. A container's limit ends
//! the proxy, and with it every request that it has. So from a mark below that limit on, new requests are refused, which another endpoint may
//! serve, and those under way go on.
//!
//! What counts is what the kernel counts, the resident memory of the process, looked at four times a second: what was freed and not given
//! back yet among it, so each worker gives back what it can while memory is short; and the arena, all of it as soon as there is one.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use penstock_api::Reason;
use penstock_kernels::allocated;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::failure::Failure;
use crate::telemetry::metric;
use crate::telemetry::seldom::Seldom;

/// Where version 2 of control groups is mounted (cgroups(7)).
const GROUPS: &str = "/sys/fs/cgroup";
/// Of what a container may have, percent. The rest is for what its sockets hold in the kernel, and for what is read between two looks.
pub const PERCENT: u64 = 85;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// Between two tries of a worker to give back what it has freed, while memory is short.
const GIVE_BACK: Duration = Duration::from_millis(100);

/// What is used, and what may be.
#[derive(Debug)]
pub struct Memory {
    /// Bytes; 0 = as much as there is.
    most: u64,
    used: AtomicU64,
    short: watch::Sender<bool>,
    refusing: Seldom<10>,
}

impl Memory {
    /// Of which so many bytes may be used; 0 = as much as there is.
    pub fn new(most: u64) -> Self {
        Self { most, used: AtomicU64::new(0), short: watch::Sender::new(false), refusing: Seldom::default() }
    }

    /// Refuses what is new while memory is short.
    pub fn admit(&self) -> Result<(), Failure> {
        if self.most == 0 {
            return Ok(());
        }
        let used = self.used.load(Relaxed);
        if used < self.most {
            return Ok(());
        }
        if let Some(times) = self.refusing.happened(Instant::now()) {
            let (used_mib, most_mib, reason) = (used >> 20, self.most >> 20, Reason::OutOfMemory);
            tracing::warn!(used_mib, most_mib, times, %reason, "refusing new requests; raise the limit (penstock.io/proxy-memory, or --max-memory)?");
        }
        // How much that is, is for who may read the log.
        Err(Failure::unprocessed(
            Reason::OutOfMemory,
            "this proxy has as much memory as it may; raise its limit (penstock.io/proxy-memory, or --max-memory), or send it less at a time",
        ))
    }

    /// Looks at what is used, for ever.
    pub async fn watch(&self) {
        if self.most == 0 {
            return;
        }
        let mut looks = tokio::time::interval(LOOK);
        loop {
            looks.tick().await;
            if let Some(used) = resident() {
                self.uses(used);
            }
        }
    }

    fn uses(&self, used: u64) {
        self.used.store(used, Relaxed);
        metrics::gauge!(metric::MEMORY.name).set(used as f64);
        let is_short = used >= self.most;
        self.short.send_if_modified(|short| std::mem::replace(short, is_short) != is_short);
    }

    /// Gives back what this thread has freed whenever memory is short, for ever.
    pub async fn give_back(&self) {
        let mut short = self.short.subscribe();
        while short.wait_for(|short| *short).await.is_ok() {
            allocated::give_back();
            tokio::time::sleep(GIVE_BACK).await;
        }
    }
}

/// Bytes that this process has resident, what it shares among them (proc_pid_statm(5)).
fn resident() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// What this process may use by the limit of its container; 0 = it has none.
pub fn allowed() -> u64 {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    limit(Path::new(GROUPS), &own).map_or(0, |limit| limit / 100 * PERCENT)
}

/// The least of the limits of the group whose line (`0::<path>`) is in `own`, and of those that it is in.
fn limit(root: &Path, own: &str) -> Option<u64> {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let groups = Path::new(path).ancestors();
    let limit = |group| fs::read_to_string(root.join(group).join("memory.max")).ok()?.trim().parse().ok();
    groups.filter_map(limit).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn above_the_mark_new_requests_are_refused_and_workers_give_back() {
        let memory = Memory::new(100 << 20);
        let short = memory.short.subscribe();
        memory.admit().unwrap();
        memory.uses(100 << 20);
        let refused = memory.admit().unwrap_err();
        assert!(refused.unprocessed && refused.reason == Reason::OutOfMemory, "{refused}");
        assert!(*short.borrow());
        memory.uses((100 << 20) - 1);
        memory.admit().unwrap();
        assert!(!*short.borrow());
    }

    #[test]
    fn without_a_mark_nothing_is_refused() {
        let memory = Memory::new(0);
        memory.uses(u64::MAX);
        memory.admit().unwrap();
    }

    #[test]
    fn the_least_limit_of_all_groups_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("pods/one");
        fs::create_dir_all(&inner).unwrap();
        let own = "4:memory:/old\n0::/pods/one\n";
        assert_eq!(limit(root.path(), own), None);
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        assert_eq!(limit(root.path(), own), None);
        fs::write(root.path().join("pods/memory.max"), "1073741824\n").unwrap();
        assert_eq!(limit(root.path(), own), Some(1 << 30));
        fs::write(inner.join("memory.max"), "2097152\n").unwrap();
        assert_eq!(limit(root.path(), own), Some(2 << 20));
        // What a container sees of its own group.
        fs::write(root.path().join("memory.max"), "4096\n").unwrap();
        assert_eq!(limit(root.path(), "0::/\n"), Some(4096));
        assert_eq!(limit(root.path(), ""), None);
    }

    #[test]
    fn what_is_resident_is_read() {
        assert!(resident().is_some_and(|bytes| bytes > 1 << 20));
    }
}
