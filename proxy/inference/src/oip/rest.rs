//! The protocol over HTTP: a JSON header, and behind it the binary tensors in the order of the header.
//!
//! In: a body and the length of its header. Out: a request or response whose binary tensors are slices of that body. The
//! other way a message becomes a [`Body`] of parts that need not be joined: the header, and each tensor's own bytes.

use super::json::{self, Elements};
use super::{
    Datatype, Error, InferRequest, InferResponse, MAX_TENSORS, Parameter, Parameters, Problem,
    RequestedOutput, Side, Tensor, TensorMetadata, said_once, shm, shm::nowhere, tensor,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use serde::de::IgnoredAny;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// How long the JSON is, when binary tensors follow it.
pub static HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// The tensor parameter that says how many bytes of the body are its data.
const BINARY_DATA_SIZE: &str = "binary_data_size";

/// A message on its way out.
#[derive(Debug, Clone, PartialEq)]
pub struct Body {
    /// The value of [`HEADER_LENGTH`]; `None`: the body is JSON only.
    pub header_length: Option<usize>,
    /// The JSON, and the binary tensors.
    pub parts: Vec<Bytes>,
}

impl Body {
    /// How many bytes all parts have.
    pub fn length(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// The value of `content-type`.
    pub fn content_type(&self) -> &'static str {
        if self.header_length.is_some() { "application/octet-stream" } else { "application/json" }
    }

    /// All parts in one. Copies, unless there is only one.
    pub fn into_bytes(self) -> Bytes {
        super::whole(self.parts)
    }
}

/// Reads [`HEADER_LENGTH`].
pub fn header_length(headers: &HeaderMap) -> Result<Option<usize>, Error> {
    let Some(value) = headers.get(&HEADER_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    let said = || String::from_utf8_lossy(value.as_bytes()).into_owned();
    length.map(Some).ok_or_else(|| Error::HeaderNotANumber(said()))
}

/// Reads a request. `header_length` as [`header_length`] gave it; for 0 there is [`raw_request`].
pub fn decode_request(body: &Bytes, header_length: Option<usize>) -> Result<InferRequest, Error> {
    decode_request_over_shm(body, header_length, |_| None)
}

/// Reads a request of which inputs lie in shared memory: what lies there, says `placed` of an input's parameters. For servers;
/// a proxy has no business there.
pub fn decode_request_over_shm(
    body: &Bytes,
    header_length: Option<usize>,
    placed: impl Fn(&Parameters) -> Option<Bytes>,
) -> Result<InferRequest, Error> {
    let (header, binary) = split(body, header_length)?;
    let wire: RequestIn<'_> = parse(&header)?;
    let inputs = wire.inputs.into_iter().map(TensorIn::from).collect();
    let inputs = tensors(inputs, Side::Input, Binary::Joined(binary), |_, parameters| placed(parameters))?;
    Ok(InferRequest { id: wire.id, parameters: wire.parameters, inputs, outputs: wire.outputs })
}

/// Where rows of a tensor would lie that has not come yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Rows.
    pub rows: u32,
    /// Bytes of each of them.
    pub row: usize,
}

impl Expected {
    /// Bytes of all rows.
    pub fn bytes(&self) -> Option<usize> {
        self.row.checked_mul(self.rows as usize)
    }
}

/// The inputs behind a header, before they have come. `None`: not all of them have rows of a fixed size, and lie there; or it is
/// no header of a request.
pub fn expected(header: &[u8]) -> Option<Vec<Expected>> {
    let wire: RequestIn<'_> = parse(header).ok()?;
    if wire.inputs.len() > MAX_TENSORS {
        return None;
    }
    let input = |input: InputIn<'_>| {
        let Some(Parameter::Int(said)) = input.parameters.get(BINARY_DATA_SIZE) else { return None };
        let size = input.datatype.parse::<Datatype>().ok()?.size()?;
        let shape = tensor::shape(&input.shape).ok()?;
        let (rows, rest) = shape.split_first()?;
        let row =
            rest.iter().try_fold(size, |row, length| row.checked_mul(usize::try_from(*length).ok()?))?;
        let expected = Expected { rows: u32::try_from(*rows).ok()?, row };
        let as_said = usize::try_from(*said).ok() == expected.bytes() && input.data.is_none();
        as_said.then_some(expected)
    };
    wire.inputs.into_iter().map(input).collect()
}

/// Reads a request that has come in pieces: its header, and each binary tensor for itself.
pub fn decode_pieces(header: &[u8], mut pieces: Vec<Bytes>) -> Result<InferRequest, Error> {
    pieces.reverse();
    let wire: RequestIn<'_> = parse(header)?;
    let inputs = wire.inputs.into_iter().map(TensorIn::from).collect();
    let inputs = tensors(inputs, Side::Input, Binary::Pieces(pieces), |_, _| None)?;
    Ok(InferRequest { id: wire.id, parameters: wire.parameters, inputs, outputs: wire.outputs })
}

/// Reads a response.
pub fn decode_response(body: &Bytes, header_length: Option<usize>) -> Result<InferResponse, Error> {
    decode_placed(body, header_length, nowhere)
}

/// Reads a response of which the server has put outputs into shared memory: where, says `placed` of an output's name.
pub fn decode_placed(
    body: &Bytes,
    header_length: Option<usize>,
    placed: impl Fn(&str) -> Option<Bytes>,
) -> Result<InferResponse, Error> {
    let (header, binary) = split(body, header_length)?;
    let wire: ResponseIn<'_> = parse(&header)?;
    Ok(InferResponse {
        model_name: wire.model_name,
        model_version: wire.model_version,
        id: wire.id,
        parameters: wire.parameters,
        outputs: tensors(wire.outputs, Side::Output, Binary::Joined(binary), |name, _| placed(name))?,
    })
}

/// Reads a body that is nothing but the data of the model's one input: a batch of one. Its answer is binary too.
pub fn raw_request(body: &Bytes, inputs: &[TensorMetadata]) -> Result<InferRequest, Error> {
    let [input] = inputs else {
        return Err(Error::RawBody(format!("it has {} inputs", inputs.len())));
    };
    let mut shape = input.shape.clone();
    if let Some(batch) = shape.first_mut().filter(|first| **first < 0) {
        *batch = 1;
    }
    if shape.contains(&-1) {
        return Err(Error::RawBody(format!("the shape of {:?} is {:?}", input.name, input.shape)));
    }
    let named = |problem| Error::Tensor { side: Side::Input, name: input.name.clone(), problem };
    let shape = tensor::shape(&shape).map_err(named)?;
    let read = if input.datatype == Datatype::Bytes {
        Tensor::bytes(&input.name, shape, [&body[..]])
    } else {
        Tensor {
            name: input.name.clone(),
            datatype: input.datatype,
            shape,
            parameters: Parameters::new(),
            data: body.clone(),
        }
    };
    read.check().map_err(named)?;
    let parameters = [("binary_data_output".to_owned(), Parameter::Bool(true))].into();
    Ok(InferRequest { inputs: vec![read], parameters, ..InferRequest::default() })
}

/// Writes a request: with binary tensors, or as JSON alone.
pub fn encode_request(request: &InferRequest, binary: bool) -> Result<Body, Error> {
    encode(
        &request.inputs,
        Side::Input,
        |_| binary,
        |inputs| RequestOut {
            id: request.id.as_deref(),
            parameters: &request.parameters,
            inputs,
            outputs: &request.outputs,
        },
    )
}

/// Writes a response. `binary` says for each output which form it takes; [`InferRequest::wants_binary`] knows.
pub fn encode_response(response: &InferResponse, binary: impl Fn(&Tensor) -> bool) -> Result<Body, Error> {
    encode(&response.outputs, Side::Output, binary, |outputs| ResponseOut {
        model_name: &response.model_name,
        model_version: &response.model_version,
        id: response.id.as_deref(),
        parameters: &response.parameters,
        outputs,
    })
}

/// Writes a request whose inputs have their data in pieces, which are not joined: those of `data`, input by input.
pub(super) fn encode_scattered(request: &InferRequest, data: &[Vec<Bytes>]) -> Result<Body, Error> {
    let size = |pieces: &Vec<Bytes>| pieces.iter().map(Bytes::len).sum();
    let inputs = request.inputs.iter().zip(data);
    let inputs = inputs.map(|(tensor, pieces)| TensorOut { tensor, carried: Carried::Behind(size(pieces)) });
    let message = RequestOut {
        id: request.id.as_deref(),
        parameters: &request.parameters,
        inputs: inputs.collect(),
        outputs: &request.outputs,
    };
    let header = serde_json::to_vec(&message).map_err(|problem| Error::Json(problem.to_string()))?;
    let header_length = Some(header.len());
    let pieces = data.iter().flatten().filter(|piece| !piece.is_empty()).cloned();
    Ok(Body { header_length, parts: std::iter::once(header.into()).chain(pieces).collect() })
}

/// JSON and what follows it.
fn split(body: &Bytes, header_length: Option<usize>) -> Result<(Bytes, Bytes), Error> {
    match header_length {
        None => Ok((body.clone(), Bytes::new())),
        Some(header) if header > body.len() => Err(Error::HeaderTooLong { header, body: body.len() }),
        Some(header) => Ok((body.slice(..header), body.slice(header..))),
    }
}

fn parse<'a, T: Deserialize<'a>>(header: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(header).map_err(|problem| Error::Json(problem.to_string()))
}

/// What follows the JSON.
enum Binary {
    /// As it was sent.
    Joined(Bytes),
    /// Each tensor's for itself, the last one first.
    Pieces(Vec<Bytes>),
}

impl Binary {
    /// The next tensor's.
    fn take(&mut self, wanted: u64) -> Result<Bytes, Problem> {
        match self {
            Self::Joined(bytes) if wanted <= bytes.len() as u64 => Ok(bytes.split_to(wanted as usize)),
            Self::Joined(bytes) => Err(Problem::BinaryMissing { wanted, left: bytes.len() as u64 }),
            Self::Pieces(pieces) => {
                let piece = pieces.pop().unwrap_or_default();
                let left = piece.len() as u64;
                (wanted == left).then_some(piece).ok_or(Problem::BinaryMissing { wanted, left })
            }
        }
    }

    fn left(&self) -> usize {
        match self {
            Self::Joined(bytes) => bytes.len(),
            Self::Pieces(pieces) => pieces.iter().map(Bytes::len).sum(),
        }
    }
}

/// Gives each tensor its data: elements of the JSON, or the next bytes behind it, or what lies where it was placed.
fn tensors(
    wire: Vec<TensorIn<'_>>,
    side: Side,
    mut binary: Binary,
    placed: impl Fn(&str, &Parameters) -> Option<Bytes>,
) -> Result<Vec<Tensor>, Error> {
    if wire.len() > MAX_TENSORS {
        return Err(Error::TooManyTensors(wire.len()));
    }
    let mut tensors = Vec::with_capacity(wire.len());
    for wire in wire {
        let name = wire.name.clone();
        let read = read(wire, &mut binary, &placed);
        tensors.push(read.map_err(|problem| Error::Tensor { side, name, problem })?);
    }
    if binary.left() > 0 {
        return Err(Error::Unclaimed(binary.left()));
    }
    Ok(tensors)
}

fn read(
    wire: TensorIn<'_>,
    binary: &mut Binary,
    placed: impl Fn(&str, &Parameters) -> Option<Bytes>,
) -> Result<Tensor, Problem> {
    let datatype: Datatype = wire.datatype.parse()?;
    let shape = tensor::shape(&wire.shape)?;
    let mut parameters = wire.parameters;
    // Written anew it would be in shared memory alone.
    if parameters.contains_key(shm::REGION)
        && (wire.data.is_some() || parameters.contains_key(BINARY_DATA_SIZE))
    {
        return Err(Problem::DataAndPlace);
    }
    let data = match (wire.data, parameters.remove(BINARY_DATA_SIZE)) {
        (Some(_), Some(_)) => return Err(Problem::TwoData),
        (None, None) => {
            let place = placed(&wire.name, &parameters).ok_or(Problem::NoData)?;
            shm::forget(&mut parameters);
            shm::lying(datatype, &shape, &place)?
        }
        (Some(data), None) => json::read(data.get(), datatype)?,
        (None, Some(Parameter::Int(wanted @ 0..))) => binary.take(wanted as u64)?,
        (None, Some(_)) => return Err(Problem::BinarySize),
    };
    let tensor = Tensor { name: wire.name, datatype, shape, parameters, data };
    match (tensor.check(), datatype.size()) {
        // Who sent JSON thinks in elements, not in bytes.
        (Err(Problem::ByteCount { shape, expected, found, .. }), Some(size)) if wire.data.is_some() => {
            let size = size as u64;
            Err(Problem::ElementCount { shape, expected: expected / size, found: found / size })
        }
        (checked, _) => checked.map(|()| tensor),
    }
}

fn encode<'a, T: Serialize>(
    tensors: &'a [Tensor],
    side: Side,
    binary: impl Fn(&Tensor) -> bool,
    message: impl FnOnce(Vec<TensorOut<'a>>) -> T,
) -> Result<Body, Error> {
    let mut parts = vec![Bytes::new()];
    let mut wire = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if tensor.in_shared_memory() {
            wire.push(TensorOut { tensor, carried: Carried::Elsewhere });
            continue;
        }
        let as_binary = binary(tensor);
        if as_binary {
            parts.push(tensor.data.clone());
        } else {
            json::writable(tensor.datatype, &tensor.data).map_err(|problem| Error::Tensor {
                side,
                name: tensor.name.clone(),
                problem,
            })?;
        }
        let carried = if as_binary { Carried::Behind(tensor.data.len()) } else { Carried::Inside };
        wire.push(TensorOut { tensor, carried });
    }
    let header = serde_json::to_vec(&message(wire)).map_err(|problem| Error::Json(problem.to_string()))?;
    let header_length = (parts.len() > 1).then_some(header.len());
    parts[0] = header.into();
    Ok(Body { header_length, parts })
}

/// What is not known here may decide the answer: it must not be lost when the request is written anew.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestIn<'a> {
    #[serde(default)]
    id: Option<String>,
    /// The path says which model is meant; some clients say it here too.
    #[serde(default, rename = "model_name")]
    _model_name: IgnoredAny,
    #[serde(default, rename = "model_version")]
    _model_version: IgnoredAny,
    #[serde(default, deserialize_with = "said_once")]
    parameters: Parameters,
    #[serde(borrow)]
    inputs: Vec<InputIn<'a>>,
    #[serde(default)]
    outputs: Vec<RequestedOutput>,
}

#[derive(Deserialize)]
struct ResponseIn<'a> {
    #[serde(default)]
    model_name: String,
    #[serde(default)]
    model_version: String,
    #[serde(default)]
    id: Option<String>,
    #[serde(default, deserialize_with = "said_once")]
    parameters: Parameters,
    #[serde(borrow)]
    outputs: Vec<TensorIn<'a>>,
}

/// An input; as strict as the request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InputIn<'a> {
    name: String,
    #[serde(borrow)]
    datatype: Cow<'a, str>,
    shape: Vec<i64>,
    #[serde(default, deserialize_with = "said_once")]
    parameters: Parameters,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

impl<'a> From<InputIn<'a>> for TensorIn<'a> {
    fn from(InputIn { name, datatype, shape, parameters, data }: InputIn<'a>) -> Self {
        Self { name, datatype, shape, parameters, data }
    }
}

#[derive(Deserialize)]
struct TensorIn<'a> {
    name: String,
    #[serde(borrow)]
    datatype: Cow<'a, str>,
    shape: Vec<i64>,
    #[serde(default, deserialize_with = "said_once")]
    parameters: Parameters,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct RequestOut<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Parameters::is_empty")]
    parameters: &'a Parameters,
    inputs: Vec<TensorOut<'a>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    outputs: &'a [RequestedOutput],
}

#[derive(Serialize)]
struct ResponseOut<'a> {
    model_name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    model_version: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Parameters::is_empty")]
    parameters: &'a Parameters,
    outputs: Vec<TensorOut<'a>>,
}

struct TensorOut<'a> {
    tensor: &'a Tensor,
    carried: Carried,
}

/// Where the data of a tensor is.
enum Carried {
    /// In the JSON.
    Inside,
    /// Behind it, so many bytes.
    Behind(usize),
    /// In shared memory.
    Elsewhere,
}

impl Serialize for TensorOut<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let Tensor { name, datatype, shape, parameters, data } = self.tensor;
        let mut map = to.serialize_map(None)?;
        map.serialize_entry("name", name)?;
        map.serialize_entry("datatype", datatype)?;
        map.serialize_entry("shape", shape)?;
        match self.carried {
            Carried::Behind(size) => map.serialize_entry("parameters", &WithSize { parameters, size })?,
            Carried::Inside | Carried::Elsewhere if parameters.is_empty() => {}
            Carried::Inside | Carried::Elsewhere => map.serialize_entry("parameters", parameters)?,
        }
        if matches!(self.carried, Carried::Inside) {
            map.serialize_entry("data", &Elements { datatype: *datatype, data })?;
        }
        map.end()
    }
}

struct WithSize<'a> {
    parameters: &'a Parameters,
    size: usize,
}

impl Serialize for WithSize<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(self.parameters.len() + 1))?;
        map.serialize_entry(BINARY_DATA_SIZE, &self.size)?;
        for (name, value) in self.parameters {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn json(text: &'static str) -> Result<InferRequest, Error> {
        decode_request(&Bytes::from_static(text.as_bytes()), None)
    }

    #[test]
    fn tensors_that_come_for_themselves_are_read_like_those_that_come_together() {
        let request = InferRequest {
            inputs: vec![
                Tensor::fp32("a", vec![2, 3], vec![1.0; 6]),
                Tensor::fp32("b", vec![2], vec![2.0; 2]),
            ],
            ..InferRequest::default()
        };
        let body = encode_request(&request, true).unwrap();
        let [header, pieces @ ..] = &body.parts[..] else { panic!() };
        let expected = expected(header).unwrap();
        assert_eq!(expected, [Expected { rows: 2, row: 12 }, Expected { rows: 2, row: 4 }]);
        let joined = decode_request(&body.clone().into_bytes(), body.header_length).unwrap();
        assert_eq!(decode_pieces(header, pieces.to_vec()).unwrap(), joined);
        assert!(decode_pieces(header, pieces[..1].to_vec()).is_err(), "one is missing");
        let more = [pieces, &[Bytes::from_static(b"x")]].concat();
        assert!(matches!(decode_pieces(header, more), Err(Error::Unclaimed(1))));
    }

    #[test]
    fn only_rows_of_fixed_size_behind_the_header_are_expected() {
        let input = |datatype: &str, shape: &str, rest: &str| {
            format!(r#"{{"inputs":[{{"name":"a","datatype":"{datatype}","shape":{shape}{rest}}}]}}"#)
        };
        let size = |bytes: i64| format!(r#","parameters":{{"binary_data_size":{bytes}}}"#);
        let of = |text: String| expected(text.as_bytes()).map(|all| all[0]);
        assert_eq!(of(input("INT8", "[4,0]", &size(0))), Some(Expected { rows: 4, row: 0 }));
        for none in [
            input("BYTES", "[1]", &size(9)),
            input("FP32", "[]", &size(4)),
            input("FP32", "[2,2]", &size(15)),
            input("FP32", "[2,2]", &size(-16)),
            input("FP32", "[-1,2]", &size(16)),
            input("FP32", "[5000000000,1000000000,4]", &size(16)),
            input("FP32", "[1]", r#","data":[1]"#),
            input("FP32", "[1]", &format!(r#"{},"data":[1]"#, size(4))),
            input("FP32", "[1]", ""),
            "[]".to_owned(),
        ] {
            assert_eq!(of(none.clone()), None, "{none}");
        }
    }

    fn sentence(text: &'static str) -> String {
        json(text).unwrap_err().to_string()
    }

    fn example() -> InferRequest {
        InferRequest {
            id: Some("7".into()),
            parameters: [("priority".to_owned(), Parameter::Int(2))].into(),
            inputs: vec![
                Tensor::fp32("image", vec![2, 2], [0.5, 1.5, -2.0, 0.0]),
                Tensor::bytes("text", vec![2], [&b"one"[..], b""]),
            ],
            outputs: vec![RequestedOutput { name: "logits".into(), parameters: Parameters::new() }],
        }
    }

    #[test]
    fn json_and_binary_are_the_same_request() {
        for binary in [false, true] {
            let body = encode_request(&example(), binary).unwrap();
            assert_eq!(body.header_length.is_some(), binary);
            let length = body.header_length;
            assert_eq!(decode_request(&body.into_bytes(), length), Ok(example()));
        }
    }

    #[test]
    fn a_binary_tensor_is_a_slice_of_the_body() {
        let body = encode_request(&example(), true).unwrap();
        let length = body.header_length;
        let body = body.into_bytes();
        let image = decode_request(&body, length).unwrap().inputs[0].data.clone();
        assert_eq!(image.as_ptr(), body[length.unwrap()..].as_ptr());
    }

    #[test]
    fn outputs_take_the_form_that_was_asked_for() {
        let response = InferResponse {
            model_name: "digits".into(),
            model_version: "2".into(),
            id: Some("7".into()),
            parameters: Parameters::new(),
            outputs: vec![Tensor::fp32("a", vec![1], [1.0]), Tensor::fp32("b", vec![1], [2.0])],
        };
        let request = json(
            r#"{"inputs": [], "parameters": {"binary_data_output": true},
                "outputs": [{"name": "b", "parameters": {"binary_data": false}}]}"#,
        )
        .unwrap();
        let body = encode_response(&response, |output| request.wants_binary(&output.name)).unwrap();
        let text = String::from_utf8_lossy(&body.parts[0]);
        assert!(
            text.contains(r#""name":"a","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}"#),
            "{text}"
        );
        assert!(text.contains(r#""name":"b","datatype":"FP32","shape":[1],"data":[2.0]"#), "{text}");
        let length = body.header_length;
        assert_eq!(decode_response(&body.into_bytes(), length), Ok(response));
    }

    #[test]
    fn errors_name_the_input_and_what_is_wrong() {
        for (body, expected) in [
            (
                r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[1,2]}]}"#,
                r#"input "x": shape [1, 3] has 3 elements, but the data has 2"#,
            ),
            (
                r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1]}]}"#,
                r#"input "x": there is no data: neither "data" nor the parameter "binary_data_size""#,
            ),
            (
                r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[-1],"data":[]}]}"#,
                r#"input "x": shape [-1] has a negative dimension"#,
            ),
            (
                r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}"#,
                r#"input "x": binary_data_size is 4, but only 0 bytes of the body are left"#,
            ),
            (
                r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":-4}}]}"#,
                r#"input "x": the parameter "binary_data_size" is not a count of bytes"#,
            ),
        ] {
            assert_eq!(sentence(body), expected);
        }
        assert!(sentence(r#"{"inputs":[{"name":"x"}]}"#).contains("missing field `datatype`"));
        assert!(sentence("nonsense").starts_with("the JSON does not parse as an inference message: "));
        let twice = [
            r#"{"inputs":[],"parameters":{"a":1,"a":2}}"#,
            r#"{"inputs":[],"outputs":[{"name":"y","parameters":{"a":1,"a":2}}]}"#,
            r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[0],"parameters":{"a":1,"\u0061":1},"data":[]}]}"#,
        ];
        for twice in twice {
            assert!(sentence(twice).contains("the parameter \"a\" is said twice"), "{}", sentence(twice));
        }
        for unknown in [
            r#"{"inputs":[],"temperature":1}"#,
            r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[0],"data":[],"layout":"NHWC"}]}"#,
            r#"{"inputs":[],"outputs":[{"name":"y","top":3}]}"#,
        ] {
            assert!(sentence(unknown).contains("unknown field"), "{}", sentence(unknown));
        }
        let nested = sentence(r#"{"inputs":[],"parameters":{"a":{}}}"#);
        assert!(nested.contains("a boolean, a number or a string as the value of a parameter"), "{nested}");
    }

    #[test]
    fn lengths_that_do_not_add_up_are_refused() {
        let body = encode_request(&example(), true).unwrap();
        let length = body.header_length;
        let mut long = body.clone().into_bytes().to_vec();
        long.push(0);
        assert_eq!(decode_request(&long.into(), length), Err(Error::Unclaimed(1)));
        let body = body.into_bytes();
        let cut = body.slice(..body.len() - 1);
        let problem = decode_request(&cut, length).unwrap_err().to_string();
        assert_eq!(
            problem,
            r#"input "text": binary_data_size is 11, but only 10 bytes of the body are left"#
        );
        assert!(matches!(decode_request(&body, Some(body.len() + 1)), Err(Error::HeaderTooLong { .. })));
        let headers = HeaderMap::from_iter([(HEADER_LENGTH.clone(), "-1".parse().unwrap())]);
        assert_eq!(header_length(&headers), Err(Error::HeaderNotANumber("-1".into())));
    }

    #[test]
    fn a_raw_body_is_a_batch_of_one() {
        let input = TensorMetadata { name: "image".into(), datatype: Datatype::Fp32, shape: vec![-1, 2] };
        let body = Tensor::fp32("", vec![2], [1.0, 2.0]).data;
        let request = raw_request(&body, std::slice::from_ref(&input)).unwrap();
        assert_eq!(request.inputs, [Tensor::fp32("image", vec![1, 2], [1.0, 2.0])]);
        assert!(request.wants_binary("anything"));
        assert!(raw_request(&body.slice(1..), std::slice::from_ref(&input)).is_err());
        assert!(
            raw_request(&body, &[input.clone(), input]).unwrap_err().to_string().contains("it has 2 inputs")
        );
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), header in prop::option::of(0usize..250)) {
            let body = Bytes::from(bytes);
            let _ = decode_request(&body, header);
            let _ = decode_response(&body, header);
        }

        #[test]
        fn nearly_right_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>(), binary in any::<bool>()) {
            let body = encode_request(&example(), binary).unwrap();
            let length = body.header_length;
            let mut bytes = body.into_bytes().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(request) = decode_request(&bytes.into(), length) {
                prop_assert!(request.inputs.iter().all(|input| input.check().is_ok()));
            }
        }
    }
}
