//! What the fuzzer begins with: real encodings, one file each, in `seeds/`. They are written by the test below with
//! `UPDATE_SEEDS=1`, which otherwise compares them with what the code writes today, and runs every target over them.

mod entry;

use std::collections::BTreeMap;

use bytes::BytesMut;
use penstock_inference::oip::batch::join;
use penstock_inference::oip::grpc::{self, Contents};
use penstock_inference::oip::{Datatype, InferRequest, Parameter, RequestedOutput, Tensor, rest};
use penstock_inference::orca::LoadReport;
use prost::Message as _;

use crate::prepare::WORDS;

/// Seeds by target and name.
pub type Seeds = BTreeMap<(&'static str, String), Vec<u8>>;

/// A target by its name.
pub const TARGETS: [(&str, fn(&[u8])); 20] = [
    ("oip_rest", crate::oip_rest),
    ("oip_grpc", crate::oip_grpc),
    ("oip_prefix", crate::oip_prefix),
    ("openai", crate::openai),
    ("orca", crate::orca),
    ("metrics_page", crate::metrics_page),
    ("coalesce_json", crate::coalesce_json),
    ("image_head", crate::image_head),
    ("image_jpeg", crate::image_jpeg),
    ("image_png", crate::image_png),
    ("image_webp", crate::image_webp),
    ("image_pipeline", crate::image_pipeline),
    ("first_bytes", crate::first_bytes),
    ("http1_entry", crate::http1_entry),
    ("http2_entry", crate::http2_entry),
    ("xds_resources", crate::xds_resources),
    ("annotations", crate::annotations),
    ("yaml", crate::yaml),
    ("path", crate::path),
    ("access", crate::access),
];

/// All of them.
pub fn all() -> Seeds {
    let mut seeds = Seeds::new();
    let mut put = |target, name: &str, begin: &[u8], bytes: &[u8]| {
        seeds.insert((target, name.to_owned()), [begin, bytes].concat());
    };
    for (name, request) in requests() {
        for (form, binary) in [("json", false), ("binary", true)] {
            let Ok(body) = rest::encode_request(&request, binary) else { continue };
            let name = format!("{name}-{form}");
            let length = body.header_length;
            let bytes = body.into_bytes();
            match length.map(|length| (length as u16).to_le_bytes()) {
                Some([low, high]) => put("oip_rest", &name, &[1, low, high], &bytes),
                None => put("oip_rest", &name, &[0], &bytes),
            }
            put("oip_prefix", &name, &[128], &bytes);
        }
        for (form, contents) in [("raw", Contents::Raw), ("typed", Contents::Typed)] {
            let Ok(message) = grpc::encode_request("m", "1", request.clone(), contents) else { continue };
            let message = message.encode_to_vec();
            let frame = [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat();
            put("oip_grpc", &format!("{name}-{form}"), &[], &frame);
            put("oip_prefix", &format!("{name}-{form}"), &[200], &frame);
        }
        if let Some(frames) = join([&request, &request]).and_then(|joined| joined.grpc_frames("m", "").ok()) {
            put("oip_grpc", &format!("{name}-joined"), &[], &frames.concat());
        }
    }
    for (at, (name, text)) in DOCUMENTS.iter().enumerate() {
        put("openai", name, &[at as u8, 7], text.as_bytes());
        put("coalesce_json", name, &[at as u8], text.as_bytes());
    }
    let report = report();
    let mut text = BytesMut::new();
    report.write_text(&mut text);
    put("orca", "text", &[0], &text);
    put("orca", "text-merged-as-json", &[6], &text);
    put("orca", "first-text", &[0], b"cpu_utilization:0.5,named_metrics.queue:3");
    put("orca", "bin", &[1], report.to_bin().as_bytes());
    put("orca", "bin-in-text", &[0], format!("BIN {}", report.to_bin()).as_bytes());
    put("orca", "message", &[10], &report.to_protobuf());
    let json = r#"{"cpu_utilization":0.5,"rps":12,"named_metrics":{"a\n":1e3},"requestCost":{"t":5}}"#;
    put("orca", "json", &[2], json.as_bytes());
    put("orca", "json-in-text", &[3], format!("JSON {json}").as_bytes());
    for (name, page) in PAGES {
        put("metrics_page", name, &[128], page);
    }
    for (name, image) in IMAGES {
        let target = match name.rsplit_once('.') {
            Some((_, "jpg")) => "image_jpeg",
            Some((_, "png")) => "image_png",
            _ => "image_webp",
        };
        put(target, name, &[], image);
    }
    for (name, words) in PIPELINES {
        for (image, bytes) in IMAGES.iter().filter(|(image, _)| SMALLEST.contains(image)) {
            put("image_pipeline", &format!("{name}-{image}"), &words, bytes);
        }
    }
    for (image, bytes) in IMAGES.iter().filter(|(image, _)| SMALLEST.contains(image)) {
        put("image_head", image, &[], bytes);
    }
    put("image_pipeline", "nv12", &VIDEO, &[128; 8 * 8 * 3 / 2]);
    put("image_pipeline", "tensor", &TENSOR, &[7; 8 * 8 * 3]);
    entry::all(put);
    seeds
}

/// Requests with something of everything.
fn requests() -> Vec<(&'static str, InferRequest)> {
    let of = |datatype: Datatype, data: &'static [u8]| Tensor {
        name: datatype.name().into(),
        datatype,
        shape: vec![2, (data.len() / 2 / datatype.size().unwrap_or(5)) as u64],
        parameters: BTreeMap::new(),
        data: data.into(),
    };
    const NUMBERS: &[u8] = &[0, 0, 128, 63, 0, 0, 0, 64, 1, 2, 3, 4, 5, 6, 7, 63];
    let numbers = Datatype::ALL.into_iter().filter(|datatype| !matches!(datatype, Datatype::Bool));
    let every = numbers.map(|datatype| match datatype {
        Datatype::Bytes => of(datatype, b"\x01\0\0\0a\x01\0\0\0b"),
        _ => of(datatype, NUMBERS),
    });
    let one = InferRequest {
        id: Some("id".into()),
        inputs: vec![Tensor::fp32("x", vec![2, 2], [1.0, -0.0, 0.1, 3e38])],
        ..InferRequest::default()
    };
    let mut options = one.clone();
    options.parameters.insert("d".into(), Parameter::Double(0.1));
    options.parameters.insert("u".into(), Parameter::Uint(u64::MAX));
    options.inputs[0].parameters.insert("s".into(), Parameter::String("ü\"".into()));
    options.inputs.push(Tensor::bytes("s", vec![2], [&b"one"[..], b""]));
    let binary = [("binary_data".to_owned(), Parameter::Bool(true))];
    options.outputs.push(RequestedOutput { name: "y".into(), parameters: binary.into() });
    let empty = InferRequest { inputs: vec![Tensor::fp32("x", vec![2, 0], [])], ..InferRequest::default() };
    let flags = InferRequest { inputs: vec![of(Datatype::Bool, &[0, 1])], ..InferRequest::default() };
    vec![
        ("every", InferRequest { inputs: every.collect(), ..InferRequest::default() }),
        ("one", one),
        ("options", options),
        ("empty", empty),
        ("flags", flags),
        ("nothing", InferRequest::default()),
    ]
}

const DOCUMENTS: [(&str, &str); 4] = [
    (
        "chat",
        r#"{"model":"llama","messages":[{"role":"system","content":"be \u00fc\ud83d\ude00"},{"role":"user","content":[{"type":"text","text":"why?"},{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]}],"temperature":0,"stream":true}"#,
    ),
    (
        "completions",
        r#"{ "prompt" : [1, 22, 333], "model":"m", "max_tokens":16, "n":2, "seed":18446744073709551617, "user":"u" }"#,
    ),
    (
        "responses",
        r#"{"input":"one\ntwo","model":"m","previous_response_id":"r","store":false,"conversation":null,"instructions":"x"}"#,
    ),
    (
        "embeddings",
        r#"{"model":"e","input":["a","b\\\"c",""],"lora_path":["l"],"deep":{"b":{},"a":[[],-1.5e-3]}}"#,
    ),
];

fn report() -> LoadReport {
    LoadReport {
        application_utilization: 1.25,
        cpu_utilization: 0.5,
        rps_fractional: 120.5,
        named_metrics: [("in_flight".to_owned(), 3.0), ("vllm:num_requests_waiting".to_owned(), 7.0)].into(),
        utilization: [("gpu".to_owned(), 0.875)].into(),
        request_cost: [("tokens".to_owned(), 512.0)].into(),
        ..LoadReport::default()
    }
}

macro_rules! pages {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!("../../proxy/inference/tests/pages/", $name, ".txt")))),*]
    };
}

const PAGES: [(&str, &[u8]); 9] = pages!(
    "dcgm",
    "mlserver",
    "sglang",
    "tgi",
    "torchserve",
    "triton-trtllm",
    "triton",
    "trtllm-serve",
    "vllm"
);

macro_rules! images {
    ($($name:literal),*) => {
        [$(($name, include_bytes!(concat!("../../proxy/prepare/tests/images/", $name)))),*]
    };
}

const IMAGES: [(&str, &[u8]); 17] = images!(
    "baseline-420.jpg",
    "baseline-422.jpg",
    "cmyk.jpg",
    "exif-6.jpg",
    "gray.jpg",
    "one-pixel.jpg",
    "one-row.jpg",
    "progressive.jpg",
    "restart.jpg",
    "gray-16.png",
    "gray-alpha.png",
    "one-bit.png",
    "palette.png",
    "alpha.webp",
    "exif-6.webp",
    "lossless.webp",
    "lossy.webp"
);

/// One of each kind, with which heads and pipelines begin.
const SMALLEST: [&str; 5] = ["exif-6.jpg", "progressive.jpg", "one-bit.png", "palette.png", "lossy.webp"];

/// Declarations as the fuzzer makes them up: see `prepare::declaration`.
const PIPELINES: [(&str, [u8; WORDS]); 3] = [
    ("imagenet", [1, 0, 0, 0, 255, 3, 0, 0, 255, 0, 255, 255, 0, 0, 255, 0]),
    ("letterbox", [0, 0, 95, 63, 2, 2, 0, 0, 255, 0, 0, 16, 100, 116, 1, 8]),
    ("shortest-side", [0, 0, 0, 0, 1, 0, 127, 2, 35, 0, 1, 16, 100, 116, 9, 1]),
];
/// 8 by 8 pixels of video, and of a tensor.
const VIDEO: [u8; WORDS] = [0, 2, 7, 7, 255, 3, 0, 0, 255, 0, 255, 255, 0, 0, 255, 0];
const TENSOR: [u8; WORDS] = [0, 4, 7, 7, 255, 3, 0, 0, 255, 0, 255, 255, 0, 0, 17, 0];

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    // One test, since allocations are counted for the whole process.
    #[test]
    fn seeds_are_real_encodings_and_every_target_keeps_its_promises_of_them() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
        let update = std::env::var_os("UPDATE_SEEDS").is_some();
        for ((target, name), bytes) in all() {
            let file = folder.join(target).join(&name);
            if update {
                std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                std::fs::write(&file, &bytes).unwrap();
            }
            assert_eq!(
                std::fs::read(&file).ok(),
                Some(bytes),
                "seeds/{target}/{name}: write it anew with UPDATE_SEEDS=1"
            );
        }
        for (target, run) in TARGETS {
            let mut seeds = 0;
            for file in std::fs::read_dir(folder.join(target)).unwrap() {
                run(&std::fs::read(file.unwrap().path()).unwrap());
                seeds += 1;
            }
            assert!(seeds >= 4, "{target} has {seeds} seeds");
            run(&[]);
        }
    }
}
