//! What breaks, and what users see of it: one fault a test, under a steady load through real sidecars in namespaces, before, during and
//! after it.
//!
//! Each test asserts what the protocol allows to keep, and measures the rest. With `UPDATE_DOCS=1` (`make faults`) it writes its rows into the
//! table of docs/RELIABILITY.md; otherwise it only checks. It needs what `namespaces` needs.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod clock;
mod machine;
mod network;
mod processes;
mod steady;
mod table;
mod world;
