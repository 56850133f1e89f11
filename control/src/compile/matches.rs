//! Matches of an HTTPRoute, and which of two goes first (of a GRPCRoute as well).

use gateway_api::experimental::httproutes::{
    HttpRouteRulesMatches, HttpRouteRulesMatchesHeadersType, HttpRouteRulesMatchesPathType,
    HttpRouteRulesMatchesQueryParamsType,
};
use k8s_openapi::jiff::Timestamp;
use penstock_api::resource::REGEX_SIZE;
use penstock_api::service::is_label;
use penstock_api::v1::{self, string_match};

use super::annotations::header_name;

/// Which rule goes first, as the Gateway API orders them; the smaller goes first. A rule with several host names or
/// matches is taken apart, because each of them has its own place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Precedence {
    host: Host,
    path: Path,
    method: Descending<bool>,
    headers: Descending<usize>,
    query: Descending<usize>,
    age: Age,
    /// Namespace and name of the route.
    route: String,
    rule: usize,
    /// Place of the match and of the host name in the rule.
    place: (usize, usize),
}

type Descending<T> = std::cmp::Reverse<T>;

/// Exact names before wildcards before none, longer before shorter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Host {
    Exact(Descending<usize>),
    Wildcard(Descending<usize>),
    Any,
}

/// The Gateway API leaves the place of regular expressions open. They stand between, as an exception to a prefix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Path {
    /// A method of gRPC: the longer service, then the longer method. How it is matched does not matter.
    Method(Descending<(usize, usize)>),
    Exact,
    Regex(Descending<usize>),
    Prefix(Descending<usize>),
}

/// Older routes first; one without a time is the youngest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Age {
    Since(Timestamp),
    Unknown,
}

/// Where a match comes from.
#[derive(Clone, Debug)]
pub(super) struct Place<'a> {
    /// `<namespace>/<name>` of the route.
    pub route: &'a str,
    pub created: Option<Timestamp>,
    /// Of a GRPCRoute's match: how long its service and its method are.
    pub method: Option<(usize, usize)>,
    pub rule: usize,
    pub matched: usize,
    pub host: usize,
}

impl Precedence {
    /// The precedence of a match with one of the route's host names.
    pub(super) fn of(matched: Option<&v1::Match>, hostname: Option<&str>, place: &Place<'_>) -> Self {
        let host = match hostname {
            None => Host::Any,
            Some(name) if name.starts_with('*') => Host::Wildcard(std::cmp::Reverse(name.len())),
            Some(name) => Host::Exact(std::cmp::Reverse(name.len())),
        };
        let path = matched.and_then(|m| m.path.as_ref()).and_then(|path| path.kind.as_ref());
        let path = match (path, place.method) {
            (Some(_), Some(lengths)) => Path::Method(std::cmp::Reverse(lengths)),
            (Some(string_match::Kind::Exact(_)), None) => Path::Exact,
            (Some(string_match::Kind::Regex(text)), None) => Path::Regex(std::cmp::Reverse(text.len())),
            (Some(string_match::Kind::Prefix(text)), None) => Path::Prefix(std::cmp::Reverse(text.len())),
            // No path is the prefix "/".
            (None, _) => Path::Prefix(std::cmp::Reverse(1)),
        };
        Self {
            host,
            path,
            method: std::cmp::Reverse(matched.is_some_and(|m| !m.method.is_empty())),
            headers: std::cmp::Reverse(matched.map_or(0, |m| m.headers.len())),
            query: std::cmp::Reverse(matched.map_or(0, |m| m.query.len())),
            age: place.created.map_or(Age::Unknown, Age::Since),
            route: place.route.to_owned(),
            rule: place.rule,
            place: (place.matched, place.host),
        }
    }
}

/// Reads a match; `None` matches every request. The error is the pointer below the match, and what is wrong.
pub(super) fn read(from: &HttpRouteRulesMatches) -> Result<Option<v1::Match>, (String, String)> {
    let mut to = v1::Match::default();
    if let Some(path) = &from.path {
        let value = path.value.as_deref().unwrap_or("/");
        let kind = path.r#type.as_ref().unwrap_or(&HttpRouteRulesMatchesPathType::PathPrefix);
        to.path = self::path(kind, value).map_err(|error| ("/path/value".to_owned(), error))?;
    }
    if let Some(method) = &from.method {
        // The variants are the methods, in mixed case.
        to.method = format!("{method:?}").to_ascii_uppercase();
    }
    for (index, header) in from.headers.iter().flatten().enumerate() {
        let at = |field: &str| format!("/headers/{index}/{field}");
        let name = header_name(&header.name).map_err(|error| (at("name"), error))?;
        let regex = header.r#type == Some(HttpRouteRulesMatchesHeadersType::RegularExpression);
        let value = text(regex, &header.value).map_err(|error| (at("value"), error))?;
        push(&mut to.headers, name, value);
    }
    for (index, query) in from.query_params.iter().flatten().enumerate() {
        let regex = query.r#type == Some(HttpRouteRulesMatchesQueryParamsType::RegularExpression);
        let value =
            text(regex, &query.value).map_err(|error| (format!("/queryParams/{index}/value"), error))?;
        push(&mut to.query, query.name.clone(), value);
    }
    Ok((to != v1::Match::default()).then_some(to))
}

/// Of several entries of a name only the first counts (Gateway API).
pub(super) fn push(to: &mut Vec<v1::NamedMatch>, name: String, value: v1::StringMatch) {
    if to.iter().all(|known| known.name != name) {
        to.push(v1::NamedMatch { name, value: Some(value) });
    }
}

fn path(kind: &HttpRouteRulesMatchesPathType, value: &str) -> Result<Option<v1::StringMatch>, String> {
    let kind = match kind {
        HttpRouteRulesMatchesPathType::RegularExpression => string_match::Kind::Regex(regex(value)?),
        HttpRouteRulesMatchesPathType::Exact => string_match::Kind::Exact(check_path(value)?.to_owned()),
        HttpRouteRulesMatchesPathType::PathPrefix => {
            // "/abc/" is "/abc" (Gateway API).
            match check_path(value)?.trim_end_matches('/') {
                "" => return Ok(None),
                prefix => string_match::Kind::Prefix(prefix.to_owned()),
            }
        }
    };
    Ok(Some(v1::StringMatch { kind: Some(kind) }))
}

/// A path that could never match, because requests' paths are canonical, is a mistake.
pub(super) fn check_path(path: &str) -> Result<&str, String> {
    if !path.starts_with('/') {
        return Err(format!("{path:?} is not a path; start it with /"));
    }
    let lower = path.to_ascii_lowercase();
    let never = ["//", "/./", "/../", "%2f", "#", "?"].into_iter().find(|part| lower.contains(part));
    match never.or_else(|| ["/.", "/.."].into_iter().find(|end| path.ends_with(end))) {
        Some(part) => Err(format!("{path:?} has {part:?} in it, which no request's path has; leave it out")),
        None => Ok(path),
    }
}

pub(super) fn text(is_regex: bool, value: &str) -> Result<v1::StringMatch, String> {
    let kind = match is_regex {
        true => string_match::Kind::Regex(regex(value)?),
        false => string_match::Kind::Exact(value.to_owned()),
    };
    Ok(v1::StringMatch { kind: Some(kind) })
}

pub(super) fn regex(value: &str) -> Result<String, String> {
    match regex::RegexBuilder::new(&format!("^(?:{value})$")).size_limit(REGEX_SIZE).build() {
        Ok(_) => Ok(value.to_owned()),
        Err(regex::Error::CompiledTooBig(_)) => Err(format!(
            "{value:?} takes more than {} KiB once compiled; write fewer or shorter repetitions",
            REGEX_SIZE >> 10
        )),
        Err(_) => {
            Err(format!("{value:?} is not a regular expression in the syntax of RE2; correct or quote it"))
        }
    }
}

/// A host name of a route, in lower case.
pub(super) fn hostname(text: &str) -> Result<String, String> {
    let lower = text.to_ascii_lowercase();
    match lower.strip_prefix("*.").unwrap_or(&lower).split('.').all(is_label) {
        true => Ok(lower),
        false => {
            Err(format!("{text:?} is not a host name; write for example resnet.example.com or *.example.com"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(yaml: &str) -> HttpRouteRulesMatches {
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn the_most_specific_goes_first() {
        // Each line goes before those below it: host, match, second of creation, route, rule.
        let table = [
            (Some("long.example.com"), "{}", None, "a/x", 0),
            (Some("b.example.com"), "{path: {type: Exact, value: /x}}", None, "a/x", 0),
            (Some("*.long.example.com"), "{path: {type: Exact, value: /x}}", None, "a/x", 0),
            (Some("*.example.com"), "{}", None, "a/x", 0),
            (None, "{path: {type: Exact, value: /a}}", None, "a/x", 0),
            (None, "{path: {type: RegularExpression, value: /.*}}", None, "a/x", 0),
            (None, "{path: {value: /abc/def}}", None, "a/x", 0),
            (None, "{path: {value: /abc}, method: GET}", None, "a/x", 0),
            (
                None,
                "{path: {value: /abc}, headers: [{name: a, value: b}, {name: c, value: d}]}",
                None,
                "a/x",
                0,
            ),
            (
                None,
                "{path: {value: /abc}, headers: [{name: a, value: b}], queryParams: [{name: q, value: v}]}",
                None,
                "a/x",
                0,
            ),
            (None, "{path: {value: /abc}, headers: [{name: a, value: b}]}", None, "a/x", 0),
            (None, "{path: {value: /abc/}, queryParams: [{name: q, value: v}]}", None, "a/x", 0),
            (None, "{path: {value: /abc}}", None, "a/x", 0),
            (None, "{method: GET}", None, "a/x", 0),
            (None, "{}", Some(1), "b/z", 0),
            (None, "{}", Some(2), "a/a", 0),
            (None, "{path: {value: /}}", None, "a/x", 0),
            (None, "{}", None, "a/x", 1),
            (None, "{}", None, "a/y", 0),
            (None, "{}", None, "b/a", 0),
        ];
        let keys: Vec<_> = table
            .iter()
            .map(|(host, yaml, second, route, rule)| {
                let created = second.map(|second| Timestamp::from_second(second).unwrap());
                let place = Place { route, created, method: None, rule: *rule, matched: 0, host: 0 };
                Precedence::of(read(&matched(yaml)).unwrap().as_ref(), *host, &place)
            })
            .collect();
        for (index, pair) in keys.windows(2).enumerate() {
            assert!(pair[0] < pair[1], "{:?} should go before {:?}", table[index], table[index + 1]);
        }
    }

    #[test]
    fn the_longer_service_goes_first_then_the_longer_method() {
        // Each goes before those below it.
        let table = [
            ("/a.Long/Method", (6, 6)),
            ("/a.Long", (6, 0)),
            ("/a.B/Method", (3, 6)),
            ("/a.B/Me", (3, 2)),
            ("/a.B", (3, 0)),
            ("/[^/]+/Method", (0, 6)),
        ];
        let keys: Vec<_> = table
            .iter()
            .map(|(path, lengths)| {
                let path = Some(v1::StringMatch { kind: Some(string_match::Kind::Regex((*path).into())) });
                let matched = v1::Match { path, ..v1::Match::default() };
                let method = Some(*lengths);
                let place = Place { route: "a/x", created: None, method, rule: 0, matched: 0, host: 0 };
                Precedence::of(Some(&matched), None, &place)
            })
            .collect();
        assert!(keys.is_sorted(), "{keys:?}");
    }

    #[test]
    fn a_match_is_read_as_the_gateway_api_means_it() {
        let got = read(&matched(
            "{path: {value: /v1/}, method: POST, headers: [{name: X-A, value: '1'}, {name: x-a, value: '2'}]}",
        ));
        let exact = |text: &str| v1::StringMatch { kind: Some(string_match::Kind::Exact(text.into())) };
        let expected = v1::Match {
            path: Some(v1::StringMatch { kind: Some(string_match::Kind::Prefix("/v1".into())) }),
            method: "POST".into(),
            headers: vec![v1::NamedMatch { name: "x-a".into(), value: Some(exact("1")) }],
            query: Vec::new(),
        };
        assert_eq!(got, Ok(Some(expected)));
        assert_eq!(read(&matched("{path: {value: /}}")), Ok(None));
    }

    #[test]
    fn a_match_that_cannot_be_is_refused_at_its_field() {
        let table = [
            ("{path: {value: v1}}", "/path/value", "start it with /"),
            ("{path: {value: /a//b}}", "/path/value", "\"//\""),
            ("{path: {value: /a/..}}", "/path/value", "\"/..\""),
            ("{path: {value: /a%2Fb}}", "/path/value", "\"%2f\""),
            ("{path: {type: RegularExpression, value: '('}}", "/path/value", "regular expression"),
            (r"{path: {type: RegularExpression, value: '/\w{300}'}}", "/path/value", "1024 KiB"),
            ("{headers: [{name: a b, value: x}]}", "/headers/0/name", "not a header name"),
            (
                "{queryParams: [{name: a, value: '[', type: RegularExpression}]}",
                "/queryParams/0/value",
                "regular",
            ),
        ];
        for (yaml, pointer, words) in table {
            let (at, error) = read(&matched(yaml)).unwrap_err();
            assert!(at == pointer && error.contains(words), "{yaml}: {at}: {error}");
        }
    }

    #[test]
    fn host_names_are_checked() {
        assert_eq!(hostname("*.Example.com"), Ok("*.example.com".into()));
        for bad in ["", "*", "a.*.b", "a b", "10.0.0.1:80"] {
            assert!(hostname(bad).is_err(), "{bad}");
        }
    }
}
