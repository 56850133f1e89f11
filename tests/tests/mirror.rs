//! Copies of requests, between real sidecars: they come whole and as often as the share says, whatever becomes of them touches no client,
//! what finds no room is dropped and counted, and both answers are held against each other.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod published;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_control::serve::Control;
use penstock_control::snapshot::Builder;
use penstock_inference::oip::{InferResponse, Tensor, grpc, rest};
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::wire::{Message, Wire, get};
use penstock_tests::testkit::{PATIENCE, anywhere, wait_until};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use self::published::Sidecar;

/// What a server has been asked.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<Vec<Message>>>);

impl Asked {
    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn all(&self) -> Vec<Message> {
        self.0.lock().unwrap().clone()
    }

    async fn are(&self, count: usize) {
        wait_until(&format!("{count} requests have come"), PATIENCE, async || self.count() >= count).await;
        assert_eq!(self.count(), count);
    }
}

fn ok(body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

/// A server that remembers what it was asked, and gives one answer to everything.
async fn server(address: SocketAddr, answer: Vec<u8>) -> (Origin, Asked) {
    let asked = Asked::default();
    let remembers = asked.clone();
    let origin = Origin::start_at(address, move |mut client| {
        let (asked, answer) = (remembers.clone(), answer.clone());
        async move {
            while let Ok(request) = client.request().await {
                // What its own sidecar wants to know of it is nobody's request.
                if request.head.get("host") == Some("shop.test") {
                    asked.0.lock().unwrap().push(request);
                }
                if client.send(&answer).await.is_err() {
                    return;
                }
            }
        }
    });
    (origin.await, asked)
}

fn route(mirror: &str, more: &str) -> String {
    format!(
        r#"apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: copies, namespace: test}}
spec:
  parentRefs: [{{group: "", kind: Service, name: shop}}]
  rules:
  - backendRefs: [{{name: shop, port: 80}}]
    filters:
    - {{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: x-added, value: "1"}}]}}}}
    - {{type: RequestMirror, requestMirror: {{backendRef: {{name: {mirror}, port: 80}}{more}}}}}
"#
    )
}

/// A client, the server `a` of the Service `shop`, and `b` of `shop-v2`, to which requests for `shop` are copied.
async fn mesh(share: &str) -> Mesh {
    mesh_with(&route("shop-v2", share)).await
}

async fn mesh_with(route: &str) -> Mesh {
    let mut mesh = Mesh::default().pod("client", None).pod("a", Some("shop")).pod("b", Some("shop-v2"));
    mesh = mesh.service("shop", &[]).service("shop-v2", &[]);
    mesh.file("route.yaml", route);
    mesh.start().await
}

const GET: &str = "GET /x?y=1 HTTP/1.1\r\nhost: shop.test\r\nx-own: me\r\nexpect: 100-continue\r\n\r\n";

/// What the client's sidecar says became of copies.
async fn copies(mesh: &Mesh, outcome: &str) -> f64 {
    let labels = ["service=\"test/shop\"", "mirror=\"test/shop-v2\"", &format!("outcome=\"{outcome}\"")];
    metric(mesh.admin("client"), "penstock_mirror_requests_total", &labels).await
}

async fn are_told(mesh: &Mesh, outcome: &str, at_least: f64) {
    wait_until(&format!("{at_least} copies are {outcome}"), PATIENCE, async || {
        copies(mesh, outcome).await >= at_least
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_go_to_the_mirror_as_the_share_says_and_look_like_the_request() {
    let mut mesh = mesh("").await;
    let (_a, requests) = server(mesh.application("a"), ok(b"a")).await;
    let (_b, mirrored) = server(mesh.application("b"), ok(b"b")).await;
    mesh.reaches("client", "shop").await;
    let before = requests.count();
    mirrored.are(before).await;

    let mut client = mesh.client("client").await;
    for _ in 0..50 {
        assert_eq!(client.ask(GET).await.unwrap().text(), "a");
    }
    requests.are(before + 50).await;
    mirrored.are(before + 50).await;
    let (request, copy) = (requests.all().pop().unwrap(), mirrored.all().pop().unwrap());
    assert_eq!(copy.head.first, "GET /x?y=1 HTTP/1.1");
    for name in ["host", "x-own", "x-added"] {
        assert_eq!(copy.head.get(name), request.head.get(name), "{name}");
        assert!(copy.head.get(name).is_some(), "{name}");
    }
    assert_eq!(copy.head.get("expect"), None, "nobody waits for leave to send it");
    // Inbound they are ordinary requests; outbound they are counted for themselves.
    counts_are_told().await;
    let outbound = ["direction=\"outbound\""];
    assert_eq!(
        metric(mesh.admin("client"), "penstock_requests_total", &outbound).await,
        before as f64 + 50.0
    );
    assert_eq!(copies(&mesh, "answered").await, before as f64 + 50.0);
    assert!(metric(mesh.admin("b"), "penstock_requests_total", &["direction=\"inbound\""]).await >= 50.0);

    // A share that changes is in force at once, and the same connection goes on.
    mesh.file("route.yaml", &route("shop-v2", ", percent: 50"));
    mesh.apply().await;
    let before = mirrored.count();
    for _ in 0..400 {
        assert_eq!(client.ask(GET).await.unwrap().text(), "a");
    }
    counts_are_told().await;
    let copied = mirrored.count() - before;
    assert!((140..260).contains(&copied), "{copied} of 400 at a share of a half");
    mesh.file("route.yaml", &route("shop-v2", ", percent: 0"));
    mesh.apply().await;
    let before = mirrored.count();
    for _ in 0..20 {
        assert_eq!(client.ask(GET).await.unwrap().text(), "a");
    }
    counts_are_told().await;
    assert_eq!(mirrored.count(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_body_is_copied_whole_however_it_comes() {
    let mesh = mesh("").await;
    let (_a, requests) = server(mesh.application("a"), ok(b"a")).await;
    let (_b, mirrored) = server(mesh.application("b"), ok(b"b")).await;
    mesh.reaches("client", "shop").await;
    let before = requests.count();
    let body: Vec<u8> = (0..5 << 20).map(|at: u32| (at ^ (at >> 8)) as u8).collect();
    let with_length =
        format!("POST /length HTTP/1.1\r\nhost: shop.test\r\ncontent-length: {}\r\n\r\n", body.len());
    let chunked = "POST /chunked HTTP/1.1\r\nhost: shop.test\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut pieces = Vec::new();
    for piece in body.chunks(100_000) {
        pieces.extend(format!("{:x}\r\n", piece.len()).into_bytes());
        pieces.extend(piece);
        pieces.extend(b"\r\n");
    }
    pieces.extend(b"0\r\n\r\n");
    let mut client = mesh.client("client").await;
    let small = b"POST /small HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 2\r\n\r\nhi".to_vec();
    for request in [[with_length.as_bytes(), &body].concat(), [chunked.as_bytes(), &pieces].concat(), small] {
        assert_eq!(client.ask(request).await.unwrap().text(), "a");
    }
    requests.are(before + 3).await;
    mirrored.are(before + 3).await;
    let mut copies = mirrored.all().split_off(before);
    copies.sort_by(|a, b| a.head.first.cmp(&b.head.first));
    let paths: Vec<_> = copies.iter().map(|copy| copy.head.first.split(' ').nth(1).unwrap()).collect();
    assert_eq!(paths, ["/chunked", "/length", "/small"]);
    assert!(copies[0].body == body && copies[1].body == body, "bytes differ");
    assert_eq!(copies[2].body, b"hi");
}

/// How long the middle one and the slowest of some requests took.
async fn times(client: &mut Wire) -> (Duration, Duration) {
    let mut times = Vec::new();
    for _ in 0..60 {
        let begun = Instant::now();
        assert_eq!(client.ask(GET).await.unwrap().text(), "a");
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    (times[30], times[59])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_fails_hangs_resets_or_does_not_listen_touches_no_client() {
    let mut mesh = mesh(", percent: 0").await;
    let (_a, _) = server(mesh.application("a"), ok(b"a")).await;
    mesh.reaches("client", "shop").await;
    let mut client = mesh.client("client").await;
    let (usual, _) = times(&mut client).await;
    let fails = b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n".to_vec();
    for case in ["fails", "hangs", "resets", "refuses"] {
        let at = mesh.application("b");
        let mirror = match case {
            "fails" => Some(server(at, fails.clone()).await.0),
            "hangs" => Some(
                Origin::start_at(at, |mut client| async move {
                    let _ = client.request().await;
                    std::future::pending::<()>().await;
                })
                .await,
            ),
            "resets" => Some(
                Origin::start_at(at, |mut client| async move {
                    let _ = client.request().await;
                })
                .await,
            ),
            // Nobody listens.
            _ => None,
        };
        mesh.file("route.yaml", &route("shop-v2", ""));
        mesh.apply().await;
        let failed = copies(&mesh, "failed").await;
        let (middle, slowest) = times(&mut client).await;
        println!("a mirror that {case}: {middle:?} beside {usual:?} without copies, the slowest {slowest:?}");
        assert!(slowest < Duration::from_secs(5), "{case}: {slowest:?}");
        assert!(middle < usual * 5 + Duration::from_millis(20), "{case}: {middle:?} instead of {usual:?}");
        if matches!(case, "fails" | "resets" | "refuses") {
            are_told(&mesh, "failed", failed + 60.0).await;
        }
        drop(mirror);
        mesh.file("route.yaml", &route("shop-v2", ", percent: 0"));
        mesh.apply().await;
    }
    counts_are_told().await;
    let client = mesh.admin("client");
    for name in ["penstock_request_failures_total", "penstock_request_errors_total", "penstock_retries_total"]
    {
        assert_eq!(metric(client, name, &["direction=\"outbound\""]).await, 0.0, "{name}");
    }
    // Nor has a mirror lost its good name with those who ask it themselves.
    let (_b, _) = server(mesh.application("b"), ok(b"b")).await;
    let endpoints: serde_json::Value =
        serde_json::from_slice(&get(client, "/endpoints").await.unwrap().body).unwrap();
    let states: Vec<_> = endpoints.as_array().unwrap().iter().map(|endpoint| &endpoint["state"]).collect();
    assert!(states.len() >= 2 && states.iter().all(|state| *state == "ready"), "{endpoints}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_no_such_mirror_requests_are_served_and_control_says_what_is_wrong() {
    let mesh = mesh_with(&route("nothing", "")).await;
    let (_a, _) = server(mesh.application("a"), ok(b"a")).await;
    mesh.reaches("client", "shop").await;
    assert_eq!(mesh.client("client").await.ask(GET).await.unwrap().text(), "a");
    let problems = mesh.status().await.problems;
    assert!(
        problems.iter().any(|problem| problem.message.contains("test/nothing does not exist")),
        "{problems:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_slow_mirror_leaves_no_room_for_is_dropped_and_the_request_goes_on() {
    let mesh = mesh("").await;
    let (_a, requests) = server(mesh.application("a"), ok(b"a")).await;
    // It takes connections and reads nothing.
    let silent = |client: Wire| async move {
        let _open = client;
        std::future::pending::<()>().await;
    };
    let _b = Origin::start_at(mesh.application("b"), silent).await;
    mesh.reaches("client", "shop").await;
    let before = requests.count();
    let body = vec![7; 64 << 20];
    let head = format!("POST / HTTP/1.1\r\nhost: shop.test\r\ncontent-length: {}\r\n\r\n", body.len());
    let answer = mesh.client("client").await.ask([head.as_bytes(), &body].concat()).await.unwrap();
    assert_eq!(answer.text(), "a");
    requests.are(before + 1).await;
    assert_eq!(requests.all().pop().unwrap().body.len(), body.len());
    are_told(&mesh, "dropped", 1.0).await;
    assert_eq!(copies(&mesh, "failed").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_ends_its_copy_which_is_nobodys_failure() {
    let mesh = mesh("").await;
    let (_a, _) = server(mesh.application("a"), ok(b"a")).await;
    let (_b, _) = server(mesh.application("b"), ok(b"b")).await;
    mesh.reaches("client", "shop").await;
    let mut client = mesh.client("client").await;
    client.send("POST / HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 100\r\n\r\nhalf").await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(client);
    are_told(&mesh, "abandoned", 1.0).await;
    assert_eq!(copies(&mesh, "failed").await, 0.0);
}

/// What is published in place of a source: nothing in a route says that answers are compared, so the only way there is past the compiler.
#[derive(Clone)]
struct World {
    servers: [SocketAddr; 2],
    compare: Option<v1::Compare>,
}

impl published::World for World {
    fn add(&self, builder: &mut Builder) {
        for (name, server) in ["shop", "shop-v2"].into_iter().zip(self.servers) {
            published::service(builder, name, server);
        }
        builder.leads_to("test/shop", "test/shop-v2");
        let weights = "test/shop/0".to_owned();
        let rule = v1::Rule { route: "test/shop".into(), weights: weights.clone(), ..Default::default() };
        builder.add(Kind::Routes, "test/shop", &v1::Routes { rules: vec![rule] });
        let backend = v1::Backend { service: "test/shop".into(), port: 80, weight: 1, ..Default::default() };
        let mirror = v1::Mirror {
            service: "test/shop-v2".into(),
            port: 80,
            share_ppm: 1_000_000,
            compare: self.compare.clone(),
            invalid: String::new(),
        };
        let message = v1::Weights { backends: vec![backend], mirrors: vec![mirror], ..Default::default() };
        builder.add(Kind::Weights, weights, &message);
    }
}

/// A sidecar whose control is in this process.
struct Alone {
    control: Control,
    world: watch::Sender<World>,
    sidecar: Sidecar,
    _folder: tempfile::TempDir,
}

impl Alone {
    async fn start(servers: [SocketAddr; 2], compare: v1::Compare) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (world, publishes) = watch::channel(World { servers, compare: Some(compare) });
        let control = published::control(folder.path(), publishes).await;
        let sidecar = published::sidecar(folder.path(), control.address).await;
        Self { control, world, sidecar, _folder: folder }
    }

    async fn ask(&self, path: &str) -> Message {
        let request = format!("POST {path} HTTP/1.1\r\nhost: shop.test\r\ncontent-length: 2\r\n\r\n{{}}");
        Wire::connect(self.sidecar.outbound).await.ask(request).await.unwrap()
    }

    /// What control has been told of copies in all.
    fn told(&self) -> v1::Shadow {
        let (services, window) = (["test/shop".to_owned()], Duration::from_secs(60));
        let seen = self.control.fleet.seen(&services, window, Instant::now());
        seen.wire(&services).shadows.pop().unwrap_or_default()
    }

    async fn compared(&self, count: u64) -> v1::Shadow {
        wait_until(&format!("{count} pairs are compared"), PATIENCE, async || self.told().compared >= count)
            .await;
        self.told()
    }
}

fn tensors(values: &[f32], binary: bool) -> Vec<u8> {
    let outputs = vec![Tensor::fp32("y", vec![1, values.len() as u64], values.iter().copied())];
    let response = InferResponse { model_name: "m".into(), outputs, ..InferResponse::default() };
    let body = rest::encode_response(&response, |_| binary).unwrap();
    let header = body
        .header_length
        .map_or_else(String::new, |length| format!("inference-header-content-length: {length}\r\n"));
    let whole = body.into_bytes();
    let head = format!("HTTP/1.1 200 OK\r\n{header}content-length: {}\r\n\r\n", whole.len());
    [head.as_bytes(), &whole].concat()
}

/// A message of gRPC.
fn framed(message: &impl prost::Message) -> Bytes {
    let message = message.encode_to_vec();
    [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat().into()
}

/// A server of gRPC that answers each call with one tensor.
async fn calls(values: &'static [f32]) -> SocketAddr {
    let listener = TcpListener::bind(anywhere()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let outputs = vec![Tensor::fp32("y", vec![1, values.len() as u64], values.iter().copied())];
    let response = InferResponse { model_name: "m".into(), outputs, ..InferResponse::default() };
    let answer = framed(&grpc::encode_response(response, grpc::Contents::Raw).unwrap());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let answer = answer.clone();
                async move {
                    request.into_body().collect().await?;
                    let mut trailers = http::HeaderMap::new();
                    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                    let body = Full::new(answer).with_trailers(std::future::ready(Some(Ok(trailers))));
                    let response = http::Response::builder().header("content-type", "application/grpc");
                    Ok::<_, hyper::Error>(response.body(body).unwrap())
                }
            });
            let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(serving.serve_connection(TokioIo::new(stream), service));
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_to_calls_of_grpc_are_compared_tensor_by_tensor() {
    let servers = [calls(&[1.0, 2.0]).await, calls(&[1.0, 2.5]).await];
    let alone = Alone::start(servers, v1::Compare { absolute: 0.5, ..Default::default() }).await;
    let stream = TcpStream::connect(alone.sidecar.outbound).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut client, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    for _ in 0..3 {
        let request = http::Request::post(format!("http://shop.test{}", grpc::MODEL_INFER))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(framed(&grpc::ModelInferRequest::default())))
            .unwrap();
        let answer = client.send_request(request).await.unwrap().into_body().collect().await.unwrap();
        assert_eq!(answer.trailers().unwrap()["grpc-status"], "0");
    }
    let told = alone.compared(3).await;
    assert_eq!((told.sent, told.failures, told.agreed), (3, 0, 3));
    assert_eq!((told.ranked, told.same_top, told.largest_difference), (3, 3, 0.5));
}

/// A server that answers by the path.
async fn by_path(answers: Vec<(&'static str, Vec<u8>)>) -> Origin {
    let answers = Arc::new(answers);
    Origin::start(move |mut client| {
        let answers = Arc::clone(&answers);
        async move {
            while let Ok(request) = client.request().await {
                let path = request.head.first.split(' ').nth(1).unwrap_or_default().to_owned();
                let answer = answers.iter().find(|(known, _)| *known == path);
                let answer = answer.map_or_else(|| ok(b""), |(_, answer)| answer.clone());
                if client.send(answer).await.is_err() {
                    return;
                }
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_answers_are_held_against_each_other_and_control_is_told() {
    let near: Vec<f32> = (0..50_000).map(|at| at as f32).collect();
    let far: Vec<f32> = near.iter().map(|value| value + 0.5).collect();
    let encoded = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx".to_vec();
    let failed = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n".to_vec();
    let clients = by_path(vec![
        ("/v2/models/m/infer", tensors(&[1.0, 2.0, 3.0], false)),
        ("/v2/models/other/infer", tensors(&[1.0, 2.0], false)),
        ("/v2/models/large/infer", tensors(&near, true)),
        ("/text", ok(b"the same")),
        ("/fails", ok(b"fine")),
        ("/encoded", encoded.clone()),
    ])
    .await;
    let mirrors = by_path(vec![
        // Another form of it, and a little off.
        ("/v2/models/m/infer", tensors(&[1.0, 2.25, 3.0], true)),
        ("/v2/models/other/infer", tensors(&[9.0, 2.0], false)),
        ("/v2/models/large/infer", tensors(&far, true)),
        ("/text", ok(b"the same")),
        ("/fails", failed),
        ("/encoded", encoded),
    ])
    .await;
    let compare = v1::Compare { absolute: 0.5, ..Default::default() };
    let alone = Alone::start([clients.address, mirrors.address], compare.clone()).await;

    assert!(alone.ask("/v2/models/m/infer").await.text().contains("1.0"), "the client gets its own server's");
    let told = alone.compared(1).await;
    assert_eq!((told.agreed, told.ranked, told.same_top, told.largest_difference), (1, 1, 1, 0.25));
    let total = |buckets: &[v1::Bucket]| buckets.iter().map(|bucket| bucket.count).sum::<u64>();
    let timed = [&told.latency, &told.client_latency].map(|buckets| total(buckets));
    assert_eq!((told.sent, told.failures, timed), (1, 0, [1, 1]));
    assert!(told.bytes > 0 && told.client_bytes > 0 && told.bytes != told.client_bytes);

    // Another answer, and another greatest.
    alone.ask("/v2/models/other/infer").await;
    let told = alone.compared(2).await;
    assert_eq!((told.agreed, told.ranked, told.same_top, told.largest_difference), (1, 2, 1, 8.0));

    // By a thread, since they are large.
    let answer = alone.ask("/v2/models/large/infer").await;
    assert!(answer.body.len() > 200_000);
    let told = alone.compared(3).await;
    assert_eq!((told.agreed, told.ranked, told.same_top), (2, 3, 2));

    alone.ask("/text").await;
    assert_eq!(alone.compared(4).await.agreed, 3);

    // A failure does not agree with what is none.
    assert_eq!(alone.ask("/fails").await.text(), "fine");
    let told = alone.compared(5).await;
    assert_eq!((told.agreed, told.failures), (3, 1));

    // What is encoded is not compared, nor what is above the bound, nor anything once nobody asks for it.
    alone.ask("/encoded").await;
    let bound = v1::Compare { max_bytes: 4, ..compare };
    alone.world.send_modify(|world| world.compare = Some(bound));
    wait_until("the bound is in force", PATIENCE, async || {
        let before = alone.told();
        alone.ask("/text").await;
        wait_until("it is told", PATIENCE, async || alone.told().sent > before.sent).await;
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        alone.told().compared == before.compared
    })
    .await;
    let before = alone.told();
    alone.world.send_modify(|world| world.compare = None);
    for _ in 0..3 {
        alone.ask("/fails").await;
    }
    wait_until("copies go on", PATIENCE, async || alone.told().sent >= before.sent + 3).await;
    assert!(alone.told().failures > before.failures, "they are sent, and fail, as before");
}
