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

/// Columns and rows, from the first bytes of an image alone: what decoding it will cost at least. `None`: they do not say.
pub fn size(bytes: &[u8]) -> Option<(u32, u32)> {
    match bytes {
        [0xff, 0xd8, 0xff, ..] => {
            let mut at = 2;
            // A file of empty segments says its size late; it is not looked for then.
            for _ in 0..256 {
                let marker = *bytes.get(at + 1).filter(|_| bytes[at] == 0xff)?;
                if matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) {
                    return Some((be16(bytes, at + 7)?.into(), be16(bytes, at + 5)?.into()));
                }
                at += match marker {
                    0xff => 1,
                    _ => 2 + usize::from(be16(bytes, at + 2)?),
                };
            }
            None
        }
        [0x89, b'P', b'N', b'G', ..] => Some((be32(bytes, 16)?, be32(bytes, 20)?)),
        [b'R', b'I', b'F', b'F', ..] => match bytes.get(12..16)? {
            b"VP8X" => Some(((le32(bytes, 24)? & 0xff_ffff) + 1, (le32(bytes, 26)? >> 8 & 0xff_ffff) + 1)),
            b"VP8 " => Some((le32(bytes, 26)? & 0x3fff, le32(bytes, 26)? >> 16 & 0x3fff)),
            b"VP8L" => Some(((le32(bytes, 21)? & 0x3fff) + 1, (le32(bytes, 21)? >> 14 & 0x3fff) + 1)),
            _ => None,
        },
        _ => None,
    }
}

/// Whether bytes begin as a JPEG does.
pub fn is_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, 0xd8, 0xff])
}

/// Whether an image, whose head was read, is a JPEG of gray or of YCbCr, which every decoder reads in the same way: no
/// CMYK, and no RGB that only some know by its signs.
pub(crate) fn is_usual_jpeg(bytes: &[u8], head: &Head) -> bool {
    head.format == Format::Jpeg && matches!(head.channels, 1 | 3) && jpeg::is_usual(bytes)
}

/// Whether bytes begin as an image does.
pub fn is_image(bytes: &[u8]) -> bool {
    !matches!(read(bytes.get(..16).unwrap_or(bytes)), Err(PrepareError::Format { .. }))
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
