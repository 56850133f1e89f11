//! From bytes of an image to pixels: 8 bits, gray or RGB, rows without gaps, in memory that is used again.
//!
//! In: an image whose head was read and found within the limits. Out: its pixels, at a fraction of its size if it is a JPEG
//! and that was asked for. Alpha is left out, CMYK is converted as Pillow does it, colour profiles are not looked at, and of 16
//! bits the upper eight stay. Can go wrong: the image is damaged, has a feature that nothing here reads, or is not wanted any more.

#[cfg_attr(feature = "turbojpeg", path = "jpeg_turbo.rs")]
pub(crate) mod jpeg;
mod png;
mod webp;
pub(crate) mod yuv;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use penstock_kernels::allocated;

use crate::head::{Format, Head};
use crate::{Limits, PrepareError};

/// Which JPEG decoder this build has.
pub const JPEG_DECODER: &str = jpeg::NAME;

/// Tables and windows, which come on top of what the limit of memory counts: bytes.
const TABLES: u64 = 512 << 10;

/// What lies in a buffer of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// 1 or 3.
    pub(crate) channels: u8,
}

impl Image {
    pub(crate) fn bytes(&self) -> usize {
        self.width as usize * self.height as usize * usize::from(self.channels)
    }
}

/// Decodes `bytes` into `pixels`; a JPEG at `eighths` of its size (1, 2, 4 or 8).
pub(crate) fn decode(
    bytes: &[u8],
    head: &Head,
    eighths: u32,
    (pixels, jpeg): (&mut Vec<u8>, &mut jpeg::Decoder),
    limits: &Limits,
    cancelled: &dyn Fn() -> bool,
) -> Result<Image, PrepareError> {
    // Headers were held against the limit, but not all of what a decoder keeps is told by them.
    let most = isize::try_from(limits.memory.saturating_add(TABLES)).unwrap_or(isize::MAX);
    let before = allocated::bytes();
    let over = Cell::new(false);
    let stop = &|| {
        over.set(over.get() || allocated::bytes() - before > most);
        over.get() || cancelled()
    };
    // The decoders are fuzzed by their authors and by us, and none is known to panic. Should one do it all the same, that must
    // cost one request, not a worker: pixels and decoder are only buffers, whatever is left in them.
    let decoded = catch_unwind(AssertUnwindSafe(|| match head.format {
        Format::Jpeg => jpeg.decode(bytes, head, eighths, pixels, stop),
        Format::Png => png::decode(bytes, head, pixels, stop),
        Format::Webp => webp::decode(bytes, head, pixels, stop),
    }));
    let decoded = decoded.unwrap_or_else(|_| {
        *jpeg = jpeg::Decoder::default();
        *pixels = Vec::new();
        Err(damaged(head.format, "its decoder panicked"))
    });
    // Readers end with an error when they are stopped, and decoders make of it what they like.
    match decoded {
        Err(_) if over.get() => Err(PrepareError::Memory { format: head.format, limit: limits.memory }),
        Err(_) if cancelled() => Err(PrepareError::Cancelled),
        decoded => decoded,
    }
}

fn damaged(format: Format, reason: impl ToString) -> PrepareError {
    PrepareError::Damaged { format, reason: reason.to_string() }
}

/// Makes `pixels` `bytes` long without writing what is there already.
fn room(pixels: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if pixels.len() < bytes {
        pixels.resize(bytes, 0);
    }
    &mut pixels[..bytes]
}

/// Leaves out the last channel of every pixel, in place.
fn without_alpha<const ALL: usize, const KEPT: usize>(pixels: &mut [u8]) {
    for pixel in 0..pixels.len() / ALL {
        pixels.copy_within(pixel * ALL..pixel * ALL + KEPT, pixel * KEPT);
    }
}

/// CMYK to RGB in place, as Pillow does it.
fn rgb_of_cmyk(pixels: &mut [u8]) {
    for pixel in 0..pixels.len() / 4 {
        let at = pixel * 4;
        let white = 255 - pixels[at + 3];
        let rgb: [u8; 3] = std::array::from_fn(|channel| {
            let product = u32::from(pixels[at + channel]) * u32::from(white) + 128;
            white.saturating_sub((((product >> 8) + product) >> 8) as u8)
        });
        pixels[pixel * 3..][..3].copy_from_slice(&rgb);
    }
}
