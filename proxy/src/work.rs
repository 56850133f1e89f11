//! What a request asks of a model server: which model, how much work, which prompt.
//!
//! In: a request whose body has not been touched. Out: its [`Work`], read from the path and the beginning of the body.
//! The body is not held back: what was looked at is sent on as it came, and what did not come in time is not waited
//! for. Nothing here judges a request; what cannot be read is one unit of work for no model in particular.

use std::rc::Rc;
use std::time::Duration;

use http::{Method, Request};
use penstock_api::names;
use penstock_inference::oip::grpc::MODEL_INFER;
use penstock_inference::{oip, openai};

use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::kept;

/// How long the first piece of a body is waited for. A server could not begin without it either; a client that takes
/// longer is served without being looked at.
const PATIENCE: Duration = Duration::from_millis(50);

/// What a request asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Work {
    /// The model, `name` or `name/version`; empty: none in particular.
    pub model: String,
    /// Rows of a tensor request, tokens of a prompt, else 1.
    pub units: f32,
    /// Chained hashes of the prompt's leading blocks.
    pub blocks: Vec<u64>,
    /// The session or the user that should stay where it is; 0: none.
    pub key: u64,
}

/// Units of work that a block of a prompt is: its tokens.
pub const BLOCK_UNITS: f32 = (openai::BLOCK as u64 / openai::BYTES_PER_TOKEN) as f32;

impl Work {
    /// One request of which nothing more is known.
    pub fn one() -> Self {
        Self { units: 1.0, ..Self::default() }
    }
}

/// The protocols whose requests say what they ask for.
#[derive(Clone, Copy)]
enum Spoken {
    Rest,
    Grpc,
    OpenAi(openai::Api),
}

impl Spoken {
    fn of<B>(request: &Request<B>) -> Option<Self> {
        let path = request.uri().path();
        if *request.method() != Method::POST {
            None
        } else if path == MODEL_INFER {
            Some(Self::Grpc)
        } else if oip::prefix::of_path(path).is_some() {
            Some(Self::Rest)
        } else {
            openai::Api::of_path(path).map(Self::OpenAi)
        }
    }

    fn prefix(self) -> usize {
        match self {
            Self::Rest | Self::Grpc => oip::prefix::PREFIX,
            Self::OpenAi(_) => openai::PREFIX,
        }
    }
}

/// Reads what a request asks for.
pub async fn read(request: &mut Request<RequestBody>, exchange: &Rc<Exchange>) -> Work {
    match Spoken::of(request) {
        Some(spoken) => {
            let work = Box::pin(look(spoken, request, exchange)).await;
            Work { key: session(request).unwrap_or(work.key), ..work }
        }
        None => keyed(request),
    }
}

/// One request of which only the session is known.
pub fn keyed<B>(request: &Request<B>) -> Work {
    Work { key: session(request).unwrap_or(0), ..Work::one() }
}

fn session<B>(request: &Request<B>) -> Option<u64> {
    Some(hash(request.headers().get(names::header::SESSION)?.as_bytes()))
}

async fn look(spoken: Spoken, request: &mut Request<RequestBody>, exchange: &Rc<Exchange>) -> Work {
    let pieces = kept::look_ahead(request.body_mut(), exchange, spoken.prefix(), PATIENCE).await;
    let number = |name: &str| request.headers().get(name)?.to_str().ok()?.parse().ok();
    let tensors = |ask: Option<oip::prefix::Ask>| {
        let ask = ask.unwrap_or_default();
        let version = ask.version.filter(|version| !version.is_empty());
        let model = ask.model.unwrap_or_default();
        Work {
            model: version.map_or_else(|| model.clone(), |version| format!("{model}/{version}")),
            units: ask.rows.max(1) as f32,
            ..Work::default()
        }
    };
    match spoken {
        Spoken::Rest => {
            let header =
                number("inference-header-content-length").and_then(|length| usize::try_from(length).ok());
            tensors(oip::prefix::rest(request.uri().path(), header, &pieces.concat()))
        }
        Spoken::Grpc => tensors(oip::prefix::grpc(&pieces.concat())),
        Spoken::OpenAi(api) => {
            let mut reader = openai::Reader::new(api, openai::PREFIX);
            let _ = pieces.iter().all(|piece| reader.push(piece));
            let ask = reader.finish();
            let model = ask.model.clone().unwrap_or_default();
            let tokens = ask.prompt_tokens(number("content-length"));
            Work {
                key: ask.session.or(ask.user).unwrap_or(0),
                units: tokens.max(1) as f32,
                model: ask.adapter.map_or_else(|| model.clone(), |adapter| format!("{model}/{adapter}")),
                blocks: ask.blocks,
            }
        }
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let digest = blake3::hash(bytes);
    digest.as_bytes().first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_that_ask_a_model_are_looked_at() {
        let table = [
            (Method::POST, "/v2/models/digits/infer", true),
            (Method::GET, "/v2/models/digits/ready", false),
            (Method::POST, "/v2/models/digits/versions/2/infer", true),
            (Method::POST, MODEL_INFER, true),
            (Method::POST, "/inference.GRPCInferenceService/ModelReady", false),
            (Method::POST, "/v1/chat/completions", true),
            (Method::POST, "/upload", false),
        ];
        for (method, path, looked_at) in table {
            let request = Request::builder().method(method).uri(path).body(()).unwrap();
            assert_eq!(Spoken::of(&request).is_some(), looked_at, "{path}");
        }
    }
}
