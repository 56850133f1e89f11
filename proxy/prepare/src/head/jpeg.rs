//! JPEG: a walk over its markers to the end, which also tells how many scans there are, and whether any of it is missing.

use super::exif::{self, Orientation};
use super::{Format, Head, be16, damaged, unsupported};
use crate::PrepareError;

/// What a frame's header says.
struct Frame {
    width: u32,
    height: u32,
    components: u8,
    progressive: bool,
}

pub(super) fn read(bytes: &[u8]) -> Result<Head, PrepareError> {
    let cut = || damaged(Format::Jpeg, "it ends before its end-of-image marker");
    let mut frame: Option<Frame> = None;
    let mut orientation = None;
    let mut scans = 0;
    let mut at = 2;
    loop {
        let marker = loop {
            match *bytes.get(at..).and_then(<[u8]>::first_chunk).ok_or_else(cut)? {
                // Any number of 0xff may stand before a marker.
                [0xff, 0xff] => at += 1,
                [0xff, marker] if marker != 0 => break marker,
                // Between segments some encoders leave bytes that decoders pass over.
                _ => at += 1,
            }
        };
        at += 2;
        match marker {
            0xd9 => break,
            0x01 | 0xd0..=0xd8 => continue,
            _ => {}
        }
        let length = usize::from(be16(bytes, at).ok_or_else(cut)?);
        if length < 2 {
            return Err(damaged(Format::Jpeg, format!("the segment of marker {marker:02x} has no length")));
        }
        let segment = bytes.get(at + 2..at + length).ok_or_else(cut)?;
        at += length;
        match marker {
            0xc0..=0xc2 if frame.is_some() => return Err(damaged(Format::Jpeg, "it has two frames")),
            0xc0..=0xc2 => frame = Some(read_frame(segment, marker == 0xc2)?),
            0xc3 => return Err(unsupported(Format::Jpeg, "lossless coding")),
            0xc5..=0xc7 | 0xcd..=0xcf => return Err(unsupported(Format::Jpeg, "hierarchical coding")),
            0xc9..=0xcb => return Err(unsupported(Format::Jpeg, "arithmetic coding")),
            0xdc => return Err(unsupported(Format::Jpeg, "a height that is told after the first scan")),
            0xe1 if orientation.is_none() => {
                orientation = segment.strip_prefix(b"Exif\0\0").map(exif::orientation);
            }
            0xda => {
                if frame.is_none() {
                    return Err(damaged(Format::Jpeg, "a scan comes before the frame"));
                }
                scans += 1;
                at += entropy(&bytes[at..]);
            }
            _ => {}
        }
    }
    let frame =
        frame.filter(|_| scans > 0).ok_or_else(|| damaged(Format::Jpeg, "there is no image in it"))?;
    Ok(Head {
        format: Format::Jpeg,
        width: frame.width,
        height: frame.height,
        channels: frame.components,
        orientation: orientation.unwrap_or(Orientation::default()),
        progressive: frame.progressive,
        scans,
    })
}

/// Whether it has no more than what every decoder reads in the same way: gray, or YCbCr that is not said to be RGB, by
/// an Adobe segment or by the names of its components. Of a file that [`read`] takes.
pub(super) fn is_usual(bytes: &[u8]) -> bool {
    let (mut at, mut adobe, mut usual) = (2, None, None);
    loop {
        match bytes.get(at..).and_then(<[u8]>::first_chunk) {
            Some([0xff, 0xff]) => at += 1,
            // Scans follow: what is said of colours stands before them.
            Some([0xff, 0xda]) => break,
            Some([0xff, 0x01 | 0xd0..=0xd8]) => at += 2,
            Some([0xff, marker]) if *marker != 0 => {
                let Some(segment) =
                    be16(bytes, at + 2).and_then(|length| bytes.get(at + 4..at + 2 + usize::from(length)))
                else {
                    return false;
                };
                match (marker, segment) {
                    (0xc0..=0xc2, [_, _, _, _, _, 1, ..]) => usual = Some(true),
                    (0xc0..=0xc2, [_, _, _, _, _, 3, one, _, _, two, _, _, three, ..]) => {
                        usual = Some([*one, *two, *three] != *b"RGB");
                    }
                    (0xc0..=0xc2, _) => return false,
                    // Adobe's has twelve bytes, of which the last says how colours were transformed. What follows is
                    // nobody's; of a shorter one decoders think differently.
                    (0xee, [b'A', b'd', b'o', b'b', b'e', ..]) => match segment.get(11) {
                        Some(transform) => adobe = Some(*transform),
                        None => return false,
                    },
                    _ => {}
                }
                at += 4 + segment.len();
            }
            Some(_) => at += 1,
            None => return false,
        }
    }
    usual == Some(true) && adobe != Some(0)
}

fn read_frame(segment: &[u8], progressive: bool) -> Result<Frame, PrepareError> {
    let [precision, h1, h0, w1, w0, components, ..] = *segment else {
        return Err(damaged(Format::Jpeg, "its frame header is cut"));
    };
    let (width, height) = (u32::from(u16::from_be_bytes([w1, w0])), u32::from(u16::from_be_bytes([h1, h0])));
    if precision != 8 {
        return Err(unsupported(Format::Jpeg, format!("{precision} bits a sample")));
    }
    if !matches!(components, 1 | 3 | 4) {
        return Err(unsupported(Format::Jpeg, format!("{components} components")));
    }
    if width == 0 || height == 0 {
        return Err(damaged(Format::Jpeg, format!("its size is {width} x {height}")));
    }
    Ok(Frame { width, height, components, progressive })
}

/// How many bytes of entropy-coded data there are before the next marker that is not a restart.
fn entropy(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(found) = bytes[at..].iter().position(|byte| *byte == 0xff) {
        at += found;
        match bytes.get(at + 1) {
            Some(0 | 0xd0..=0xd7) => at += 2,
            // A fill byte: the marker follows it.
            Some(0xff) => at += 1,
            _ => return at,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The markers of a file of three components, with an Adobe segment that has these bytes behind its name.
    fn adobe(after_the_name: &[u8]) -> Vec<u8> {
        let length = 2 + 5 + after_the_name.len() as u8;
        let frame = [0xff, 0xc0, 0, 17, 8, 0, 1, 0, 1, 3, 1, 0x11, 0, 2, 0x11, 1, 3, 0x11, 1];
        [&[0xff, 0xd8, 0xff, 0xee, 0, length][..], b"Adobe", after_the_name, &frame, &[0xff, 0xda]].concat()
    }

    #[test]
    fn adobes_word_on_colours_is_its_twelfth_byte() {
        for (usual, after_the_name) in [
            (true, &[0, 100, 0, 0, 0, 0, 1][..]),
            (false, &[0, 100, 0, 0, 0, 0, 0]),
            // Bytes behind it say nothing of colours.
            (true, &[0, 100, 0, 0, 0, 0, 1, 0]),
            (false, &[0, 100, 0, 0, 0, 0, 0, 1]),
            (false, &[0, 100, 0, 0, 0, 0]),
            (false, &[]),
        ] {
            assert_eq!(is_usual(&adobe(after_the_name)), usual, "{after_the_name:?}");
        }
        let whole = adobe(&[0, 100, 0, 0, 0, 0, 1]);
        assert!(!is_usual(&whole[..whole.len() - 2]), "cut before its scan");
    }
}
