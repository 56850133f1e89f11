//! The wire formats of inference.
//!
//! - [`orca`]: load reports, which ride on responses and say how busy a server is.
//! - [`oip`]: the Open Inference Protocol v2: REST with JSON and binary tensors, and gRPC.
//! - [`openai`]: what an OpenAI request asks for, from the beginning of its body.
//! - [`page`]: the metrics pages of model servers and GPU exporters.
//!
//! Bytes come in, values with checked sizes go out, and the other way round. No sockets, no clocks. Everything that
//! reads is bounded by the bytes it was given and never panics on them.

pub mod oip;
pub mod openai;
pub mod orca;
pub mod page;
mod scan;
