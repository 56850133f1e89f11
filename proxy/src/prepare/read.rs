//! Images that come as they are: as the body of a request, or as the files of a form.
//!
//! In: a POST to a model whose body is no inference request. Out: the inference request that it stands for: one row an image,
//! named as the policy names the input. The answer is that of the protocol, in JSON.

use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use penstock_api::Reason;
use penstock_inference::oip::{InferRequest, Tensor};

use super::Prepare;
use crate::failure::Failure;

/// What kind of body it is.
fn content_type(headers: &HeaderMap) -> &str {
    headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Whether a type begins so; types are written in any case (RFC 9110, 8.3.1).
fn is_of(kind: &str, begins: &str) -> bool {
    kind.trim_start().get(..begins.len()).is_some_and(|kind| kind.eq_ignore_ascii_case(begins))
}

/// Whether a body is an image, or a form, by its type.
pub fn is_plain(headers: &HeaderMap) -> bool {
    is_of(content_type(headers), "image/") || is_of(content_type(headers), "multipart/form-data")
}

/// Reads such a body, for a model with these pipelines.
pub async fn request(
    headers: &HeaderMap,
    body: &Bytes,
    pipelines: &[std::sync::Arc<Prepare>],
) -> Result<InferRequest, Failure> {
    let bad = |what: String| Failure::unprocessed(Reason::BadInput, what);
    let kind = content_type(headers);
    if !is_of(kind, "multipart/form-data") {
        let [only] = pipelines else {
            let inputs: Vec<_> = pipelines.iter().map(|prepare| prepare.input.as_str()).collect();
            let names = inputs.join(", ");
            return Err(bad(format!(
                "an image alone does not say which input it is, of {names}; send a form (multipart/form-data)"
            )));
        };
        let inputs = vec![Tensor::bytes(&only.input, vec![1], [&body[..]])];
        return Ok(InferRequest { inputs, ..InferRequest::default() });
    }
    let boundary = multer::parse_boundary(kind).map_err(|error| bad(format!("the form: {error}")))?;
    let whole =
        futures_util::stream::once(std::future::ready(Ok::<_, std::convert::Infallible>(body.clone())));
    let mut form = multer::Multipart::new(whole, boundary);
    let mut files: Vec<(&Prepare, Vec<Bytes>)> =
        pipelines.iter().map(|prepare| (&**prepare, Vec::new())).collect();
    while let Some(field) = form.next_field().await.map_err(|error| bad(format!("the form: {error}")))? {
        let name = field.name().unwrap_or_default().to_owned();
        let Some((_, rows)) = files.iter_mut().find(|(prepare, _)| prepare.input == name) else {
            let inputs: Vec<_> = pipelines.iter().map(|prepare| prepare.input.as_str()).collect();
            return Err(bad(format!("the form's field {name:?} is no input; write {}", inputs.join(" or "))));
        };
        rows.push(field.bytes().await.map_err(|error| bad(format!("the form's field {name:?}: {error}")))?);
    }
    let inputs: Vec<Tensor> = files
        .iter()
        .filter(|(_, rows)| !rows.is_empty())
        .map(|(prepare, rows)| {
            Tensor::bytes(&prepare.input, vec![rows.len() as u64], rows.iter().map(|row| &row[..]))
        })
        .collect();
    if inputs.is_empty() {
        return Err(bad("the form has no files".to_owned()));
    }
    Ok(InferRequest { inputs, ..InferRequest::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn pipelines(inputs: &[&str]) -> Vec<Arc<Prepare>> {
        let declaration = penstock_prepare::Declaration {
            preset: Some(penstock_prepare::Preset::Imagenet),
            ..Default::default()
        };
        let of = |input: &&str| {
            let pipeline = penstock_prepare::Pipeline::new(&declaration).unwrap();
            let shape = vec![3, 224, 224];
            Arc::new(Prepare { model: None, input: (*input).to_owned(), tensor: "x".into(), pipeline, shape })
        };
        inputs.iter().map(of).collect()
    }

    fn typed(kind: &str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, kind.parse().unwrap())])
    }

    #[tokio::test]
    async fn an_image_alone_is_one_row_of_the_only_input() {
        let body = Bytes::from_static(b"\xff\xd8 and so on");
        let asked = request(&typed("image/jpeg"), &body, &pipelines(&["image"])).await.unwrap();
        assert_eq!(asked.inputs, [Tensor::bytes("image", vec![1], [&body[..]])]);
        let error = request(&typed("image/jpeg"), &body, &pipelines(&["left", "right"])).await.unwrap_err();
        assert!(error.story.contains("left, right") && error.reason == Reason::BadInput, "{error}");
    }

    #[tokio::test]
    async fn the_files_of_a_form_are_rows_of_the_inputs_that_they_name() {
        let file = |name: &str, bytes: &str| {
            format!(
                "--b\r\ncontent-disposition: form-data; name=\"{name}\"; filename=\"x\"\r\n\r\n{bytes}\r\n"
            )
        };
        let form = typed("multipart/form-data; boundary=b");
        let body =
            [file("image", "one"), file("mask", "m"), file("image", "two"), "--b--\r\n".into()].concat();
        let asked = request(&form, &body.into(), &pipelines(&["image", "mask"])).await.unwrap();
        let expected = [
            Tensor::bytes("image", vec![2], [&b"one"[..], b"two"]),
            Tensor::bytes("mask", vec![1], [&b"m"[..]]),
        ];
        assert_eq!(asked.inputs, expected);
        for (body, words) in [
            ([file("photo", "x"), "--b--\r\n".into()].concat(), "\"photo\" is no input; write image or mask"),
            ("--b--\r\n".to_owned(), "no files"),
            (file("image", "x"), "the form"),
        ] {
            let error = request(&form, &body.into(), &pipelines(&["image", "mask"])).await.unwrap_err();
            assert!(error.story.contains(words), "{error}");
        }
    }
}
