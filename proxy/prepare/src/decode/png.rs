//! PNG, of all depths and colour types, interlaced or not.

use ::png::{ColorType, Decoder, Limits, Transformations};

use super::{Image, damaged, room, without_alpha};
use crate::PrepareError;
use crate::head::{Format, Head};
use crate::source::Source;

/// What the decoder may keep besides the pixels: a window of deflate, two rows.
const BESIDES: usize = 4 << 20;

pub(super) fn decode(
    bytes: &[u8],
    head: &Head,
    pixels: &mut Vec<u8>,
    cancelled: &dyn Fn() -> bool,
) -> Result<Image, PrepareError> {
    let told = |error: ::png::DecodingError| damaged(Format::Png, error);
    let limits = Limits { bytes: BESIDES };
    let mut decoder = Decoder::new_with_limits(Source::new(bytes, cancelled), limits);
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info().map_err(told)?;
    let size =
        reader.output_buffer_size().filter(|size| *size <= head.width as usize * head.height as usize * 4);
    let size = size.ok_or_else(|| damaged(Format::Png, "it has more pixels than it says"))?;
    let to = room(pixels, size);
    let frame = reader.next_frame(to).map_err(told)?;
    let image = |channels| Image { width: frame.width, height: frame.height, channels };
    if (frame.width, frame.height) != (head.width, head.height) {
        return Err(damaged(Format::Png, "its still image has not the size that it says"));
    }
    Ok(match frame.color_type {
        ColorType::Grayscale => image(1),
        ColorType::GrayscaleAlpha => {
            without_alpha::<2, 1>(to);
            image(1)
        }
        ColorType::Rgb => image(3),
        ColorType::Rgba => {
            without_alpha::<4, 3>(to);
            image(3)
        }
        ColorType::Indexed => return Err(damaged(Format::Png, "its palette was not expanded")),
    })
}
