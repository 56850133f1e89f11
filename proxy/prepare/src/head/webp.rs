//! WebP: its first chunk, and that with EXIF.

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
            let [_, _, _, 0x9d, 0x01, 0x2a, w0, w1, h0, h1, ..] = *body else {
                return Err(damaged(Format::Webp, "its first frame has no start code"));
            };
            // The upper two bits are a scale for who displays it.
            let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
            (side(w0, w1), side(h0, h1), 3)
        }
        b"VP8L" => {
            let bits = match body {
                [0x2f, ..] => le32(body, 1).ok_or_else(cut)?,
                _ => return Err(damaged(Format::Webp, "its lossless image has no signature")),
            };
            ((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1, 4)
        }
        b"VP8X" => {
            let [flags, _, _, _, w0, w1, w2, h0, h1, h2, ..] = *body else { return Err(cut()) };
            if flags & 0x02 != 0 {
                return Err(unsupported(Format::Webp, "an animation"));
            }
            if flags & 0x08 != 0 {
                orientation = find_exif(bytes).unwrap_or_default();
            }
            let side = |a, b, c| u32::from_le_bytes([a, b, c, 0]) + 1;
            (side(w0, w1, w2), side(h0, h1, h2), 4)
        }
        _ => return Err(damaged(Format::Webp, "its first chunk is no image")),
    };
    if width == 0 || height == 0 {
        return Err(damaged(Format::Webp, format!("its size is {width} x {height}")));
    }
    Ok(Head { format: Format::Webp, width, height, channels, orientation, progressive: false, scans: 1 })
}

fn find_exif(bytes: &[u8]) -> Option<Orientation> {
    let mut at = 12;
    loop {
        let length = le32(bytes, at + 4)? as usize;
        if bytes.get(at..at + 4)? == b"EXIF" {
            let exif = bytes.get(at + 8..at + 8 + length)?;
            // Some writers put JPEG's prefix before it.
            return Some(exif::orientation(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif)));
        }
        at += 8 + length + length % 2;
    }
}
