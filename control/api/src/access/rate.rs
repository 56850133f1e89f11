//! Rate limits: which of them count a request, and for whom. Pure.
//!
//! In: a limit ([`RateLimit`], compiled from what control pushes) and the [`Facts`] of a request. Out: the [`Key`] under which
//! it counts, or that it does not. How much has been used the pod's proxy knows, and nobody else.
//!
//! What is counted is said in the language of access policies, and as with a Deny what is not known for sure counts against the
//! client: nobody gets around a limit by hiding which model he asks for.

use std::cmp::Reverse;
use std::fmt;
use std::time::Duration;

use super::{Facts, Match, Model, Rule, labelled, ports};
use crate::SpiffeId;
use crate::v1;

/// One limit of a RateLimit.
#[derive(Clone, Debug, PartialEq)]
pub struct RateLimit {
    /// `<namespace>/<name>` of the object.
    pub policy: Box<str>,
    /// Which of its limits.
    pub name: Box<str>,
    /// What is counted for itself.
    pub by: By,
    /// Requests in a time.
    pub requests: Option<Rate>,
    /// Requests at a time.
    pub concurrent: Option<u32>,
    /// Tokens in a time.
    pub tokens: Option<Rate>,
    ports: Vec<u16>,
    matches: Rule,
}

/// What a limit tells apart; nothing: all counts together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct By {
    /// Who asks.
    pub identity: bool,
    /// Which model is asked for.
    pub model: bool,
    /// Which entry of what is matched the request is: a route is what the operator writes there, since which route of a client's
    /// proxy led here is not known.
    pub route: bool,
}

impl By {
    /// Whether it tells anything apart.
    pub fn is_said(self) -> bool {
        self.identity || self.model || self.route
    }
}

/// So many in a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many, at least one.
    pub count: u64,
    /// In which time.
    pub period: Duration,
    /// How many at once, if none was used for long; at least one.
    pub burst: u64,
}

/// Under which a request counts. Displays as whom a story names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key<'a> {
    identity: Option<Option<&'a str>>,
    model: Option<Model<'a>>,
    route: Option<usize>,
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut between = "";
        match self.identity {
            Some(Some(id)) => write!(f, "{id}")?,
            Some(None) => f.write_str("clients without an identity")?,
            None => f.write_str("all clients together")?,
        }
        if let Some(model) = self.model {
            match model {
                Model::Named(name) => write!(f, " for model {name:?}")?,
                Model::None => f.write_str(" for requests about no model")?,
                Model::Unknown => f.write_str(" for requests whose model cannot be told")?,
            }
            between = ",";
        }
        match self.route {
            Some(route) => write!(f, "{between} on route {}", route + 1),
            None => Ok(()),
        }
    }
}

impl RateLimit {
    /// Compiles what control pushed. The error says what this proxy does not understand.
    pub fn compile(from: &v1::RateLimit) -> Result<Self, String> {
        let wrong = |error: String| format!("RateLimit {}: limit {}: {error}", from.policy, from.name);
        let rate = |rate: &v1::Rate| match rate.count.min(rate.period_ms).min(rate.burst) {
            0 => Err(wrong("a rate of nothing; upgrade this proxy".to_owned())),
            _ => Ok(Rate {
                count: rate.count,
                period: Duration::from_millis(rate.period_ms),
                burst: rate.burst,
            }),
        };
        let everything = v1::AccessRule::default();
        let matches = from.r#match.as_ref().unwrap_or(&everything);
        let limit = Self {
            policy: from.policy.as_str().into(),
            name: from.name.as_str().into(),
            by: By { identity: from.by_identity, model: from.by_model, route: from.by_route },
            requests: from.requests.as_ref().map(rate).transpose()?,
            concurrent: Some(from.concurrent).filter(|most| *most > 0),
            tokens: from.tokens.as_ref().map(rate).transpose()?,
            ports: ports(&from.ports).map_err(wrong)?,
            matches: labelled("match".to_owned(), matches).map_err(wrong)?,
        };
        match (limit.requests, limit.concurrent, limit.tokens) {
            (None, None, None) => {
                Err(wrong("it limits nothing that this proxy knows; upgrade it".to_owned()))
            }
            _ => Ok(limit),
        }
    }

    /// Whether what it counts, or how, depends on the model.
    pub fn looks_at_models(&self) -> bool {
        self.by.model || self.matches.looks_at_models()
    }

    /// Whether what it counts, or how, depends on the path: a model may stand there, and which requests use tokens does.
    pub fn looks_at_paths(&self) -> bool {
        self.by.model || self.tokens.is_some() || self.matches.looks_at_paths()
    }

    /// Whether what it counts depends on the host.
    pub fn looks_at_host(&self) -> bool {
        self.matches.looks_at_host()
    }

    /// Under what a request counts; `None`: it does not count.
    pub fn counts<'a>(&self, facts: &Facts<'a>) -> Option<Key<'a>> {
        let about = self.ports.is_empty() || self.ports.contains(&facts.port);
        if !about || self.matches.matches(facts) == Match::No {
            return None;
        }
        let routes = || self.matches.to.iter().map(|to| to.matches(facts)).enumerate();
        let surest = || routes().max_by_key(|(at, sure)| (*sure, Reverse(*at)));
        Some(Key {
            identity: self.by.identity.then(|| facts.client.map(SpiffeId::as_str)),
            model: self.by.model.then(|| facts.http.map_or(Model::None, |http| http.model)),
            route: if self.by.route { surest().map(|(at, _)| at) } else { None },
        })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::super::Http;
    use super::*;
    use crate::v1::{AccessFrom, AccessRule, AccessTo};

    const FRONT: &str = "spiffe://cluster.local/ns/web/sa/front";

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    fn limit(rule: AccessRule, by: By) -> v1::RateLimit {
        v1::RateLimit {
            policy: "test/p".to_owned(),
            name: "l".to_owned(),
            r#match: Some(rule),
            by_identity: by.identity,
            by_model: by.model,
            by_route: by.route,
            concurrent: 1,
            ..v1::RateLimit::default()
        }
    }

    fn to(to: &[AccessTo]) -> AccessRule {
        AccessRule { to: to.to_vec(), ..AccessRule::default() }
    }

    /// Under what a request of that client for that path and model counts.
    fn key(limit: &v1::RateLimit, client: &str, path: &str, model: Model<'_>) -> Option<String> {
        let client: Option<SpiffeId> = (!client.is_empty()).then(|| client.parse().unwrap());
        let headers = HeaderMap::new();
        let http = Http { method: "POST", path, model, headers: &headers };
        let facts = Facts { client: client.as_ref(), port: 8000, http: Some(http) };
        Some(RateLimit::compile(limit).unwrap().counts(&facts)?.to_string())
    }

    #[test]
    fn paths_are_looked_at_where_something_depends_on_them_and_nowhere_else() {
        let rule = |rule: AccessRule, by| RateLimit::compile(&limit(rule, by)).unwrap().looks_at_paths();
        let to_methods = to(&[AccessTo { methods: texts(&["POST"]), ..AccessTo::default() }]);
        assert!(!rule(AccessRule::default(), By { identity: true, ..By::default() }));
        assert!(!rule(to_methods, By::default()));
        for depends in [
            AccessTo { paths: texts(&["/a"]), ..AccessTo::default() },
            AccessTo { not_paths: texts(&["/a"]), ..AccessTo::default() },
            AccessTo { grpc: texts(&["p.S/M"]), ..AccessTo::default() },
            AccessTo { models: texts(&["m"]), ..AccessTo::default() },
        ] {
            assert!(rule(to(std::slice::from_ref(&depends)), By::default()), "{depends:?}");
        }
        assert!(rule(AccessRule::default(), By { model: true, ..By::default() }));
        let tokens = Some(v1::Rate { count: 1, period_ms: 1_000, burst: 1 });
        let of_tokens = v1::RateLimit { tokens, ..limit(AccessRule::default(), By::default()) };
        assert!(
            RateLimit::compile(&of_tokens).unwrap().looks_at_paths(),
            "which requests use any is in the path"
        );
    }

    #[test]
    fn what_is_told_apart_is_in_the_key_and_nothing_else() {
        let all = |identity, model, route| By { identity, model, route };
        let paths = |list: &[&str]| AccessTo { paths: texts(list), ..AccessTo::default() };
        let routes = to(&[paths(&["/a"]), paths(&["/a", "/b"])]);
        let table = [
            (all(false, false, false), "all clients together"),
            (all(true, false, false), FRONT),
            (all(false, true, false), r#"all clients together for model "m""#),
            (all(false, false, true), "all clients together on route 2"),
            (all(true, true, true), r#"spiffe://cluster.local/ns/web/sa/front for model "m", on route 2"#),
        ];
        for (by, expected) in table {
            let counted = key(&limit(routes.clone(), by), FRONT, "/b", Model::Named("m"));
            assert_eq!(counted.as_deref(), Some(expected), "{by:?}");
        }
        let by = all(true, false, true);
        assert_eq!(
            key(&limit(routes.clone(), by), "", "/a", Model::None).unwrap(),
            "clients without an identity on route 1"
        );
        assert_eq!(key(&limit(routes, by), FRONT, "/c", Model::None), None);
    }

    #[test]
    fn who_hides_his_model_counts() {
        let big = to(&[AccessTo { models: texts(&["big"]), ..AccessTo::default() }]);
        let limit = limit(big, By { model: true, ..By::default() });
        assert!(key(&limit, FRONT, "/v1/completions", Model::Named("big/lora")).is_some());
        assert!(key(&limit, FRONT, "/v1/completions", Model::Named("small")).is_none());
        assert!(key(&limit, FRONT, "/v1/models", Model::None).is_none());
        assert_eq!(
            key(&limit, FRONT, "/v1/completions", Model::Unknown).unwrap(),
            "all clients together for requests whose model cannot be told"
        );
    }

    #[test]
    fn callers_are_matched_as_policies_match_them() {
        let from = AccessFrom { not_identities: texts(&[FRONT]), ..AccessFrom::default() };
        let others = limit(AccessRule { from: vec![from], ..AccessRule::default() }, By::default());
        assert!(key(&others, FRONT, "/", Model::None).is_none());
        assert!(key(&others, "spiffe://cluster.local/ns/x/sa/y", "/", Model::None).is_some());
        assert!(key(&others, "", "/", Model::None).is_some(), "nobody in particular may be one of them");
        let elsewhere = v1::RateLimit { ports: vec![9000], ..others };
        assert!(key(&elsewhere, "", "/", Model::None).is_none());
    }

    #[test]
    fn what_this_proxy_does_not_know_is_refused() {
        let good = limit(AccessRule::default(), By::default());
        let nothing = v1::RateLimit { concurrent: 0, ..good.clone() };
        let never = v1::Rate { count: 0, period_ms: 1_000, burst: 1 };
        let wrong = to(&[AccessTo { paths: texts(&["x"]), ..AccessTo::default() }]);
        for (bad, words) in [
            (nothing, "it limits nothing"),
            (v1::RateLimit { requests: Some(never), ..good.clone() }, "a rate of nothing"),
            (limit(wrong, By::default()), "write a path"),
        ] {
            let error = RateLimit::compile(&bad).unwrap_err();
            assert!(error.starts_with("RateLimit test/p: limit l: ") && error.contains(words), "{error}");
        }
    }
}
