//! How a client asks a model for tensors, and how it is answered: the Open Inference Protocol over REST and over gRPC.
//!
//! In: the head of a request and its whole body. Out: an [`Asked`], or nothing where the request is not understood and
//! passes untouched. The other way a model's answer, or its error, becomes a response in the form of the request.

use std::rc::Rc;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri};
use penstock_inference::oip::grpc::MODEL_INFER;
use penstock_inference::oip::{self, Datatype, InferRequest, InferResponse, grpc, rest};
use prost::Message as _;

use crate::answer;
use crate::body::{ResponseBody, Share};
use crate::exchange::Exchange;

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// JSON, with or without binary tensors.
    Rest,
    /// `ModelInfer`; how the answer's tensors are written.
    Grpc(grpc::Contents),
}

impl Form {
    /// The form of a request by its head, if it can be an inference request at all. Only at the protocol's own paths: what
    /// else a path or a query says could not be said for several at once.
    pub fn of(method: &Method, uri: &Uri, headers: &HeaderMap) -> Option<Self> {
        if *method != Method::POST || headers.contains_key(CONTENT_ENCODING) {
            return None;
        }
        let path = uri.path();
        if path == MODEL_INFER {
            let encoded = headers.get("grpc-encoding").is_some_and(|value| value != "identity");
            return (!encoded).then_some(Self::Grpc(grpc::Contents::Raw));
        }
        // A name with escapes reads like another's over gRPC, where there are none.
        let plain = path.starts_with("/v2/models/") && !path.contains('%') && uri.query().is_none();
        (plain && path.ends_with("/infer") && oip::prefix::of_path(path).is_some()).then_some(Self::Rest)
    }

    /// The same where inputs have to be made: such a request is asked anew, with none of its query, and shared with nobody.
    pub fn with_query(method: &Method, uri: &Uri, headers: &HeaderMap) -> Option<Self> {
        let coded = headers.get(CONTENT_ENCODING).is_some_and(|coding| *coding != "identity");
        let path = uri.path();
        let plain =
            *method == Method::POST && !coded && path.starts_with("/v2/models/") && !path.contains('%');
        (plain && path.ends_with("/infer") && oip::prefix::of_path(path).is_some()).then_some(Self::Rest)
    }
}

/// A request for tensors.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What the client speaks.
    pub form: Form,
    /// The model.
    pub model: String,
    /// Its version; empty: the server chooses.
    pub version: String,
    /// What is asked.
    pub request: InferRequest,
}

impl Asked {
    /// The server answers with raw contents whatever it is asked with, as Triton does.
    pub fn answers_raw(&mut self) {
        if let Form::Grpc(contents) = &mut self.form {
            *contents = grpc::Contents::Raw;
        }
    }
}

/// Reads a request whose body is whole; `None`: it is not understood.
pub fn read(form: Form, path: &str, headers: &HeaderMap, body: &Bytes) -> Option<Asked> {
    match form {
        Form::Rest => {
            let (model, version) = oip::prefix::of_path(path)?;
            let length = rest::header_length(headers).ok()?;
            // A body that is nothing but a tensor says nothing of its shape.
            let request = rest::decode_request(body, length).ok().filter(|_| length != Some(0))?;
            let version = version.unwrap_or_default().to_owned();
            Some(Asked { form, model: model.to_owned(), version, request })
        }
        Form::Grpc(_) => {
            let mut message = grpc::ModelInferRequest::decode(unframed(body)?).ok()?;
            let model = std::mem::take(&mut message.model_name);
            let version = std::mem::take(&mut message.model_version);
            let raw = !message.raw_input_contents.is_empty();
            let contents = if raw { grpc::Contents::Raw } else { grpc::Contents::Typed };
            let request = grpc::decode_request(message).ok()?;
            Some(Asked { form: Form::Grpc(contents), model, version, request })
        }
    }
}

/// Reads a request over REST whose tensors lie in a place each; `None`: it is not understood.
pub fn read_pieces(path: &str, json: &[u8], data: Vec<Bytes>) -> Option<Asked> {
    let (model, version) = oip::prefix::of_path(path)?;
    let request = rest::decode_pieces(json, data).ok()?;
    let version = version.unwrap_or_default().to_owned();
    Some(Asked { form: Form::Rest, model: model.to_owned(), version, request })
}

/// The one message of a unary call (gRPC over HTTP/2, "Length-Prefixed-Message"), if it is there whole and plain.
pub fn unframed(body: &Bytes) -> Option<Bytes> {
    let (head, _) = body.split_first_chunk::<5>()?;
    let [compressed, length @ ..] = *head;
    let length = u32::from_be_bytes(length) as usize;
    (compressed == 0 && body.len() == 5 + length).then(|| body.slice(5..))
}

/// A message with its prefix.
pub fn framed(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(5 + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // A buffer that grows is never full.
    let _ = message.encode(&mut frame);
    frame.freeze()
}

/// What a model said instead of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelError {
    /// As an HTTP status.
    pub status: u16,
    /// As a gRPC status code.
    pub code: u8,
    /// In its own words.
    pub message: String,
    /// What a REST server sent, as it was: its type, and the body.
    body: Option<(HeaderValue, Bytes)>,
    /// Whatever the status: the model has failed, and not the server.
    of_model: bool,
}

/// TorchServe's form of an error.
#[derive(serde::Deserialize)]
struct TorchServeError<'a> {
    #[serde(borrow)]
    r#type: std::borrow::Cow<'a, str>,
}

/// Whether TorchServe says that the model has failed, for which it has no status of its own.
fn is_failed_prediction(status: u16, body: &[u8]) -> bool {
    let said = || serde_json::from_slice::<TorchServeError<'_>>(body);
    status == 503 && said().is_ok_and(|said| said.r#type == "InternalServerException")
}

impl ModelError {
    /// What a REST server answered. Codes as Triton pairs them.
    pub fn of_rest(status: u16, headers: &HeaderMap, body: &Bytes) -> Self {
        let said = serde_json::from_slice::<oip::ErrorBody>(body).map(|body| body.error);
        let message = said.unwrap_or_else(|_| String::from_utf8_lossy(body).into_owned());
        let code = match status {
            404 => 5,
            429 => 8,
            500 => 13,
            501 => 12,
            503 => 14,
            504 => 4,
            _ => 3,
        };
        let json = HeaderValue::from_static("application/json");
        let kind = headers.get(CONTENT_TYPE).cloned().unwrap_or(json);
        let of_model = is_failed_prediction(status, body);
        Self { body: Some((kind, body.clone())), of_model, ..Self::of(status, code, message) }
    }

    /// One in our own words.
    pub fn of(status: u16, code: u8, message: String) -> Self {
        Self { status, code, message, body: None, of_model: false }
    }

    /// What a gRPC server answered.
    pub fn of_grpc(code: u8, message: String) -> Self {
        let status = match code {
            4 => 504,
            5 => 404,
            7 => 403,
            8 => 429,
            12 => 501,
            13 => 500,
            14 => 503,
            16 => 401,
            _ => 400,
        };
        Self::of(status, code, message)
    }

    /// An answer that cannot be written in the form that was asked for.
    fn unwritable(error: &oip::Error) -> Self {
        Self::of(400, 3, error.to_string())
    }

    /// Whether it says that the server could not work now, rather than what is wrong with the request.
    pub fn is_unavailable(&self) -> bool {
        is_unavailable(self.status) && !self.of_model
    }
}

/// Whether a status says that the server could not work now: whoever asked then would have been told so.
pub fn is_unavailable(status: u16) -> bool {
    matches!(status, 429 | 502..=504)
}

/// An answer with memory of its own: a part of a batch's answer is a slice of it, which would keep all of it.
pub fn own(answer: &InferResponse) -> InferResponse {
    let mut own = InferResponse { id: None, ..answer.clone() };
    for output in &mut own.outputs {
        output.data = Bytes::copy_from_slice(&output.data);
    }
    own
}

/// A response in the form that was asked for.
pub fn write(
    asked: &Asked,
    answer: Result<InferResponse, ModelError>,
    exchange: &Rc<Exchange>,
) -> Response<ResponseBody> {
    let answer = answer.map(|answer| InferResponse { id: asked.request.id.clone(), ..answer });
    match asked.form {
        Form::Rest => write_rest(asked, answer, exchange),
        Form::Grpc(contents) => write_grpc(contents, answer, exchange),
    }
}

fn write_rest(
    asked: &Asked,
    answer: Result<InferResponse, ModelError>,
    exchange: &Rc<Exchange>,
) -> Response<ResponseBody> {
    let binary = |output: &oip::Tensor| asked.request.wants_binary(&output.name);
    let body = answer.and_then(|answer| {
        rest::encode_response(&answer, binary).map_err(|error| ModelError::unwritable(&error))
    });
    match body {
        Ok(body) => {
            let (length, content_type) = (body.header_length, body.content_type());
            let mut response = response(body.parts, None, exchange, content_type);
            if let Some(length) = length {
                response.headers_mut().insert(&rest::HEADER_LENGTH, length.into());
            }
            response
        }
        Err(error) => {
            let (kind, body) = error.body.unwrap_or_else(|| {
                let body = oip::ErrorBody { error: error.message };
                let text = serde_json::to_vec(&body).unwrap_or_default();
                (HeaderValue::from_static("application/json"), text.into())
            });
            let mut response = response(vec![body], None, exchange, "application/json");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            *response.status_mut() = StatusCode::from_u16(error.status).unwrap_or(StatusCode::BAD_REQUEST);
            response
        }
    }
}

fn write_grpc(
    contents: grpc::Contents,
    answer: Result<InferResponse, ModelError>,
    exchange: &Rc<Exchange>,
) -> Response<ResponseBody> {
    let message = answer.and_then(|answer| {
        // There are no lists of half-precision numbers.
        let half = |output: &oip::Tensor| matches!(output.datatype, Datatype::Fp16 | Datatype::Bf16);
        let raw = answer.outputs.iter().any(half);
        let contents = if raw { grpc::Contents::Raw } else { contents };
        grpc::encode_response(answer, contents).map_err(|error| ModelError::unwritable(&error))
    });
    let mut response = match message {
        Ok(message) => {
            let mut trailers = HeaderMap::with_capacity(4);
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            response(vec![framed(&message)], Some(trailers), exchange, "application/grpc")
        }
        Err(error) => {
            let mut response = response(Vec::new(), None, exchange, "application/grpc");
            answer::grpc_status(response.headers_mut(), error.code, &error.message);
            response
        }
    };
    response.headers_mut().remove(CONTENT_LENGTH);
    response
}

fn response(
    parts: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    exchange: &Rc<Exchange>,
    content_type: &'static str,
) -> Response<ResponseBody> {
    let length: usize = parts.iter().map(Bytes::len).sum();
    if parts.is_empty() && trailers.is_none() {
        exchange.complete();
    }
    let mut response = Response::new(ResponseBody::Shared(Share::new(parts, trailers, exchange)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_protocols_own_paths_are_shared() {
        let of = |uri: &str| Form::of(&Method::POST, &uri.parse().unwrap(), &HeaderMap::new());
        for own in ["/v2/models/m/infer", "/v2/models/m/versions/1/infer", "http://a/v2/models/m/infer"] {
            assert_eq!(of(own), Some(Form::Rest), "{own}");
        }
        assert_eq!(of(MODEL_INFER), Some(Form::Grpc(grpc::Contents::Raw)));
        for other in [
            "/team-a/v2/models/m/infer",
            "//v2/models/m/infer",
            "/v2/models/m/infer?key=1",
            "/v2/models/m/generate",
            "/v2/models/m/infer/",
            "/v2/models//infer",
            "/v2/models/a%20b/infer",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_asked_anew_may_have_a_query_but_no_coding() {
        let uri: Uri = "/v2/models/m/infer?x=1".parse().unwrap();
        let coded = |coding: &str| HeaderMap::from_iter([(CONTENT_ENCODING, coding.parse().unwrap())]);
        assert_eq!(Form::of(&Method::POST, &uri, &HeaderMap::new()), None);
        assert_eq!(Form::with_query(&Method::POST, &uri, &HeaderMap::new()), Some(Form::Rest));
        assert_eq!(Form::with_query(&Method::POST, &uri, &coded("identity")), Some(Form::Rest));
        assert_eq!(Form::with_query(&Method::POST, &uri, &coded("gzip")), None);
    }

    #[test]
    fn a_prediction_that_failed_at_torchserve_is_the_models_fault() {
        let said = |kind: &str| {
            let body = format!(r#"{{"code": 503, "type": "{kind}", "message": "Prediction failed"}}"#);
            ModelError::of_rest(503, &HeaderMap::new(), &body.into())
        };
        assert!(!said("InternalServerException").is_unavailable());
        assert!(said("ServiceUnavailableException").is_unavailable());
        assert!(ModelError::of_rest(503, &HeaderMap::new(), &Bytes::from_static(b"busy")).is_unavailable());
    }
}
