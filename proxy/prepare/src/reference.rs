//! The same in float64, one element at a time, from the definitions: what the fast way and the kernels are held against.
//!
//! Images are decoded at full size and turned first; nothing is rounded between decoding and the result.

use crate::decode::{self, Image, jpeg};
use crate::form::{Colour, Dtype, Filter, Layout};
use crate::geometry::{Area, Sampling, plan};
use crate::head::{self, Orientation};
use crate::pipeline::Kind;
use crate::{Limits, Pipeline, PrepareError};

/// The elements of the tensor in their order, not rounded to its datatype.
pub fn run(pipeline: &Pipeline, input: &[u8], limits: &Limits) -> Result<Vec<f64>, PrepareError> {
    if let Kind::Tensor(conversion) = &pipeline.kind {
        return Ok(tensor(pipeline, conversion, input));
    }
    let mut pixels = Vec::new();
    let mut orientation = Orientation::default();
    let image = match &pipeline.kind {
        Kind::Rgb(width, height) => {
            pixels.extend_from_slice(input);
            Image { width: *width, height: *height, channels: 3 }
        }
        Kind::Yuv(frame) => {
            let image = Image { width: frame.width, height: frame.height, channels: 3 };
            pixels.resize(image.bytes(), 0);
            frame.decode(input, &mut pixels);
            image
        }
        _ => {
            let head = head::read(input)?;
            limits.check(&head)?;
            if pipeline.orientation {
                orientation = head.orientation;
            }
            decode::decode(input, &head, 8, (&mut pixels, &mut jpeg::Decoder::default()), limits, &|| false)?
        }
    };
    let (mut width, mut height) = (image.width as usize, image.height as usize);
    let stride = width;
    if orientation.transposed {
        (width, height) = (height, width);
    }
    let channels = usize::from(image.channels);
    let at = |x: usize, y: usize, channel: usize| {
        let (column, row) = orientation.stored(x, y, width, height);
        f64::from(pixels[(row * stride + column) * channels + if channels == 1 { 0 } else { channel }])
    };
    let plan = plan(width as u32, height as u32, pipeline.sizing, pipeline.crop)?;
    let (across, down) = (plan.size.0 as usize, plan.size.1 as usize);
    let (left, top) = (plan.at.0 as usize, plan.at.1 as usize);
    let planes: Vec<Vec<f64>> = (0..3)
        .map(|channel| {
            resize(&|x, y| at(x, y, channel), (width, height), &plan.area, (across, down), pipeline.sampling)
        })
        .collect();
    let (columns, rows) = pipeline.size();
    let pixel = |x: usize, y: usize, channel: usize| match (x.checked_sub(left), y.checked_sub(top)) {
        (Some(x), Some(y)) if x < across && y < down => planes[channel][y * across + x],
        _ => f64::from(pipeline.pad),
    };
    let value = |x: usize, y: usize, channel: usize| {
        let value = match pipeline.colour {
            Colour::Rgb => pixel(x, y, channel),
            Colour::Bgr => pixel(x, y, 2 - channel),
            Colour::Gray => 0.299 * pixel(x, y, 0) + 0.587 * pixel(x, y, 1) + 0.114 * pixel(x, y, 2),
        };
        let (mul, add) = pipeline.factors[channel];
        kept(value * mul + add, pipeline.dtype())
    };
    let (columns, rows, count) = (columns as usize, rows as usize, pipeline.factors.len());
    Ok(match pipeline.layout() {
        Layout::Nchw => (0..count * rows * columns)
            .map(|at| value(at % columns, at / columns % rows, at / (columns * rows)))
            .collect(),
        Layout::Nhwc => (0..count * rows * columns)
            .map(|at| value(at / count % columns, at / (count * columns), at % count))
            .collect(),
    })
}

/// A byte cannot be below 0 or above 255.
fn kept(value: f64, dtype: Dtype) -> f64 {
    if dtype == Dtype::U8 { value.clamp(0.0, 255.0) } else { value }
}

fn tensor(pipeline: &Pipeline, of: &crate::tensor::Conversion, input: &[u8]) -> Vec<f64> {
    let pixels = of.width * of.height;
    let read = |channel: usize, pixel: usize| {
        let element = match of.from.1 {
            Layout::Nchw => channel * pixels + pixel,
            Layout::Nhwc => pixel * of.channels + channel,
        };
        let bytes = &input[element * of.from.0.size()..];
        let half = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
        f64::from(match of.from.0 {
            Dtype::U8 => f32::from(bytes[0]),
            Dtype::F16 => penstock_kernels::normalise::f32_of_f16(half(bytes)),
            Dtype::Bf16 => penstock_kernels::normalise::f32_of_bf16(half(bytes)),
            Dtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        })
    };
    let value = |channel: usize, pixel: usize| {
        let (mul, add) = pipeline.factors[channel];
        kept(read(channel, pixel) * mul + add, of.to.0)
    };
    let all = 0..pixels * of.channels;
    match of.to.1 {
        Layout::Nchw => all.map(|at| value(at / pixels, at % pixels)).collect(),
        Layout::Nhwc => all.map(|at| value(at % of.channels, at / of.channels)).collect(),
    }
}

/// One channel, resampled: first along columns, then along rows.
fn resize(
    at: &dyn Fn(usize, usize) -> f64,
    (width, height): (usize, usize),
    area: &Area,
    (columns, rows): (usize, usize),
    sampling: Sampling,
) -> Vec<f64> {
    if let Some((left, top)) = area.whole((columns as u32, rows as u32)) {
        return (0..columns * rows).map(|to| at(left + to % columns, top + to / columns)).collect();
    }
    let across = weights(width, area.left, area.width, columns, sampling);
    let down = weights(height, area.top, area.height, rows, sampling);
    let sum = |weights: &(usize, Vec<f64>), value: &dyn Fn(usize) -> f64| -> f64 {
        weights.1.iter().enumerate().map(|(offset, weight)| weight * value(weights.0 + offset)).sum()
    };
    // A filter with negative lobes can leave the range of a byte, which the image cannot, so each pass is cut. Columns come
    // first, as in the fast way; Pillow begins with rows, which is seen only where something was cut.
    let lines: Vec<f64> = (0..rows * width)
        .map(|to| sum(&down[to / width], &|y| at(to % width, y)).clamp(0.0, 255.0))
        .collect();
    (0..rows * columns)
        .map(|to| sum(&across[to % columns], &|x| lines[to / columns * width + x]).clamp(0.0, 255.0))
        .collect()
}

/// For each pixel of the result: the first of the source that counts, and what each counts.
fn weights(all: usize, start: f64, length: f64, count: usize, sampling: Sampling) -> Vec<(usize, Vec<f64>)> {
    let scale = length / count as f64;
    let wide = if sampling.antialias { scale.max(1.0) } else { 1.0 };
    let support = wide
        * match sampling.filter {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        };
    (0..count)
        .map(|to| {
            let centre = start + (to as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let last = ((centre + support + 0.5).max(0.0) as usize).min(all);
            let weigh = |at: usize| weight(sampling.filter, (at as f64 - centre + 0.5) / wide);
            let weights: Vec<f64> = (first..last).map(weigh).collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|weight| weight / sum).collect())
        })
        .collect()
}

fn weight(filter: Filter, x: f64) -> f64 {
    let x = x.abs();
    let sinc =
        |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
    match filter {
        Filter::Bilinear if x < 1.0 => 1.0 - x,
        Filter::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        Filter::Bicubic if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
        Filter::Lanczos if x < 3.0 => sinc(x) * sinc(x / 3.0),
        _ => 0.0,
    }
}
