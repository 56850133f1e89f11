//! The GPU's side on the STAND-IN driver (kernels/standin): what the kernels compute, what is promised of memory that
//! is on its way, and what every failure leads to. None of it says anything about a real GPU but that the same source
//! runs there.
#![cfg(test)]

mod driver;
mod failures;
mod kernels;
mod memory;
mod nvjpeg;
mod program;
mod region;
