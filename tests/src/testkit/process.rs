//! A program of ours as a process: started from where cargo puts it, killed when dropped, its log kept.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::wait_until;

/// How much of a log is shown when a test fails.
const TAIL: usize = 25;

/// Where cargo put a binary of this workspace: beside the folder of the test's own executable.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap();
    let file = folder.join(name);
    assert!(
        file.is_file(),
        "{} is missing; build it with: cargo build -p penstock-proxy -p penstock-control -p penstock-tests",
        file.display()
    );
    file
}

/// A running process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program`; what it prints goes to `folder/name.log`, after what an earlier process of the name printed.
    pub fn start<A: AsRef<OsStr>>(name: &str, program: &Path, args: &[A], folder: &Path) -> Self {
        Self::start_with(name, program, args, &[], folder)
    }

    /// The same with variables of its environment.
    pub fn start_with<A: AsRef<OsStr>>(
        name: &str,
        program: &Path,
        args: &[A],
        variables: &[(&str, String)],
        folder: &Path,
    ) -> Self {
        let log = folder.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log).unwrap();
        let child = Command::new(program)
            .args(args)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", program.display()));
        Self { name: name.to_owned(), child, log }
    }

    /// Its number, which is the program's own where it was started through others that become it.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed()).unwrap()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Asks it to end in good order.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        // It fails only when the process has ended, which is what was wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it has ended by itself.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        let mut status = None;
        wait_until(&format!("{} ends", self.name), limit, async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// All it has printed.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Resident memory, KiB.
    pub fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Its threads.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count()
    }

    /// Open files and sockets.
    pub fn files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let said = self.said();
            let lines: Vec<_> = said.lines().collect();
            let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n    ");
            eprintln!("the end of what {} said:\n    {tail}", self.name);
        }
    }
}
