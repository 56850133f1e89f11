//! A declaration that was checked, and what it does with an input.
//!
//! The stages of an image, in order: its head is read and held against the limits; geometry says which part of it becomes
//! which part of the tensor; it is decoded, at a fraction of its size if that is enough; the part is resampled, still as it is stored; what is left,
//! small by now, is turned; one pass makes the tensor of it.

use fast_image_resize::Resizer;
use penstock_kernels::normalise::{Channels, Normaliser, Pixels, Place};

use crate::decode::{self, Image, jpeg, yuv};
use crate::form::{
    Colour, Crop, Declaration, Dtype, Input, InputFormat, JpegScaling, Layout, Matrix, Normalise,
    OrientationRule, Range, Resize, ResizeMode,
};
use crate::geometry::{Plan, Sampling, Sizing, plan};
use crate::head::{self, Head, Orientation};
use crate::tensor::Conversion;
use crate::{DeclarationError, Limits, PrepareError};

/// The largest side of a tensor; a typing error should not ask for all of the arena.
const SIDE: u32 = 8192;

/// Buffers that runs leave to the next run. One for each thread that prepares.
#[derive(Default)]
pub struct Scratch {
    pub(crate) pixels: Vec<u8>,
    pub(crate) resized: Vec<u8>,
    pub(crate) turned: Vec<u8>,
    pub(crate) resizer: Resizer,
    pub(crate) jpeg: jpeg::Decoder,
}

impl Scratch {
    /// Bytes that it keeps.
    pub fn bytes(&self) -> usize {
        let own = self.pixels.capacity() + self.resized.capacity() + self.turned.capacity();
        own + self.resizer.size_of_internal_buffers()
    }

    /// Gives memory back if it keeps more than `bytes`, as after one very large image.
    pub fn shrink(&mut self, bytes: usize) {
        if self.bytes() > bytes {
            *self = Self::default();
        }
    }
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scratch").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// What comes in.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Image,
    Rgb(u32, u32),
    Yuv(yuv::Frame),
    Tensor(Conversion),
}

/// What to do with an input.
#[derive(Debug, Clone)]
pub struct Pipeline {
    pub(crate) kind: Kind,
    pub(crate) orientation: bool,
    pub(crate) scaling: JpegScaling,
    pub(crate) sizing: Sizing,
    pub(crate) sampling: Sampling,
    pub(crate) pad: u8,
    pub(crate) crop: Option<Crop>,
    pub(crate) normaliser: Normaliser,
    pub(crate) colour: Colour,
    /// Of each channel of the tensor: factor and summand.
    pub(crate) factors: Vec<(f64, f64)>,
    layout: Layout,
    dtype: Dtype,
    channels: usize,
    width: u32,
    height: u32,
}

impl Pipeline {
    /// Checks a declaration.
    pub fn new(declaration: &Declaration) -> Result<Self, DeclarationError> {
        let declared = declaration.complete();
        let input = declared.input.clone().unwrap_or_default();
        let layout = declared.layout.unwrap_or(Layout::Nchw);
        let dtype = declared.dtype.unwrap_or(Dtype::F32);
        let colour = declared.colour.unwrap_or(Colour::Rgb);
        let tensor = input.format == InputFormat::Tensor;
        let (channels, raw) = check_input(&input)?;
        let channels = match (tensor, colour) {
            (true, _) => channels as usize,
            (false, Colour::Gray) => 1,
            (false, _) => 3,
        };
        let factors = factors(declared.normalise.as_ref(), channels, if tensor { 1.0 } else { 1.0 / 255.0 })?;
        let (sizing, sampling, pad) = match &declared.resize {
            None => (Sizing::None, Sampling { filter: Default::default(), antialias: true }, 0),
            Some(resize) => check_resize(resize)?,
        };
        if tensor {
            let given = [
                ("resize", declared.resize.is_some()),
                ("crop", declared.crop.is_some()),
                ("colour", declared.colour.is_some()),
                ("orientation", declared.orientation.is_some()),
                ("jpeg-scaling", declared.jpeg_scaling.is_some()),
            ];
            if let Some((field, _)) = given.into_iter().find(|(_, given)| *given) {
                let fix = "leave it out, or declare `input.format: rgb` if the tensor is an image of bytes";
                return Err(DeclarationError::new(field, "a tensor has no such thing", fix));
            }
        }
        let (width, height) = check_size(sizing, declared.crop, raw)?;
        let single = |of: fn(&(f64, f64)) -> f64| -> [f32; 3] {
            std::array::from_fn(|channel| factors.get(channel).map_or(0.0, of) as f32)
        };
        let order = match colour {
            Colour::Rgb => Channels::Rgb,
            Colour::Bgr => Channels::Bgr,
            Colour::Gray => Channels::Gray,
        };
        let planes = match layout {
            Layout::Nchw => penstock_kernels::normalise::Layout::Planar,
            Layout::Nhwc => penstock_kernels::normalise::Layout::Interleaved,
        };
        let (raw_width, raw_height) = raw.unwrap_or_default();
        let frame = |pairs| yuv::Frame {
            width: raw_width,
            height: raw_height,
            pairs,
            matrix: input.matrix.unwrap_or(Matrix::Bt601),
            range: input.range.unwrap_or(Range::Limited),
        };
        let kind = match input.format {
            InputFormat::Image => Kind::Image,
            InputFormat::Rgb => Kind::Rgb(raw_width, raw_height),
            InputFormat::Nv12 => Kind::Yuv(frame(true)),
            InputFormat::Yuv420 => Kind::Yuv(frame(false)),
            InputFormat::Tensor => Kind::Tensor(Conversion {
                width: width as usize,
                height: height as usize,
                channels,
                from: (input.dtype.unwrap_or(Dtype::U8), input.layout.unwrap_or(Layout::Nhwc)),
                to: (dtype, layout),
                factors: factors.iter().map(|(mul, add)| (*mul as f32, *add as f32)).collect(),
                plain: declared.normalise.is_none(),
            }),
        };
        Ok(Self {
            kind,
            orientation: declared.orientation != Some(OrientationRule::Ignore),
            scaling: declared.jpeg_scaling.unwrap_or(JpegScaling::Fine),
            sizing,
            sampling,
            pad,
            crop: declared.crop,
            normaliser: Normaliser::new(
                order,
                planes,
                dtype.into(),
                single(|both| both.0),
                single(|both| both.1),
            ),
            colour,
            factors,
            layout,
            dtype,
            channels,
            width,
            height,
        })
    }

    /// The tensor's dimensions, without that of the batch.
    pub fn shape(&self) -> [usize; 3] {
        let (width, height) = (self.width as usize, self.height as usize);
        match self.layout {
            Layout::Nchw => [self.channels, height, width],
            Layout::Nhwc => [height, width, self.channels],
        }
    }

    /// The type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The type of elements that come in, and how many bytes of them make one tensor; `None`: images, which differ.
    pub fn takes(&self) -> Option<(Dtype, usize)> {
        match &self.kind {
            Kind::Image => None,
            Kind::Rgb(width, height) => Some((Dtype::U8, *width as usize * *height as usize * 3)),
            Kind::Yuv(frame) => Some((Dtype::U8, frame.bytes())),
            Kind::Tensor(conversion) => Some((conversion.from.0, conversion.bytes_in())),
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.shape().iter().product::<usize>() * self.dtype.size()
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    pub(crate) fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Makes the tensor of `input` in `out`, which has [`Pipeline::bytes`] bytes. After an error `out` holds nothing of use.
    /// `cancelled` is asked between stages and, but for JPEG by libjpeg-turbo, while decoding.
    pub fn run(
        &self,
        input: &[u8],
        out: &mut [u8],
        scratch: &mut Scratch,
        limits: &Limits,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), PrepareError> {
        if out.len() != self.bytes() {
            return Err(PrepareError::Room { expected: self.bytes(), found: out.len() });
        }
        let go_on = || if cancelled() { Err(PrepareError::Cancelled) } else { Ok(()) };
        go_on()?;
        if input.len() > limits.bytes {
            return Err(PrepareError::Bytes { found: input.len(), limit: limits.bytes });
        }
        match &self.kind {
            Kind::Tensor(conversion) => {
                self.check_size(input, conversion.bytes_in())?;
                conversion.run(input, out);
                Ok(())
            }
            Kind::Rgb(width, height) => {
                let image = Image { width: *width, height: *height, channels: 3 };
                self.check_size(input, image.bytes())?;
                let plan = plan(*width, *height, self.sizing, self.crop)?;
                let Scratch { resized, turned, resizer, .. } = scratch;
                self.finish(&image, input, &plan, Orientation::default(), out, (resized, turned, resizer))
            }
            Kind::Yuv(frame) => {
                self.check_size(input, frame.bytes())?;
                let plan = plan(frame.width, frame.height, self.sizing, self.crop)?;
                let image = Image { width: frame.width, height: frame.height, channels: 3 };
                let Scratch { pixels, resized, turned, resizer, .. } = scratch;
                if pixels.len() < image.bytes() {
                    pixels.resize(image.bytes(), 0);
                }
                frame.decode(input, &mut pixels[..image.bytes()]);
                go_on()?;
                self.finish(&image, pixels, &plan, Orientation::default(), out, (resized, turned, resizer))
            }
            Kind::Image => {
                let Scratch { pixels, resized, turned, resizer, jpeg } = scratch;
                let (image, plan, orientation) = self.decoded(input, (pixels, jpeg), limits, cancelled)?;
                go_on()?;
                self.finish(&image, pixels, &plan, orientation, out, (resized, turned, resizer))
            }
        }
    }

    /// The pixels of an image, and what is to be done with them.
    pub(crate) fn decoded(
        &self,
        input: &[u8],
        (pixels, jpeg): (&mut Vec<u8>, &mut jpeg::Decoder),
        limits: &Limits,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(Image, Plan, Orientation), PrepareError> {
        let head = head::read(input)?;
        limits.check(&head)?;
        let (mut plan, orientation) = self.plan(&head)?;
        let image = decode::decode(input, &head, self.eighths(&plan), (pixels, jpeg), limits, cancelled)?;
        if (image.width, image.height) != (head.width, head.height) {
            // Not what the sides became, which is rounded up, but the scale itself.
            let scale = scale_of(&image, &head);
            plan.area = plan.area.scaled(scale, image.width, image.height);
        }
        Ok((image, plan, orientation))
    }

    /// What to do with an image of this head, as it is stored.
    pub(crate) fn plan(&self, head: &Head) -> Result<(Plan, Orientation), PrepareError> {
        let orientation = if self.orientation { head.orientation } else { Orientation::default() };
        let (width, height) = match orientation.transposed {
            true => (head.height, head.width),
            false => (head.width, head.height),
        };
        let plan = plan(width, height, self.sizing, self.crop)?;
        Ok((plan.stored(orientation, width, height), orientation))
    }

    /// At how many eighths of its size a JPEG is decoded. Without antialiasing the result is made of single pixels of the
    /// full image, which a smaller one does not have.
    fn eighths(&self, plan: &Plan) -> u32 {
        match self.scaling {
            JpegScaling::Fine if self.sampling.antialias => plan.eighths(2.0),
            JpegScaling::Fast if self.sampling.antialias => plan.eighths(jpeg::LEAST_MARGIN),
            _ => 8,
        }
    }

    /// From pixels to the tensor.
    pub(crate) fn finish(
        &self,
        image: &Image,
        pixels: &[u8],
        plan: &Plan,
        orientation: Orientation,
        out: &mut [u8],
        (resized, turned, resizer): (&mut Vec<u8>, &mut Vec<u8>, &mut Resizer),
    ) -> Result<(), PrepareError> {
        let channels = usize::from(image.channels);
        let (mut width, mut height) = (plan.size.0 as usize, plan.size.1 as usize);
        let (mut bytes, mut stride) = match plan.area.whole(plan.size) {
            Some((left, top)) => {
                let stride = image.width as usize * channels;
                (&pixels[top * stride + left * channels..], stride)
            }
            None => {
                let needed = width * height * channels;
                if resized.len() < needed {
                    resized.resize(needed, 0);
                }
                let to = &mut resized[..needed];
                crate::resize::resize(resizer, image, pixels, &plan.area, plan.size, self.sampling, to)?;
                (&*to, width * channels)
            }
        };
        if !orientation.is_upright() {
            let needed = width * height * channels;
            if turned.len() < needed {
                turned.resize(needed, 0);
            }
            if orientation.transposed {
                (width, height) = (height, width);
            }
            turn(bytes, stride, channels, orientation, width, &mut turned[..needed]);
            (bytes, stride) = (turned, width * channels);
        }
        let place = Place {
            width: self.width as usize,
            height: self.height as usize,
            left: plan.at.0 as usize,
            top: plan.at.1 as usize,
        };
        let told = |error: penstock_kernels::normalise::Misfit| PrepareError::Internal {
            doing: "writing the tensor",
            reason: error.to_string(),
        };
        self.margins(width, height, &place, out).map_err(told)?;
        self.normaliser.run(&Pixels { bytes, stride, width, height, channels }, &place, out).map_err(told)
    }

    /// What a letterbox leaves around the image.
    fn margins(
        &self,
        width: usize,
        height: usize,
        place: &Place,
        out: &mut [u8],
    ) -> Result<(), penstock_kernels::normalise::Misfit> {
        let colour = [self.pad; 3];
        let (right, bottom) = (place.left + width, place.top + height);
        let rectangles = [
            (place.width, place.top, 0, 0),
            (place.width, place.height.saturating_sub(bottom), 0, bottom),
            (place.left, height, 0, place.top),
            (place.width.saturating_sub(right), height, right, place.top),
        ];
        for (width, height, left, top) in rectangles {
            if width > 0 && height > 0 {
                self.normaliser.fill(colour, width, height, &Place { left, top, ..*place }, out)?;
            }
        }
        Ok(())
    }

    pub(crate) fn check_size(&self, input: &[u8], expected: usize) -> Result<(), PrepareError> {
        if input.len() == expected {
            return Ok(());
        }
        let declared = match &self.kind {
            Kind::Image => "an image".to_owned(),
            Kind::Rgb(width, height) => format!("RGB of {width} x {height}"),
            Kind::Yuv(frame) => {
                let name = if frame.pairs { "NV12" } else { "YUV420" };
                format!("{name} of {} x {}", frame.width, frame.height)
            }
            Kind::Tensor(of) => {
                let (dtype, order) = (of.from.0.protocol_name(), of.from.1);
                let (width, height, channels) = (of.width, of.height, of.channels);
                match order {
                    Layout::Nchw => format!("{dtype} of [{channels}, {height}, {width}]"),
                    Layout::Nhwc => format!("{dtype} of [{height}, {width}, {channels}]"),
                }
            }
        };
        Err(PrepareError::Size { declared, expected, found: input.len() })
    }
}

/// The scale a decoder chose: sides are rounded up to whole pixels, scales are eighths.
fn scale_of(image: &Image, head: &Head) -> f64 {
    let of = |eighths: u32| {
        let side = |side: u32| (u64::from(side) * u64::from(eighths)).div_ceil(8);
        (side(head.width), side(head.height)) == (u64::from(image.width), u64::from(image.height))
    };
    let eighths = [4, 2, 1].into_iter().find(|eighths| of(*eighths)).unwrap_or(8);
    f64::from(eighths) / 8.0
}

/// Turns stored pixels into the image, which is `width` pixels wide.
fn turn(from: &[u8], stride: usize, channels: usize, orientation: Orientation, width: usize, to: &mut [u8]) {
    let height = to.len() / (width * channels).max(1);
    for (y, row) in to.chunks_exact_mut(width * channels).enumerate() {
        for (x, pixel) in row.chunks_exact_mut(channels).enumerate() {
            let (column, line) = orientation.stored(x, y, width, height);
            pixel.copy_from_slice(&from[line * stride + column * channels..][..channels]);
        }
    }
}

/// Channels of a tensor, and the size of what is raw.
fn check_input(input: &Input) -> Result<(u32, Option<(u32, u32)>), DeclarationError> {
    let error = |field, what: &str, fix: &str| Err(DeclarationError::new(field, what, fix));
    let tensor = input.format == InputFormat::Tensor;
    let video = matches!(input.format, InputFormat::Nv12 | InputFormat::Yuv420);
    if !tensor && (input.channels.is_some() || input.dtype.is_some() || input.layout.is_some()) {
        return error(
            "input",
            "only a tensor has channels, dtype and layout",
            "leave them out, or declare `format: tensor`",
        );
    }
    if !video && (input.matrix.is_some() || input.range.is_some()) {
        return error("input", "only nv12 and yuv420 have a matrix and a range", "leave them out");
    }
    let channels = input.channels.unwrap_or(3);
    if channels == 0 || channels > 4096 {
        return error(
            "input.channels",
            "there are none, or more than 4096",
            "say how many channels the tensor has",
        );
    }
    if input.format == InputFormat::Image {
        return match (input.width, input.height) {
            (None, None) => Ok((channels, None)),
            _ => error("input", "an image says its size itself", "leave width and height out"),
        };
    }
    match (input.width, input.height) {
        (Some(width @ 1..=SIDE), Some(height @ 1..=SIDE)) => Ok((channels, Some((width, height)))),
        (Some(_), Some(_)) => {
            error("input", "width and height are not within 1 and 8192", "give the size that clients send")
        }
        _ => error("input", "nothing in such an input says its size", "give width and height"),
    }
}

fn check_resize(resize: &Resize) -> Result<(Sizing, Sampling, u8), DeclarationError> {
    let error = |what: &str, fix: &str| Err(DeclarationError::new("resize", what, fix));
    let sizing = match (resize.mode, resize.size, resize.width, resize.height) {
        (ResizeMode::ShortestSide, Some(size @ 1..=SIDE), None, None) => Sizing::ShortestSide(size),
        (ResizeMode::ShortestSide, ..) => {
            return error(
                "shortest-side takes `size` from 1 to 8192, and nothing else",
                "write e.g. `size: 256`",
            );
        }
        (ResizeMode::Exact, None, Some(width @ 1..=SIDE), Some(height @ 1..=SIDE)) => {
            Sizing::Exact(width, height)
        }
        (ResizeMode::Letterbox, None, Some(width @ 1..=SIDE), Some(height @ 1..=SIDE)) => {
            Sizing::Letterbox(width, height)
        }
        _ => {
            let fix = "write e.g. `width: 640` and `height: 640`";
            return error("this mode takes `width` and `height` from 1 to 8192, and no `size`", fix);
        }
    };
    if resize.pad.is_some() && resize.mode != ResizeMode::Letterbox {
        return error("only a letterbox has margins", "leave `pad` out");
    }
    Ok((sizing, Sampling { filter: resize.filter, antialias: resize.antialias }, resize.pad.unwrap_or(114)))
}

/// The tensor's columns and rows.
fn check_size(
    sizing: Sizing,
    crop: Option<Crop>,
    raw: Option<(u32, u32)>,
) -> Result<(u32, u32), DeclarationError> {
    let error = |what: &str, fix: &str| Err(DeclarationError::new("crop", what, fix));
    if let (Sizing::Letterbox(..), Some(_)) = (sizing, crop) {
        return error(
            "a letterbox shows all of the image",
            "leave the crop out, or resize with `shortest-side`",
        );
    }
    let Some(crop) = crop else {
        return match (sizing, raw) {
            (Sizing::Exact(width, height) | Sizing::Letterbox(width, height), _) => Ok((width, height)),
            (Sizing::ShortestSide(_), _) => error(
                "the longer side is another for each image, so tensors have no one shape",
                "add a crop, e.g. of 224 x 224",
            ),
            (Sizing::None, Some(size)) => Ok(size),
            (Sizing::None, None) => Err(DeclarationError::new(
                "resize",
                "images have any size, so tensors have no one shape",
                "add a resize, or a crop",
            )),
        };
    };
    if !(1..=SIDE).contains(&crop.width) || !(1..=SIDE).contains(&crop.height) {
        return error("width and height are not within 1 and 8192", "give the size of the tensor");
    }
    let end = |start: Option<u32>, part: u32| start.unwrap_or(0).saturating_add(part);
    let (right, bottom) = (end(crop.left, crop.width), end(crop.top, crop.height));
    let room = match (sizing, raw) {
        (Sizing::Exact(width, height), _) | (Sizing::None, Some((width, height))) => Some((width, height)),
        (Sizing::ShortestSide(size), _) => Some((size, size)),
        _ => None,
    };
    if let Some((width, height)) = room
        && (right > width || bottom > height)
    {
        let what =
            format!("{right} x {bottom} is not inside what is left after the resize, {width} x {height}");
        return Err(DeclarationError::new("crop", what, "make the crop smaller, or the resize larger"));
    }
    Ok((crop.width, crop.height))
}

/// Of each channel: what a number is multiplied with, and what is added.
fn factors(
    normalise: Option<&Normalise>,
    channels: usize,
    scale: f64,
) -> Result<Vec<(f64, f64)>, DeclarationError> {
    let Some(normalise) = normalise else { return Ok(vec![(1.0, 0.0); channels]) };
    let scale = normalise.scale.unwrap_or(scale);
    let of = |values: &[f64], channel: usize| if values.len() == 1 { values[0] } else { values[channel] };
    let list = |field, values: &[f64], valid: fn(f64) -> bool, wanted: &str| {
        if values.len() != 1 && values.len() != channels {
            let what = format!("there are {} numbers for {channels} channels", values.len());
            return Err(DeclarationError::new(field, what, "give one for each channel, or one for all"));
        }
        match values.iter().find(|value| !valid(**value)) {
            Some(value) => {
                Err(DeclarationError::new(field, format!("{value} cannot be"), format!("give {wanted}")))
            }
            None => Ok(()),
        }
    };
    list("normalise.mean", &normalise.mean, f64::is_finite, "numbers")?;
    list("normalise.std", &normalise.std, |std| std.is_normal() && std > 0.0, "numbers above 0")?;
    if !scale.is_normal() {
        return Err(DeclarationError::new(
            "normalise.scale",
            format!("{scale} cannot be"),
            "give a number other than 0",
        ));
    }
    Ok((0..channels)
        .map(|channel| {
            let std = of(&normalise.std, channel);
            (scale / std, -of(&normalise.mean, channel) / std)
        })
        .collect())
}
