//! Metrics pages: what model servers and GPU exporters publish for Prometheus.
//!
//! In: a page in the text format, whole, of a size that the caller bounded. Out: a [`Reading`] of a model server, the
//! same whatever serves ([`server`]), its [`Rates`] when there are two, or the GPUs of a DCGM exporter ([`dcgm`]).
//!
//! Reading walks over the bytes: nothing is allocated for a line, and a line that cannot be read is skipped, so one odd
//! metric does not cost the others.

pub mod dcgm;
mod rates;
pub mod server;

pub use rates::Rates;
pub use server::{Kind, Lora, Reading};

/// One sample of a page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line<'a> {
    /// The metric's name; of a histogram with its suffix.
    pub name: &'a str,
    /// Its labels.
    pub labels: Labels<'a>,
    /// Its value.
    pub value: f64,
}

/// The labels of a sample, as they stand between the braces.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Labels<'a>(&'a str);

impl<'a> Labels<'a> {
    /// The value of a label, with its escapes as they are written.
    pub fn get(self, name: &str) -> Option<&'a str> {
        self.iter().find(|(label, _)| *label == name).map(|(_, value)| value)
    }

    /// All labels, up to the first that cannot be read.
    pub fn iter(self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (name, quoted) = rest.split_once('=')?;
            let quoted = quoted.trim_start().strip_prefix('"')?;
            let end = closing_quote(quoted)?;
            let (value, after) = quoted.split_at(end);
            rest = &after[1..];
            Some((name.trim_matches([',', ' ', '\t']), value))
        })
    }
}

/// Where a quoted text ends.
fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.bytes().position(|byte| {
        let closes = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        closes
    })
}

/// The samples of a page.
pub fn lines(page: &[u8]) -> impl Iterator<Item = Line<'_>> {
    page.split(|byte| *byte == b'\n').filter_map(|line| sample(std::str::from_utf8(line).ok()?))
}

/// The names that a page has, of samples and of metrics that are only announced (`# TYPE name …`).
pub fn names(page: &[u8]) -> impl Iterator<Item = &str> {
    page.split(|byte| *byte == b'\n').filter_map(|line| {
        let line = std::str::from_utf8(line).ok()?.trim_start();
        let line = match line.strip_prefix('#') {
            Some(comment) => comment.trim_start().strip_prefix("TYPE")?.trim_start(),
            None => line,
        };
        line.split([' ', '\t', '{', '\r']).next().filter(|name| !name.is_empty())
    })
}

/// `name{labels} value timestamp`, where labels and timestamp may be missing (text format 0.0.4; OpenMetrics adds
/// exemplars behind, which are not looked at).
fn sample(line: &str) -> Option<Line<'_>> {
    let line = line.trim_start();
    if line.starts_with('#') {
        return None;
    }
    let (name, rest) = line.split_at(line.find(['{', ' ', '\t'])?);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => rest.split_at(closing_brace(rest)?),
        None => ("", rest),
    };
    let value = rest.trim_start_matches('}').split_ascii_whitespace().next()?.parse().ok()?;
    Some(Line { name, labels: Labels(labels), value }).filter(|line| !line.name.is_empty())
}

/// The end of the labels; a brace inside a quoted value is not it.
fn closing_brace(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    text.bytes().position(|byte| {
        if byte == b'"' && !escaped {
            quoted = !quoted;
        }
        escaped = byte == b'\\' && !escaped;
        byte == b'}' && !quoted
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_is_read_in_every_form_it_comes_in() {
        for (text, name, value) in [
            ("up 1", "up", 1.0),
            ("  up\t1 1700000000000\r", "up", 1.0),
            ("vllm:num_requests_waiting{engine=\"0\"} 2.0", "vllm:num_requests_waiting", 2.0),
            ("a{} 3e-3", "a", 0.003),
            ("a{b=\"}\\\" {\",c=\"d\",} 4", "a", 4.0),
            ("a_bucket{le=\"+Inf\"} +Inf # {trace_id=\"x\"} 0.5 1.0", "a_bucket", f64::INFINITY),
        ] {
            let line = sample(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!((line.name, line.value), (name, value), "{text}");
        }
        for text in ["", "# HELP a b", "a", "a{", "a{b=\"c} 1", "{} 1", "a b", "a{b=\"c\"}"] {
            assert_eq!(sample(text), None, "{text}");
        }
    }

    #[test]
    fn labels_are_found_by_name() {
        let line = sample(r#"a{ b="1" , c="x,y=\"z\"}",d="",} 1"#).unwrap();
        assert_eq!(line.labels.get("b"), Some("1"));
        assert_eq!(line.labels.get("c"), Some(r#"x,y=\"z\"}"#));
        assert_eq!(line.labels.get("d"), Some(""));
        assert_eq!(line.labels.get("e"), None);
        assert_eq!(line.labels.iter().count(), 3);
    }

    #[test]
    fn names_are_known_before_there_are_samples() {
        let page = b"# HELP a what it is\n# TYPE a gauge\n\nb{c=\"d\"} 1\n# comment\ne 2\n";
        assert_eq!(names(page).collect::<Vec<_>>(), ["a", "b", "e"]);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(page in prop::collection::vec(prop::sample::select(&b"a{}=\",\\ \n\t#1.eN\xff\xc3"[..]), 0..400)) {
            for line in lines(&page) {
                prop_assert!(!line.name.is_empty());
                line.labels.iter().count();
            }
            names(&page).count();
            Reading::read(&page, None);
            dcgm::read(&page);
        }
    }
}
