//! One execution: a request of the proxy's own to the model server, and the answer, whole.
//!
//! In: where the server is, in which form it is asked, and an [`InferRequest`]. Out: an [`InferResponse`] whose tensors
//! are slices of the body that came. Can go wrong: the server says what is wrong ([`Trouble::Model`]), or cannot be
//! reached or understood ([`Trouble::Way`]). The request goes out as parts that are never joined. Dropping the call
//! closes its connection, or resets its stream, which is how the server learns that nobody waits.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, TE, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use penstock_api::Reason;
use penstock_inference::oip::batch::Joined;
use penstock_inference::oip::grpc::{self, MODEL_INFER};
use penstock_inference::oip::{self, InferRequest, InferResponse, Parameter, rest};

use super::wire::{self, ModelError};
use crate::body::RequestBody;
use crate::config::{Cluster, Endpoint};
use crate::failure::Failure;
use crate::send::{Lease, STALE};
use crate::worker::Worker;

/// The most that an answer may have, bytes.
pub const MAX_ANSWER: usize = 256 << 20;

/// How a model server is asked.
#[derive(Clone, Debug)]
pub struct Way {
    /// The application, behind one of the pod's ports.
    pub cluster: Arc<Cluster>,
    /// Over HTTP/2, and for tensors that means over gRPC; else HTTP/1.1.
    pub http2: bool,
}

impl Way {
    /// The application itself.
    pub fn endpoint(&self) -> Result<Arc<Endpoint>, Failure> {
        self.cluster.endpoints().first().map(Arc::clone).ok_or_else(|| {
            Failure::unprocessed(Reason::NoEndpoint, format!("{} has no address", self.cluster.service))
        })
    }
}

/// Why there is no answer.
#[derive(Clone, Debug)]
pub enum Trouble {
    /// The model, or its server, said so.
    Model(ModelError),
    /// The way to the server, or what came over it.
    Way(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Way(failure)
    }
}

/// Has a model, of that name and version, asked. `binary`: the server takes tensors behind the JSON.
pub async fn infer(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&str, &str),
    request: Joined,
    headers: &HeaderMap,
    binary: bool,
) -> Result<Answered, Trouble> {
    let mut outgoing =
        if way.http2 { over_grpc(model, &request)? } else { over_rest(model, request, binary)? };
    add(&mut outgoing.headers, headers);
    let answer = whole(worker, way, outgoing).await?;
    Ok(Answered { response: read(way, &answer)?, headers: answer.headers })
}

/// What a model answered, and the headers with which its server did.
#[derive(Debug)]
pub struct Answered {
    /// The answer.
    pub response: InferResponse,
    /// The headers.
    pub headers: HeaderMap,
}

/// A request whose tensors are in shared memory already.
pub fn placed(model: (&str, &str), head: &InferRequest, headers: &HeaderMap) -> Result<Outgoing, Failure> {
    let body = rest::encode_request(head, true)
        .map_err(|error| Failure::unprocessed(Reason::BadRequest, error.to_string()))?;
    let mut outgoing = posted(model, body);
    add(&mut outgoing.headers, headers);
    Ok(outgoing)
}

/// Adds what is not said yet: how the body is to be read is ours to say, whatever headers the configuration names.
fn add(headers: &mut HeaderMap, more: &HeaderMap) {
    for name in more.keys() {
        if !headers.contains_key(name) {
            for value in more.get_all(name) {
                headers.append(name, value.clone());
            }
        }
    }
}

/// What a request of our own is made of; it can be made anew when a connection turns out to be closed.
#[derive(Debug)]
pub struct Outgoing {
    /// `GET` or `POST`.
    pub method: Method,
    /// The path.
    pub path: String,
    /// Besides the host and the length.
    pub headers: HeaderMap,
    /// The body.
    pub parts: VecDeque<Bytes>,
}

fn over_rest(model: (&str, &str), mut request: Joined, binary: bool) -> Result<Outgoing, Failure> {
    let body = if binary {
        binary_outputs(&mut request.head);
        request.rest()
    } else {
        rest::encode_request(&request.whole(), false)
    };
    let body = body.map_err(|error| Failure::unprocessed(Reason::BadRequest, error.to_string()))?;
    Ok(posted(model, body))
}

/// Asks for outputs behind the JSON. Triton heeds what is said of all of them only where none is named.
pub fn binary_outputs(head: &mut InferRequest) {
    if head.outputs.is_empty() {
        head.parameters.insert("binary_data_output".to_owned(), Parameter::Bool(true));
    }
    for output in &mut head.outputs {
        output.parameters.insert("binary_data".to_owned(), Parameter::Bool(true));
    }
}

fn posted((model, version): (&str, &str), body: rest::Body) -> Outgoing {
    let mut headers = HeaderMap::with_capacity(6);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(body.content_type()));
    if let Some(length) = body.header_length {
        headers.insert(&rest::HEADER_LENGTH, length.into());
    }
    let path = match version {
        "" => format!("/v2/models/{model}/infer"),
        version => format!("/v2/models/{model}/versions/{version}/infer"),
    };
    Outgoing { method: Method::POST, path, headers, parts: body.parts.into() }
}

fn over_grpc((model, version): (&str, &str), request: &Joined) -> Result<Outgoing, Failure> {
    let frames = request
        .grpc_frames(model, version)
        .map_err(|error| Failure::unprocessed(Reason::BadRequest, error.to_string()))?;
    Ok(called(MODEL_INFER, frames.into()))
}

/// A unary call over gRPC, of a message in its frame.
pub fn called(path: &str, parts: VecDeque<Bytes>) -> Outgoing {
    let mut headers = HeaderMap::with_capacity(6);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    Outgoing { method: Method::POST, path: path.to_owned(), headers, parts }
}

/// An answer, whole.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, joined if it came in pieces.
    pub body: Bytes,
    /// The trailers.
    pub trailers: Option<HeaderMap>,
}

/// Sends a request of our own and takes in the whole answer.
pub async fn whole(worker: &Rc<Worker>, way: &Way, outgoing: Outgoing) -> Result<Answer, Failure> {
    let endpoint = way.endpoint()?;
    let (response, _lease) = send(worker, way, &endpoint, &outgoing).await?;
    let (parts, body) = response.into_parts();
    let (body, trailers) = collect(body, &endpoint).await?;
    Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body, trailers })
}

/// The same, of a server that gets no longer than `patience` to answer.
pub async fn within(
    patience: Duration,
    worker: &Rc<Worker>,
    way: &Way,
    outgoing: Outgoing,
) -> Result<Answer, Failure> {
    let late = format!("no answer to {} within {patience:?}", outgoing.path);
    let asked = tokio::time::timeout(patience, whole(worker, way, outgoing)).await;
    asked.unwrap_or_else(|_| Err(Failure::new(Reason::RequestTimeout, late)))
}

/// Sends a request of our own; the lease is to be held until the body has been read.
pub async fn send(
    worker: &Rc<Worker>,
    way: &Way,
    endpoint: &Arc<Endpoint>,
    outgoing: &Outgoing,
) -> Result<(Response<Incoming>, Lease), Failure> {
    let (cluster, policy) = (&way.cluster, way.cluster.policy());
    let pool = worker.pools.of(endpoint);
    let mut stale = 0;
    loop {
        let (error, back) = if way.http2 {
            let (mut sender, lease) = pool.http2(worker, endpoint, cluster, &policy).await?;
            match sender.try_send_request(request(endpoint, outgoing, true)?).await {
                Ok(response) => return Ok((response, lease)),
                Err(mut error) => (error.error().to_string(), error.take_message().is_some()),
            }
        } else {
            let mut sender = pool.http1(worker, endpoint, cluster, &policy).await?;
            match sender.try_send_request(request(endpoint, outgoing, false)?).await {
                Ok(response) => return Ok((response, Lease::Http1(Some(sender), pool))),
                Err(mut error) => (error.error().to_string(), error.take_message().is_some()),
            }
        };
        stale += 1;
        if !back || stale > STALE {
            let story =
                format!("{} at {} closed before it answered: {error}", endpoint.name, endpoint.address);
            return Err(Failure { unprocessed: back, ..Failure::new(Reason::UpstreamReset, story) });
        }
    }
}

fn request(
    endpoint: &Endpoint,
    outgoing: &Outgoing,
    absolute: bool,
) -> Result<Request<RequestBody>, Failure> {
    let uri = match absolute {
        true => format!("http://{}{}", endpoint.address, outgoing.path).parse::<Uri>(),
        false => outgoing.path.parse(),
    };
    let uri = uri.map_err(|_| Failure::unprocessed(Reason::BadRequest, "the model's name is no path"))?;
    let body = match outgoing.parts.is_empty() {
        true => RequestBody::Empty,
        false => RequestBody::Parts(outgoing.parts.clone()),
    };
    let mut request = Request::new(body);
    *request.method_mut() = outgoing.method.clone();
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    headers.clone_from(&outgoing.headers);
    headers.entry(ACCEPT).or_insert(HeaderValue::from_static("*/*"));
    if absolute {
        headers.remove(HOST);
    } else if let Ok(host) = HeaderValue::try_from(endpoint.address.to_string()) {
        headers.entry(HOST).or_insert(host);
    }
    if !outgoing.parts.is_empty() {
        let length: usize = outgoing.parts.iter().map(Bytes::len).sum();
        headers.insert(CONTENT_LENGTH, length.into());
    }
    Ok(request)
}

async fn collect(mut body: Incoming, endpoint: &Endpoint) -> Result<(Bytes, Option<HeaderMap>), Failure> {
    let (mut pieces, mut length, mut trailers) = (Vec::new(), 0, None);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broke_off(endpoint, &error))?;
        match frame.into_data() {
            Ok(data) => {
                length += data.len();
                if length > MAX_ANSWER {
                    let story = format!("{} answers with more than {MAX_ANSWER} bytes", endpoint.name);
                    return Err(Failure::new(Reason::UpstreamProtocol, story));
                }
                pieces.push(data);
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok((oip::whole(pieces), trailers))
}

/// What it is when a response breaks off.
pub fn broke_off(endpoint: &Endpoint, error: &hyper::Error) -> Failure {
    let story = format!("{} closed in the middle of its response: {error}", endpoint.name);
    Failure::new(Reason::UpstreamIncomplete, story)
}

/// Reads an answer in the form in which the server was asked.
pub fn read(way: &Way, answer: &Answer) -> Result<InferResponse, Trouble> {
    if way.http2 { read_grpc(way, answer) } else { read_rest(way, answer, |_| None) }
}

/// A client's own request, as it came.
pub fn original(request: &Request<RequestBody>, body: impl Into<VecDeque<Bytes>>) -> Outgoing {
    let mut headers = request.headers().clone();
    headers.remove(CONTENT_LENGTH);
    headers.remove(TRANSFER_ENCODING);
    let host = request.uri().authority().and_then(|host| HeaderValue::try_from(host.as_str()).ok());
    if let Some(host) = host {
        headers.insert(HOST, host);
    }
    let path = request.uri().path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
    Outgoing { method: request.method().clone(), path, headers, parts: body.into() }
}

/// The same, where its answer is to be read here: not compressed, whatever the client could read.
pub fn original_to_be_read(request: &Request<RequestBody>, body: impl Into<VecDeque<Bytes>>) -> Outgoing {
    let mut outgoing = original(request, body);
    outgoing.headers.remove(ACCEPT_ENCODING);
    outgoing.headers.remove("grpc-accept-encoding");
    outgoing
}

/// Reads an answer over REST; `place` says where the server has put an output, by its name.
pub fn read_rest(
    way: &Way,
    answer: &Answer,
    place: impl Fn(&str) -> Option<Bytes>,
) -> Result<InferResponse, Trouble> {
    if answer.status != 200 {
        return Err(Trouble::Model(ModelError::of_rest(answer.status, &answer.headers, &answer.body)));
    }
    let length = rest::header_length(&answer.headers);
    length
        .and_then(|length| rest::decode_placed(&answer.body, length, place))
        .map_err(|error| strange(way, &error.to_string()))
}

fn read_grpc(way: &Way, answer: &Answer) -> Result<InferResponse, Trouble> {
    let message: grpc::ModelInferResponse = message(way, answer)?;
    grpc::decode_response(message).map_err(|error| strange(way, &error.to_string()))
}

/// The message with which a unary call over gRPC was answered.
pub fn message<M: prost::Message + Default>(way: &Way, answer: &Answer) -> Result<M, Trouble> {
    let status = |headers: &HeaderMap| headers.get("grpc-status")?.to_str().ok()?.parse::<u8>().ok();
    let said = answer.trailers.as_ref().filter(|trailers| status(trailers).is_some());
    let said = said.unwrap_or(&answer.headers);
    match status(said) {
        Some(0) => {}
        Some(code) => {
            let message = said.get("grpc-message").map_or(&b""[..], HeaderValue::as_bytes);
            let message = percent_encoding::percent_decode(message).decode_utf8_lossy().into_owned();
            return Err(Trouble::Model(ModelError::of_grpc(code, message)));
        }
        None => return Err(strange(way, &format!("status {} and no grpc-status", answer.status))),
    }
    let message = wire::unframed(&answer.body).ok_or_else(|| strange(way, "no whole message"))?;
    M::decode(message).map_err(|error| strange(way, &error.to_string()))
}

fn strange(way: &Way, what: &str) -> Trouble {
    let story =
        format!("{} answered with something that is no answer of a model: {what}", way.cluster.service);
    Trouble::Way(Failure::new(Reason::UpstreamProtocol, story))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_server_compresses_what_is_read_here() {
        let mut request = Request::new(RequestBody::Empty);
        for name in ["accept-encoding", "grpc-accept-encoding", "x-tone"] {
            request.headers_mut().insert(name, HeaderValue::from_static("gzip"));
        }
        assert_eq!(original(&request, [Bytes::new()]).headers.len(), 3);
        let headers = original_to_be_read(&request, [Bytes::new()]).headers;
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-tone"]);
    }

    #[test]
    fn an_execution_has_the_headers_that_decide_and_says_itself_how_its_body_is_read() {
        let said = [("content-type", "text/plain"), ("x-tone", "warm"), ("x-tone", "dry")];
        let mut headers = HeaderMap::new();
        for (name, value) in said {
            headers.append(name, value.parse().unwrap());
        }
        let placed = placed(("m", ""), &InferRequest::default(), &headers).unwrap();
        assert_eq!(placed.headers["content-type"], "application/json");
        assert_eq!(placed.headers.get_all("x-tone").iter().collect::<Vec<_>>(), ["warm", "dry"]);
    }
}
