//! Control from the outside: real TLS, real gRPC, real HTTP, a real process that is killed.
#![cfg(test)]

mod fleet;
mod identity;
mod mesh;
mod process;
mod push;
