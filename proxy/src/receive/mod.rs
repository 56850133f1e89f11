//! Bodies that are taken past hyper, straight to where they are to lie.
//!
//! hyper reads a body into buffers of its own and hands it on in pieces; whoever wants it in a certain place copies it there. For a
//! request that brings large tensors ([`framing`]) that copy is all that the proxy does with them. So a [`Gate`] stands between such a
//! connection and hyper: it lets hyper see the head, but with a `Content-Length` of zeros, and then nothing until the body has
//! been taken by its reader ([`Direct`]), who reads the connection itself, into whatever memory it has. hyper takes the body for empty
//! and the request for complete; the handler gets the head with its true length, and the body as [`ClientBody::Direct`].
//!
//! ```text
//! connection ──▶ Gate ──▶ hyper ──▶ handler        head, length 0 │ what follows, once the body is gone
//!                  └──────▶ Direct ──▶ arena       body: one read, no buffer of ours
//! ```
//!
//! Which request of hyper's is which of the gate's is told by their number: both count requests in order, and both see the same
//! requests ([`framing`] says why). Nothing that a client sends decides it; should they ever differ, the connection is closed
//! ([`Claims::of`]). A handler that does not want the body drops it, and the gate skips what is left of it; where that is more
//! than 256 KiB, the answer ends the connection ([`Claims::ends_with`]), since a length is a number that anybody can write. A client that leaves
//! half-way is an error for the reader, and the end of the connection for hyper, which cancels the request as ever.

pub mod body;
pub mod framing;
pub mod gate;
#[cfg(test)]
mod tests;

pub use body::{ClientBody, Direct};
pub use gate::{Claims, Gate};
