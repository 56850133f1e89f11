//! What the fused kernel is asked for, and the same on the CPU.
//!
//! A [`Frame`] says how pixels lie in some bytes, a [`Part`] what becomes of them, a [`Tensor`] what is written: of a
//! whole batch in one form. [`mod@reference`] computes it here, with the kernel's own arithmetic and in float64;
//! [`crate::cuda`] on a GPU. The sidecar's CPU path is `penstock-prepare`, which is faster than [`mod@reference`] and,
//! from the same pixels, gives the same bits.
//!
//! Can go wrong: a frame, a part and a tensor that do not fit each other, which [`Misfit`] says before anything is
//! touched.

mod axis;
pub mod reference;

pub use axis::{Axis, Filter};

use crate::normalise::{Channels, Dtype, Layout};

/// The largest side of a source or a tensor. Positions times three then still fit 32 bits, with room to spare.
pub const SIDE: u32 = 1 << 16;

/// How the pixels of a source lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Three bytes a pixel.
    Rgb,
    /// One.
    Gray,
    /// A plane of luma, and one of chroma in pairs, at half the size.
    Nv12,
    /// A plane of luma, and two of chroma at half the size (YUV420).
    I420,
}

/// The weights of a video frame's colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Matrix {
    /// ITU-R BT.601.
    #[default]
    Bt601,
    /// ITU-R BT.709.
    Bt709,
}

/// Where black and white are in a video frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Range {
    /// 16 and 235.
    #[default]
    Limited,
    /// 0 and 255.
    Full,
}

/// Pixels in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// How they lie.
    pub format: Format,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Where each plane begins; those that the format has not are not looked at.
    pub planes: [usize; 3],
    /// Bytes from a row to the next: of the first plane, of the others.
    pub strides: [u32; 2],
    /// Of video.
    pub matrix: Matrix,
    /// Of video.
    pub range: Range,
}

impl Frame {
    /// One without gaps.
    pub fn tight(format: Format, width: u32, height: u32) -> Self {
        let (across, down) = (width.div_ceil(2), height.div_ceil(2));
        let luma = width as usize * height as usize;
        let (planes, strides) = match format {
            Format::Rgb => ([0; 3], [3 * width, 0]),
            Format::Gray => ([0; 3], [width, 0]),
            Format::Nv12 => ([0, luma, 0], [width, 2 * across]),
            Format::I420 => ([0, luma, luma + across as usize * down as usize], [width, across]),
        };
        Self { format, width, height, planes, strides, matrix: Matrix::default(), range: Range::default() }
    }

    /// Rows of each plane, and bytes of a row.
    fn shape(&self) -> [(u32, u32); 3] {
        let (across, down) = (self.width.div_ceil(2), self.height.div_ceil(2));
        match self.format {
            Format::Rgb => [(self.height, 3 * self.width), (0, 0), (0, 0)],
            Format::Gray => [(self.height, self.width), (0, 0), (0, 0)],
            Format::Nv12 => [(self.height, self.width), (down, 2 * across), (0, 0)],
            Format::I420 => [(self.height, self.width), (down, across), (down, across)],
        }
    }

    /// Bytes of a row of the first plane.
    pub(crate) fn row(&self) -> u32 {
        self.shape()[0].1
    }

    /// How many bytes it needs; `None`: it is no frame.
    pub fn bytes(&self) -> Option<usize> {
        let sides = 1..=SIDE;
        if !sides.contains(&self.width) || !sides.contains(&self.height) {
            return None;
        }
        let mut end = 0;
        for (at, (rows, row)) in self.shape().into_iter().enumerate().filter(|(_, (rows, _))| *rows > 0) {
            let stride = self.strides[at.min(1)];
            if stride < row && rows > 1 {
                return None;
            }
            let plane = (rows as usize - 1).checked_mul(stride as usize)?.checked_add(row as usize)?;
            end = end.max(self.planes[at].checked_add(plane)?);
        }
        Some(end)
    }

    /// Fixed-point factors: black, luma, red, green of u, green of v, blue.
    pub(crate) fn factors(&self) -> [i32; 6] {
        let (red, blue) = match self.matrix {
            Matrix::Bt601 => (0.299, 0.114),
            Matrix::Bt709 => (0.2126, 0.0722),
        };
        let green = 1.0 - red - blue;
        let (black, luma, chroma) = match self.range {
            Range::Limited => (16, 255.0 / 219.0, 255.0 / 224.0),
            Range::Full => (0, 1.0, 1.0),
        };
        // 20 bits of fraction, as OpenCV has them.
        let fixed = |value: f64| (value * f64::from(1 << 20)).round() as i32;
        [
            black,
            fixed(luma),
            fixed(chroma * 2.0 * (1.0 - red)),
            fixed(chroma * -2.0 * (1.0 - blue) * blue / green),
            fixed(chroma * -2.0 * (1.0 - red) * red / green),
            fixed(chroma * 2.0 * (1.0 - blue)),
        ]
    }
}

/// A rectangle of the source, in its pixels and fractions of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Area {
    /// Where it begins.
    pub left: f64,
    /// Where it begins.
    pub top: f64,
    /// How wide it is.
    pub width: f64,
    /// How high it is.
    pub height: f64,
}

/// How what is stored becomes upright: transposed first, as EXIF means it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Turn {
    /// Rows become columns.
    pub transposed: bool,
    /// Left becomes right.
    pub mirrored: bool,
    /// Above becomes below.
    pub flipped: bool,
}

/// What becomes of a source.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// The rectangle that is taken, as it is stored.
    pub area: Area,
    /// Columns and rows that it becomes, as it is stored.
    pub size: (u32, u32),
    /// How that is turned.
    pub turn: Turn,
    /// Where it lies in the tensor, turned.
    pub at: (u32, u32),
    /// The filter.
    pub filter: Filter,
    /// Whether the filter widens with the scale.
    pub antialias: bool,
    /// What lies around it, as RGB.
    pub pad: [u8; 3],
}

impl Part {
    /// All of a frame, to all of a tensor of this size.
    pub fn whole(frame: &Frame, size: (u32, u32)) -> Self {
        let area =
            Area { left: 0.0, top: 0.0, width: f64::from(frame.width), height: f64::from(frame.height) };
        Self {
            area,
            size,
            turn: Turn::default(),
            at: (0, 0),
            filter: Filter::Bilinear,
            antialias: true,
            pad: [0; 3],
        }
    }

    /// Columns and rows of what is turned.
    fn upright(&self) -> (u32, u32) {
        if self.turn.transposed { (self.size.1, self.size.0) } else { self.size }
    }

    /// How columns and rows are resampled.
    pub(crate) fn axes(&self, frame: &Frame) -> [Axis; 2] {
        let Area { left, top, width, height } = self.area;
        [
            Axis::new(frame.width, left, width, self.size.0, self.filter, self.antialias),
            Axis::new(frame.height, top, height, self.size.1, self.filter, self.antialias),
        ]
    }
}

/// The form of a tensor: `x × mul + add` for each of its channels, in its order; gray has the first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tensor {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Which.
    pub channels: Channels,
    /// Where they lie.
    pub layout: Layout,
    /// Of what type they are.
    pub dtype: Dtype,
    /// The factors.
    pub mul: [f32; 3],
    /// The summands.
    pub add: [f32; 3],
}

impl Tensor {
    /// Bytes of one.
    pub fn bytes(&self) -> usize {
        self.width as usize * self.height as usize * self.channels.count() * self.dtype.size()
    }
}

/// A frame, a part and a tensor that do not fit each other.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum Misfit {
    /// Sides, strides or planes that make no frame.
    #[error(
        "{frame:?} is no frame: sides are 1 to {SIDE}, and a row has at least as many bytes as its pixels"
    )]
    Frame {
        /// Which.
        frame: Frame,
    },
    /// The bytes end early.
    #[error("the frame needs {needed} bytes, but there are {found}")]
    Bytes {
        /// What it needs.
        needed: usize,
        /// What there is.
        found: usize,
    },
    /// The rectangle is not in the frame.
    #[error("{area:?} is not inside the {width} x {height} pixels of the frame")]
    Area {
        /// Which.
        area: Area,
        /// Columns of the frame.
        width: u32,
        /// Rows of the frame.
        height: u32,
    },
    /// What becomes of it is not in the tensor.
    #[error("{size:?} at {at:?} leaves a tensor of {width} x {height}")]
    Tensor {
        /// Columns and rows, turned.
        size: (u32, u32),
        /// Where.
        at: (u32, u32),
        /// Columns of the tensor.
        width: u32,
        /// Rows of the tensor.
        height: u32,
    },
}

/// Whether they fit, with `found` bytes of the source.
pub fn check(frame: &Frame, found: usize, part: &Part, tensor: &Tensor) -> Result<(), Misfit> {
    let needed = frame.bytes().ok_or(Misfit::Frame { frame: *frame })?;
    if found < needed {
        return Err(Misfit::Bytes { needed, found });
    }
    let Part { area, at, .. } = *part;
    // A crop is computed as products of fractions, whose last bit may stand over.
    let inside = |start: f64, length: f64, all: u32| {
        start >= 0.0 && length > 0.0 && start < f64::from(all) && start + length <= f64::from(all) + 1e-6
    };
    if !inside(area.left, area.width, frame.width) || !inside(area.top, area.height, frame.height) {
        return Err(Misfit::Area { area, width: frame.width, height: frame.height });
    }
    let size = part.upright();
    let fits = |at: u32, size: u32, all: u32| {
        size > 0 && all <= SIDE && at.checked_add(size).is_some_and(|end| end <= all)
    };
    let Tensor { width, height, .. } = *tensor;
    if !fits(at.0, size.0, width) || !fits(at.1, size.1, height) {
        return Err(Misfit::Tensor { size, at, width, height });
    }
    Ok(())
}
