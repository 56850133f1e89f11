//! What an answer says that it used.
//!
//! In: the bytes of an answer as they pass, whole JSON or a stream of events (SSE). Out: the tokens of its `usage`, prompt and
//! completion, and how many events a stream had, for servers that say nothing of usage in it. Nothing is kept of the answer.

use crate::scan::{Scan, Visit};

/// Reads one answer.
#[derive(Debug, Default)]
pub struct Usage {
    scan: Scan,
    form: Form,
    /// Of a stream, where in its lines; `None`: the answer is one document.
    line: Option<Line>,
    /// Whether the data of the current event are a document; `None`: they have not begun.
    document: Option<bool>,
    events: u64,
}

/// Where in a line of a stream.
#[derive(Clone, Copy, Debug)]
enum Line {
    /// So many bytes of [`DATA`] have come.
    Begins(usize),
    /// In the data of an event.
    Data,
    /// In something else.
    Other,
}

const DATA: &[u8] = b"data:";

impl Usage {
    /// Of an answer that is one document.
    pub fn of_document() -> Self {
        Self::default()
    }

    /// Of a stream of events.
    pub fn of_stream() -> Self {
        Self { line: Some(Line::Begins(0)), ..Self::default() }
    }

    /// The next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        match self.line {
            None => self.scan.push(bytes, &mut self.form),
            Some(line) => self.line = Some(self.lines(line, bytes)),
        }
    }

    /// The tokens that were used, as far as it has been said. Where a stream says it again and again, the most of it.
    pub fn tokens(&self) -> Option<u64> {
        self.form.said
    }

    /// Events with a document so far: about a token each.
    pub fn events(&self) -> u64 {
        self.events
    }

    fn lines(&mut self, mut line: Line, mut bytes: &[u8]) -> Line {
        while let Some(&byte) = bytes.first() {
            let mut used = 1;
            line = match line {
                Line::Begins(0) if byte == b'\n' => {
                    // An empty line ends the event.
                    self.next_document();
                    Line::Begins(0)
                }
                Line::Begins(0) if byte == b'\r' => Line::Begins(0),
                Line::Begins(at) if DATA.get(at) == Some(&byte) => match at + 1 == DATA.len() {
                    true => {
                        if self.scan.over() {
                            self.next_document();
                        }
                        Line::Data
                    }
                    false => Line::Begins(at + 1),
                },
                Line::Begins(_) => {
                    used = 0;
                    Line::Other
                }
                Line::Data | Line::Other => {
                    let end = bytes.iter().position(|byte| *byte == b'\n');
                    used = end.map_or(bytes.len(), |end| end + 1);
                    if let (Line::Data, Some(piece)) = (line, bytes.get(..used)) {
                        self.data(piece);
                    }
                    if end.is_some() { Line::Begins(0) } else { line }
                }
            };
            bytes = bytes.get(used..).unwrap_or_default();
        }
        line
    }

    fn data(&mut self, piece: &[u8]) {
        if self.document.is_none() {
            // `[DONE]` is the end, and no document.
            self.document = piece.iter().find(|byte| !byte.is_ascii_whitespace()).map(|byte| *byte == b'{');
            self.events += u64::from(self.document == Some(true));
        }
        if self.document == Some(true) {
            self.scan.push(piece, &mut self.form);
        }
    }

    fn next_document(&mut self) {
        self.document = None;
        self.scan = Scan::default();
        self.form = Form { said: self.form.said, ..Form::default() };
    }
}

/// Which number of a `usage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Field {
    Prompt,
    Completion,
    Total,
    #[default]
    Other,
}

/// What a document has said so far.
#[derive(Debug, Default)]
struct Form {
    /// The outermost key is `response`, in which events of the Responses API have all of it.
    in_response: bool,
    /// How deep the fields of the `usage` that is open lie; 0: none is.
    fields_at: u32,
    field: Field,
    prompt: Option<u64>,
    completion: Option<u64>,
    total: Option<u64>,
    said: Option<u64>,
}

impl Visit for Form {
    fn key(&mut self, depth: u32, name: &[u8]) {
        if depth == 1 || depth == 2 && self.in_response {
            self.fields_at = if name == b"usage" { depth + 1 } else { 0 };
        }
        if depth == 1 {
            self.in_response = name == b"response";
        }
        self.field = match name {
            _ if self.fields_at != depth => Field::Other,
            b"prompt_tokens" | b"input_tokens" => Field::Prompt,
            b"completion_tokens" | b"output_tokens" => Field::Completion,
            b"total_tokens" => Field::Total,
            _ => Field::Other,
        };
    }

    fn text(&mut self, _: u32, _: &[u8]) {}

    fn text_end(&mut self, _: u32) {}

    fn scalar(&mut self, depth: u32, token: &[u8]) {
        if depth != self.fields_at {
            return;
        }
        let number = std::str::from_utf8(token).ok().and_then(|text| text.parse().ok());
        match self.field {
            Field::Prompt => self.prompt = number,
            Field::Completion => self.completion = number,
            Field::Total => self.total = number,
            Field::Other => {}
        }
    }

    fn close(&mut self, depth: u32) {
        if depth != self.fields_at {
            return;
        }
        self.fields_at = 0;
        let (prompt, completion) = (self.prompt.take(), self.completion.take());
        let sum = match (prompt, completion) {
            (None, None) => self.total,
            (prompt, completion) => Some(prompt.unwrap_or(0).saturating_add(completion.unwrap_or(0))),
        };
        self.total = None;
        self.said = self.said.max(sum);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn document(text: &str) -> Option<u64> {
        let mut usage = Usage::of_document();
        usage.push(text.as_bytes());
        usage.tokens()
    }

    fn stream(text: &str) -> (Option<u64>, u64) {
        let mut usage = Usage::of_stream();
        usage.push(text.as_bytes());
        (usage.tokens(), usage.events())
    }

    #[test]
    fn a_document_says_what_was_used() {
        let table = [
            (r#"{"id":"1","usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}}"#, Some(12)),
            (r#"{"usage":{"prompt_tokens":5,"total_tokens":5},"data":[]}"#, Some(5)),
            (
                r#"{"usage":{"input_tokens":5,"input_tokens_details":{"cached_tokens":3},"output_tokens":2}}"#,
                Some(7),
            ),
            (r#"{"usage":{"total_tokens":9}}"#, Some(9)),
            (r#"{"usage":null}"#, None),
            (r#"{"usage":{"prompt_tokens":"5"}}"#, None),
            (r#"{"choices":[{"message":{"content":"{\"usage\":{\"total_tokens\":99}}"}}]}"#, None),
            (r#"{"choices":[{"usage":{"total_tokens":99}}]}"#, None),
            (r#"{"usage":{"prompt_tokens_details":{"prompt_tokens":8}}}"#, None),
            (r#"{"usage":{"prompt_tokens":5"#, None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(document(text), expected, "{text}");
        }
    }

    const STREAM: &str = "\
: a comment\r\n\
data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":null}\r\n\
\r\n\
event: message\n\
data:{\"choices\":[{\"delta\":{\"content\":\"data: b\"}}]}\n\
\n\
data: {\"choices\":[],\n\
data: \"usage\":{\"prompt_tokens\":4,\"completion_tokens\":2}}\n\
\n\
data: [DONE]\n\
\n";

    #[test]
    fn a_stream_says_it_at_its_end_and_its_events_are_counted() {
        assert_eq!(stream(STREAM), (Some(6), 3));
        let silent: String = STREAM.split_inclusive('\n').take(6).collect();
        assert_eq!(stream(&silent), (None, 2));
        let again = "data: {\"usage\":{\"total_tokens\":3}}\n\ndata: {\"usage\":{\"total_tokens\":5}}\n\n";
        assert_eq!(stream(again), (Some(5), 2));
        let responses = "event: response.created\ndata: {\"response\":{\"usage\":null}}\n\n\
                         event: response.completed\ndata: {\"type\":\"x\",\"response\":{\"output\":[{\"usage\":{\"total_tokens\":1}}],\
                         \"usage\":{\"input_tokens\":3,\"output_tokens\":4,\"total_tokens\":7}}}\n\n";
        assert_eq!(stream(responses), (Some(7), 2));
    }

    const WORDS: [&str; 16] = [
        "data:",
        "data: ",
        "\n",
        "\r\n",
        "\n\n",
        "{",
        "}",
        "[",
        "]",
        ",",
        "x",
        "7",
        "\"usage\":",
        "\"response\":",
        "\"total_tokens\":",
        "\"\\u0075",
    ];

    proptest! {
        #[test]
        fn it_does_not_matter_where_it_is_cut(cuts in prop::collection::vec(0..STREAM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let mut usage = Usage::of_stream();
            let mut from = 0;
            for cut in cuts.into_iter().chain([STREAM.len()]) {
                usage.push(&STREAM.as_bytes()[from..cut]);
                from = cut;
            }
            prop_assert_eq!((usage.tokens(), usage.events()), (Some(6), 3));
        }

        #[test]
        fn garbage_is_borne(
            words in prop::collection::vec(prop::sample::select(&WORDS[..]), 0..60),
            piece in 1_usize..20,
        ) {
            let text = words.concat();
            for usage in [Usage::of_document, Usage::of_stream] {
                let (mut whole, mut cut) = (usage(), usage());
                whole.push(text.as_bytes());
                text.as_bytes().chunks(piece).for_each(|piece| cut.push(piece));
                prop_assert_eq!((whole.tokens(), whole.events()), (cut.tokens(), cut.events()));
            }
        }
    }
}
