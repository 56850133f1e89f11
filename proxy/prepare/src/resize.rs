//! Resampling by `fast_image_resize`, which weighs pixels as Pillow does: two passes of fixed-point arithmetic.

use fast_image_resize::images::{Image as Target, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::PrepareError;
use crate::decode::Image;
use crate::form::Filter;
use crate::geometry::{Area, Sampling};

/// `area` of `pixels` to `size`, into `to`.
pub(crate) fn resize(
    resizer: &mut Resizer,
    image: &Image,
    pixels: &[u8],
    area: &Area,
    size: (u32, u32),
    sampling: Sampling,
    to: &mut [u8],
) -> Result<(), PrepareError> {
    let told = |reason: String| PrepareError::Internal { doing: "resizing", reason };
    let kind = if image.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
    let from = ImageRef::new(image.width, image.height, &pixels[..image.bytes()], kind)
        .map_err(|error| told(error.to_string()))?;
    let mut to = Target::from_slice_u8(size.0, size.1, to, kind).map_err(|error| told(error.to_string()))?;
    let filter = match sampling.filter {
        Filter::Bilinear => FilterType::Bilinear,
        Filter::Bicubic => FilterType::CatmullRom,
        Filter::Lanczos => FilterType::Lanczos3,
    };
    let algorithm =
        if sampling.antialias { ResizeAlg::Convolution(filter) } else { ResizeAlg::Interpolation(filter) };
    let options = ResizeOptions::new()
        .resize_alg(algorithm)
        .crop(area.left, area.top, area.width, area.height)
        .use_alpha(false);
    resizer.resize(&from, &mut to, &options).map_err(|error| told(error.to_string()))
}
