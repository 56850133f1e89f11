//! The two ends of the bed without a proxy between them, for moments rather than seconds.

use std::io::{BufRead, BufReader, Error, Result};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const BENCH: &str = env!("CARGO_BIN_EXE_penstock-bench");

/// An upstream that ends with the test.
struct Upstream {
    child: Child,
    addresses: Value,
}

impl Upstream {
    fn start() -> Result<Self> {
        let mut child = Command::new(BENCH).arg("upstream").stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or_else(|| Error::other("no output"))?;
        BufReader::new(stdout).read_line(&mut line)?;
        Ok(Self { child, addresses: serde_json::from_str(&line)? })
    }

    /// A short load on the port of `protocol`.
    fn load(&self, protocol: &str, more: &[&str]) -> Result<Output> {
        let address = self.addresses[protocol].as_str().ok_or_else(|| Error::other("no address"))?;
        let mut command = Command::new(BENCH);
        command.args(["load", "--address", address, "--protocol", protocol]);
        command.args(["--connections", "4", "--warm-up", "0.1", "--seconds", "0.4"]);
        command.args(["--watch", &self.child.id().to_string()]).args(more).output()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn measured(output: &Output) -> Result<Value> {
    if !output.status.success() {
        return Err(Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[test]
fn both_protocols_are_answered_without_an_error() {
    let upstream = Upstream::start().unwrap();
    for protocol in ["h1", "h2"] {
        let run = measured(&upstream.load(protocol, &[]).unwrap()).unwrap();
        assert!(run["requests"].as_u64().unwrap() > 50, "{protocol}: {run}");
        assert_eq!(run["errors"], 0, "{protocol}: {run}");
        assert!(run["p50_us"].as_f64() <= run["p99_us"].as_f64(), "{protocol}: {run}");
        assert!(run["rss"].as_f64().unwrap() > 0.0, "the upstream was watched: {run}");
    }
}

#[test]
fn every_byte_of_a_body_is_counted() {
    let upstream = Upstream::start().unwrap();
    let run = measured(&upstream.load("h1", &["--body", "300000"]).unwrap()).unwrap();
    assert_eq!(run["bytes"].as_u64().unwrap(), 300_000 * run["requests"].as_u64().unwrap());
    assert_eq!(run["errors"], 0, "{run}");
}

#[test]
fn an_open_loop_keeps_its_rate() {
    let upstream = Upstream::start().unwrap();
    let run = measured(&upstream.load("h1", &["--rate", "500"]).unwrap()).unwrap();
    let requests = run["requests"].as_u64().unwrap();
    assert!((150..=250).contains(&requests), "500/s for 0.4 s are about 200 requests: {run}");
}

#[test]
fn each_request_may_have_a_connection_of_its_own() {
    let upstream = Upstream::start().unwrap();
    let run = measured(&upstream.load("h1", &["--purpose", "handshakes"]).unwrap()).unwrap();
    assert!(run["requests"].as_u64().unwrap() > 20, "{run}");
    assert_eq!(run["errors"], 0, "{run}");
}

#[test]
fn idle_connections_are_one_request_each() {
    let upstream = Upstream::start().unwrap();
    let run = measured(&upstream.load("h1", &["--purpose", "idle"]).unwrap()).unwrap();
    assert_eq!((run["requests"].as_u64(), run["errors"].as_u64()), (Some(4), Some(0)), "{run}");
    assert!(run["kib_per_conn"].as_f64().unwrap().abs() < 1e6, "{run}");
    let refused = upstream.load("h2", &["--purpose", "idle"]).unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("--purpose idle is measured with --protocol h1"), "{said}");
}

#[test]
fn tokens_come_at_their_pace() {
    let upstream = Upstream::start().unwrap();
    let run = measured(&upstream.load("h2", &["--purpose", "tokens", "--streams", "25"]).unwrap()).unwrap();
    // 4 connections of 25 streams, 50 tokens a second in each, for 0.4 s.
    let tokens = run["requests"].as_u64().unwrap();
    assert!((1800..=2300).contains(&tokens), "{run}");
    assert_eq!(run["errors"], 0, "{run}");
    assert!(run["gap_whole_p99_us"].as_f64().unwrap() < 1e6, "{run}");
    assert!(run["p50_us"].as_f64() <= run["p99_us"].as_f64(), "{run}");
}

#[test]
fn a_port_without_a_server_is_a_story_and_not_a_figure() {
    let upstream = Upstream::start().unwrap();
    let mut load = Command::new(BENCH);
    load.args(["load", "--address", "127.0.0.1:1", "--warm-up", "0.05", "--seconds", "0.1"]);
    let output = load.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("not one request to 127.0.0.1:1") && said.contains("refused"), "{said}");
    let refused = upstream.load("h2", &["--body", "10"]).unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("bodies are sent over h1 only"));
}
