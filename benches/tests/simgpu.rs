//! `penstock-simgpu` as its clients see it: what it answers, how long it takes, and that it says what it is.

use std::io::{BufRead, BufReader, Error, Read, Result, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

/// A server that ends with the test.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Result<Self> {
        let mut child =
            Command::new(env!("CARGO_BIN_EXE_penstock-simgpu")).args(args).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or_else(|| Error::other("no output"))?;
        BufReader::new(stdout).read_line(&mut line)?;
        Ok(Self { child, address: line.trim().to_owned() })
    }

    /// One request over a connection of its own: head and body, chunks and all.
    fn ask(&self, method: &str, path: &str, body: &str) -> Result<(String, String)> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: sim\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| Error::other(answer.clone()))?;
        Ok((head.to_lowercase(), body.to_owned()))
    }

    fn state(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.ask("GET", "/sim/state", "")?.1)?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn infer(rows: u32) -> String {
    json!({"inputs": [{"name": "x", "shape": [rows, 1], "datatype": "FP32", "data": vec![0; rows as usize]}]})
        .to_string()
}

#[test]
fn tensors_take_the_time_that_the_model_says_and_the_answer_says_that_it_is_simulated() {
    let server = Server::start(&["tensor", "--fixed", "60ms", "--row", "20ms", "--speed", "2"]).unwrap();
    let began = Instant::now();
    let (head, body) = server.ask("POST", "/v2/models/sim/infer", &infer(2)).unwrap();
    let took = began.elapsed();
    assert!(head.starts_with("http/1.1 200") && head.contains("server: penstock-simgpu"), "{head}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["outputs"][0]["shape"], json!([2, 1]));
    assert!(took >= Duration::from_millis(50), "60 + 2 * 20 ms at twice the speed, not {took:?}");
    let (_, page) = server.ask("GET", "/metrics", "").unwrap();
    assert!(page.contains("nv_inference_count{model=\"sim\",version=\"1\"} 2"), "{page}");
    assert!(page.contains("a simulated GPU"), "{page}");
    assert_eq!(server.state().unwrap()["units"], 2);
    server.ask("POST", "/sim/reset", "").unwrap();
    assert_eq!(server.state().unwrap()["units"], 0);
}

#[test]
fn a_stall_begins_anew_with_each_reset() {
    let server = Server::start(&["tensor", "--fixed", "5ms", "--row", "1ms", "--slow", "0s+300ms"]).unwrap();
    for _ in 0..2 {
        server.ask("POST", "/sim/reset", "").unwrap();
        for stalled in [true, false] {
            let began = Instant::now();
            server.ask("POST", "/v1/embeddings", r#"{"input": "x"}"#).unwrap();
            let took = began.elapsed();
            assert_eq!(took >= Duration::from_millis(250), stalled, "{took:?}");
        }
    }
}

#[test]
fn a_conversation_is_streamed_and_its_second_turn_finds_the_first_in_the_cache() {
    let server = Server::start(&["chat", "--step", "5ms", "--prompt-token", "10us"]).unwrap();
    let mut messages = vec![json!({"role": "system", "content": "Be terse. ".repeat(50)})];
    for turn in ["hello", "and then?"] {
        messages.push(json!({"role": "user", "content": turn}));
        let body = json!({"messages": messages, "stream": true, "stream_options": {"include_usage": true}});
        let (head, events) = server.ask("POST", "/v1/chat/completions", &body.to_string()).unwrap();
        assert!(head.contains("text/event-stream"), "{head}");
        assert!(events.contains("\"usage\":{") && events.contains("data: [DONE]"), "{events}");
    }
    let state = server.state().unwrap();
    assert!(state["cached_tokens"].as_u64().unwrap() >= 112, "{state}");
    let whole = json!({"messages": messages}).to_string();
    let (_, body) = server.ask("POST", "/v1/chat/completions", &whole).unwrap();
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() >= 1, "{answer}");
}

#[test]
fn a_model_that_is_still_being_loaded_is_not_ready() {
    let server = Server::start(&["tensor", "--load", "1h"]).unwrap();
    for (method, path) in [("POST", "/v2/models/sim/infer"), ("GET", "/v2/health/ready"), ("GET", "/health")]
    {
        let (head, _) = server.ask(method, path, &infer(1)).unwrap();
        assert!(head.starts_with("http/1.1 503"), "{path}: {head}");
    }
    let (head, _) = server.ask("GET", "/v2/health/live", "").unwrap();
    assert!(head.starts_with("http/1.1 200"), "{head}");
}

#[test]
fn what_it_does_not_understand_it_refuses() {
    let server = Server::start(&["tensor"]).unwrap();
    for (path, body, status) in [
        ("/v2/models/sim/infer", "{", "400"),
        ("/v2/models/sim/infer", r#"{"inputs": []}"#, "400"),
        ("/v2/models/other/infer", "{}", "404"),
        ("/v1/chat/completions", "{}", "404"),
    ] {
        let (head, answer) = server.ask("POST", path, body).unwrap();
        assert!(
            head.starts_with(&format!("http/1.1 {status}")) && answer.contains("error"),
            "{path}: {head}"
        );
    }
}
