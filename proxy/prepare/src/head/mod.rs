//! The head of an image: what it is, how large, which way up. Nothing is decoded, nothing is allocated, and every byte is
//! distrusted.

pub mod exif;
mod jpeg;
mod png;
mod webp;

use std::fmt;

use crate::PrepareError;
pub use exif::Orientation;

/// A format of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Baseline and progressive.
    Jpeg,
    /// All depths and colour types, interlaced or not; of an animation the still image.
    Png,
    /// Lossy and lossless, not animated.
    Webp,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::Webp => "WebP",
        })
    }
}

/// What the head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The format.
    pub format: Format,
    /// Columns as stored, before any orientation.
    pub width: u32,
    /// Rows as stored.
    pub height: u32,
    /// Channels as stored; of a palette, those of its colours.
    pub channels: u8,
    /// How to turn it.
    pub orientation: Orientation,
    /// Whether a JPEG is progressive.
    pub progressive: bool,
    /// Scans of a JPEG; 1 for what has none.
    pub scans: u32,
}

/// Reads the head of an image.
pub fn read(bytes: &[u8]) -> Result<Head, PrepareError> {
    match bytes {
        [0xff, 0xd8, 0xff, ..] => jpeg::read(bytes),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => png::read(bytes),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp::read(bytes),
        _ => {
            let begins: Vec<String> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            let begins = if begins.is_empty() { "nothing".to_owned() } else { begins.join(" ") };
            Err(PrepareError::Format { begins })
        }
    }
}

fn damaged(format: Format, reason: impl Into<String>) -> PrepareError {
    PrepareError::Damaged { format, reason: reason.into() }
}

fn unsupported(format: Format, feature: impl Into<String>) -> PrepareError {
    PrepareError::Unsupported { format, feature: feature.into() }
}

/// A big-endian number at `at`, if it is there.
fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
