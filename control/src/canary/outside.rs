//! Whom control asks for a Canary: whoever writes one names any URL, and control stands where he may not.
//!
//! In: the URL of a query or a webhook. Out: a connection, or why there is none. What is judged is the very address that is connected to, after the
//! name was resolved, so a name that leads elsewhere a moment later leads nowhere. Never asked is what listens for its own machine or link alone,
//! control, and in a cluster the API server; the rest an operator narrows or widens (`--analysis-to`). An answer that leads elsewhere is an answer:
//! no redirect is followed, and no proxy of the environment is asked.
//!
//! Can go wrong: a name is not found, an address is not let, nobody listens there. Each is said in words that the author of the Canary reads.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::Result;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::Uri;
use http_body_util::Full;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_api::annotation::Subnet;
use penstock_api::names::SYSTEM_NAMESPACE;
use penstock_api::service::is_label;
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::watch;
use tower::Service;

use crate::compile::SERVICE_NAME;
use crate::objects::{Body, ObjectSet};

/// What asks.
pub(super) type Http = Client<HttpsConnector<Outside>, Full<Bytes>>;

/// Services whose addresses are not for a Canary's author: they trust whom they know, and control's way to them is open.
const KEEPERS: [(&str, &str); 2] = [("default", "kubernetes"), (SYSTEM_NAMESPACE, "penstock-control")];

const NOWHERE: &str = "no address of anybody";
const LOOPBACK: &str = "an address of loopback, where whoever listens trusts the whole machine";
const LINK: &str = "an address of the link, where clouds hand out credentials";
const CLOUD: &str = "an address at which a cloud hands out credentials";
const MANY: &str = "an address of a group (multicast)";

/// Where control asks nothing unless `--analysis-to` names such addresses alone. Of two that overlap the first counts.
const FORBIDDEN: [(IpAddr, u8, &str); 16] = [
    (v4(127, 0, 0, 0), 8, LOOPBACK),
    (v6([0, 0, 0, 0, 0, 0, 0, 1]), 128, LOOPBACK),
    // Linux takes 0.0.0.0 for loopback.
    (v4(0, 0, 0, 0), 8, NOWHERE),
    // With it the forms of IPv4 addresses that RFC 4291 has given up.
    (v6([0; 8]), 96, NOWHERE),
    (v4(169, 254, 0, 0), 16, LINK),
    (v6([0xfe80, 0, 0, 0, 0, 0, 0, 0]), 10, LINK),
    // What clouds have put elsewhere: AWS and Google over IPv6, Alibaba, Oracle's older one, Azure's host.
    (v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0]), 32, CLOUD),
    (v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0]), 32, CLOUD),
    (v4(100, 100, 100, 200), 32, CLOUD),
    (v4(192, 0, 0, 192), 32, CLOUD),
    (v4(168, 63, 129, 16), 32, CLOUD),
    (v4(224, 0, 0, 0), 4, MANY),
    (v6([0xff00, 0, 0, 0, 0, 0, 0, 0]), 8, MANY),
    (v4(255, 255, 255, 255), 32, MANY),
    // To a router of the machine itself: what it makes of it nobody here can know.
    (v6([0x2002, 0, 0, 0, 0, 0, 0, 0]), 16, NOWHERE),
    (v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0]), 48, NOWHERE),
];

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(segments: [u16; 8]) -> IpAddr {
    let [a, b, c, d, e, f, g, h] = segments;
    IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h))
}

/// Who may be asked: one of what `--analysis-to` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// `prometheus.monitoring.svc`: the host of this name.
    Host(String),
    /// `*.monitoring.svc`: hosts below `monitoring.svc`.
    Below(String),
    /// `10.0.0.0/8`, or one address: whoever has it.
    Subnet(Subnet),
}

impl FromStr for To {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.trim().trim_end_matches('.').to_ascii_lowercase();
        if let Ok(subnet) = name.parse() {
            return Ok(Self::Subnet(subnet));
        }
        let below = name.strip_prefix("*.");
        if !below.unwrap_or(&name).split('.').all(is_label) {
            return Err(format!(
                "{text:?} is nobody; write a host as prometheus.monitoring.svc, all hosts below a name as *.monitoring.svc, \
                 or addresses as 10.0.0.0/8"
            ));
        }
        Ok(match below {
            Some(parent) => Self::Below(parent.to_owned()),
            None => Self::Host(name),
        })
    }
}

impl To {
    fn names(&self, host: &str) -> bool {
        match self {
            Self::Host(name) => host == name,
            Self::Below(parent) => host.strip_suffix(parent.as_str()).is_some_and(|rest| rest.ends_with('.')),
            Self::Subnet(_) => false,
        }
    }

    fn has(&self, address: IpAddr) -> bool {
        matches!(self, Self::Subnet(subnet) if subnet.contains(address))
    }

    /// Whether it names addresses of `kind` and no others.
    fn is_within(&self, kind: &Subnet) -> bool {
        matches!(self, Self::Subnet(subnet) if subnet.bits() >= kind.bits() && kind.contains(subnet.address()))
    }
}

/// The way outside.
#[derive(Clone, Debug)]
pub struct Outside {
    /// Nothing: whoever is not forbidden.
    to: Arc<[To]>,
    /// Where control itself listens.
    own: Arc<[SocketAddr]>,
    cluster: Option<Around>,
}

/// The cluster that control is in, or beside.
#[derive(Clone, Debug)]
pub struct Around {
    /// Its objects.
    pub objects: watch::Receiver<Arc<ObjectSet>>,
    /// The host of its API server, as control finds it.
    pub api_server: Option<String>,
}

/// Whose an address is.
#[derive(Clone, Copy, Debug, Default)]
struct Whose {
    /// Of the machine, or the pod, that control runs on.
    ours: bool,
    /// Where control listens.
    listens: bool,
    /// Of the API server, or of control's Service.
    keeper: bool,
}

impl Outside {
    /// The way to what `to` names; empty, to everybody but those that are forbidden. `own`: where control itself listens. `cluster`: `None` on one
    /// machine, whose directory says what runs beside control; there loopback is no secret.
    pub fn new(to: Vec<To>, own: &[SocketAddr], cluster: Option<Around>) -> Self {
        Self { to: to.into(), own: own.into(), cluster }
    }

    /// A client that goes this way alone, over HTTP, and over HTTPS with the authorities that the machine trusts (or `SSL_CERT_FILE` names).
    pub(super) fn client(self) -> Result<Http> {
        let tls = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?;
        // Without authorities HTTPS fails by itself, and says why.
        let trusting = tls.clone().with_native_roots();
        let tls = trusting.unwrap_or_else(|_| tls.with_root_certificates(RootCertStore::empty()));
        Ok(self.client_with(tls.with_no_client_auth()))
    }

    /// The same, over HTTPS as `tls` says.
    pub(super) fn client_with(self, tls: ClientConfig) -> Http {
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        Client::builder(TokioExecutor::new()).build(connector.wrap_connector(self))
    }

    async fn connect(&self, uri: &Uri) -> Result<TcpStream, String> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let found =
            lookup_host((host, port)).await.map_err(|error| format!("{host} is not found: {error}"))?;
        let keepers = self.keepers().await;
        let (mut allowed, mut refused) = (Vec::new(), None);
        for address in found {
            let ip = meant(address.ip());
            let ours = of_this_machine(ip);
            let listens = |own: &SocketAddr| {
                own.port() == port
                    && (own.ip() == ip || (own.ip().is_unspecified() && (ours || ip.is_loopback())))
            };
            let whose = Whose { ours, listens: self.own.iter().any(listens), keeper: keepers.contains(&ip) };
            match self.judge(host, ip, whose) {
                Ok(()) => allowed.push(address),
                Err(why) => refused = Some(why),
            }
        }
        if allowed.is_empty() {
            return Err(refused.unwrap_or_else(|| format!("{host} has no address")));
        }
        TcpStream::connect(&*allowed).await.map_err(|error| format!("{host}: {error}"))
    }

    /// Whether control may ask a host at one of its addresses.
    fn judge(&self, host: &str, ip: IpAddr, whose: Whose) -> Result<(), String> {
        let at = if host.parse() == Ok(ip) { host.to_owned() } else { format!("{host} ({ip})") };
        if whose.listens {
            return Err(format!(
                "{at} is where control itself listens, which no check asks; name somebody else"
            ));
        }
        if let Some((kind, what)) = self.forbidden(ip, whose)
            && !self.to.iter().any(|to| to.is_within(&kind) && to.has(ip))
        {
            return Err(format!(
                "{at} is {what}, and not asked; name a server that others reach too, or have the operator of control \
                 allow it with --analysis-to"
            ));
        }
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        if self.to.is_empty() || self.to.iter().any(|to| to.names(&host) || to.has(ip)) {
            return Ok(());
        }
        Err(format!(
            "{at} is not among those that the operator of control lets checks ask; have it added to --analysis-to"
        ))
    }

    /// What speaks against an address, and with which others it shares that.
    fn forbidden(&self, ip: IpAddr, whose: Whose) -> Option<(Subnet, &'static str)> {
        let one_machine = self.cluster.is_none();
        let mut kinds = FORBIDDEN
            .into_iter()
            .filter_map(|(first, bits, what)| Some((Subnet::around(first, bits)?, what)));
        match kinds.find(|(kind, _)| kind.contains(ip)) {
            Some((_, LOOPBACK)) if one_machine => return None,
            None => {}
            found => return found,
        }
        let what = match whose {
            Whose { keeper: true, .. } => "an address of the API server or of control",
            Whose { ours: true, .. } if !one_machine => "an address of the machine that control runs on",
            _ => return None,
        };
        Some((Subnet::around(ip, if ip.is_ipv4() { 32 } else { 128 })?, what))
    }

    /// Addresses of the API server and of control's replicas.
    async fn keepers(&self) -> BTreeSet<IpAddr> {
        let Some(Around { objects, api_server }) = &self.cluster else { return BTreeSet::new() };
        let objects = objects.borrow().clone();
        let mut all = addresses(&objects);
        if let Some(host) = api_server
            && let Ok(found) = lookup_host((host.as_str(), 443)).await
        {
            all.extend(found.map(|address| meant(address.ip())));
        }
        all
    }
}

impl Service<Uri> for Outside {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let outside = self.clone();
        async move { outside.connect(&uri).await.map(TokioIo::new).map_err(io::Error::other) }.boxed()
    }
}

/// The address that an address leads to: IPv4 has several forms in IPv6 (mapped, and RFC 6052's, for which networks of IPv6 alone have a gateway).
fn meant(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) if ip.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0] => {
            IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() as u32))
        }
        ip => ip,
    }
}

/// Whether an address is one of this machine's: then the way to it begins where it ends. Nothing is sent.
fn of_this_machine(ip: IpAddr) -> bool {
    let anywhere: IpAddr =
        if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let way = UdpSocket::bind((anywhere, 0)).and_then(|socket| {
        // Some port: nobody is asked.
        socket.connect((ip, 9))?;
        socket.local_addr()
    });
    way.is_ok_and(|from| from.ip() == ip)
}

/// The addresses of the Services that are [`KEEPERS`], and of the pods and machines behind them.
fn addresses(objects: &ObjectSet) -> BTreeSet<IpAddr> {
    let mut all: Vec<&str> = Vec::new();
    for object in &objects.objects {
        let named = |name: &str| KEEPERS.contains(&(object.id.namespace.as_str(), name));
        match &object.body {
            Body::Service(service) if named(&object.id.name) => {
                let Some(spec) = &service.spec else { continue };
                all.extend(spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip).map(String::as_str));
            }
            Body::EndpointSlice(slice) => {
                let labels = slice.metadata.labels.as_ref();
                if labels.and_then(|labels| labels.get(SERVICE_NAME)).is_some_and(|name| named(name)) {
                    all.extend(slice.endpoints.iter().flat_map(|one| &one.addresses).map(String::as_str));
                }
            }
            _ => {}
        }
    }
    all.into_iter().filter_map(|text| text.parse().ok()).map(meant).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::objects::decode;

    const LISTENS: &str = "10.1.1.1:8080";

    fn to(text: &str) -> Vec<To> {
        text.split(',').filter(|one| !one.is_empty()).map(|one| one.parse().unwrap()).collect()
    }

    fn on_one_machine(allowed: &str) -> Outside {
        Outside::new(to(allowed), &[LISTENS.parse().unwrap()], None)
    }

    fn in_a_cluster(allowed: &str) -> Outside {
        let (_, objects) = watch::channel(Arc::default());
        let around = Around { objects, api_server: None };
        Outside::new(to(allowed), &[LISTENS.parse().unwrap()], Some(around))
    }

    fn judged(outside: &Outside, host: &str, ip: &str) -> Result<(), String> {
        outside.judge(host, meant(ip.parse().unwrap()), Whose::default())
    }

    #[test]
    fn an_operator_names_hosts_and_addresses() {
        let of = |text: &str| text.parse::<To>();
        assert_eq!(of("Prometheus.monitoring.svc."), Ok(To::Host("prometheus.monitoring.svc".to_owned())));
        assert_eq!(of(" *.monitoring.svc"), Ok(To::Below("monitoring.svc".to_owned())));
        assert_eq!(of("10.0.0.0/8"), Ok(To::Subnet("10.0.0.0/8".parse().unwrap())));
        assert_eq!(of("fd00::1"), Ok(To::Subnet("fd00::1".parse().unwrap())));
        for wrong in ["", "*", "*.", "a.*.b", "10.0.0.0/33", "http://gate", "gate:80", "a b", "a..b"] {
            let why = of(wrong).unwrap_err();
            assert!(why.contains("*.monitoring.svc") && why.contains("10.0.0.0/8"), "{wrong}: {why}");
        }
    }

    #[test]
    fn what_is_for_one_machine_or_its_link_is_asked_by_nobody_else() {
        let table = [
            ("127.0.0.1", LOOPBACK),
            ("127.255.0.9", LOOPBACK),
            ("::1", LOOPBACK),
            ("::ffff:127.0.0.1", LOOPBACK),
            ("64:ff9b::127.0.0.1", LOOPBACK),
            ("0.0.0.0", NOWHERE),
            ("0.0.0.1", NOWHERE),
            ("::", NOWHERE),
            ("::ffff:0.0.0.0", NOWHERE),
            ("::127.0.0.1", NOWHERE),
            ("2002:7f00:1::", NOWHERE),
            ("64:ff9b:1::7f00:1", NOWHERE),
            ("169.254.169.254", LINK),
            ("169.254.170.2", LINK),
            ("::ffff:169.254.169.254", LINK),
            ("64:ff9b::a9fe:a9fe", LINK),
            ("fe80::1", LINK),
            ("febf::1", LINK),
            ("fd00:ec2::254", CLOUD),
            ("fd00:ec2::23", CLOUD),
            ("fd20:ce::254", CLOUD),
            ("100.100.100.200", CLOUD),
            ("192.0.0.192", CLOUD),
            ("168.63.129.16", CLOUD),
            ("224.0.0.1", MANY),
            ("239.255.255.255", MANY),
            ("::ffff:224.0.0.1", MANY),
            ("ff02::1", MANY),
            ("255.255.255.255", MANY),
        ];
        for (ip, what) in table {
            let why = judged(&in_a_cluster(""), "gate.test", ip).expect_err(ip);
            assert!(
                why.contains(what) && why.contains("gate.test (") && why.contains("--analysis-to"),
                "{ip}: {why}"
            );
            // A name that the operator allows leads there no more than another.
            assert!(judged(&in_a_cluster("gate.test,0.0.0.0/0,::/0"), "gate.test", ip).is_err(), "{ip}");
            assert_eq!(judged(&on_one_machine(""), "gate.test", ip).is_ok(), what == LOOPBACK, "{ip}");
        }
        for ip in
            ["10.96.0.10", "172.16.3.4", "192.168.1.1", "100.64.0.1", "8.8.8.8", "fd12::1", "2001:db8::1"]
        {
            assert_eq!(judged(&in_a_cluster(""), "gate.test", ip), Ok(()), "{ip}");
        }
    }

    #[test]
    fn an_operator_opens_what_is_forbidden_by_its_addresses_alone() {
        for (allowed, ip, opens) in [
            ("127.0.0.0/8", "127.0.0.1", true),
            ("127.0.0.0/8", "::ffff:127.0.0.1", true),
            ("127.0.0.2", "127.0.0.1", false),
            ("126.0.0.0/7", "127.0.0.1", false),
            ("::1", "::1", true),
            ("169.254.20.10", "169.254.20.10", true),
            ("169.254.20.10", "169.254.169.254", false),
            ("169.0.0.0/8", "169.254.20.10", false),
        ] {
            assert_eq!(judged(&in_a_cluster(allowed), "gate.test", ip).is_ok(), opens, "{allowed}: {ip}");
        }
        let whose = |outside: &Outside, whose| outside.judge("gate.test", v4(10, 1, 1, 1), whose);
        let (keeper, ours) =
            (Whose { keeper: true, ..Whose::default() }, Whose { ours: true, ..Whose::default() });
        for one in [keeper, ours] {
            assert!(whose(&in_a_cluster(""), one).is_err());
            assert!(whose(&in_a_cluster("10.0.0.0/8"), one).is_err());
            assert_eq!(whose(&in_a_cluster("10.1.1.1"), one), Ok(()));
        }
        assert_eq!(whose(&on_one_machine(""), ours), Ok(()));
        let listens = Whose { listens: true, ours: true, keeper: false };
        for outside in [on_one_machine(""), on_one_machine("10.1.1.1"), in_a_cluster("10.1.1.1")] {
            let why = whose(&outside, listens).unwrap_err();
            assert!(why.contains("where control itself listens"), "{why}");
        }
    }

    #[test]
    fn an_operator_who_names_some_forbids_all_others() {
        let allowed = "prometheus.test,*.monitoring.svc,10.2.0.0/16";
        for (host, ip, good) in [
            ("prometheus.test", "10.1.0.1", true),
            ("Prometheus.Test.", "10.1.0.1", true),
            ("a.monitoring.svc", "10.1.0.1", true),
            ("a.b.monitoring.svc", "10.1.0.1", true),
            ("monitoring.svc", "10.1.0.1", false),
            ("evilmonitoring.svc", "10.1.0.1", false),
            ("a.monitoring.svc.evil.test", "10.1.0.1", false),
            ("x.prometheus.test", "10.1.0.1", false),
            ("other.test", "10.2.3.4", true),
            ("10.2.3.4", "10.2.3.4", true),
            ("10.1.0.1", "10.1.0.1", false),
            // On one machine too: who wants loopback names it.
            ("localhost", "127.0.0.1", false),
        ] {
            for outside in [in_a_cluster(allowed), on_one_machine(allowed)] {
                assert_eq!(judged(&outside, host, ip).is_ok(), good, "{host} {ip}: {outside:?}");
            }
        }
        let why = judged(&in_a_cluster(allowed), "other.test", "10.1.0.1").unwrap_err();
        assert!(why.contains("other.test (10.1.0.1) is not among those"), "{why}");
        assert_eq!(judged(&on_one_machine("localhost"), "localhost", "127.0.0.1"), Ok(()));
    }

    #[test]
    fn the_machine_knows_its_own_addresses() {
        assert!(of_this_machine(v4(127, 0, 0, 1)));
        assert!(!of_this_machine(v4(192, 0, 2, 1)), "TEST-NET-1 is nobody's");
        // Where there is a network at all.
        let way = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
            socket.connect("192.0.2.1:9")?;
            socket.local_addr()
        });
        if let Ok(own) = way {
            assert!(of_this_machine(own.ip()), "{own}");
        }
    }

    #[tokio::test]
    async fn the_api_server_and_control_are_known_by_the_objects_of_the_cluster() {
        let service = |space: &str, name: &str, ip: &str| {
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": space, "name": name},
                "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 443}]}})
        };
        let slice = |space: &str, of: &str, ip: &str| {
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"namespace": space, "name": of, "labels": {"kubernetes.io/service-name": of}},
                "endpoints": [{"addresses": [ip]}], "ports": [{"port": 6443}]})
        };
        let all = [
            service("default", "kubernetes", "10.96.0.1"),
            slice("default", "kubernetes", "10.9.0.1"),
            service(SYSTEM_NAMESPACE, "penstock-control", "10.96.0.2"),
            slice(SYSTEM_NAMESPACE, "penstock-control", "10.9.0.2"),
            service("team-a", "kubernetes", "10.96.0.3"),
            slice("team-a", "penstock-control", "10.9.0.3"),
        ];
        let text: Vec<String> = all.iter().map(ToString::to_string).collect();
        let set = decode::file(&"a.yaml".into(), &text.join("\n---\n"));
        assert!(set.broken.is_empty(), "{:?}", set.broken);
        let (_keeps, objects) = watch::channel(Arc::new(set));
        let around = Around { objects, api_server: Some("10.8.0.1".to_owned()) };
        let outside = Outside::new(Vec::new(), &[], Some(around));
        let known: Vec<String> = outside.keepers().await.iter().map(ToString::to_string).collect();
        assert_eq!(known, ["10.8.0.1", "10.9.0.1", "10.9.0.2", "10.96.0.1", "10.96.0.2"]);
        let why = outside.connect(&Uri::from_static("http://10.96.0.1:443/")).await.unwrap_err();
        assert!(why.contains("of the API server"), "{why}");
    }

    #[tokio::test]
    async fn what_counts_is_the_address_that_a_name_or_another_spelling_leads_to() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let uri = |host: &str| format!("http://{host}:{}/", address.port()).parse::<Uri>().unwrap();
        let (machine, cluster) = (on_one_machine(""), in_a_cluster(""));
        for host in [
            "localhost",
            "127.0.0.1",
            "[::ffff:127.0.0.1]",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
        ] {
            machine.connect(&uri(host)).await.unwrap_or_else(|why| panic!("{host}: {why}"));
            let why = cluster.connect(&uri(host)).await.unwrap_err();
            assert!(why.contains("loopback"), "{host}: {why}");
        }
        let why = machine.connect(&uri("nobody.invalid")).await.unwrap_err();
        assert!(why.contains("nobody.invalid is not found"), "{why}");
        for own in [address, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port())] {
            let control = Outside::new(to("127.0.0.1"), &[own], None);
            let why = control.connect(&uri("127.0.0.1")).await.unwrap_err();
            assert!(why.contains("where control itself listens"), "{own}: {why}");
        }
    }
}
