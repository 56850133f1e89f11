//! The weights and the order of the fused kernel are those of `fast_image_resize`, with which the CPU resizes: the same
//! bits.
#![cfg(test)]

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use penstock_kernels::fused::{Area, Filter, Format, Frame, Part, Tensor, reference};
use penstock_kernels::normalise::{Channels, Dtype, Layout};
use proptest::prelude::*;

fn theirs(frame: &Frame, bytes: &[u8], part: &Part) -> Vec<u8> {
    let (channels, kind) = match frame.format {
        Format::Gray => (1, PixelType::U8),
        _ => (3, PixelType::U8x3),
    };
    let from = ImageRef::new(frame.width, frame.height, bytes, kind).unwrap();
    let mut to = vec![0; part.size.0 as usize * part.size.1 as usize * channels];
    let mut target = Image::from_slice_u8(part.size.0, part.size.1, &mut to, kind).unwrap();
    let filter = match part.filter {
        Filter::Bilinear => FilterType::Bilinear,
        Filter::Bicubic => FilterType::CatmullRom,
        Filter::Lanczos => FilterType::Lanczos3,
    };
    let algorithm =
        if part.antialias { ResizeAlg::Convolution(filter) } else { ResizeAlg::Interpolation(filter) };
    let Area { left, top, width, height } = part.area;
    let options = ResizeOptions::new().resize_alg(algorithm).crop(left, top, width, height).use_alpha(false);
    Resizer::new().resize(&from, &mut target, &options).unwrap();
    if channels == 3 { to } else { to.iter().flat_map(|gray| [*gray; 3]).collect() }
}

fn ours(frame: &Frame, bytes: &[u8], part: &Part) -> Vec<u8> {
    let tensor = Tensor {
        width: part.size.0,
        height: part.size.1,
        channels: Channels::Rgb,
        layout: Layout::Interleaved,
        dtype: Dtype::U8,
        mul: [1.0; 3],
        add: [0.0; 3],
    };
    reference::exact(frame, bytes, part, &tensor).unwrap()
}

fn noise(bytes: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn a_resize_has_the_bits_of_the_library(
        format in prop::sample::select(vec![Format::Rgb, Format::Gray]),
        sides in (1u32..200, 1u32..200),
        size in (1u32..90, 1u32..90),
        share in prop::option::of(prop::array::uniform4(0.0f64..1.0)),
        filter in prop::sample::select(vec![Filter::Bilinear, Filter::Bicubic, Filter::Lanczos]),
        antialias: bool,
        seed: u32,
    ) {
        let frame = Frame::tight(format, sides.0, sides.1);
        let bytes = noise(frame.bytes().unwrap(), seed);
        let mut part = Part { filter, antialias, ..Part::whole(&frame, size) };
        if let Some([left, top, width, height]) = share {
            let (all, down) = (f64::from(sides.0), f64::from(sides.1));
            let (left, top) = (left * all * 0.9, top * down * 0.9);
            // A little less than what is left: the library takes a crop by its sum.
            let rest = |start: f64, share: f64, all: f64| (0.05 + share * (all - start - 0.1)).max(0.05);
            part.area = Area { left, top, width: rest(left, width, all), height: rest(top, height, down) };
        }
        prop_assert!(ours(&frame, &bytes, &part) == theirs(&frame, &bytes, &part), "{part:?}");
    }
}

#[test]
fn a_photograph_for_imagenet_has_the_bits_of_the_library() {
    let frame = Frame::tight(Format::Rgb, 1920, 1080);
    let bytes = noise(frame.bytes().unwrap(), 1);
    let scale = 1080.0 / 256.0;
    let area = Area {
        left: 116.0 * (1920.0 / 455.0),
        top: 16.0 * scale,
        width: 224.0 * (1920.0 / 455.0),
        height: 224.0 * scale,
    };
    for filter in [Filter::Bilinear, Filter::Bicubic, Filter::Lanczos] {
        let part = Part { area, filter, ..Part::whole(&frame, (224, 224)) };
        assert!(ours(&frame, &bytes, &part) == theirs(&frame, &bytes, &part), "{filter:?}");
    }
}
