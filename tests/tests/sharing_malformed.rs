//! Malformed bodies among good neighbours, where requests share executions: who sends one is told what the server says
//! to it alone, over REST and over gRPC, and nobody else notices: the same bits, in the same executions, in time.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::HeaderMap;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_api::names::annotation;
use penstock_inference::oip::grpc::{self, Contents, ModelInferRequest};
use penstock_inference::oip::{InferRequest, Tensor, rest};
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::wire::{Message, Wire, get};
use penstock_tests::testkit::{PATIENCE, wait_until};
use prost::Message as _;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::Instant;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/repository");
const PATH: &str = "/v2/models/digits/versions/1/infer";
/// Nobody waits for a body that does not come in, for which the sidecar has ten seconds of patience.
const IN_TIME: Duration = Duration::from_secs(8);

/// A client, and the digits behind a sidecar that forms batches; an execution takes some time, as a GPU's would
/// (simulated).
struct Bed {
    mesh: Mesh,
    _server: Process,
    _folder: TempDir,
}

/// Whom a request is sent to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum To {
    Mesh,
    Server,
}

impl Bed {
    async fn start() -> Self {
        let mesh = Mesh::default()
            .pod("client", None)
            .service("digits", &[(annotation::BATCH, "max=32")])
            .pod("a", Some("digits"));
        let address = mesh.application("a").to_string();
        let folder = tempfile::tempdir().unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_penstock-modelserver"));
        let mut args = vec!["--repository", REPOSITORY, "--only", "digits:1", "--listen", &address];
        args.extend(["--delay-model", "fixed=50ms,row=0ms", "--queue", "1000", "--threads", "4"]);
        let server = Process::start("modelserver", program, &args, folder.path());
        let mesh = mesh.start().await;
        wait_until("the model server answers", PATIENCE, async || {
            get(mesh.application("a"), "/v2/health/ready").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        let bed = Self { mesh, _server: server, _folder: folder };
        wait_until("the sidecar has learnt what the model takes", PATIENCE, async || {
            let message = bed.rest(To::Mesh, &good(0), "penstock-batch: show\r\n").await;
            message.status() == 200 && message.head.get("penstock-batch").is_some()
        })
        .await;
        bed
    }

    async fn rest(&self, to: To, body: &Rest, headers: &str) -> Message {
        let address = match to {
            To::Mesh => self.mesh.outbound("client"),
            To::Server => self.mesh.application("a"),
        };
        let length = body.header.as_ref();
        let length = length.map(|length| format!("inference-header-content-length: {length}\r\n"));
        let head = format!(
            "POST {PATH} HTTP/1.1\r\nhost: digits.test\r\n{headers}{}content-length: {}\r\n\r\n",
            length.unwrap_or_default(),
            body.bytes.len()
        );
        Wire::connect(address).await.ask([head.as_bytes(), &body.bytes].concat()).await.unwrap()
    }

    /// Status and message as gRPC tells them, and the message itself.
    async fn grpc(&self, to: To, frame: &[u8], headers: &[(&'static str, &'static str)]) -> Told {
        let address = match to {
            To::Mesh => self.mesh.outbound("client"),
            To::Server => self.mesh.application("a"),
        };
        let stream = TcpStream::connect(address).await.unwrap();
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (mut client, connection) = handshake.await.unwrap();
        let connection = tokio::spawn(connection);
        let mut request = http::Request::post(format!("http://digits.test{}", grpc::MODEL_INFER))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::copy_from_slice(frame))).unwrap();
        let answer = client.send_request(request).await.unwrap();
        let (head, body) = answer.into_parts();
        let body = body.collect().await.unwrap();
        let trailers = body.trailers().cloned().unwrap_or_default();
        let said = |name: &str| {
            let of = |headers: &HeaderMap| Some(headers.get(name)?.to_str().unwrap().to_owned());
            of(&trailers).or_else(|| of(&head.headers))
        };
        let told = Told {
            status: said("grpc-status"),
            message: said("grpc-message").map(|message| decoded(&message)),
            batch: said("penstock-batch"),
            body: body.to_bytes(),
        };
        drop(client);
        connection.abort();
        told
    }

    async fn executions(&self) -> u64 {
        let page = get(self.mesh.application("a"), "/metrics").await.unwrap().text();
        let line = page.lines().find(|line| line.starts_with("nv_inference_exec_count{")).unwrap();
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    /// How many requests the sidecar has let pass since it did not understand them.
    async fn passed(&self) -> f64 {
        metric(self.mesh.admin("a"), "penstock_coalesce_passed_total", &[]).await
    }
}

/// A body over REST, and what the header says of it.
#[derive(Clone, Debug)]
struct Rest {
    bytes: Vec<u8>,
    header: Option<String>,
}

/// What a gRPC call came to.
#[derive(Clone, Debug, PartialEq)]
struct Told {
    status: Option<String>,
    message: Option<String>,
    batch: Option<String>,
    body: Bytes,
}

/// An image that no other seed has.
fn image(seed: u32) -> InferRequest {
    let pixels = (0..64).map(|at| ((at * 7 + seed * 13) % 17) as f32);
    InferRequest { inputs: vec![Tensor::fp32("image", vec![1, 64], pixels)], ..InferRequest::default() }
}

fn good(seed: u32) -> Rest {
    let body = rest::encode_request(&image(seed), true).unwrap();
    Rest { header: body.header_length.map(|length| length.to_string()), bytes: body.into_bytes().to_vec() }
}

fn message(seed: u32) -> ModelInferRequest {
    grpc::encode_request("digits", "1", image(seed), Contents::Raw).unwrap()
}

/// A message as a client reads it: which characters are percent-encoded is the server's choice (gRPC over HTTP/2).
fn decoded(message: &str) -> String {
    percent_encoding::percent_decode_str(message).decode_utf8_lossy().into_owned()
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat()
}

/// What is wrong, and a body that is wrong so. The last ones are read, and refused by the model.
fn malformed_rest() -> Vec<(&'static str, Rest)> {
    let json = |bytes: &[u8]| Rest { bytes: bytes.to_vec(), header: None };
    let input = |rest: &str| json(format!(r#"{{"inputs":[{{"name":"image",{rest}}}]}}"#).as_bytes());
    let pixels = format!("[{}0]", "0,".repeat(63));
    let sound = format!(r#""datatype":"FP32","shape":[1,64],"data":{pixels}"#);
    let good = good(1);
    let lies = |header: &str| Rest { header: Some(header.to_owned()), ..good.clone() };
    let cut = |by: usize| Rest { bytes: good.bytes[..good.bytes.len() - by].to_vec(), ..good.clone() };
    let longer = Rest { bytes: [&good.bytes[..], b"more"].concat(), ..good.clone() };
    let deep = format!(r#""datatype":"FP32","shape":[1,64],"data":{}"#, "[".repeat(100_000));
    vec![
        ("nothing", json(b"")),
        ("no JSON", json(b"nonsense")),
        ("JSON of something else", json(b"[1,2,3]")),
        ("cut JSON", json(br#"{"inputs":[{"name":"image","datatype":"FP32","shape":[1,6"#)),
        ("no text", json(b"{\"inputs\":[{\"name\":\"\xff\xfe\"}]}")),
        ("a header longer than the body", lies("1000000")),
        ("a header that ends early", lies("7")),
        ("a header that is no number", lies("many")),
        ("a raw body too short", Rest { bytes: vec![0; 10], header: Some("0".to_owned()) }),
        ("a tensor that was cut", cut(9)),
        ("bytes that nobody claims", longer),
        ("a shape of 2^60", input(r#""datatype":"FP32","shape":[1152921504606846976,64],"data":[1]"#)),
        (
            "a shape that overflows",
            input(r#""datatype":"FP32","shape":[9223372036854775807,9223372036854775807],"data":[1]"#),
        ),
        ("a negative shape", input(r#""datatype":"FP32","shape":[-1,64],"data":[1]"#)),
        ("no datatype of the protocol", input(r#""datatype":"FLOAT","shape":[1,64],"data":[1]"#)),
        ("nesting without end", input(&deep)),
        ("a number out of range", input(r#""datatype":"FP32","shape":[1,1],"data":[1e999]"#)),
        ("no number", input(r#""datatype":"FP32","shape":[1,1],"data":[NaN]"#)),
        ("data and a place", input(&format!(r#"{sound},"parameters":{{"shared_memory_region":"r"}}"#))),
        ("a place alone", {
            input(r#""datatype":"FP32","shape":[1,64],"parameters":{"shared_memory_region":"r"}"#)
        }),
        (
            "an input that is there twice",
            json(
                format!(r#"{{"inputs":[{{"name":"image",{sound}}},{{"name":"image",{sound}}}]}}"#).as_bytes(),
            ),
        ),
        ("another width", input(r#""datatype":"FP32","shape":[1,3],"data":[1,2,3]"#)),
        ("another input", json(format!(r#"{{"inputs":[{{"name":"picture",{sound}}}]}}"#).as_bytes())),
    ]
}

fn malformed_grpc() -> Vec<(&'static str, Vec<u8>)> {
    let changed = |change: &dyn Fn(&mut ModelInferRequest)| {
        let mut changed = message(1);
        change(&mut changed);
        framed(&changed.encode_to_vec())
    };
    let good = framed(&message(1).encode_to_vec());
    vec![
        ("nothing", vec![]),
        ("half a prefix", vec![0, 0, 0]),
        ("no protobuf", framed(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")),
        ("a message that was cut", good[..good.len() - 9].to_vec()),
        ("compressed, it says", [&[1][..], &good[1..]].concat()),
        ("raw contents for nobody", changed(&|message| message.raw_input_contents.push(Bytes::new()))),
        ("raw contents too short", changed(&|message| message.raw_input_contents[0].truncate(255))),
        ("a shape of 2^60", changed(&|message| message.inputs[0].shape = vec![1 << 60, 64])),
        ("a shape that overflows", changed(&|message| message.inputs[0].shape = vec![i64::MAX, i64::MAX])),
        ("no datatype of the protocol", changed(&|message| message.inputs[0].datatype = "FLOAT".into())),
        (
            "an input that is there twice",
            changed(&|message| {
                message.inputs.push(message.inputs[0].clone());
                message.raw_input_contents.push(message.raw_input_contents[0].clone());
            }),
        ),
        ("another input", changed(&|message| message.inputs[0].name = "picture".into())),
    ]
}

fn outputs(message: &Message) -> Vec<Tensor> {
    assert_eq!(message.status(), 200, "{message:?}");
    let length = message.head.get("inference-header-content-length").map(|length| length.parse().unwrap());
    rest::decode_response(&message.body.clone().into(), length).unwrap().outputs
}

fn grpc_outputs(told: &Told) -> Vec<Tensor> {
    assert_eq!(told.status.as_deref(), Some("0"), "{told:?}");
    let message = grpc::ModelInferResponse::decode(told.body.slice(5..)).unwrap();
    grpc::decode_response(message).unwrap().outputs
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_bodies_are_answered_as_alone_and_their_neighbours_notice_nothing() {
    const GOOD: u32 = 24;
    let bed = Bed::start().await;
    let mut alone = Vec::new();
    for seed in 0..GOOD {
        alone.push(outputs(&bed.rest(To::Mesh, &good(seed), "penstock-batch: off\r\n").await));
    }
    let (rest_bodies, frames) = (malformed_rest(), malformed_grpc());
    let before = (bed.executions().await, bed.passed().await);

    // One that never comes in whole: it is held for as long as it is open, and nobody waits for it.
    let mut open = bed.mesh.client("client").await;
    let half =
        format!("POST {PATH} HTTP/1.1\r\nhost: digits.test\r\ncontent-length: 1000\r\n\r\n{{\"inputs\":");
    open.send(half).await.unwrap();

    let begun = Instant::now();
    // Half of the good ones over each wire, and twice as many that are not.
    let bed = &bed;
    let neighbours = join_all((0..GOOD).map(async |seed| {
        let (outputs, shown) = if seed % 2 == 0 {
            let message = bed.rest(To::Mesh, &good(seed), "penstock-batch: show\r\n").await;
            (outputs(&message), message.head.get("penstock-batch").map(str::to_owned))
        } else {
            let frame = framed(&message(seed).encode_to_vec());
            let told = bed.grpc(To::Mesh, &frame, &[("penstock-batch", "show")]).await;
            (grpc_outputs(&told), told.batch)
        };
        (outputs, shown.unwrap(), begun.elapsed())
    }));
    let of_rest = join_all(rest_bodies.iter().map(|(_, body)| bed.rest(To::Mesh, body, "")));
    let of_grpc = join_all(frames.iter().map(|(_, frame)| bed.grpc(To::Mesh, frame, &[])));
    let (neighbours, of_rest, of_grpc) = tokio::join!(neighbours, of_rest, of_grpc);
    let executions = bed.executions().await - before.0;
    // The proxy's page of metrics is up to a second old.
    wait_until("what is not understood has passed and is counted", PATIENCE, async || {
        bed.passed().await > before.1
    })
    .await;

    let mut largest = 0;
    for (seed, (outputs, shown, took)) in neighbours.iter().enumerate() {
        assert_eq!(outputs, &alone[seed], "request {seed}");
        assert!(*took < IN_TIME, "request {seed} took {took:?}");
        largest = largest.max(shown.split_once(";rows=").unwrap().1.parse::<u32>().unwrap());
    }
    assert!(largest > 4, "the good ones did share: {largest} rows");
    assert!(executions < u64::from(GOOD), "{executions} executions");

    for ((what, body), got) in rest_bodies.iter().zip(&of_rest) {
        let direct = bed.rest(To::Server, body, "").await;
        assert_eq!((got.status(), got.text()), (direct.status(), direct.text()), "{what}");
        assert_eq!((got.status(), got.reason()), (400, None), "{what}: {}", got.text());
        let said: penstock_inference::oip::ErrorBody = serde_json::from_slice(&got.body).unwrap();
        assert!(said.error.len() < 1024, "{what}: {}", said.error);
    }
    for ((what, frame), got) in frames.iter().zip(&of_grpc) {
        let direct = bed.grpc(To::Server, frame, &[]).await;
        assert_eq!(got, &direct, "{what}");
        assert!(got.status.as_deref().is_some_and(|status| status != "0"), "{what}: {got:?}");
    }
    drop(open);
}
