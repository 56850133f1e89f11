//! `/routes`: what matches, where it goes, and how many proxies hold it. Pure.

use std::collections::BTreeMap;

use penstock_api::resource::Kind;
use penstock_api::v1::{self, filter, string_match};
use penstock_api::view::RouteRow;
use prost::Message;

use crate::snapshot::Snapshot;

/// Of a resource: how many proxies hold it, how many want it.
type Holders = BTreeMap<String, (usize, usize)>;

/// One row for each backend of each rule; rules that answer by themselves have one row without a weight.
pub(super) fn rows(snapshot: &Snapshot, routes: &Holders, weights: &Holders) -> Vec<RouteRow> {
    let mut rows = Vec::new();
    let everybodys = snapshot.all(Kind::Routes).map(|(service, entry)| (service, None, entry));
    let own = snapshot.consumers().map(|(service, namespace, entry)| (service, Some(namespace), entry));
    for (service, namespace, entry) in everybodys.chain(own) {
        let Ok(decoded) = v1::Routes::decode(&*entry.any.value) else { continue };
        // What a namespace sees beside its own rules, all others see too.
        let own = |rule: &&v1::Rule| namespace.is_none_or(|own| rule.route.split('/').next() == Some(own));
        for rule in decoded.rules.iter().filter(own) {
            let mut row = RouteRow {
                service: service.to_owned(),
                route: format!("{}#{}", rule.route, rule.index),
                matches: matches(rule),
                ..RouteRow::default()
            };
            if let Some(namespace) = namespace {
                row.matches.push_str(&format!(", clients in {namespace}"));
            }
            let found = snapshot.get(Kind::Weights, &rule.weights);
            let backends = found.and_then(|entry| v1::Weights::decode(&*entry.any.value).ok());
            let Some(v1::Weights { backends, .. }) = backends else {
                let (applied, subscribed) = routes.get(service).copied().unwrap_or_default();
                rows.push(RouteRow { backend: answer(rule), applied, subscribed, ..row });
                continue;
            };
            let (applied, subscribed) = weights.get(&rule.weights).copied().unwrap_or_default();
            let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
            for backend in backends {
                let name = match &*backend.invalid {
                    "" => backend.service,
                    why => format!("{} (invalid: {why})", backend.service),
                };
                rows.push(RouteRow {
                    backend: name,
                    weight: backend.weight,
                    share: f64::from(backend.weight) / total.max(1) as f64,
                    applied,
                    subscribed,
                    ..row.clone()
                });
            }
        }
    }
    rows
}

/// What a rule without backends does.
fn answer(rule: &v1::Rule) -> String {
    let redirect = rule.filters.iter().find_map(|filter| match &filter.kind {
        Some(filter::Kind::Redirect(redirect)) => Some(redirect),
        _ => None,
    });
    match redirect {
        Some(redirect) if redirect.hostname.is_empty() => format!("redirect {}", redirect.status),
        Some(redirect) => format!("redirect {} to {}", redirect.status, redirect.hostname),
        None => "500".to_owned(),
    }
}

/// A rule's matches in words: any of them, each all of its parts.
fn matches(rule: &v1::Rule) -> String {
    let mut words: Vec<String> = rule.matches.iter().map(one_match).collect();
    words.retain(|words| !words.is_empty());
    let mut text = if words.is_empty() || words.len() < rule.matches.len() {
        "every request".to_owned()
    } else {
        words.join(" or ")
    };
    if !rule.hostnames.is_empty() {
        text.push_str(&format!(", host {}", rule.hostnames.join("|")));
    }
    if rule.port != 0 {
        text.push_str(&format!(", port {}", rule.port));
    }
    text
}

fn one_match(one: &v1::Match) -> String {
    let mut parts = Vec::new();
    if !one.method.is_empty() {
        parts.push(one.method.clone());
    }
    match one.path.as_ref().and_then(|path| path.kind.as_ref()) {
        Some(string_match::Kind::Exact(path)) => parts.push(path.clone()),
        // Everything begins with it.
        Some(string_match::Kind::Prefix(path)) if path == "/" => {}
        Some(string_match::Kind::Prefix(path)) => parts.push(format!("{}/*", path.trim_end_matches('/'))),
        Some(string_match::Kind::Regex(path)) => parts.push(format!("~{path}")),
        None => {}
    }
    for (what, named) in
        one.headers.iter().map(|h| ("header", h)).chain(one.query.iter().map(|q| ("query", q)))
    {
        parts.push(match named.value.as_ref().and_then(|value| value.kind.as_ref()) {
            Some(string_match::Kind::Exact(value)) => format!("{what} {}={value}", named.name),
            Some(string_match::Kind::Prefix(value)) => format!("{what} {}={value}*", named.name),
            Some(string_match::Kind::Regex(value)) => format!("{what} {}~{value}", named.name),
            None => format!("{what} {}", named.name),
        });
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Builder;

    fn exact(value: &str) -> Option<v1::StringMatch> {
        Some(v1::StringMatch { kind: Some(string_match::Kind::Exact(value.into())) })
    }

    fn prefix(value: &str) -> Option<v1::StringMatch> {
        Some(v1::StringMatch { kind: Some(string_match::Kind::Prefix(value.into())) })
    }

    #[test]
    fn a_rule_reads_like_a_sentence() {
        let header = v1::NamedMatch { name: "x-user".into(), value: exact("beta") };
        let beta =
            v1::Match { method: "POST".into(), path: prefix("/v2"), headers: vec![header], query: vec![] };
        let root = v1::Match { path: prefix("/"), ..v1::Match::default() };
        let table = [
            (vec![], "every request"),
            (vec![root.clone()], "every request"),
            (vec![beta.clone()], "POST /v2/* header x-user=beta"),
            (vec![beta.clone(), root], "every request"),
            (
                vec![beta, v1::Match { path: exact("/a"), ..v1::Match::default() }],
                "POST /v2/* header x-user=beta or /a",
            ),
        ];
        for (list, expected) in table {
            assert_eq!(matches(&v1::Rule { matches: list, ..v1::Rule::default() }), expected);
        }
    }

    #[test]
    fn every_backend_of_every_rule_has_a_row_that_says_who_holds_it() {
        let backend =
            |service: &str, weight| v1::Backend { service: service.into(), weight, ..v1::Backend::default() };
        let redirect = v1::Redirect { status: 301, hostname: "b".into(), ..v1::Redirect::default() };
        let rules = vec![
            v1::Rule { route: "a/r".into(), weights: "a/s/a/r/0".into(), ..v1::Rule::default() },
            v1::Rule {
                route: "a/r".into(),
                index: 1,
                filters: vec![v1::Filter { kind: Some(filter::Kind::Redirect(redirect)) }],
                ..v1::Rule::default()
            },
        ];
        let mut builder = Builder::default();
        builder.add(Kind::Routes, "a/s", &v1::Routes { rules });
        let backends = vec![backend("a/v1", 75), backend("a/v2", 25)];
        builder.add(Kind::Weights, "a/s/a/r/0", &v1::Weights { backends, ..v1::Weights::default() });
        // Of a namespace that has a rule of its own; the other is what all see.
        let own = |route: &str| v1::Rule {
            route: route.into(),
            weights: format!("a/s/{route}/0"),
            ..v1::Rule::default()
        };
        builder.add_for("b", "a/s", &v1::Routes { rules: vec![own("b/r"), own("a/r")] });
        builder.add(
            Kind::Weights,
            "a/s/b/r/0",
            &v1::Weights { backends: vec![backend("b/x", 1)], ..v1::Weights::default() },
        );
        let holders = BTreeMap::from([("a/s/a/r/0".to_owned(), (2, 3)), ("a/s/b/r/0".to_owned(), (1, 1))]);
        let rows = rows(&builder.build(Vec::new()), &BTreeMap::new(), &holders);
        let short: Vec<_> = rows
            .iter()
            .map(|row| (&*row.route, &*row.backend, row.weight, row.share, row.applied, row.subscribed))
            .collect();
        assert_eq!(
            short,
            [
                ("a/r#0", "a/v1", 75, 0.75, 2, 3),
                ("a/r#0", "a/v2", 25, 0.25, 2, 3),
                ("a/r#1", "redirect 301 to b", 0, 0.0, 0, 0),
                ("b/r#0", "b/x", 1, 1.0, 1, 1),
            ]
        );
        assert_eq!(rows[3].matches, "every request, clients in b");
    }
}
