//! What can be declared, what cannot and what it says then; raw frames and tensors.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use penstock_kernels::normalise::{f16_bits, f32_of_bf16, f32_of_f16};
use penstock_prepare::form::Dtype;
use penstock_prepare::{Declaration, Limits, Pipeline, Preset, Scratch, reference};
use serde_json::json;

fn declared(json: serde_json::Value) -> Declaration {
    serde_json::from_value(json).unwrap()
}

fn pipeline(json: serde_json::Value) -> Pipeline {
    Pipeline::new(&declared(json)).unwrap()
}

fn run(pipeline: &Pipeline, input: &[u8]) -> Vec<u8> {
    let mut tensor = vec![0; pipeline.bytes()];
    pipeline.run(input, &mut tensor, &mut Scratch::default(), &Limits::default(), &|| false).unwrap();
    tensor
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 7u32;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

#[test]
fn the_shape_is_known_from_the_declaration() {
    let table = [
        (json!({"preset": "imagenet"}), [3, 224, 224], 602_112),
        (json!({"preset": "imagenet", "dtype": "f16", "layout": "nhwc"}), [224, 224, 3], 301_056),
        (json!({"preset": "clip", "colour": "bgr", "dtype": "bf16"}), [3, 224, 224], 301_056),
        (json!({"preset": "yolo-letterbox"}), [3, 640, 640], 4_915_200),
        (
            json!({"resize": {"mode": "exact", "width": 32, "height": 16}, "colour": "gray", "dtype": "u8"}),
            [1, 16, 32],
            512,
        ),
        (json!({"crop": {"width": 5, "height": 7, "left": 1, "top": 2}}), [3, 7, 5], 420),
        (json!({"input": {"format": "nv12", "width": 641, "height": 3}, "dtype": "u8"}), [3, 3, 641], 5769),
        (
            json!({"input": {"format": "tensor", "width": 4, "height": 2, "channels": 5, "dtype": "f16"}}),
            [5, 2, 4],
            160,
        ),
    ];
    for (json, shape, bytes) in table {
        let pipeline = pipeline(json.clone());
        assert_eq!((pipeline.shape(), pipeline.bytes()), (shape, bytes), "{json}");
    }
}

#[test]
fn what_makes_no_sense_says_where_and_what_to_write() {
    let table = [
        (json!({}), "`resize`: images have any size, so tensors have no one shape; add a resize, or a crop"),
        (
            json!({"resize": {"mode": "shortest-side", "size": 256}}),
            "`crop`: the longer side is another for each image, so tensors have no one shape; add a crop, e.g. of 224 x 224",
        ),
        (
            json!({"preset": "imagenet", "crop": {"width": 300, "height": 224}}),
            "`crop`: 300 x 224 is not inside what is left after the resize, 256 x 256; make the crop smaller, or the resize larger",
        ),
        (
            json!({"resize": {"mode": "exact", "size": 3}}),
            "`resize`: this mode takes `width` and `height` from 1 to 8192, and no `size`; write e.g. `width: 640` and `height: 640`",
        ),
        (
            json!({"resize": {"mode": "exact", "width": 3, "height": 3, "pad": 1}}),
            "`resize`: only a letterbox has margins; leave `pad` out",
        ),
        (
            json!({"preset": "imagenet", "normalise": {"mean": [1.0, 2.0]}}),
            "`normalise.mean`: there are 2 numbers for 3 channels; give one for each channel, or one for all",
        ),
        (
            json!({"preset": "imagenet", "normalise": {"std": [1.0, 0.0, 1.0]}}),
            "`normalise.std`: 0 cannot be; give numbers above 0",
        ),
        (
            json!({"input": {"format": "rgb"}}),
            "`input`: nothing in such an input says its size; give width and height",
        ),
        (
            json!({"input": {"format": "tensor", "width": 4, "height": 4}, "colour": "bgr"}),
            "`colour`: a tensor has no such thing; leave it out, or declare `input.format: rgb` if the tensor is an image of bytes",
        ),
        (
            json!({"preset": "yolo-letterbox", "crop": {"width": 3, "height": 3}}),
            "`crop`: a letterbox shows all of the image; leave the crop out, or resize with `shortest-side`",
        ),
    ];
    for (json, expected) in table {
        let error = Pipeline::new(&declared(json.clone())).unwrap_err();
        assert_eq!(error.to_string(), expected, "{json}");
    }
    let unknown = serde_json::from_value::<Declaration>(json!({"color": "rgb"})).unwrap_err().to_string();
    assert!(unknown.starts_with("unknown field `color`, expected one of `preset`, `input`"), "{unknown}");
    let unknown = serde_json::from_value::<Declaration>(json!({"preset": "resnet"})).unwrap_err().to_string();
    assert_eq!(unknown, "unknown variant `resnet`, expected one of `imagenet`, `clip`, `yolo-letterbox`");
}

#[test]
fn a_declaration_survives_being_written() {
    for (_, preset) in Preset::ALL {
        let complete = preset.declaration();
        let written = serde_json::to_value(&complete).unwrap();
        assert_eq!(declared(written), complete);
    }
}

#[test]
fn frames_become_what_the_reference_makes_of_them() {
    for format in ["nv12", "yuv420"] {
        for (width, height) in [(1, 1), (2, 2), (7, 5), (64, 48)] {
            for matrix in ["bt601", "bt709"] {
                for range in ["limited", "full"] {
                    let of = pipeline(json!({
                        "input": {"format": format, "width": width, "height": height, "matrix": matrix, "range": range},
                    }));
                    let (columns, rows) = (usize::div_ceil(width, 2), usize::div_ceil(height, 2));
                    let frame = noise(width * height + 2 * columns * rows);
                    let tensor = run(&of, &frame);
                    let (kr, kb) = if matrix == "bt601" { (0.299, 0.114) } else { (0.2126, 0.0722) };
                    let at = |plane: usize, index: usize| f64::from(frame[plane * width * height + index]);
                    for (x, y) in (0..width).flat_map(|x| (0..height).map(move |y| (x, y))) {
                        let chroma = y / 2 * columns + x / 2;
                        let (u, v) = match format {
                            "nv12" => (at(1, 2 * chroma), at(1, 2 * chroma + 1)),
                            _ => (at(1, chroma), at(1, columns * rows + chroma)),
                        };
                        let (luma, u, v) = match range {
                            "full" => (at(0, y * width + x), u - 128.0, v - 128.0),
                            _ => {
                                let luma = (at(0, y * width + x) - 16.0).max(0.0) * 255.0 / 219.0;
                                (luma, (u - 128.0) * 255.0 / 224.0, (v - 128.0) * 255.0 / 224.0)
                            }
                        };
                        let (red, blue) = (luma + 2.0 * (1.0 - kr) * v, luma + 2.0 * (1.0 - kb) * u);
                        // Luma is a weighted sum of the three, which gives green before anything is cut to a byte.
                        let green = (luma - kr * red - kb * blue) / (1.0 - kr - kb);
                        for (channel, expected) in [red, green, blue].into_iter().enumerate() {
                            let element = &tensor[((channel * height + y) * width + x) * 4..][..4];
                            let found = f64::from(f32::from_le_bytes(element.try_into().unwrap()));
                            let expected = expected.clamp(0.0, 255.0);
                            assert!(
                                (found - expected).abs() <= 0.501,
                                "{format} {matrix} {range} {width} x {height}: {found}, not {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn tensors_keep_their_numbers_whatever_way_they_go() {
    let names = [("u8", 1), ("f16", 2), ("bf16", 2), ("f32", 4)];
    for (from, size) in names {
        for (to, _) in names {
            for (order_in, order_out) in
                [("nchw", "nchw"), ("nchw", "nhwc"), ("nhwc", "nchw"), ("nhwc", "nhwc")]
            {
                for normalise in
                    [None, Some(json!({"scale": 0.5, "mean": [1.0, 2.0, 3.0, 4.0], "std": [2.0]}))]
                {
                    let mut json = json!({
                        "input": {"format": "tensor", "width": 5, "height": 3, "channels": 4, "dtype": from, "layout": order_in},
                        "layout": order_out,
                        "dtype": to,
                    });
                    if let Some(normalise) = normalise {
                        json["normalise"] = normalise;
                    }
                    let of = pipeline(json.clone());
                    // Numbers of a size that all four can hold: none of them infinite, and none NaN.
                    let values: Vec<f32> = noise(60).iter().map(|byte| f32::from(*byte)).collect();
                    let input: Vec<u8> = values
                        .iter()
                        .flat_map(|value| match from {
                            "u8" => vec![*value as u8],
                            "f16" => f16_bits(*value).to_le_bytes().to_vec(),
                            "bf16" => ((value.to_bits() >> 16) as u16).to_le_bytes().to_vec(),
                            _ => value.to_le_bytes().to_vec(),
                        })
                        .collect();
                    assert_eq!(input.len(), 60 * size);
                    let tensor = run(&of, &input);
                    let expected = reference::run(&of, &input, &Limits::default()).unwrap();
                    for (at, expected) in expected.iter().enumerate() {
                        let bytes = &tensor[at * of.dtype().size()..][..of.dtype().size()];
                        let (found, unit) = match of.dtype() {
                            Dtype::U8 => (f32::from(bytes[0]), 0.5),
                            Dtype::F16 => (
                                f32_of_f16(u16::from_le_bytes([bytes[0], bytes[1]])),
                                expected.abs() / 2048.0,
                            ),
                            Dtype::Bf16 => (
                                f32_of_bf16(u16::from_le_bytes([bytes[0], bytes[1]])),
                                expected.abs() / 256.0,
                            ),
                            Dtype::F32 => {
                                (f32::from_le_bytes(bytes.try_into().unwrap()), expected.abs() / 1e7)
                            }
                        };
                        assert!(
                            (f64::from(found) - expected).abs() <= unit + 1e-6,
                            "{json} at {at}: {found}, not {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn raw_input_of_another_size_is_refused() {
    let of = pipeline(json!({"input": {"format": "nv12", "width": 4, "height": 4}}));
    let mut tensor = vec![0; of.bytes()];
    let mut scratch = Scratch::default();
    let error = of.run(&[0; 23], &mut tensor, &mut scratch, &Limits::default(), &|| false).unwrap_err();
    assert_eq!(error.to_string(), "the input is declared as NV12 of 4 x 4, which is 24 bytes, but it has 23");
    assert!(error.is_clients());
    let error = of.run(&[0; 24], &mut tensor[1..], &mut scratch, &Limits::default(), &|| false).unwrap_err();
    assert_eq!(error.to_string(), "the tensor has 192 bytes, but there is room for 191");
    assert!(!error.is_clients());
}
