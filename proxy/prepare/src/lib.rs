//! From what a client sends to the tensor that a model wants, on the CPU: decode, turn, resize, crop, normalise.
//!
//! In: a [`Declaration`], of which a [`Pipeline`] is made once; then for each input its bytes, a place for the tensor and
//! [`Limits`]. Out: the finished tensor in that place, nothing else. Can go wrong: the declaration makes no sense
//! ([`DeclarationError`] says where and what to write), or an input is no such input ([`PrepareError`] says why, and whose fault it
//! is). Touches nothing: no sockets, no threads, no clock; whoever runs it brings a thread, and says when to stop.
//!
//! The shape of the tensor is known from the declaration, so that its place can be leased before the first byte has come.
//!
//! ```
//! use penstock_prepare::{Declaration, Limits, Pipeline, Preset, Scratch};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let declaration = Declaration { preset: Some(Preset::Imagenet), ..Declaration::default() };
//! let pipeline = Pipeline::new(&declaration)?;
//! assert_eq!((pipeline.shape(), pipeline.bytes()), ([3, 224, 224], 602_112));
//!
//! let mut tensor = vec![0; pipeline.bytes()];
//! let refused = pipeline.run(b"GIF89a", &mut tensor, &mut Scratch::default(), &Limits::default(), &|| false);
//! assert!(refused.is_err_and(|error| error.is_clients()));
//! # Ok(())
//! # }
//! ```

mod decode;
mod error;
pub mod form;
pub mod fuzz;
mod geometry;
pub mod head;
mod limits;
mod picture;
mod pipeline;
pub mod reference;
mod resize;
mod source;
mod tensor;

pub use decode::JPEG_DECODER;
pub use error::{DeclarationError, PrepareError};
pub use form::{Declaration, Preset};
pub use limits::{Limits, MAX_TENSORS};
pub use picture::Picture;
pub use pipeline::{Pipeline, Scratch};
