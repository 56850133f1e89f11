//! One execution for many requests, as pure state machines: no sockets, no tasks, and time is an argument.
//!
//! - [`batch`]: which requests are executed together, and when.
//! - [`flight`]: requests that are the same run once while one of them is in flight.
//! - [`cache`]: answers that are kept for a while.
//! - [`json`]: requests in JSON, in the one form that all have who ask the same.
//! - [`key`]: when two requests are the same, and when they can share an execution.

pub mod batch;
pub mod cache;
pub mod flight;
pub mod json;
pub mod key;
