//! Pipelines against the libraries that models were trained with: Pillow, OpenCV and numpy, on real photographs and on every odd
//! variety. Prints the table of docs/PIPELINES.md: how far apart they are, and how far they may be.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use penstock_kernels::normalise::{f32_of_bf16, f32_of_f16};
use penstock_prepare::form::Dtype;
use penstock_prepare::{Declaration, JPEG_DECODER, Limits, Pipeline, Scratch};
use serde::Deserialize;

/// The most that an element may differ, and the most that all may on average.
type Bound = (f64, f64);

/// A case; its bound with libjpeg-turbo, and without.
type Tolerance = (&'static str, Bound, Bound);

/// In 255ths of a pixel. Where a JPEG is decoded without libjpeg-turbo, another inverse DCT rounds otherwise than Pillow's.
const TOLERANCES: [Tolerance; 26] = [
    ("bilinear: Pillow, same pixels", (1.0, 0.2), (1.0, 0.2)),
    ("bicubic: Pillow, same pixels", (8.0, 0.2), (8.0, 0.2)),
    ("lanczos: Pillow, same pixels", (12.0, 0.2), (12.0, 0.2)),
    ("bilinear: numpy, columns first", (1.0, 0.2), (1.0, 0.2)),
    ("bicubic: numpy, columns first", (1.0, 0.2), (1.0, 0.2)),
    ("lanczos: numpy, columns first", (1.0, 0.2), (1.0, 0.2)),
    ("jpeg-scaling off: Pillow", (1.0, 0.2), (4.0, 0.5)),
    ("jpeg-scaling fine: Pillow's full decode", (20.0, 0.6), (40.0, 1.5)),
    ("jpeg-scaling fast: Pillow's full decode", (50.0, 1.5), (40.0, 1.5)),
    ("imagenet: torchvision", (1.1, 0.2), (1.1, 0.2)),
    ("clip: torchvision, Pillow", (8.0, 0.2), (8.0, 0.2)),
    ("imagenet in f16: numpy", (1.2, 0.2), (1.2, 0.2)),
    ("imagenet in bf16: numpy", (1.6, 0.3), (1.6, 0.3)),
    ("yolo-letterbox: Ultralytics, OpenCV", (1.1, 0.2), (1.1, 0.2)),
    ("gray: Pillow", (1.0, 0.2), (1.0, 0.2)),
    ("WebP, lossy: Pillow", (1.0, 0.2), (1.0, 0.2)),
    ("edge sizes: Pillow", (1.0, 0.2), (1.0, 0.2)),
    ("edge sizes, JPEG: Pillow", (1.0, 0.2), (4.0, 0.5)),
    ("EXIF 1 to 8, PNG: Pillow", (1.0, 0.2), (1.0, 0.2)),
    ("EXIF 1 to 8, JPEG: Pillow", (1.0, 0.2), (4.0, 0.5)),
    ("CMYK JPEG: Pillow", (0.0, 0.0), (4.0, 0.5)),
    ("gray JPEG: Pillow", (0.0, 0.0), (2.0, 0.3)),
    ("4:4:4, 4:2:2, 4:2:0: Pillow", (0.0, 0.0), (6.0, 0.5)),
    ("PNG and WebP without loss: Pillow", (0.0, 0.0), (0.0, 0.0)),
    ("PNG of 16 bits: OpenCV", (0.0, 0.0), (0.0, 0.0)),
    ("NV12, YUV420: OpenCV", (1.0, 0.2), (1.0, 0.2)),
];
#[derive(Deserialize)]
struct Line {
    case: String,
    input: String,
    expected: String,
    declaration: Declaration,
    unit: f64,
}

#[derive(Default)]
struct Difference {
    worst: f64,
    sum: f64,
    elements: usize,
    tensors: usize,
}

#[test]
fn pipelines_give_what_the_usual_libraries_give() {
    let folder = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/libraries/images.py");
    let output = Command::new(python()).arg(script).arg(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut found: BTreeMap<String, Difference> = BTreeMap::new();
    let mut scratch = Scratch::default();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let line: Line = serde_json::from_str(line).unwrap();
        let input = std::fs::read(folder.path().join(&line.input)).unwrap();
        let expected = std::fs::read(folder.path().join(&line.expected)).unwrap();
        let expected = expected.as_chunks().0.iter().map(|le| f64::from(f32::from_le_bytes(*le)));
        let pipeline = Pipeline::new(&line.declaration).unwrap();
        let mut tensor = vec![0; pipeline.bytes()];
        pipeline
            .run(&input, &mut tensor, &mut scratch, &Limits::default(), &|| false)
            .unwrap_or_else(|error| panic!("{} of {:?}: {error}", line.case, line.declaration));
        let tensor = values(pipeline.dtype(), &tensor);
        assert_eq!(tensor.len(), expected.len(), "{}", line.case);
        let difference = found.entry(line.case).or_default();
        difference.tensors += 1;
        for (found, expected) in tensor.into_iter().zip(expected) {
            let off = (found - expected).abs() / line.unit;
            difference.worst = difference.worst.max(off);
            difference.sum += off;
            difference.elements += 1;
        }
    }
    println!("JPEG by {JPEG_DECODER}; in 255ths of a pixel");
    println!("{:<42} {:>7} {:>8} {:>8} {:>8} {:>8}", "", "tensors", "mean", "allowed", "most", "allowed");
    let mut broken = Vec::new();
    for (case, turbo, plain) in &TOLERANCES {
        let (most, mean) = if JPEG_DECODER == "libjpeg-turbo" { *turbo } else { *plain };
        let difference = found.remove(*case).unwrap_or_else(|| panic!("nothing was said of {case}"));
        let average = difference.sum / difference.elements as f64;
        let (tensors, worst) = (difference.tensors, difference.worst);
        println!("{case:<42} {tensors:>7} {average:>8.4} {mean:>8} {worst:>8.3} {most:>8}");
        // A 1000th for the last bit of float32.
        if worst > most + 1e-3 || average > mean + 1e-3 {
            broken.push(*case);
        }
    }
    assert!(found.is_empty(), "no tolerance is stated for {:?}", found.keys());
    assert!(broken.is_empty(), "too far apart: {broken:?}");
}

/// The Python that has the libraries, as `tests/tests/servers/install.py` installs it.
fn python() -> PathBuf {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    let cache = cache.or_else(home).unwrap().join("penstock");
    let venvs = std::fs::read_dir(&cache).into_iter().flatten().map(|entry| entry.unwrap().path());
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("servers-images-") && path.join("installed").exists()
    };
    let found = venvs.filter(is_ours).max();
    let venv = found.unwrap_or_else(|| panic!("no Pillow in {}: `make tools` installs it", cache.display()));
    venv.join("bin/python")
}

fn values(dtype: Dtype, tensor: &[u8]) -> Vec<f64> {
    let halves = || tensor.as_chunks().0.iter().map(|le| u16::from_le_bytes(*le));
    match dtype {
        Dtype::U8 => tensor.iter().map(|byte| f64::from(*byte)).collect(),
        Dtype::F16 => halves().map(|bits| f64::from(f32_of_f16(bits))).collect(),
        Dtype::Bf16 => halves().map(|bits| f64::from(f32_of_bf16(bits))).collect(),
        Dtype::F32 => tensor.as_chunks().0.iter().map(|le| f64::from(f32::from_le_bytes(*le))).collect(),
    }
}
