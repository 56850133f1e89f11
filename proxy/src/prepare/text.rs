//! Bytes that came as text: in JSON, where there are no bytes, images and frames are base64.
//!
//! In: an element of an input that has a pipeline. Out: its bytes. An element is taken as bytes where it begins as an image, or is as
//! long as a frame, and as base64 where it is made of its letters: an image begins with none of them. White space is passed
//! over, padding may be missing, and `data:image/jpeg;base64,` may stand before it. Pure.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use penstock_prepare::{Pipeline, PrepareError, head};

const ENGINE: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);
/// As much text as says how large an image is: EXIF data, with its small picture, is at most 64 KiB.
const BEGINNING: usize = 96 << 10;
/// So many letters in a row are no accident.
const LETTERS: usize = 16;

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/')
}

/// Where the text of base64 begins; `None`: it is no text.
fn begins(source: &[u8]) -> Option<usize> {
    let start = source.iter().position(|byte| !byte.is_ascii_whitespace())?;
    let head = source.get(start..source.len().min(start + 128))?;
    let uri = head.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"data:"));
    if uri {
        let comma = head.iter().position(|byte| *byte == b',')?;
        return head[..comma].to_ascii_lowercase().ends_with(b";base64").then_some(start + comma + 1);
    }
    // Lines may be broken; words of a text are something else.
    let letters = head.iter().filter(|byte| !matches!(byte, b'\r' | b'\n')).take(LETTERS);
    letters.clone().all(|byte| is_letter(*byte)).then_some(start).filter(|_| letters.count() == LETTERS)
}

/// The bytes of base64 that begins there.
fn read(source: &[u8], begins: usize) -> Result<Vec<u8>, PrepareError> {
    let mut letters = Vec::with_capacity(source.len() - begins);
    let mut ended = false;
    for (at, byte) in source.iter().copied().enumerate().skip(begins) {
        match byte {
            b'=' => ended = true,
            byte if byte.is_ascii_whitespace() => {}
            byte if is_letter(byte) && !ended => letters.push(byte),
            _ => return Err(PrepareError::Base64 { at }),
        }
    }
    ENGINE.decode(letters).map_err(|_| PrepareError::Base64 { at: source.len() })
}

/// The bytes of an element.
pub fn decoded(pipeline: &Pipeline, source: &Bytes) -> Result<Bytes, PrepareError> {
    let is_bytes = match pipeline.takes() {
        None => head::is_image(source),
        Some((_, bytes)) => source.len() == bytes,
    };
    match begins(source).filter(|_| !is_bytes) {
        Some(begins) => read(source, begins).map(Bytes::from),
        None => Ok(source.clone()),
    }
}

/// Enough of an image's bytes to say how large it is.
pub fn beginning(source: &Bytes) -> Bytes {
    let text = begins(source).filter(|_| !head::is_image(source));
    let read = |begins: usize| {
        let letters: Vec<u8> =
            source[begins..].iter().copied().filter(|byte| is_letter(*byte)).take(BEGINNING).collect();
        ENGINE.decode(&letters[..letters.len() & !3]).ok()
    };
    text.and_then(read).map_or_else(|| source.clone(), Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_prepare::{Declaration, Preset};

    #[test]
    fn an_image_in_base64_is_read_however_it_is_written() {
        let declaration = Declaration { preset: Some(Preset::Imagenet), ..Declaration::default() };
        let pipeline = Pipeline::new(&declaration).unwrap();
        let image = Bytes::from_static(b"\xff\xd8\xff\xe0 sixteen bytes and some more");
        let text = base64::engine::general_purpose::STANDARD.encode(&image);
        assert!(text.ends_with('='), "this test is about padding too");
        let lines = text.as_bytes().chunks(8).map(|line| String::from_utf8_lossy(line)).collect::<Vec<_>>();
        for written in [
            text.clone(),
            lines.join("\r\n"),
            format!("\n {text}\n"),
            text.trim_end_matches('=').to_owned(),
            format!("data:image/jpeg;base64,{text}"),
        ] {
            assert_eq!(decoded(&pipeline, &Bytes::from(written.clone())), Ok(image.clone()), "{written}");
        }
        assert_eq!(decoded(&pipeline, &image), Ok(image.clone()));
        let broken = Bytes::from(format!("{}\0{}", &text[..20], &text[20..]));
        assert_eq!(decoded(&pipeline, &broken), Err(PrepareError::Base64 { at: 20 }));
        let other = Bytes::from_static(b"GIF89a is no image that is read, and no base64");
        assert_eq!(decoded(&pipeline, &other), Ok(other));
    }

    #[test]
    fn a_frame_in_base64_is_read_and_one_in_bytes_is_left() {
        let declaration = serde_json::json!({"input": {"format": "rgb", "width": 4, "height": 4}});
        let pipeline = Pipeline::new(&serde_json::from_value(declaration).unwrap()).unwrap();
        // Made of nothing but letters, and still a frame.
        let frame = Bytes::from(vec![b'A'; 48]);
        assert_eq!(decoded(&pipeline, &frame), Ok(frame.clone()));
        let text = base64::engine::general_purpose::STANDARD.encode(&frame);
        assert_eq!(decoded(&pipeline, &Bytes::from(text)), Ok(frame));
    }
}
