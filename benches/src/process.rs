//! Child processes: pinned to a core if wanted, in a group of their own, gone with us.
//!
//! A child is killed with its whole group when its [`Process`] is dropped, told to end by the kernel if this process
//! is killed, and never found by name. What a proxy says goes to a file whose end is told when the proxy fails.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

/// How much of a log is shown with an error.
const TOLD: usize = 1200;

/// A running child.
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    pid: u32,
}

/// Starts `program`, on `core` alone if one is given; what it says goes to `NAME.log` in `dir`, and what it prints to us if `piped`.
pub(crate) fn spawn(
    core: Option<usize>,
    name: &str,
    program: &Path,
    args: &[OsString],
    dir: &Path,
    piped: bool,
) -> Result<Process> {
    spawn_as(None, core, name, program, args, dir, piped)
}

/// The same, as another user.
pub(crate) fn spawn_as(
    user: Option<u32>,
    core: Option<usize>,
    name: &str,
    program: &Path,
    args: &[OsString],
    dir: &Path,
    piped: bool,
) -> Result<Process> {
    let log = dir.join(format!("{name}.log"));
    let said = File::create(&log).with_context(|| format!("{}", log.display()))?;
    let printed = if piped { Stdio::piped() } else { said.try_clone()?.into() };
    let mut command = Command::new("setpriv");
    if let Some(user) = user.map(|user| user.to_string()) {
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
    }
    // Last, since changing the user forgets it.
    command.args(["--pdeathsig", "TERM", "--"]);
    if let Some(core) = core {
        command.args(["taskset", "-c"]).arg(core.to_string());
    }
    command.arg(program).args(args);
    command.stdin(Stdio::null()).stdout(printed).stderr(said).process_group(0).kill_on_drop(true);
    let child = command.spawn().with_context(|| {
        format!(
            "could not start {name}: `setpriv` and `taskset` of util-linux are needed to pin {}",
            program.display()
        )
    })?;
    let pid = child.id().with_context(|| format!("{name} ended at once"))?;
    Ok(Process { child, name: name.to_owned(), log, pid })
}

impl Process {
    /// Its process id; that of its group, too.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Fails if it has ended, with the last that it said.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(self.story(&format!("ended with {status}"))),
        }
    }

    /// The first line that it prints.
    pub(crate) async fn line(&mut self) -> Result<String> {
        let stdout = self.child.stdout.as_mut().context("its output is not ours to read")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).await?;
        if line.is_empty() {
            return Err(self.story("printed nothing"));
        }
        Ok(line)
    }

    /// All that it prints until it ends well.
    pub(crate) async fn output(mut self, limit: Duration) -> Result<String> {
        let mut stdout = self.child.stdout.take().context("its output is not ours to read")?;
        let mut output = String::new();
        let all = async {
            stdout.read_to_string(&mut output).await?;
            self.child.wait().await
        };
        match tokio::time::timeout(limit, all).await {
            Ok(status) if status.as_ref().is_ok_and(std::process::ExitStatus::success) => Ok(output),
            Ok(status) => Err(self.story(&format!("ended with {}", status?))),
            Err(_) => Err(self.story(&format!("did not end within {limit:?}"))),
        }
    }

    /// Sends it, and its whole group, a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let group = i32::try_from(self.pid).ok().and_then(Pid::from_raw).context("its process id")?;
        kill_process_group(group, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Tells it to end by a signal, and waits until it has, however it ends.
    pub(crate) async fn end(mut self, signal: Signal, limit: Duration) -> Result<()> {
        self.signal(signal)?;
        match tokio::time::timeout(limit, self.child.wait()).await {
            Ok(status) => status.map(|_| ()).with_context(|| format!("{} cannot be waited for", self.name)),
            Err(_) => Err(self.story(&format!("did not end within {limit:?}"))),
        }
    }

    /// Kills it and waits until it is gone.
    pub(crate) async fn stop(mut self) {
        self.kill();
        let _ = self.child.wait().await;
    }

    fn kill(&self) {
        // It has ended already if this fails.
        let _ = self.signal(Signal::KILL);
    }

    /// All that it has said.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// What happened to it, and the last that it said.
    pub(crate) fn story(&self, what: &str) -> anyhow::Error {
        let said = fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said[said.len().saturating_sub(TOLD)..]).trim().to_owned();
        match said.is_empty() {
            true => anyhow!("{} {what}", self.name),
            false => anyhow!("{} {what}: {said}", self.name),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A group that has been waited for may have given its number to somebody else.
        if self.child.id().is_some() {
            self.kill();
        }
    }
}
