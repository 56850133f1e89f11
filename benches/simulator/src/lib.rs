//! Balancing policies on simulated GPUs: discrete events, deterministic by seed.
//!
//! Nothing here is a measurement of a real GPU; every figure that comes out of it is labelled simulated.

pub mod cases;
pub mod measure;
pub mod plot;
pub mod policies;
pub mod random;
pub mod report;
pub mod server;
pub mod workload;
pub mod world;
