//! What can be wrong with a message, told so that its sender can mend it.

use super::{Datatype, MAX_RANK, MAX_TENSORS};
use std::fmt;

/// The longest part of a message that a sentence about it repeats, bytes: the sentence becomes a header in gRPC, and stands
/// in logs, and must not be as long as what it speaks of.
const LONGEST: usize = 200;

/// The beginning of a text.
pub(super) fn brief(text: &str) -> &str {
    &text[..text.floor_char_boundary(LONGEST)]
}

/// What serde says, which may repeat a whole string from the middle of the message: its beginning, and its end, where it
/// says what was expected, and where.
fn told(sentence: &str) -> String {
    if sentence.len() <= 2 * LONGEST {
        return sentence.to_owned();
    }
    let end = &sentence[sentence.ceil_char_boundary(sentence.len() - LONGEST)..];
    format!("{} … {end}", brief(sentence))
}

/// Which list of a message a tensor stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The inputs of a request.
    Input,
    /// The outputs of a response.
    Output,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "input",
            Self::Output => "output",
        })
    }
}

/// Why a message was not read or written. Always the sender's fault; trying again does not help.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A tensor is not sound.
    #[error("{side} {:?}: {problem}", brief(name))]
    Tensor {
        /// Where it stands.
        side: Side,
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: Problem,
    },
    /// The JSON does not parse, or lacks a field.
    #[error("the JSON does not parse as an inference message: {}", told(.0))]
    Json(String),
    /// `Inference-Header-Content-Length` is not a number.
    #[error("Inference-Header-Content-Length is {:?}, which is not a count of bytes", brief(.0))]
    HeaderNotANumber(String),
    /// `Inference-Header-Content-Length` says more than there is.
    #[error("Inference-Header-Content-Length is {header}, but the body has only {body} bytes")]
    HeaderTooLong {
        /// What the header says.
        header: usize,
        /// What there is.
        body: usize,
    },
    /// Bytes that no tensor claims.
    #[error(
        "{0} bytes follow the last binary tensor; the binary_data_size of all tensors must add up to the rest of the body"
    )]
    Unclaimed(usize),
    /// A raw body for a model that has more than one input, or one of variable shape.
    #[error(
        "a raw body (Inference-Header-Content-Length: 0) needs a model with one input of known size: {0}"
    )]
    RawBody(String),
    /// More than [`MAX_TENSORS`].
    #[error("the message has {0} tensors, and at most {MAX_TENSORS} are read")]
    TooManyTensors(usize),
    /// Raw contents for some tensors only.
    #[error("there are {raw} raw contents for {tensors} tensors; there must be one for each, or none")]
    RawCount {
        /// Raw contents.
        raw: usize,
        /// Tensors.
        tensors: usize,
    },
    /// More than a gRPC message can have.
    #[error("the message would have {0} bytes, and one of gRPC has less than 4 GiB; send fewer rows at once")]
    TooLong(usize),
    /// A parameter without a value.
    #[error("parameter {:?} has no value", brief(.0))]
    EmptyParameter(String),
}

/// What is wrong with a tensor.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Problem {
    /// A datatype that the protocol does not have.
    #[error("the datatype {0:?} is not one of the protocol's: {list}", list = Datatype::list())]
    UnknownDatatype(String),
    /// A negative dimension.
    #[error("shape {0:?} has a negative dimension")]
    NegativeDimension(Vec<i64>),
    /// A shape beyond all measure.
    #[error("shape {0:?} has more elements than can be counted, or more than {MAX_RANK} dimensions")]
    TooLarge(Vec<i64>),
    /// Too few or too many elements.
    #[error("shape {shape:?} has {expected} elements, but the data has {found}")]
    ElementCount {
        /// The shape.
        shape: Vec<u64>,
        /// What it asks for.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// Too few or too many bytes.
    #[error("{datatype} of shape {shape:?} has {expected} bytes, but the data has {found}")]
    ByteCount {
        /// The datatype.
        datatype: Datatype,
        /// The shape.
        shape: Vec<u64>,
        /// What they ask for.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// `data` that is not an array.
    #[error("the data is not a JSON array")]
    NotAnArray,
    /// An element of the wrong kind, or out of range.
    #[error("element {index} of the data is {found}, which is not {datatype}")]
    Element {
        /// Its place.
        index: u64,
        /// As it was written, shortened.
        found: String,
        /// What it should be.
        datatype: Datatype,
    },
    /// FP16 or BF16 as JSON or typed contents.
    #[error("{0} has no form as JSON numbers or typed contents; send it as binary data or raw contents")]
    BinaryOnly(Datatype),
    /// Neither `data` nor `binary_data_size`.
    #[error("there is no data: neither \"data\" nor the parameter \"binary_data_size\"")]
    NoData,
    /// Both of them.
    #[error("there are both \"data\" and the parameter \"binary_data_size\"; send one of them")]
    TwoData,
    /// Data, and a place in shared memory.
    #[error("there are both data and the parameter \"shared_memory_region\"; send one of them")]
    DataAndPlace,
    /// `binary_data_size` that is not a count.
    #[error("the parameter \"binary_data_size\" is not a count of bytes")]
    BinarySize,
    /// `binary_data_size` without binary data behind the JSON.
    #[error("binary_data_size is {wanted}, but only {left} bytes of the body are left")]
    BinaryMissing {
        /// What the tensor claims.
        wanted: u64,
        /// What is left.
        left: u64,
    },
    /// BYTES whose lengths do not add up.
    #[error("element {index} of the BYTES data says it has {length} bytes, but only {left} are left")]
    BytesCut {
        /// Its place.
        index: u64,
        /// What its length says.
        length: u64,
        /// What is left.
        left: u64,
    },
    /// BYTES that JSON cannot hold.
    #[error("element {0} of the BYTES data is not UTF-8; ask for it as binary data")]
    NotUtf8(u64),
    /// NaN or infinite, which JSON cannot hold.
    #[error("element {0} is not finite, which JSON cannot say; ask for the output as binary data")]
    NotFinite(u64),
    /// Contents in two forms, or in the list of another datatype.
    #[error("the contents are not in the list of {0} alone")]
    Contents(Datatype),
}
