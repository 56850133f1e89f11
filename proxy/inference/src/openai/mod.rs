//! OpenAI's API: what a request asks for, read out of the beginning of its body.
//!
//! In: the first bytes of a body, as they come. Out: an [`Ask`]: model, adapter, lengths, whose conversation it is, and
//! the prompt as a chain of block hashes. The body is never held back for more than has come, so everything is "as far
//! as was seen"; what comes later in the document is not told, and a client that sends the model behind a long prompt
//! (Python's does) is balanced without it.
//!
//! Tokens are estimated as bytes of text / 4. That is OpenAI's own rule of thumb for English; for code it is a little
//! low, for Chinese or Japanese (three bytes a character) about right. A tokenizer would cost milliseconds and one
//! vocabulary per model; the regression of the service's cost absorbs a constant factor.

mod blocks;
mod read;
mod usage;

pub use blocks::{BLOCK, MAX_BLOCKS};
pub use read::Reader;
pub use usage::Usage;

/// What is read of a body unless told otherwise: the leading blocks of a prompt, and what stands before it.
pub const PREFIX: usize = 64 << 10;

/// Bytes of text in a token, on average.
pub const BYTES_PER_TOKEN: u64 = 4;

/// What an image or another attachment costs in tokens. Models take between 85 and some 3,000 for one.
pub const TOKENS_PER_ATTACHMENT: u64 = 1000;

/// Which of the endpoints a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Api {
    /// `…/chat/completions`.
    Chat,
    /// `…/completions`.
    Completions,
    /// `…/responses`.
    Responses,
    /// `…/embeddings`.
    Embeddings,
}

impl Api {
    /// Which one a path leads to, wherever it is mounted; `None`: none of them.
    pub fn of_path(path: &str) -> Option<Self> {
        let path = path.split('?').next().unwrap_or_default().trim_end_matches('/');
        let (before, last) = path.rsplit_once('/')?;
        match last {
            "completions" if before.ends_with("/chat") => Some(Self::Chat),
            "completions" => Some(Self::Completions),
            "responses" => Some(Self::Responses),
            "embeddings" => Some(Self::Embeddings),
            _ => None,
        }
    }
}

/// What a request asks for, as far as was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ask {
    /// The model; vLLM takes the name of a LoRA adapter here too.
    pub model: Option<String>,
    /// The LoRA adapter, where it is named apart: `lora_path` (SGLang), `adapter_id` (TGI).
    pub adapter: Option<String>,
    /// Whether the answer shall be streamed.
    pub stream: Option<bool>,
    /// The most tokens of an answer.
    pub max_tokens: Option<u64>,
    /// How many answers.
    pub choices: Option<u64>,
    /// Hash of the user (`user`, `safety_identifier`).
    pub user: Option<u64>,
    /// Hash of what says which requests belong together: `prompt_cache_key`, `session_id`, `conversation`.
    pub session: Option<u64>,
    /// Hash of the answer that this one goes on from: `previous_response_id`.
    pub previous: Option<u64>,
    /// Bytes of the prompt's text.
    pub prompt_bytes: u64,
    /// Tokens of a prompt that came as token ids.
    pub prompt_ids: u64,
    /// Images, sounds and files.
    pub attachments: u64,
    /// Chained hashes of the prompt's leading blocks of [`BLOCK`] bytes.
    pub blocks: Vec<u64>,
    /// Bytes of the body that were looked at.
    pub seen: u64,
    /// The prompt was not over where the looking ended.
    pub prompt_open: bool,
    /// The document was seen to its end.
    pub complete: bool,
}

impl Ask {
    /// Reads the beginning of a body.
    pub fn read(api: Api, prefix: &[u8]) -> Self {
        let mut reader = Reader::new(api, prefix.len());
        reader.push(prefix);
        reader.finish()
    }

    /// An estimate of the prompt's tokens. `body`: the body's length, if the request says it; what is behind the part
    /// that was seen is prompt, if the prompt was still open there.
    pub fn prompt_tokens(&self, body: Option<u64>) -> u64 {
        let unseen = match body {
            Some(body) if self.prompt_open => body.saturating_sub(self.seen),
            _ => 0,
        };
        // Token ids are five digits and a comma.
        let (bytes, ids) = if self.prompt_ids > self.prompt_bytes { (0, unseen / 6) } else { (unseen, 0) };
        let text = self.prompt_bytes.saturating_add(bytes).div_ceil(BYTES_PER_TOKEN);
        let attachments = self.attachments.saturating_mul(TOKENS_PER_ATTACHMENT);
        text.saturating_add(self.prompt_ids + ids).saturating_add(attachments)
    }

    /// An estimate of the answer's tokens, from what answers of this model usually have. Embeddings have none.
    pub fn answer_tokens(&self, api: Api, usual: u64) -> u64 {
        if api == Api::Embeddings {
            return 0;
        }
        let each = self.max_tokens.map_or(usual, |most| most.min(usual));
        each.saturating_mul(self.choices.unwrap_or(1).max(1))
    }
}

#[cfg(test)]
mod tests;
