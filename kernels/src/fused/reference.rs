//! The fused kernel on the CPU: a second opinion on its bits, and one in float64 on its arithmetic. Neither is fast.

use super::{Area, Axis, Format, Frame, Misfit, Part, Tensor, check};
use crate::normalise::{Dtype, Layout, Normaliser, Pixels, Place};

/// The pixel at `x`, `y`.
fn pixel(frame: &Frame, bytes: &[u8], x: usize, y: usize) -> [u8; 3] {
    let [first, second, third] = frame.planes;
    let [stride, chroma] = frame.strides.map(|stride| stride as usize);
    let row = first + y * stride;
    let at = y / 2 * chroma;
    let (u, v) = match frame.format {
        Format::Rgb => return [0, 1, 2].map(|channel| bytes[row + 3 * x + channel]),
        Format::Gray => return [bytes[row + x]; 3],
        Format::Nv12 => (second + at + x / 2 * 2, second + at + x / 2 * 2 + 1),
        Format::I420 => (second + at + x / 2, third + at + x / 2),
    };
    let [black, luma, red, green_u, green_v, blue] = frame.factors();
    let (u, v) = (i32::from(bytes[u]) - 128, i32::from(bytes[v]) - 128);
    let luma = (i32::from(bytes[row + x]) - black).max(0) * luma;
    let byte = |fixed: i32| ((fixed + (1 << 19)) >> 20).clamp(0, 255) as u8;
    [byte(luma + red * v), byte(luma + (green_u * u + green_v * v)), byte(luma + blue * u)]
}

/// One weighted sum, rounded and cut to a byte.
fn weigh(axis: &Axis, at: usize, value: impl Fn(usize) -> u8) -> u8 {
    let (first, weights) = axis.of(at);
    let half = 1 << (axis.precision - 1);
    let products =
        weights.iter().enumerate().map(|(at, weight)| i32::from(*weight) * i32::from(value(first + at)));
    ((half + products.sum::<i32>()) >> axis.precision).clamp(0, 255) as u8
}

/// Where pixel `x`, `y` of an upright image of `columns` x `rows` is stored.
fn stored(part: &Part, x: usize, y: usize) -> (usize, usize) {
    let (columns, rows) = part.upright();
    let x = if part.turn.mirrored { columns as usize - 1 - x } else { x };
    let y = if part.turn.flipped { rows as usize - 1 - y } else { y };
    if part.turn.transposed { (y, x) } else { (x, y) }
}

/// The tensor, bit for bit as the kernel makes it.
pub fn exact(frame: &Frame, bytes: &[u8], part: &Part, tensor: &Tensor) -> Result<Vec<u8>, Misfit> {
    check(frame, bytes.len(), part, tensor)?;
    let [across, down] = part.axes(frame);
    let width = frame.width as usize;
    let (columns, rows) = (part.size.0 as usize, part.size.1 as usize);
    let mut lines = vec![[0; 3]; width * rows];
    for (row, line) in lines.chunks_exact_mut(width).enumerate() {
        for (x, to) in line.iter_mut().enumerate() {
            *to = [0, 1, 2].map(|channel| weigh(&down, row, |y| pixel(frame, bytes, x, y)[channel]));
        }
    }
    let small: Vec<[u8; 3]> = (0..rows * columns)
        .map(|at| {
            let line = &lines[at / columns * width..][..width];
            [0, 1, 2].map(|channel| weigh(&across, at % columns, |x| line[x][channel]))
        })
        .collect();
    let Tensor { width, height, channels, layout, dtype, mul, add } = *tensor;
    let normaliser = Normaliser::new(channels, layout, dtype, mul, add);
    let mut out = vec![0; tensor.bytes()];
    let upright = part.upright();
    let turned: Vec<u8> = (0..upright.0 as usize * upright.1 as usize)
        .flat_map(|at| {
            let (x, y) = stored(part, at % upright.0 as usize, at / upright.0 as usize);
            small[y * columns + x]
        })
        .collect();
    let all = Place::all(width as usize, height as usize);
    let place = Place { left: part.at.0 as usize, top: part.at.1 as usize, ..all };
    let (wide, high) = (upright.0 as usize, upright.1 as usize);
    let pixels = Pixels { bytes: &turned, stride: 3 * wide, width: wide, height: high, channels: 3 };
    let written = normaliser
        .fill(part.pad, all.width, all.height, &all, &mut out)
        .and_then(|()| normaliser.run(&pixels, &place, &mut out));
    debug_assert_eq!(written, Ok(()), "checked above");
    Ok(out)
}

/// The elements in float64, from the definitions. Rounded nowhere but where pixels are bytes by their nature: a frame
/// of video is converted first, and each pass is cut to the range of a byte.
pub fn real(frame: &Frame, bytes: &[u8], part: &Part, tensor: &Tensor) -> Result<Vec<f64>, Misfit> {
    check(frame, bytes.len(), part, tensor)?;
    let (columns, rows) = (part.size.0 as usize, part.size.1 as usize);
    let Area { left, top, width, height } = part.area;
    let across = shares(frame.width, left, width, part.size.0, part);
    let down = shares(frame.height, top, height, part.size.1, part);
    let sum = |(first, shares): &(usize, Vec<f64>), value: &dyn Fn(usize) -> f64| -> f64 {
        let sum: f64 = shares.iter().enumerate().map(|(at, share)| share * value(first + at)).sum();
        sum.clamp(0.0, 255.0)
    };
    let wide = frame.width as usize;
    let planes = [0, 1, 2].map(|channel| {
        let lines: Vec<f64> = (0..rows * wide)
            .map(|to| sum(&down[to / wide], &|y| f64::from(pixel(frame, bytes, to % wide, y)[channel])))
            .collect();
        (0..rows * columns)
            .map(|to| sum(&across[to % columns], &|x| lines[to / columns * wide + x]))
            .collect::<Vec<f64>>()
    });
    let upright = part.upright();
    let value = |x: usize, y: usize, channel: usize| {
        let (left, top) = (part.at.0 as usize, part.at.1 as usize);
        match (x.checked_sub(left), y.checked_sub(top)) {
            (Some(x), Some(y)) if x < upright.0 as usize && y < upright.1 as usize => {
                let (x, y) = stored(part, x, y);
                planes[channel][y * columns + x]
            }
            _ => f64::from(part.pad[channel]),
        }
    };
    let count = tensor.channels.count();
    let (wide, high) = (tensor.width as usize, tensor.height as usize);
    let element = |x: usize, y: usize, channel: usize| {
        let value = match tensor.channels {
            crate::normalise::Channels::Rgb => value(x, y, channel),
            crate::normalise::Channels::Bgr => value(x, y, 2 - channel),
            crate::normalise::Channels::Gray => {
                0.299 * value(x, y, 0) + 0.587 * value(x, y, 1) + 0.114 * value(x, y, 2)
            }
        };
        let value = value * f64::from(tensor.mul[channel]) + f64::from(tensor.add[channel]);
        if tensor.dtype == Dtype::U8 { value.clamp(0.0, 255.0) } else { value }
    };
    let all = 0..count * wide * high;
    Ok(match tensor.layout {
        Layout::Planar => all.map(|at| element(at % wide, at / wide % high, at / (wide * high))).collect(),
        Layout::Interleaved => {
            all.map(|at| element(at / count % wide, at / (count * wide), at % count)).collect()
        }
    })
}

/// Of each pixel of the result, what each of the source counts.
fn shares(all: u32, start: f64, length: f64, count: u32, part: &Part) -> Vec<(usize, Vec<f64>)> {
    if f64::from(count) == length && start.fract() == 0.0 {
        return (0..count as usize).map(|at| (start as usize + at, vec![1.0])).collect();
    }
    let scale = length / f64::from(count);
    let wide = if part.antialias { scale.max(1.0) } else { 1.0 };
    let support = part.filter.support() * wide;
    let shares = |to: u32| {
        let centre = start + (f64::from(to) + 0.5) * scale;
        let first = (centre - support - 0.5).ceil().max(0.0) as usize;
        let last = (((centre + support - 0.5).floor() as usize).min(all as usize - 1)).max(first);
        let shares: Vec<f64> =
            (first..=last).map(|at| part.filter.weight((at as f64 + 0.5 - centre) / wide)).collect();
        let sum: f64 = shares.iter().sum();
        (first, shares.into_iter().map(|share| share / sum).collect())
    };
    (0..count).map(shares).collect()
}
