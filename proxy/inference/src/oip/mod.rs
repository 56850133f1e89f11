//! The Open Inference Protocol v2: what a client asks of a model, and what it gets.
//!
//! One form for all wires: an [`InferRequest`] and an [`InferResponse`] hold their tensors as [`Tensor`]s, whose data is
//! row-major, little-endian [`Bytes`], whatever came in.
//!
//! - [`rest`]: JSON, and JSON with binary tensors behind it (`Inference-Header-Content-Length`). A binary tensor is a
//!   slice of the body: nothing is copied.
//! - [`grpc`]: the messages and stubs of `inference.GRPCInferenceService`, and the way between them and the form above.
//!   Raw contents are moved, not copied.
//! - [`batch`]: several requests as one, and its answer as several.
//! - [`shm`]: tensors in system shared memory.
//! - [`prefix`]: model, version and rows of a request, from the beginning of its body on either wire.
//!
//! A tensor that was read is consistent: its bytes are what datatype and shape ask for, BOOL is 0 or 1, and the lengths
//! inside BYTES add up. What is not is an [`Error`] that names the tensor.

pub mod batch;
mod error;
pub mod grpc;
mod json;
pub mod prefix;
pub mod rest;
pub mod shm;
mod tensor;

use bytes::{Bytes, BytesMut};

pub use error::{Error, Problem, Side};
pub use tensor::{Datatype, Tensor, elements, strings};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt;

/// The most dimensions that a tensor may have.
pub const MAX_RANK: usize = 16;

/// The most tensors in one message.
pub const MAX_TENSORS: usize = 256;

/// Pieces in one. Copies, unless there is only one.
pub fn whole(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 {
        return pieces.remove(0);
    }
    let mut whole = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
    whole.freeze()
}

/// Parameters of a request, a response or a tensor. Ordered by name.
pub type Parameters = BTreeMap<String, Parameter>;

/// A parameter's value.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Parameter {
    /// `true` or `false`.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// An integer above what [`Parameter::Int`] holds.
    Uint(u64),
    /// A number with a fraction.
    Double(f64),
    /// Text.
    String(String),
}

impl<'de> Deserialize<'de> for Parameter {
    /// By way of the text: as serde_json reads numbers, in favour of speed, the last bit of a fraction may be another, and
    /// a request that is written anew for its batch would ask something else.
    fn deserialize<D: serde::Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        use serde::de::{Error as _, Unexpected};
        let text = <&RawValue>::deserialize(source)?.get();
        if let Ok(value) = text.parse() {
            return Ok(Self::Bool(value));
        }
        if text.starts_with('"') {
            return serde_json::from_str(text).map(Self::String).map_err(D::Error::custom);
        }
        // `-0` is no integer: it would come out as `0`.
        if text != "-0" {
            if let Ok(value) = text.parse() {
                return Ok(Self::Int(value));
            }
            if let Ok(value) = text.parse() {
                return Ok(Self::Uint(value));
            }
        }
        let number = text.parse().ok().filter(|value: &f64| value.is_finite());
        number.map(Self::Double).ok_or_else(|| {
            let expected = "a boolean, a number or a string as the value of a parameter";
            D::Error::invalid_value(Unexpected::Other(error::brief(text)), &expected)
        })
    }
}

/// Reads parameters of which none is said twice: some readers of JSON take the first, others the last.
pub(super) fn said_once<'de, D: serde::Deserializer<'de>>(source: D) -> Result<Parameters, D::Error> {
    struct Once;
    impl<'de> serde::de::Visitor<'de> for Once {
        type Value = Parameters;

        fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
            to.write_str("parameters")
        }

        fn visit_map<M: serde::de::MapAccess<'de>>(self, mut map: M) -> Result<Parameters, M::Error> {
            let mut parameters = Parameters::new();
            while let Some(name) = map.next_key::<String>()? {
                let value = map.next_value()?;
                if parameters.contains_key(&name) {
                    let name = error::brief(&name);
                    let twice = format_args!("the parameter {name:?} is said twice").to_string();
                    return Err(serde::de::Error::custom(twice));
                }
                parameters.insert(name, value);
            }
            Ok(parameters)
        }
    }
    source.deserialize_map(Once)
}

/// What a client asks of a model. Model and version are not in it: over REST they are in the path.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InferRequest {
    /// The client's own id of the request; the response repeats it.
    pub id: Option<String>,
    /// Parameters of the request.
    pub parameters: Parameters,
    /// The model's inputs.
    pub inputs: Vec<Tensor>,
    /// The outputs that are wanted; empty: all.
    pub outputs: Vec<RequestedOutput>,
}

/// An output that a client wants, and how.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestedOutput {
    /// The output's name.
    pub name: String,
    /// `binary_data`, `classification` and others.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "said_once")]
    pub parameters: Parameters,
}

impl InferRequest {
    /// Whether a REST client wants this output as binary data: what it said of the output itself, else what it said
    /// of all of them.
    pub fn wants_binary(&self, output: &str) -> bool {
        let of_all = self.parameters.get("binary_data_output");
        let of_this = self.outputs.iter().find(|wanted| wanted.name == output);
        let said = of_this.and_then(|wanted| wanted.parameters.get("binary_data")).or(of_all);
        said == Some(&Parameter::Bool(true))
    }
}

/// What a model answered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InferResponse {
    /// The model.
    pub model_name: String,
    /// Its version; empty: not told.
    pub model_version: String,
    /// The id of the request.
    pub id: Option<String>,
    /// Parameters of the response.
    pub parameters: Parameters,
    /// The model's outputs.
    pub outputs: Vec<Tensor>,
}

/// `GET v2`: what the server is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ServerMetadata {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// What it can do beyond the protocol.
    #[serde(default)]
    pub extensions: Vec<String>,
}

/// `GET v2/models/{name}`: what a model takes and gives.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelMetadata {
    /// Its name.
    pub name: String,
    /// The versions that can be asked.
    #[serde(default)]
    pub versions: Vec<String>,
    /// The framework.
    pub platform: String,
    /// What it takes.
    pub inputs: Vec<TensorMetadata>,
    /// What it gives.
    pub outputs: Vec<TensorMetadata>,
}

/// Name, datatype and shape of a model's input or output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorMetadata {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub datatype: Datatype,
    /// Its dimensions; -1 is one of any size.
    pub shape: Vec<i64>,
}

impl fmt::Display for TensorMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?}", self.name, self.datatype, self.shape)
    }
}

/// The body of a REST answer that is not 200.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: String,
}
