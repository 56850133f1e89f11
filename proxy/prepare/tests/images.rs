//! Every variety of image that the decoders know, through whole pipelines, held against the reference in float64; and what is no
//! image, through the same.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;

use penstock_prepare::form::{
    Colour, Crop, Dtype, Filter, JpegScaling, Layout, Normalise, Resize, ResizeMode,
};
use penstock_prepare::{Declaration, Limits, Pipeline, PrepareError, Preset, Scratch, head, reference};
use proptest::prelude::*;

/// How far two passes of fixed-point arithmetic and luma, each rounded to a byte, may be from float64, in 255ths.
/// Negative lobes make more of the first rounding.
fn fixed_point(filter: Filter, image: &str) -> f64 {
    // What is stored on its side is resampled so, and turned then, while the reference turns first: the passes are exchanged, and
    // where a filter with negative lobes leaves the range of a byte they cut at different moments.
    let exchanged = ["exif-5", "exif-6", "exif-7", "exif-8"].iter().any(|name| image.starts_with(name));
    match filter {
        Filter::Bilinear => 1.5,
        _ if exchanged => 16.0,
        Filter::Bicubic | Filter::Lanczos => 2.2,
    }
}

fn file(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn names() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images");
    let entries =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|name| !name.ends_with(".py")).collect();
    names.sort();
    assert!(names.len() > 30, "only {names:?}");
    names
}

fn exact(width: u32, height: u32, filter: Filter) -> Declaration {
    let resize = Resize {
        mode: ResizeMode::Exact,
        size: None,
        width: Some(width),
        height: Some(height),
        filter,
        antialias: true,
        pad: None,
    };
    Declaration { resize: Some(resize), jpeg_scaling: Some(JpegScaling::Off), ..Declaration::default() }
}

fn run(declaration: &Declaration, input: &[u8]) -> Result<Vec<f64>, PrepareError> {
    let pipeline = Pipeline::new(declaration).unwrap();
    let mut tensor = vec![0; pipeline.bytes()];
    pipeline.run(input, &mut tensor, &mut Scratch::default(), &Limits::default(), &|| false)?;
    Ok(tensor.as_chunks().0.iter().map(|le| f64::from(f32::from_le_bytes(*le))).collect())
}

fn furthest(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f64::max)
}

#[test]
fn the_first_bytes_say_the_size_that_the_whole_head_says() {
    for name in names() {
        let bytes = file(&name);
        let head = head::read(&bytes).ok().map(|head| (head.width, head.height));
        let size = head::size(&bytes[..bytes.len().min(64 << 10)]);
        assert!(head.is_none() || head == size, "{name}: {head:?}, and {size:?} by its first bytes");
        for cut in 0..bytes.len().min(2_000) {
            let _ = head::size(&bytes[..cut]);
        }
    }
}

#[test]
fn every_image_becomes_what_the_reference_makes_of_it() {
    for filter in [Filter::Bilinear, Filter::Bicubic, Filter::Lanczos] {
        let (mut worst, mut sum, mut count) = (0.0f64, 0.0, 0);
        for name in names().iter().filter(|name| *name != "animated.webp") {
            for (width, height) in [(40, 31), (97, 61), (150, 20), (1, 1)] {
                for colour in [Colour::Rgb, Colour::Bgr, Colour::Gray] {
                    let declaration = Declaration { colour: Some(colour), ..exact(width, height, filter) };
                    let found = run(&declaration, &file(name)).unwrap();
                    let pipeline = Pipeline::new(&declaration).unwrap();
                    let expected = reference::run(&pipeline, &file(name), &Limits::default()).unwrap();
                    let off = furthest(&found, &expected);
                    let limit = fixed_point(filter, name);
                    assert!(
                        off <= limit,
                        "{name} to {width} x {height}, {filter:?}, {colour:?}: off by {off}"
                    );
                    worst = worst.max(off);
                    sum += found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).sum::<f64>();
                    count += found.len();
                }
            }
        }
        let mean = sum / count as f64;
        println!("{filter:?} against float64: {mean:.3} of 255 on average, {worst:.3} at most");
        assert!(mean < 0.5, "{filter:?} is off by {mean} on average");
    }
}

#[test]
fn presets_and_letterboxes_agree_with_the_reference() {
    for (name, preset) in Preset::ALL {
        let declaration = Declaration {
            preset: Some(preset),
            jpeg_scaling: Some(JpegScaling::Off),
            ..Declaration::default()
        };
        let pipeline = Pipeline::new(&declaration).unwrap();
        for image in ["large.jpg", "exif-6.png", "one-row.jpg"] {
            // The longer side of one row would have 24,832 pixels; its crop is another matter.
            let found = run(&declaration, &file(image)).unwrap();
            let expected = reference::run(&pipeline, &file(image), &Limits::default()).unwrap();
            // In units of the result, where a 255th is worth at most 1 / 255 / 0.224.
            let off = furthest(&found, &expected) * 255.0 * 0.224;
            assert!(off <= fixed_point(Filter::Bicubic, image), "{name} of {image} is off by {off}");
        }
    }
}

#[test]
fn a_turned_image_is_upright() {
    let declaration = exact(97, 61, Filter::Bilinear);
    let upright = run(&declaration, &file("exif-1.jpg")).unwrap();
    for number in 2..=8 {
        let found = run(&declaration, &file(&format!("exif-{number}.jpg"))).unwrap();
        let mean = found.iter().zip(&upright).map(|(a, b)| (a - b).abs()).sum::<f64>() / found.len() as f64;
        // Each was encoded by itself, so they differ as two JPEGs of one picture do.
        assert!(mean < 6.0, "EXIF {number} differs by {mean} on average");
    }
    let stored = Declaration {
        orientation: Some(penstock_prepare::form::OrientationRule::Ignore),
        ..exact(97, 61, Filter::Bilinear)
    };
    let found = run(&stored, &file("exif-3.jpg")).unwrap();
    assert!(furthest(&found, &upright) > 100.0, "it was turned though it should not have been");
    for name in ["exif-6.png", "exif-6.webp"] {
        assert_eq!(
            run(&declaration, &file(name)).unwrap(),
            run(&declaration, &file("rgb.png")).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn lossless_formats_agree_to_the_bit() {
    let declaration = exact(97, 61, Filter::Bilinear);
    let rgb = run(&declaration, &file("rgb.png")).unwrap();
    for name in ["rgba.png", "interlaced-16.png", "lossless.webp"] {
        assert_eq!(run(&declaration, &file(name)).unwrap(), rgb, "{name}");
    }
    let gray = run(&declaration, &file("gray.png")).unwrap();
    for name in ["gray-alpha.png", "gray-16.png"] {
        assert_eq!(run(&declaration, &file(name)).unwrap(), gray, "{name}");
    }
    let luma = Declaration { colour: Some(Colour::Gray), ..declaration };
    assert_eq!(run(&luma, &file("gray.png")).unwrap(), gray[..97 * 61]);
}

#[test]
fn layouts_and_datatypes_hold_the_same_numbers() {
    let base = Declaration {
        resize: exact(33, 20, Filter::Bicubic).resize,
        normalise: Some(Normalise { scale: None, mean: vec![0.5, 0.4, 0.3], std: vec![0.2, 0.3, 0.4] }),
        ..Declaration::default()
    };
    let planar = run(&base, &file("large.jpg")).unwrap();
    let interleaved =
        run(&Declaration { layout: Some(Layout::Nhwc), ..base.clone() }, &file("large.jpg")).unwrap();
    for (at, value) in planar.iter().enumerate() {
        let (channel, pixel) = (at / 660, at % 660);
        assert_eq!(interleaved[pixel * 3 + channel], *value);
    }
    let halves = Pipeline::new(&Declaration { dtype: Some(Dtype::F16), ..base }).unwrap();
    assert_eq!((halves.shape(), halves.bytes(), halves.dtype().protocol_name()), ([3, 20, 33], 3960, "FP16"));
    let mut tensor = vec![0; halves.bytes()];
    halves
        .run(&file("large.jpg"), &mut tensor, &mut Scratch::default(), &Limits::default(), &|| false)
        .unwrap();
    for (le, value) in tensor.as_chunks().0.iter().zip(planar) {
        let half = penstock_kernels::normalise::f16_bits(value as f32);
        assert_eq!(u16::from_le_bytes(*le), half);
    }
}

#[test]
fn scaled_decoding_is_near_the_full_one() {
    let of = |scaling| {
        let colour = Some(Colour::Gray);
        let declaration =
            Declaration { jpeg_scaling: Some(scaling), colour, ..exact(75, 50, Filter::Bilinear) };
        run(&declaration, &file("large.jpg")).unwrap()
    };
    let full = of(JpegScaling::Off);
    for (scaling, mean) in [(JpegScaling::Fine, 1.5), (JpegScaling::Fast, 4.0)] {
        let found = of(scaling);
        let off = found.iter().zip(&full).map(|(a, b)| (a - b).abs()).sum::<f64>() / full.len() as f64;
        assert!(off > 0.0 && off < mean, "{scaling:?}: {off} on average");
    }
}

#[test]
fn steady_state_takes_no_memory_of_an_images_size() {
    let pipeline =
        Pipeline::new(&Declaration { preset: Some(Preset::Imagenet), ..Declaration::default() }).unwrap();
    let (mut tensor, mut scratch) = (vec![0; pipeline.bytes()], Scratch::default());
    for (name, bytes) in
        [("large.jpg", if cfg!(feature = "turbojpeg") { 64 << 10 } else { 8 << 20 }), ("rgb.png", 1 << 20)]
    {
        let input = file(name);
        let mut once =
            || pipeline.run(&input, &mut tensor, &mut scratch, &Limits::default(), &|| false).unwrap();
        once();
        let taken = allocation_counter::measure(once);
        println!("{name}: {} bytes in {} pieces", taken.bytes_total, taken.count_total);
        assert!(
            taken.bytes_total < bytes,
            "{name} took {} bytes in {} pieces",
            taken.bytes_total,
            taken.count_total
        );
    }
    let kept = scratch.bytes();
    assert!(kept > 0);
    scratch.shrink(kept);
    assert_eq!(scratch.bytes(), kept);
    scratch.shrink(kept - 1);
    assert_eq!(scratch.bytes(), 0);
}

/// What libjpeg-turbo takes is not seen here.
#[test]
fn decoding_takes_no_more_than_was_estimated() {
    let corner = Declaration {
        crop: Some(Crop { width: 1, height: 1, left: Some(0), top: Some(0) }),
        ..Declaration::default()
    };
    let pipeline = Pipeline::new(&corner).unwrap();
    let mut tensor = vec![0; pipeline.bytes()];
    let large = ["large.jpg", "large-progressive.jpg", "large.png", "large.webp", "large-lossless.webp"];
    for name in large {
        let input = file(name);
        let none = Limits { memory: 0, ..Limits::default() };
        let refused = pipeline.run(&input, &mut tensor, &mut Scratch::default(), &none, &|| false);
        let Err(PrepareError::Limit { found: estimate, .. }) = refused else { panic!("{name}: {refused:?}") };
        let limits = Limits { memory: estimate, ..none };
        let taken = allocation_counter::measure(|| {
            pipeline.run(&input, &mut tensor, &mut Scratch::default(), &limits, &|| false).unwrap();
        });
        println!("{name}: {} bytes at most, {estimate} estimated", taken.bytes_max);
        // Tables and windows do not grow with the image.
        assert!(
            taken.bytes_max < estimate + (512 << 10),
            "{name}: {} bytes, not {estimate}",
            taken.bytes_max
        );
    }
}

#[test]
fn an_animation_is_refused_in_words() {
    let error = run(&exact(8, 8, Filter::Bilinear), &file("animated.webp")).unwrap_err();
    assert_eq!(error.to_string(), "WebP with an animation is not supported");
}

#[test]
fn limits_hold_before_anything_is_decoded() {
    let pipeline = Pipeline::new(&exact(8, 8, Filter::Bilinear)).unwrap();
    let mut tensor = vec![0; pipeline.bytes()];
    let mut refused = |input: &[u8], limits: Limits| {
        let taken = std::cell::RefCell::new(None);
        let memory = allocation_counter::measure(|| {
            *taken.borrow_mut() =
                Some(pipeline.run(input, &mut tensor, &mut Scratch::default(), &limits, &|| false));
        });
        assert!(memory.bytes_max < 4096, "{} bytes were taken", memory.bytes_max);
        taken.into_inner().unwrap().unwrap_err().to_string()
    };
    let limits = Limits::default();
    // Headers that promise the largest of all images, with next to nothing behind them.
    let mut bomb = file("rgb.png");
    bomb[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    let error = refused(&bomb, limits);
    assert_eq!(
        error,
        "PNG of 2147483647 x 2147483647 pixels refused before decoding: its longer side has 2147483647, and the limit is 16384"
    );
    // Sides so large that the bytes of all pixels are more than 64 bits can count.
    bomb[16..24].copy_from_slice(&[0xff; 8]);
    assert!(refused(&bomb, limits).contains("refused before decoding"), "{}", refused(&bomb, limits));
    let mut bomb = file("baseline-420.jpg");
    let frame = bomb.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
    bomb[frame + 5..frame + 9].copy_from_slice(&[0x3f; 4]);
    assert!(refused(&bomb, limits).contains("its pixels are 262148481"), "{}", refused(&bomb, limits));
    let mut bomb = file("lossless.webp");
    bomb[21..25].copy_from_slice(&[0xff, 0xff, 0xff, 0x0f]);
    assert!(refused(&bomb, limits).contains("its pixels are 268435456"), "{}", refused(&bomb, limits));
    // A canvas of 97 x 61 around a frame for which a decoder would take 400 MB.
    let mut bomb = file("alpha.webp");
    let frame = bomb.windows(3).position(|code| code == [0x9d, 0x01, 0x2a]).unwrap();
    bomb[frame + 3..frame + 7].copy_from_slice(&[0xff; 4]);
    assert!(refused(&bomb, limits).contains("another size than its canvas"), "{}", refused(&bomb, limits));
    let image = file("progressive.jpg");
    let few = Limits { scans: 3, ..limits };
    assert!(
        refused(&image, few).contains("its scans are 10, and the limit is 3"),
        "{}",
        refused(&image, few)
    );
    let tight = Limits { memory: 10_000, ..limits };
    assert!(refused(&image, tight).contains("bytes that decoding takes are"), "{}", refused(&image, tight));
    let short = Limits { bytes: 100, ..limits };
    assert!(refused(&image, short).ends_with("and the limit is 100"), "{}", refused(&image, short));
}

#[test]
fn whoever_cancels_is_obeyed_at_every_question() {
    for name in ["large.jpg", "rgb.png", "lossy.webp"] {
        let input = file(name);
        let pipeline = Pipeline::new(&exact(8, 8, Filter::Bilinear)).unwrap();
        let mut tensor = vec![0; pipeline.bytes()];
        let asked = std::cell::Cell::new(0);
        let mut run = |limit: usize| {
            asked.set(0);
            let cancelled = || {
                asked.set(asked.get() + 1);
                asked.get() > limit
            };
            pipeline.run(&input, &mut tensor, &mut Scratch::default(), &Limits::default(), &cancelled)
        };
        run(usize::MAX).unwrap();
        let questions = asked.get();
        let again = |limit: usize| {
            let mut tensor = vec![0; pipeline.bytes()];
            let asked = std::cell::Cell::new(0);
            let cancelled = || {
                asked.set(asked.get() + 1);
                asked.get() > limit
            };
            pipeline.run(&input, &mut tensor, &mut Scratch::default(), &Limits::default(), &cancelled)
        };
        assert!(questions >= 3, "{name} asked {questions} times");
        for limit in 0..questions {
            assert_eq!(again(limit), Err(PrepareError::Cancelled), "{name} at question {limit}");
        }
    }
}

#[test]
fn what_is_cut_is_refused_wherever_it_is_cut() {
    for name in names().iter().filter(|name| *name != "animated.webp") {
        let whole = file(name);
        let declaration = exact(8, 8, Filter::Bilinear);
        for end in (0..whole.len()).step_by(whole.len().div_ceil(60)) {
            let error = run(&declaration, &whole[..end]);
            // All pixels of a PNG may be there though its last chunk is not.
            if error.is_ok() && name.ends_with("png") && end + 24 > whole.len() {
                continue;
            }
            let error = error.expect_err(&format!("{name} cut at {end} of {} was accepted", whole.len()));
            assert!(error.is_clients(), "{name} cut at {end}: {error}");
        }
    }
}

#[test]
fn what_is_no_image_is_told_by_how_it_begins() {
    let of = |input: &[u8]| run(&exact(8, 8, Filter::Bilinear), input).unwrap_err().to_string();
    assert_eq!(
        of(b"GIF89a\x01\x02\x03"),
        "this is no image that can be read: it begins with 47 49 46 38 39 61 01 02, and JPEG, PNG and WebP do not"
    );
    assert!(of(b"").contains("it begins with nothing"));
    let mut arithmetic = file("baseline-420.jpg");
    let frame = arithmetic.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
    arithmetic[frame + 1] = 0xc9;
    assert_eq!(of(&arithmetic), "JPEG with arithmetic coding is not supported");
    let small = Declaration {
        crop: Some(Crop { width: 500, height: 5, left: None, top: None }),
        ..Declaration::default()
    };
    let error = run(&small, &file("rgb.png")).unwrap_err();
    assert!(matches!(error, PrepareError::TooSmall { width: 97, height: 61, .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("PENSTOCK_LONG").is_some() { 5000 } else { 300 }))]

    /// Bytes changed anywhere: an error in words or a tensor, never a panic, and the buffers serve the next image all the same.
    #[test]
    fn hostile_files_are_survived(index in 0usize..1000, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), cut in any::<prop::sample::Index>()) {
        let names = names();
        let name = &names[index % names.len()];
        let mut input = file(name);
        for (at, byte) in changes {
            let at = at.index(input.len());
            input[at] = byte;
        }
        if index % 4 == 0 {
            input.truncate(cut.index(input.len()));
        }
        penstock_prepare::fuzz::head(&input);
        for (_, result) in [("jpeg", penstock_prepare::fuzz::jpeg(&input)), ("png", penstock_prepare::fuzz::png(&input)), ("webp", penstock_prepare::fuzz::webp(&input))] {
            if let Err(error) = result {
                prop_assert!(!error.to_string().contains("panicked"), "{}: {}", name, error);
                prop_assert!(error.is_clients(), "{}: {}", name, error);
            }
        }
        if let Ok(head) = head::read(&input) {
            prop_assert!(head.width > 0 && head.height > 0);
        }
    }
}
