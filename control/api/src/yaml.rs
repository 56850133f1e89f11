//! YAML that remembers its lines.
//!
//! In: text with any number of documents. Out: one tree a document, in which every key and value knows the line it
//! stands on, so that a complaint about a field can point at it. Can go wrong: the text is no YAML; the error names
//! the line.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

/// A value and the line it starts on.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// From 1. For a mapping's value: the line of its key.
    pub line: usize,
    /// What stands there.
    pub content: Content,
}

/// What stands at a [`Node`].
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Null, a boolean, a number or a string.
    Scalar(Value),
    /// `- a`
    List(Vec<Node>),
    /// `a: b`, in the order of the file.
    Map(Vec<(String, Node)>),
}

/// Why a text is no YAML.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SyntaxError {
    /// From 1; 0 when unknown.
    pub line: usize,
    /// The parser's words.
    pub message: String,
}

/// Reads all documents of `text`; empty ones are skipped.
pub fn parse(text: &str) -> Result<Vec<Node>, SyntaxError> {
    // The default budgets stop alias bombs but also a file with a thousand pods; what comes from the operator's own
    // directory may be long, only not bottomless.
    let options = serde_saphyr::options! {
        with_snippet: false,
        // As Kubernetes reads it (YAML 1.1): `defaultMode: 0440` is how everybody writes it.
        legacy_octal_numbers: true,
        budget: serde_saphyr::budget! {
            max_documents: 1_000_000,
            max_aliases: 1_024,
            max_nodes: 50_000_000,
            max_events: 100_000_000,
            max_total_scalar_bytes: 1 << 30,
        },
        // What is said once and meant again costs its writer three bytes, and us all that was said.
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 65_536 },
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| SyntaxError {
        line: error.location().map_or(0, |location| line_number(location.line())),
        message: error.without_snippet().to_string(),
    })
}

impl Node {
    /// The value of a key, if this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, node)| node),
            Content::Scalar(_) | Content::List(_) => None,
        }
    }

    /// The text, if this is a string.
    pub fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The line of what a JSON pointer (RFC 6901) names, or of the nearest thing around it that exists.
    pub fn line_of(&self, pointer: &str) -> usize {
        let mut node = self;
        for step in pointer.split('/').skip(1) {
            let step = step.replace("~1", "/").replace("~0", "~");
            let next = match &node.content {
                Content::Map(_) => node.get(&step),
                Content::List(items) => step.parse::<usize>().ok().and_then(|index| items.get(index)),
                Content::Scalar(_) => None,
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        node.line
    }

    /// The same without lines.
    pub fn to_json(&self) -> Value {
        match &self.content {
            Content::Scalar(value) => value.clone(),
            Content::List(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            Content::Map(entries) => {
                Value::Object(entries.iter().map(|(key, node)| (key.clone(), node.to_json())).collect())
            }
        }
    }
}

fn line_number(line: u64) -> usize {
    usize::try_from(line).unwrap_or(usize::MAX)
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value: content, referenced, .. } = Spanned::<Content>::deserialize(deserializer)?;
        Ok(Self { line: line_number(referenced.line()), content })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Scalar(Value::Null))
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Content, E> {
        self.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        Content::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Scalar(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Content, E> {
        let number = serde_json::Number::from_f64(value)
            .ok_or_else(|| E::custom("numbers must be finite; write a string in quotes"))?;
        Ok(Content::Scalar(Value::Number(number)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Scalar(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Content, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Content::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Content, A::Error> {
        let mut map: Vec<(String, Node)> = Vec::new();
        while let Some(key) = entries.next_key::<Spanned<String>>()? {
            let mut node: Node = entries.next_value()?;
            node.line = line_number(key.referenced.line());
            if key.value.is_empty() {
                return Err(A::Error::custom("a key is empty"));
            }
            map.push((key.value, node));
        }
        Ok(Content::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_knows_its_line() {
        let text = "\
# a comment
kind: Service
metadata:
  name: resnet
  annotations:
    penstock.io/retry: attempts=2
spec:
  ports:
    - name: http
      port: 80
    - {name: grpc, port: 81}
---
kind: Pod
";
        let documents = parse(text).unwrap();
        assert_eq!(documents.len(), 2);
        let table = [
            ("", 2),
            ("/kind", 2),
            ("/metadata/name", 4),
            ("/metadata/annotations/penstock.io~1retry", 6),
            ("/spec/ports/0/port", 10),
            ("/spec/ports/1/name", 11),
            ("/spec/ports/1/nodePort", 11),
            ("/spec/selector/app", 7),
        ];
        for (pointer, line) in table {
            assert_eq!(documents[0].line_of(pointer), line, "{pointer}");
        }
        assert_eq!(documents[1].line_of(""), 13);
        assert_eq!(documents[0].to_json()["spec"]["ports"][1]["port"], 81);
    }

    #[test]
    fn what_is_no_yaml_is_refused_with_its_line() {
        let table = [("a: 1\nb: [1, 2\n", 2..=3), ("a: 1\n\tb: 2\n", 1..=2), ("a: 1\na: 2\n", 2..=2)];
        for (text, lines) in table {
            let error = parse(text).unwrap_err();
            assert!(lines.contains(&error.line), "{text:?}: {error:?}");
        }
    }

    #[test]
    fn a_number_that_begins_with_nought_is_octal_as_kubernetes_reads_it() {
        let nodes = parse("mode: 0440\nnewer: 0o440\nport: 8000\nzero: 0\nquoted: '0440'\n").unwrap();
        let of = |key: &str| match &nodes[0].get(key).unwrap().content {
            Content::Scalar(value) => value.clone(),
            other => panic!("{other:?}"),
        };
        for key in ["mode", "newer"] {
            assert_eq!(of(key), 0o440, "{key}");
        }
        assert_eq!((of("port"), of("zero"), of("quoted")), (8000.into(), 0.into(), "0440".into()));
    }

    #[test]
    fn what_is_said_once_is_not_meant_any_number_of_times() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x]\n");
        for at in 1..12 {
            let before = format!("*a{}", at - 1);
            bomb.push_str(&format!("a{at}: &a{at} [{}]\n", [&before[..]; 8].join(", ")));
        }
        let error = parse(&bomb).unwrap_err();
        assert!(error.to_string().contains("alias"), "{error}");
        let fair = "limits: &limits {cpu: 1}\none: *limits\ntwo: *limits\n";
        assert_eq!(parse(fair).unwrap()[0].to_json()["two"]["cpu"], 1);
    }

    #[test]
    fn an_empty_text_has_no_documents() {
        for text in ["", "\n", "---\n", "# nothing\n---\n---\n"] {
            assert_eq!(parse(text).unwrap(), [], "{text:?}");
        }
    }
}
