//! WebP, lossy and lossless.

use image_webp::WebPDecoder;

use super::{Image, damaged, room, without_alpha};
use crate::PrepareError;
use crate::head::{Format, Head};
use crate::source::Source;

pub(super) fn decode(
    bytes: &[u8],
    head: &Head,
    pixels: &mut Vec<u8>,
    cancelled: &dyn Fn() -> bool,
) -> Result<Image, PrepareError> {
    let told = |error: image_webp::DecodingError| damaged(Format::Webp, error);
    let mut decoder = WebPDecoder::new(Source::new(bytes, cancelled)).map_err(told)?;
    if decoder.dimensions() != (head.width, head.height) {
        return Err(damaged(Format::Webp, "its image has not the size that it says"));
    }
    if decoder.is_animated() {
        return Err(PrepareError::Unsupported { format: Format::Webp, feature: "an animation".to_owned() });
    }
    let size = decoder.output_buffer_size().ok_or_else(|| damaged(Format::Webp, "it is too large"))?;
    let to = room(pixels, size);
    decoder.read_image(to).map_err(told)?;
    if decoder.has_alpha() {
        without_alpha::<4, 3>(to);
    }
    Ok(Image { width: head.width, height: head.height, channels: 3 })
}
