//! `penstock-proxy drain`: asks the proxy of this pod to tell the mesh that it leaves.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;
use penstock_api::names::port;

use crate::loopback;

/// The proxy is beside us and answers at once, or is not there.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Args)]
pub(crate) struct Drain {
    /// The proxy's admin listener
    #[arg(long, value_name = "ADDR", default_value_t = loopback(port::ADMIN))]
    admin: SocketAddr,
}

/// Runs it.
pub(crate) fn run(options: &Drain) -> ExitCode {
    match ask(options.admin) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-proxy drain: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ask(admin: SocketAddr) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect_timeout(&admin, PATIENCE)
        .with_context(|| format!("no proxy at {admin} (--admin)"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request =
        format!("POST /drain HTTP/1.1\r\nhost: {admin}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("the proxy did not answer")?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{}", answer.lines().next().unwrap_or("an empty answer"));
    Ok(())
}
