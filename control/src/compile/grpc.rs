//! GRPCRoutes, read as what HTTPRoutes are: a call of a method is a request for the path `/<service>/<method>` (gRPC over HTTP/2).
//!
//! In: a GRPCRoute. Out: its parents and rules in the types of an HTTPRoute, but for the matches, which are read here. Which of two matches goes
//! first is by the length of the service, then of the method (Gateway API).

use gateway_api::experimental::grpcroutes::{
    GrpcRouteRules, GrpcRouteRulesMatches, GrpcRouteRulesMatchesHeadersType, GrpcRouteRulesMatchesMethodType,
};
use gateway_api::experimental::httproutes::HttpRouteRules;
use penstock_api::v1::{self, string_match};

use super::annotations::header_name;
use super::filters::same_shape;
use super::matches::{push, regex, text};

/// Everything of a rule but its matches.
pub(super) fn as_http(rule: &GrpcRouteRules) -> Result<HttpRouteRules, (String, String)> {
    same_shape(&GrpcRouteRules { matches: None, ..rule.clone() })
}

/// How long the service and the method of a match are.
pub(super) fn lengths(from: &GrpcRouteRulesMatches) -> (usize, usize) {
    let length = |text: &Option<String>| text.as_ref().map_or(0, |text| text.chars().count());
    from.method.as_ref().map_or((0, 0), |method| (length(&method.service), length(&method.method)))
}

/// Reads a match; `None` matches every call. The error is the pointer below the match, and what is wrong.
pub(super) fn read(from: &GrpcRouteRulesMatches) -> Result<Option<v1::Match>, (String, String)> {
    let mut to = v1::Match::default();
    if let Some(method) = &from.method {
        let at = |field: &str| format!("/method/{field}");
        let is_regex = method.r#type == Some(GrpcRouteRulesMatchesMethodType::RegularExpression);
        let part = |value: &Option<String>, field| match value.as_deref() {
            None | Some("") => Ok(None),
            Some(value) if is_regex => regex(value).map(Some).map_err(|error| (at(field), error)),
            Some(value) if value.contains('/') => {
                Err((at(field), format!("{value:?} has a slash in it, which no {field} of gRPC has")))
            }
            Some(value) => Ok(Some(value.to_owned())),
        };
        let (service, name) = (part(&method.service, "service")?, part(&method.method, "method")?);
        let kind = match (service, name, is_regex) {
            (None, None, _) => {
                let message =
                    "it names neither a service nor a method; write one of the two, or leave it out";
                return Err(("/method".to_owned(), message.to_owned()));
            }
            (Some(service), Some(name), false) => string_match::Kind::Exact(format!("/{service}/{name}")),
            (Some(service), None, false) => string_match::Kind::Prefix(format!("/{service}")),
            (None, Some(name), false) => {
                string_match::Kind::Regex(format!("/[^/]+/{}", regex::escape(&name)))
            }
            (service, name, true) => {
                let any =
                    |part: Option<String>| part.map_or("[^/]+".to_owned(), |part| format!("(?:{part})"));
                string_match::Kind::Regex(format!("/{}/{}", any(service), any(name)))
            }
        };
        to.path = Some(v1::StringMatch { kind: Some(kind) });
    }
    for (index, header) in from.headers.iter().flatten().enumerate() {
        let at = |field: &str| format!("/headers/{index}/{field}");
        let name = header_name(&header.name).map_err(|error| (at("name"), error))?;
        let is_regex = header.r#type == Some(GrpcRouteRulesMatchesHeadersType::RegularExpression);
        let value = text(is_regex, &header.value).map_err(|error| (at("value"), error))?;
        push(&mut to.headers, name, value);
    }
    Ok((to != v1::Match::default()).then_some(to))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(yaml: &str) -> GrpcRouteRulesMatches {
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn a_method_is_a_path() {
        let table = [
            ("{method: {service: a.B, method: C}}", Some(string_match::Kind::Exact("/a.B/C".into()))),
            ("{method: {service: a.B}}", Some(string_match::Kind::Prefix("/a.B".into()))),
            ("{method: {method: C}}", Some(string_match::Kind::Regex("/[^/]+/C".into()))),
            (
                r"{method: {type: RegularExpression, service: 'a\..*', method: 'Get|Set'}}",
                Some(string_match::Kind::Regex(r"/(?:a\..*)/(?:Get|Set)".into())),
            ),
            (
                "{method: {type: RegularExpression, method: 'Get.*'}}",
                Some(string_match::Kind::Regex("/[^/]+/(?:Get.*)".into())),
            ),
            ("{headers: [{name: X-User, value: beta}]}", None),
        ];
        for (yaml, expected) in table {
            let read = read(&matched(yaml)).unwrap().unwrap();
            assert_eq!(read.path.and_then(|path| path.kind), expected, "{yaml}");
            assert_eq!(read.headers.len(), usize::from(yaml.contains("headers")));
        }
        assert_eq!(read(&matched("{}")), Ok(None));
        assert_eq!(lengths(&matched("{method: {service: a.B, method: C}}")), (3, 1));
    }

    #[test]
    fn a_method_that_cannot_be_is_refused_at_its_field() {
        let table = [
            ("{method: {}}", "/method", "neither"),
            ("{method: {service: a/b}}", "/method/service", "slash"),
            ("{method: {type: RegularExpression, method: '('}}", "/method/method", "regular expression"),
            ("{headers: [{name: 'a b', value: x}]}", "/headers/0/name", "not a header name"),
        ];
        for (yaml, pointer, words) in table {
            let (at, error) = read(&matched(yaml)).unwrap_err();
            assert!(at == pointer && error.contains(words), "{yaml}: {at}: {error}");
        }
    }
}
