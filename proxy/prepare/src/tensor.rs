//! A tensor to another: datatype, order of dimensions, numbers.

use penstock_kernels::normalise::{bf16_bits, f16_bits, f32_of_bf16, f32_of_f16};

use crate::form::{Dtype, Layout};

/// What becomes what.
#[derive(Debug, Clone)]
pub(crate) struct Conversion {
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) channels: usize,
    pub(crate) from: (Dtype, Layout),
    pub(crate) to: (Dtype, Layout),
    /// Of each channel: factor and summand.
    pub(crate) factors: Vec<(f32, f32)>,
    /// Bits stay as they are, NaN and all, where no number is changed.
    pub(crate) plain: bool,
}

impl Conversion {
    pub(crate) fn bytes_in(&self) -> usize {
        self.width * self.height * self.channels * self.from.0.size()
    }

    pub(crate) fn run(&self, from: &[u8], to: &mut [u8]) {
        if self.plain && self.from == self.to {
            to.copy_from_slice(from);
            return;
        }
        match self.from.0 {
            Dtype::U8 => self.read(from, to, |[byte]: [u8; 1]| f32::from(byte)),
            Dtype::F16 => self.read(from, to, |le| f32_of_f16(u16::from_le_bytes(le))),
            Dtype::Bf16 => self.read(from, to, |le| f32_of_bf16(u16::from_le_bytes(le))),
            Dtype::F32 => self.read(from, to, f32::from_le_bytes),
        }
    }

    fn read<const IN: usize>(&self, from: &[u8], to: &mut [u8], read: impl Fn([u8; IN]) -> f32 + Copy) {
        match self.to.0 {
            Dtype::U8 => self.write(from, to, read, |value| [value.round_ties_even() as u8]),
            Dtype::F16 => self.write(from, to, read, |value| f16_bits(value).to_le_bytes()),
            Dtype::Bf16 => self.write(from, to, read, |value| bf16_bits(value).to_le_bytes()),
            Dtype::F32 => self.write(from, to, read, f32::to_le_bytes),
        }
    }

    /// Elements in the order in which they are written, which is worth more than the order in which they are read.
    fn write<const IN: usize, const OUT: usize>(
        &self,
        from: &[u8],
        to: &mut [u8],
        read: impl Fn([u8; IN]) -> f32 + Copy,
        write: impl Fn(f32) -> [u8; OUT] + Copy,
    ) {
        let (from, to) = (from.as_chunks::<IN>().0, to.as_chunks_mut::<OUT>().0);
        let pixels = self.width * self.height;
        let plain = self.plain;
        let change = |value: [u8; IN], (mul, add): (f32, f32)| {
            let value = read(value);
            write(if plain { value } else { value * mul + add })
        };
        match (self.from.1, self.to.1) {
            (Layout::Nchw, Layout::Nchw) => {
                let planes = to.chunks_exact_mut(pixels).zip(from.chunks_exact(pixels));
                for ((to, from), factors) in planes.zip(&self.factors) {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = change(*from, *factors));
                }
            }
            (Layout::Nhwc, Layout::Nchw) => {
                for (channel, (to, factors)) in to.chunks_exact_mut(pixels).zip(&self.factors).enumerate() {
                    let from = from[channel..].iter().step_by(self.channels);
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = change(*from, *factors));
                }
            }
            (Layout::Nhwc, Layout::Nhwc) => {
                let rows = to.chunks_exact_mut(self.channels).zip(from.chunks_exact(self.channels));
                for (to, from) in rows {
                    let both = to.iter_mut().zip(from).zip(&self.factors);
                    both.for_each(|((to, from), factors)| *to = change(*from, *factors));
                }
            }
            (Layout::Nchw, Layout::Nhwc) => {
                for (pixel, to) in to.chunks_exact_mut(self.channels).enumerate() {
                    for (channel, (to, factors)) in to.iter_mut().zip(&self.factors).enumerate() {
                        *to = change(from[channel * pixels + pixel], *factors);
                    }
                }
            }
        }
    }
}
