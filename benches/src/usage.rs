//! What processes and cores have used, read from `/proc`. Nothing is sampled between two readings.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};

/// Ticks of `/proc` in a second: part of Linux's interface on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process and all its descendants.
pub(crate) fn tree(root: u32) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut look_at = vec![root];
    while let Some(pid) = look_at.pop() {
        if !found.insert(pid) {
            continue;
        }
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            look_at.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    found
}

/// Whether somebody traces all threads of these processes.
pub(crate) fn all_traced(pids: &[u32]) -> Result<bool> {
    for pid in pids {
        let path = format!("/proc/{pid}/task");
        let tasks = fs::read_dir(&path).with_context(|| format!("{path}: has the process ended?"))?;
        let untraced = |status: String| number(&status, "TracerPid:") == Some(0.0);
        // A thread that has ended meanwhile needs no tracer.
        if tasks.flatten().any(|task| fs::read_to_string(task.path().join("status")).is_ok_and(untraced)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// CPU seconds, user and system, that these processes have used.
pub(crate) fn cpu_seconds(pids: &BTreeSet<u32>) -> Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).with_context(|| format!("{path}: has the process ended?"))?;
        ticks += process_ticks(&stat).with_context(|| format!("{path} reads {stat:?}"))?;
    }
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

/// `utime + stime`: fields 14 and 15, counted behind the name, which may itself contain blanks and brackets.
fn process_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Resident memory of some processes, in MiB. Pages that they share are counted once for each.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// Now.
    pub(crate) now: f64,
    /// At most, since each began.
    pub(crate) peak: f64,
}

/// Resident memory of these processes.
pub(crate) fn memory(pids: &BTreeSet<u32>) -> Result<Memory> {
    let mut sum = Memory::default();
    for pid in pids {
        let path = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&path).with_context(|| format!("{path}: has the process ended?"))?;
        sum.now += number(&status, "VmRSS:").unwrap_or(0.0) / 1024.0;
        sum.peak += number(&status, "VmHWM:").unwrap_or(0.0) / 1024.0;
    }
    Ok(sum)
}

/// The number behind a field's name.
fn number(status: &str, field: &str) -> Option<f64> {
    status.lines().find_map(|line| line.strip_prefix(field))?.split_whitespace().next()?.parse().ok()
}

/// Seconds that the given cores have been busy with anything at all, stolen time included.
pub(crate) fn cores_busy(cores: &[usize]) -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    Ok(cores.iter().filter_map(|core| core_ticks(&stat, *core)).sum::<u64>() as f64 / TICKS_PER_SECOND)
}

/// user, nice, system, irq, softirq and steal; not idle, iowait.
fn core_ticks(stat: &str, core: usize) -> Option<u64> {
    let name = format!("cpu{core}");
    let line = stat.lines().find(|line| line.split(' ').next() == Some(name.as_str()))?;
    let fields: Vec<u64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    Some([0, 1, 2, 5, 6, 7].iter().filter_map(|at| fields.get(*at)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0 100 1000 10";
        assert_eq!(process_ticks(stat), Some(300));
    }

    #[test]
    fn idle_time_is_not_busy_time() {
        let stat = "cpu  1 1 1 1 1 1 1 1 0 0\ncpu0 10 1 20 999 999 2 3 4 0 0\ncpu10 9 9 9 9 9 9 9 9 0 0\n";
        assert_eq!(core_ticks(stat, 0), Some(40));
        assert_eq!(core_ticks(stat, 7), None);
    }

    #[test]
    fn nobody_traces_this_process() {
        assert!(!all_traced(&[std::process::id()]).unwrap());
        assert!(all_traced(&[]).unwrap());
    }

    #[test]
    fn this_process_uses_memory() {
        let own = tree(std::process::id());
        assert!(own.contains(&std::process::id()));
        let memory = memory(&[std::process::id()].into()).unwrap();
        assert!(memory.now > 0.5 && memory.peak >= memory.now);
    }
}
