//! Stock clients that know nothing of Penstock read our load reports and shift load by them: gRPC's `weighted_round_robin`
//! (gRFC A58), and Envoy's `client_side_weighted_round_robin`.
//!
//! Two servers, one four times as fast as the other, stand behind inbound sidecars; the clients come with certificates of
//! their own. Both policies weigh a server by its requests a second over its `application_utilization`, which is what it could do, so
//! the fast one must get about 80 %; a client that does not read the reports, or finds no utilization in them, gives each
//! one half.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use penstock_inference::orca::pb::OrcaLoadReport;
use penstock_inference::orca::service::{self, OrcaLoadReportRequest};
use penstock_proxy::oob;
use penstock_tests::testkit::certificates::{Authority, Leaf, spiffe};
use penstock_tests::testkit::gpu::SimulatedGpu;
use penstock_tests::testkit::load::Load;
use penstock_tests::testkit::peers::{listens, peers, script};
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::proxy::{Proxy, Static};
use penstock_tests::testkit::{PATIENCE, own_ip, wait_until};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};
use tower::service_fn;

/// What a request takes. Together they can do 312 requests a second, alone the slow one 62.
const FAST: Duration = Duration::from_millis(4);
const SLOW: Duration = Duration::from_millis(16);
/// Requests a second: an equal split would be more than the slow one can do.
const RATE: u32 = 150;
/// The fast one's share is 80 % when the weights are right; what is measured on a busy machine is near that.
const SHIFTED: f64 = 0.68;

/// Two servers behind their inbound sidecars, and a client's certificate.
struct Replicas {
    sidecars: [Proxy; 2],
    _servers: [SimulatedGpu; 2],
    anchors: String,
    client: Leaf,
}

impl Replicas {
    async fn start() -> Self {
        let servers = [SimulatedGpu::start("fast", FAST).await, SimulatedGpu::start("slow", SLOW).await];
        let authority = Authority::default();
        let sidecar = async |name: &'static str, server: &SimulatedGpu| {
            Static::new(name)
                .identity(&authority.leaf(name), &authority)
                .listener("http", Some(&["client"]), "application")
                .upstream("application", &[server.address], "same", None)
                .start()
                .await
        };
        let sidecars = [sidecar("fast", &servers[0]).await, sidecar("slow", &servers[1]).await];
        let client = authority.leaf("client");
        Self { sidecars, _servers: servers, anchors: authority.pem.clone(), client }
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.sidecars.iter().map(Proxy::front).collect()
    }

    /// Puts the client's certificate, its key and the anchors there.
    fn write_credentials(&self, folder: &Path) {
        for (file, text) in [
            ("anchors.pem", &self.anchors),
            ("leaf.pem", &self.client.certificate),
            ("key.pem", &self.client.key),
        ] {
            std::fs::write(folder.join(file), text).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stock_grpc_client_shifts_load_to_the_faster_server_by_our_reports() {
    grpc_shifts_load(&[]).await;
}

/// A client that asks for reports out of band takes no notice of those on responses (gRFC A58).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stock_grpc_client_shifts_load_by_the_reports_that_it_subscribes_to() {
    grpc_shifts_load(&["--out-of-band"]).await;
}

async fn grpc_shifts_load(how: &[&str]) {
    let Some(bin) = peers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let replicas = Replicas::start().await;
    replicas.write_credentials(folder.path());
    let seconds = 8;
    let output = tokio::process::Command::new(bin.join("python"))
        .arg(script("weighted_client.py"))
        .args(how)
        .args([folder.path().to_str().unwrap().to_owned(), RATE.to_string(), seconds.to_string()])
        .args(replicas.addresses().iter().map(SocketAddr::to_string))
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PATIENCE * 2, output).await.unwrap().unwrap();
    let (said, why) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{why}");
    let answered: Vec<BTreeMap<String, u64>> =
        said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answered.len(), seconds, "{said}");
    // The first seconds are the policy's own, until it trusts the reports.
    let late = &answered[seconds / 2..];
    let of = |name: &str| late.iter().filter_map(|second| second.get(name)).sum::<u64>() as f64;
    let share = of("fast") / (of("fast") + of("slow"));
    assert!(share > SHIFTED, "the fast server got {:.0} % of the calls: {said}", share * 1e2);
    assert!(of("slow") > 0.0, "the slow server is slow, not gone: {said}");
    for sidecar in &replicas.sidecars {
        wait_until("the client's subscriptions have ended with it", PATIENCE, async || {
            sidecar.metric("penstock_report_streams", &[]).await == 0.0
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_shifts_load_to_the_faster_server_by_our_reports() {
    let Some(bin) = peers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let replicas = Replicas::start().await;
    replicas.write_credentials(folder.path());
    let front = SocketAddr::new(own_ip().into(), 8_000);
    let file = folder.path().join("envoy.yaml");
    std::fs::write(&file, envoy(front, &replicas.addresses(), folder.path())).unwrap();
    let args =
        ["-c", file.to_str().unwrap(), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"];
    let _envoy = Process::start("envoy", &bin.join("envoy"), &args, folder.path());
    listens(front).await;

    // Eight clients that pause for 40 ms ask about as often as the other test does.
    let load = Load::start(front, "work.test", 8, Duration::from_millis(40));
    load.more(50).await;
    let mut share = 0.0;
    wait_until("Envoy prefers the fast server", PATIENCE, async || {
        let before = load.so_far();
        load.more(300).await;
        share = load.so_far().share_since(&before, "fast");
        eprintln!("the fast server got {:.0} % of 300 requests", share * 1e2);
        share > SHIFTED
    })
    .await;
    assert!(share < 1.0, "the slow server is slow, not gone");
    load.finish().await.has_no_failure();
}

/// A connection to a sidecar, with that certificate.
async fn connect(sidecar: &Proxy, authority: &Authority, account: &str) -> Channel {
    let tls = authority.client(Some(&authority.leaf(account)), &[b"h2"]);
    let front = sidecar.front();
    let connector = service_fn(move |_| {
        let tls = tls.clone();
        async move {
            let stream = TcpStream::connect(front).await?;
            tls.connect("localhost".try_into().unwrap(), stream).await.map(TokioIo::new)
        }
    });
    Endpoint::from_static("http://work.test").connect_with_connector(connector).await.unwrap()
}

/// Asks for reports as often as that.
async fn subscribe(
    channel: &Channel,
    interval: Duration,
) -> Result<Streaming<OrcaLoadReport>, tonic::Status> {
    let report_interval = Some(interval.try_into().unwrap());
    let question = OrcaLoadReportRequest { report_interval, ..Default::default() };
    Ok(service::Client::new(channel.clone()).stream_core_metrics(question).await?.into_inner())
}

/// A sidecar that lets one client in.
async fn sidecar(server: &SimulatedGpu, authority: &Authority) -> Proxy {
    Static::new("server")
        .identity(&authority.leaf("server"), authority)
        .listener("http", Some(&["client"]), "application")
        .upstream("application", &[server.address], "same", None)
        .start()
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_subscribes_sees_requests_come_and_go_and_hears_when_the_server_leaves() {
    let server = SimulatedGpu::start("slow", Duration::from_millis(300)).await;
    let authority = Authority::default();
    let mut sidecar = sidecar(&server, &authority).await;
    let outbound = Static::new("client")
        .identity(&authority.leaf("client"), &authority)
        .listener("http", None, "server")
        .upstream("server", &[sidecar.front()], "same", Some("server"))
        .start()
        .await;
    // More often than anybody is told.
    let mut reports =
        subscribe(&connect(&sidecar, &authority, "client").await, Duration::from_millis(1)).await.unwrap();
    let in_flight = |report: &OrcaLoadReport| report.named_metrics["in_flight"];
    let first = reports.message().await.unwrap().unwrap();
    assert_eq!(in_flight(&first), 0.0, "{first:?}");
    let began = Instant::now();
    for _ in 0..5 {
        reports.message().await.unwrap().unwrap();
    }
    let took = began.elapsed();
    assert!(took >= oob::LEAST_INTERVAL * 4, "five reports in {took:?}");

    let load = Load::start(outbound.front(), "work.test", 3, Duration::ZERO);
    let mut seen = 0.0;
    while seen < 3.0 {
        seen = in_flight(&timeout(PATIENCE, reports.message()).await.unwrap().unwrap().unwrap());
    }
    assert_eq!(sidecar.metric("penstock_report_streams", &[]).await, 1.0);
    load.finish().await.has_no_failure();
    while seen > 0.0 {
        seen = in_flight(&timeout(PATIENCE, reports.message()).await.unwrap().unwrap().unwrap());
    }

    // A stream is nothing that the drain waits for: it ends the stream.
    sidecar.process.terminate();
    let end = loop {
        match timeout(PATIENCE, reports.message()).await.unwrap() {
            Ok(report) => assert!(report.is_some(), "a stream ends with a status"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Unavailable, "{end}");
    assert!(end.message().contains("is leaving"), "{end}");
    let status = sidecar.process.ended(Duration::from_secs(10)).await;
    assert!(status.success(), "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_use_the_port_hears_nothing_of_its_load() {
    let server = SimulatedGpu::start("slow", SLOW).await;
    let authority = Authority::default();
    let sidecar = sidecar(&server, &authority).await;
    let refused = subscribe(&connect(&sidecar, &authority, "stranger").await, oob::LEAST_INTERVAL).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriptions_have_an_end_and_one_that_is_over_makes_room() {
    let server = SimulatedGpu::start("slow", SLOW).await;
    let authority = Authority::default();
    let sidecar = sidecar(&server, &authority).await;
    let mut open = Vec::new();
    // One connection carries 256 streams.
    let mut channel = connect(&sidecar, &authority, "client").await;
    while open.len() < oob::STREAMS as usize {
        if open.len() % 200 == 199 {
            channel = connect(&sidecar, &authority, "client").await;
        }
        open.push(subscribe(&channel, Duration::from_secs(60)).await.unwrap());
    }
    let channel = connect(&sidecar, &authority, "client").await;
    let refused = subscribe(&channel, Duration::from_secs(60)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    open.pop();
    wait_until("there is room again", PATIENCE, async || {
        subscribe(&channel, Duration::from_secs(60)).await.is_ok()
    })
    .await;
}

/// Envoy with the policy, in mutual TLS to the sidecars; times are shortened as in the gRPC client.
fn envoy(front: SocketAddr, sidecars: &[SocketAddr], folder: &Path) -> String {
    const TYPES: &str = "type.googleapis.com/envoy.extensions";
    let mut endpoints = String::new();
    for address in sidecars {
        let _ = writeln!(
            endpoints,
            "        - endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}",
            address.ip(),
            address.port()
        );
    }
    let names: Vec<_> = ["fast", "slow"]
        .map(|name| format!("{{san_type: URI, matcher: {{exact: \"{}\"}}}}", spiffe(name)))
        .to_vec();
    format!(
        r#"
static_resources:
  listeners:
  - address: {{socket_address: {{address: {ip}, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": {TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: replicas}}}}]}}
          http_filters:
          - name: router
            typed_config: {{"@type": {TYPES}.filters.http.router.v3.Router}}
  clusters:
  - name: replicas
    type: STATIC
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.client_side_weighted_round_robin
          typed_config:
            "@type": {TYPES}.load_balancing_policies.client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin
            blackout_period: 0.5s
            weight_update_period: 0.1s
    transport_socket:
      name: tls
      typed_config:
        "@type": {TYPES}.transport_sockets.tls.v3.UpstreamTlsContext
        sni: localhost
        common_tls_context:
          tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
          tls_certificates:
          - {{certificate_chain: {{filename: {folder}/leaf.pem}}, private_key: {{filename: {folder}/key.pem}}}}
          validation_context:
            trusted_ca: {{filename: {folder}/anchors.pem}}
            match_typed_subject_alt_names: [{names}]
    load_assignment:
      cluster_name: replicas
      endpoints:
      - lb_endpoints:
{endpoints}"#,
        ip = front.ip(),
        port = front.port(),
        folder = folder.display(),
        names = names.join(", "),
    )
}
