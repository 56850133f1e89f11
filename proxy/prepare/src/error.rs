//! What can be wrong with a declaration, and with an input.

use crate::head::Format;

/// A declaration that cannot be: which field, what is wrong with it, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}`: {what}; {fix}")]
pub struct DeclarationError {
    /// The field, from the top of the pipeline.
    pub field: &'static str,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub fix: String,
}

impl DeclarationError {
    pub(crate) fn new(field: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { field, what: what.into(), fix: fix.into() }
    }
}

/// Why an input did not become a tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// The first bytes belong to no format that is read.
    #[error("this is no image that can be read: it begins with {begins}, and JPEG, PNG and WebP do not")]
    Format {
        /// The first bytes, in hexadecimal.
        begins: String,
    },
    /// Text in which bytes were to be.
    #[error("it looks like base64, which breaks at byte {at}")]
    Base64 {
        /// Of the element, as it was sent.
        at: usize,
    },
    /// More than is allowed; known before anything was decoded.
    #[error(
        "{format} of {width} x {height} pixels refused before decoding: {what} {found}, and the limit is {limit}"
    )]
    Limit {
        /// The format.
        format: Format,
        /// Columns, as the header says.
        width: u32,
        /// Rows, as the header says.
        height: u32,
        /// What there is too much of.
        what: &'static str,
        /// How much.
        found: u64,
        /// What is allowed.
        limit: u64,
    },
    /// More memory than is allowed, which was not to be seen before decoding.
    #[error("{format} refused while it was decoded: it takes more than the {limit} bytes that are the limit")]
    Memory {
        /// The format.
        format: Format,
        /// What is allowed, in bytes.
        limit: u64,
    },
    /// An input with more bytes than allowed.
    #[error("the input has {found} bytes, and the limit is {limit}")]
    Bytes {
        /// How many.
        found: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The format is known, but this file is not what it should be.
    #[error("damaged {format}: {reason}")]
    Damaged {
        /// The format.
        format: Format,
        /// What the decoder found.
        reason: String,
    },
    /// A part of the format that nothing here reads.
    #[error("{format} with {feature} is not supported")]
    Unsupported {
        /// The format.
        format: Format,
        /// Which part.
        feature: String,
    },
    /// Raw input of another size than declared.
    #[error("the input is declared as {declared}, which is {expected} bytes, but it has {found}")]
    Size {
        /// What the pipeline expects.
        declared: String,
        /// In bytes.
        expected: usize,
        /// What came.
        found: usize,
    },
    /// The image is smaller than what is to be cut out of it.
    #[error(
        "the image has {width} x {height} pixels, too few to crop {crop_width} x {crop_height} out of it: declare a resize"
    )]
    TooSmall {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
        /// Columns wanted.
        crop_width: u32,
        /// Rows wanted.
        crop_height: u32,
    },
    /// The place for the tensor has another size than the tensor.
    #[error("the tensor has {expected} bytes, but there is room for {found}")]
    Room {
        /// What the pipeline writes.
        expected: usize,
        /// What it was given.
        found: usize,
    },
    /// The caller did not want it any more.
    #[error("cancelled")]
    Cancelled,
    /// A library did what it should not.
    #[error("a fault of ours while {doing}: {reason}")]
    Internal {
        /// What was done.
        doing: &'static str,
        /// What happened.
        reason: String,
    },
}

impl PrepareError {
    /// Whether another input would have done: the client's fault, a 400.
    pub fn is_clients(&self) -> bool {
        !matches!(self, Self::Room { .. } | Self::Cancelled | Self::Internal { .. })
    }
}
