//! JPEG by libjpeg-turbo, straight into the buffer of pixels. A call decodes all of an image, so who wants it no more is asked
//! for before it only.

use turbojpeg::{Colorspace, Decompressor, PixelFormat, ScalingFactor};

use super::{Image, damaged, rgb_of_cmyk, room};
use crate::PrepareError;
use crate::head::{Format, Head};

pub(super) const NAME: &str = "libjpeg-turbo";

/// Pixels for each of the result, in each direction, below which quality suffers. Chroma that is stored at half the size is
/// scaled half as far.
pub(crate) const LEAST_MARGIN: f64 = 1.0;

/// Made when it is first needed, and used again.
#[derive(Debug, Default)]
pub(crate) struct Decoder(Option<Decompressor>);

impl Decoder {
    pub(super) fn decode(
        &mut self,
        bytes: &[u8],
        _head: &Head,
        eighths: u32,
        pixels: &mut Vec<u8>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Image, PrepareError> {
        if cancelled() {
            return Err(PrepareError::Cancelled);
        }
        let told = |error: turbojpeg::Error| damaged(Format::Jpeg, error);
        let decoder = match &mut self.0 {
            Some(decoder) => decoder,
            none => none.insert(Decompressor::new().map_err(told)?),
        };
        let scale = ScalingFactor::new(eighths as usize, 8);
        decoder.set_scaling_factor(scale).map_err(told)?;
        let header = decoder.read_header(bytes).map_err(told)?;
        let scaled = header.scaled(scale);
        let (format, channels) = match header.colorspace {
            Colorspace::Gray => (PixelFormat::GRAY, 1),
            Colorspace::CMYK | Colorspace::YCCK => (PixelFormat::CMYK, 3),
            _ => (PixelFormat::RGB, 3),
        };
        let stride = scaled.width * format.size();
        let to = room(pixels, stride * scaled.height);
        let image = turbojpeg::Image {
            pixels: &mut *to,
            width: scaled.width,
            pitch: stride,
            height: scaled.height,
            format,
        };
        match decoder.decompress(bytes, image) {
            // Bytes that some cameras leave between scans: every decoder passes over them.
            Err(error) if error.to_string().contains("extraneous bytes before marker") => {}
            done => done.map_err(told)?,
        }
        if format == PixelFormat::CMYK {
            // Stored inverted, as all of Adobe's are; Pillow takes it for granted too.
            to.iter_mut().for_each(|byte| *byte = !*byte);
            rgb_of_cmyk(to);
        }
        let side = |side: usize| u32::try_from(side).map_err(|error| damaged(Format::Jpeg, error));
        Ok(Image { width: side(scaled.width)?, height: side(scaled.height)?, channels })
    }
}
