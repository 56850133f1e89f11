//! What a request costs in system calls and in allocations. Both are counted in runs of their own, since counting slows a proxy
//! down; nothing of them is timed.
//!
//! System calls are those that `strace -f -c` sees from when it is attached to all of a proxy's threads until it lets go, divided by
//! the requests that the upstream saw meanwhile. The first and the last of them are a few hundredths of a second apart from strace's own
//! first and last, which makes the figure uncertain by a hundredth or two. Allocations are those of `penstock-counted`, the
//! same proxy with an allocator that counts; we have no such build of others.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout};

use super::{Bed, PROXY_CORE, Round, verify};
use crate::case::{Case, Metric};
use crate::process::{self, Process};
use crate::subject::{Programs, Running, Subject};
use crate::usage;

/// How long is counted: thousands of requests, even under strace.
const WINDOW: Duration = Duration::from_secs(2);
/// From the first request until then: connections are open, pools are filled.
const SETTLE: Duration = Duration::from_millis(500);
/// How long strace may take to attach or to let go, and a proxy to say how often it has allocated.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the load is given, which is ended when counting is done.
const FOREVER: f64 = 3600.0;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);

/// What was counted of each subject, or why it was not.
pub(super) type Counts = BTreeMap<(Subject, Metric), Result<f64, String>>;

impl Bed {
    /// Counts what the case wants to have counted, once for each subject that was measured.
    pub(super) async fn count(&self, case: &Case, round: &Round) -> Counts {
        let mut counts = Counts::new();
        let measured = round.iter().filter(|(_, runs)| runs.is_ok()).map(|(subject, _)| *subject);
        for subject in measured.filter(|subject| *subject != Subject::Direct) {
            for metric in case.counts() {
                if *metric == Metric::Allocations && subject != Subject::Penstock {
                    continue;
                }
                let counted =
                    self.counted(case, subject, *metric).await.map_err(|error| format!("{error:#}"));
                let told = match &counted {
                    Ok(count) => format!("{count:.1} {} per request", metric.name()),
                    Err(error) => format!("{} were not counted: {error}", metric.name()),
                };
                eprintln!("{:<16} counted  {:<9}  {told}", case.name, subject.name());
                counts.insert((subject, *metric), counted);
            }
        }
        counts
    }

    async fn counted(&self, case: &Case, subject: Subject, metric: Metric) -> Result<f64> {
        let programs = match metric {
            Metric::Allocations => {
                Programs { penstock: self.this.with_file_name("penstock-counted"), ..self.programs.clone() }
            }
            _ => self.programs.clone(),
        };
        let mut running =
            subject.start(case, &programs, self.addresses, self.dir.path(), PROXY_CORE, None)?;
        let check = self.check(case, subject, None);
        check.run(&mut running).await?;
        let arguments = self.arguments(case, &running.front.to_string(), &[], self.upstream.pid(), FOREVER);
        let mut load = self.start_load(&arguments)?;
        sleep(SETTLE).await;
        let counted = match metric {
            Metric::Allocations => allocations(&running, &check).await,
            _ => self.syscalls(&running, &check).await,
        };
        load.check()?;
        running.check()?;
        load.stop().await;
        running.stop().await;
        counted
    }

    /// System calls for each request.
    async fn syscalls(&self, running: &Running, check: &verify::Check<'_>) -> Result<f64> {
        let summary = self.dir.path().join("strace.txt");
        let mut arguments: Vec<OsString> =
            ["-f", "-c", "-U", "calls,name", "-o"].iter().map(OsString::from).collect();
        arguments.push(summary.clone().into());
        let proxies = running.processes.iter().flat_map(|process| usage::tree(process.pid()));
        let proxies: Vec<u32> = proxies.collect();
        arguments.extend(proxies.iter().flat_map(|pid| ["-p".into(), pid.to_string().into()]));
        let mut strace =
            process::spawn(None, "strace", "strace".as_ref(), &arguments, self.dir.path(), false)?;
        let deadline = Instant::now() + PATIENCE;
        while !usage::all_traced(&proxies)? {
            strace.check()?;
            ensure!(Instant::now() < deadline, "strace was not attached within {PATIENCE:?}");
            sleep(LOOK).await;
        }
        let before = check.seen().await?;
        sleep(WINDOW).await;
        let after = check.seen().await?;
        strace.end(Signal::INT, PATIENCE).await?;
        let summary = fs::read_to_string(&summary).context("what strace counted")?;
        let calls = total(&summary).with_context(|| format!("no total in what strace counted: {summary}"))?;
        per_request(calls, after - before)
    }
}

/// Allocations for each request, those of A and B together in a mesh.
async fn allocations(running: &Running, check: &verify::Check<'_>) -> Result<f64> {
    let (seen_before, before) = (check.seen().await?, allocated(&running.processes).await?);
    sleep(WINDOW).await;
    let (seen, after) = (check.seen().await?, allocated(&running.processes).await?);
    per_request(after - before, seen - seen_before)
}

/// How often these have allocated since they began.
async fn allocated(processes: &[Process]) -> Result<u64> {
    let mut sum = 0;
    for process in processes {
        let told = process.said().lines().filter_map(told).count();
        process.signal(Signal::USR1)?;
        let next = async {
            loop {
                match process.said().lines().filter_map(self::told).nth(told) {
                    Some(count) => return count,
                    None => sleep(LOOK).await,
                }
            }
        };
        sum += timeout(PATIENCE, next).await.context("it does not say how often it has allocated")?;
    }
    Ok(sum)
}

/// What a line of `penstock-counted` tells.
fn told(line: &str) -> Option<u64> {
    line.strip_prefix("allocations: ")?.parse().ok()
}

/// The last line of what `strace -c -U calls,name` writes: all calls.
fn total(summary: &str) -> Option<u64> {
    let line = summary.lines().rev().find_map(|line| line.trim_end().strip_suffix("total"))?;
    line.trim().parse().ok()
}

fn per_request(count: u64, requests: u64) -> Result<f64> {
    ensure!(requests > 0, "no request was answered while it was counted");
    Ok(count as f64 / requests as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_calls_are_in_straces_last_line() {
        let summary = "    calls syscall\n--------- ----------------\n      300 epoll_wait\n     1200 recvfrom\n\
                       --------- ----------------\n     1500 total\n";
        assert_eq!(total(summary), Some(1500));
        assert_eq!(total("strace: Process 1 attached\n"), None);
    }

    #[test]
    fn what_is_counted_is_for_each_request() {
        assert_eq!(per_request(900, 300).unwrap(), 3.0);
        assert!(per_request(900, 0).unwrap_err().to_string().contains("no request"));
    }

    #[test]
    fn a_count_is_found_between_other_lines() {
        let said = "{\"level\":\"INFO\"}\nallocations: 17\nallocations: x\nallocations: 25\n";
        assert_eq!(said.lines().filter_map(told).collect::<Vec<u64>>(), [17, 25]);
    }
}
