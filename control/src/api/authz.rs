//! `/authz`: the policies and rate limits of a pod, and what would become of a request. Pure; decided by the code that proxies decide by.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use penstock_api::access::{self, Access, Arrival, Came, Entry, Facts, Http, Named};
use penstock_api::resource::Kind;
use penstock_api::view::{Authz, AuthzRow, LimitRow, Verdict};
use penstock_api::{SpiffeId, path, v1};
use prost::Message;
use serde::Deserialize;

use crate::snapshot::Snapshot;

/// What is asked.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Question {
    /// `<namespace>/<pod>`, or the pod's name where one namespace has it.
    #[serde(default)]
    pod: String,
    /// The client's identity; empty: it proves none.
    from: Option<String>,
    method: Option<String>,
    /// Without it, a connection whose bytes are not looked at is meant.
    path: Option<String>,
    model: Option<String>,
    port: Option<u16>,
    /// `name:value`, of one.
    header: Option<String>,
}

/// Answers, or says what is wrong with the question.
pub(super) fn answer(
    snapshot: &Snapshot,
    question: &Question,
    applied: impl Fn(&str) -> Option<bool>,
) -> Result<Authz, String> {
    let pod = pod(snapshot, &question.pod)?;
    let read = |kind| snapshot.get(kind, pod).map(|entry| &*entry.any.value);
    let broken = |error: &dyn std::fmt::Display| format!("{pod}: {error}; please report it");
    let message =
        v1::Access::decode(read(Kind::Access).unwrap_or_default()).map_err(|error| broken(&error))?;
    let access = Access::compile(&message).map_err(|error| broken(&error))?;
    let workload = v1::Workload::decode(read(Kind::Workload).unwrap_or_default()).unwrap_or_default();
    let ports: Vec<u16> = workload.ports.iter().filter_map(|port| u16::try_from(port.port).ok()).collect();
    let asks = question.from.is_some() || question.path.is_some() || question.method.is_some();
    let verdict = match asks {
        true => Some(verdict(&access, question, &workload, &ports)?),
        false => None,
    };
    Ok(Authz {
        pod: pod.to_owned(),
        applied: applied(pod),
        policies: message.policies.iter().flat_map(rows).collect(),
        limits: message.limits.iter().map(limit).collect(),
        verdict,
    })
}

fn pod<'a>(snapshot: &'a Snapshot, asked: &str) -> Result<&'a str, String> {
    let is = |name: &str| name == asked || !asked.contains('/') && name.split('/').nth(1) == Some(asked);
    let mut found = snapshot.all(Kind::Access).map(|(name, _)| name).filter(|name| is(name));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (Some(one), Some(other)) => Err(format!("{asked} may be {one} or {other}; write <namespace>/<pod>")),
        (None, _) => {
            let known: Vec<&str> = snapshot.all(Kind::Access).map(|(name, _)| name).take(8).collect();
            Err(format!("there is no pod {asked:?} in the mesh; there are {}", known.join(", ")))
        }
    }
}

fn verdict(
    access: &Access,
    question: &Question,
    workload: &v1::Workload,
    ports: &[u16],
) -> Result<Verdict, String> {
    let client = match question.from.as_deref() {
        None | Some("") => None,
        Some(id) => Some(id.parse::<SpiffeId>().map_err(|error| error.to_string())?),
    };
    let port = match (question.port, ports) {
        (Some(port), _) => port,
        (None, [first, ..]) => *first,
        (None, []) => return Err("the pod declares no port; say which one is meant with --port".to_owned()),
    };
    let bad = |what: &str, text: &str| format!("{text:?} is not {what}");
    let method: Method = match question.method.as_deref() {
        Some(text) => text.parse().map_err(|_| bad("a method", text))?,
        None => Method::GET,
    };
    let mut headers = HeaderMap::new();
    if let Some(text) = &question.header {
        let pair = text.split_once(':').ok_or_else(|| bad("a header: write name:value", text))?;
        let name: HeaderName = pair.0.trim().parse().map_err(|_| bad("the name of a header", pair.0))?;
        let value: HeaderValue = pair.1.trim().parse().map_err(|_| bad("the value of a header", pair.1))?;
        headers.insert(name, value);
    }
    let told =
        |allowed: bool, story: &str| Ok(Verdict { allowed, story: story.to_owned(), would_deny: None });
    let probes = || workload.probes.iter().filter(|probe| probe.port == u32::from(port));
    let calls = || workload.grpc_probes.iter().filter(|probe| probe.port == u32::from(port));
    if client.is_none()
        && let Some(target) = question.path.as_deref()
    {
        if method == Method::GET && probes().any(|probe| probe.path == target) {
            return told(
                true,
                "it is a probe that the pod declares, which the kubelet sends without a certificate",
            );
        }
        if method == Method::POST && target == access::HEALTH && calls().next().is_some() {
            let services: Vec<_> = calls().map(|probe| format!("{:?}", probe.service)).collect();
            let story =
                format!("it is a probe that the pod declares if it asks about {}", services.join(" or "));
            return told(true, &story);
        }
    }
    let declared = workload.ports.iter().find(|declared| declared.port == u32::from(port));
    let arrival = Arrival {
        protocol: declared.map(v1::WorkloadPort::protocol),
        came: if question.path.is_some() { Came::Http } else { Came::Bytes },
        proven: client.is_some(),
        permissive: workload.permissive,
        probed: probes().next().is_some() || calls().next().is_some(),
        denies_by_http: access.denies_by_http(port).is_some(),
    };
    match arrival.entry() {
        Entry::NotSecured | Entry::Probes => {
            return told(false, "plaintext-refused: the pod takes only mutual TLS");
        }
        Entry::NoPort => {
            let declared: Vec<String> = ports.iter().map(u16::to_string).collect();
            return told(false, &format!("unknown-port: the pod declares {}", declared.join(", ")));
        }
        Entry::NotHttp => {
            // As the pod's proxy says it.
            let detect = arrival.protocol == Some(v1::Protocol::Detect);
            let why = access.denies_by_http(port).filter(|_| detect);
            let why = why
                .map_or_else(|| format!("port {port} takes HTTP, and no other bytes"), |why| why.to_string());
            return told(false, &format!("not-authorized: {why}; ask about a request with --path"));
        }
        Entry::Requests | Entry::Bytes => {}
    }
    let Some(target) = question.path.as_deref() else {
        let mut verdict = decided(access, &Facts { client: client.as_ref(), port, http: None });
        if verdict.allowed && verdict.would_deny.is_none() && arrival.protocol == Some(v1::Protocol::Detect) {
            verdict.would_deny = access.would_deny_by_http(port).map(|why| why.to_string());
        }
        return Ok(verdict);
    };
    let path = target.split('?').next().unwrap_or_default();
    let mut unclear = None;
    let path = match access.looks_at_paths() || access.audits_paths() {
        false => path.into(),
        true => match path::canonical(path) {
            Ok(path) => path,
            // It passes as it came, and is told of.
            Err(_) if !access.looks_at_paths() => {
                unclear = access.would_refuse_unclear().map(|why| why.to_string());
                path.into()
            }
            Err(why) => {
                let story = format!("bad-request: servers read this path differently: {why}");
                return Ok(Verdict { allowed: false, story, would_deny: None });
            }
        },
    };
    // Where the body says it, it is what --model says, or it cannot be told.
    let said = question.model.clone().map_or(Named::Unknown, Named::As);
    let named = Named::in_path(&method, &path).unwrap_or(said);
    let http = Http { method: method.as_str(), path: &path, model: named.fact(), headers: &headers };
    let verdict = decided(access, &Facts { client: client.as_ref(), port, http: Some(http) });
    let would_deny = unclear.filter(|_| verdict.allowed).or(verdict.would_deny);
    Ok(Verdict { would_deny, ..verdict })
}

fn decided(access: &Access, facts: &Facts<'_>) -> Verdict {
    let decision = access.decide(facts);
    let story = match (&decision.denied, &decision.allowed) {
        (Some(why), _) => format!("not-authorized: {why}"),
        (None, Some((policy, rule))) => format!("{rule} of AccessPolicy {} allows it", policy.name),
        (None, None) => "no policy is about it, so everybody may".to_owned(),
    };
    let would_deny = decision.would_deny.map(|why| why.to_string());
    Verdict { allowed: decision.denied.is_none(), story, would_deny }
}

/// One row for each rule; a policy without rules has one all the same.
fn rows(policy: &v1::AccessPolicy) -> Vec<AuthzRow> {
    let action = match (policy.effect(), policy.audit) {
        (v1::access_policy::Effect::Deny, true) => "Audit (Deny)",
        (v1::access_policy::Effect::Deny, false) => "Deny",
        (_, true) => "Audit (Allow)",
        (_, false) => "Allow",
    };
    let row = AuthzRow {
        policy: policy.name.clone(),
        action: action.to_owned(),
        ports: about(&policy.ports),
        rule: "none".to_owned(),
        ..AuthzRow::default()
    };
    if !policy.unreadable.is_empty() {
        let why = format!("everything: it cannot be read ({})", policy.unreadable);
        return vec![AuthzRow { rule: "1".to_owned(), from: "anyone".to_owned(), to: why, ..row }];
    }
    if policy.rules.is_empty() {
        return vec![row];
    }
    let rules = policy.rules.iter().enumerate().map(|(index, rule)| AuthzRow {
        rule: match rule.name.as_str() {
            "" => (index + 1).to_string(),
            name => format!("{} ({name})", index + 1),
        },
        from: either(rule.from.iter().map(from), "anyone"),
        to: either(rule.to.iter().map(to), "everything"),
        when: when(rule),
        ..row.clone()
    });
    rules.collect()
}

fn about(ports: &[u32]) -> String {
    let ports: Vec<String> = ports.iter().map(u32::to_string).collect();
    if ports.is_empty() { "all".to_owned() } else { ports.join(",") }
}

fn when(rule: &v1::AccessRule) -> String {
    either([rule.headers.iter().map(header).collect::<Vec<_>>().join(", ")].into_iter(), "")
}

fn limit(limit: &v1::RateLimit) -> LimitRow {
    let rate = |rate: &Option<v1::Rate>, of: &str| {
        let v1::Rate { count, period_ms, burst } = *rate.as_ref()?;
        let period = Duration::from_millis(period_ms);
        let unit = match period.as_secs() {
            1 => "s".to_owned(),
            60 => "min".to_owned(),
            _ => humantime::format_duration(period).to_string(),
        };
        Some(format!("{count} {of}/{unit} ({burst} at once)"))
    };
    let concurrent = (limit.concurrent > 0).then(|| format!("{} requests at a time", limit.concurrent));
    let gives = [rate(&limit.requests, "requests"), concurrent, rate(&limit.tokens, "tokens")];
    let each = [
        (limit.by_identity, "each identity"),
        (limit.by_model, "each model"),
        (limit.by_route, "each route"),
    ];
    let each: Vec<&str> =
        each.into_iter().filter_map(|(told_apart, word)| told_apart.then_some(word)).collect();
    let of = limit.r#match.as_ref().map(|rule| {
        let from = either(rule.from.iter().map(from), "");
        let from = if from.is_empty() { from } else { format!("from {from}") };
        [from, either(rule.to.iter().map(to), ""), when(rule)]
    });
    let of: Vec<String> = of.into_iter().flatten().filter(|words| !words.is_empty()).collect();
    LimitRow {
        policy: limit.policy.clone(),
        limit: limit.name.clone(),
        ports: about(&limit.ports),
        gives: gives.into_iter().flatten().collect::<Vec<_>>().join(", "),
        each: if each.is_empty() { "all together".to_owned() } else { each.join(", ") },
        of: if of.is_empty() { "everything".to_owned() } else { of.join(" ") },
    }
}

fn either(words: impl Iterator<Item = String>, nothing: &str) -> String {
    let words: Vec<String> = words.collect();
    match words.iter().all(String::is_empty) {
        true => nothing.to_owned(),
        false => words.join(" or "),
    }
}

/// `one|other` of each list that says something, and `not one|other`.
fn lists(lists: &[(&str, &[String], &[String])]) -> String {
    let mut words = Vec::new();
    for (what, of, not) in lists {
        let what = if what.is_empty() { String::new() } else { format!("{what} ") };
        if !of.is_empty() {
            words.push(format!("{what}{}", of.join("|")));
        }
        if !not.is_empty() {
            words.push(format!("not {what}{}", not.join("|")));
        }
    }
    words.join(" ")
}

fn from(from: &v1::AccessFrom) -> String {
    let said = lists(&[
        ("", &from.identities, &from.not_identities),
        ("namespace", &from.namespaces, &from.not_namespaces),
        ("account", &from.service_accounts, &from.not_service_accounts),
    ]);
    if said.is_empty() { "any identity".to_owned() } else { said }
}

fn to(to: &v1::AccessTo) -> String {
    let numbers = |ports: &[u32]| ports.iter().map(u32::to_string).collect::<Vec<_>>();
    lists(&[
        ("", &to.methods, &to.not_methods),
        ("", &to.paths, &to.not_paths),
        ("grpc", &to.grpc, &to.not_grpc),
        ("model", &to.models, &to.not_models),
        ("port", &numbers(&to.ports), &numbers(&to.not_ports)),
    ])
}

fn header(header: &v1::AccessHeader) -> String {
    let said = lists(&[("", &header.values, &header.not_values)]);
    let said = if said.is_empty() { "is there".to_owned() } else { said };
    format!("header {} {said}", header.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Builder;
    use penstock_api::v1::access_policy::Effect;

    const FRONT: &str = "spiffe://cluster.local/ns/web/sa/front";

    fn snapshot() -> Snapshot {
        let rule = v1::AccessRule {
            name: "readers".into(),
            from: vec![v1::AccessFrom { namespaces: vec!["web".into()], ..Default::default() }],
            to: vec![v1::AccessTo {
                methods: vec!["POST".into()],
                models: vec!["digits".into()],
                ..Default::default()
            }],
            ..Default::default()
        };
        let allow = v1::AccessPolicy {
            name: "a/p".into(),
            effect: Effect::Allow.into(),
            rules: vec![rule],
            ..Default::default()
        };
        let to = v1::AccessTo { paths: vec!["/v1/*".into()], ..Default::default() };
        let limits = [
            v1::RateLimit {
                policy: "a/fair".into(),
                name: "each".into(),
                ports: vec![8000],
                by_identity: true,
                by_model: true,
                requests: Some(v1::Rate { count: 100, period_ms: 60_000, burst: 20 }),
                concurrent: 4,
                r#match: Some(v1::AccessRule { to: vec![to], ..Default::default() }),
                ..Default::default()
            },
            v1::RateLimit {
                policy: "a/fair".into(),
                name: "all".into(),
                tokens: Some(v1::Rate { count: 9, period_ms: 1_000, burst: 9 }),
                ..Default::default()
            },
        ];
        let port = v1::WorkloadPort { port: 8000, ..Default::default() };
        let probe = v1::Probe { port: 8000, path: "/ready".into(), ..Default::default() };
        let health = v1::GrpcProbe { port: 8000, service: "live".into(), ..Default::default() };
        let workload = v1::Workload {
            ports: vec![port],
            probes: vec![probe],
            grpc_probes: vec![health],
            ..Default::default()
        };
        let mut builder = Builder::default();
        builder.add(
            Kind::Access,
            "a/digits-0",
            &v1::Access { policies: vec![allow], level: 1, limits: limits.into() },
        );
        builder.add(Kind::Access, "a/open", &v1::Access::default());
        builder.add(Kind::Access, "b/open", &v1::Access::default());
        builder.add(Kind::Workload, "a/digits-0", &workload);
        let deny = v1::AccessPolicy {
            name: "c/d".into(),
            effect: Effect::Deny.into(),
            rules: vec![v1::AccessRule {
                to: vec![v1::AccessTo {
                    paths: vec!["/admin".into()],
                    ports: vec![8000],
                    ..Default::default()
                }],
                ..Default::default()
            }],
            ..Default::default()
        };
        let http = v1::WorkloadPort { port: 8002, protocol: v1::Protocol::Http.into(), ..Default::default() };
        let found_out = [8000, 8001].map(|port| v1::WorkloadPort { port, ..Default::default() });
        let raw = v1::Workload { ports: [&found_out[..], &[http]].concat(), ..Default::default() };
        builder.add(
            Kind::Access,
            "c/raw",
            &v1::Access { policies: vec![deny], level: 1, limits: Vec::new() },
        );
        builder.add(Kind::Workload, "c/raw", &raw);
        builder.build(Vec::new())
    }

    fn ask(question: Question) -> Result<Authz, String> {
        answer(&snapshot(), &question, |_| Some(true))
    }

    #[test]
    fn a_pods_policies_are_told_rule_by_rule() {
        let told = ask(Question { pod: "digits-0".into(), ..Question::default() }).unwrap();
        assert_eq!((&*told.pod, told.applied, &told.verdict), ("a/digits-0", Some(true), &None));
        let row = &told.policies[0];
        assert_eq!(
            [&*row.policy, &*row.action, &*row.ports, &*row.rule, &*row.from, &*row.to, &*row.when],
            ["a/p", "Allow", "all", "1 (readers)", "namespace web", "POST model digits", ""]
        );
        let limits = told
            .limits
            .iter()
            .map(|row| [&*row.policy, &*row.limit, &*row.ports, &*row.gives, &*row.each, &*row.of]);
        assert_eq!(
            limits.collect::<Vec<_>>(),
            [
                [
                    "a/fair",
                    "each",
                    "8000",
                    "100 requests/min (20 at once), 4 requests at a time",
                    "each identity, each model",
                    "/v1/*"
                ],
                ["a/fair", "all", "all", "9 tokens/s (9 at once)", "all together", "everything"],
            ]
        );
        assert!(
            ask(Question { pod: "open".into(), ..Question::default() })
                .unwrap_err()
                .contains("a/open or b/open")
        );
        assert!(ask(Question::default()).unwrap_err().contains("there are a/digits-0"));
    }

    #[test]
    fn what_would_become_of_a_request_is_told_with_its_reason() {
        let question = |from: &str, method: &str, path: &str, model: Option<&str>| Question {
            pod: "a/digits-0".into(),
            from: Some(from.into()),
            method: Some(method.into()),
            path: (!path.is_empty()).then(|| path.into()),
            model: model.map(Into::into),
            ..Question::default()
        };
        let table = [
            (
                question("", "POST", access::HEALTH, None),
                true,
                "a probe that the pod declares if it asks about \"live\"",
            ),
            (question("", "GET", access::HEALTH, None), false, "plaintext-refused"),
            (question("", "GET", "", None), false, "plaintext-refused"),
            (
                question(FRONT, "POST", "/v2/models/digits/infer", None),
                true,
                "rule 1 (readers) of AccessPolicy a/p allows it",
            ),
            (question(FRONT, "POST", "/v1/chat/completions", Some("digits")), true, "allows it"),
            (
                question(FRONT, "POST", "/v1/chat/completions", None),
                false,
                "not-authorized: no policy allows it",
            ),
            (question(FRONT, "POST", "/v2/models/%64igits//infer", None), true, "allows it"),
            (question(FRONT, "POST", "/v2/models/a%2Fb/infer", None), false, "bad-request"),
            (question(FRONT, "GET", "", None), false, "not-authorized"),
            (question("", "GET", "/ready", None), true, "probe"),
            (question("", "GET", "/x", None), false, "plaintext-refused"),
        ];
        for (question, allowed, words) in table {
            let verdict = ask(question.clone()).unwrap().verdict.unwrap();
            assert_eq!(verdict.allowed, allowed, "{question:?}: {verdict:?}");
            assert!(verdict.story.contains(words), "{question:?}: {verdict:?}");
        }
        assert!(ask(question("web", "GET", "/", None)).unwrap_err().contains("not an identity"));
    }

    #[test]
    fn of_bytes_it_says_what_the_pods_proxy_does() {
        let table = [
            (8000, None, false, "AccessPolicy c/d denies something that only HTTP says"),
            (8000, Some("/x"), true, "everybody may"),
            (8000, Some("/admin"), false, "rule 1 of AccessPolicy c/d denies it"),
            (8001, None, true, "everybody may"),
            (8002, None, false, "takes HTTP"),
            (9999, None, false, "unknown-port: the pod declares 8000, 8001, 8002"),
            (9999, Some("/x"), false, "unknown-port"),
        ];
        for (port, path, allowed, words) in table {
            let question = Question {
                pod: "c/raw".into(),
                from: Some(FRONT.into()),
                port: Some(port),
                path: path.map(Into::into),
                ..Question::default()
            };
            let verdict = ask(question).unwrap().verdict.unwrap();
            assert_eq!(verdict.allowed, allowed, "{port} {path:?}: {verdict:?}");
            assert!(verdict.story.contains(words), "{port} {path:?}: {verdict:?}");
        }
    }
}
