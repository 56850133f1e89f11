//! The CPU's pipelines and the GPU's fused kernel (`penstock_kernels::fused`, which the kernel equals bit for bit) make
//! the same tensors.

#![cfg(test)]

use penstock_kernels::fused::{Area, Filter, Format, Frame, Matrix, Part, Range, Tensor, reference};
use penstock_kernels::normalise::{Channels, Dtype, Layout};
use penstock_prepare::{Limits, Pipeline, Scratch};

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x2545_f491u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// The tensor of a declaration, from its own description of the input.
fn pipeline(declaration: &str, input: &[u8]) -> Vec<u8> {
    let pipeline = Pipeline::new(&serde_json::from_str(declaration).unwrap()).unwrap();
    let mut out = vec![0; pipeline.bytes()];
    pipeline.run(input, &mut out, &mut Scratch::default(), &Limits::default(), &|| false).unwrap();
    out
}

const PLAIN: Tensor = Tensor {
    width: 96,
    height: 64,
    channels: Channels::Rgb,
    layout: Layout::Planar,
    dtype: Dtype::F16,
    mul: [1.0 / 255.0; 3],
    add: [0.0; 3],
};

#[test]
fn frames_of_any_format_have_the_same_bits() {
    for (name, format) in [("rgb", Format::Rgb), ("nv12", Format::Nv12), ("yuv420", Format::I420)] {
        for (matrix, colours) in [("bt601", Matrix::Bt601), ("bt709", Matrix::Bt709)] {
            for (range, levels) in [("limited", Range::Limited), ("full", Range::Full)] {
                let frame = Frame { matrix: colours, range: levels, ..Frame::tight(format, 319, 241) };
                let input = noise(frame.bytes().unwrap());
                let video = if name == "rgb" {
                    String::new()
                } else {
                    format!(r#","matrix":"{matrix}","range":"{range}""#)
                };
                let declaration = format!(
                    r#"{{"input":{{"format":"{name}","width":319,"height":241{video}}},"resize":{{"mode":"exact","width":96,"height":64}},"normalise":{{}},"dtype":"f16"}}"#
                );
                let wanted =
                    reference::exact(&frame, &input, &Part::whole(&frame, (96, 64)), &PLAIN).unwrap();
                assert!(pipeline(&declaration, &input) == wanted, "{declaration}");
            }
        }
    }
}

#[test]
fn filters_crops_and_letterboxes_have_the_same_bits() {
    let frame = Frame::tight(Format::Rgb, 500, 333);
    let input = noise(frame.bytes().unwrap());
    let of = |rest: &str| {
        format!(
            r#"{{"input":{{"format":"rgb","width":500,"height":333}},"normalise":{{}},"dtype":"f16",{rest}}}"#
        )
    };
    for (name, filter) in
        [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic), ("lanczos", Filter::Lanczos)]
    {
        for antialias in [true, false] {
            let resize = format!(
                r#""resize":{{"mode":"exact","width":96,"height":64,"filter":"{name}","antialias":{antialias}}}"#
            );
            let part = Part { filter, antialias, ..Part::whole(&frame, (96, 64)) };
            let wanted = reference::exact(&frame, &input, &part, &PLAIN).unwrap();
            assert!(pipeline(&of(&resize), &input) == wanted, "{resize}");
        }
    }
    // 500 x 333 at 128 on its shorter side is 192 x 128.
    let (across, down) = (500.0 / 192.0, 333.0 / 128.0);
    let area = Area { left: 48.0 * across, top: 32.0 * down, width: 96.0 * across, height: 64.0 * down };
    let part = Part { area, ..Part::whole(&frame, (96, 64)) };
    let cut = of(r#""resize":{"mode":"shortest-side","size":128},"crop":{"width":96,"height":64}"#);
    assert!(pipeline(&cut, &input) == reference::exact(&frame, &input, &part, &PLAIN).unwrap());
    // 500 x 333 in 96 x 96 is 96 x 64, and 16 rows of gray above it.
    let tensor = Tensor { height: 96, ..PLAIN };
    let part = Part { at: (0, 16), pad: [114; 3], ..Part::whole(&frame, (96, 64)) };
    let boxed = of(r#""resize":{"mode":"letterbox","width":96,"height":96}"#);
    assert!(pipeline(&boxed, &input) == reference::exact(&frame, &input, &part, &tensor).unwrap());
}

/// Photographs in every format and orientation, by the presets and by odd pipelines: decoded alone and then made by the
/// kernel's arithmetic, or by the second half here, they are what one run gives.
#[test]
fn pictures_in_two_halves_have_the_same_bits() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images");
    let mut images: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    images.retain(|path| path.is_file());
    images.sort();
    let declarations = [
        r#"{"preset":"imagenet","dtype":"f16"}"#,
        r#"{"preset":"clip","colour":"bgr","layout":"nhwc"}"#,
        r#"{"preset":"yolo-letterbox","dtype":"u8"}"#,
        r#"{"resize":{"mode":"exact","width":31,"height":64,"filter":"lanczos"},"colour":"gray","dtype":"bf16"}"#,
        r#"{"preset":"imagenet","jpeg-scaling":"off","orientation":"ignore"}"#,
        r#"{"crop":{"width":16,"height":12,"left":1,"top":2}}"#,
    ];
    let (mut scratch, limits) = (Scratch::default(), Limits::default());
    let (mut alike, mut turned, mut gray) = (0, 0, 0);
    for path in &images {
        let bytes = std::fs::read(path).unwrap();
        for declaration in declarations {
            let pipeline = Pipeline::new(&serde_json::from_str(declaration).unwrap()).unwrap();
            let mut wanted = vec![0; pipeline.bytes()];
            let run = pipeline.run(&bytes, &mut wanted, &mut scratch, &limits, &|| false);
            let halves = pipeline.decode(&bytes, &mut scratch, &limits, &|| false, |pixels, picture| {
                (pixels.to_vec(), picture)
            });
            if let Err(error) = run {
                assert_eq!(halves.unwrap_err().to_string(), error.to_string(), "{path:?}");
                continue;
            }
            let (pixels, picture) = halves.unwrap();
            let (frame, part) = (picture.frame(), picture.part());
            let kernel = reference::exact(&frame, &pixels, &part, &pipeline.tensor().unwrap()).unwrap();
            assert!(kernel == wanted, "{path:?} by {declaration}, {part:?}");
            let mut here = vec![0; pipeline.bytes()];
            pipeline.make(&pixels, &picture, &mut here, &mut scratch).unwrap();
            assert!(here == wanted, "{path:?} by {declaration}");
            alike += 1;
            turned += u32::from(part.turn != Default::default());
            gray += u32::from(frame.format == Format::Gray);
        }
    }
    assert!(alike > 60 && turned > 3 && gray > 3, "{alike} compared, {turned} turned, {gray} gray");
}

/// With these `fast_image_resize` 6.1.0 reads outside of its memory: 39 x 32 is enlarged seven times, and the left edge
/// of the crop lies exactly on a pixel.
#[test]
fn a_small_image_for_clip_is_enlarged_within_memory() {
    use penstock_kernels::fused::Axis;
    let mut found = 0;
    for width in 33..120 {
        let input = noise(width as usize * 32 * 3);
        let frame = Frame::tight(Format::Rgb, width, 32);
        let long = 224 * width / 32;
        let across = f64::from(width) / f64::from(long);
        let left = (f64::from(long - 224) / 2.0).round_ties_even() * across;
        let area = Area { left, top: 0.0, width: 224.0 * across, height: 32.0 };
        found += u32::from(Axis::leaves_the_library(width, left, area.width, 224, Filter::Bicubic, true));
        let part = Part { area, filter: Filter::Bicubic, ..Part::whole(&frame, (224, 224)) };
        let tensor = Tensor { width: 224, height: 224, ..PLAIN };
        let declaration = format!(
            r#"{{"input":{{"format":"rgb","width":{width},"height":32}},"resize":{{"mode":"shortest-side","size":224,"filter":"bicubic"}},"crop":{{"width":224,"height":224}},"normalise":{{}},"dtype":"f16"}}"#
        );
        assert!(pipeline(&declaration, &input) == reference::exact(&frame, &input, &part, &tensor).unwrap());
    }
    assert!(found > 10, "{found}");
}
