//! Images, and what is made of them by pipelines that are made up too. Promised: what cannot be read is told as the client's
//! fault, nothing but the declaration and the bytes decides what the tensor is, and memory is bounded by limits and not by what a
//! head claims. Should a decoder panic, the sidecar catches that; libFuzzer does not, so that it is found here.

use penstock_prepare::form::{
    Colour, Crop, Dtype, Filter, Input, InputFormat, JpegScaling, Layout, Matrix, Normalise, OrientationRule,
    Range, Resize, ResizeMode,
};
use penstock_prepare::{Declaration, Pipeline, PrepareError, Preset, Scratch, fuzz};
use stats_alloc::Region;

use crate::{ALLOCATOR, sentence};

/// What decoding one input at the fuzzer's limits may allocate, all that is freed again included: 16 MiB of pixels and planes for
/// each of two pipelines, the buffers of the resize in between, and lists that double while they grow.
const MOST: usize = 96 << 20;
/// The largest tensor that a made-up declaration may have: what is larger is only slower.
const LARGEST_TENSOR: usize = 1 << 20;

/// The head alone.
pub fn image_head(data: &[u8]) {
    fuzz::head(data);
}

/// JPEG.
pub fn image_jpeg(data: &[u8]) {
    let _ = decoded(|| fuzz::jpeg(data));
}

/// PNG.
pub fn image_png(data: &[u8]) {
    let _ = decoded(|| fuzz::png(data));
}

/// WebP.
pub fn image_webp(data: &[u8]) {
    let _ = decoded(|| fuzz::webp(data));
}

/// A whole pipeline: [`WORDS`] bytes make up its declaration, the others are the input.
pub fn image_pipeline(data: &[u8]) {
    let Some((words, input)) = data.split_first_chunk() else { return };
    let declaration = declaration(words);
    fuzz::declaration(&declaration);
    let pipeline = match Pipeline::new(&declaration) {
        Ok(pipeline) if pipeline.bytes() <= LARGEST_TENSOR => pipeline,
        Ok(_) => return,
        Err(error) => return sentence(&error),
    };
    let [one, two, three] = pipeline.shape();
    assert_eq!(one * two * three * pipeline.dtype().size(), pipeline.bytes(), "{declaration:?}");
    let mut first = vec![0; pipeline.bytes()];
    // What another image has left behind must not be seen.
    let mut second = vec![0xa5; pipeline.bytes()];
    let mut scratch = Scratch::default();
    let made = decoded(|| pipeline.run(input, &mut first, &mut scratch, &fuzz::LIMITS, &|| false));
    let again = pipeline.run(input, &mut second, &mut scratch, &fuzz::LIMITS, &|| false);
    assert_eq!(made.is_ok(), again.is_ok(), "{declaration:?}");
    if made.is_ok() {
        assert!(first == second, "not the same tensor twice: {declaration:?}");
    }
}

/// Decodes, looks at what that took, and at whose fault an error is.
fn decoded(decode: impl FnOnce() -> Result<(), PrepareError>) -> Result<(), PrepareError> {
    let region = Region::new(ALLOCATOR);
    let made = decode();
    let taken = region.change().bytes_allocated;
    assert!(taken <= MOST, "{taken} bytes were allocated");
    if let Err(error) = &made {
        sentence(error);
        assert!(error.is_clients(), "{error}");
    }
    made
}

/// How many bytes make up a declaration.
pub const WORDS: usize = 16;

/// A declaration that makes sense more often than not: sizes are mostly small, and most fields are left out half of the time.
fn declaration(words: &[u8; WORDS]) -> Declaration {
    let [
        preset,
        format,
        width,
        height,
        scaling,
        mode,
        size,
        filter,
        crop,
        at,
        colour,
        scale,
        mean,
        std,
        layout,
        flags,
    ] = *words;
    let flag = |bit: u8| flags >> bit & 1 == 1;
    // Three bits of size, five of detail: 1 to 32, and up to 4,096.
    let side = |word: u8| (u32::from(word & 31) + 1) << (word >> 5);
    let one_of = |word: u8| Some(u32::from(word)).filter(|word| *word < 224).map(|word| word % 8);
    let raw = match format % 16 {
        1 => Some(InputFormat::Rgb),
        2 => Some(InputFormat::Nv12),
        3 => Some(InputFormat::Yuv420),
        4 => Some(InputFormat::Tensor),
        5 => Some(InputFormat::Image),
        _ => None,
    };
    let tensor = raw == Some(InputFormat::Tensor);
    let video = matches!(raw, Some(InputFormat::Nv12 | InputFormat::Yuv420));
    let sized = raw.is_some_and(|raw| raw != InputFormat::Image) || flag(7);
    let input = raw.map(|format| Input {
        format,
        width: sized.then(|| side(width)),
        height: sized.then(|| side(height)),
        channels: (tensor && flag(6)).then(|| u32::from(at % 5)),
        dtype: tensor.then(|| dtype(at)),
        layout: (tensor && flag(5)).then_some(Layout::Nchw),
        matrix: (video && flag(6)).then_some(Matrix::Bt709),
        range: (video && flag(5)).then_some(Range::Full),
    });
    let resize = (!tensor).then(|| mode % 4).filter(|mode| *mode < 3).map(|mode| Resize {
        mode: [ResizeMode::ShortestSide, ResizeMode::Exact, ResizeMode::Letterbox][usize::from(mode)],
        size: (mode == 0).then(|| side(size)),
        width: (mode > 0).then(|| side(width)),
        height: (mode > 0).then(|| side(height)),
        filter: [Filter::Bilinear, Filter::Bicubic, Filter::Lanczos][usize::from(filter % 3)],
        antialias: !flag(4),
        pad: (mode == 2 && flag(3)).then_some(filter),
    });
    let crop = (!tensor && crop < 192).then(|| Crop {
        width: side(crop),
        height: side(crop.rotate_left(4)),
        left: flag(2).then(|| side(at)),
        top: flag(1).then(|| side(at.rotate_left(4))),
    });
    let number = |word: u8| (f64::from(word) - 100.0) / 16.0;
    Declaration {
        preset: match preset % 16 {
            1 => Some(Preset::Imagenet),
            2 => Some(Preset::Clip),
            _ => None,
        },
        input,
        orientation: flag(0).then_some(OrientationRule::Ignore),
        jpeg_scaling: one_of(scaling).and_then(|word| match word {
            0 => Some(JpegScaling::Off),
            1 => Some(JpegScaling::Fine),
            2 => Some(JpegScaling::Fast),
            _ => None,
        }),
        resize,
        crop,
        colour: one_of(colour).filter(|_| !tensor).and_then(|word| match word {
            0 => Some(Colour::Bgr),
            1 => Some(Colour::Gray),
            2 => Some(Colour::Rgb),
            _ => None,
        }),
        normalise: (scale < 128).then(|| Normalise {
            scale: (scale < 64).then(|| number(scale)),
            mean: vec![number(mean); if flag(3) { 3 } else { 1 }],
            std: vec![number(std)],
        }),
        layout: one_of(layout).map(|word| if word < 4 { Layout::Nhwc } else { Layout::Nchw }),
        dtype: one_of(layout.rotate_left(4)).map(|word| dtype(word as u8)),
    }
}

fn dtype(word: u8) -> Dtype {
    [Dtype::U8, Dtype::F16, Dtype::Bf16, Dtype::F32][usize::from(word % 4)]
}
