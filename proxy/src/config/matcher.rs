//! Matching a request against the rules of a route, as HTTPRoute defines it.
//!
//! Compiling refuses what makes no sense, so that matching cannot fail.

use std::borrow::Cow;

use http::{HeaderName, HeaderValue, Method};
use penstock_api::path;
use penstock_api::resource::REGEX_SIZE;
use penstock_api::v1;
use regex::Regex;

/// All of its parts must match.
#[derive(Debug)]
pub struct Match {
    path: Path,
    method: Option<Method>,
    headers: Vec<(HeaderName, Text)>,
    query: Vec<(String, Text)>,
}

#[derive(Debug)]
enum Path {
    Any,
    Exact(String),
    /// Without a trailing slash; whole segments.
    Prefix(String),
    Regex(Regex),
}

#[derive(Debug)]
enum Text {
    Exact(String),
    Regex(Regex),
}

/// A host name of a route.
#[derive(Debug, PartialEq)]
pub enum Hostname {
    /// Exactly this.
    Exact(String),
    /// `*.suffix`: one or more labels before it.
    Suffix(String),
}

impl Hostname {
    /// Reads `example.com` or `*.example.com`.
    pub fn new(text: &str) -> Self {
        match text.strip_prefix('*') {
            Some(suffix) => Self::Suffix(suffix.to_ascii_lowercase()),
            None => Self::Exact(text.to_ascii_lowercase()),
        }
    }

    /// Whether a host (no port) is meant.
    pub fn matches(&self, host: &str) -> bool {
        match self {
            Self::Exact(name) => name.eq_ignore_ascii_case(host),
            Self::Suffix(suffix) => {
                host.len() > suffix.len()
                    && host.is_char_boundary(host.len() - suffix.len())
                    && host[host.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
            }
        }
    }
}

impl Match {
    /// Compiles a match, or says what is wrong with it.
    pub fn compile(from: &v1::Match) -> Result<Self, String> {
        use v1::string_match::Kind;
        let path = match from.path.as_ref().and_then(|path| path.kind.as_ref()) {
            None => Path::Any,
            Some(Kind::Prefix(prefix)) if prefix == "/" || prefix.is_empty() => Path::Any,
            Some(Kind::Prefix(prefix)) => Path::Prefix(formed(prefix).trim_end_matches('/').to_owned()),
            Some(Kind::Exact(path)) => Path::Exact(formed(path)),
            Some(Kind::Regex(pattern)) => Path::Regex(regex(pattern)?),
        };
        let method = match from.method.as_str() {
            "" => None,
            method => Some(method.parse().map_err(|_| format!("{method:?} is not an HTTP method"))?),
        };
        let headers = from
            .headers
            .iter()
            .map(|header| {
                let name = HeaderName::try_from(&header.name)
                    .map_err(|_| format!("{:?} is not a header name", header.name))?;
                Ok((name, Text::compile(header.value.as_ref())?))
            })
            .collect::<Result<_, String>>()?;
        let query = from
            .query
            .iter()
            .map(|pair| Ok((pair.name.clone(), Text::compile(pair.value.as_ref())?)))
            .collect::<Result<_, String>>()?;
        Ok(Self { path, method, headers, query })
    }

    /// Whether it asks for the path.
    pub fn looks_at_path(&self) -> bool {
        !matches!(self.path, Path::Any)
    }

    /// Whether the request is meant.
    pub fn matches(&self, request: &http::request::Parts) -> bool {
        let path = request.uri.path();
        (match &self.path {
            Path::Any => true,
            Path::Exact(exact) => path == exact,
            Path::Prefix(prefix) => has_prefix(path, prefix),
            Path::Regex(regex) => regex.is_match(path),
        }) && self.method.as_ref().is_none_or(|method| *method == request.method)
            && self.headers.iter().all(|(name, text)| {
                // Several values of one name are one list (RFC 9110, 5.3); only the first is compared, which is what
                // Gateway API asks of repeated headers.
                request.headers.get(name).is_some_and(|value| text.matches_value(value))
            })
            && (self.query.is_empty() || self.query_matches(request.uri.query().unwrap_or("")))
    }

    fn query_matches(&self, query: &str) -> bool {
        self.query.iter().all(|(name, text)| {
            let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
            pairs
                .find(|(key, _)| decoded(key) == name.as_str())
                .is_some_and(|(_, value)| text.matches(&decoded(value)))
        })
    }

    /// The prefix that a `ReplacePrefixMatch` replaces.
    pub fn prefix(&self) -> &str {
        match &self.path {
            Path::Prefix(prefix) => prefix,
            Path::Any | Path::Exact(_) | Path::Regex(_) => "",
        }
    }
}

/// A path of a route in the form that requests are brought into. One that has none matches nothing.
fn formed(path: &str) -> String {
    path::routable(path).map_or_else(|_| path.to_owned(), Cow::into_owned)
}

impl Text {
    fn compile(from: Option<&v1::StringMatch>) -> Result<Self, String> {
        use v1::string_match::Kind;
        match from.and_then(|text| text.kind.as_ref()) {
            Some(Kind::Exact(text)) => Ok(Self::Exact(text.clone())),
            Some(Kind::Regex(pattern)) => Ok(Self::Regex(regex(pattern)?)),
            Some(Kind::Prefix(_)) | None => {
                Err("a header or query match needs an exact value or a regular expression".to_owned())
            }
        }
    }

    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(text) => text == value,
            Self::Regex(regex) => regex.is_match(value),
        }
    }

    /// A value that is no UTF-8 matches nothing, and so never what a rule wants to keep out by exact value.
    fn matches_value(&self, value: &HeaderValue) -> bool {
        match self {
            Self::Exact(text) => text.as_bytes() == value.as_bytes(),
            Self::Regex(regex) => value.to_str().is_ok_and(|value| regex.is_match(value)),
        }
    }
}

fn regex(pattern: &str) -> Result<Regex, String> {
    regex::RegexBuilder::new(&format!("^(?:{pattern})$"))
        .size_limit(REGEX_SIZE)
        .build()
        .map_err(|error| format!("the regular expression {pattern:?} does not compile: {error}"))
}

/// Whether `path` is `prefix` or below it, by whole segments: `/v2` covers `/v2` and `/v2/x`, not `/v2x`.
pub fn has_prefix(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Percent-decoding and `+` of query strings; borrowed where nothing is encoded.
fn decoded(text: &str) -> std::borrow::Cow<'_, str> {
    if !text.bytes().any(|b| b == b'%' || b == b'+') {
        return text.into();
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes.get(i + 1..i + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        match (bytes[i], hex.and_then(|pair| u8::from_str_radix(pair, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                i += 2;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        i += 1;
    }
    String::from_utf8_lossy(&out).into_owned().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::string_match::Kind;

    fn text(kind: Kind) -> Option<v1::StringMatch> {
        Some(v1::StringMatch { kind: Some(kind) })
    }

    fn matches(rule: &v1::Match, method: &str, uri: &str, headers: &[(&str, &str)]) -> bool {
        let mut request = http::Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Match::compile(rule).unwrap().matches(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn paths_match_by_whole_segments() {
        let prefix = |p: &str| v1::Match { path: text(Kind::Prefix(p.into())), ..Default::default() };
        let exact = v1::Match { path: text(Kind::Exact("/v2".into())), ..Default::default() };
        let pattern = v1::Match { path: text(Kind::Regex("/v[0-9]+/.*".into())), ..Default::default() };
        let table = [
            (&prefix("/"), "/anything", true),
            (&prefix("/v2"), "/v2", true),
            (&prefix("/v2/"), "/v2", true),
            (&prefix("/v2"), "/v2/models", true),
            (&prefix("/v2"), "/v2x", false),
            (&exact, "/v2", true),
            (&exact, "/v2/", false),
            (&pattern, "/v2/models", true),
            (&pattern, "/x/v2/models", false),
        ];
        for (rule, path, expected) in table {
            assert_eq!(matches(rule, "GET", path, &[]), expected, "{rule:?} {path}");
        }
    }

    #[test]
    fn all_parts_must_match() {
        let rule = v1::Match {
            method: "POST".into(),
            headers: vec![v1::NamedMatch { name: "X-Tenant".into(), value: text(Kind::Exact("a".into())) }],
            query: vec![v1::NamedMatch { name: "model".into(), value: text(Kind::Exact("res net".into())) }],
            ..Default::default()
        };
        let tenant: &[(&str, &str)] = &[("x-tenant", "a")];
        assert!(matches(&rule, "POST", "/?x=1&model=res+net", tenant));
        assert!(matches(&rule, "POST", "/?model=res%20net", tenant));
        assert!(!matches(&rule, "GET", "/?model=res+net", tenant));
        assert!(!matches(&rule, "POST", "/?model=res+net", &[("x-tenant", "b")]));
        assert!(!matches(&rule, "POST", "/?model=other&model=res+net", tenant), "the first value counts");
        assert!(!matches(&rule, "POST", "/", tenant));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_a_reason() {
        let bad = |rule: v1::Match| Match::compile(&rule).unwrap_err();
        assert!(
            bad(v1::Match { path: text(Kind::Regex("(".into())), ..Default::default() })
                .contains("does not compile")
        );
        assert!(
            bad(v1::Match { method: "NO SPACE".into(), ..Default::default() }).contains("not an HTTP method")
        );
    }

    #[test]
    fn wildcard_hosts_need_a_label() {
        let host = Hostname::new("*.Example.com");
        assert!(host.matches("a.example.com") && host.matches("a.b.EXAMPLE.com"));
        assert!(!host.matches("example.com") && !host.matches("aexample.com"));
        assert!(Hostname::new("example.com").matches("EXAMPLE.com"));
    }
}
