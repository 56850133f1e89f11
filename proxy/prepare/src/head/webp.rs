//! WebP: its first chunk, the frame behind an extended one, and that with EXIF.

use super::exif::{self, Orientation};
use super::{Format, Head, damaged, le32, unsupported};
use crate::PrepareError;

pub(super) fn read(bytes: &[u8]) -> Result<Head, PrepareError> {
    let cut = || damaged(Format::Webp, "it ends within its header");
    let first = bytes.get(12..16).ok_or_else(cut)?;
    let body = bytes.get(20..).ok_or_else(cut)?;
    let mut orientation = Orientation::default();
    let (width, height, channels) = match first {
        b"VP8 " => {
            let (width, height) = lossy(body)?;
            (width, height, 3)
        }
        b"VP8L" => {
            let (width, height) = lossless(body)?;
            (width, height, 4)
        }
        b"VP8X" => {
            let [flags, _, _, _, w0, w1, w2, h0, h1, h2, ..] = *body else { return Err(cut()) };
            if flags & 0x02 != 0 {
                return Err(unsupported(Format::Webp, "an animation"));
            }
            let side = |a, b, c| u32::from_le_bytes([a, b, c, 0]) + 1;
            let canvas = (side(w0, w1, w2), side(h0, h1, h2));
            let mut exif = None;
            for (name, body) in chunks(bytes) {
                let frame = match name {
                    b"VP8 " => lossy(body)?,
                    b"VP8L" => lossless(body)?,
                    b"EXIF" if flags & 0x08 != 0 => {
                        exif.get_or_insert(body);
                        continue;
                    }
                    _ => continue,
                };
                // A decoder allocates for the frame, and the limits are asked about the canvas.
                if frame != canvas {
                    return Err(damaged(Format::Webp, "its frame has another size than its canvas"));
                }
            }
            if let Some(exif) = exif {
                // Some writers put JPEG's prefix before it.
                orientation = exif::orientation(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif));
            }
            (canvas.0, canvas.1, 4)
        }
        _ => return Err(damaged(Format::Webp, "its first chunk is no image")),
    };
    if width == 0 || height == 0 {
        return Err(damaged(Format::Webp, format!("its size is {width} x {height}")));
    }
    Ok(Head { format: Format::Webp, width, height, channels, orientation, progressive: false, scans: 1 })
}

/// Columns and rows of a lossy frame.
fn lossy(body: &[u8]) -> Result<(u32, u32), PrepareError> {
    let [_, _, _, 0x9d, 0x01, 0x2a, w0, w1, h0, h1, ..] = *body else {
        return Err(damaged(Format::Webp, "its first frame has no start code"));
    };
    // The upper two bits are a scale for who displays it.
    let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
    Ok((side(w0, w1), side(h0, h1)))
}

/// Columns and rows of a lossless image.
fn lossless(body: &[u8]) -> Result<(u32, u32), PrepareError> {
    let bits = match body {
        [0x2f, ..] => le32(body, 1).ok_or_else(|| damaged(Format::Webp, "it ends within its header"))?,
        _ => return Err(damaged(Format::Webp, "its lossless image has no signature")),
    };
    Ok(((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1))
}

/// The chunks of an extended file: names, and bodies as far as there are bytes of them.
fn chunks(bytes: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut at = 12;
    std::iter::from_fn(move || {
        let (name, length) = (bytes.get(at..at + 4)?, le32(bytes, at + 4)? as usize);
        let rest = bytes.get(at + 8..)?;
        at += 8 + length + length % 2;
        Some((name, &rest[..rest.len().min(length)]))
    })
}
