//! The handwritten digits: held-out images with their labels, and requests that ask a model about them.
//!
//! The images are embedded, so that every program that has them needs no files. `tests/models/README.md` says where they
//! come from.

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Uri, header};
use penstock_inference::oip::{
    Error, InferRequest, InferResponse, Parameter, RequestedOutput, Tensor, grpc, rest,
};
use std::collections::BTreeMap;
use std::ops::Range;

/// The model's name in the repository.
pub const MODEL: &str = "digits";
/// Pixels of an image.
pub const PIXELS: usize = 64;

const FILE: &[u8] = include_bytes!("../models/digits-test.bin");
const CARD: &str = include_str!("../models/digits.json");
const COUNT: usize = (FILE.len() - 4) / (PIXELS + 1);

// The file counts itself; a file that was cut does not compile.
const _: () = assert!(
    FILE.len() == 4 + COUNT * (PIXELS + 1)
        && u32::from_le_bytes([FILE[0], FILE[1], FILE[2], FILE[3]]) as usize == COUNT
);

/// The held-out images.
#[derive(Debug, Clone)]
pub struct Digits {
    /// Pixels 0..=16, row by row.
    pub images: Vec<[u8; PIXELS]>,
    /// The digit that each shows.
    pub labels: Vec<u8>,
}

/// How a REST request and its response carry tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Numbers in the JSON.
    Json,
    /// Binary tensors behind the JSON.
    Binary,
}

/// The embedded images.
pub fn load() -> Digits {
    let (pixels, labels) = FILE[4..].split_at(COUNT * PIXELS);
    Digits { images: pixels.as_chunks().0.to_vec(), labels: labels.to_vec() }
}

/// What the training script measured.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Card {
    /// The seed of everything.
    pub seed: u64,
    /// How many images were held out.
    pub test_images: usize,
    /// How many of them each version gets right.
    pub correct: BTreeMap<String, usize>,
    /// The same as a share.
    pub accuracy: BTreeMap<String, f64>,
}

/// The embedded card.
pub fn card() -> serde_json::Result<Card> {
    serde_json::from_str(CARD)
}

impl Digits {
    /// How many images there are.
    pub fn count(&self) -> usize {
        self.images.len()
    }

    /// Asks for the logits of some images, as one batch.
    pub fn request(&self, images: Range<usize>) -> InferRequest {
        let batch = &self.images[images];
        let pixels = batch.iter().flatten().map(|pixel| f32::from(*pixel));
        InferRequest {
            inputs: vec![Tensor::fp32("image", vec![batch.len() as u64, PIXELS as u64], pixels)],
            outputs: vec![RequestedOutput { name: "logits".into(), ..RequestedOutput::default() }],
            ..InferRequest::default()
        }
    }

    /// The same as an HTTP request. The URI ends with [`path`]; it may be absolute or a path alone.
    pub fn rest(&self, images: Range<usize>, form: Form, uri: Uri) -> Result<Request<Bytes>, Error> {
        let mut asked = self.request(images);
        let binary = form == Form::Binary;
        if binary {
            asked.parameters.insert("binary_data_output".into(), Parameter::Bool(true));
        }
        let body = rest::encode_request(&asked, binary)?;
        let (kind, length) = (body.content_type(), body.header_length);
        let mut request = Request::new(body.into_bytes());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Some(length) = length {
            headers.insert(&rest::HEADER_LENGTH, length.into());
        }
        Ok(request)
    }

    /// The same as a gRPC message with raw contents; an empty version lets the server choose.
    pub fn grpc(&self, images: Range<usize>, version: &str) -> Result<grpc::ModelInferRequest, Error> {
        grpc::encode_request(MODEL, version, self.request(images), grpc::Contents::Raw)
    }

    /// How many of the answers are right, in the order of the images that were asked about.
    pub fn right(&self, images: Range<usize>, response: &InferResponse) -> usize {
        self.labels[images].iter().zip(predictions(response)).filter(|(label, said)| **label == *said).count()
    }
}

/// The path of inference for the model, or for one of its versions.
pub fn path(version: Option<&str>) -> String {
    match version {
        Some(version) => format!("/v2/models/{MODEL}/versions/{version}/infer"),
        None => format!("/v2/models/{MODEL}/infer"),
    }
}

/// The digit that the model takes each image for.
pub fn predictions(response: &InferResponse) -> Vec<u8> {
    let logits = response.outputs.iter().find(|output| output.name == "logits");
    let Some(values) = logits.and_then(Tensor::as_fp32) else { return Vec::new() };
    let values: Vec<f32> = values.collect();
    let most = |row: &[f32]| (0..10u8).max_by(|a, b| row[usize::from(*a)].total_cmp(&row[usize::from(*b)]));
    values.chunks_exact(10).filter_map(most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_are_whole() {
        let (digits, card) = (load(), card().unwrap());
        assert_eq!((digits.count(), digits.labels.len()), (card.test_images, card.test_images));
        assert!(digits.images.iter().flatten().all(|pixel| *pixel <= 16));
        assert!((0..10).all(|digit| digits.labels.contains(&digit)));
    }

    #[test]
    fn a_request_is_the_same_on_every_wire() {
        let digits = load();
        let asked = digits.request(3..5);
        for form in [Form::Json, Form::Binary] {
            let request = digits.rest(3..5, form, path(None).parse().unwrap()).unwrap();
            let length = rest::header_length(request.headers()).unwrap();
            assert_eq!(rest::decode_request(request.body(), length).unwrap().inputs, asked.inputs);
        }
        assert_eq!(grpc::decode_request(digits.grpc(3..5, "2").unwrap()), Ok(asked));
    }
}
