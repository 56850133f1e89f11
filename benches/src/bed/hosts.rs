//! Two machines on a wire, as two pods are: network namespaces whose connections the rules of `penstock-proxy init`
//! bring to a proxy each.
//!
//! A namespace is a file that we hold open; the kernel takes it back, with its interfaces and rules, when we end. The bed
//! works on one thread, so going there is a matter of moving that thread ([`Hosts::enter`]): the sockets and processes that
//! it makes meanwhile belong there. It needs root, or a user namespace with more than one user (`unshare -Urn --map-auto`).

use std::fs::{self, File, Permissions};
use std::io::{BufRead as _, BufReader};
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use penstock_api::names::PROXY_UID;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The port that the client asks for; nobody listens there, the rules do the rest.
const APPLICATION: u16 = 8000;

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    /// Where the load comes from, with the proxy A.
    Client,
    /// Where the upstream is, with the proxy B.
    Server,
}

impl Host {
    /// Its address.
    fn ip(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, if self == Self::Client { 1 } else { 2 })
    }
}

/// Both.
#[derive(Debug)]
pub(crate) struct Hosts {
    client: File,
    server: File,
    home: File,
    /// Our proxy, where its user may read it.
    pub(crate) proxy: PathBuf,
}

/// This thread is elsewhere until this is dropped.
#[derive(Debug)]
pub(crate) struct Away<'a> {
    home: &'a File,
    /// It is this thread that has to go back.
    _here: PhantomData<*const ()>,
}

impl Drop for Away<'_> {
    fn drop(&mut self) {
        if let Err(error) = go(self.home) {
            // Whatever came next would be measured in the wrong place.
            eprintln!("cannot go back to the network namespace that this bench began in: {error}");
            std::process::exit(1);
        }
    }
}

fn go(namespace: &File) -> rustix::io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
}

impl Hosts {
    /// Where a client asks the other pod's application.
    pub(crate) fn front() -> SocketAddr {
        (Host::Server.ip(), APPLICATION).into()
    }

    /// Makes them, wires them, and lays the rules in both. `dir` is the bed's folder, in which the proxies' user reads its
    /// configuration.
    pub(crate) fn new(proxy: &Path, dir: &Path) -> Result<Self> {
        let home = File::open("/proc/thread-self/ns/net").context("our own network namespace")?;
        let (client, server) = (namespace()?, namespace()?);
        let own = dir.join("penstock-proxy");
        fs::copy(proxy, &own).with_context(|| format!("{}", proxy.display()))?;
        for path in [dir, &own] {
            fs::set_permissions(path, Permissions::from_mode(0o755))?;
        }
        let hosts = Self { client, server, home, proxy: own };
        {
            let _away = hosts.enter(Host::Client)?;
            let other =
                format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&hosts.server));
            shell(&format!("ip link add eth0 type veth peer name eth0 netns {other}"))?;
        }
        for host in [Host::Client, Host::Server] {
            let _away = hosts.enter(host)?;
            let ip = host.ip();
            shell(&format!("ip link set lo up && ip address add {ip}/24 dev eth0 && ip link set eth0 up"))?;
            let laid = Command::new(&hosts.proxy).arg("init").output()?;
            ensure!(laid.status.success(), "{}", String::from_utf8_lossy(&laid.stderr).trim());
        }
        Ok(hosts)
    }

    /// Has this thread be there.
    pub(crate) fn enter(&self, host: Host) -> Result<Away<'_>> {
        let to = if host == Host::Client { &self.client } else { &self.server };
        go(to).context("cannot enter a network namespace")?;
        Ok(Away { home: &self.home, _here: PhantomData })
    }

    /// Gives a file to the proxies' user: keys are not for everybody.
    pub(crate) fn hand_over(file: &Path) -> Result<()> {
        chown(file, Some(PROXY_UID), Some(PROXY_UID)).with_context(|| format!("{}", file.display()))
    }
}

/// A network namespace that lives as long as the file.
fn namespace() -> Result<File> {
    let mut child = Command::new("unshare")
        .args(["--net", "--", "sh", "-c", "echo made; exec sleep 60"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("unshare (util-linux)")?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut said)?;
    }
    let file = File::open(format!("/proc/{}/ns/net", child.id()));
    child.kill()?;
    child.wait()?;
    ensure!(
        said == "made\n",
        "no network namespace can be made here; it needs root, or `unshare -Urn --map-auto` around the bench"
    );
    file.context("a network namespace")
}

fn shell(line: &str) -> Result<()> {
    let done = Command::new("sh").args(["-c", line]).output()?;
    ensure!(done.status.success(), "{line}: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
}
