//! The Open Inference Protocol.

use bytes::Bytes;
use http::HeaderMap;
use penstock_coalesce::key::{self, Scope};
use penstock_inference::oip::batch::{join, split};
use penstock_inference::oip::grpc::{self, Contents, ModelInferRequest};
use penstock_inference::oip::{InferRequest, InferResponse, prefix, rest};
use prost::Message as _;

use crate::{bounded, choice, sentence};

const SCOPE: Scope<'_> = Scope { client: "", model: "m", version: "", load: 0, headers: &[] };

/// Two that are the same. Parameters may be NaN, which is not the same as itself, but reads the same.
fn assert_same<T: PartialEq + std::fmt::Debug>(one: &T, other: &T, what: &str) {
    if one != other {
        assert_eq!(format!("{one:?}"), format!("{other:?}"), "{what}");
    }
}

/// The body of a REST request: one byte that says whether there is `Inference-Header-Content-Length`, its value in two
/// bytes, and the body. What is read is written and read again as the same, in every form that can hold it, and what is
/// joined with itself comes apart again.
pub fn oip_rest(data: &[u8]) {
    let (form, data) = choice(data);
    let (length, body) = match data.split_first_chunk() {
        Some((length, body)) if form & 1 == 1 => (Some(usize::from(u16::from_le_bytes(*length))), body),
        _ => (None, data),
    };
    let body = Bytes::copy_from_slice(body);
    // A response is read by the same hand; its tensors are another's.
    if let Err(error) = bounded(&body, || rest::decode_response(&body, length)) {
        sentence(&error);
    }
    match bounded(&body, || rest::decode_request(&body, length)) {
        Ok(request) => keeps(&request),
        Err(error) => sentence(&error),
    }
}

/// The body of a `ModelInfer` call, with its prefix of five bytes. The same is promised as over REST.
pub fn oip_grpc(data: &[u8]) {
    let Some((_, message)) = data.split_first_chunk::<5>() else { return };
    let body = Bytes::copy_from_slice(message);
    if let Ok(message) = bounded(&body, || grpc::ModelInferResponse::decode(body.clone())) {
        let read = bounded(&body, || grpc::decode_response(message));
        drop(read.inspect_err(sentence));
    }
    let Ok(message) = bounded(&body, || ModelInferRequest::decode(body.clone())) else { return };
    match bounded(&body, || grpc::decode_request(message)) {
        Ok(request) => keeps(&request),
        Err(error) => sentence(&error),
    }
}

/// What any request keeps that was read.
fn keeps(request: &InferRequest) {
    request.inputs.iter().for_each(|input| assert_eq!(input.check(), Ok(())));
    // What gRPC cannot say: an id that is there and empty.
    let over_grpc = InferRequest { id: request.id.clone().filter(|id| !id.is_empty()), ..request.clone() };
    for contents in [Contents::Raw, Contents::Typed] {
        match grpc::encode_request("m", "1", request.clone(), contents) {
            Ok(message) => {
                let again = ModelInferRequest::decode(Bytes::from(message.encode_to_vec())).unwrap();
                assert_same(&grpc::decode_request(again).unwrap(), &over_grpc, "over gRPC");
            }
            Err(error) => {
                assert_eq!(contents, Contents::Typed, "raw contents hold everything: {error}");
                sentence(&error);
            }
        }
    }
    // JSON has no NaN and no infinity, of which a parameter over gRPC may be one.
    if finite(request) {
        for binary in [true, false] {
            match rest::encode_request(request, binary) {
                Ok(body) => {
                    let length = body.header_length;
                    let again = rest::decode_request(&body.into_bytes(), length).unwrap();
                    assert_same(&again, request, "over REST");
                }
                Err(error) => {
                    assert!(!binary, "binary tensors hold everything: {error}");
                    sentence(&error);
                }
            }
        }
    }
    comes_apart(request);
}

fn finite(request: &InferRequest) -> bool {
    let of_inputs = request.inputs.iter().map(|input| &input.parameters);
    let of_outputs = request.outputs.iter().map(|output| &output.parameters);
    let mut all = of_inputs.chain(of_outputs).chain([&request.parameters]).flat_map(|all| all.values());
    all.all(|value| !matches!(value, penstock_inference::oip::Parameter::Double(value) if !value.is_finite()))
}

/// Two that can share an execution do, and each gets back its own rows.
fn comes_apart(request: &InferRequest) {
    let Some((rows, _)) = key::compatible(request, &SCOPE, &HeaderMap::new()) else { return };
    let Some(joined) = join([request, request]) else { return };
    let whole = joined.clone().whole();
    whole.inputs.iter().for_each(|input| assert_eq!(input.check(), Ok(())));
    let frames = joined.grpc_frames("m", "").unwrap().concat();
    let message = ModelInferRequest::decode(Bytes::from(frames).slice(5..)).unwrap();
    assert_same(&grpc::decode_request(message).unwrap(), &whole, "joined, over gRPC");
    if finite(request) {
        let body = joined.rest().unwrap();
        let length = body.header_length;
        let read = rest::decode_request(&body.into_bytes(), length).unwrap();
        assert_same(&read, &whole, "joined, over REST");
    }
    let answer = InferResponse { outputs: whole.inputs, ..InferResponse::default() };
    for answer in split(&answer, &[rows, rows]).unwrap() {
        assert_same(&answer.outputs, &request.inputs, "its own rows");
    }
}

/// The beginning of a body, on either wire: one byte for the cut, then the body. What is said of a beginning is in its
/// bounds, and of a body that is read as a whole it is what the body says.
pub fn oip_prefix(data: &[u8]) {
    const PATH: &str = "/v2/models/m/versions/1/infer";
    let (cut, body) = choice(data);
    let cut = body.len() * usize::from(cut) / 255;
    let sound = |ask: Option<prefix::Ask>| {
        if let Some(ask) = ask {
            assert!((1..=prefix::MAX_ROWS).contains(&ask.rows), "{ask:?}");
        }
    };
    for bytes in [body, &body[..cut]] {
        sound(bounded(bytes, || prefix::grpc(bytes)));
        for length in [None, Some(cut), Some(usize::MAX)] {
            let ask = bounded(bytes, || prefix::rest(PATH, length, bytes));
            assert_eq!(ask.as_ref().and_then(|ask| ask.model.as_deref()), Some("m"));
            sound(ask);
        }
    }
    if let Ok(path) = std::str::from_utf8(body) {
        sound(prefix::rest(path, None, body));
    }
    let owned = Bytes::copy_from_slice(body);
    if let Ok(request) = rest::decode_request(&owned, None) {
        assert_eq!(prefix::rest(PATH, None, body).unwrap().rows, rows(&request));
        // Binary, and over gRPC, as others would write it.
        let written = rest::encode_request(&request, true).unwrap();
        let length = written.header_length;
        assert_eq!(prefix::rest(PATH, length, &written.into_bytes()).unwrap().rows, rows(&request));
        let frames = join([&request]).unwrap().grpc_frames("m", "1").unwrap().concat();
        let ask = prefix::grpc(&frames).unwrap();
        assert_eq!((ask.model.as_deref(), ask.version.as_deref()), (Some("m"), Some("1")));
        assert_eq!(ask.rows, rows(&request));
    }
}

/// Rows as the module `prefix` defines them.
fn rows(request: &InferRequest) -> u64 {
    let mut rows = request.inputs.iter().map(|input| input.shape.first().copied());
    let Some(Some(first)) = rows.next() else { return 1 };
    if rows.all(|rows| rows == Some(first)) { first.clamp(1, prefix::MAX_ROWS) } else { 1 }
}
