//! The peers: a Python process for each venv, which is told what to do line by line.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

/// Which venv has which subject; what is not here is in the first.
const VENVS: [(&str, &[&str]); 2] = [("images", &[]), ("dali", &["dali-cpu"])];

/// Ends with the bed, since its input does.
pub(crate) struct Peer {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

/// All of them, or why one is not there.
pub(crate) struct Peers {
    dir: PathBuf,
    running: BTreeMap<&'static str, Result<Peer, String>>,
}

impl Peers {
    /// Installs and starts them. The first writes the images that everybody works on.
    pub(crate) fn start(install: &Path, script: &Path, dir: &Path) -> Self {
        let start = |venv: &'static str| {
            let peer = Peer::start(install, script, dir, venv);
            (venv, peer.map_err(|error| format!("{error:#}")))
        };
        Self { dir: dir.to_owned(), running: VENVS.iter().map(|(venv, _)| start(venv)).collect() }
    }

    /// CPU milliseconds for an image.
    pub(crate) fn run(&mut self, case: &str, subject: &str, count: usize) -> Result<f64> {
        let answer = self.ask(case, subject, json!({"case": case, "subject": subject, "count": count}))?;
        answer["cpu_ms"].as_f64().with_context(|| format!("{subject} answered {answer}"))
    }

    /// The tensor that a peer makes, as it lies in memory.
    pub(crate) fn tensor(&mut self, case: &str, subject: &str) -> Result<Vec<u8>> {
        let file = self.dir.join("tensor");
        self.ask(case, subject, json!({"case": case, "subject": subject, "tensor": file}))?;
        Ok(std::fs::read(file)?)
    }

    fn ask(&mut self, case: &str, subject: &str, question: Value) -> Result<Value> {
        let venv =
            VENVS.iter().find(|(_, subjects)| subjects.contains(&subject)).map_or("images", |(venv, _)| venv);
        let peer = self.running.get_mut(venv).with_context(|| format!("there is no venv {venv}"))?;
        let peer = peer.as_mut().map_err(|error| anyhow!("{error}"))?;
        peer.ask(&question).with_context(|| format!("{subject} in {case}"))
    }
}

impl Peer {
    fn start(install: &Path, script: &Path, dir: &Path, venv: &str) -> Result<Self> {
        let mut command = Command::new(installed(install, venv)?.join("bin/python"));
        command.arg(script).arg(dir);
        Self::of(&mut command).with_context(|| format!("the peers of {venv}"))
    }

    /// A process that says `ready`, and then answers each line with one of JSON.
    pub(crate) fn of(command: &mut Command) -> Result<Self> {
        // One core is one thread: a pool would only be in its own way.
        command.env("OMP_NUM_THREADS", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let program = command.get_program().to_owned();
        let mut child = command.spawn().with_context(|| format!("{} cannot be run", program.display()))?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let mut peer = Self { child, to, from: BufReader::new(from.context("it has no output")?) };
        let mut ready = String::new();
        peer.from.read_line(&mut ready)?;
        ensure!(ready.trim() == "ready", "it said {ready:?} instead of being ready");
        Ok(peer)
    }

    /// Its answer to a line.
    pub(crate) fn ask(&mut self, question: &Value) -> Result<Value> {
        let to = self.to.as_mut().context("it has ended")?;
        writeln!(to, "{question}")?;
        to.flush()?;
        let mut line = String::new();
        ensure!(self.from.read_line(&mut line)? > 0, "it ended instead of answering");
        let answer: Value = serde_json::from_str(&line).with_context(|| format!("it said {line}"))?;
        match answer["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }
}

/// The folder of a venv, which is made if it is not there.
pub(crate) fn installed(install: &Path, venv: &str) -> Result<PathBuf> {
    let output = Command::new("python3").arg(install).arg(venv).stdin(Stdio::null()).output()?;
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}", said.trim());
    // The path is the last word of what the script says.
    Ok(said.split_whitespace().last().context("nothing was installed")?.into())
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.to = None;
        let _ = self.child.wait();
    }
}
