//! A request in JSON, in the one form that all have who ask the same.
//!
//! In: a body. Out: a [`Document`], or nothing where it is not a JSON object, or where readers of JSON differ about what
//! it says: an object that names a member twice is read by its first by some and by its last by others, so that an answer to
//! the one would be kept as an answer to the other.
//!
//! The form: no spaces; the members of each object in the order of their names' bytes; strings with as few escapes as can
//! be; numbers as they were written, since a number read as a double and written again may be another one's. So `1` and
//! `1.0` are not the same, which costs an execution and never a wrong answer. Each element and each member is followed by
//! a comma, the last one too.

use serde_json::value::RawValue;

/// Objects and arrays within each other at most; the walk through them takes stack.
const MAX_DEPTH: usize = 128;

/// A JSON object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    form: Vec<u8>,
    deterministic: bool,
}

impl Document {
    /// Reads a body.
    pub fn read(body: &[u8]) -> Option<Self> {
        // What is no JSON ends here; what comes after need not look for it.
        let text = serde_json::from_slice::<&RawValue>(body).ok()?.get();
        let mut walk = Walk { text, out: Vec::with_capacity(body.len()), depth: 0 };
        if !walk.text.starts_with('{') {
            return None;
        }
        let members = walk.object()?;
        let value = |name: &str| {
            let found = members.iter().find(|member| member.name(&walk.out) == name.as_bytes());
            found.and_then(|member| std::str::from_utf8(member.value(&walk.out)).ok())
        };
        let number = |name: &str| value(name).and_then(|text| text.parse::<f64>().ok());
        let fixed = number("temperature") == Some(0.0) || number("seed").is_some();
        let leaves_a_trace = value("store") == Some("true")
            || value("background") == Some("true")
            || value("conversation").is_some_and(|text| text != "null");
        let deterministic = fixed && !leaves_a_trace;
        Some(Self { form: walk.out, deterministic })
    }

    /// The one form.
    pub fn form(&self) -> &[u8] {
        &self.form
    }

    /// Whether a request to a language model fixes its own outcome (temperature 0, or a seed), and has no other effect than
    /// its answer: one that is to be stored, or to go on with a conversation, would be missing there. Embeddings have no
    /// temperature; whether they are deterministic is for the configuration to say.
    pub fn is_deterministic(&self) -> bool {
        self.deterministic
    }
}

/// Where a member stands in what was written: `"name":value,`.
#[derive(Clone, Copy, Debug)]
struct Member {
    begin: usize,
    colon: usize,
    end: usize,
}

impl Member {
    /// Without quotes, but with escapes.
    fn name(self, out: &[u8]) -> &[u8] {
        out.get(self.begin + 1..self.colon - 1).unwrap_or_default()
    }

    fn value(self, out: &[u8]) -> &[u8] {
        out.get(self.colon + 1..self.end - 1).unwrap_or_default()
    }
}

struct Walk<'a> {
    text: &'a str,
    out: Vec<u8>,
    depth: usize,
}

impl Walk<'_> {
    fn space(&mut self) {
        self.text = self.text.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    /// Whether this comes next; if so, it is behind us.
    fn skip(&mut self, mark: char) -> bool {
        self.space();
        let rest = self.text.strip_prefix(mark);
        self.text = rest.unwrap_or(self.text);
        rest.is_some()
    }

    fn value(&mut self) -> Option<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        self.space();
        match self.text.bytes().next()? {
            b'{' => drop(self.object()?),
            b'[' => self.array()?,
            b'"' => self.string()?,
            _ => {
                let end = self.text.find([',', ']', '}', ' ', '\t', '\n', '\r']).unwrap_or(self.text.len());
                self.out.extend_from_slice(self.text.get(..end)?.as_bytes());
                self.text = self.text.get(end..)?;
            }
        }
        self.depth -= 1;
        Some(())
    }

    fn array(&mut self) -> Option<()> {
        self.skip('[');
        self.out.push(b'[');
        while !self.skip(']') {
            self.value()?;
            self.out.push(b',');
            self.skip(',');
        }
        self.out.push(b']');
        Some(())
    }

    fn object(&mut self) -> Option<Vec<Member>> {
        self.skip('{');
        self.out.push(b'{');
        let first = self.out.len();
        let mut members = Vec::new();
        while !self.skip('}') {
            let begin = self.out.len();
            self.string()?;
            let colon = self.out.len();
            self.skip(':');
            self.out.push(b':');
            self.value()?;
            self.out.push(b',');
            self.skip(',');
            members.push(Member { begin, colon, end: self.out.len() });
        }
        let out = &self.out;
        if !members.is_sorted_by(|a, b| a.name(out) < b.name(out)) {
            members.sort_by(|a, b| a.name(out).cmp(b.name(out)));
            if members.windows(2).any(|pair| pair[0].name(out) == pair[1].name(out)) {
                return None;
            }
            let written = self.out.split_off(first);
            for member in &mut members {
                let begin = self.out.len();
                let (from, to) = (member.begin - first, member.end - first);
                self.out.extend_from_slice(written.get(from..to)?);
                let moved = |at: usize| at - member.begin + begin;
                *member = Member { begin, colon: moved(member.colon), end: moved(member.end) };
            }
        }
        self.out.push(b'}');
        Some(members)
    }

    fn string(&mut self) -> Option<()> {
        let (mut escaped, mut escapes) = (false, false);
        let end = self.text.bytes().skip(1).position(|byte| {
            let closes = byte == b'"' && !escaped;
            escapes |= byte == b'\\';
            escaped = byte == b'\\' && !escaped;
            closes
        })?;
        let (string, rest) = self.text.split_at_checked(end + 2)?;
        self.text = rest;
        if escapes {
            let said: String = serde_json::from_str(string).ok()?;
            serde_json::to_writer(&mut self.out, &said).ok()?;
        } else {
            self.out.extend_from_slice(string.as_bytes());
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn form(text: &str) -> Option<String> {
        Document::read(text.as_bytes()).map(|document| String::from_utf8(document.form).unwrap())
    }

    #[test]
    fn order_spaces_and_escapes_make_no_difference() {
        let form_of = form("{\"b\" : [1, {\"d\":2,\n\"c\":\"\\u00fc\\/\"}], \"a\":\t1.0 }").unwrap();
        assert_eq!(form_of, r#"{"a":1.0,"b":[1,{"c":"ü/","d":2,},],}"#);
        assert_eq!(form("{}").unwrap(), "{}");
        assert_eq!(form(r#"{"a":[],"b":{},"c":""}"#).unwrap(), r#"{"a":[],"b":{},"c":"",}"#);
        assert_eq!(form(r#"{"\u0061":1}"#), form(r#"{"a":1}"#));
        assert_eq!(form(r#"{"a":"\"\\\u0001"}"#).unwrap(), r#"{"a":"\"\\\u0001",}"#);
    }

    #[test]
    fn numbers_are_what_was_written() {
        let large =
            ["18446744073709551617", "18446744073709551618", "1.8446744073709552e19", "1", "1.0", "1e0"];
        let forms: std::collections::BTreeSet<_> =
            large.iter().map(|number| form(&format!("{{\"seed\":{number}}}")).unwrap()).collect();
        assert_eq!(forms.len(), large.len());
    }

    #[test]
    fn what_readers_of_json_differ_about_is_not_read() {
        for text in [
            r#"{"prompt":"one","prompt":"other"}"#,
            r#"{"prompt":"one","a":1,"prompt":"one"}"#,
            r#"{"a":{"b":1,"\u0062":2}}"#,
            r#"{"a":[{"b":1,"b":1}]}"#,
            "[1]",
            "1",
            "",
            "{",
            "{}{}",
            r#"{"a":1,}"#,
            r#"{"a":"\ud800"}"#,
        ] {
            assert_eq!(form(text), None, "{text}");
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(200_000), "]".repeat(200_000));
        assert_eq!(form(&deep), None);
        assert_eq!(Document::read(b"{\"a\":\"\xff\"}"), None);
    }

    #[test]
    fn a_fixed_outcome_without_a_trace_is_deterministic() {
        let of = |text: &str| Document::read(text.as_bytes()).unwrap().is_deterministic();
        for fixed in [
            r#"{"temperature":0}"#,
            r#"{"messages":[{"temperature":1}],"temperature":0.0,"n":3,"logprobs":true}"#,
            r#"{"seed":7,"temperature":1}"#,
            r#"{"z":1,"seed":18446744073709551617,"a":2}"#,
            r#"{"temperature":0,"store":false,"conversation":null}"#,
        ] {
            assert!(of(fixed), "{fixed}");
        }
        for not in [
            "{}",
            r#"{"temperature":1}"#,
            r#"{"temperature":"0"}"#,
            r#"{"seed":null}"#,
            r#"{"x":{"temperature":0}}"#,
            r#"{"temperature":0,"store":true}"#,
            r#"{"seed":1,"conversation":"c"}"#,
            r#"{"seed":1,"background":true}"#,
        ] {
            assert!(!of(not), "{not}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::hash_map(".{0,4}", inner, 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    /// Written with the members of objects the other way round, spaces, and every character escaped.
    fn backwards(value: &Value, out: &mut String) {
        let string = |text: &str, out: &mut String| {
            out.push('"');
            text.encode_utf16().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            out.push('"');
        };
        match value {
            Value::Object(members) => {
                out.push_str("{ ");
                for (at, (name, value)) in members.iter().rev().enumerate() {
                    out.push_str(if at > 0 { " , " } else { "\n" });
                    string(name, out);
                    out.push_str(" :\t");
                    backwards(value, out);
                }
                out.push_str("\r}");
            }
            Value::Array(elements) => {
                out.push('[');
                for (at, value) in elements.iter().enumerate() {
                    out.push_str(if at > 0 { " ,\n" } else { " " });
                    backwards(value, out);
                }
                out.push_str(" ]");
            }
            Value::String(text) => string(text, out),
            other => out.push_str(&other.to_string()),
        }
    }

    proptest! {
        #[test]
        fn the_same_has_the_same_form_and_nothing_else_has(one in value(), other in value()) {
            let (one, other) = (serde_json::json!({"a": one, "b": 1}), serde_json::json!({"a": other, "b": 1}));
            let mut text = String::new();
            backwards(&one, &mut text);
            let form_of = form(&one.to_string());
            prop_assert!(form_of.is_some());
            prop_assert_eq!(&form(&text), &form_of);
            prop_assert_eq!(form(&other.to_string()) == form_of, one == other);
        }

        #[test]
        fn garbage_never_panics(text in r#"[{}\[\]",:a0\\u \n]{0,40}"#, bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = Document::read(text.as_bytes());
            let _ = Document::read(&bytes);
        }
    }
}
