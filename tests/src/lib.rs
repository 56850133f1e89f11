//! What the tests and the demo share.

pub mod digits;
pub mod testkit;
