//! The two halves of a pipeline for images, for those who make tensors of several images at once: decoded here, resampled
//! and normalised by a kernel on a GPU (`penstock_kernels::fused`), which gives the bits that [`Pipeline::run`] gives; or
//! here after all, if no kernel could.
//!
//! In: an image. Out: its pixels, and what becomes of them in a kernel's words. Can go wrong: as with [`Pipeline::run`];
//! tensors and video frames have no such halves ([`Pipeline::tensor`] is `None`).

use penstock_kernels::fused;

use crate::decode::Image;
use crate::form::Filter;
use crate::geometry::{Plan, plan};
use crate::head::{self, Orientation};
use crate::pipeline::Kind;
use crate::{Limits, Pipeline, PrepareError, Scratch};

/// What a picture is and what becomes of it; its pixels are elsewhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Picture {
    image: Image,
    plan: Plan,
    orientation: Orientation,
    filter: fused::Filter,
    antialias: bool,
    pad: u8,
    /// Of a JPEG that is still to be decoded.
    scans: u32,
}

impl Picture {
    /// What decoding it takes, in pixels: each scan of a JPEG is a walk over all of them.
    pub fn work(&self) -> u64 {
        u64::from(self.image.width) * u64::from(self.image.height) * u64::from(self.scans.max(1))
    }

    /// How its pixels lie: without gaps.
    pub fn frame(&self) -> fused::Frame {
        let Image { width, height, channels } = self.image;
        let format = if channels == 1 { fused::Format::Gray } else { fused::Format::Rgb };
        fused::Frame::tight(format, width, height)
    }

    /// What becomes of them.
    pub fn part(&self) -> fused::Part {
        let Plan { area, size, at } = self.plan;
        let Orientation { transposed, mirrored, flipped } = self.orientation;
        fused::Part {
            area: fused::Area { left: area.left, top: area.top, width: area.width, height: area.height },
            size,
            turn: fused::Turn { transposed, mirrored, flipped },
            at,
            filter: self.filter,
            antialias: self.antialias,
            pad: [self.pad; 3],
        }
    }
}

impl Pipeline {
    /// The tensor in a kernel's words; `None`: what comes in is no image.
    pub fn tensor(&self) -> Option<fused::Tensor> {
        matches!(self.kind, Kind::Image | Kind::Rgb(..)).then(|| {
            let (width, height) = self.size();
            self.normaliser.tensor(width, height)
        })
    }

    /// What a JPEG is and what becomes of it, if another decoder may have its turn: one that reads no more than what is
    /// usual, and makes pixels of the full size. At most so many of them. `None`: it is no such file, and [`decode`]
    /// takes it, or says what is wrong with it.
    ///
    /// Its markers were walked to the end, so that it is no file without its end; what lies between them was not looked
    /// at.
    ///
    /// [`decode`]: Self::decode
    pub fn undecoded(&self, input: &[u8], limits: &Limits, most: u64) -> Option<Picture> {
        if !matches!(self.kind, Kind::Image) || input.len() > limits.bytes {
            return None;
        }
        let head = head::read(input).ok().filter(|head| limits.check(head).is_ok())?;
        let pixels = u64::from(head.width) * u64::from(head.height);
        if pixels > most || !head::is_usual_jpeg(input, &head) {
            return None;
        }
        let (plan, orientation) = self.plan(&head).ok()?;
        let image = Image { width: head.width, height: head.height, channels: head.channels };
        Some(Picture { scans: head.scans, ..self.picture(image, plan, orientation) })
    }

    fn picture(&self, image: Image, plan: Plan, orientation: Orientation) -> Picture {
        let filter = match self.sampling.filter {
            Filter::Bilinear => fused::Filter::Bilinear,
            Filter::Bicubic => fused::Filter::Bicubic,
            Filter::Lanczos => fused::Filter::Lanczos,
        };
        let (antialias, pad) = (self.sampling.antialias, self.pad);
        Picture { image, plan, orientation, filter, antialias, pad, scans: 1 }
    }

    /// The first half: `with` gets the pixels. As [`Pipeline::run`] otherwise.
    pub fn decode<T>(
        &self,
        input: &[u8],
        scratch: &mut Scratch,
        limits: &Limits,
        cancelled: &dyn Fn() -> bool,
        with: impl FnOnce(&[u8], Picture) -> T,
    ) -> Result<T, PrepareError> {
        if cancelled() {
            return Err(PrepareError::Cancelled);
        }
        if input.len() > limits.bytes {
            return Err(PrepareError::Bytes { found: input.len(), limit: limits.bytes });
        }
        let picture = |image, plan, orientation| self.picture(image, plan, orientation);
        match &self.kind {
            Kind::Rgb(width, height) => {
                let image = Image { width: *width, height: *height, channels: 3 };
                self.check_size(input, image.bytes())?;
                let plan = plan(*width, *height, self.sizing, self.crop)?;
                Ok(with(input, picture(image, plan, Orientation::default())))
            }
            Kind::Image => {
                let Scratch { pixels, jpeg, .. } = scratch;
                let (image, plan, orientation) = self.decoded(input, (pixels, jpeg), limits, cancelled)?;
                Ok(with(&pixels[..image.bytes()], picture(image, plan, orientation)))
            }
            Kind::Yuv(_) | Kind::Tensor(_) => {
                Err(PrepareError::Internal { doing: "decoding", reason: "it is no image".to_owned() })
            }
        }
    }

    /// The second half on the CPU: the tensor of a picture, in `out`.
    pub fn make(
        &self,
        pixels: &[u8],
        picture: &Picture,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), PrepareError> {
        if out.len() != self.bytes() || pixels.len() != picture.image.bytes() {
            return Err(PrepareError::Room { expected: self.bytes(), found: out.len() });
        }
        let Scratch { resized, turned, resizer, .. } = scratch;
        let Picture { image, plan, orientation, .. } = picture;
        self.finish(image, pixels, plan, *orientation, out, (resized, turned, resizer))
    }
}
