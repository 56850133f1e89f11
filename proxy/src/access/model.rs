//! Which model a request asks for, for rules that allow or deny by it.
//!
//! In: a request whose path is canonical. Out: the model, or that there is none, or that it cannot be told. Other than
//! [`crate::work`], which looks at what is there already and may be wrong, this reads the whole of what a server reads:
//! a name that stands twice, a second message, a body that does not end are [`Named::Unknown`], and what is unknown
//! counts against the client.

use std::borrow::Cow;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use http::header::{CONTENT_ENCODING, UPGRADE};
use http::{Method, Request};
use penstock_api::access::{Named, OIP};
use penstock_inference::openai;
use prost::encoding::{self, DecodeContext, WireType};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::held;

/// The largest body that is read for its model. What is larger has none that can be told.
const BODY: usize = 4 << 20;

/// Where a model is named.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// There, or nowhere.
    Path(Named),
    /// The fields 1 and 2 of a message.
    Message,
    /// A document.
    Json,
}

/// How long a body may take to come in where its model only has to be reported. It is what a request is looked at for
/// anyway ([`crate::work`]); a body that takes longer goes on, and of its model nothing is known.
pub(super) const GLANCE: Duration = Duration::from_millis(50);

/// The model of a request. `copied`: its path in canonical form, if it has another itself.
pub(super) async fn of(
    request: &mut Request<RequestBody>,
    copied: Option<&str>,
    exchange: &Rc<Exchange>,
    patience: Duration,
) -> Named {
    let place = place(request, copied.unwrap_or_else(|| request.uri().path()));
    if let Place::Path(named) = place {
        return named;
    }
    let Some((body, _held)) = held::whole_within(exchange, request.body_mut(), BODY, patience).await else {
        return Named::Unknown;
    };
    match place {
        Place::Message => message(&body),
        _ => json(&body),
    }
}

fn place<B>(request: &Request<B>, path: &str) -> Place {
    // What becomes another protocol can say anything.
    if request.headers().contains_key(UPGRADE) {
        return Place::Path(Named::Unknown);
    }
    if let Some(named) = Named::in_path(request.method(), path) {
        return Place::Path(named);
    }
    match path.strip_prefix(OIP) {
        Some("ModelInfer" | "ModelReady" | "ModelMetadata" | "ModelConfig" | "ModelStatistics") => {
            Place::Message
        }
        Some(_) => Place::Path(Named::Unknown),
        None => {
            let plain = !request.headers().contains_key(CONTENT_ENCODING);
            match *request.method() == Method::POST && plain && openai::Api::of_path(path).is_some() {
                true => Place::Json,
                false => Place::Path(Named::Unknown),
            }
        }
    }
}

/// One gRPC message, of which field 1 is the name and field 2 the version.
fn message(frame: &[u8]) -> Named {
    fields(frame).unwrap_or(Named::Unknown)
}

fn fields(frame: &[u8]) -> Option<Named> {
    let (&[compressed, a, b, c, d], mut rest) = frame.split_first_chunk::<5>()?;
    if compressed != 0 || usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()? != rest.len() {
        return None;
    }
    let mut texts: [Option<String>; 2] = [None, None];
    while !rest.is_empty() {
        let (number, wire) = encoding::decode_key(&mut rest).ok()?;
        match number {
            1 | 2 => {
                let slot = &mut texts[number as usize - 1];
                let mut text = String::new();
                encoding::string::merge(wire, &mut text, &mut rest, DecodeContext::default()).ok()?;
                // Of two, servers take the last; nobody but who wants to deceive writes two.
                if wire != WireType::LengthDelimited || slot.replace(text).is_some() {
                    return None;
                }
            }
            _ => encoding::skip_field(wire, number, &mut rest, DecodeContext::default()).ok()?,
        }
    }
    match texts {
        [Some(name), version] if !name.is_empty() => {
            Some(match version.filter(|version| !version.is_empty()) {
                Some(version) => Named::As(format!("{name}/{version}")),
                None => Named::As(name),
            })
        }
        _ => None,
    }
}

/// A document with a `model`, and maybe an adapter of it.
fn json(body: &[u8]) -> Named {
    match serde_json::from_slice(body) {
        Ok(Document { model: Some(model), adapter: None, unclear: false }) => Named::As(model),
        Ok(Document { model: Some(model), adapter: Some(adapter), unclear: false }) => {
            Named::As(format!("{model}/{adapter}"))
        }
        _ => Named::Unknown,
    }
}

#[derive(Default)]
struct Document {
    model: Option<String>,
    adapter: Option<String>,
    /// Readers would disagree.
    unclear: bool,
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields)
    }
}

struct Fields;

impl<'de> Visitor<'de> for Fields {
    type Value = Document;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
        let mut document = Document::default();
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            let is = |name: &str| key.eq_ignore_ascii_case(name);
            let slot = if is("model") {
                &mut document.model
            } else if is("lora_path") || is("adapter_id") {
                &mut document.adapter
            } else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            // Some readers take `Model` for `model`, of two some take the first and some the last.
            let exact = matches!(&*key, "model" | "lora_path" | "adapter_id");
            match map.next_value::<Option<String>>()? {
                Some(text) if exact && !text.is_empty() => document.unclear |= slot.replace(text).is_some(),
                None if exact => {}
                _ => document.unclear = true,
            }
        }
        Ok(document)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn named(text: &str) -> Named {
        Named::As(text.to_owned())
    }

    #[test]
    fn where_a_model_is_named() {
        let path = Place::Path;
        let table = [
            ("POST", "/v2/models/m/infer", path(named("m"))),
            ("POST", "/v1/chat/completions", Place::Json),
            ("POST", "/v1/embeddings", Place::Json),
            ("PUT", "/v1/embeddings", path(Named::Unknown)),
            ("POST", "/v1/audio/transcriptions", path(Named::Unknown)),
            ("POST", "/anything", path(Named::Unknown)),
            ("CONNECT", "/", path(Named::Unknown)),
            ("POST", "/inference.GRPCInferenceService/ModelInfer", Place::Message),
            ("POST", "/inference.GRPCInferenceService/ModelStreamInfer", path(Named::Unknown)),
            ("POST", "/inference.GRPCInferenceService/RepositoryModelLoad", path(Named::Unknown)),
            ("POST", "/inference.GRPCInferenceService/ServerLive", path(Named::No)),
        ];
        for (method, uri, expected) in table {
            let request = Request::builder().method(method).uri(uri).body(()).unwrap();
            assert_eq!(place(&request, request.uri().path()), expected, "{method} {uri}");
        }
        let with = |name: &str| Request::builder().method("POST").uri("/v1/embeddings").header(name, "x");
        for name in ["content-encoding", "upgrade"] {
            let request = with(name).body(()).unwrap();
            assert_eq!(place(&request, "/v1/embeddings"), path(Named::Unknown), "{name}");
        }
    }

    #[test]
    fn a_document_that_readers_take_for_different_ones_names_none() {
        let table = [
            (r#"{"model":"m","x":{"model":"y"}}"#, named("m")),
            (r#"{"messages":[],"mod\u0065l":"m"}"#, named("m")),
            (r#"{"model":"m","lora_path":"a"}"#, named("m/a")),
            (r#"{"model":"m","lora_path":null}"#, named("m")),
            (r#"{"model":"m","model":"n"}"#, Named::Unknown),
            (r#"{"model":"m","mod\u0065l":"n"}"#, Named::Unknown),
            (r#"{"model":"m","Model":"n"}"#, Named::Unknown),
            (r#"{"model":"m","lora_path":"a","adapter_id":"b"}"#, Named::Unknown),
            (r#"{"Model":"m"}"#, Named::Unknown),
            (r#"{"model":7}"#, Named::Unknown),
            (r#"{"model":""}"#, Named::Unknown),
            (r#"{}"#, Named::Unknown),
            (r#"["model","m"]"#, Named::Unknown),
            (r#"{"model":"m"} {"model":"n"}"#, Named::Unknown),
            (r#"{"model":"m""#, Named::Unknown),
        ];
        for (body, expected) in table {
            assert_eq!(json(body.as_bytes()), expected, "{body}");
        }
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat()
    }

    #[test]
    fn a_message_that_names_two_models_names_none() {
        let infer = |name: &str, version: &str| {
            let mut bytes = Vec::new();
            encoding::string::encode(1, &name.to_owned(), &mut bytes);
            encoding::string::encode(2, &version.to_owned(), &mut bytes);
            encoding::uint64::encode(9, &7, &mut bytes);
            bytes
        };
        assert_eq!(message(&framed(&infer("m", ""))), named("m"));
        assert_eq!(message(&framed(&infer("m", "2"))), named("m/2"));
        let unknown = [
            framed(&[infer("m", "1"), infer("n", "1")].concat()),
            [framed(&infer("m", "")), framed(&infer("n", ""))].concat(),
            framed(&infer("", "2")),
            framed(&[]),
            framed(&infer("m", ""))[..9].to_vec(),
            [&[1][..], &framed(&infer("m", ""))[1..]].concat(),
            vec![],
        ];
        for bytes in unknown {
            assert_eq!(message(&bytes), Named::Unknown, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_is_borne(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (message(&bytes), message(&framed(&bytes)), json(&bytes));
        }
    }
}
