//! Requests to language models.

use std::collections::BTreeMap;

use http::HeaderMap;
use penstock_coalesce::json::Document;
use penstock_coalesce::key::{self, Scope};
use penstock_inference::openai::{Api, Ask, Reader, Usage};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::{bounded, choice, pieces};

/// The body of an OpenAI request, behind a byte for the endpoint and one for where it is cut. Read in pieces it says what
/// it says as a whole, and the model is the one that a parser of JSON finds. The same bytes as an answer say the same of what was
/// used, however they are cut.
pub fn openai(data: &[u8]) {
    let (api, data) = choice(data);
    let (cuts, body) = choice(data);
    let api = [Api::Chat, Api::Completions, Api::Responses, Api::Embeddings][usize::from(api) % 4];
    let whole = bounded(body, || Ask::read(api, body));
    let mut reader = Reader::new(api, body.len());
    for piece in pieces(body, cuts) {
        reader.push(piece);
    }
    assert_eq!(reader.finish(), whole, "read in pieces");
    for usage in [Usage::of_document, Usage::of_stream] {
        let (mut at_once, mut cut) = (usage(), usage());
        bounded(body, || at_once.push(body));
        pieces(body, cuts).for_each(|piece| cut.push(piece));
        assert_eq!((cut.tokens(), cut.events()), (at_once.tokens(), at_once.events()), "read in pieces");
    }
    for length in [None, Some(0), Some(body.len() as u64), Some(u64::MAX)] {
        whole.prompt_tokens(length);
    }
    whole.answer_tokens(api, u64::MAX);
    if Document::read(body).is_some()
        && let Ok(Value::Object(members)) = serde_json::from_slice(body)
        && let Some(Value::String(model)) = members.get("model")
        && (1..=256).contains(&model.len())
    {
        assert_eq!(whole.model.as_ref(), Some(model));
    }
}

/// A body, behind a byte for how it is spelt otherwise. All spellings of one document have one form and one hash, and
/// the form says what the document says.
pub fn coalesce_json(data: &[u8]) {
    const SCOPE: Scope<'_> = Scope { client: "", model: "m", version: "", load: 0, headers: &[] };
    let (seed, body) = choice(data);
    let Some(document) = bounded(body, || Document::read(body)) else { return };
    let hash = |document: &Document| key::of_document("/v1/completions", document, &SCOPE, &HeaderMap::new());
    let form = as_json(document.form());
    for spelling in [form.clone(), spaced(body, seed), escaped(body, seed), backwards(body)] {
        let Some(other) = Document::read(&spelling) else {
            panic!("another spelling is not read: {}", String::from_utf8_lossy(&spelling));
        };
        assert_eq!(
            String::from_utf8_lossy(other.form()),
            String::from_utf8_lossy(document.form()),
            "spelt {}",
            String::from_utf8_lossy(&spelling)
        );
        assert_eq!(other.is_deterministic(), document.is_deterministic());
        assert_eq!(hash(&other), hash(&document));
    }
    // Numbers beyond a double's range are JSON, but not to this parser.
    if let Ok(said) = serde_json::from_slice::<Value>(body) {
        assert_eq!(serde_json::from_slice::<Value>(&form).unwrap(), said, "the form says something else");
    }
}

/// Rewrites a document: `outside` gets each byte that is in no string, `inside` each character that is no escape.
fn rewrite(
    text: &[u8],
    mut outside: impl FnMut(u8, Option<u8>, &mut Vec<u8>),
    mut inside: impl FnMut(u8, &mut Vec<u8>),
) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() * 2);
    let (mut quoted, mut escape) = (false, 0);
    for (at, &byte) in text.iter().enumerate() {
        if !quoted {
            quoted = byte == b'"';
            outside(byte, text.get(at + 1).copied(), &mut out);
        } else if escape > 0 {
            // `\u` takes four more.
            escape = if escape == 5 && byte == b'u' {
                4
            } else if escape == 5 {
                0
            } else {
                escape - 1
            };
            out.push(byte);
        } else if byte == b'\\' {
            escape = 5;
            out.push(byte);
        } else if byte == b'"' {
            quoted = false;
            out.push(byte);
        } else {
            inside(byte, &mut out);
        }
    }
    out
}

/// The form without the commas that follow the last of each list.
fn as_json(form: &[u8]) -> Vec<u8> {
    let outside = |byte: u8, next: Option<u8>, out: &mut Vec<u8>| {
        if byte != b',' || !matches!(next, Some(b'}' | b']')) {
            out.push(byte);
        }
    };
    rewrite(form, outside, |byte, out| out.push(byte))
}

fn spaced(text: &[u8], seed: u8) -> Vec<u8> {
    let mut at = usize::from(seed);
    let outside = |byte: u8, _, out: &mut Vec<u8>| {
        if matches!(byte, b'{' | b'}' | b'[' | b']' | b',' | b':') {
            at += 1;
            out.push(b" \t\n\r"[at % 4]);
            out.push(byte);
            out.push(b" \t\n\r"[at / 4 % 4]);
        } else {
            out.push(byte);
        }
    };
    rewrite(text, outside, |byte, out| out.push(byte))
}

/// Every letter but a few as an escape.
fn escaped(text: &[u8], seed: u8) -> Vec<u8> {
    let inside = |byte: u8, out: &mut Vec<u8>| {
        if byte.is_ascii() && byte % 7 != seed % 7 {
            out.extend(format!("\\u{byte:04X}").bytes());
        } else {
            out.push(byte);
        }
    };
    rewrite(text, |byte, _, out| out.push(byte), inside)
}

/// The outermost members the other way round.
fn backwards(text: &[u8]) -> Vec<u8> {
    let members: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(text).unwrap();
    let written = members.iter().rev().map(|(name, value)| format!("{}:{value}", Value::from(name.as_str())));
    format!("{{{}}}", written.collect::<Vec<_>>().join(",")).into_bytes()
}
