use proptest::prelude::*;

use super::*;
use crate::v1::{AccessFrom, AccessHeader, AccessPolicy, AccessRule, AccessTo};

const FRONT: &str = "spiffe://cluster.local/ns/web/sa/front";
const BATCH: &str = "spiffe://cluster.local/ns/jobs/sa/batch";

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn policy(name: &str, effect: Effect, rules: Vec<AccessRule>) -> AccessPolicy {
    AccessPolicy { name: format!("test/{name}"), effect: effect.into(), rules, ..AccessPolicy::default() }
}

fn audit(policy: AccessPolicy) -> AccessPolicy {
    AccessPolicy { audit: true, ..policy }
}

fn from(identities: &[&str]) -> AccessRule {
    let from = AccessFrom { identities: texts(identities), ..AccessFrom::default() };
    AccessRule { from: vec![from], ..AccessRule::default() }
}

fn to(to: AccessTo) -> AccessRule {
    AccessRule { to: vec![to], ..AccessRule::default() }
}

fn access(policies: Vec<AccessPolicy>) -> Access {
    Access::compile(&v1::Access { policies, level: LEVEL, limits: Vec::new() }).unwrap()
}

/// A request as a table writes it.
#[derive(Debug, Clone)]
struct Ask {
    client: &'static str,
    method: &'static str,
    path: &'static str,
    model: Model<'static>,
    headers: HeaderMap,
    bytes: bool,
}

fn get() -> Ask {
    Ask {
        client: FRONT,
        method: "GET",
        path: "/x",
        model: Model::None,
        headers: HeaderMap::new(),
        bytes: false,
    }
}

fn decided(access: &Access, ask: &Ask) -> (Option<String>, Option<String>) {
    let client = (!ask.client.is_empty()).then(|| ask.client.parse().unwrap());
    let http = Http { method: ask.method, path: ask.path, model: ask.model, headers: &ask.headers };
    let facts = Facts { client: client.as_ref(), port: 8000, http: (!ask.bytes).then_some(http) };
    let decision = access.decide(&facts);
    (decision.denied.map(|why| why.to_string()), decision.would_deny.map(|why| why.to_string()))
}

fn allowed(access: &Access, ask: &Ask) -> bool {
    decided(access, ask).0.is_none()
}

#[test]
fn without_policies_everybody_may_do_everything() {
    let open = access(vec![]);
    assert!(open.is_open());
    for client in [FRONT, BATCH, ""] {
        assert!(allowed(&open, &Ask { client, ..get() }));
        assert!(allowed(&open, &Ask { client, bytes: true, ..get() }));
    }
}

#[test]
fn once_a_policy_allows_something_all_else_is_denied_and_the_story_says_so() {
    let one = access(vec![policy("front", Effect::Allow, vec![from(&[FRONT])])]);
    assert!(allowed(&one, &get()));
    let story = |access: &Access, client| decided(access, &Ask { client, ..get() }).0.unwrap();
    assert_eq!(story(&one, BATCH), "no policy allows it: only AccessPolicy test/front allows anything here");
    assert!(!allowed(&one, &Ask { client: "", ..get() }), "nobody in particular is on no list");
    let nothing = policy("nothing", Effect::Allow, vec![]);
    let two = access(vec![policy("front", Effect::Allow, vec![from(&[FRONT])]), nothing]);
    assert_eq!(
        story(&two, BATCH),
        "no policy allows it: AccessPolicy test/front and 1 more allow something here"
    );
}

#[test]
fn a_deny_wins_over_every_allow() {
    let everything = || policy("all", Effect::Allow, vec![AccessRule::default()]);
    let named = AccessRule { name: "no jobs".into(), ..from(&["spiffe://cluster.local/ns/jobs/*"]) };
    let both = access(vec![everything(), policy("jobs", Effect::Deny, vec![from(&["spiffe://x/*"]), named])]);
    assert!(allowed(&both, &get()));
    assert_eq!(
        decided(&both, &Ask { client: BATCH, ..get() }).0.unwrap(),
        "rule 2 (no jobs) of AccessPolicy test/jobs denies it"
    );
    // A Deny alone leaves the rest open.
    let deny = access(vec![policy("jobs", Effect::Deny, vec![from(&[BATCH])])]);
    assert!(allowed(&deny, &get()) && !allowed(&deny, &Ask { client: BATCH, ..get() }));
}

#[test]
fn an_audit_reports_and_changes_nothing() {
    let try_out = access(vec![audit(policy("front", Effect::Allow, vec![from(&[FRONT])]))]);
    assert_eq!(decided(&try_out, &get()), (None, None));
    let (denied, would) = decided(&try_out, &Ask { client: BATCH, ..get() });
    assert_eq!(
        (denied, would.unwrap().as_str()),
        (None, "no policy allows it: only AccessPolicy test/front allows anything here")
    );
    let deny = audit(policy("jobs", Effect::Deny, vec![from(&[BATCH])]));
    let beside = access(vec![policy("all", Effect::Allow, vec![AccessRule::default()]), deny]);
    let (denied, would) = decided(&beside, &Ask { client: BATCH, ..get() });
    assert_eq!((denied, would.unwrap().as_str()), (None, "rule 1 of AccessPolicy test/jobs denies it"));
    // What an Allow in force lets through would be let through beside it too.
    let beside = access(vec![
        policy("jobs", Effect::Allow, vec![from(&[BATCH])]),
        audit(policy("front", Effect::Allow, vec![from(&[FRONT])])),
    ]);
    assert_eq!(decided(&beside, &Ask { client: BATCH, ..get() }), (None, None));
    assert!(!allowed(&beside, &get()), "an audit allows nothing");
}

#[test]
fn who_asks() {
    let with = |from: AccessFrom, effect| {
        access(vec![policy("p", effect, vec![AccessRule { from: vec![from], ..AccessRule::default() }])])
    };
    let namespaces = |list: &[&str]| AccessFrom { namespaces: texts(list), ..AccessFrom::default() };
    let accounts = |list: &[&str]| AccessFrom { service_accounts: texts(list), ..AccessFrom::default() };
    let not = |list: &[&str]| AccessFrom { not_identities: texts(list), ..AccessFrom::default() };
    // Whom an Allow lets through, of the front, the batch and nobody in particular.
    let table = [
        (namespaces(&["web"]), [true, false, false]),
        (namespaces(&["we*", "j*"]), [true, true, false]),
        (namespaces(&["we"]), [false, false, false]),
        (accounts(&["web/front"]), [true, false, false]),
        (accounts(&["web/*", "jobs/ba*"]), [true, true, false]),
        (accounts(&["jobs/front"]), [false, false, false]),
        (AccessFrom { service_accounts: texts(&["web/front"]), ..namespaces(&["jobs"]) }, [false; 3]),
        (AccessFrom { identities: texts(&["*"]), ..AccessFrom::default() }, [true, true, false]),
        (AccessFrom { not_identities: texts(&[FRONT]), ..namespaces(&["*"]) }, [false, true, false]),
        // Nobody in particular is not certainly another than the front.
        (not(&[FRONT]), [false, true, false]),
        (AccessFrom::default(), [true, true, false]),
    ];
    for (from, expected) in table {
        let access = with(from.clone(), Effect::Allow);
        let seen = [FRONT, BATCH, ""].map(|client| allowed(&access, &Ask { client, ..get() }));
        assert_eq!(seen, expected, "{from:?}");
    }
    // All but the front: also who proves nothing.
    let but_front = with(not(&[FRONT]), Effect::Deny);
    let seen = [FRONT, BATCH, ""].map(|client| allowed(&but_front, &Ask { client, ..get() }));
    assert_eq!(seen, [true, false, false]);
}

#[test]
fn what_is_asked_for() {
    let lists = |change: fn(&mut AccessTo)| {
        let mut lists = AccessTo::default();
        change(&mut lists);
        lists
    };
    let post = |path| Ask { method: "POST", path, ..get() };
    let infer = "/inference.GRPCInferenceService/ModelInfer";
    let table = [
        (lists(|to| to.methods = texts(&["GET", "HEAD"])), get(), true),
        (lists(|to| to.methods = texts(&["GET"])), post("/x"), false),
        (lists(|to| to.not_methods = texts(&["POST"])), post("/x"), false),
        (lists(|to| to.paths = texts(&["/x"])), get(), true),
        (lists(|to| to.paths = texts(&["/x"])), post("/x/y"), false),
        (lists(|to| to.paths = texts(&["/x/*"])), post("/x/y"), true),
        (lists(|to| to.not_paths = texts(&["/x/secret/*"])), post("/x/secret"), false),
        (lists(|to| to.grpc = texts(&["inference.GRPCInferenceService/*"])), post(infer), true),
        (lists(|to| to.grpc = texts(&["inference.GRPCInferenceService/ModelReady"])), post(infer), false),
        (lists(|to| to.ports = vec![8000]), get(), true),
        (lists(|to| to.ports = vec![8001]), get(), false),
        (lists(|to| to.not_ports = vec![8000]), get(), false),
        (lists(|to| (to.methods, to.paths) = (texts(&["GET"]), texts(&["/y"]))), get(), false),
    ];
    for (lists, ask, expected) in table {
        let seen = allowed(&access(vec![policy("p", Effect::Allow, vec![to(lists.clone())])]), &ask);
        assert_eq!(seen, expected, "{lists:?} {} {}", ask.method, ask.path);
    }
}

#[test]
fn a_model_that_cannot_be_told_counts_against_the_client() {
    let models = |list: &[&str]| to(AccessTo { models: texts(list), ..AccessTo::default() });
    let but = |list: &[&str]| to(AccessTo { not_models: texts(list), ..AccessTo::default() });
    let of = [
        Model::Named("digits"),
        Model::Named("digits/2"),
        Model::Named("llama"),
        Model::None,
        Model::Unknown,
    ];
    // What an Allow, and what a Deny with the rule lets through.
    let table = [
        (models(&["digits"]), [true, true, false, false, false], [false, false, true, true, false]),
        (models(&["digits/2", "ll*"]), [false, true, true, false, false], [true, false, false, true, false]),
        (but(&["digits"]), [false, false, true, true, false], [true, true, false, false, false]),
    ];
    for (rule, by_allow, by_deny) in table {
        for (effect, expected) in [(Effect::Allow, by_allow), (Effect::Deny, by_deny)] {
            let access = access(vec![policy("p", effect, vec![rule.clone()])]);
            assert!(access.looks_at_models() && access.looks_at_paths());
            let seen = of.map(|model| allowed(&access, &Ask { model, ..get() }));
            assert_eq!(seen, expected, "{effect:?} {rule:?}");
        }
    }
}

#[test]
fn of_a_header_with_several_values_the_worst_counts() {
    let rule = |values: &[&str], not: &[&str]| AccessRule {
        headers: vec![AccessHeader {
            name: "X-Tenant".into(),
            values: texts(values),
            not_values: texts(not),
        }],
        ..AccessRule::default()
    };
    let asks = [&[][..], &["a"], &["b"], &["a", "b"]];
    let table = [
        (rule(&["a"], &[]), [false, true, false, false], [true, false, true, false]),
        (rule(&[], &["a"]), [true, false, true, false], [false, true, false, false]),
        (rule(&[], &[]), [false, true, true, true], [true, false, false, false]),
    ];
    for (rule, by_allow, by_deny) in table {
        for (effect, expected) in [(Effect::Allow, by_allow), (Effect::Deny, by_deny)] {
            let access = access(vec![policy("p", effect, vec![rule.clone()])]);
            let seen = asks.map(|values| {
                let mut headers = HeaderMap::new();
                for value in values {
                    headers.append("x-tenant", value.parse().unwrap());
                }
                allowed(&access, &Ask { headers, ..get() })
            });
            assert_eq!(seen, expected, "{effect:?} {rule:?}");
        }
    }
}

#[test]
fn bytes_are_allowed_and_denied_by_identity_and_port_only() {
    let bytes = || Ask { bytes: true, ..get() };
    let http = to(AccessTo { methods: texts(&["GET"]), ..AccessTo::default() });
    let port = to(AccessTo { ports: vec![8000], ..AccessTo::default() });
    for (rule, matches) in [(from(&[FRONT]), true), (port, true), (http, false)] {
        assert_eq!(allowed(&access(vec![policy("p", Effect::Allow, vec![rule.clone()])]), &bytes()), matches);
        assert_eq!(allowed(&access(vec![policy("p", Effect::Deny, vec![rule])]), &bytes()), !matches);
    }
}

#[test]
fn a_policy_about_some_ports_leaves_the_others_alone() {
    let other = AccessPolicy { ports: vec![9000], ..policy("p", Effect::Allow, vec![]) };
    assert!(allowed(&access(vec![other]), &get()));
    let this = AccessPolicy { ports: vec![8000, 9000], ..policy("p", Effect::Allow, vec![]) };
    assert!(!allowed(&access(vec![this]), &get()));
}

#[test]
fn what_is_not_understood_is_refused_and_what_cannot_be_read_denies() {
    let newer = v1::Access { level: LEVEL + 1, ..v1::Access::default() };
    assert!(Access::compile(&newer).unwrap_err().contains("upgrade"));
    let compile =
        |policy| Access::compile(&v1::Access { policies: vec![policy], level: LEVEL, limits: Vec::new() });
    assert!(compile(policy("p", Effect::Unspecified, vec![])).unwrap_err().contains("AccessPolicy test/p"));
    let bad = to(AccessTo { paths: texts(&["x"]), ..AccessTo::default() });
    assert!(compile(policy("p", Effect::Allow, vec![bad])).unwrap_err().contains("rule 1"));
    for (effect, rules) in
        [(Effect::Deny, vec![AccessRule::default()]), (Effect::Deny, vec![]), (Effect::Allow, vec![])]
    {
        let unreadable = AccessPolicy { unreadable: "a.yaml:3: what".into(), ..policy("p", effect, rules) };
        let story = decided(&access(vec![unreadable]), &Ask { bytes: true, ..get() }).0.unwrap();
        assert_eq!(
            story,
            "AccessPolicy test/p cannot be read and therefore denies everything; a.yaml:3: what"
        );
    }
}

fn any_rule() -> impl Strategy<Value = AccessRule> {
    let ids = prop::sample::subsequence(vec![FRONT, BATCH, "spiffe://cluster.local/ns/web/*", "*"], 0..3);
    let lists = (
        ids.clone(),
        ids,
        prop::sample::subsequence(vec!["GET", "POST"], 0..2),
        prop::sample::subsequence(vec!["/x", "/y/*"], 0..2),
        prop::sample::subsequence(vec!["digits", "llama*"], 0..2),
        prop::sample::subsequence(vec!["digits", "llama*"], 0..2),
        any::<[bool; 2]>(),
    );
    lists.prop_map(|(identities, not, methods, paths, models, not_models, [sources, targets])| {
        let source =
            AccessFrom { identities: texts(&identities), not_identities: texts(&not), ..Default::default() };
        let target = AccessTo {
            methods: texts(&methods),
            paths: texts(&paths),
            models: texts(&models),
            not_models: texts(&not_models),
            ..Default::default()
        };
        AccessRule {
            from: if sources { vec![source] } else { vec![] },
            to: if targets { vec![target] } else { vec![] },
            ..Default::default()
        }
    })
}

fn any_policies() -> impl Strategy<Value = Vec<AccessPolicy>> {
    let one = (any::<[bool; 2]>(), prop::collection::vec(any_rule(), 0..3)).prop_map(
        |([denies, audits], rules)| {
            let effect = if denies { Effect::Deny } else { Effect::Allow };
            AccessPolicy { audit: audits, ..policy("p", effect, rules) }
        },
    );
    prop::collection::vec(one, 0..5)
}

fn any_ask() -> impl Strategy<Value = Ask> {
    let model = prop::sample::select(vec![
        Model::None,
        Model::Named("digits"),
        Model::Named("llama-3"),
        Model::Unknown,
    ]);
    let text = |list: &'static [&'static str]| prop::sample::select(list);
    (text(&[FRONT, BATCH, ""]), text(&["GET", "POST"]), text(&["/x", "/y/z", "/"]), model, any::<bool>())
        .prop_map(|(client, method, path, model, bytes)| Ask {
            client,
            method,
            path,
            model,
            headers: HeaderMap::new(),
            bytes,
        })
}

proptest! {
    /// More Deny, or less Allow, never lets anything through that was denied.
    #[test]
    fn a_deny_more_never_opens(policies in any_policies(), rule in any_rule(), ask in any_ask()) {
        let before = allowed(&access(policies.clone()), &ask);
        let more = [policies, vec![policy("more", Effect::Deny, vec![rule])]].concat();
        prop_assert!(before || !allowed(&access(more), &ask));
    }

    /// The order of policies decides nothing.
    #[test]
    fn the_order_is_nothing(policies in any_policies(), ask in any_ask()) {
        let turned: Vec<_> = policies.iter().rev().cloned().collect();
        prop_assert_eq!(allowed(&access(policies), &ask), allowed(&access(turned), &ask));
    }

    /// Audits decide nothing, and what they report is what would happen if they were in force.
    #[test]
    fn an_audit_tells_the_future(policies in any_policies(), ask in any_ask()) {
        let without: Vec<_> = policies.iter().filter(|policy| !policy.audit).cloned().collect();
        let enforced: Vec<_> = policies.iter().cloned().map(|p| AccessPolicy { audit: false, ..p }).collect();
        let (denied, would) = decided(&access(policies), &ask);
        prop_assert_eq!(denied.is_none(), allowed(&access(without), &ask));
        if denied.is_none() {
            prop_assert_eq!(would.is_none(), allowed(&access(enforced), &ask));
        }
    }

    /// Who hides who he is, or which model he means, gets no more than some other who does not.
    #[test]
    fn hiding_opens_nothing(policies in any_policies(), ask in any_ask()) {
        let access = access(policies);
        if allowed(&access, &Ask { model: Model::Unknown, headers: HeaderMap::new(), ..ask }) && !ask.bytes {
            for model in [Model::None, Model::Named("digits"), Model::Named("llama-3"), Model::Named("other")] {
                prop_assert!(allowed(&access, &Ask { model, headers: HeaderMap::new(), ..ask }), "{model:?}");
            }
        }
        if allowed(&access, &Ask { client: "", headers: HeaderMap::new(), ..ask }) {
            for client in [FRONT, BATCH, "spiffe://cluster.local/ns/else/sa/x"] {
                // A Deny may name somebody; an Allow that lets nobody in particular through lets everybody through.
                let named = decided(&access, &Ask { client, headers: HeaderMap::new(), ..ask }).0;
                prop_assert!(named.is_none_or(|why| why.contains("denies")), "{client}");
            }
        }
    }
}

#[test]
fn whoever_is_denied_whatever_he_asks_may_ask_nothing() {
    let id = |text: &str| (!text.is_empty()).then(|| text.parse::<SpiffeId>().unwrap());
    let reads = || AccessTo { methods: texts(&["GET"]), ..AccessTo::default() };
    let elsewhere = || AccessTo { ports: vec![9000], ..AccessTo::default() };
    let allow = |rules| access(vec![policy("allow", Effect::Allow, rules)]);
    let deny = |rules| access(vec![policy("deny", Effect::Deny, rules)]);
    let front_reads = || AccessRule { to: vec![reads()], ..from(&[FRONT]) };
    let table = [
        (access(vec![]), [true, true, true]),
        (allow(vec![front_reads()]), [true, false, false]),
        (allow(vec![to(reads())]), [true, true, true]),
        (allow(vec![to(elsewhere())]), [false, false, false]),
        (allow(vec![]), [false, false, false]),
        (deny(vec![from(&[FRONT])]), [false, true, true]),
        (deny(vec![front_reads()]), [true, true, true]),
        (deny(vec![to(elsewhere())]), [true, true, true]),
        (deny(vec![AccessRule::default()]), [false, false, false]),
        (access(vec![audit(policy("audit", Effect::Allow, vec![]))]), [true, true, true]),
    ];
    for (at, (access, expected)) in table.iter().enumerate() {
        let may = [FRONT, BATCH, ""].map(|client| access.may_ask_something(id(client).as_ref(), 8000));
        assert_eq!(may, *expected, "row {at}");
        // It never says no where a question is allowed.
        for client in [FRONT, BATCH, ""] {
            for method in ["GET", "POST"] {
                let some = access.may_ask_something(id(client).as_ref(), 8000);
                assert!(
                    some || !allowed(access, &Ask { client, method, ..get() }),
                    "row {at}: {client} {method}"
                );
            }
        }
    }
}

#[test]
fn connect_and_what_asks_for_an_upgrade_are_judged_by_what_they_say_before_they_are_something_else() {
    // CONNECT has no path (RFC 9110, 9.3.6): no rule that asks for one allows it.
    let connect = Ask { method: "CONNECT", path: "", ..get() };
    let paths = |paths: &[&str]| AccessTo { paths: texts(paths), ..AccessTo::default() };
    let by_path = access(vec![policy("p", Effect::Allow, vec![to(paths(&["/*"]))])]);
    assert!(allowed(&by_path, &get()) && !allowed(&by_path, &connect));
    let by_method = access(vec![policy(
        "m",
        Effect::Allow,
        vec![to(AccessTo { methods: texts(&["GET"]), ..AccessTo::default() })],
    )]);
    assert!(!allowed(&by_method, &connect));
    // And what will be said over it is not known, so every Deny by path is about it.
    let denied = access(vec![policy("d", Effect::Deny, vec![to(paths(&["/admin/*"]))])]);
    assert!(!allowed(&denied, &connect) && allowed(&denied, &get()));
    // WebSocket over HTTP/2 is CONNECT with a path, and over HTTP/1 a GET: one rule by path is about both.
    let chat = access(vec![policy("c", Effect::Allow, vec![to(paths(&["/chat"]))])]);
    for method in ["GET", "CONNECT"] {
        assert!(allowed(&chat, &Ask { method, path: "/chat", ..get() }));
        assert!(!allowed(&chat, &Ask { method, path: "/admin", ..get() }));
    }
}

#[test]
fn bytes_are_denied_where_a_deny_asks_for_http_over_that_port() {
    let paths =
        |ports: &[u32]| to(AccessTo { paths: texts(&["/x"]), ports: ports.to_vec(), ..AccessTo::default() });
    let header = AccessHeader { name: "x-a".into(), values: texts(&["1"]), ..AccessHeader::default() };
    let headers = |rule: AccessRule| AccessRule { headers: vec![header.clone()], ..rule };
    let deny = |rule: AccessRule| policy("d", Effect::Deny, vec![rule]);
    let table = [
        (deny(paths(&[])), true),
        (deny(paths(&[8000])), true),
        (deny(paths(&[9999])), false),
        (AccessPolicy { ports: vec![9999], ..deny(paths(&[])) }, false),
        (deny(headers(AccessRule::default())), true),
        (deny(headers(to(AccessTo { not_ports: vec![8000], ..AccessTo::default() }))), false),
        (deny(to(AccessTo { ports: vec![8000], ..AccessTo::default() })), false),
        (deny(from(&[FRONT])), false),
        (policy("a", Effect::Allow, vec![paths(&[])]), false),
    ];
    for (policy, expected) in table {
        let enforced = access(vec![policy.clone()]);
        assert_eq!(enforced.denies_by_http(8000).is_some(), expected, "{policy:?}");
        assert_eq!(enforced.would_deny_by_http(8000), None, "{policy:?}");
        let rehearsed = access(vec![audit(policy.clone())]);
        assert_eq!(rehearsed.denies_by_http(8000), None, "an audit keeps nobody out: {policy:?}");
        assert_eq!(rehearsed.would_deny_by_http(8000).is_some(), expected, "{policy:?}");
    }
}

#[test]
fn what_only_reports_asks_for_nothing_that_would_change_a_request() {
    let models = to(AccessTo { models: texts(&["m"]), ..AccessTo::default() });
    let host = AccessHeader { name: "Host".into(), values: texts(&["a"]), ..AccessHeader::default() };
    let deny = policy("d", Effect::Deny, vec![AccessRule { headers: vec![host], ..models }]);
    let enforced = access(vec![deny.clone()]);
    assert!(enforced.looks_at_paths() && enforced.looks_at_models() && enforced.looks_at_host());
    assert!(!enforced.audits_paths() && !enforced.audits_models());
    assert_eq!(enforced.would_refuse_unclear(), None);
    let rehearsed = access(vec![audit(deny)]);
    assert!(!rehearsed.looks_at_paths() && !rehearsed.looks_at_models());
    assert!(rehearsed.audits_paths() && rehearsed.audits_models());
    assert_eq!(rehearsed.would_refuse_unclear().unwrap().policy(), "test/d");
}
