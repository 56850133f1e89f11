//! PNG: its first chunk, and those before the pixels for EXIF.

use super::exif::{self, Orientation};
use super::{Format, Head, be32, damaged};
use crate::PrepareError;

pub(super) fn read(bytes: &[u8]) -> Result<Head, PrepareError> {
    let cut = || damaged(Format::Png, "it ends within its header");
    let header = bytes.get(16..29).ok_or_else(cut)?;
    if be32(bytes, 8) != Some(13) || bytes.get(12..16) != Some(b"IHDR") {
        return Err(damaged(Format::Png, "it does not begin with IHDR"));
    }
    let (width, height) = (be32(header, 0).ok_or_else(cut)?, be32(header, 4).ok_or_else(cut)?);
    if width == 0 || height == 0 {
        return Err(damaged(Format::Png, format!("its size is {width} x {height}")));
    }
    let channels = match header[9] {
        0 => 1,
        4 => 2,
        6 => 4,
        _ => 3,
    };
    let mut orientation = Orientation::default();
    let mut at = 33;
    while let (Some(length), Some(kind)) = (be32(bytes, at), bytes.get(at + 4..at + 8)) {
        let length = length as usize;
        match kind {
            b"IDAT" | b"IEND" => break,
            b"eXIf" => {
                orientation = bytes.get(at + 8..at + 8 + length).map(exif::orientation).unwrap_or_default();
            }
            _ => {}
        }
        // A length of 4 GiB leads out of any input.
        at += length + 12;
    }
    Ok(Head { format: Format::Png, width, height, channels, orientation, progressive: false, scans: 1 })
}
