//! From the scanner's tokens to an [`Ask`].

use super::blocks::{self, Blocks};
use super::{Api, Ask};
use crate::scan::{Scan, Visit};

/// Reads a body as it comes, up to a limit.
#[derive(Debug)]
pub struct Reader {
    scan: Scan,
    form: Form,
    left: usize,
}

impl Reader {
    /// For a request to `api`; looks at no more than `limit` bytes.
    pub fn new(api: Api, limit: usize) -> Self {
        Self { scan: Scan::default(), form: Form::new(api), left: limit }
    }

    /// The next bytes of the body. Returns whether more would be looked at.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        let bytes = &bytes[..bytes.len().min(self.left)];
        self.left -= bytes.len();
        self.form.ask.seen += bytes.len() as u64;
        self.scan.push(bytes, &mut self.form);
        self.left > 0 && !self.scan.over()
    }

    /// What was found.
    pub fn finish(self) -> Ask {
        let Self { scan, form, .. } = self;
        Ask {
            prompt_open: form.field == Field::Prompt && scan.inside_value(),
            complete: scan.over(),
            blocks: form.blocks.finish(),
            ..form.ask
        }
    }
}

/// What the value of an outermost key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Prompt,
    Model,
    Adapter,
    Stream,
    MaxTokens,
    Choices,
    User,
    Session,
    Previous,
    Other,
}

impl Field {
    fn of(api: Api, name: &[u8]) -> Self {
        match (name, api) {
            (b"messages", Api::Chat)
            | (b"prompt", Api::Completions)
            | (b"input", Api::Responses | Api::Embeddings)
            | (b"instructions", Api::Responses) => Self::Prompt,
            (b"model", _) => Self::Model,
            (b"lora_path" | b"adapter_id", _) => Self::Adapter,
            (b"stream", _) => Self::Stream,
            (b"max_tokens" | b"max_completion_tokens" | b"max_output_tokens", _) => Self::MaxTokens,
            (b"n", _) => Self::Choices,
            (b"user" | b"safety_identifier", _) => Self::User,
            (b"prompt_cache_key" | b"session_id" | b"conversation", _) => Self::Session,
            (b"previous_response_id", _) => Self::Previous,
            _ => Self::Other,
        }
    }
}

/// Keys whose text is an attachment or where it lies: not text that becomes tokens.
fn is_attachment(name: &[u8]) -> bool {
    matches!(name, b"url" | b"image_url" | b"data" | b"file_data" | b"file_url" | b"file_id")
}

/// The longest name that is kept. A longer one names no model; of a user or a session the beginning is enough.
const LONGEST_NAME: usize = 256;

/// What the document has said so far.
#[derive(Debug)]
struct Form {
    api: Api,
    field: Field,
    attachment: bool,
    /// A string that is kept, and whether it was longer.
    name: Vec<u8>,
    name_cut: bool,
    blocks: Blocks,
    ask: Ask,
}

impl Form {
    fn new(api: Api) -> Self {
        Self {
            api,
            field: Field::Other,
            attachment: false,
            name: Vec::new(),
            name_cut: false,
            blocks: Blocks::default(),
            ask: Ask::default(),
        }
    }

    /// How deep the string of a field may lie: adapters may come as a list, a conversation as an object.
    fn keeps(&self, depth: u32) -> bool {
        match self.field {
            Field::Model | Field::User | Field::Previous => depth == 1,
            Field::Adapter | Field::Session => depth <= 2,
            _ => false,
        }
    }
}

impl Visit for Form {
    fn key(&mut self, depth: u32, name: &[u8]) {
        if depth == 1 {
            self.field = Field::of(self.api, name);
        }
        self.attachment = is_attachment(name);
    }

    fn text(&mut self, depth: u32, piece: &[u8]) {
        if self.field == Field::Prompt {
            // The picture is part of what is the same or not, though not of the text.
            self.blocks.push(piece);
            if !self.attachment {
                self.ask.prompt_bytes += piece.len() as u64;
            }
        } else if self.keeps(depth) {
            let kept = piece.len().min(LONGEST_NAME - self.name.len());
            self.name.extend_from_slice(&piece[..kept]);
            self.name_cut |= kept < piece.len();
        }
    }

    fn text_end(&mut self, depth: u32) {
        if self.field == Field::Prompt {
            // So that "ab", "c" is not "a", "bc".
            self.blocks.push(&[0]);
            self.ask.attachments += u64::from(self.attachment);
            return;
        }
        if !self.keeps(depth) {
            return;
        }
        let name = std::mem::take(&mut self.name);
        let cut = std::mem::take(&mut self.name_cut);
        if name.is_empty() {
            return;
        }
        let hash = || Some(blocks::first(&blake3::hash(&name)));
        match self.field {
            Field::User => self.ask.user = hash(),
            Field::Session => self.ask.session = hash(),
            Field::Previous => self.ask.previous = hash(),
            Field::Model if !cut => self.ask.model = String::from_utf8(name).ok(),
            Field::Adapter if !cut && self.ask.adapter.is_none() => {
                self.ask.adapter = String::from_utf8(name).ok();
            }
            _ => {}
        }
    }

    fn scalar(&mut self, depth: u32, token: &[u8]) {
        let number = || std::str::from_utf8(token).ok()?.parse::<u64>().ok();
        match self.field {
            // A prompt as token ids.
            Field::Prompt if token.first().is_some_and(u8::is_ascii_digit) => {
                self.ask.prompt_ids += 1;
                self.blocks.push(token);
                self.blocks.push(b",");
            }
            Field::Stream if depth == 1 => self.ask.stream = Some(token == b"true"),
            Field::MaxTokens if depth == 1 => self.ask.max_tokens = number().or(self.ask.max_tokens),
            Field::Choices if depth == 1 => self.ask.choices = number().or(self.ask.choices),
            _ => {}
        }
    }
}
