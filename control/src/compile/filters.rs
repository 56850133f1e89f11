//! Filters of an HTTPRoute. A filter that is not supported is never skipped: requests that it should have changed
//! are refused instead (Gateway API).

use gateway_api::experimental::httproutes::{
    HttpRouteRulesFilters, HttpRouteRulesFiltersRequestHeaderModifier,
    HttpRouteRulesFiltersRequestRedirectPath, HttpRouteRulesFiltersRequestRedirectPathType,
    HttpRouteRulesFiltersType,
};
use penstock_api::v1::{self, filter, path_change};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::annotations::header_name;
use super::matches::{check_path, hostname};

/// A pointer below what is read, and what is wrong there.
pub(super) type Wrong = (String, String);

/// Headers that belong to the connection: a filter that changed them would let requests be smuggled.
const FRAMING: [&str; 6] = ["connection", "content-length", "host", "te", "transfer-encoding", "upgrade"];

/// Where a filter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// In a rule; `prefix`: every match of the rule has a path prefix, so that it can be replaced.
    Rule { prefix: bool },
    /// In a backend of a rule.
    Backend,
}

/// Reads one filter.
pub(super) fn read(from: &HttpRouteRulesFilters, level: Level) -> Result<v1::Filter, Wrong> {
    let missing = |field: &str| {
        (String::new(), format!("a filter of type {:?} needs the field {field}; add it", from.r#type))
    };
    let kind = match from.r#type {
        HttpRouteRulesFiltersType::RequestHeaderModifier => {
            let modifier = from.request_header_modifier.as_ref().ok_or(missing("requestHeaderModifier"))?;
            filter::Kind::RequestHeaders(headers(modifier, "/requestHeaderModifier")?)
        }
        HttpRouteRulesFiltersType::ResponseHeaderModifier => {
            let modifier = from.response_header_modifier.as_ref().ok_or(missing("responseHeaderModifier"))?;
            filter::Kind::ResponseHeaders(headers(&same_shape(modifier)?, "/responseHeaderModifier")?)
        }
        HttpRouteRulesFiltersType::RequestRedirect if level != Level::Backend => {
            filter::Kind::Redirect(redirect(from, level).and_then(|it| it.ok_or(missing("requestRedirect")))?)
        }
        HttpRouteRulesFiltersType::UrlRewrite => {
            let rewrite = from.url_rewrite.as_ref().ok_or(missing("urlRewrite"))?;
            let at = |field: &str| format!("/urlRewrite/{field}");
            filter::Kind::Rewrite(v1::Rewrite {
                hostname: name(rewrite.hostname.as_deref()).map_err(|error| (at("hostname"), error))?,
                path: match &rewrite.path {
                    Some(path) => {
                        Some(change(&same_shape(path)?, level).map_err(|error| (at("path"), error))?)
                    }
                    None => None,
                },
            })
        }
        _ => {
            let message = format!(
                "filters of type {:?} are not supported {}, and requests to it are answered with 500; remove it",
                from.r#type,
                if level == Level::Backend { "in a backendRef" } else { "in a rule" },
            );
            return Err(("/type".to_owned(), message));
        }
    };
    Ok(v1::Filter { kind: Some(kind) })
}

/// The generated bindings have a type for each place of one and the same thing.
pub(super) fn same_shape<T: Serialize, U: DeserializeOwned>(from: &T) -> Result<U, Wrong> {
    serde_json::to_value(from)
        .and_then(serde_json::from_value)
        .map_err(|error| (String::new(), format!("it cannot be read: {error}")))
}

fn headers(
    from: &HttpRouteRulesFiltersRequestHeaderModifier,
    pointer: &str,
) -> Result<v1::HeaderChange, Wrong> {
    let at = |list: &str, index: usize| format!("{pointer}/{list}/{index}");
    let mut to = v1::HeaderChange::default();
    for (index, header) in from.set.iter().flatten().enumerate() {
        to.set.push(self::header(&header.name, &header.value).map_err(|error| (at("set", index), error))?);
    }
    for (index, header) in from.add.iter().flatten().enumerate() {
        to.add.push(self::header(&header.name, &header.value).map_err(|error| (at("add", index), error))?);
    }
    for (index, name) in from.remove.iter().flatten().enumerate() {
        to.remove.push(changeable(name).map_err(|error| (at("remove", index), error))?);
    }
    Ok(to)
}

fn header(name: &str, value: &str) -> Result<v1::Header, String> {
    http::HeaderValue::try_from(value).map_err(|_| format!("{value:?} is not a header value"))?;
    Ok(v1::Header { name: changeable(name)?, value: value.to_owned() })
}

fn changeable(name: &str) -> Result<String, String> {
    let name = header_name(name)?;
    match FRAMING.contains(&name.as_str()) {
        true => Err(format!(
            "the header {name} belongs to the connection; no filter can change it, so leave it out"
        )),
        false => Ok(name),
    }
}

fn redirect(from: &HttpRouteRulesFilters, level: Level) -> Result<Option<v1::Redirect>, Wrong> {
    let Some(from) = &from.request_redirect else { return Ok(None) };
    let at = |field: &str| format!("/requestRedirect/{field}");
    let status = from.status_code.unwrap_or(302);
    let status = u32::try_from(status)
        .ok()
        .filter(|status| matches!(status, 301 | 302 | 303 | 307 | 308))
        .ok_or_else(|| {
            (at("statusCode"), format!("{status} is no redirect; write 301, 302, 303, 307 or 308"))
        })?;
    let port = match from.port {
        Some(port) => u16::try_from(port)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| (at("port"), format!("{port} is not a port; write a number from 1 to 65535")))?,
        None => 0,
    };
    let path = match &from.path {
        Some(path) => Some(change(path, level).map_err(|error| (at("path"), error))?),
        None => None,
    };
    Ok(Some(v1::Redirect {
        scheme: from
            .scheme
            .as_ref()
            .map(|scheme| format!("{scheme:?}").to_ascii_lowercase())
            .unwrap_or_default(),
        hostname: name(from.hostname.as_deref()).map_err(|error| (at("hostname"), error))?,
        port: port.into(),
        path,
        status,
    }))
}

/// A host name to put in; wildcards make no sense there.
fn name(text: Option<&str>) -> Result<String, String> {
    match text {
        None => Ok(String::new()),
        Some(text) if text.contains('*') => Err(format!("{text:?} is not one host name; write it whole")),
        Some(text) => hostname(text),
    }
}

fn change(from: &HttpRouteRulesFiltersRequestRedirectPath, level: Level) -> Result<v1::PathChange, String> {
    let kind = match (&from.r#type, &from.replace_full_path, &from.replace_prefix_match) {
        (HttpRouteRulesFiltersRequestRedirectPathType::ReplaceFullPath, Some(path), _) => {
            path_change::Kind::Full(check_path(path)?.to_owned())
        }
        (HttpRouteRulesFiltersRequestRedirectPathType::ReplacePrefixMatch, _, Some(prefix)) => {
            if level == (Level::Rule { prefix: false }) {
                return Err(
                    "there is no prefix to replace: a match of the rule has a path of another type; \
                            use matches of type PathPrefix only, or ReplaceFullPath"
                        .to_owned(),
                );
            }
            if !prefix.is_empty() {
                check_path(prefix)?;
            }
            path_change::Kind::Prefix(prefix.clone())
        }
        (kind, ..) => {
            let kind = format!("{kind:?}");
            let field = format!("{}{}", kind[..1].to_ascii_lowercase(), &kind[1..]);
            return Err(format!("a path of type {kind} needs the field {field}; add it"));
        }
    };
    Ok(v1::PathChange { kind: Some(kind) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(yaml: &str) -> HttpRouteRulesFilters {
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn filters_are_read() {
        let rule = Level::Rule { prefix: true };
        let header = |name: &str, value: &str| v1::Header { name: name.into(), value: value.into() };
        let table = [
            (
                "{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-A, value: b}], remove: [C]}}",
                filter::Kind::RequestHeaders(v1::HeaderChange {
                    set: vec![header("x-a", "b")],
                    add: vec![],
                    remove: vec!["c".into()],
                }),
            ),
            (
                "{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x, value: y}]}}",
                filter::Kind::ResponseHeaders(v1::HeaderChange {
                    add: vec![header("x", "y")],
                    ..Default::default()
                }),
            ),
            (
                "{type: RequestRedirect, requestRedirect: {scheme: https, port: 8443, statusCode: 308}}",
                filter::Kind::Redirect(v1::Redirect {
                    scheme: "https".into(),
                    port: 8443,
                    status: 308,
                    ..Default::default()
                }),
            ),
            (
                "{type: URLRewrite, urlRewrite: {hostname: a.b, path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}}",
                filter::Kind::Rewrite(v1::Rewrite {
                    hostname: "a.b".into(),
                    path: Some(v1::PathChange { kind: Some(path_change::Kind::Prefix("/v2".into())) }),
                }),
            ),
        ];
        for (yaml, expected) in table {
            assert_eq!(read(&filter(yaml), rule), Ok(v1::Filter { kind: Some(expected) }), "{yaml}");
        }
    }

    #[test]
    fn filters_that_cannot_be_are_refused_at_their_field() {
        let rule = Level::Rule { prefix: false };
        let table = [
            (
                Level::Backend,
                "{type: RequestMirror, requestMirror: {backendRef: {name: x}}}",
                "/type",
                "not supported in a backendRef",
            ),
            (rule, "{type: ExtensionRef}", "/type", "not supported"),
            (Level::Backend, "{type: RequestRedirect, requestRedirect: {}}", "/type", "in a backendRef"),
            (rule, "{type: URLRewrite}", "", "needs the field urlRewrite"),
            (
                rule,
                "{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Host, value: x}]}}",
                "/requestHeaderModifier/set/0",
                "belongs to the connection",
            ),
            (
                rule,
                "{type: RequestRedirect, requestRedirect: {statusCode: 200}}",
                "/requestRedirect/statusCode",
                "302",
            ),
            (
                rule,
                "{type: RequestRedirect, requestRedirect: {hostname: '*.x'}}",
                "/requestRedirect/hostname",
                "whole",
            ),
            (
                rule,
                "{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}",
                "/urlRewrite/path",
                "no prefix to replace",
            ),
            (
                rule,
                "{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath}}}",
                "/urlRewrite/path",
                "needs the field replaceFullPath",
            ),
        ];
        for (level, yaml, pointer, words) in table {
            let (at, error) = read(&filter(yaml), level).unwrap_err();
            assert!(at == pointer && error.contains(words), "{yaml}: {at}: {error}");
        }
    }
}
