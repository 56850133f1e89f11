//! The mesh as it is in a cluster, without one: real hosts as network namespaces, whose traffic the kernel redirects.
//!
//! It needs root, or `unshare -Urn --map-auto`; elsewhere each test says that it was left out, and in CI it fails.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod access;
mod conformance;
mod edges;
mod lifecycle;
mod rules;
mod strictness;
mod traffic;
