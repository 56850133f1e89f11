//! A client of the Open Inference Protocol that speaks all of its forms, through a mesh or to a server directly.
//!
//! In: an [`Ask`], which says what is asked and how it travels. Out: an [`Answer`] with all that a client can see of it. It
//! judges nothing: two answers can be compared as they are.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use penstock_inference::oip::grpc::{self, Contents};
use penstock_inference::oip::{InferRequest, InferResponse, rest};
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};

use super::mesh::{GRPC, Mesh, NAMESPACE};
use super::wire::Wire;

/// How a request travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// Over REST; of each input, whether it stands behind the JSON.
    Rest(Vec<bool>),
    /// Over gRPC.
    Grpc(Contents),
}

/// What is asked, and how.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The model.
    pub model: String,
    /// Its version; empty: the server chooses.
    pub version: String,
    /// What of it.
    pub request: InferRequest,
    /// How.
    pub form: Form,
    /// Headers besides.
    pub headers: Vec<(&'static str, String)>,
}

/// What came back.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The answer, or the status (of HTTP or of gRPC) and the words of a refusal.
    pub said: Result<InferResponse, (u16, String)>,
    /// The outputs, by their names, that came as bytes: behind the JSON, or as raw contents.
    pub as_bytes: Vec<String>,
    /// `penstock-…` headers.
    pub shown: BTreeMap<String, String>,
}

impl Answer {
    /// The answer; panics if it was refused.
    pub fn given(&self) -> &InferResponse {
        self.said.as_ref().unwrap_or_else(|(status, words)| panic!("refused with {status}: {words}"))
    }

    /// With how many rows it was executed, as `penstock-batch: show` has it told.
    pub fn rows(&self) -> Option<u64> {
        self.shown.get("penstock-batch")?.split_once(";rows=")?.1.parse().ok()
    }
}

/// A client: a connection for REST, and one for gRPC which clones share.
#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    host: String,
    /// Servers close connections when they like; a sidecar has to keep them.
    keeps: bool,
    wire: Option<Wire>,
    grpc: Option<grpc::Client<Channel>>,
}

impl Client {
    /// Of a server itself.
    pub fn of(http: SocketAddr, grpc: Option<SocketAddr>) -> Self {
        let endpoint = grpc.map(|grpc| Endpoint::from_shared(format!("http://{grpc}")).unwrap());
        Self {
            address: http,
            host: http.to_string(),
            keeps: false,
            wire: None,
            grpc: endpoint.map(|at| stub(&at)),
        }
    }

    /// Of a Service, as an application in a pod of a mesh.
    pub fn through(mesh: &Mesh, pod: &str, service: &str) -> Self {
        let address = mesh.outbound(pod);
        let host = format!("{service}.{NAMESPACE}");
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let endpoint = endpoint.origin(format!("http://{host}:{GRPC}").parse().unwrap());
        Self { address, host, keeps: true, wire: None, grpc: Some(stub(&endpoint)) }
    }

    /// Another, whose gRPC goes over the same connection.
    pub fn another(&self) -> Self {
        let (host, grpc) = (self.host.clone(), self.grpc.clone());
        Self { address: self.address, host, keeps: self.keeps, wire: None, grpc }
    }

    /// Sends a request over REST and leaves after `stay` without waiting for more. Whether the answer had come by then.
    pub async fn leave(&mut self, ask: &Ask, behind: &[bool], stay: Duration) -> io::Result<bool> {
        let mut wire = match self.wire.take() {
            Some(wire) => wire,
            None => Wire::connect(self.address).await,
        };
        wire.send(rest_request(ask, behind, &self.host)).await?;
        Ok(tokio::time::timeout(stay, wire.response()).await.is_ok())
    }

    /// Whether nothing more comes over REST than was asked for.
    pub async fn is_silent(&mut self) -> bool {
        match &mut self.wire {
            Some(wire) => wire.is_silent(Duration::from_millis(50)).await,
            None => true,
        }
    }

    /// Asks.
    pub async fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        match &ask.form {
            Form::Rest(behind) => self.ask_rest(ask, behind).await,
            Form::Grpc(contents) => Ok(self.ask_grpc(ask, *contents).await),
        }
    }

    async fn ask_rest(&mut self, ask: &Ask, behind: &[bool]) -> io::Result<Answer> {
        // Whoever is dropped in the middle leaves no connection behind on which an answer to another question comes.
        let mut wire = match self.wire.take() {
            Some(wire) => wire,
            None => Wire::connect(self.address).await,
        };
        let message = wire.ask(rest_request(ask, behind, &self.host)).await?;
        self.wire = self.keeps.then_some(wire);
        let shown = message.head.headers.iter().filter(|(name, _)| name.starts_with("penstock-"));
        let shown = shown.cloned().collect();
        if message.status() != 200 {
            let said = Err((message.status(), message.text()));
            return Ok(Answer { said, as_bytes: Vec::new(), shown });
        }
        let length = message.head.get("inference-header-content-length").map(|text| text.parse().unwrap());
        let body = Bytes::from(message.body);
        let said = rest::decode_response(&body, length)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&body)));
        let head: Value = serde_json::from_slice(&body[..length.unwrap_or(body.len())]).unwrap();
        let outputs = head["outputs"].as_array().unwrap().iter();
        let outputs = outputs.filter(|output| output["parameters"]["binary_data_size"].is_u64());
        let mut as_bytes: Vec<_> =
            outputs.map(|output| output["name"].as_str().unwrap().to_owned()).collect();
        as_bytes.sort();
        Ok(Answer { said: Ok(said), as_bytes, shown })
    }

    async fn ask_grpc(&mut self, ask: &Ask, contents: Contents) -> Answer {
        let message = grpc::encode_request(&ask.model, &ask.version, ask.request.clone(), contents).unwrap();
        let mut request = tonic::Request::new(message);
        for (name, value) in &ask.headers {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        let stub = self.grpc.as_mut().unwrap();
        let (said, metadata, raw) = match stub.model_infer(request).await {
            Ok(response) => {
                let (metadata, message, _) = response.into_parts();
                let raw = !message.raw_output_contents.is_empty();
                (Ok(grpc::decode_response(message).unwrap()), metadata, raw)
            }
            Err(status) => {
                let said = Err((status.code() as u16, status.message().to_owned()));
                (said, status.metadata().clone(), false)
            }
        };
        let shown = metadata.into_headers();
        let shown = shown.iter().filter(|(name, _)| name.as_str().starts_with("penstock-"));
        let shown = shown.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()));
        let all = said.iter().flat_map(|answer: &InferResponse| &answer.outputs);
        let mut as_bytes: Vec<_> =
            if raw { all.map(|output| output.name.clone()).collect() } else { Vec::new() };
        as_bytes.sort();
        Answer { said, as_bytes, shown: shown.collect() }
    }
}

fn stub(endpoint: &Endpoint) -> grpc::Client<Channel> {
    grpc::Client::new(endpoint.connect_lazy()).max_decoding_message_size(usize::MAX)
}

/// A whole request over HTTP/1.1, some inputs in the JSON and some behind it.
fn rest_request(ask: &Ask, behind: &[bool], host: &str) -> Vec<u8> {
    let (mut inputs, mut data) = (Vec::new(), Vec::new());
    for (at, input) in ask.request.inputs.iter().enumerate() {
        let binary = behind.get(at).copied().unwrap_or(false);
        let alone = InferRequest { inputs: vec![input.clone()], ..InferRequest::default() };
        let body = rest::encode_request(&alone, binary).unwrap();
        let head: Value = serde_json::from_slice(&body.parts[0]).unwrap();
        inputs.push(head["inputs"][0].clone());
        data.extend(body.parts.into_iter().skip(1));
    }
    let mut head = json!({ "inputs": inputs });
    if let Some(id) = &ask.request.id {
        head["id"] = json!(id);
    }
    if !ask.request.parameters.is_empty() {
        head["parameters"] = json!(ask.request.parameters);
    }
    if !ask.request.outputs.is_empty() {
        head["outputs"] = json!(ask.request.outputs);
    }
    let head = head.to_string();
    let length = head.len() + data.iter().map(Bytes::len).sum::<usize>();
    let (kind, header_length) = match data.is_empty() {
        true => ("application/json", String::new()),
        false => ("application/octet-stream", format!("inference-header-content-length: {}\r\n", head.len())),
    };
    let version = if ask.version.is_empty() { String::new() } else { format!("/versions/{}", ask.version) };
    let more: String = ask.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let first = format!(
        "POST /v2/models/{}{version}/infer HTTP/1.1\r\nhost: {host}\r\ncontent-type: {kind}\r\n{header_length}{more}\
         content-length: {length}\r\n\r\n{head}",
        ask.model
    );
    data.iter().fold(first.into_bytes(), |mut whole, piece| {
        whole.extend_from_slice(piece);
        whole
    })
}
