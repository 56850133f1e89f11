//! Taking in what has to be prepared: unlike sharing, preparing is not something that a request can do without.
//!
//! In: a request to a model that has pipelines. Out: its body, whole, and what it asks; or nothing, where it has what no pipeline
//! makes, and passes. Can go wrong: the body is too slow, too large or compressed, or there is no room for it now. Then it is
//! refused with that reason: the model server would refuse it too, and say that an image is no JSON.

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::header::CONTENT_ENCODING;
use http::{HeaderMap, Request};
use penstock_api::Reason;
use penstock_inference::oip::{self, rest};

use super::{Prepare, Whose, datatype, later, lost, read};
use crate::body::RequestBody;
use crate::coalesce::MAX_BODY;
use crate::coalesce::wire::{self, Asked, Form};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::held::{self, Held, Why};
use crate::kept;

/// As much of a body is looked at to see whether it has what pipelines make; names of inputs stand at its beginning.
const LOOK: usize = 64 << 10;
/// A larger body is not read by a thread that serves connections.
const SMALL: usize = 256 << 10;

/// Whether a body is no inference request, by its type or, since that is often wrong, by how it begins.
fn is_plain(headers: &HeaderMap, begins: &[u8]) -> bool {
    let sized = headers.contains_key(&rest::HEADER_LENGTH);
    read::is_plain(headers) || (!sized && penstock_prepare::head::is_image(begins))
}

/// Refuses a compressed image or form. Other bodies cannot be told apart until they are read, and pass.
pub fn check<B>(request: &Request<B>) -> Result<(), Failure> {
    let headers = request.headers();
    let coded = headers.get(CONTENT_ENCODING).filter(|coding| *coding != "identity");
    match coded {
        Some(coding) if read::is_plain(headers) && oip::prefix::of_path(request.uri().path()).is_some() => {
            let story = format!("an image is sent as it is, and not with content-encoding: {coding:?}");
            Err(Failure::unprocessed(Reason::BodyEncoded, story))
        }
        _ => Ok(()),
    }
}

/// Whether the beginning of a request names an input that a pipeline makes, in a form that is not finished. A look: what is meant
/// is known when all is read.
fn seems(pipelines: &[Arc<Prepare>], begins: &[u8]) -> bool {
    let has = |word: &str| begins.windows(word.len().max(1)).any(|part| part == word.as_bytes());
    pipelines.iter().any(|prepare| {
        let made = datatype(prepare.pipeline.dtype());
        let taken = prepare.pipeline.takes().map(|(dtype, _)| datatype(dtype)).filter(|taken| *taken != made);
        has(&prepare.input) && (has("BYTES") || taken.is_some_and(|taken| has(taken.name())))
    })
}

fn begins(exchange: &Rc<Exchange>, body: &mut RequestBody) -> Vec<u8> {
    let pieces = kept::keep(body, exchange).map(|kept| kept.passed()).unwrap_or_default();
    let mut begins = Vec::new();
    for piece in pieces {
        let room = LOOK.saturating_sub(begins.len());
        begins.extend_from_slice(&piece[..piece.len().min(room)]);
    }
    begins
}

/// Takes in a body. `None`: it is not here, and nothing says that it has what a pipeline makes.
pub async fn take(
    exchange: &Rc<Exchange>,
    caller: u64,
    request: &mut Request<RequestBody>,
    pipelines: &[Arc<Prepare>],
) -> Result<Option<(Bytes, Held)>, Failure> {
    let headers = request.headers().clone();
    let wanted = |body: &mut RequestBody| {
        let begins = begins(exchange, body);
        is_plain(&headers, &begins) || seems(pipelines, &begins)
    };
    let body = request.body_mut();
    match held::needed(exchange, body, caller, MAX_BODY, wanted).await {
        Ok(taken) => Ok(Some(taken)),
        Err(why) if wanted(body) => Err(refusal(why)),
        Err(_) => Ok(None),
    }
}

fn refusal(why: Why) -> Failure {
    let what = "a body that has to be prepared for the model";
    match why {
        Why::Large => Failure::unprocessed(
            Reason::BodyTooLarge,
            format!("{what} may have {MAX_BODY} bytes; send fewer rows"),
        ),
        Why::Slow => Failure::unprocessed(
            Reason::BodyTimeout,
            format!(
                "{what} has to come within {:?}, and something of it every {:?}",
                held::LONGEST,
                held::PATIENCE
            ),
        ),
        Why::Full => later(
            Reason::NoRoom,
            format!(
                "no room for {what}: too many are held already, and a caller may hold no more than is free"
            ),
        ),
        Why::Broken => Failure::unprocessed(Reason::BadRequest, format!("{what} broke off, or has trailers")),
    }
}

/// Reads a request whose body is whole; `None`: it is not understood, and passes. What is large is read by a thread that prepares.
pub async fn read(
    exchange: &Rc<Exchange>,
    whose: Whose,
    form: Form,
    request: &Request<RequestBody>,
    body: &Bytes,
    pipelines: Vec<Arc<Prepare>>,
) -> Result<Option<Asked>, Failure> {
    let (headers, path) = (request.headers(), request.uri().path());
    let is_plain = form == Form::Rest && is_plain(headers, body);
    // Behind a length is a short JSON, and of a message its tensors are not copied.
    let short = form != Form::Rest || headers.contains_key(&rest::HEADER_LENGTH);
    let (headers, path, read_of) = (headers.clone(), path.to_owned(), body.clone());
    let work = async move {
        if !is_plain {
            return Ok(wire::read(form, &path, &headers, &read_of));
        }
        let Some((model, version)) = oip::prefix::of_path(&path) else { return Ok(None) };
        let request = read::request(&headers, &read_of, &pipelines).await?;
        let version = version.unwrap_or_default().to_owned();
        Ok(Some(Asked { form: Form::Rest, model: model.to_owned(), version, request }))
    };
    if body.len() <= SMALL || short && !is_plain {
        return work.await;
    }
    // Reading a byte is a small part of decoding a pixel.
    let cost = body.len() as u64 / 16;
    let turn =
        super::of_the_line(&exchange.worker.shared.preparing, cost, whose, || "the body".to_owned()).await?;
    let job = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        // All of it is there, so nothing is waited for.
        work.now_or_never()
    });
    job.await.map_err(|_| lost())?.ok_or_else(lost)?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipelines(pipeline: serde_json::Value) -> Vec<Arc<Prepare>> {
        let declaration = serde_json::from_value(pipeline).unwrap();
        let pipeline = penstock_prepare::Pipeline::new(&declaration).unwrap();
        let shape = pipeline.shape().iter().map(|side| *side as u64).collect();
        vec![Arc::new(Prepare {
            model: None,
            input: "image".into(),
            tensor: "image".into(),
            pipeline,
            shape,
        })]
    }

    #[test]
    fn a_body_shows_early_whether_it_has_to_be_prepared() {
        let image = pipelines(serde_json::json!({"preset": "imagenet"}));
        let frame = pipelines(serde_json::json!({"input": {"format": "rgb", "width": 4, "height": 4}}));
        for (begins, of_image, of_frame) in [
            (r#"{"inputs":[{"name":"image","datatype":"BYTES","sh"#, true, true),
            (r#"{"inputs":[{"name":"image","datatype":"FP32","sh"#, false, false),
            (r#"{"inputs":[{"name":"image","datatype":"UINT8","sh"#, false, true),
            (r#"{"inputs":[{"name":"other","datatype":"BYTES","sh"#, false, false),
            ("", false, false),
        ] {
            assert_eq!(seems(&image, begins.as_bytes()), of_image, "{begins}");
            assert_eq!(seems(&frame, begins.as_bytes()), of_frame, "{begins}");
        }
    }

    #[test]
    fn an_image_is_known_by_its_beginning_whatever_its_type_says() {
        let typed = |kind: &str| HeaderMap::from_iter([(http::header::CONTENT_TYPE, kind.parse().unwrap())]);
        for kind in ["application/x-www-form-urlencoded", "application/octet-stream", "text/plain"] {
            assert!(is_plain(&typed(kind), b"\xff\xd8\xff\xe0"), "{kind}");
            assert!(!is_plain(&typed(kind), b"{\"inputs\":"), "{kind}");
        }
        assert!(
            is_plain(&typed("Image/JPEG"), b"GIF89a")
                && is_plain(&typed("Multipart/Form-Data; boundary=x"), b"")
        );
    }

    #[test]
    fn a_compressed_image_is_refused_with_that_reason() {
        let request = |kind: &str, coding: &str| {
            let request = Request::post("/v2/models/m/infer").header("content-type", kind);
            request.header("content-encoding", coding).body(()).unwrap()
        };
        let refused = check(&request("image/png", "gzip")).unwrap_err();
        assert!(refused.reason == Reason::BodyEncoded && refused.story.contains("gzip"), "{refused}");
        assert!(check(&request("image/png", "identity")).is_ok());
        assert!(check(&request("application/json", "gzip")).is_ok());
    }
}
