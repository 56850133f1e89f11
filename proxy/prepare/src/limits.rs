//! What an input may cost. Everything is checked against what headers say before a pixel is decoded, and memory while it is.

use crate::PrepareError;
use crate::head::{Format, Head};

/// Bytes of all tensors that are made for a request. A pipeline whose single tensor is larger can never be used.
pub const MAX_TENSORS: usize = 256 << 20;

/// What is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of an input.
    pub bytes: usize,
    /// Pixels of an image.
    pub pixels: u64,
    /// Columns, and rows.
    pub side: u32,
    /// Bytes that decoding may take besides the input: pixels and what the decoder keeps of each, by an estimate for the format.
    /// Tables and windows, which do not grow with the image, come on top: half a MiB. What no header tells, such as how many
    /// prefix codes a lossless WebP has, is watched while it is decoded, where the program's allocator is
    /// [`Counting`](penstock_kernels::allocated::Counting).
    pub memory: u64,
    /// Scans of a progressive JPEG, each of which costs a walk over all coefficients however few bytes it has. Usual ones have 10.
    pub scans: u32,
}

impl Default for Limits {
    /// A photograph of any camera on sale, and little more.
    fn default() -> Self {
        Self { bytes: 64 << 20, pixels: 64 << 20, side: 16_384, memory: 512 << 20, scans: 64 }
    }
}

impl Limits {
    /// Whether an image with this head may be decoded.
    pub(crate) fn check(&self, head: &Head) -> Result<(), PrepareError> {
        let (width, height) = (head.width, head.height);
        let pixels = u64::from(width) * u64::from(height);
        let checks = [
            ("its longer side has", u64::from(width.max(height)), u64::from(self.side)),
            ("its pixels are", pixels, self.pixels),
            ("bytes that decoding takes are", pixels.saturating_mul(bytes_for_each_pixel(head)), self.memory),
            ("its scans are", u64::from(head.scans), u64::from(self.scans)),
        ];
        match checks.into_iter().find(|(_, found, limit)| found > limit) {
            None => Ok(()),
            Some((what, found, limit)) => {
                Err(PrepareError::Limit { format: head.format, width, height, what, found, limit })
            }
        }
    }
}

/// Pixels, and what the decoder keeps of each until the last is decoded.
fn bytes_for_each_pixel(head: &Head) -> u64 {
    let channels = u64::from(head.channels);
    match head.format {
        // The planes, and all of them in one; of a progressive file the coefficients too, 16 bits each.
        Format::Jpeg => channels * if head.progressive { 4 } else { 2 },
        // Up to four channels, at 16 bits while a row is unpacked; the rows of an interlaced file are put in place at once.
        Format::Png => 4,
        // RGBA twice and the planes (lossy), or RGBA and the entropy image (lossless).
        Format::Webp => 12,
    }
}
