//! What a request holds of the limits that count it, until its exchange ends; and what its answer used, read as it passes.
//!
//! In: places ([`super::table`]), the head of the answer, its bytes. When it is dropped the places are left, and what was used is
//! taken from the buckets of tokens, whether it was there or not: it is known only now.

use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderMap, StatusCode};
use penstock_inference::openai::{BYTES_PER_TOKEN, Usage};

use super::Limit;
use super::table::At;

/// The places of one request.
#[derive(Debug, Default)]
pub struct Held {
    places: Vec<(Arc<Limit>, At)>,
    /// Tokens of the prompt, estimated: what is counted where the answer does not say it.
    prompt: u64,
    answer: Answer,
}

/// What has come back of what is counted.
#[derive(Debug, Default)]
enum Answer {
    /// Its tokens are not counted.
    #[default]
    NotCounted,
    /// Nothing yet.
    Awaited,
    /// A refusal, which used nothing.
    Refused,
    /// As it passes.
    Read(Box<Usage>),
    /// As it passes, in a form that is not read; so many bytes.
    Unread(u64),
}

impl Held {
    /// Holds a place of that limit too.
    pub(super) fn push(&mut self, limit: &Arc<Limit>, at: At) {
        self.places.push((Arc::clone(limit), at));
    }

    /// Its tokens are counted, if a limit of tokens counts it.
    pub(super) fn counts_tokens(&mut self) {
        if self.places.iter().any(|(limit, _)| limit.tokens.is_some()) {
            self.answer = Answer::Awaited;
        }
    }

    /// Whether there is anything to hold.
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether its tokens are counted.
    pub(super) fn is_counted(&self) -> bool {
        !matches!(self.answer, Answer::NotCounted)
    }

    /// What the prompt is thought to be.
    pub fn asks(&mut self, units: f32) {
        self.prompt = units as u64;
    }

    /// The head of the answer.
    pub fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        if !matches!(self.answer, Answer::Awaited) {
            return;
        }
        let is = |name, text: &[u8]| {
            headers.get(name).is_some_and(|value| value.as_bytes().to_ascii_lowercase().starts_with(text))
        };
        self.answer = if !status.is_success() {
            Answer::Refused
        } else if headers.contains_key(CONTENT_ENCODING) && !is(CONTENT_ENCODING, b"identity") {
            Answer::Unread(0)
        } else if is(CONTENT_TYPE, b"text/event-stream") {
            Answer::Read(Box::new(Usage::of_stream()))
        } else {
            Answer::Read(Box::new(Usage::of_document()))
        };
    }

    /// Bytes of the answer.
    pub fn passes(&mut self, data: &[u8]) {
        match &mut self.answer {
            Answer::Read(usage) => usage.push(data),
            Answer::Unread(bytes) => *bytes += data.len() as u64,
            Answer::NotCounted | Answer::Awaited | Answer::Refused => {}
        }
    }

    /// What was used, as far as is known. Whoever leaves before the answer begins has had his prompt worked on.
    fn used(&self) -> u64 {
        match &self.answer {
            Answer::NotCounted | Answer::Refused => 0,
            Answer::Awaited => self.prompt,
            Answer::Read(usage) => usage.tokens().unwrap_or_else(|| self.prompt + usage.events()),
            Answer::Unread(bytes) => self.prompt + bytes / BYTES_PER_TOKEN,
        }
    }

    /// The exchange is over.
    pub fn settle(&self, now: Duration) {
        let used = self.used();
        if used == 0 {
            return;
        }
        for (limit, at) in &self.places {
            let Some(pace) = &limit.tokens else { continue };
            limit.table.get(*at).tokens.debit(pace, used, now);
            limit.used.increment(used);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for (limit, at) in &self.places {
            limit.table.get(*at).leave();
        }
    }
}
