//! What is measured: a subject turns a [`Role`] (where to listen, whether to ask for a certificate, what to speak
//! to whom) into a configuration file and the command that serves it. All of them are bare forwarders: no access
//! log, no tracing, no discovery.

mod envoy;
mod haproxy;
mod nginx;
mod penstock;

use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use penstock_api::names::{PROXY_UID, port};

use crate::bed::hosts::{Host, Hosts};
use crate::case::{Case, Shape};
use crate::load::{Protocol, Purpose};
use crate::process::{self, Process};
use crate::upstream::Addresses;

/// A proxy, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Subject {
    /// Ours.
    Penstock,
    /// Ours as in `mesh-mtls`, with nothing redirected: what `redirected` is compared with.
    Loopback,
    /// Envoy, the baseline.
    Envoy,
    /// HAProxy.
    Haproxy,
    /// nginx.
    Nginx,
    /// No proxy: what the load generator and the upstream can do on their core.
    Direct,
}

/// All subjects.
pub(crate) const SUBJECTS: [Subject; 6] =
    [Subject::Penstock, Subject::Loopback, Subject::Envoy, Subject::Haproxy, Subject::Nginx, Subject::Direct];

/// Connections that a proxy has room for, where it must be told.
const CLIENTS: usize = 4096;
/// As many more than a case has as are enough for those to the upstream.
const SPARE: usize = 1024;

/// The subject that ratios refer to.
pub(crate) const BASELINE: Subject = Subject::Envoy;

/// The binaries of the subjects.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) penstock: PathBuf,
    pub(crate) envoy: PathBuf,
    pub(crate) haproxy: PathBuf,
    pub(crate) nginx: PathBuf,
}

/// One proxy process.
#[derive(Clone, Copy)]
pub(crate) struct Role<'a> {
    /// `a` or `b`: whose certificate it has.
    name: &'static str,
    listen: SocketAddr,
    /// In which network namespace, if not in ours.
    host: Option<Host>,
    /// Serve TLS 1.3 and require a client certificate, that of this leaf.
    admits: Option<&'static str>,
    /// The HTTP version that its clients speak.
    client: Protocol,
    next: Next,
    /// Bytes are passed as they come.
    bytes: bool,
    /// Answers come in small pieces, none of which should wait for the next.
    trickles: bool,
    /// Connections that clients may have.
    clients: usize,
    /// Where certificates are and files may be written.
    dir: &'a Path,
}

/// Where a proxy sends requests.
#[derive(Clone, Copy)]
enum Next {
    /// To the upstream, in plaintext.
    Upstream { address: SocketAddr, speak: Protocol },
    /// To the proxy of this leaf, in mutual TLS.
    Proxy { address: SocketAddr, leaf: &'static str },
}

impl Role<'_> {
    /// A file of this proxy.
    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{}.{name}", self.name))
    }

    /// The path of a file with certificates or a key, as text for a configuration.
    fn pem(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }

    fn next(&self) -> SocketAddr {
        match self.next {
            Next::Upstream { address, .. } | Next::Proxy { address, .. } => address,
        }
    }
}

/// The running processes of a subject in a case.
pub(crate) struct Running {
    /// None if there is no proxy; A and B in a mesh.
    pub(crate) processes: Vec<Process>,
    /// Where the client connects.
    pub(crate) front: SocketAddr,
    /// The listener that must ask for a certificate.
    pub(crate) guarded: Option<SocketAddr>,
}

impl Running {
    /// Ends all of them and waits until they are gone.
    pub(crate) async fn stop(self) {
        for process in self.processes {
            process.stop().await;
        }
    }

    /// Fails if one of them has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.processes.iter_mut().try_for_each(Process::check)
    }

    /// What happened, and what they said last.
    pub(crate) fn story(&self, what: &str) -> anyhow::Error {
        if self.processes.is_empty() {
            return anyhow::anyhow!("without a proxy it {what}");
        }
        let told = self.processes.iter().map(|process| format!("{:#}", process.story(what)));
        anyhow::anyhow!("{}", told.collect::<Vec<_>>().join("; "))
    }
}

impl Subject {
    /// As rows name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Penstock => "penstock",
            Self::Loopback => "loopback",
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Direct => "direct",
        }
    }

    /// Whether the case makes sense for it: without a proxy there is nobody to ask for certificates, to rest or to keep
    /// connections. Bytes are compared with HAProxy alone, since the others do not splice, and redirection and starts with
    /// ourselves.
    pub(crate) fn takes_part(self, case: &Case) -> bool {
        match case.shape {
            Shape::Start => self == Self::Penstock,
            Shape::Redirected => matches!(self, Self::Penstock | Self::Loopback),
            _ if self == Self::Loopback => false,
            Shape::Bytes => matches!(self, Self::Penstock | Self::Haproxy | Self::Direct),
            shape => {
                self != Self::Direct
                    || (shape == Shape::Plain && !case.at_rest() && case.purpose != Purpose::Idle)
            }
        }
    }

    /// Starts what the case needs, on `core`.
    pub(crate) fn start(
        self,
        case: &Case,
        programs: &Programs,
        upstream: Addresses,
        dir: &Path,
        core: usize,
        hosts: Option<&Hosts>,
    ) -> Result<Running> {
        let upstream = match case.upstream {
            Protocol::H1 => Next::Upstream { address: upstream.h1, speak: Protocol::H1 },
            Protocol::H2 => Next::Upstream { address: upstream.h2, speak: Protocol::H2 },
        };
        let (front, inner) = (free_port()?, free_port()?);
        let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let bytes = case.shape == Shape::Bytes;
        let single = Role {
            name: "b",
            listen: local(front),
            host: None,
            admits: None,
            client: case.client,
            next: upstream,
            bytes,
            trickles: case.purpose == Purpose::Tokens,
            clients: CLIENTS.max(case.connections + SPARE),
            dir,
        };
        if self == Self::Direct {
            return Ok(Running { processes: Vec::new(), front: single.next(), guarded: None });
        }
        if let (Shape::Redirected, Self::Penstock) = (case.shape, self) {
            let hosts = hosts.context("the network namespaces are not there")?;
            return self.start_redirected(single, programs, core, hosts);
        }
        let (roles, guarded) = match case.shape {
            Shape::Start => anyhow::bail!("starts are measured by themselves"),
            Shape::Plain | Shape::Bytes => (vec![single], None),
            Shape::Tls => (vec![Role { admits: Some("client"), ..single }], Some(local(front))),
            Shape::Mesh | Shape::Redirected => {
                let next = Next::Proxy { address: local(inner), leaf: "b" };
                let a = Role { name: "a", next, ..single };
                let b = Role { listen: local(inner), admits: Some("a"), client: self.between(), ..single };
                (vec![b, a], Some(local(inner)))
            }
        };
        let processes =
            roles.iter().map(|role| self.serve(role, programs, core, None)).collect::<Result<_>>()?;
        Ok(Running { processes, front: local(front), guarded })
    }

    /// A and B of a mesh, each where `penstock-proxy init` sends its pod's connections. The client asks for an address at
    /// which nobody listens, and so does A: if either's rules did not work, there would be no answer.
    fn start_redirected(
        self,
        single: Role<'_>,
        programs: &Programs,
        core: usize,
        hosts: &Hosts,
    ) -> Result<Running> {
        let a = Role {
            name: "a",
            listen: (Ipv4Addr::LOCALHOST, port::OUTBOUND).into(),
            host: Some(Host::Client),
            next: Next::Proxy { address: Hosts::front(), leaf: "b" },
            ..single
        };
        let b = Role {
            listen: (Ipv4Addr::UNSPECIFIED, port::INBOUND).into(),
            host: Some(Host::Server),
            admits: Some("a"),
            client: self.between(),
            ..single
        };
        for leaf in ["a.pem", "a.key", "b.pem", "b.key", "ca.pem"] {
            Hosts::hand_over(&single.dir.join(leaf))?;
        }
        let processes =
            [b, a].iter().map(|role| self.serve(role, programs, core, Some(hosts))).collect::<Result<_>>()?;
        let guarded = Some((Ipv4Addr::LOCALHOST, port::INBOUND).into());
        Ok(Running { processes, front: Hosts::front(), guarded })
    }

    /// What its two proxies speak in a mesh.
    pub(crate) fn between(self) -> Protocol {
        if self == Self::Nginx { Protocol::H1 } else { Protocol::H2 }
    }

    fn serve(
        self,
        role: &Role<'_>,
        programs: &Programs,
        core: usize,
        hosts: Option<&Hosts>,
    ) -> Result<Process> {
        let (program, file, config, args) = match self {
            Self::Penstock | Self::Loopback => {
                (&programs.penstock, "penstock.yaml", penstock::config(role), &["run", "--static"][..])
            }
            Self::Envoy => (
                &programs.envoy,
                "envoy.yaml",
                envoy::config(role),
                &["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c"][..],
            ),
            Self::Haproxy => (&programs.haproxy, "haproxy.cfg", haproxy::config(role), &["-db", "-f"][..]),
            Self::Nginx => (&programs.nginx, "nginx.conf", nginx::config(role), &["-c"][..]),
            Self::Direct => anyhow::bail!("there is no proxy to start"),
        };
        let file = role.file(file);
        fs::write(&file, config).with_context(|| format!("{}", file.display()))?;
        let args: Vec<OsString> = args.iter().map(OsString::from).chain([file.into()]).collect();
        let name = format!("{}-{}", self.name(), role.name);
        let (Some(hosts), Some(host)) = (hosts, role.host) else {
            return process::spawn(Some(core), &name, program, &args, role.dir, false);
        };
        Hosts::hand_over(&role.file("penstock.yaml"))?;
        let _away = hosts.enter(host)?;
        process::spawn_as(Some(PROXY_UID), Some(core), &name, &hosts.proxy, &args, role.dir, false)
    }
}

/// A port that was free a moment ago: most of the peers cannot say which one the kernel gave them.
pub(crate) fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port on loopback is free")?;
    Ok(listener.local_addr()?.port())
}
