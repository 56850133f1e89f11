//! What checks and rates share: a device, random inputs, and copies that are waited for.

use bytes::Bytes;
use penstock_kernels::arena::{Arena, Kind};
use penstock_kernels::cuda::{Context, DeviceMemory, Error, Kernels, Order, Stream};
use penstock_kernels::fused::{Area, Filter, Format, Frame, Matrix, Part, Range, Tensor, Turn};
use penstock_kernels::normalise::{Channels, Dtype, Layout};

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The driver said no.
    #[error(transparent)]
    Driver(#[from] Error),
    /// A launch was refused.
    #[error(transparent)]
    Order(#[from] Order),
    /// There is no arena.
    #[error(transparent)]
    Arena(#[from] penstock_kernels::arena::Error),
    /// The system said no.
    #[error(transparent)]
    System(#[from] std::io::Error),
    /// Something is not as it should be.
    #[error("{0}")]
    Wrong(String),
}

/// How a check went that did not fail.
pub(crate) enum Said {
    /// What it found.
    Done(String),
    /// Why there was nothing to check.
    Skipped(String),
}

/// Something is not as it should be.
pub(crate) fn wrong(told: impl Into<String>) -> Failure {
    Failure::Wrong(told.into())
}

/// A device, ready to work.
pub(crate) struct Bed {
    pub(crate) context: Context,
    pub(crate) stream: Stream,
    pub(crate) kernels: Kernels,
    pub(crate) seed: u64,
}

impl Bed {
    pub(crate) fn new(context: Context, kernels: Kernels, seed: u64) -> Result<Self, Failure> {
        let stream = context.stream()?;
        Ok(Self { context, stream, kernels, seed })
    }

    /// Random numbers of their own for each check.
    pub(crate) fn dice(&self, check: u64) -> Dice {
        Dice(self.seed ^ check.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(crate) fn upload(&self, bytes: Vec<u8>) -> Result<DeviceMemory, Failure> {
        let memory = self.context.alloc(bytes.len())?;
        self.stream.upload(Bytes::from(bytes), &memory, 0)?.wait()?;
        Ok(memory)
    }

    pub(crate) fn download(&self, memory: &DeviceMemory) -> Result<Vec<u8>, Failure> {
        let arena = Arena::new(Kind::Pinned { context: &self.context }, memory.bytes(), 4096)?;
        let run =
            arena.run(&[memory.bytes()], 1).and_then(|run| run.seal()).ok_or_else(|| wrong("no room"))?;
        let (run, _) = self.stream.download(memory, 0, run, 0, 0..1)?.wait()?;
        Ok(run.input(0, 0..1).unwrap_or_default().to_vec())
    }
}

/// Random numbers (splitmix64).
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    /// From 0 to 1.
    pub(crate) fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(count);
        bytes
    }

    pub(crate) fn dtype(&mut self) -> Dtype {
        self.one_of(&[Dtype::U8, Dtype::F16, Dtype::Bf16, Dtype::F32])
    }

    pub(crate) fn layout(&mut self) -> Layout {
        self.one_of(&[Layout::Planar, Layout::Interleaved])
    }

    pub(crate) fn tensor(&mut self, most: u64) -> Tensor {
        let mut factors = |from: f32, to: f32| [0; 3].map(|_| from + (to - from) * self.share() as f32);
        let (mul, add) = (factors(0.001, 1.5), factors(-120.0, 120.0));
        Tensor {
            width: 1 + self.below(most) as u32,
            height: 1 + self.below(most) as u32,
            channels: self.one_of(&[Channels::Rgb, Channels::Bgr, Channels::Gray]),
            layout: self.layout(),
            dtype: self.dtype(),
            mul,
            add,
        }
    }

    /// An image of any size with gaps between its rows, and any part of it for a place in the tensor.
    pub(crate) fn image(&mut self, format: Format, most: u64, tensor: &Tensor) -> (Frame, Vec<u8>, Part) {
        let (width, height) = (1 + self.below(most) as u32, 1 + self.below(most) as u32);
        let gap = self.below(8) as u32;
        let tight = Frame::tight(format, width, height);
        let strides = tight.strides.map(|stride| stride + gap);
        let luma = height as usize * strides[0] as usize;
        let chroma = height.div_ceil(2) as usize * strides[1] as usize;
        let frame = Frame {
            planes: [0, luma, luma + chroma],
            strides,
            matrix: self.one_of(&[Matrix::Bt601, Matrix::Bt709]),
            range: self.one_of(&[Range::Limited, Range::Full]),
            ..tight
        };
        let bytes = self.bytes(frame.bytes().unwrap_or_default());
        let (all, down) = (f64::from(width), f64::from(height));
        let (left, top) = (self.share() * all * 0.9, self.share() * down * 0.9);
        let area = match self.below(3) {
            0 => Area { left: 0.0, top: 0.0, width: all, height: down },
            _ => Area {
                left,
                top,
                width: ((all - left) * self.share()).max(0.05),
                height: ((down - top) * self.share()).max(0.05),
            },
        };
        let least = u64::from(tensor.width.min(tensor.height));
        let size = (1 + self.below(least) as u32, 1 + self.below(least) as u32);
        let turn = Turn {
            transposed: self.below(2) == 0,
            mirrored: self.below(2) == 0,
            flipped: self.below(2) == 0,
        };
        let upright = if turn.transposed { (size.1, size.0) } else { size };
        let mut at = |all: u32, used: u32| self.below(u64::from(all - used) + 1) as u32;
        let at = (at(tensor.width, upright.0), at(tensor.height, upright.1));
        let filter = self.one_of(&[Filter::Bilinear, Filter::Bicubic, Filter::Lanczos]);
        let pad = [0; 3].map(|_| self.next() as u8);
        (frame, bytes, Part { area, size, turn, at, filter, antialias: self.below(2) == 0, pad })
    }
}
