//! Video frames with chroma at half the size to RGB. Each chroma sample stands for its four pixels, as in OpenCV.

use crate::form::{Matrix, Range};

/// Bits of fraction, as OpenCV has them.
const FRACTION: u32 = 20;

/// What a frame is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Chroma in pairs (NV12), or in two planes (I420).
    pub(crate) pairs: bool,
    pub(crate) matrix: Matrix,
    pub(crate) range: Range,
}

struct Factors {
    black: i32,
    luma: i32,
    red: i32,
    green_u: i32,
    green_v: i32,
    blue: i32,
}

impl Frame {
    /// Columns and rows of chroma.
    fn chroma(&self) -> (usize, usize) {
        (self.width.div_ceil(2) as usize, self.height.div_ceil(2) as usize)
    }

    /// Bytes of a frame.
    pub(crate) fn bytes(&self) -> usize {
        let (columns, rows) = self.chroma();
        self.width as usize * self.height as usize + 2 * columns * rows
    }

    fn factors(&self) -> Factors {
        let (red, blue) = match self.matrix {
            Matrix::Bt601 => (0.299, 0.114),
            Matrix::Bt709 => (0.2126, 0.0722),
        };
        let green = 1.0 - red - blue;
        let (black, luma, chroma) = match self.range {
            Range::Limited => (16, 255.0 / 219.0, 255.0 / 224.0),
            Range::Full => (0, 1.0, 1.0),
        };
        let fixed = |value: f64| (value * f64::from(1 << FRACTION)).round() as i32;
        Factors {
            black,
            luma: fixed(luma),
            red: fixed(chroma * 2.0 * (1.0 - red)),
            green_u: fixed(chroma * -2.0 * (1.0 - blue) * blue / green),
            green_v: fixed(chroma * -2.0 * (1.0 - red) * red / green),
            blue: fixed(chroma * 2.0 * (1.0 - blue)),
        }
    }

    /// `input` has [`Frame::bytes`] bytes, and `rgb` three for each pixel.
    pub(crate) fn decode(&self, input: &[u8], rgb: &mut [u8]) {
        let factors = self.factors();
        let width = self.width as usize;
        let (columns, rows) = self.chroma();
        let (luma, chroma) = input.split_at(width * self.height as usize);
        let sample = |x: usize, y: usize| {
            let at = y * columns + x;
            let (u, v) = if self.pairs { (2 * at, 2 * at + 1) } else { (at, columns * rows + at) };
            (i32::from(chroma[u]) - 128, i32::from(chroma[v]) - 128)
        };
        let half = 1 << (FRACTION - 1);
        let byte = |value: i32| ((value + half) >> FRACTION).clamp(0, 255) as u8;
        for (y, (luma, rgb)) in luma.chunks_exact(width).zip(rgb.chunks_exact_mut(3 * width)).enumerate() {
            for (x, (luma, rgb)) in luma.chunks(2).zip(rgb.chunks_mut(6)).enumerate() {
                let (u, v) = sample(x, y / 2);
                let red = factors.red * v;
                let green = factors.green_u * u + factors.green_v * v;
                let blue = factors.blue * u;
                for (luma, rgb) in luma.iter().zip(rgb.as_chunks_mut::<3>().0) {
                    let luma = (i32::from(*luma) - factors.black).max(0) * factors.luma;
                    *rgb = [byte(luma + red), byte(luma + green), byte(luma + blue)];
                }
            }
        }
    }
}
