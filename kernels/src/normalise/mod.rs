//! From pixels to a tensor in one pass: order of colours, `x × mul + add`, layout and datatype.
//!
//! In: rows of 8-bit pixels, of one channel or of three, with any stride. Out: a part of a tensor, or all of it, little-endian,
//! at any alignment. Nothing can go wrong but that the two do not fit each other, which [`Misfit`] says.
//!
//! There are two ways: the vectors of x86-64 ([`Way::Vector`], AVX2 and F16C, looked for once), and tables of 256 entries for
//! a channel ([`Way::Table`], anywhere, and for the last pixels of a row). Both compute `x × mul + add` in f32, the product rounded before the
//! sum, and round once more to the datatype, to nearest, ties to even: they give the same bits, and so can a GPU that is told not to
//! fuse the two. A wider tensor (the margins of a letterbox) is written by [`Normaliser::fill`].

mod convert;
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "vectors are loaded and stored here, and code is called that only some CPUs have"
)]
mod x86;

pub use convert::{bf16_bits, f16_bits, f32_of_bf16, f32_of_f16};

/// The type of the tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// One byte: rounded to the nearest integer, ties to even, and kept within 0 and 255.
    U8,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an f32, rounded.
    Bf16,
    /// IEEE 754 single precision.
    F32,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Where the channels of a pixel lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// A plane for each channel (CHW).
    Planar,
    /// The channels of a pixel beside each other (HWC).
    Interleaved,
}

/// The channels of the tensor, made from RGB or from gray.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Channels {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red.
    Bgr,
    /// One: luma as ITU-R BT.601 weighs it, in 16 bits of fraction, as Pillow does.
    Gray,
}

impl Channels {
    /// How many.
    pub fn count(self) -> usize {
        if self == Self::Gray { 1 } else { 3 }
    }

    /// Which channel of the pixel is channel `channel` of the tensor.
    fn source(self, channel: usize) -> usize {
        if self == Self::Bgr { 2 - channel } else { channel }
    }
}

/// How the numbers are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// AVX2 and F16C.
    Vector,
    /// Tables.
    Table,
}

/// Pixels to read.
#[derive(Debug, Clone, Copy)]
pub struct Pixels<'a> {
    /// The first row and all after it.
    pub bytes: &'a [u8],
    /// Bytes from a row to the next.
    pub stride: usize,
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Bytes of a pixel: 1 is gray, 3 is RGB.
    pub channels: usize,
}

/// A rectangle of a tensor of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Columns of the tensor.
    pub width: usize,
    /// Rows of the tensor.
    pub height: usize,
    /// Where the rectangle begins.
    pub left: usize,
    /// Where the rectangle begins.
    pub top: usize,
}

impl Place {
    /// All of a tensor.
    pub fn all(width: usize, height: usize) -> Self {
        Self { width, height, left: 0, top: 0 }
    }
}

/// Pixels and tensor do not fit each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// A pixel has as many bytes as nothing here has.
    #[error("pixels have 1 or 3 channels, not {0}")]
    Channels(usize),
    /// The pixels end early.
    #[error("the pixels need {needed} bytes, but there are {found}")]
    Pixels {
        /// What the size asks for.
        needed: usize,
        /// What there is.
        found: usize,
    },
    /// The tensor has another size.
    #[error("the tensor has {needed} bytes, but there is room for {found}")]
    Tensor {
        /// What the size asks for.
        needed: usize,
        /// What there is.
        found: usize,
    },
    /// The rectangle is not inside the tensor.
    #[error("a rectangle of {width} x {height} at {place:?} leaves the tensor")]
    Outside {
        /// Columns of the rectangle.
        width: usize,
        /// Rows of the rectangle.
        height: usize,
        /// Where.
        place: Place,
    },
}

/// One way from pixels to tensors, made once and used for each image.
#[derive(Debug, Clone)]
pub struct Normaliser {
    channels: Channels,
    layout: Layout,
    dtype: Dtype,
    mul: [f32; 3],
    add: [f32; 3],
    /// The bits of each value of a pixel in each channel of the tensor.
    tables: Box<[[u32; 256]; 3]>,
    vector: bool,
}

impl Normaliser {
    /// `mul` and `add` are those of the tensor's channels, in its order; gray has the first.
    pub fn new(channels: Channels, layout: Layout, dtype: Dtype, mul: [f32; 3], add: [f32; 3]) -> Self {
        let table = |channel: usize| {
            std::array::from_fn(|value| convert::bits(dtype, value as f32 * mul[channel] + add[channel]))
        };
        let tables = Box::new(std::array::from_fn(table));
        // One channel lies the same way in both.
        let layout = if channels == Channels::Gray { Layout::Planar } else { layout };
        Self { channels, layout, dtype, mul, add, tables, vector: vectors() }
    }

    /// The same in a kernel's words, for a tensor of this size.
    pub fn tensor(&self, width: u32, height: u32) -> crate::fused::Tensor {
        let Self { channels, layout, dtype, mul, add, .. } = *self;
        crate::fused::Tensor { width, height, channels, layout, dtype, mul, add }
    }

    /// The same by the other way; where this CPU has no such vectors it stays with tables.
    pub fn by(mut self, way: Way) -> Self {
        self.vector = way == Way::Vector && vectors();
        self
    }

    /// How this one computes.
    pub fn way(&self) -> Way {
        if self.vector { Way::Vector } else { Way::Table }
    }

    /// Bytes of a tensor of this size.
    pub fn bytes(&self, width: usize, height: usize) -> usize {
        width * height * self.channels.count() * self.dtype.size()
    }

    /// Writes the pixels to their place in `tensor`, and nothing else.
    pub fn run(&self, pixels: &Pixels<'_>, place: &Place, tensor: &mut [u8]) -> Result<(), Misfit> {
        if !matches!(pixels.channels, 1 | 3) {
            return Err(Misfit::Channels(pixels.channels));
        }
        let row = pixels.width * pixels.channels;
        let needed = if pixels.height == 0 { 0 } else { (pixels.height - 1) * pixels.stride + row };
        if pixels.bytes.len() < needed || (pixels.stride < row && pixels.height > 1) {
            return Err(Misfit::Pixels { needed, found: pixels.bytes.len() });
        }
        self.check(pixels.width, pixels.height, place, tensor)?;
        if pixels.width == 0 || pixels.height == 0 {
            return Ok(());
        }
        let whole = *place == Place::all(pixels.width, pixels.height) && pixels.stride == row;
        if whole {
            // Rows that follow each other on both sides are one long row, which has only one end.
            self.row(&pixels.bytes[..needed], pixels.channels, 0, place.width * place.height, tensor);
            return Ok(());
        }
        for y in 0..pixels.height {
            let from = &pixels.bytes[y * pixels.stride..][..row];
            self.row(
                from,
                pixels.channels,
                (place.top + y) * place.width + place.left,
                place.width * place.height,
                tensor,
            );
        }
        Ok(())
    }

    /// Writes one colour, given as RGB, to a rectangle of `tensor`.
    pub fn fill(
        &self,
        colour: [u8; 3],
        width: usize,
        height: usize,
        place: &Place,
        tensor: &mut [u8],
    ) -> Result<(), Misfit> {
        self.check(width, height, place, tensor)?;
        let block: [u8; 3 * BLOCK] = std::array::from_fn(|at| colour[at % 3]);
        for y in 0..height {
            for x in (0..width).step_by(BLOCK) {
                let pixels = BLOCK.min(width - x);
                let at = (place.top + y) * place.width + place.left + x;
                self.row(&block[..3 * pixels], 3, at, place.width * place.height, tensor);
            }
        }
        Ok(())
    }

    fn check(&self, width: usize, height: usize, place: &Place, tensor: &[u8]) -> Result<(), Misfit> {
        let needed = self.bytes(place.width, place.height);
        if tensor.len() != needed {
            return Err(Misfit::Tensor { needed, found: tensor.len() });
        }
        let inside =
            |start: usize, length: usize, all: usize| start.checked_add(length).is_some_and(|end| end <= all);
        if !inside(place.left, width, place.width) || !inside(place.top, height, place.height) {
            return Err(Misfit::Outside { width, height, place: *place });
        }
        Ok(())
    }

    /// A row of pixels to the elements of pixel `at` and after, in a tensor of `plane` pixels.
    fn row(&self, from: &[u8], channels: usize, at: usize, plane: usize, tensor: &mut [u8]) {
        if channels == 3 && self.channels == Channels::Gray {
            let mut luma = [0; BLOCK];
            for (block, pixels) in from.chunks(3 * BLOCK).enumerate() {
                let luma = &mut luma[..pixels.len() / 3];
                for (luma, rgb) in luma.iter_mut().zip(pixels.as_chunks().0) {
                    *luma = gray(*rgb);
                }
                self.row(luma, 1, at + block * BLOCK, plane, tensor);
            }
            return;
        }
        let size = self.dtype.size();
        let pixels = from.len() / channels;
        match self.layout {
            Layout::Planar => {
                let (first, rest) = tensor.split_at_mut(plane * size);
                let (second, third) = rest.split_at_mut(rest.len() / 2);
                let part = |plane: &'_ mut [u8]| -> std::ops::Range<usize> {
                    if plane.is_empty() { 0..0 } else { at * size..(at + pixels) * size }
                };
                let (a, b, c) = (part(first), part(second), part(third));
                self.planar(from, channels, [&mut first[a], &mut second[b], &mut third[c]]);
            }
            Layout::Interleaved => {
                let to = &mut tensor[at * 3 * size..(at + pixels) * 3 * size];
                self.interleaved(from, channels, to);
            }
        }
    }

    fn planar(&self, from: &[u8], channels: usize, mut to: [&mut [u8]; 3]) {
        #[cfg(target_arch = "x86_64")]
        let done = if self.vector { x86::planar(self, from, channels, &mut to) } else { 0 };
        #[cfg(not(target_arch = "x86_64"))]
        let done = 0;
        for (channel, to) in to.into_iter().enumerate().take(self.channels.count()) {
            let source = if channels == 3 { self.channels.source(channel) } else { 0 };
            let values = from[done * channels..].chunks_exact(channels).map(|pixel| pixel[source]);
            let table = &self.tables[channel];
            let to = &mut to[done * self.dtype.size()..];
            write(self.dtype, to, values.map(|value| table[usize::from(value)]));
        }
    }

    fn interleaved(&self, from: &[u8], channels: usize, to: &mut [u8]) {
        #[cfg(target_arch = "x86_64")]
        let done = if self.vector && channels == 3 { x86::interleaved(self, from, to) } else { 0 };
        #[cfg(not(target_arch = "x86_64"))]
        let done = 0;
        let order: [usize; 3] =
            std::array::from_fn(|channel| if channels == 3 { self.channels.source(channel) } else { 0 });
        let values = from[done * channels..].chunks_exact(channels).flat_map(|pixel| {
            std::array::from_fn::<_, 3, _>(|channel| self.tables[channel][usize::from(pixel[order[channel]])])
        });
        write(self.dtype, &mut to[done * 3 * self.dtype.size()..], values);
    }
}

/// Pixels that are made at once where there is no source to read them from.
const BLOCK: usize = 256;

/// Luma: the weights of ITU-R BT.601 add up to 65,536, so that gray stays as it is.
pub fn gray([red, green, blue]: [u8; 3]) -> u8 {
    ((u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000) >> 16) as u8
}

fn write(dtype: Dtype, to: &mut [u8], values: impl Iterator<Item = u32>) {
    match dtype {
        Dtype::U8 => to.iter_mut().zip(values).for_each(|(to, bits)| *to = bits as u8),
        Dtype::F16 | Dtype::Bf16 => {
            let to = to.as_chunks_mut().0.iter_mut();
            to.zip(values).for_each(|(to, bits)| *to = (bits as u16).to_le_bytes());
        }
        Dtype::F32 => {
            to.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, bits)| *to = bits.to_le_bytes());
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> bool {
    x86::present()
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors() -> bool {
    false
}

#[cfg(test)]
mod tests;
