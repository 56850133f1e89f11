//! The demo's processes: found, started, told to end, and never left behind.
//!
//! Every child is started through `penstock hold`, which asks the kernel to kill it when the demo dies, however that
//! happens, and then becomes the program. Children get a process group of their own, so that Ctrl-C reaches the demo
//! alone, which ends them in good order. Their output goes to a file each; its last lines are shown when one fails.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::failure::Failure;

/// The subcommand that becomes another program.
pub(crate) const HOLD: &str = "hold";
/// How long children may take to end in good order at the end of the demo.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// How much of a log is shown when its process fails.
const TAIL: usize = 8;

/// Where the programs are.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    /// `penstock-control`.
    pub(crate) control: PathBuf,
    /// `penstock-proxy`.
    pub(crate) proxy: PathBuf,
    /// `penstock-modelserver`.
    pub(crate) server: PathBuf,
    /// This program.
    itself: PathBuf,
}

impl Programs {
    /// Looks beside this program, where cargo puts them all, then in `PATH`.
    pub(crate) fn find() -> Result<Self, Failure> {
        let itself = std::env::current_exe()
            .map_err(|e| Failure::Problem(format!("cannot tell where this program lies: {e}")))?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let beside = itself.parent().map(Path::to_path_buf);
        let directories: Vec<PathBuf> = beside.into_iter().chain(std::env::split_paths(&path)).collect();
        Self::among(&directories, itself)
    }

    fn among(directories: &[PathBuf], itself: PathBuf) -> Result<Self, Failure> {
        let mut missing = Vec::new();
        let mut find = |name: &'static str, package: &'static str| {
            let found = directories.iter().map(|directory| directory.join(name)).find(|file| file.is_file());
            found.unwrap_or_else(|| {
                missing.push((name, package));
                PathBuf::new()
            })
        };
        let programs = Self {
            control: find("penstock-control", "penstock-control"),
            proxy: find("penstock-proxy", "penstock-proxy"),
            server: find("penstock-modelserver", "penstock-tests"),
            itself,
        };
        if missing.is_empty() {
            return Ok(programs);
        }
        let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
        let builds: Vec<String> =
            missing.iter().map(|(name, package)| format!("-p {package} --bin {name}")).collect();
        let release =
            if directories.first().is_some_and(|d| d.ends_with("release")) { "--release " } else { "" };
        Err(Failure::Problem(format!(
            "{} is neither beside this program ({}) nor in PATH: run `cargo build {release}{}` in the repository",
            names.join(", "),
            directories.first().map_or(Path::new("?"), PathBuf::as_path).display(),
            builds.join(" ")
        )))
    }
}

/// The arguments of `penstock hold`.
#[derive(Debug, clap::Args)]
pub(crate) struct HoldArgs {
    /// The process that must live on.
    #[arg(long)]
    parent: i32,
    /// What to become.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Becomes `command`, to be killed when the parent dies. Returns only when it cannot.
pub(crate) fn hold(args: &HoldArgs) -> Failure {
    #[cfg(target_os = "linux")]
    {
        if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
            return Failure::Problem(format!("the kernel does not tie this process to its parent: {error}"));
        }
        // The parent may have died just before that.
        if rustix::process::getppid().map(Pid::as_raw_pid) != Some(args.parent) {
            return Failure::Interrupted;
        }
    }
    let Some((program, rest)) = args.command.split_first() else {
        return Failure::Usage("hold: no command".to_owned());
    };
    let error = std::process::Command::new(program).args(rest).exec();
    Failure::Problem(format!("{} cannot be run: {error}", program.display()))
}

/// A running child.
#[derive(Debug)]
struct Process {
    child: Child,
    log: PathBuf,
    told_to_end: bool,
}

impl Process {
    fn signal(&mut self, signal: Signal) {
        self.told_to_end = true;
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            // It fails only when the child has ended, which is what was wanted.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

/// All children, by name.
#[derive(Debug)]
pub(crate) struct Processes {
    programs: Programs,
    logs: PathBuf,
    running: BTreeMap<String, Process>,
}

impl Processes {
    /// None yet; logs will go to `logs`.
    pub(crate) fn new(programs: Programs, logs: PathBuf) -> Self {
        Self { programs, logs, running: BTreeMap::new() }
    }

    /// Where the programs are.
    pub(crate) fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Starts a child under `name`; a child of the same name must have ended.
    pub(crate) fn start<A: AsRef<OsStr>>(
        &mut self,
        name: &str,
        program: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Result<(), Failure> {
        let log = self.logs.join(format!("{name}.log"));
        let failed =
            |e: io::Error| Failure::Problem(format!("{name} ({}) does not start: {e}", program.display()));
        // Appended, so that a restart does not wipe what the process before it said.
        let output = File::options().create(true).append(true).open(&log).map_err(failed)?;
        let child = Command::new(&self.programs.itself)
            .arg(HOLD)
            .arg(format!("--parent={}", std::process::id()))
            .arg("--")
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(failed)?)
            .stderr(output)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        self.running.insert(name.to_owned(), Process { child, log, told_to_end: false });
        Ok(())
    }

    /// Tells a child to end, in good order (`SIGTERM`) or at once (`SIGKILL`).
    pub(crate) fn signal(&mut self, name: &str, signal: Signal) {
        if let Some(process) = self.running.get_mut(name) {
            process.signal(signal);
        }
    }

    /// Waits for the end of a child that was told to end.
    pub(crate) async fn ended(&mut self, name: &str, timeout: Duration) -> Result<ExitStatus, Failure> {
        let Some(mut process) = self.running.remove(name) else {
            return Err(Failure::Problem(format!("{name} is not running")));
        };
        match tokio::time::timeout(timeout, process.child.wait()).await {
            Ok(Ok(status)) => Ok(status),
            Ok(Err(error)) => Err(Failure::Problem(format!("{name} cannot be waited for: {error}"))),
            // Dropped here, and thereby killed.
            Err(_) => Err(Failure::Problem(format!(
                "{name} was told to end and still runs {} s later{}",
                timeout.as_secs(),
                tail(&process.log)
            ))),
        }
    }

    /// Fails when a child ended that nobody told to.
    pub(crate) fn must_live(&mut self) -> Result<(), Failure> {
        for (name, process) in self.running.iter_mut().filter(|(_, process)| !process.told_to_end) {
            if let Ok(Some(status)) = process.child.try_wait() {
                return Err(Failure::Problem(format!(
                    "{name} ended by itself ({status}){}",
                    tail(&process.log)
                )));
            }
        }
        Ok(())
    }

    /// The CPU time of a child so far.
    pub(crate) fn cpu(&self, name: &str) -> Option<Duration> {
        cpu(&self.running.get(name)?.child.id()?.to_string())
    }

    /// The last lines of a child's log, as the end of a sentence.
    pub(crate) fn said(&self, name: &str) -> String {
        self.running.get(name).map(|process| tail(&process.log)).unwrap_or_default()
    }

    /// Ends all children, `last` after the others: told first, killed if they take too long.
    pub(crate) async fn end(&mut self, last: &str) {
        let last = self.running.remove_entry(last);
        end(std::mem::take(&mut self.running)).await;
        end(last.into_iter().collect()).await;
    }
}

/// The CPU time of this process so far.
pub(crate) fn own_cpu() -> Option<Duration> {
    cpu("self")
}

/// What the kernel says of a process in `/proc`, which is Linux's.
fn cpu(process: &str) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is the program's name, in parentheses, and may hold anything; what follows begins with the third.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let ticks = rustix::param::clock_ticks_per_second();
    Some(Duration::from_secs_f64((user + system) as f64 / ticks as f64))
}

async fn end(mut processes: BTreeMap<String, Process>) {
    for process in processes.values_mut() {
        process.signal(Signal::TERM);
    }
    let deadline = Instant::now() + END_TIMEOUT;
    for process in processes.values_mut() {
        if tokio::time::timeout_at(deadline, process.child.wait()).await.is_err() {
            let _ = process.child.kill().await;
        }
    }
}

/// `; the last lines of <log>: …`, or that it said nothing.
fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return format!("; it wrote nothing to {}", log.display());
    }
    let last = &lines[lines.len().saturating_sub(TAIL)..];
    format!("; the last lines of {}:\n  {}", log.display(), last.join("\n  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_built_is_named_with_the_command_that_builds_it() {
        let empty = tempfile::tempdir().unwrap();
        let directory = empty.path().join("release");
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("penstock-control"), "").unwrap();
        let failure =
            Programs::among(std::slice::from_ref(&directory), PathBuf::new()).unwrap_err().to_string();
        assert!(failure.contains("penstock-proxy, penstock-modelserver is neither"), "{failure}");
        assert!(
            failure.contains(
                "cargo build --release -p penstock-proxy --bin penstock-proxy -p penstock-tests --bin penstock-modelserver"
            ),
            "{failure}"
        );
        for name in ["penstock-proxy", "penstock-modelserver"] {
            std::fs::write(directory.join(name), "").unwrap();
        }
        assert!(Programs::among(&[directory], PathBuf::new()).is_ok());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn cpu_time_grows_with_what_is_computed() {
        let before = own_cpu().unwrap();
        let mut digits = 0_u64;
        while own_cpu().unwrap() < before + Duration::from_millis(30) {
            digits += (0..1_000_u64).map(std::hint::black_box).sum::<u64>();
        }
        assert!(digits > 0);
        assert_eq!(cpu("0"), None);
    }

    #[test]
    fn only_the_end_of_a_log_is_shown() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("x.log");
        assert!(tail(&log).contains("wrote nothing"));
        std::fs::write(&log, (0..50).map(|i| format!("line {i}\n\n")).collect::<String>()).unwrap();
        let tail = tail(&log);
        assert!(tail.ends_with("line 49") && tail.contains("line 42") && !tail.contains("line 41"), "{tail}");
    }
}
