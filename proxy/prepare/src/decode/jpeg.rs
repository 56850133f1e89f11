//! JPEG in Rust, for builds without cmake and nasm: `jpeg-decoder`, which can decode at a fraction of the size.

use jpeg_decoder::PixelFormat;

use super::{Image, damaged, rgb_of_cmyk};
use crate::PrepareError;
use crate::head::{Format, Head};
use crate::source::Source;

pub(super) const NAME: &str = "jpeg-decoder";

/// Pixels for each of the result, in each direction, below which colours suffer: this decoder scales chroma that is stored at half
/// the size as far as luma, and has half as many pixels of it then.
pub(crate) const LEAST_MARGIN: f64 = 2.0;

/// Keeps nothing from one image to the next.
#[derive(Debug, Default)]
pub(crate) struct Decoder {}

impl Decoder {
    pub(super) fn decode(
        &mut self,
        bytes: &[u8],
        head: &Head,
        eighths: u32,
        pixels: &mut Vec<u8>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Image, PrepareError> {
        let mut decoder = jpeg_decoder::Decoder::new(Source::new(bytes, cancelled));
        let told = |error: jpeg_decoder::Error| match error {
            jpeg_decoder::Error::Unsupported(feature) => {
                PrepareError::Unsupported { format: Format::Jpeg, feature: format!("{feature:?}") }
            }
            error => damaged(Format::Jpeg, error),
        };
        decoder.set_max_decoding_buffer_size(
            head.width as usize * head.height as usize * usize::from(head.channels),
        );
        // It takes the smallest scale of which one side is large enough, so a very narrow image would get too small.
        if eighths < 8 && head.width.min(head.height) >= 16 {
            let part = |side: u32| u16::try_from((side * eighths).div_ceil(8)).unwrap_or(u16::MAX);
            decoder.scale(part(head.width), part(head.height)).map_err(told)?;
        }
        *pixels = decoder.decode().map_err(told)?;
        let info = decoder.info().ok_or_else(|| damaged(Format::Jpeg, "there is no image in it"))?;
        let (width, height) = (u32::from(info.width), u32::from(info.height));
        let channels = match info.pixel_format {
            PixelFormat::L8 => 1,
            PixelFormat::RGB24 => 3,
            PixelFormat::CMYK32 => {
                rgb_of_cmyk(pixels);
                3
            }
            PixelFormat::L16 => {
                let feature = "16 bits a sample".to_owned();
                return Err(PrepareError::Unsupported { format: Format::Jpeg, feature });
            }
        };
        let image = Image { width, height, channels };
        if pixels.len() < image.bytes() {
            return Err(damaged(Format::Jpeg, "it has fewer pixels than it says"));
        }
        Ok(image)
    }
}
