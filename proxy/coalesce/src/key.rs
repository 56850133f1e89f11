//! When two requests are the same, and when they can share an execution.
//!
//! Same is what has the same BLAKE3 hash over: who asks (where clients do not share), the model, its version and which load
//! of it, and all that decides the answer: input names, datatypes, shapes and bytes, parameters, the outputs asked for, and
//! the headers that the configuration names. What only says how the answer travels (the id, binary or not) is no part of it,
//! so that REST and gRPC clients meet.
//!
//! What is hashed, so that no two requests that differ read the same: `n` is a number, 8 bytes, little-endian; `f` a
//! field, its length as `n` and then its bytes; a list is how many there are as `n` and then each.
//!
//! ```text
//! tensors = f "penstock tensors 3", scope, credentials, n whether it is to be executed alone, parameters, outputs, list of input (by name)
//! json    = f "penstock json 2", scope, credentials, accept-encoding, f path and query, f the document in its one form
//! bytes   = f "penstock bytes 1", scope, credentials, list of (f name, list of f value) of the headers that say how to read
//!           the body and what may be answered, f path and query, f body
//! batch   = f "penstock batch 3", scope, credentials, parameters, outputs, list of input without data
//! scope   = f client, f model, f version, n load, headers that the configuration names
//! headers = list of (f name, list of f value); so are credentials (`CREDENTIALS`)
//! input   = f name, f datatype, list of n dimension (in a batch: but the first), parameters, f data (in a batch: none)
//! outputs = list of (f name, parameters)
//! parameters = list of (f name, f value), by name, without binary_data, binary_data_size and binary_data_output;
//!           value = one byte for the type (0 bool, 1 int, 2 uint, 3 double, 4 string) and its bytes, little-endian
//! ```

use http::header::{ACCEPT_ENCODING, AUTHORIZATION, COOKIE};
use http::{HeaderMap, HeaderName};
use penstock_inference::oip::{InferRequest, Parameter, Parameters, Tensor};

use crate::batch;
use crate::json::Document;

/// What was asked.
pub type Hash = [u8; 32];

/// Whose answer it is, and what else decides it besides the request's own content.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    /// The client; empty where clients share.
    pub client: &'a str,
    /// The model.
    pub model: &'a str,
    /// The version that was asked for.
    pub version: &'a str,
    /// Goes up whenever the model may have changed.
    pub load: u64,
    /// Headers that make a difference.
    pub headers: &'a [HeaderName],
}

/// What a client proves to the application who it is with, always part of what is asked: an answer that the application
/// gave to one who showed a key must not go to one who showed none, nor to another organization or project of OpenAI's API.
const CREDENTIALS: [HeaderName; 6] = [
    AUTHORIZATION,
    COOKIE,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("openai-organization"),
    HeaderName::from_static("openai-project"),
];

/// Of ours: whether a request is to be executed alone, and whether the client wants to see with how many it was.
const BATCH: HeaderName = HeaderName::from_static("penstock-batch");

/// Whether a header is part of what is asked in JSON, whatever the configuration says.
pub(crate) fn always_counts(name: &HeaderName) -> bool {
    CREDENTIALS.contains(name) || name == ACCEPT_ENCODING
}

struct Writer(blake3::Hasher);

impl Writer {
    /// A hash that cannot be one of another kind, or of another version of this encoding.
    fn new(kind: &str) -> Self {
        let mut writer = Self(blake3::Hasher::new());
        writer.field(kind.as_bytes());
        writer
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn field(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
    }

    fn scope(&mut self, scope: &Scope<'_>, headers: &HeaderMap) {
        for text in [scope.client, scope.model, scope.version] {
            self.field(text.as_bytes());
        }
        self.number(scope.load);
        self.headers(scope.headers, headers);
    }

    fn headers(&mut self, names: &[HeaderName], headers: &HeaderMap) {
        self.number(names.len() as u64);
        for name in names {
            self.field(name.as_str().as_bytes());
            let values = headers.get_all(name);
            self.number(values.iter().count() as u64);
            values.iter().for_each(|value| self.field(value.as_bytes()));
        }
    }

    fn parameters(&mut self, parameters: &Parameters) {
        let deciding = || parameters.iter().filter(|(name, _)| !is_of_transport(name));
        self.number(deciding().count() as u64);
        for (name, value) in deciding() {
            self.field(name.as_bytes());
            match value {
                Parameter::Bool(value) => self.field(&[0, u8::from(*value)]),
                Parameter::Int(value) => self.field(&[&[1][..], &value.to_le_bytes()].concat()),
                Parameter::Uint(value) => self.field(&[&[2][..], &value.to_le_bytes()].concat()),
                Parameter::Double(value) => self.field(&[&[3][..], &value.to_le_bytes()].concat()),
                Parameter::String(value) => self.field(&[&[4][..], value.as_bytes()].concat()),
            }
        }
    }

    /// Name, datatype and shape; of the shape only what is behind the rows, where they do not count.
    fn tensor(&mut self, tensor: &Tensor, rows: bool) {
        self.field(tensor.name.as_bytes());
        self.field(tensor.datatype.name().as_bytes());
        let shape = &tensor.shape[usize::from(!rows).min(tensor.shape.len())..];
        self.number(shape.len() as u64);
        shape.iter().for_each(|dimension| self.number(*dimension));
        self.parameters(&tensor.parameters);
    }

    fn outputs(&mut self, request: &InferRequest) {
        self.number(request.outputs.len() as u64);
        for output in &request.outputs {
            self.field(output.name.as_bytes());
            self.parameters(&output.parameters);
        }
    }
}

/// Parameters that only say how tensors travel.
fn is_of_transport(name: &str) -> bool {
    matches!(name, "binary_data" | "binary_data_size" | "binary_data_output")
}

/// The inputs in one order, whatever order they came in.
fn sorted(request: &InferRequest) -> Vec<&Tensor> {
    let mut inputs: Vec<&Tensor> = request.inputs.iter().collect();
    inputs.sort_by(|a, b| a.name.cmp(&b.name));
    inputs
}

/// What a request for tensors asks.
pub fn of_tensors(request: &InferRequest, scope: &Scope<'_>, headers: &HeaderMap) -> Hash {
    let mut writer = Writer::new("penstock tensors 3");
    writer.scope(scope, headers);
    writer.headers(&CREDENTIALS, headers);
    // Who wants to be executed alone wants no answer of a batch either, now or kept.
    let alone = headers.get(BATCH).is_some_and(|said| said == "off");
    writer.number(alone.into());
    writer.parameters(&request.parameters);
    writer.outputs(request);
    writer.number(request.inputs.len() as u64);
    for input in sorted(request) {
        writer.tensor(input, true);
        writer.field(&input.data);
    }
    writer.0.finalize().into()
}

/// Whether an execution of the request is good for another that is the same: it belongs to no sequence, whose state each
/// execution changes, and leaves nothing in memory that the client shares with the server, where another execution, or
/// none, would leave something else.
pub fn is_repeatable(request: &InferRequest) -> bool {
    let of_inputs = request.inputs.iter().map(|input| &input.parameters);
    let of_outputs = request.outputs.iter().map(|output| &output.parameters);
    let mut all = of_inputs.chain(of_outputs).chain([&request.parameters]);
    let ties = |name: &String| name.starts_with("sequence_") || name.starts_with("shared_memory_");
    !all.any(|parameters| parameters.keys().any(ties))
}

/// What a request in JSON asks.
pub fn of_document(path: &str, body: &Document, scope: &Scope<'_>, headers: &HeaderMap) -> Hash {
    let mut writer = Writer::new("penstock json 2");
    writer.scope(scope, headers);
    writer.headers(&CREDENTIALS, headers);
    // The answer is passed on as the application encoded it.
    writer.headers(&[ACCEPT_ENCODING], headers);
    writer.field(path.as_bytes());
    writer.field(body.form());
    writer.0.finalize().into()
}

/// Headers that say how a body is to be read, and in which form the answer may be.
const FORM: [HeaderName; 6] = [
    http::header::CONTENT_TYPE,
    http::header::ACCEPT,
    ACCEPT_ENCODING,
    HeaderName::from_static("inference-header-content-length"),
    HeaderName::from_static("grpc-accept-encoding"),
    BATCH,
];

/// What a request asks, to the byte: its own id is part of it, so the same answer, as it came, is good for both.
pub fn of_bytes(path: &str, body: &[u8], scope: &Scope<'_>, headers: &HeaderMap) -> Hash {
    let mut writer = Writer::new("penstock bytes 1");
    writer.scope(scope, headers);
    writer.headers(&CREDENTIALS, headers);
    writer.headers(&FORM, headers);
    writer.field(path.as_bytes());
    writer.field(body);
    writer.0.finalize().into()
}

/// Of these headers those that decide the answer: those that prove to the application who a client is, and those that the
/// configuration names. An execution for several has them too.
pub fn deciding(headers: &HeaderMap, named: &[HeaderName]) -> HeaderMap {
    let mut deciding = HeaderMap::new();
    for name in CREDENTIALS.iter().chain(named) {
        if !deciding.contains_key(name) {
            for value in headers.get_all(name) {
                deciding.append(name, value.clone());
            }
        }
    }
    deciding
}

/// Parameters that tie a request to others, or that only the request itself can have (sequences, priorities of the
/// server's own queue).
fn forbids_batches(name: &str) -> bool {
    name.starts_with("sequence_") || name.starts_with("shared_memory_") || name == "classification"
}

/// Rows of a request that can share an execution, and the key of those with which it can: the same model, input names,
/// datatypes, dimensions but the first, parameters, outputs, credentials and named headers. `None`: it goes alone.
pub fn compatible(
    request: &InferRequest,
    scope: &Scope<'_>,
    headers: &HeaderMap,
) -> Option<(u32, batch::Key)> {
    let rows = *request.inputs.first()?.shape.first()?;
    let parts = request.inputs.iter().map(|input| &input.parameters);
    let mut parameters = parts.chain(request.outputs.iter().map(|output| &output.parameters));
    let forbidden = |parameters: &Parameters| parameters.keys().any(|name| forbids_batches(name));
    // An input without elements has dimensions that nothing backs: with more rows they may be too large to be counted.
    if request.inputs.iter().any(|input| input.shape.first() != Some(&rows) || input.shape.contains(&0))
        || forbidden(&request.parameters)
        || parameters.any(forbidden)
    {
        return None;
    }
    let rows = u32::try_from(rows).ok()?;
    let inputs = sorted(request);
    // Inputs are joined by their names, and of two that have the same it is the server that says which one it takes.
    if inputs.windows(2).any(|pair| pair[0].name == pair[1].name) {
        return None;
    }
    let mut writer = Writer::new("penstock batch 3");
    writer.scope(scope, headers);
    writer.headers(&CREDENTIALS, headers);
    writer.parameters(&request.parameters);
    writer.outputs(request);
    writer.number(request.inputs.len() as u64);
    for input in inputs {
        writer.tensor(input, false);
    }
    let hash = writer.0.finalize();
    Some((rows, u128::from_le_bytes(*hash.as_bytes().first_chunk()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_inference::oip::RequestedOutput;

    const SCOPE: Scope<'_> = Scope { client: "a", model: "m", version: "", load: 0, headers: &[] };

    fn request() -> InferRequest {
        InferRequest {
            id: Some("1".into()),
            inputs: vec![
                Tensor::fp32("x", vec![2, 2], [1.0, 2.0, 3.0, 4.0]),
                Tensor::fp32("y", vec![2, 1], [5.0, 6.0]),
            ],
            outputs: vec![RequestedOutput { name: "z".into(), ..RequestedOutput::default() }],
            ..InferRequest::default()
        }
    }

    fn hash(request: &InferRequest) -> Hash {
        of_tensors(request, &SCOPE, &HeaderMap::new())
    }

    fn key(request: &InferRequest) -> Option<batch::Key> {
        compatible(request, &SCOPE, &HeaderMap::new()).map(|(_, key)| key)
    }

    #[test]
    fn how_it_travels_makes_no_difference() {
        let mut other = request();
        other.id = None;
        other.inputs.reverse();
        other.parameters.insert("binary_data_output".into(), Parameter::Bool(true));
        other.outputs[0].parameters.insert("binary_data".into(), Parameter::Bool(true));
        assert_eq!(hash(&other), hash(&request()));
        assert_eq!(key(&other), key(&request()));
    }

    #[test]
    fn everything_that_decides_the_answer_makes_a_difference() {
        type Change = fn(&mut InferRequest);
        let changes: [Change; 9] = [
            |r| r.inputs[0].data = Tensor::fp32("x", vec![2, 2], [1.0, 2.0, 3.0, 4.5]).data,
            |r| r.inputs[0].name = "w".into(),
            |r| r.inputs[0].shape = vec![4, 1],
            |r| r.inputs[0].datatype = penstock_inference::oip::Datatype::Int32,
            |r| drop(r.inputs.pop()),
            |r| drop(r.parameters.insert("top_k".into(), Parameter::Int(1))),
            |r| drop(r.parameters.insert("top_k".into(), Parameter::Uint(1))),
            |r| r.outputs[0].name = "other".into(),
            |r| r.outputs.clear(),
        ];
        let mut seen = std::collections::HashSet::from([hash(&request())]);
        for (at, change) in changes.iter().enumerate() {
            let mut changed = request();
            change(&mut changed);
            assert!(seen.insert(hash(&changed)), "change {at}");
        }
        let scopes = [
            Scope { client: "b", ..SCOPE },
            Scope { model: "am", client: "", ..SCOPE },
            Scope { version: "2", ..SCOPE },
            Scope { load: 1, ..SCOPE },
        ];
        for scope in scopes {
            assert!(seen.insert(of_tensors(&request(), &scope, &HeaderMap::new())), "{scope:?}");
        }
        let tone = [http::HeaderName::from_static("x-tone")];
        let mut headers = HeaderMap::new();
        for _ in 0..2 {
            headers.append("x-tone", "warm".parse().unwrap());
            assert!(seen.insert(of_tensors(&request(), &Scope { headers: &tone, ..SCOPE }, &headers)));
        }
    }

    #[test]
    fn who_wants_to_be_executed_alone_shares_with_none_who_do_not() {
        let hash = |said: &'static str| {
            let headers = HeaderMap::from_iter([(BATCH, said.parse().unwrap())]);
            of_tensors(&request(), &SCOPE, &headers)
        };
        assert_ne!(hash("off"), of_tensors(&request(), &SCOPE, &HeaderMap::new()));
        assert_eq!(hash("off"), hash("off"));
        assert_eq!(hash("show"), of_tensors(&request(), &SCOPE, &HeaderMap::new()));
    }

    #[test]
    fn to_the_byte_everything_makes_a_difference() {
        let mut seen = std::collections::HashSet::new();
        let none = HeaderMap::new();
        assert!(seen.insert(of_bytes("/a", b"body", &SCOPE, &none)));
        assert!(!seen.insert(of_bytes("/a", b"body", &SCOPE, &none)));
        assert!(seen.insert(of_bytes("/a?b", b"body", &SCOPE, &none)));
        assert!(seen.insert(of_bytes("/ab", b"ody", &SCOPE, &none)));
        assert!(seen.insert(of_bytes("/a", b"body", &Scope { model: "n", ..SCOPE }, &none)));
        for name in FORM.iter().chain(&CREDENTIALS) {
            let headers = HeaderMap::from_iter([(name.clone(), "v".parse().unwrap())]);
            assert!(seen.insert(of_bytes("/a", b"body", &SCOPE, &headers)), "{name}");
        }
    }

    #[test]
    fn a_header_is_not_another_of_the_same_value() {
        let hash = |name: &'static str| {
            let headers = HeaderMap::from_iter([(http::HeaderName::from_static(name), "v".parse().unwrap())]);
            let names = [http::HeaderName::from_static(name)];
            of_tensors(&request(), &Scope { headers: &names, ..SCOPE }, &headers)
        };
        assert_ne!(hash("x-tone"), hash("x-taste"));
    }

    #[test]
    fn who_shows_no_key_does_not_get_what_another_was_given_for_one() {
        let body = Document::read(b"{}").unwrap();
        let mut seen = std::collections::HashSet::new();
        for (name, value) in [
            ("x-other", "1"),
            ("authorization", "Bearer a"),
            ("authorization", "Bearer b"),
            ("x-api-key", "a"),
            ("cookie", "a"),
        ] {
            let headers = HeaderMap::from_iter([(HeaderName::from_static(name), value.parse().unwrap())]);
            assert!(seen.insert(of_tensors(&request(), &SCOPE, &headers)), "{name}");
            assert!(seen.insert(of_document("/", &body, &SCOPE, &headers)), "{name}");
        }
        assert!(!seen.insert(of_tensors(&request(), &SCOPE, &HeaderMap::new())));
    }

    #[test]
    fn what_leaves_more_than_an_answer_cannot_be_had_from_another() {
        assert!(is_repeatable(&request()));
        type Change = fn(&mut InferRequest);
        let changes: [Change; 4] = [
            |r| drop(r.parameters.insert("sequence_id".into(), Parameter::Int(1))),
            |r| drop(r.parameters.insert("sequence_end".into(), Parameter::Bool(true))),
            |r| drop(r.inputs[1].parameters.insert("shared_memory_offset".into(), Parameter::Int(0))),
            |r| drop(r.outputs[0].parameters.insert("shared_memory_region".into(), Parameter::Bool(true))),
        ];
        for (at, change) in changes.iter().enumerate() {
            let mut changed = request();
            change(&mut changed);
            assert!(!is_repeatable(&changed), "change {at}");
        }
    }

    #[test]
    fn a_document_is_asked_of_a_path() {
        let hash = |path: &str, text: &str| {
            of_document(path, &Document::read(text.as_bytes()).unwrap(), &SCOPE, &HeaderMap::new())
        };
        assert_eq!(hash("/a", r#"{"x":1,"y":2}"#), hash("/a", r#"{"y":2, "x":1}"#));
        assert_ne!(hash("/a", r#"{"x":1}"#), hash("/b", r#"{"x":1}"#));
        assert_ne!(hash("/a", r#"{"x":1}"#), hash("/a?key=1", r#"{"x":1}"#));
        assert_ne!(hash("/a", r#"{"x":1}"#), hash("/a", r#"{"x":2}"#));
    }

    #[test]
    fn rows_and_bytes_make_no_difference_to_a_batch_and_the_rest_does() {
        let mut other = request();
        other.inputs = vec![Tensor::fp32("x", vec![1, 2], [9.0, 9.0]), Tensor::fp32("y", vec![1, 1], [9.0])];
        assert_eq!(key(&other), key(&request()));
        assert_eq!(compatible(&other, &SCOPE, &HeaderMap::new()).unwrap().0, 1);
        type Change = fn(&mut InferRequest);
        let changes: [Change; 3] = [
            |r| r.inputs[0].shape = vec![2, 1, 2],
            |r| drop(r.parameters.insert("top_k".into(), Parameter::Int(1))),
            |r| r.outputs.clear(),
        ];
        for change in changes {
            let mut changed = request();
            change(&mut changed);
            assert_ne!(key(&changed), key(&request()));
        }
        let mut proof = HeaderMap::new();
        proof.insert("authorization", "Bearer x".parse().unwrap());
        proof.insert("x-other", "y".parse().unwrap());
        assert_eq!(deciding(&proof, &[]).len(), 1);
        assert_ne!(compatible(&request(), &SCOPE, &proof), compatible(&request(), &SCOPE, &HeaderMap::new()));
        let named = [HeaderName::from_static("x-other"), AUTHORIZATION];
        assert_eq!(deciding(&proof, &named), proof);
        let scope = Scope { headers: &named, ..SCOPE };
        let mut other = proof.clone();
        other.insert("x-other", "z".parse().unwrap());
        assert_ne!(compatible(&request(), &scope, &proof), compatible(&request(), &scope, &other));
    }

    #[test]
    fn some_go_alone() {
        type Change = fn(&mut InferRequest);
        let changes: [Change; 8] = [
            |r| drop(r.parameters.insert("sequence_id".into(), Parameter::Int(1))),
            |r| drop(r.outputs[0].parameters.insert("classification".into(), Parameter::Int(3))),
            |r| {
                drop(
                    r.inputs[0]
                        .parameters
                        .insert("shared_memory_region".into(), Parameter::String("r".into())),
                )
            },
            |r| r.inputs[0].shape = vec![],
            |r| r.inputs[1].shape = vec![1, 2],
            |r| r.inputs.iter_mut().for_each(|input| input.shape.extend([u64::MAX / 4, 0])),
            |r| r.inputs.clear(),
            |r| r.inputs[1] = r.inputs[0].clone(),
        ];
        for (at, change) in changes.iter().enumerate() {
            let mut changed = request();
            change(&mut changed);
            assert_eq!(key(&changed), None, "change {at}");
        }
    }
}
