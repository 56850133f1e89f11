//! Load reports (ORCA): what a server says about its load, on a response.
//!
//! In: a header map, or one header value. Out: [`LoadReport`], everything that was said, or [`load::Load`], the numbers
//! that Penstock itself balances by, read and written without allocating, and merged with what an application told of
//! itself. [`service`] is the same out of band.
//!
//! Three generations of the header are in the field, and all are read:
//!
//! | Header | Value | Who |
//! |---|---|---|
//! | `endpoint-load-metrics` | `TEXT a=1, b=2`, `JSON {…}` or `BIN <base64>`; pairs with `=` or `:` | Envoy, Triton, vLLM today |
//! | `endpoint-load-metrics` | `a:1,b:2`, no prefix | Envoy, first form |
//! | `endpoint-load-metrics-json`, `endpoint-load-metrics-bin` | JSON; base64 of the protobuf message | Envoy, first form; the `-bin` one is also gRPC's trailer |
//!
//! Written are only the prefixed text with `=` and the `-bin` form.
//!
//! A number that cannot be a load (negative, infinite, not a number) is skipped, and so is an unknown name: one odd
//! metric must not cost the others. What fails as a whole (size, base64, JSON, protobuf) is an [`Error`].

mod gpu;
pub mod load;
mod merge;
mod number;
mod read;
mod report;
pub mod service;
mod write;

pub use gpu::{GpuHealth, GpuId};
pub use load::Load;
pub use merge::Format;
pub use report::LoadReport;

use http::HeaderName;

/// The largest header value that is read. A report of all of Triton's metrics is below 1 KiB.
pub const MAX_BYTES: usize = 4096;

/// The most metrics that are read from one report.
pub const MAX_METRICS: usize = 128;

/// `endpoint-load-metrics`: the report as prefixed text, JSON or base64.
pub static TEXT_HEADER: HeaderName = HeaderName::from_static(penstock_api::names::header::LOAD_REPORT);
/// `endpoint-load-metrics-bin`: base64 of the serialised message; in gRPC a trailer.
pub static BIN_HEADER: HeaderName = HeaderName::from_static(penstock_api::names::header::LOAD_REPORT_BIN);
/// `endpoint-load-metrics-json`: the first generation's JSON, only read.
pub static JSON_HEADER: HeaderName = HeaderName::from_static("endpoint-load-metrics-json");

/// The protobuf message of xDS, for those who speak it whole.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod pb {
    tonic::include_proto!("xds.data.orca.v3");
}

/// Why a load report was not read. The response that carried it is none the worse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More than [`MAX_BYTES`].
    #[error("the load report has {0} bytes, and at most {MAX_BYTES} are read")]
    TooLong(usize),
    /// More than [`MAX_METRICS`].
    #[error("the load report has more than {MAX_METRICS} metrics")]
    TooMany,
    /// Not visible ASCII where text was promised.
    #[error("the load report is not text")]
    NotText,
    /// Base64 that does not decode.
    #[error("the load report is not base64")]
    NotBase64,
    /// JSON that is not an object of numbers and of objects of numbers.
    #[error("the load report is not the JSON of an OrcaLoadReport: {0}")]
    NotJson(String),
    /// Bytes that are not an OrcaLoadReport.
    #[error("the load report is not a serialised OrcaLoadReport")]
    NotProtobuf,
}
