//! The webhook over real HTTPS: the same as `penstock inject` for every shape of pod, certificates that change under open
//! connections, and answers to what is no review.

#![allow(clippy::unwrap_used, missing_docs, reason = "what fails here fails the test")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use base64::Engine as _;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_control::namespaces::Namespaces;
use penstock_control::webhook::{Listening, Webhook, certificate};
use penstock_inject::{Namespace, Outcome, Settings, inject, pods};
use rcgen::{CertificateParams, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

type Key = Option<Arc<rustls::sign::CertifiedKey>>;

/// A certificate of its own, as control has it.
fn fresh() -> rustls::sign::CertifiedKey {
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["localhost".into()]).unwrap().self_signed(&key).unwrap();
    certificate::of_pem(leaf.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap()
}

fn asking() -> Namespace {
    Namespace { inject: Some("enabled".into()), enforce: None }
}

fn settings() -> Settings {
    Settings { image: "penstock.io/proxy:test".into(), version: "test".into(), ..Settings::default() }
}

/// A webhook that listens.
struct Served {
    address: SocketAddr,
    certificate: watch::Sender<Key>,
    stop: CancellationToken,
    task: JoinHandle<Result<()>>,
}

impl Served {
    async fn start(first: Key) -> Self {
        let (certificate, receiver) = watch::channel(first);
        let listening = Listening::on("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (address, stop) = (listening.address, CancellationToken::new());
        let namespaces = [("team-a".to_owned(), asking()), ("team-b".to_owned(), Namespace::default())];
        let webhook = Webhook::new(settings(), Namespaces::fixed(namespaces));
        let task = tokio::spawn(listening.serve(receiver, webhook, stop.clone()));
        Self { address, certificate, stop, task }
    }

    fn leaf(&self) -> CertificateDer<'static> {
        self.certificate.borrow().as_ref().unwrap().cert[0].clone()
    }
}

/// A connection.
enum Client {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

impl Client {
    /// Connects, trusting this certificate alone.
    async fn connect(
        address: SocketAddr,
        trusted: CertificateDer<'static>,
        alpn: &[u8],
        version: &'static SupportedProtocolVersion,
    ) -> std::io::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(trusted).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        let tcp = TcpStream::connect(address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(alpn));
        let io = TokioIo::new(tls);
        Ok(if alpn == b"h2" {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            Self::Two(sender)
        } else {
            let (sender, connection) = http1::handshake(io).await.unwrap();
            tokio::spawn(connection);
            Self::One(sender)
        })
    }

    async fn h2(served: &Served) -> Self {
        Self::connect(served.address, served.leaf(), b"h2", &TLS13).await.unwrap()
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        match self {
            Self::One(sender) => {
                sender.ready().await.unwrap();
                sender.send_request(request).await.unwrap()
            }
            Self::Two(sender) => sender.send_request(request).await.unwrap(),
        }
    }

    /// Asks for a review's answer.
    async fn review(&mut self, review: &Value) -> Value {
        let answer =
            self.send(post("/inject", "application/json", serde_json::to_vec(review).unwrap())).await;
        assert_eq!(answer.status(), 200);
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let answer: Value = serde_json::from_slice(&body).unwrap();
        let kind = (&answer["apiVersion"], &answer["kind"]);
        assert_eq!(kind, (&json!("admission.k8s.io/v1"), &json!("AdmissionReview")));
        assert_eq!(answer["response"]["uid"], review["request"]["uid"]);
        answer["response"].clone()
    }
}

fn post(path: &str, kind: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(format!("https://localhost{path}"))
        .header("host", "localhost")
        .header("content-type", kind)
        .body(Full::new(body.into()))
        .unwrap()
}

fn review(uid: &str, namespace: &str, pod: &Value) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": uid, "operation": "CREATE", "namespace": namespace,
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "object": pod, "oldObject": null, "dryRun": false,
        },
    })
}

/// The shapes of `control/inject`: their names, the pod, and what is written to become of it.
fn shapes() -> Vec<(String, Value, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("inject/tests/golden");
    let stems = std::fs::read_dir(folder).unwrap().filter_map(|entry| {
        entry.unwrap().path().to_str().unwrap().strip_suffix(".in.yaml").map(str::to_owned)
    });
    let mut shapes: Vec<_> = stems
        .map(|stem| {
            let object = std::fs::read_to_string(format!("{stem}.in.yaml")).unwrap();
            let object: Value = serde_saphyr::from_str(&object).unwrap();
            let pod = object.pointer(&pods(&object)[0].pointer).unwrap().clone();
            let out = std::fs::read_to_string(format!("{stem}.out.yaml")).unwrap();
            (stem, pod, out)
        })
        .collect();
    shapes.sort_by(|a, b| a.0.cmp(&b.0));
    shapes
}

#[tokio::test]
async fn every_shape_becomes_what_penstock_inject_makes_of_it() {
    let served = Served::start(Some(Arc::new(fresh()))).await;
    let shapes = shapes();
    assert!(shapes.len() >= 45, "{}", shapes.len());
    for (alpn, version) in [(&b"h2"[..], &TLS13), (b"http/1.1", &TLS13), (b"h2", &TLS12)] {
        let mut client = Client::connect(served.address, served.leaf(), alpn, version).await.unwrap();
        let (mut injected, mut refused) = (0, 0);
        for (stem, pod, out) in &shapes {
            let answer = client.review(&review(stem, "team-a", pod)).await;
            let warnings = || answer["warnings"].as_array().cloned().unwrap_or_default();
            let Some(patch) = answer["patch"].as_str() else {
                assert!(answer.get("patchType").is_none(), "{stem}");
                let told =
                    out.trim_end().rsplit_once("not injected: ").or(out.trim_end().rsplit_once("error: "));
                let (_, why) = told.unwrap_or_else(|| panic!("{stem} is to be injected: {answer}"));
                if answer["allowed"] == false {
                    refused += 1;
                    let message = answer["status"]["message"].as_str().unwrap();
                    assert!(message.contains(why), "{stem}: {message}");
                } else {
                    assert!(out.starts_with("# not injected: "), "{stem} is to be refused: {answer}");
                }
                continue;
            };
            injected += 1;
            assert_eq!(
                (&answer["allowed"], &answer["patchType"]),
                (&json!(true), &json!("JSONPatch")),
                "{stem}"
            );
            let patch = base64::engine::general_purpose::STANDARD.decode(patch).unwrap();
            let Ok(Outcome::Injected(offline)) = inject(pod, &asking(), &settings()) else {
                panic!("{stem}")
            };
            // Byte for byte.
            assert_eq!(patch, serde_json::to_vec(&offline.patch).unwrap(), "{stem}");
            // And as the golden file has it, from what came over the wire alone.
            let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
            let mut made = pod.clone();
            json_patch::patch(&mut made, &patch).unwrap();
            let warned: String = warnings()
                .iter()
                .map(|warning| format!("# warning: {}\n", warning.as_str().unwrap()))
                .collect();
            let yaml = serde_saphyr::to_string(&made).unwrap();
            assert_eq!(format!("{warned}{}\n", yaml.trim_end()), *out, "{stem}");
            // A second webhook has changed the pod, so this one is asked again.
            let again = client.review(&review(stem, "team-a", &made)).await;
            assert!(again["allowed"] == true && again.get("patch").is_none(), "{stem}: {again}");
        }
        assert!(injected >= 30 && refused >= 5, "{injected} {refused}");
    }
}

#[tokio::test]
async fn who_did_not_ask_is_let_through_and_a_namespace_that_nobody_knows_is_not() {
    let served = Served::start(Some(Arc::new(fresh()))).await;
    let mut client = Client::h2(&served).await;
    let plain = json!({"metadata": {"name": "web"}, "spec": {"containers": [{"name": "web", "image": "x"}]}});
    let answer = client.review(&review("1", "team-b", &plain)).await;
    assert_eq!(answer, json!({"uid": "1", "allowed": true}));
    let answer = client.review(&review("2", "nowhere", &plain)).await;
    assert_eq!((&answer["allowed"], &answer["status"]["code"]), (&json!(false), &json!(503)));
    let message = answer["status"]["message"].as_str().unwrap();
    assert!(
        message.contains("pod nowhere/web cannot have a sidecar yet: there is no namespace"),
        "{message}"
    );
    let mut update = review("3", "team-a", &plain);
    update["request"]["operation"] = "UPDATE".into();
    let answer = client.review(&update).await;
    assert!(answer["allowed"] == true && answer.get("patch").is_none(), "{answer}");
}

#[tokio::test]
async fn a_certificate_is_replaced_under_open_connections() {
    let served = Served::start(None).await;
    let (old, new) = (Arc::new(fresh()), Arc::new(fresh()));
    // While there is none, no handshake succeeds.
    assert!(Client::connect(served.address, old.cert[0].clone(), b"h2", &TLS13).await.is_err());
    served.certificate.send_replace(Some(old.clone()));
    let mut open = Client::h2(&served).await;
    let pod = json!({"metadata": {"name": "web"}, "spec": {"containers": [{"name": "web", "image": "x"}]}});
    let ask = review("1", "team-a", &pod);
    assert!(open.review(&ask).await["patch"].is_string());
    served.certificate.send_replace(Some(new.clone()));
    assert!(open.review(&ask).await["patch"].is_string());
    assert!(Client::connect(served.address, old.cert[0].clone(), b"h2", &TLS13).await.is_err());
    let mut later = Client::connect(served.address, new.cert[0].clone(), b"h2", &TLS13).await.unwrap();
    assert!(later.review(&ask).await["patch"].is_string());
}

#[tokio::test]
async fn what_is_no_review_is_told_so_and_the_next_one_is_answered() {
    let served = Served::start(Some(Arc::new(fresh()))).await;
    let mut client = Client::h2(&served).await;
    let get = |path: &str| Request::get(format!("https://localhost{path}")).body(Full::default()).unwrap();
    let json = "application/json";
    let table = [
        (get("/ready"), 200, "ready"),
        (get("/inject"), 405, "asked with POST"),
        (get("/"), 404, "there is /inject"),
        (post("/mutate", json, "{}"), 404, "there is /inject"),
        (post("/ready", json, "{}"), 405, "asked with GET"),
        (post("/inject", "text/plain", "{}"), 415, "application/json"),
        (post("/inject", json, ""), 400, "no JSON"),
        (post("/inject", json, "[".repeat(1 << 20)), 400, "no JSON"),
        (post("/inject", json, "{}"), 400, "no AdmissionReview"),
        (post("/inject", json, vec![b' '; (3 << 20) + 1]), 413, "at most"),
    ];
    for (request, status, words) in table {
        let what = format!("{} {}", request.method(), request.uri());
        let answer = client.send(request).await;
        assert_eq!(answer.status(), status, "{what}");
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&body).contains(words), "{what}: {body:?}");
    }
    // A pod that makes no sense is refused, and nothing ends by it.
    for pod in [json!(null), json!("a pod?"), json!({"spec": []}), json!({"spec": {"containers": {"a": 1}}})]
    {
        let answer = client.review(&review("1", "team-a", &pod)).await;
        assert_eq!((&answer["allowed"], &answer["status"]["code"]), (&json!(false), &json!(422)), "{pod}");
    }
    let pod = json!({"metadata": {"name": "web"}, "spec": {"containers": [{"name": "web", "image": "x"}]}});
    assert!(client.review(&review("2", "team-a", &pod)).await["patch"].is_string());
}

#[tokio::test]
async fn many_at_once_are_answered_and_the_end_is_in_order() {
    let served = Served::start(Some(Arc::new(fresh()))).await;
    let pod = json!({"metadata": {"name": "web"}, "spec": {"containers": [{"name": "web", "image": "x"}]}});
    let mut asked = tokio::task::JoinSet::new();
    for connection in 0..20 {
        let mut client = Client::h2(&served).await;
        let ask = review(&connection.to_string(), "team-a", &pod);
        asked.spawn(async move {
            for _ in 0..10 {
                assert!(client.review(&ask).await["patch"].is_string());
            }
            client
        });
    }
    let open = asked.join_all().await;
    served.stop.cancel();
    // Idle connections keep nobody waiting.
    tokio::time::timeout(std::time::Duration::from_secs(3), served.task).await.unwrap().unwrap().unwrap();
    assert!(TcpStream::connect(served.address).await.is_err());
    drop(open);
}
