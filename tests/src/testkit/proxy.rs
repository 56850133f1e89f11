//! `penstock-proxy` from a static file, alone or as two hops with mutual TLS between them.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tempfile::TempDir;

use super::certificates::{Authority, Leaf, spiffe};
use super::process::{Process, program};
use super::wire::{Wire, get};
use super::{PATIENCE, own_ip, wait_until};

const ADMIN: u16 = 15_000;
const FIRST_LISTENER: u16 = 9_000;

/// What a static file will say.
#[derive(Debug)]
pub struct Static {
    name: &'static str,
    ip: Ipv4Addr,
    identity: Option<(Leaf, String)>,
    listeners: String,
    count: u16,
    upstreams: String,
    args: Vec<String>,
    workers: usize,
}

impl Static {
    /// A proxy with a name for its log.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            ip: own_ip(),
            identity: None,
            listeners: String::new(),
            count: 0,
            upstreams: String::new(),
            args: Vec::new(),
            workers: 1,
        }
    }

    /// Its certificate, and whom it trusts.
    pub fn identity(mut self, leaf: &Leaf, anchors: &Authority) -> Self {
        self.identity = Some((leaf.clone(), anchors.pem.clone()));
        self
    }

    /// One more listener, `http` or `tcp`; `allow`: with TLS, for these accounts, or for all if there are none.
    pub fn listener(mut self, protocol: &str, allow: Option<&[&str]>, upstream: &str) -> Self {
        let address = SocketAddr::new(IpAddr::V4(self.ip), FIRST_LISTENER + self.count);
        self.count += 1;
        let tls = allow.map_or_else(String::new, |accounts| {
            let ids: Vec<_> = accounts.iter().map(|account| format!("{:?}", spiffe(account))).collect();
            format!(", tls: {{allow: [{}]}}", ids.join(", "))
        });
        let _ = writeln!(
            self.listeners,
            "  - {{name: listener-{}, address: \"{address}\", protocol: {protocol}{tls}, upstream: {upstream}}}",
            self.count
        );
        self
    }

    /// One more upstream; `account`: over mutual TLS, and it must prove to be that.
    pub fn upstream(
        mut self,
        name: &str,
        endpoints: &[SocketAddr],
        protocol: &str,
        account: Option<&str>,
    ) -> Self {
        let endpoints: Vec<_> = endpoints.iter().map(|endpoint| format!("\"{endpoint}\"")).collect();
        let tls = account
            .map_or_else(String::new, |account| format!(", tls: {{identity: \"{}\"}}", spiffe(account)));
        let _ = writeln!(
            self.upstreams,
            "  - {{name: {name}, endpoints: [{}], protocol: {protocol}{tls}}}",
            endpoints.join(", ")
        );
        self
    }

    /// More arguments on the command line.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// Starts it and waits until it is ready.
    pub async fn start(self) -> Proxy {
        let folder = tempfile::tempdir().unwrap();
        let ip = IpAddr::V4(self.ip);
        let mut yaml = format!("workers: {}\nadmin: {}:{ADMIN}\naccess_log: all\n", self.workers, self.ip);
        if let Some((leaf, anchors)) = &self.identity {
            yaml.push_str("identity: {certificate: leaf.pem, key: key.pem, anchors: anchors.pem}\n");
            for (file, text) in
                [("leaf.pem", &leaf.certificate), ("key.pem", &leaf.key), ("anchors.pem", anchors)]
            {
                std::fs::write(folder.path().join(file), text).unwrap();
            }
        }
        let _ = write!(yaml, "listeners:\n{}upstreams:\n{}", self.listeners, self.upstreams);
        let file = folder.path().join("proxy.yaml");
        std::fs::write(&file, yaml).unwrap();
        let mut args = vec!["run".to_owned(), "--static".to_owned(), file.to_str().unwrap().to_owned()];
        args.extend(self.args);
        let process = Process::start(self.name, &program("penstock-proxy"), &args, folder.path());
        let listeners = (0..self.count).map(|number| SocketAddr::new(ip, FIRST_LISTENER + number)).collect();
        let mut proxy = Proxy { process, admin: SocketAddr::new(ip, ADMIN), listeners, _folder: folder };
        proxy.is_ready().await;
        proxy
    }
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    /// Its process.
    pub process: Process,
    /// Its admin pages.
    pub admin: SocketAddr,
    /// Its listeners, in their order.
    pub listeners: Vec<SocketAddr>,
    _folder: TempDir,
}

impl Proxy {
    async fn is_ready(&mut self) {
        let (process, admin) = (&mut self.process, self.admin);
        wait_until("the proxy is ready", PATIENCE, async || {
            assert!(process.runs(), "the proxy ended at once: {}", process.said());
            get(admin, "/ready").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
    }

    /// Its first listener.
    pub fn front(&self) -> SocketAddr {
        self.listeners[0]
    }

    /// A connection to its first listener.
    pub async fn client(&self) -> Wire {
        Wire::connect(self.front()).await
    }

    /// An honest request is answered, and then nothing is in flight.
    pub async fn serves(&self) {
        let answer = self.client().await.ask("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!(answer.status(), 200, "{}", answer.text());
        self.is_quiet().await;
    }

    /// The sum of a metric over all its rows that contain each of `labels`.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        metric(self.admin, name, labels).await
    }

    /// Waits until no request is in flight.
    pub async fn is_quiet(&self) {
        wait_until("no request is in flight", PATIENCE, async || {
            self.metric("penstock_requests_in_flight", &[]).await == 0.0
        })
        .await;
    }

    /// Waits until a request ended for this reason, as the metric says it.
    pub async fn gave_reason(&self, reason: &str) {
        let label = format!("reason=\"{reason}\"");
        wait_until(&format!("the metric names {reason}"), PATIENCE, async || {
            self.metric("penstock_request_errors_total", &[&label]).await > 0.0
        })
        .await;
    }

    /// Waits until the log has these words.
    pub async fn logs(&self, words: &str) {
        wait_until(&format!("the log says {words:?}"), PATIENCE, async || {
            self.process.said().contains(words)
        })
        .await;
    }
}

/// The sum of a metric over all rows of a page that contain each of `labels`.
pub async fn metric(admin: SocketAddr, name: &str, labels: &[&str]) -> f64 {
    let page = get(admin, "/metrics").await.unwrap().text();
    let is_row = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    };
    page.lines().filter(is_row).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// Waits until counts that are told once a second have been told, and the page of them is a new one.
pub async fn counts_are_told() {
    tokio::time::sleep(Duration::from_millis(2200)).await;
}

/// Two proxies: the client's, plain on the client's side, and the server's, with mutual TLS between them.
#[derive(Debug)]
pub struct TwoHops {
    /// The client's.
    pub outbound: Proxy,
    /// The server's.
    pub inbound: Proxy,
}

impl TwoHops {
    /// To an origin, `http` or `tcp`.
    pub async fn start(origin: SocketAddr, protocol: &str) -> Self {
        let authority = Authority::default();
        let same = if protocol == "tcp" { "tcp" } else { "same" };
        let inbound = Static::new("server-proxy")
            .identity(&authority.leaf("server"), &authority)
            .listener(protocol, Some(&["client"]), "application")
            .upstream("application", &[origin], same, None)
            .start()
            .await;
        let outbound = Static::new("client-proxy")
            .identity(&authority.leaf("client"), &authority)
            .listener(protocol, None, "server")
            .upstream("server", &[inbound.front()], same, Some("server"))
            .start()
            .await;
        Self { outbound, inbound }
    }

    /// A connection of the client.
    pub async fn client(&self) -> Wire {
        self.outbound.client().await
    }

    /// Waits until no request is in flight at either.
    pub async fn is_quiet(&self) {
        self.outbound.is_quiet().await;
        self.inbound.is_quiet().await;
    }
}

/// One proxy between the client and an origin, without TLS.
pub async fn one_hop(origin: SocketAddr, protocol: &str) -> Proxy {
    let same = if protocol == "tcp" { "tcp" } else { "same" };
    Static::new("proxy")
        .listener(protocol, None, "application")
        .upstream("application", &[origin], same, None)
        .start()
        .await
}
