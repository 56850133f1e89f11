//! Ways around that somebody may try where rules, proxies and policies are all there, and what they lead to.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_api::names::annotation;
use penstock_tests::testkit::certificates::spiffe;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::pods::{APPLICATION, Pods};
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::time::timeout;

const HEALTH: &str = "/grpc.health.v1.Health/Check";

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: p, namespace: test}}\nspec:\n  {spec}\n"
    )
}

/// An application that counts the connections over which it was told anything, and answers each with 200.
fn counts(pods: &Pods, pod: &str) -> (Origin, Arc<AtomicUsize>) {
    let told = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&told);
    let listener = pods.pod(pod).machine.namespace.listen(APPLICATION);
    let origin = Origin::on(listener, move |mut client| {
        let counted = Arc::clone(&counted);
        async move {
            // The sidecar asks for metrics pages of its own accord, in good HTTP; nobody counts these.
            let Ok(first) = client.bytes(12).await else { return };
            let own: [&[u8]; 3] = [b"GET /metrics", b"GET /prometh", b"GET /stats"];
            if !own.iter().any(|page| first.starts_with(page)) {
                counted.fetch_add(1, Ordering::SeqCst);
            }
            let _ = client.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
        }
    });
    (origin, told)
}

/// What comes back for some bytes, until the other side ends.
async fn said(pods: &Pods, from: &str, to: SocketAddr, bytes: &[u8]) -> String {
    let mut wire = pods.pod(from).connect(to).unwrap();
    let _ = wire.send(bytes).await;
    let rest =
        timeout(PATIENCE, wire.rest()).await.unwrap_or_else(|_| panic!("{to}: neither answered nor closed"));
    String::from_utf8_lossy(&rest).into_owned()
}

/// A sidecar says by its ALPN that it brings bytes. It says so in good faith when a Service declares bytes where another one,
/// which is about the same port of the pod, declares HTTP; the pod's own proxy goes by what is declared for the port.
#[tokio::test]
async fn what_comes_as_bytes_to_a_port_of_http_does_not_pass() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).with("server", &[]);
    let pods = pods.service("api", "http", &["server"]).service("raw", "tcp", &["server"]).start().await;
    let (_origin, told) = counts(&pods, "server");
    let request = b"GET /secret HTTP/1.1\r\nhost: api\r\n\r\n";
    assert_eq!(said(&pods, "client", pods.cluster_ip("raw"), request).await, "");
    assert_eq!(told.load(Ordering::SeqCst), 0);
    let mut wire = pods.pod("client").connect(pods.cluster_ip("api")).unwrap();
    let answer = timeout(PATIENCE, wire.ask(request)).await.unwrap().unwrap();
    assert_eq!((answer.status(), told.load(Ordering::SeqCst)), (200, 1), "{answer:?}");
}

#[tokio::test]
async fn odd_first_bytes_are_no_way_to_an_application_that_speaks_http() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with_stranger("stranger").with("declared", &[(annotation::MTLS, "permissive")]);
    let pods = pods.with("found", &[(annotation::MTLS, "permissive")]);
    // Of the second the protocol is found out, and a Deny asks for something of HTTP.
    let mut pods = pods.service("api", "http", &["declared"]).declares("found", APPLICATION);
    pods.mesh.file("access.yaml", &policy("action: Deny\n  rules: [{to: [{paths: [/secret]}]}]"));
    let pods = pods.start().await;
    let rest = "/secret HTTP/1.1\r\nhost: api\r\n\r\n";
    for pod in ["declared", "found"] {
        let (_origin, told) = counts(&pods, pod);
        let machine = &pods.pod(pod).machine;
        for to in [machine.at(APPLICATION), machine.at_v6(APPLICATION)] {
            for first in [
                "\r\nGET ",
                "\nGET ",
                " GET ",
                "\tGET ",
                "get ",
                "GeT ",
                "\0GET ",
                "\u{feff}GET ",
                "GET\t",
                "\r\n\r\nGET ",
                "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\nGET ",
            ] {
                let said = said(&pods, "stranger", to, format!("{first}{rest}").as_bytes()).await;
                assert!(!said.starts_with("HTTP/1.1 200"), "{pod} {to} {first:?}: {said}");
                assert_eq!(told.load(Ordering::SeqCst), 0, "{pod} {to} {first:?} reached the application");
            }
            let denied = said(
                &pods,
                "stranger",
                to,
                format!("GET {rest}").replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n").as_bytes(),
            )
            .await;
            assert!(denied.starts_with("HTTP/1.1 403"), "{pod} {to}: {denied}");
        }
        // And who speaks as everybody does is served.
        let mut wire = pods.pod("stranger").connect(machine.at(APPLICATION)).unwrap();
        let answer =
            timeout(PATIENCE, wire.ask("GET /open HTTP/1.1\r\nhost: api\r\n\r\n")).await.unwrap().unwrap();
        assert_eq!((answer.status(), told.load(Ordering::SeqCst)), (200, 1), "{pod}: {answer:?}");
    }
}

#[tokio::test]
async fn a_probe_becomes_nothing_else_and_tells_no_load() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with_stranger("node").with("server", &[]).service("api", "http", &["server"]);
    let pods = pods.probe("server", "/healthz").start().await;
    let _server = pods.pod("server").mirror("server");
    let to = pods.pod("server").machine.at(APPLICATION);
    let ask = async |path: &str, more: &str| {
        let mut wire = pods.pod("node").connect(to).unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: api\r\nendpoint-load-metrics-format: TEXT\r\n{more}\r\n");
        timeout(PATIENCE, wire.ask(request)).await.unwrap().unwrap()
    };
    let answer = ask("/healthz", "").await;
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert_eq!(
        (answer.head.get("endpoint-load-metrics"), answer.head.get("penstock-models")),
        (None, None),
        "{answer:?}"
    );
    for more in [
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n",
        "upgrade: h2c\r\nconnection: upgrade\r\n",
        "content-length: 4\r\n\r\nmore",
        "transfer-encoding: chunked\r\n\r\n0\r\n",
    ] {
        let answer = ask("/healthz", more).await;
        assert_eq!(
            (answer.status(), answer.reason()),
            (403, Some("plaintext-refused")),
            "{more:?}: {answer:?}"
        );
        assert_eq!(answer.head.get("endpoint-load-metrics"), None, "{answer:?}");
    }
    // Over HTTP/2 the head need not say that a body follows.
    let stream = pods.pod("node").machine.namespace.connect(to).unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let more =
        StreamBody::new(futures_util::stream::iter([Ok::<_, Infallible>(Frame::data(Bytes::from("more")))]));
    let request = hyper::Request::get("http://api/healthz").body(more).unwrap();
    let response = timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap();
    let reason = response.headers().get("penstock-error").map(|reason| reason.to_str().unwrap());
    assert_eq!((response.status().as_u16(), reason), (403, Some("plaintext-refused")));
    connection.abort();
    // And a stranger's refusal says nothing of load.
    let answer = ask("/", "").await;
    assert_eq!((answer.status(), answer.head.get("endpoint-load-metrics")), (403, None), "{answer:?}");
}

#[tokio::test]
async fn a_refusal_tells_no_load_to_whoever_may_not_ask() {
    let Some(pods) = Pods::new() else { return };
    let pods =
        pods.with("front", &[]).with("other", &[]).with("server", &[]).service("api", "http", &["server"]);
    let mut pods = pods.start().await;
    let _server = pods.pod("server").mirror("server");
    pods.mesh.file(
        "access.yaml",
        &policy("action: Allow\n  rules: [{from: [{serviceAccounts: [front]}], to: [{methods: [GET]}]}]"),
    );
    pods.mesh.write();
    let ask = async |from: &str, method: &str| {
        let mut wire = pods.pod(from).connect(pods.cluster_ip("api")).unwrap();
        let request = format!(
            "{method} / HTTP/1.1\r\nhost: api\r\ncontent-length: 0\r\nendpoint-load-metrics-format: TEXT\r\n\r\n"
        );
        let answer = timeout(PATIENCE, wire.ask(request)).await.unwrap().unwrap();
        (answer.status(), answer.head.get("endpoint-load-metrics").is_some())
    };
    wait_until("the policy is in force", PATIENCE, async || ask("other", "GET").await.0 == 403).await;
    assert_eq!(
        ask("front", "GET").await,
        (200, true),
        "who is let in is told, so there is something to be told"
    );
    assert_eq!(ask("front", "POST").await, (403, false));
    assert_eq!(ask("other", "GET").await, (403, false));
}

#[tokio::test]
async fn trailers_say_nothing_in_our_name() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).with("server", &[]).service("api", "http", &["server"]).start().await;
    let _server =
        Origin::on(pods.pod("server").machine.namespace.listen(APPLICATION), |mut client| async move {
            let mut seen = Vec::new();
            while !seen.ends_with(b"\r\n\r\n")
                || (seen.starts_with(b"POST") && !contains(&seen, b"\r\n0\r\n"))
            {
                let Ok(byte) = client.bytes(1).await else { return };
                seen.extend(byte);
            }
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", seen.len());
            let _ = client.send([answer.as_bytes(), &seen].concat()).await;
        });
    let mut wire = pods.pod("client").connect(pods.cluster_ip("api")).unwrap();
    let names = [
        "penstock-client-id",
        "penstock_client_id",
        "penstock-anything",
        "x-forwarded-client-cert",
        "forwarded-client-cert",
    ];
    let evil: String = names.iter().map(|name| format!("{name}: evil\r\n")).collect();
    let request = format!(
        "POST / HTTP/1.1\r\nhost: api\r\nte: trailers\r\ntrailer: x-mine, {}\r\ntransfer-encoding: chunked\r\n\r\n\
         3\r\nabc\r\n0\r\nx-mine: good\r\n{evil}\r\n",
        names.join(", ")
    );
    let answer = timeout(PATIENCE, wire.ask(request)).await.unwrap().unwrap();
    let seen = answer.text();
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert!(seen.contains("x-mine: good"), "trailers pass: {seen}");
    assert!(!seen.contains("evil"), "{seen}");
    assert!(seen.contains(&spiffe("client")), "{seen}");
}

fn contains(bytes: &[u8], words: &[u8]) -> bool {
    bytes.windows(words.len()).any(|window| window == words)
}

/// gRPC's health service, which says of everything that it serves.
async fn health(pods: &Pods, pod: &str) -> tokio::task::JoinHandle<()> {
    let listener = pods.pod(pod).machine.namespace.listen(APPLICATION);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service =
                hyper::service::service_fn(|request: hyper::Request<hyper::body::Incoming>| async move {
                    let path = request.uri().path().to_owned();
                    let mut trailers = hyper::HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    trailers.insert("x-asked", path.parse().unwrap());
                    let frames = [
                        Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"\0\0\0\0\x02\x08\x01"))),
                        Ok(Frame::trailers(trailers)),
                    ];
                    let body = StreamBody::new(futures_util::stream::iter(frames));
                    Ok::<_, Infallible>(
                        hyper::Response::builder()
                            .header("content-type", "application/grpc")
                            .body(body)
                            .unwrap(),
                    )
                });
            tokio::spawn(async move {
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    })
}

/// The status of a call in plaintext: HTTP's, gRPC's.
async fn call(pods: &Pods, to: SocketAddr, path: &str, service: &str) -> (String, String) {
    let stream = pods.pod("node").machine.namespace.connect(to).unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let length = u8::try_from(service.len()).unwrap();
    let message = match length {
        0 => Vec::new(),
        _ => [&[0x0a, length], service.as_bytes()].concat(),
    };
    let frame = [&[0, 0, 0, 0, u8::try_from(message.len()).unwrap()], &message[..]].concat();
    let request = hyper::Request::post(format!("http://api{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(frame)))
        .unwrap();
    let response = timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap();
    let headers = response.headers().clone();
    let trailers = response.into_body().collect().await.unwrap().trailers().cloned().unwrap_or_default();
    connection.abort();
    let text = |name: &str| {
        let value = headers.get(name).or_else(|| trailers.get(name));
        value.map_or("", |value| value.to_str().unwrap()).to_owned()
    };
    (text("grpc-status"), text("penstock-error"))
}

#[tokio::test]
async fn pain_14_the_kubelets_grpc_probe_of_the_declared_service_passes_and_nothing_else_does() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with_stranger("node").with("server", &[]).service("api", "grpc", &["server"]);
    let pods = pods.grpc_probe("server", "live").start().await;
    let _server = health(&pods, "server").await;
    let machine = &pods.pod("server").machine;
    let (ok, refused) = (("0".to_owned(), String::new()), "plaintext-refused");
    for to in [machine.at(APPLICATION), machine.at_v6(APPLICATION)] {
        assert_eq!(call(&pods, to, HEALTH, "live").await, ok, "{to}");
        for (path, service) in [
            (HEALTH, ""),
            (HEALTH, "ready"),
            (HEALTH, "livelier"),
            ("/grpc.health.v1.Health/Watch", "live"),
            ("/grpc.health.v1.Health/Check?x", "live"),
            ("/inference.GRPCInferenceService/ModelInfer", "live"),
        ] {
            let (status, reason) = call(&pods, to, path, service).await;
            assert!(status != "0" && reason == refused, "{to} {path} {service:?}: {status} {reason}");
        }
    }
}

#[tokio::test]
async fn a_port_past_its_proxy_is_called_as_the_pod_says() {
    let Some(pods) = Pods::new() else { return };
    let skip = [(annotation::SKIP_INBOUND_PORTS, "8000")];
    let pods =
        pods.with("client", &[]).with("server", &skip).service("api", "http", &["server"]).start().await;
    let _server = pods.pod("server").mirror("server");
    let machine = &pods.pod("server").machine;
    for to in [pods.cluster_ip("api"), machine.at(APPLICATION), machine.at_v6(APPLICATION)] {
        let mut wire = pods.pod("client").connect(to).unwrap();
        let answer =
            timeout(PATIENCE, wire.ask("GET / HTTP/1.1\r\nhost: api\r\n\r\n")).await.unwrap().unwrap();
        assert_eq!(answer.status(), 200, "{to}: {answer:?}");
        assert!(!answer.text().contains("penstock-client-id"), "nobody has authenticated it: {answer:?}");
    }
}
