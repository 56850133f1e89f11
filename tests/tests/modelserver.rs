//! The model server as its clients see it: one answer on every wire, the accuracy that the training script measured,
//! errors that say what is wrong, and a clean end.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_inference::oip::{ErrorBody, InferResponse, ModelMetadata, ServerMetadata, grpc, rest};
use penstock_tests::digits::{self, Digits, Form};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/repository");
const PATIENCE: Duration = Duration::from_secs(30);

/// A running server; killed when it goes out of scope.
struct ModelServer {
    process: Child,
    address: SocketAddr,
}

impl ModelServer {
    async fn start(arguments: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_penstock-modelserver"))
            .args(["--repository", REPOSITORY, "--listen", "127.0.0.1:0", "--log-level", "warn"])
            .args(arguments)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let line = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
        let address = line.strip_prefix("listening on ").unwrap().parse().unwrap();
        Self { process, address }
    }

    async fn send(&self, request: Request<Bytes>) -> Response<Bytes> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut client, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = request.map(Full::new);
        request.headers_mut().insert("host", "digits".parse().unwrap());
        whole(client.send_request(request).await.unwrap()).await
    }

    async fn get(&self, path: &str) -> Response<Bytes> {
        self.send(Request::get(path).body(Bytes::new()).unwrap()).await
    }

    async fn post(&self, path: &str, body: &str) -> Response<Bytes> {
        self.send(Request::post(path).body(Bytes::copy_from_slice(body.as_bytes())).unwrap()).await
    }

    async fn metrics(&self) -> String {
        String::from_utf8(self.get("/metrics").await.body().to_vec()).unwrap()
    }

    async fn grpc(&self) -> grpc::Client<Channel> {
        grpc::Client::connect(format!("http://{}", self.address)).await.unwrap()
    }

    fn signal_term(&self) {
        let pid = self.process.id().unwrap().to_string();
        let sent = std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(sent.success());
    }
}

async fn whole(response: Response<hyper::body::Incoming>) -> Response<Bytes> {
    let (head, body) = response.into_parts();
    Response::from_parts(head, body.collect().await.unwrap().to_bytes())
}

fn decode(response: &Response<Bytes>) -> InferResponse {
    assert_eq!(response.status(), StatusCode::OK, "{:?}", response.body());
    let length = rest::header_length(response.headers()).unwrap();
    rest::decode_response(response.body(), length).unwrap()
}

fn sentence(response: &Response<Bytes>) -> String {
    serde_json::from_slice::<ErrorBody>(response.body()).unwrap().error
}

fn ask(digits: &Digits, images: std::ops::Range<usize>, form: Form, version: Option<&str>) -> Request<Bytes> {
    digits.rest(images, form, digits::path(version).parse().unwrap()).unwrap()
}

#[tokio::test]
async fn every_wire_gives_the_same_answer() {
    let server = ModelServer::start(&[]).await;
    let digits = digits::load();

    let json = server.send(ask(&digits, 0..3, Form::Json, Some("2"))).await;
    assert_eq!(json.headers()["content-type"], "application/json");
    let json = decode(&json);

    let binary = server.send(ask(&digits, 0..3, Form::Binary, Some("2"))).await;
    assert_eq!(binary.headers()["content-type"], "application/octet-stream");
    assert_eq!(decode(&binary), json);

    let mut client = server.grpc().await;
    let message = client.model_infer(digits.grpc(0..3, "2").unwrap()).await.unwrap().into_inner();
    assert_eq!(message.raw_output_contents.len(), 1);
    assert_eq!(grpc::decode_response(message).unwrap(), json);

    let typed = grpc::encode_request("digits", "", digits.request(0..3), grpc::Contents::Typed).unwrap();
    let message = client.model_infer(typed).await.unwrap().into_inner();
    assert_eq!(grpc::decode_response(message).unwrap(), json, "no version is the newest version");

    let mut raw =
        Request::post(digits::path(None)).body(digits.request(0..1).inputs[0].data.clone()).unwrap();
    raw.headers_mut().insert(&rest::HEADER_LENGTH, 0.into());
    let raw = decode(&server.send(raw).await);
    assert_eq!(raw.outputs[0].data, json.outputs[0].data.slice(..40));

    assert_eq!((json.model_name.as_str(), json.model_version.as_str()), ("digits", "2"));
    assert_eq!(json.outputs[0].shape, [3, 10]);
}

#[tokio::test]
async fn each_version_is_as_good_as_its_card_says() {
    let server = ModelServer::start(&["--threads", "2"]).await;
    let (digits, card) = (digits::load(), digits::card().unwrap());
    for (version, correct) in &card.correct {
        let all = 0..digits.count();
        let answer = decode(&server.send(ask(&digits, all.clone(), Form::Binary, Some(version))).await);
        assert_eq!(digits.right(all, &answer), *correct, "version {version}");
        let accuracy = *correct as f64 / digits.count() as f64;
        assert!((accuracy - card.accuracy[version]).abs() < 1e-4);
    }
    assert!(card.accuracy["2"] > card.accuracy["1"] + 0.02, "the versions can be told apart");
}

#[tokio::test]
async fn a_request_that_makes_no_sense_is_told_why() {
    let server = ModelServer::start(&["--only", "digits:1", "--max-body", "1", "--max-batch", "4"]).await;
    let (digits, path) = (digits::load(), digits::path(None));
    let input = |shape: &str, datatype: &str, data: &str| {
        format!(r#"{{"inputs":[{{"name":"image","shape":{shape},"datatype":"{datatype}","data":{data}}}]}}"#)
    };
    let zeros = format!("[{}]", vec!["0"; 64].join(","));
    for (body, expected) in [
        ("{".to_owned(), "the JSON does not parse as an inference message: "),
        (r#"{"inputs":[]}"#.to_owned(), r#"input "image" of model digits version 1 is missing"#),
        (
            input("[1,63]", "FP32", "[1]"),
            r#"input "image": shape [1, 63] has 63 elements, but the data has 1"#,
        ),
        (input("[64]", "FP32", &zeros), r#"input "image" has shape [64], but the model takes [-1, 64]"#),
        (input("[1,64]", "INT64", &zeros), r#"input "image" is INT64, but the model takes FP32"#),
        (
            input("[1,64]", "FLOAT", &zeros),
            r#"input "image": the datatype "FLOAT" is not one of the protocol's: "#,
        ),
        (input("[0,64]", "FP32", "[]"), "the batch has no rows"),
    ] {
        let answer = server.post(&path, &body).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{body}");
        assert!(sentence(&answer).starts_with(expected), "{}", sentence(&answer));
    }

    let mut asked = digits.request(0..1);
    asked.outputs[0].name = "probabilities".into();
    let body = rest::encode_request(&asked, false).unwrap().into_bytes();
    let answer = server.send(Request::post(&path).body(body).unwrap()).await;
    assert_eq!(sentence(&answer), r#"the model has no output "probabilities"; it gives logits"#);

    let answer = server.send(ask(&digits, 0..5, Form::Binary, None)).await;
    assert_eq!(sentence(&answer), "the batch has 5 rows, and at most 4 are taken");

    let answer = server.post(&path, &" ".repeat((1 << 20) + 1)).await;
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);

    let answer = server.send(ask(&digits, 0..1, Form::Json, Some("2"))).await;
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    assert_eq!(sentence(&answer), r#"model "digits" has no version "2" here; there is 1"#);
    let answer = server.post("/v2/models/cats/infer", "{}").await;
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    assert_eq!(sentence(&answer), r#"there is no model "cats" here; there is digits"#);
    assert_eq!(server.get("/v1/models").await.status(), StatusCode::NOT_FOUND);

    let mut client = server.grpc().await;
    let mut message = digits.grpc(0..1, "1").unwrap();
    message.inputs[0].shape = vec![1, 63];
    let status = client.model_infer(message).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert_eq!(
        status.message(),
        r#"input "image": FP32 of shape [1, 63] has 252 bytes, but the data has 256"#
    );
    let status = client.model_infer(digits.grpc(0..1, "2").unwrap()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn a_refused_message_does_not_end_the_stream() {
    let server = ModelServer::start(&[]).await;
    let digits = digits::load();
    let wrong = grpc::ModelInferRequest { model_name: "digits".into(), ..Default::default() };
    let messages = [digits.grpc(0..1, "1").unwrap(), wrong, digits.grpc(1..2, "2").unwrap()];
    let mut client = server.grpc().await;
    let mut answers = client.model_stream_infer(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let first = answers.message().await.unwrap().unwrap();
    assert_eq!(first.infer_response.unwrap().model_version, "1");
    let second = answers.message().await.unwrap().unwrap();
    assert_eq!(second.error_message, r#"input "image" of model digits version 2 is missing"#);
    let third = answers.message().await.unwrap().unwrap();
    assert_eq!(third.infer_response.unwrap().model_version, "2");
    assert_eq!(answers.message().await.unwrap(), None);
}

#[tokio::test]
async fn it_tells_what_it_is_and_what_it_did() {
    let server = ModelServer::start(&[]).await;
    let digits = digits::load();
    let metadata: ServerMetadata = serde_json::from_slice(server.get("/v2").await.body()).unwrap();
    assert_eq!((metadata.name.as_str(), metadata.extensions.len()), ("penstock-modelserver", 1));
    let model: ModelMetadata = serde_json::from_slice(server.get("/v2/models/digits").await.body()).unwrap();
    assert_eq!(model.versions, ["1", "2"]);
    assert_eq!((model.inputs[0].name.as_str(), &model.inputs[0].shape[..]), ("image", &[-1, 64][..]));
    assert_eq!((model.outputs[0].name.as_str(), &model.outputs[0].shape[..]), ("logits", &[-1, 10][..]));
    for path in [
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/digits/ready",
        "/v2/models/digits/versions/1/ready",
    ] {
        assert_eq!(server.get(path).await.status(), StatusCode::OK, "{path}");
    }
    let mut client = server.grpc().await;
    let live = client.server_live(grpc::pb::ServerLiveRequest {}).await.unwrap().into_inner();
    let ready = client.server_ready(grpc::pb::ServerReadyRequest {}).await.unwrap().into_inner();
    assert!(live.live && ready.ready);
    let request = grpc::pb::ModelMetadataRequest { name: "digits".into(), version: "1".into() };
    let told = client.model_metadata(request).await.unwrap().into_inner();
    assert_eq!(told, grpc::pb::ModelMetadataResponse::from(model));

    decode(&server.send(ask(&digits, 0..5, Form::Json, Some("1"))).await);
    decode(&server.send(ask(&digits, 0..2, Form::Binary, Some("1"))).await);
    server.post(&digits::path(Some("1")), r#"{"inputs":[]}"#).await;
    let page = server.metrics().await;
    for line in [
        "nv_inference_request_success{model=\"digits\",version=\"1\"} 2",
        "nv_inference_request_success{model=\"digits\",version=\"2\"} 0",
        "nv_inference_request_failure{model=\"digits\",version=\"1\",reason=\"OTHER\"} 1",
        "nv_inference_count{model=\"digits\",version=\"1\"} 7",
        "nv_inference_exec_count{model=\"digits\",version=\"1\"} 2",
        "nv_inference_pending_request_count{model=\"digits\",version=\"1\"} 0",
        "penstock_modelserver_simulated 0",
    ] {
        assert!(page.lines().any(|found| found == line), "{line} is not in\n{page}");
    }
}

#[tokio::test]
async fn a_simulated_delay_is_labelled_and_a_full_queue_refuses() {
    let server = ModelServer::start(&["--delay-model", "fixed=300ms,row=1ms", "--queue", "1"]).await;
    let digits = digits::load();
    let metadata = server.get("/v2").await;
    let metadata: ServerMetadata = serde_json::from_slice(metadata.body()).unwrap();
    assert_eq!(metadata.extensions[1], "simulated_delay(fixed=300ms,row=1ms)");

    let started = Instant::now();
    let asked = (0..3).map(|i| server.send(ask(&digits, i..i + 1, Form::Binary, None)));
    let answers = futures_util::future::join_all(asked).await;
    let mut statuses: Vec<_> = answers.iter().map(|answer| answer.status().as_u16()).collect();
    statuses.sort();
    // One runs and one waits; the third may come while the first is still in the queue.
    assert!(statuses == [200, 200, 503] || statuses == [200, 503, 503], "{statuses:?}");
    assert!(started.elapsed() >= Duration::from_millis(301));
    let refused = answers.iter().find(|answer| answer.status() == 503).unwrap();
    assert!(sentence(refused).starts_with("1 requests wait already"), "{}", sentence(refused));
}

#[tokio::test]
async fn sigterm_finishes_what_is_in_flight() {
    let mut server = ModelServer::start(&["--delay-model", "fixed=500ms"]).await;
    let digits = digits::load();
    // Over HTTP/1.1 and HTTP/2, and an idle connection that must not hold the server up.
    let idle = TcpStream::connect(server.address).await.unwrap();
    let mut client = server.grpc().await;
    let stream = TcpStream::connect(server.address).await.unwrap();
    let (mut h2, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let uri = format!("http://digits{}", digits::path(None)).parse().unwrap();
    let over_h2 = h2.send_request(digits.rest(0..1, Form::Json, uri).unwrap().map(Full::new));
    let over_h1 = server.send(ask(&digits, 0..1, Form::Json, None));
    let over_grpc = client.model_infer(digits.grpc(0..1, "").unwrap());
    let term = async {
        // One runs, two wait: all three are in flight.
        let waiting = "nv_inference_pending_request_count{model=\"digits\",version=\"2\"} 2\n";
        while !server.metrics().await.contains(waiting) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        server.signal_term();
    };
    let (over_h1, over_h2, over_grpc, ()) = tokio::join!(over_h1, over_h2, over_grpc, term);
    let answer = decode(&over_h1);
    assert_eq!(decode(&whole(over_h2.unwrap()).await), answer);
    assert_eq!(grpc::decode_response(over_grpc.unwrap().into_inner()).unwrap(), answer);
    let ended = timeout(PATIENCE, server.process.wait()).await.unwrap().unwrap();
    assert!(ended.success(), "{ended}");
    assert!(TcpStream::connect(server.address).await.is_err());
    drop(idle);
}

#[tokio::test]
async fn a_start_that_cannot_work_says_why() {
    for (arguments, expected) in [
        (&["--repository", "/nowhere"][..], "cannot read /nowhere"),
        (&["--repository", REPOSITORY, "--only", "digits:3"], "--only digits:3: there is no"),
        (&["--repository", REPOSITORY, "--delay-model", "quick"], "\"quick\" is not NAME=TIME"),
    ] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_penstock-modelserver")).args(arguments).output().await.unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && told.contains(expected), "{told}");
    }
}
