//! GPUs of NVIDIA's, where there are any.
//!
//! ```text
//! Driver ──▶ Context ──┬─▶ Stream ── upload, download, copy, fill ──▶ Pending<T> ── poll, wait ──▶ T
//!  (or why   (a device)├─▶ DeviceMemory ── export ──▶ another process
//!   there is            ├─▶ Pinned, Registered: the arena's further kinds of memory
//!   none)               ├─▶ Jpegs ── decode ──▶ Pending (nvJPEG, where it is)
//!                       └─▶ Kernels ── prepare, convert, gather, scatter ──▶ Pending
//! ```
//!
//! In: what lies in host memory, as [`Bytes`](bytes::Bytes) or as rows of the arena. Out: tensors in memory of the
//! device, or back in the arena. Can go wrong: there is no driver, or an old one, or no device ([`Absent`], in one
//! sentence, and the caller goes on without); a call fails ([`Error`], with what it was about and what can be done);
//! the device is lost, after which every call says so.
//!
//! The driver is `libcuda.so.1`, opened when it is asked for; nothing is linked, and no function is called that was not
//! found first. `cudarc`, the crate of the field, is not used: it panics where the library, or one function of it, is
//! missing, and what is needed here is forty functions.
//!
//! # What is promised of memory
//!
//! A copy or a kernel that is on its way keeps everything that it reads or writes: that is what [`Pending`] holds. Who
//! drops one that is not done gives it to the context, which lets go of it when the device has reached it: slots of the
//! arena that a copy still reads are nobody else's until then. Of a lost device nothing is given back at all, since
//! nothing says what it still does.
//!
//! Host memory is handed over by value, and comes back with [`Pending::poll`] or [`Pending::wait`]; that is why there
//! is no copy from a borrowed slice. Nothing waits but what is called `wait`.
//!
//! What two streams do at once with the same memory *of a device* is not looked at: it may make nonsense of its
//! contents, but does not touch this process.

mod args;
#[expect(unsafe_code, reason = "functions of the driver are called here, and what it keeps is given back")]
mod context;
#[expect(unsafe_code, reason = "the driver is opened here, and its functions are called")]
mod driver;
mod error;
mod images;
#[expect(unsafe_code, reason = "kernels are launched here, with addresses that were checked")]
mod kernels;
#[expect(unsafe_code, reason = "memory comes from the driver here, and goes back to it")]
mod memory;
#[expect(unsafe_code, reason = "nvJPEG is opened here, and its functions are called")]
mod nvjpeg;
#[expect(unsafe_code, reason = "copies are started here, of memory that their `Pending` keeps")]
mod stream;
#[expect(unsafe_code, reason = "the types of the driver's functions, and how they are found")]
mod sys;

pub use context::Context;
pub use driver::{Absent, Device, Driver, detect};
pub use error::{Error, Kind};
pub use kernels::{Conversion, Kernels, Launched, Order, Rows, Source};
pub use memory::{DeviceMemory, IpcHandle, Span};
pub(crate) use memory::{Pinned, Registered};
pub use nvjpeg::{Decoding, JpegError, JpegKind, Jpegs, NoJpegs};
pub use stream::{Landing, Mark, Pending, Stream};
