//! The digits and the two models that the demo works with, carried inside the program.
//!
//! They are the files that tests/models/train.py made and the repository commits: handwritten digits that
//! neither model has seen in training, with what they really are. The models go to a directory, where the model servers read them.
//! What a request looks like is for photographs too.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;
use penstock_inference::oip::{InferRequest, Parameter, RequestedOutput, Tensor, rest};

use super::photos::Maker;

static IMAGES: &[u8] = include_bytes!("../../../../tests/models/digits-test.bin");
static MODELS: [(u8, &[u8]); 2] = [
    (1, include_bytes!("../../../../tests/models/repository/digits/1/model.onnx")),
    (2, include_bytes!("../../../../tests/models/repository/digits/2/model.onnx")),
];

/// The name of the model.
pub(crate) const MODEL: &str = "digits";
/// The path of an inference request.
pub(crate) const INFER: &str = "/v2/models/digits/infer";

/// The output with the scores of the ten digits, or photographs.
const LOGITS: &str = "logits";
/// Pixels of an image, 8 × 8.
const PIXELS: usize = 64;

/// How a question is asked.
#[derive(Clone, Debug)]
pub(crate) enum Form {
    /// As a request that is ready: JSON, so many bytes of it, then a tensor.
    Tensor {
        /// Bytes of the JSON.
        json: Option<usize>,
    },
    /// As the JPEG that the body is.
    Jpeg,
    /// As a tensor that the client makes of the JPEG.
    Own(Arc<Maker>),
}

/// A request's body and what the right answer is.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    /// Which model is asked.
    pub(crate) path: &'static str,
    /// How.
    pub(crate) form: Form,
    /// What is sent, or made of.
    pub(crate) body: Bytes,
    /// The digit that somebody wrote, or the photograph; 0 to 9.
    pub(crate) class: u8,
}

/// All images as requests, ready to send.
pub(crate) fn questions() -> Result<Vec<Question>, String> {
    let broken = || "the test images carried in this program are broken: build it anew".to_owned();
    let (count, rest) = IMAGES.split_first_chunk::<4>().ok_or_else(broken)?;
    let count = u32::from_le_bytes(*count) as usize;
    let (pixels, labels) = rest.split_at_checked(count * PIXELS).ok_or_else(broken)?;
    if labels.len() != count {
        return Err(broken());
    }
    pixels.chunks_exact(PIXELS).zip(labels).map(|(image, digit)| question(image, *digit)).collect()
}

fn question(image: &[u8], digit: u8) -> Result<Question, String> {
    let request = InferRequest {
        inputs: vec![Tensor::fp32(
            "image",
            vec![1, PIXELS as u64],
            image.iter().map(|pixel| f32::from(*pixel)),
        )],
        outputs: vec![RequestedOutput {
            name: LOGITS.to_owned(),
            parameters: [("binary_data".to_owned(), Parameter::Bool(true))].into(),
        }],
        ..InferRequest::default()
    };
    let body = rest::encode_request(&request, true).map_err(|e| e.to_string())?;
    let form = Form::Tensor { json: body.header_length };
    Ok(Question { path: INFER, form, body: body.into_bytes(), class: digit })
}

/// What a model server answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The version that answered.
    pub(crate) version: u8,
    /// The digit that it read, or the photograph that it recognised.
    pub(crate) class: u8,
}

/// Reads a response: which version it came from, and the class with the highest score.
pub(crate) fn answer(headers: &HeaderMap, body: &Bytes) -> Result<Answer, String> {
    let response = rest::header_length(headers)
        .and_then(|length| rest::decode_response(body, length))
        .map_err(|e| format!("the response is not as the protocol says: {e}"))?;
    let version = response.model_version;
    let version = version.parse().map_err(|_| format!("version {version:?} of the model is no number"))?;
    let scores = response.outputs.iter().find(|output| output.name == LOGITS).and_then(Tensor::as_fp32);
    let best = scores.filter(|scores| scores.len() == 10).and_then(|scores| {
        scores.zip(0..).max_by(|(score, _), (other, _)| score.total_cmp(other)).map(|(_, class)| class)
    });
    let class =
        best.ok_or_else(|| format!("the response has no output {LOGITS:?} with the scores of ten classes"))?;
    Ok(Answer { version, class })
}

/// Writes the models as a model repository: `<directory>/digits/<version>/model.onnx`.
pub(crate) fn write_models(directory: &Path) -> io::Result<()> {
    for (version, model) in MODELS {
        let directory = directory.join(MODEL).join(version.to_string());
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join("model.onnx"), model)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    use penstock_inference::oip::InferResponse;

    #[test]
    fn every_image_is_a_request_with_its_label() {
        let questions = questions().unwrap();
        assert_eq!(questions.len(), 599);
        for question in &questions {
            assert!(question.class <= 9);
            let Form::Tensor { json } = question.form else { panic!("{question:?}") };
            let request = rest::decode_request(&question.body, json).unwrap();
            let pixels: Vec<f32> = request.inputs[0].as_fp32().unwrap().collect();
            assert_eq!(pixels.len(), PIXELS);
            assert!(pixels.iter().all(|pixel| (0.0..=16.0).contains(pixel)));
            assert!(request.wants_binary(LOGITS));
        }
    }

    fn response(version: &str, scores: Vec<f32>) -> Result<Answer, String> {
        let shape = vec![1, scores.len() as u64];
        let response = InferResponse {
            model_version: version.to_owned(),
            outputs: vec![Tensor::fp32(LOGITS, shape, scores)],
            ..InferResponse::default()
        };
        let body = rest::encode_response(&response, |_| true).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(&rest::HEADER_LENGTH, body.header_length.unwrap().into());
        answer(&headers, &body.into_bytes())
    }

    #[test]
    fn the_best_score_is_the_answer_and_anything_else_is_named() {
        let scores = (0..10_u8).map(|digit| if digit == 7 { 3.5 } else { -f32::from(digit) });
        assert_eq!(response("2", scores.clone().collect()), Ok(Answer { version: 2, class: 7 }));
        assert!(response("x", scores.collect()).unwrap_err().contains("\"x\" of the model is no number"));
        assert!(response("2", vec![1.0]).unwrap_err().contains("ten classes"));
        assert!(answer(&HeaderMap::new(), &Bytes::from_static(b"oops")).unwrap_err().contains("protocol"));
    }
}
