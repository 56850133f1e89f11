//! Our own part of each case.

use std::hint::black_box;
use std::path::Path;

use anyhow::{Context, Result, bail};
use penstock_kernels::normalise::{Channels, Dtype, Layout, Normaliser, Pixels, Place, Way, f32_of_f16};
use penstock_prepare::{Declaration, Limits, Pipeline, Scratch};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

/// Of the image, as `peers.py` makes it.
const WIDTH: usize = 1920;
const HEIGHT: usize = 1080;
/// More than any cache of the machines that this runs on.
const COLD: usize = 512 << 20;
const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

/// CPU time of this process.
pub(crate) fn cpu_ms() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// What our subjects need.
pub(crate) struct Ours {
    jpeg: Vec<u8>,
    rgb: Vec<u8>,
    scratch: Scratch,
    tensor: Vec<u8>,
    normaliser: Normaliser,
    turn: usize,
}

impl Ours {
    /// With the images that the peers wrote into `dir`.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            std::fs::read(dir.join(name))
                .with_context(|| format!("{name}: the images are made by Pillow, which is not there"))
        };
        let mul = std::array::from_fn(|channel| (1.0 / 255.0 / STD[channel]) as f32);
        let add = std::array::from_fn(|channel| (-MEAN[channel] / STD[channel]) as f32);
        Ok(Self {
            jpeg: read("1080p.jpg")?,
            rgb: read("1080p.rgb")?,
            scratch: Scratch::default(),
            tensor: Vec::new(),
            normaliser: Normaliser::new(Channels::Rgb, Layout::Planar, Dtype::F16, mul, add),
            turn: 0,
        })
    }

    pub(crate) fn way(&self) -> Way {
        self.normaliser.way()
    }

    /// CPU milliseconds for an image.
    pub(crate) fn run(&mut self, case: &str, subject: &str, count: usize) -> Result<f64> {
        if case != "normalise" {
            let pipeline = pipeline(case, subject)?;
            let input = if case == "resize" { &self.rgb } else { &self.jpeg };
            self.tensor.resize(pipeline.bytes(), 0);
            let limits = Limits::default();
            let began = cpu_ms();
            for _ in 0..count {
                pipeline.run(black_box(input), &mut self.tensor, &mut self.scratch, &limits, &|| false)?;
                black_box(&self.tensor);
            }
            return Ok((cpu_ms() - began) / count as f64);
        }
        let (width, height) = if subject.contains("224") { (224, 224) } else { (WIDTH, HEIGHT) };
        let size = self.normaliser.bytes(width, height);
        // Slots that were written long ago are in no cache; a slot that is written again and again is in the nearest.
        let slots = if subject.ends_with("cold") { COLD.div_ceil(size) } else { 1 };
        if self.tensor.len() != slots * size {
            self.tensor = vec![1; slots * size];
        }
        let bytes = &self.rgb[..width * height * 3];
        let pixels = Pixels { bytes, stride: width * 3, width, height, channels: 3 };
        let place = Place::all(width, height);
        let began = cpu_ms();
        for turn in 0..count {
            self.turn = (self.turn + 1) % slots;
            let slot = &mut self.tensor[self.turn * size..][..size];
            if subject.starts_with("write-once") {
                slot.fill(black_box(turn as u8));
            } else {
                self.normaliser.run(black_box(&pixels), &place, slot)?;
            }
            black_box(&slot);
        }
        Ok((cpu_ms() - began) / count as f64)
    }

    /// How far our tensor is from another, in 255ths of a pixel, on average.
    pub(crate) fn difference(&mut self, case: &str, subject: &str, other: &[u8]) -> Result<f64> {
        self.run(case, subject, 1)?;
        if other.len() != self.tensor.len() {
            bail!("ours has {} bytes, the other {}", self.tensor.len(), other.len());
        }
        if case == "resize" {
            let off = self.tensor.iter().zip(other).map(|(a, b)| f64::from(a.abs_diff(*b)));
            return Ok(off.sum::<f64>() / other.len() as f64);
        }
        let halves = |bytes: &[u8]| -> Vec<f64> {
            bytes.as_chunks().0.iter().map(|le| f64::from(f32_of_f16(u16::from_le_bytes(*le)))).collect()
        };
        let (ours, other) = (halves(&self.tensor), halves(other));
        let plane = ours.len() / 3;
        let off =
            ours.iter().zip(&other).enumerate().map(|(at, (a, b))| (a - b).abs() * 255.0 * STD[at / plane]);
        Ok(off.sum::<f64>() / ours.len() as f64)
    }
}

fn pipeline(case: &str, subject: &str) -> Result<Pipeline> {
    let scaling = match subject {
        "penstock-fast" => "fast",
        "penstock-off" => "off",
        // What nobody has to ask for.
        _ => "fine",
    };
    let declaration = match case {
        "resize" => json!({
            "input": {"format": "rgb", "width": WIDTH, "height": HEIGHT},
            "resize": {"mode": "exact", "width": 224, "height": 224},
            "layout": "nhwc",
            "dtype": "u8",
        }),
        _ => json!({"preset": "imagenet", "dtype": "f16", "jpeg-scaling": scaling}),
    };
    let declaration: Declaration = serde_json::from_value(declaration)?;
    Ok(Pipeline::new(&declaration)?)
}
