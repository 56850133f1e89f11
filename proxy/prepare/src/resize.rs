//! Resampling by `fast_image_resize`, which weighs pixels as Pillow does: two passes of fixed-point arithmetic.

use fast_image_resize::images::{Image as Target, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use penstock_kernels::fused::{self, Axis, Frame, Part, Tensor, reference};
use penstock_kernels::normalise::{Channels, Dtype, Layout};

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
    let filter = match sampling.filter {
        Filter::Bilinear => fused::Filter::Bilinear,
        Filter::Bicubic => fused::Filter::Bicubic,
        Filter::Lanczos => fused::Filter::Lanczos,
    };
    if Axis::leaves_the_library(image.width, area.left, area.width, size.0, filter, sampling.antialias) {
        return slowly(image, pixels, area, size, (filter, sampling.antialias), to);
    }
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

/// The same bits without the library, for the few images with which it would read outside of its memory: enlarged ones,
/// so small.
fn slowly(
    image: &Image,
    pixels: &[u8],
    area: &Area,
    size: (u32, u32),
    (filter, antialias): (fused::Filter, bool),
    to: &mut [u8],
) -> Result<(), PrepareError> {
    let (format, channels) = match image.channels {
        1 => (fused::Format::Gray, Channels::Gray),
        _ => (fused::Format::Rgb, Channels::Rgb),
    };
    let frame = Frame::tight(format, image.width, image.height);
    let Area { left, top, width, height } = *area;
    let area = fused::Area { left, top, width, height };
    let part = Part { area, filter, antialias, ..Part::whole(&frame, size) };
    let (layout, dtype) = (Layout::Interleaved, Dtype::U8);
    let tensor =
        Tensor { width: size.0, height: size.1, channels, layout, dtype, mul: [1.0; 3], add: [0.0; 3] };
    let told =
        |reason: fused::Misfit| PrepareError::Internal { doing: "resizing", reason: reason.to_string() };
    to.copy_from_slice(&reference::exact(&frame, pixels, &part, &tensor).map_err(told)?);
    Ok(())
}
