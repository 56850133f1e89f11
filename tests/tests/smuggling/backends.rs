//! Real servers that say what they understood: nginx, by its log and by what it passes on to a recorder of the test, and
//! Node.
//!
//! Both answer each request with `x-saw`: method, Host, target, length and SHA-256 of the body, as they read it.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, anywhere, wait_until};
use rustix::process::Signal;
use serde::Deserialize;
use tempfile::TempDir;

/// What a server took for one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Saw {
    pub(crate) method: String,
    pub(crate) host: String,
    pub(crate) target: String,
    pub(crate) length: usize,
    pub(crate) digest: String,
}

impl Saw {
    /// As it is written in `x-saw`.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let [method, host, target, length, digest] = text.split(' ').collect::<Vec<_>>().try_into().ok()?;
        Some(Self {
            method: method.to_owned(),
            host: unhex(host)?,
            target: unhex(target)?,
            length: length.parse().ok()?,
            digest: digest.to_owned(),
        })
    }
}

/// A line of a server's log.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Seen {
    /// 200: it was read whole and answered.
    pub(crate) status: u16,
    /// As the server names the request.
    pub(crate) line: String,
    pub(crate) host: String,
    /// Empty where it was not read whole.
    pub(crate) saw: String,
    /// The names of its trailers, where the server tells them.
    pub(crate) trailers: String,
    /// The connection that it came over.
    pub(crate) connection: String,
}

/// A running server.
pub(crate) struct Backend {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    process: Process,
    log: Option<std::path::PathBuf>,
    _recorder: Option<Origin>,
    _folder: TempDir,
}

impl Backend {
    /// nginx, in front of a recorder.
    pub(crate) async fn nginx(address: SocketAddr) -> Self {
        installed("nginx", "-v", "nginx-light");
        let recorder = recorder().await;
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("nginx.conf");
        std::fs::write(&config, nginx_config(address, recorder.address, folder.path())).unwrap();
        let errors = folder.path().join("errors.log");
        let args = ["-c".into(), config.into_os_string(), "-e".into(), errors.into_os_string()];
        let process = Process::start("nginx", Path::new("nginx"), &args, folder.path());
        let log = folder.path().join("seen.log");
        Self { name: "nginx", address, process, log: Some(log), _recorder: Some(recorder), _folder: folder }
            .ready()
            .await
    }

    /// Node.
    pub(crate) async fn node(address: SocketAddr) -> Self {
        installed("node", "--version", "nodejs");
        let folder = tempfile::tempdir().unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/smuggling/server.js");
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        let process = Process::start("node", Path::new("node"), &[script, &host, &port], folder.path());
        Self { name: "node", address, process, log: None, _recorder: None, _folder: folder }.ready().await
    }

    async fn ready(mut self) -> Self {
        let Self { name, address, process, .. } = &mut self;
        wait_until(&format!("{name} answers"), PATIENCE, async || {
            assert!(process.runs(), "{name} ended at once: {}", process.said());
            get(*address, "/ready").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        self
    }

    /// Ends it, and tells all that it has seen, in its order.
    pub(crate) async fn end(mut self) -> Vec<Seen> {
        match &self.log {
            Some(_) => self.process.signal(Signal::QUIT),
            None => self.process.terminate(),
        }
        self.process.ended(Duration::from_secs(20)).await;
        let log = match &self.log {
            Some(file) => String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned(),
            None => self.process.said(),
        };
        let seen =
            |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        log.lines().map(seen).collect()
    }
}

/// Panics with what to install where a program is missing.
fn installed(program: &str, asks: &str, package: &str) {
    let runs = Command::new(program).arg(asks).output();
    assert!(runs.is_ok(), "there is no {program} on this machine: apt-get install {package}");
}

/// Says of each request what nginx made of it.
async fn recorder() -> Origin {
    Origin::start_at(anywhere(), |mut client| async move {
        while let Ok(request) = client.request().await {
            let mut words = request.head.first.split(' ');
            let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let host = request.head.get("host").unwrap_or_default();
            let (length, digest) = (request.body.len(), sha256(&request.body));
            let said = format!("{method} {} {} {length} {digest}", hex(host), hex(target));
            let body = if method == "HEAD" { "" } else { "seen\n" };
            let answer = format!("HTTP/1.1 200 OK\r\nx-saw: {said}\r\ncontent-length: 5\r\n\r\n{body}");
            if client.send(answer).await.is_err() {
                return;
            }
        }
    })
    .await
}

fn nginx_config(address: SocketAddr, recorder: SocketAddr, folder: &Path) -> String {
    let folder = folder.display();
    // The worker must be able to write into the folder of the test, whoever runs it.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    format!(
        r#"{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
    log_format seen escape=json '{{"status":$status,"line":"$request","host":"$http_host",'
        '"saw":"$upstream_http_x_saw","trailers":"","connection":"$connection"}}';
    access_log {folder}/seen.log seen;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    client_max_body_size 0; client_body_buffer_size 256k; large_client_header_buffers 4 96k;
    keepalive_requests 1000000; keepalive_timeout 60s;
    upstream recorder {{ server {recorder}; keepalive 64; }}
    server {{
        listen {address};
        location / {{
            proxy_pass http://recorder;
            proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
            proxy_request_buffering on;
        }}
    }}
}}
"#
    )
}

/// In hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().unwrap();
    digits(suite.common.hash_provider.hash(bytes).as_ref())
}

fn hex(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { digits(text.as_bytes()) }
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<String> {
    if text == "-" {
        return Some(String::new());
    }
    let pairs =
        text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    Some(String::from_utf8_lossy(&pairs.collect::<Option<Vec<u8>>>()?).into_owned())
}
