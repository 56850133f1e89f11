//! JSON as it streams by: a scanner that is fed piece by piece, keeps a few dozen bytes, and does not mind that the
//! document is not over.
//!
//! It finds structure, it does not judge: a document that is not JSON yields whatever it seems to say, and the server
//! behind refuses it. Nothing is held back and nothing is copied but keys and numbers.

/// What is told of a document, in its order. `depth` is how many arrays and objects are open around it.
pub(crate) trait Visit {
    /// A key of the object at `depth`; empty when it is longer than [`LONGEST`].
    fn key(&mut self, depth: u32, name: &[u8]);
    /// A piece of a string, its escapes resolved. A piece may end in the middle of a character.
    fn text(&mut self, depth: u32, piece: &[u8]);
    /// The string is over.
    fn text_end(&mut self, depth: u32);
    /// A number or a literal; cut after [`LONGEST`] bytes.
    fn scalar(&mut self, depth: u32, token: &[u8]);
    /// An array or object begins; `depth` counts it.
    fn open(&mut self, depth: u32) {
        let _ = depth;
    }
    /// An array or object ends; `depth` counts it.
    fn close(&mut self, depth: u32) {
        let _ = depth;
    }
}

/// The longest key or number that is told whole.
pub(crate) const LONGEST: usize = 48;

/// The deepest nesting that is followed; servers stop at 128 too (serde, and less in Python).
const DEEPEST: u32 = 128;

/// Where the scanner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between tokens.
    Between,
    /// In a string.
    Text,
    /// Behind a backslash.
    Escape,
    /// In the four digits of `\u`: how many are still to come.
    Unicode(u8),
    /// In a number or a literal.
    Scalar,
}

/// A document that is being read.
#[derive(Debug)]
pub(crate) struct Scan {
    state: State,
    depth: u32,
    /// For each level, whether it is an object; the innermost is the lowest bit.
    objects: u128,
    /// The next string is a key.
    key_next: bool,
    /// The string being read is a key.
    is_key: bool,
    held: [u8; LONGEST],
    length: usize,
    too_long: bool,
    /// The digits of `\u` so far.
    unit: u16,
    /// The first half of a surrogate pair.
    high: Option<u16>,
    over: bool,
}

impl Default for Scan {
    fn default() -> Self {
        Self {
            state: State::Between,
            depth: 0,
            objects: 0,
            key_next: false,
            is_key: false,
            held: [0; LONGEST],
            length: 0,
            too_long: false,
            unit: 0,
            high: None,
            over: false,
        }
    }
}

impl Scan {
    /// Whether the document has ended, or is none.
    pub(crate) fn over(&self) -> bool {
        self.over
    }

    /// Whether the value of a key of the outermost object is still open.
    pub(crate) fn inside_value(&self) -> bool {
        !self.over && (self.depth > 1 || (self.state != State::Between && !self.is_key))
    }

    /// Reads on.
    pub(crate) fn push(&mut self, mut bytes: &[u8], visit: &mut impl Visit) {
        while let Some(&byte) = bytes.first() {
            if self.over {
                return;
            }
            let used = match self.state {
                State::Between => self.between(byte, visit),
                State::Text => self.text(bytes, visit),
                State::Escape => {
                    self.escape(byte, visit);
                    1
                }
                State::Unicode(left) => self.unicode(byte, left, visit),
                State::Scalar => self.scalar(bytes, visit),
            };
            bytes = bytes.get(used..).unwrap_or_default();
        }
    }

    fn between(&mut self, byte: u8, visit: &mut impl Visit) -> usize {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {}
            b':' => self.key_next = false,
            b',' => self.key_next = self.objects & 1 == 1,
            b'{' | b'[' => {
                if self.depth == DEEPEST {
                    self.over = true;
                    return 1;
                }
                self.depth += 1;
                self.objects = self.objects << 1 | u128::from(byte == b'{');
                self.key_next = byte == b'{';
                visit.open(self.depth);
            }
            b'}' | b']' => {
                if self.depth > 0 {
                    visit.close(self.depth);
                    self.depth -= 1;
                }
                self.objects >>= 1;
                self.key_next = false;
                self.over = self.depth == 0;
            }
            b'"' => {
                self.is_key = self.key_next;
                self.hold_anew();
                self.state = State::Text;
            }
            _ => {
                self.is_key = false;
                self.hold_anew();
                self.state = State::Scalar;
                // Looked at again.
                return 0;
            }
        }
        1
    }

    fn text(&mut self, bytes: &[u8], visit: &mut impl Visit) -> usize {
        let end = bytes.iter().position(|byte| matches!(byte, b'"' | b'\\'));
        let piece = &bytes[..end.unwrap_or(bytes.len())];
        if !piece.is_empty() {
            self.half_alone(visit);
            self.put(piece, visit);
        }
        let Some(end) = end else { return bytes.len() };
        if bytes[end] == b'\\' {
            self.state = State::Escape;
        } else {
            self.half_alone(visit);
            self.state = State::Between;
            if self.is_key {
                let name = if self.too_long { &[] } else { &self.held[..self.length] };
                visit.key(self.depth, name);
                self.key_next = false;
            } else {
                visit.text_end(self.depth);
                self.over = self.depth == 0;
            }
        }
        end + 1
    }

    fn escape(&mut self, byte: u8, visit: &mut impl Visit) {
        self.state = State::Text;
        let meant = match byte {
            b'u' => {
                self.unit = 0;
                self.state = State::Unicode(4);
                return;
            }
            b'n' => b'\n',
            b't' => b'\t',
            b'r' => b'\r',
            b'b' => 8,
            b'f' => 12,
            other => other,
        };
        self.half_alone(visit);
        self.put(&[meant], visit);
    }

    fn unicode(&mut self, byte: u8, left: u8, visit: &mut impl Visit) -> usize {
        let Some(digit) = char::from(byte).to_digit(16) else {
            // No escape after all: the string goes on with this byte.
            self.state = State::Text;
            return 0;
        };
        self.unit = self.unit << 4 | digit as u16;
        if left > 1 {
            self.state = State::Unicode(left - 1);
            return 1;
        }
        self.state = State::Text;
        match (self.high.take(), self.unit) {
            (Some(high), low @ 0xdc00..0xe000) => self.put_char([high, low], visit),
            (before, unit) => {
                if let Some(high) = before {
                    self.put_char([high], visit);
                }
                match unit {
                    0xd800..0xdc00 => self.high = Some(unit),
                    unit => self.put_char([unit], visit),
                }
            }
        }
        1
    }

    /// A first half that no second half follows.
    fn half_alone(&mut self, visit: &mut impl Visit) {
        if let Some(high) = self.high.take() {
            self.put_char([high], visit);
        }
    }

    fn put_char<const N: usize>(&mut self, units: [u16; N], visit: &mut impl Visit) {
        for decoded in char::decode_utf16(units) {
            let mut utf8 = [0; 4];
            let letter = decoded.unwrap_or(char::REPLACEMENT_CHARACTER);
            self.put(letter.encode_utf8(&mut utf8).as_bytes(), visit);
        }
    }

    fn put(&mut self, piece: &[u8], visit: &mut impl Visit) {
        if self.is_key { self.hold(piece) } else { visit.text(self.depth, piece) }
    }

    fn scalar(&mut self, bytes: &[u8], visit: &mut impl Visit) -> usize {
        let delimiter = |byte: &u8| {
            matches!(byte, b',' | b']' | b'}' | b':' | b'[' | b'{' | b'"' | b' ' | b'\t' | b'\r' | b'\n')
        };
        let Some(end) = bytes.iter().position(delimiter) else {
            self.hold(bytes);
            return bytes.len();
        };
        self.hold(&bytes[..end]);
        self.state = State::Between;
        visit.scalar(self.depth, &self.held[..self.length]);
        self.over = self.depth == 0;
        end
    }

    fn hold_anew(&mut self) {
        (self.length, self.too_long) = (0, false);
    }

    fn hold(&mut self, piece: &[u8]) {
        let room = LONGEST - self.length;
        let kept = &piece[..piece.len().min(room)];
        self.held[self.length..self.length + kept.len()].copy_from_slice(kept);
        self.length += kept.len();
        self.too_long |= kept.len() < piece.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    /// Writes down what it is told.
    #[derive(Default, Debug, PartialEq)]
    struct Notes {
        lines: Vec<String>,
        text: Vec<u8>,
    }

    impl Visit for Notes {
        fn key(&mut self, depth: u32, name: &[u8]) {
            self.lines.push(format!("{depth} key {}", String::from_utf8_lossy(name)));
        }
        fn text(&mut self, _: u32, piece: &[u8]) {
            self.text.extend_from_slice(piece);
        }
        fn text_end(&mut self, depth: u32) {
            let text = std::mem::take(&mut self.text);
            self.lines.push(format!("{depth} text {}", String::from_utf8_lossy(&text)));
        }
        fn scalar(&mut self, depth: u32, token: &[u8]) {
            self.lines.push(format!("{depth} scalar {}", String::from_utf8_lossy(token)));
        }
        fn open(&mut self, depth: u32) {
            self.lines.push(format!("{depth} open"));
        }
        fn close(&mut self, depth: u32) {
            self.lines.push(format!("{depth} close"));
        }
    }

    fn notes(pieces: &[&[u8]]) -> (Vec<String>, bool) {
        let (mut scan, mut notes) = (Scan::default(), Notes::default());
        pieces.iter().for_each(|piece| scan.push(piece, &mut notes));
        (notes.lines, scan.over())
    }

    #[test]
    fn a_document_is_told_in_its_order() {
        let (lines, over) =
            notes(&[br#" {"a": [1, -2.5e3,"x\n\u00fc\ud83d\ude00"], "b\"": {"c": true}} junk"#]);
        let expected = [
            "1 open",
            "1 key a",
            "2 open",
            "2 scalar 1",
            "2 scalar -2.5e3",
            "2 text x\nü😀",
            "2 close",
            "1 key b\"",
            "2 open",
            "2 key c",
            "2 scalar true",
            "2 close",
            "1 close",
        ];
        assert_eq!(lines, expected);
        assert!(over);
    }

    #[test]
    fn halves_of_surrogates_and_broken_escapes_are_borne() {
        let text = |json: &str| notes(&[json.as_bytes()]).0.join(" ");
        assert_eq!(text(r#"["\ud83dx"]"#), "1 open 1 text \u{fffd}x 1 close");
        assert_eq!(text(r#"["\ud83d"]"#), "1 open 1 text \u{fffd} 1 close");
        assert_eq!(text(r#"["\ud83d\ud83d\ude00"]"#), "1 open 1 text \u{fffd}😀 1 close");
        assert_eq!(text(r#"["\ude00\n"]"#), "1 open 1 text \u{fffd}\n 1 close");
        assert_eq!(text(r#"["\u12x"]"#), "1 open 1 text x 1 close");
        assert_eq!(text(r#"["\u12"]"#), "1 open 1 text  1 close");
    }

    #[test]
    fn what_is_not_over_is_told_up_to_there_and_a_cut_number_is_not_told() {
        let (lines, over) = notes(&[br#"{"a": [12, 34"#]);
        assert_eq!(lines.last().unwrap(), "2 scalar 12");
        assert!(!over);
        let mut scan = Scan::default();
        for (piece, inside) in [
            (&b"{\"a"[..], false),
            (b"\":", false),
            (b" \"x", true),
            (b"\"", false),
            (b",\"b\":[1", true),
            (b"]", false),
        ] {
            scan.push(piece, &mut Notes::default());
            assert_eq!(scan.inside_value(), inside, "{piece:?}");
        }
    }

    #[test]
    fn nesting_without_end_ends() {
        let (lines, over) = notes(&["[".repeat(1000).as_bytes()]);
        assert!(over && lines.len() == DEEPEST as usize);
        let long = format!("{{\"{}\":1}}", "k".repeat(1000));
        assert_eq!(notes(&[long.as_bytes()]).0[1], "1 key ");
    }

    fn strings(value: &Value, out: &mut Vec<String>) {
        match value {
            Value::String(text) => out.push(text.clone()),
            Value::Array(list) => list.iter().for_each(|value| strings(value, out)),
            Value::Object(map) => map.values().for_each(|value| strings(value, out)),
            _ => {}
        }
    }

    fn documents() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,20}".prop_map(Value::from),
            Just(Value::Null),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(".{0,8}", inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn strings_are_what_a_parser_reads(document in documents(), ascii in any::<bool>()) {
            let mut json = document.to_string();
            if ascii {
                // Everything beyond ASCII as escapes, as Python writes it.
                json = json.encode_utf16().map(|unit| match u8::try_from(unit) {
                    Ok(byte) if byte.is_ascii() => char::from(byte).to_string(),
                    _ => format!("\\u{unit:04x}"),
                }).collect();
            }
            let mut expected = Vec::new();
            strings(&document, &mut expected);
            let told: Vec<_> = notes(&[json.as_bytes()]).0.into_iter()
                .filter_map(|line| line.split_once(" text ").map(|(_, text)| text.to_owned())
                    .filter(|_| line.split(' ').nth(1) == Some("text")))
                .collect();
            prop_assert_eq!(told, expected);
        }

        #[test]
        fn it_does_not_matter_where_it_is_cut(document in documents(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5)) {
            let json = document.to_string();
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(json.len() + 1)).collect();
            cuts.sort_unstable();
            let mut pieces = Vec::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([json.len()]) {
                pieces.push(&json.as_bytes()[from..cut]);
                from = cut;
            }
            prop_assert_eq!(notes(&pieces), notes(&[json.as_bytes()]));
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(prop::sample::select(&b"{}[]\",:\\u0dD8a1e- \n\xff\xc3t"[..]), 0..300)) {
            notes(&[&bytes]);
        }
    }
}
