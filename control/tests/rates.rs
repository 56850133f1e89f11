//! From RateLimit objects to what each pod's proxy is told.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, which clippy doesn't see as such")]

mod common;

use penstock_api::access::RateLimit;
use penstock_api::resource::{Kind, Payload};
use penstock_api::v1;
use penstock_control::compile::{State, compile};
use penstock_control::snapshot::Snapshot;

use common::{PODS, compiled, messages, read, trust, world};

fn rates(spec: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: RateLimit\nmetadata:\n  name: r\n  namespace: a\nspec:\n{spec}"
    )
}

fn limits(snapshot: &Snapshot, pod: &str) -> Vec<v1::RateLimit> {
    let entry = snapshot.get(Kind::Access, pod).unwrap_or_else(|| panic!("nothing is said of {pod}"));
    match Payload::decode(Kind::Access, &entry.any.value).unwrap() {
        Payload::Access(access) => access.limits,
        other => panic!("{other:?}"),
    }
}

#[test]
fn limits_are_told_to_the_pods_that_they_are_about() {
    let table = [
        ("", [Some(vec![]), Some(vec![]), None]),
        ("  targetRefs: [{kind: Service, name: digits}]\n", [Some(vec![8000]), None, None]),
        ("  selector: {matchLabels: {app: digits}}\n", [Some(vec![]), None, None]),
        ("  selector: {matchLabels: {app: x}}\n", [None, None, None]),
    ];
    for (targets, expected) in table {
        let snapshot = compiled(&world(
            "rates.yaml",
            &rates(&format!("{targets}  limits: [{{name: l, concurrent: 1}}]\n")),
        ));
        let ports = ["a/digits-0", "a/other", "b/far"]
            .map(|pod| limits(&snapshot, pod).into_iter().next().map(|limit| limit.ports));
        assert_eq!(ports, expected, "{targets}");
        let none = expected == [None, None, None];
        let said = messages(&snapshot);
        assert_eq!(said.iter().any(|said| said.contains("so it limits nothing")), none, "{said:?}");
    }
}

#[test]
fn a_limit_is_told_as_it_is_written() {
    let spec = "  limits:
  - name: all
    requests: {perSecond: 10}
  - name: each
    match:
      from: [{serviceAccounts: [front]}]
      to: [{models: [llama*]}, {paths: [/v1/*]}]
    by: [identity, model, route]
    requests: {perMinute: 30, burst: 5}
    concurrent: 4
    tokens: {perMinute: 6000}
";
    let snapshot = compiled(&world("rates.yaml", &rates(spec)));
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    let told = limits(&snapshot, "a/digits-0");
    let [all, each] = &told[..] else { panic!("{told:?}") };
    let rate = |count, period_ms, burst| Some(v1::Rate { count, period_ms, burst });
    let bare = v1::RateLimit { policy: "a/r".into(), name: "all".into(), ..v1::RateLimit::default() };
    assert_eq!(*all, v1::RateLimit { requests: rate(10, 1_000, 10), ..bare });
    assert_eq!(
        (each.requests, each.concurrent, each.tokens),
        (rate(30, 60_000, 5), 4, rate(6_000, 60_000, 6_000))
    );
    assert_eq!([each.by_identity, each.by_model, each.by_route], [true; 3]);
    let matches = each.r#match.as_ref().unwrap();
    assert_eq!((&*matches.from[0].service_accounts, matches.to.len()), (&["a/front".to_owned()][..], 2));
    // Proxies understand it.
    assert!(told.iter().all(|limit| RateLimit::compile(limit).is_ok()));
}

#[test]
fn a_change_of_a_limit_resends_nothing_but_what_its_pods_may_be_asked() {
    let limit = |most: u32| {
        let targets = "  targetRefs: [{kind: Service, name: digits}]\n";
        compiled(&world(
            "rates.yaml",
            &rates(&format!("{targets}  limits: [{{name: l, concurrent: {most}}}]\n")),
        ))
    };
    let (before, after) = (limit(1), limit(2));
    for kind in Kind::PUSH_ORDER {
        let same = before.all(kind).zip(after.all(kind)).all(|(a, b)| a == b);
        assert_eq!(same, kind != Kind::Access, "{kind:?}");
    }
    assert_eq!(before.get(Kind::Access, "a/other"), after.get(Kind::Access, "a/other"));
}

#[test]
fn what_makes_no_sense_is_refused_with_its_line_and_limits_nothing() {
    let table = [
        ("  limits: []\n", 7, "it limits nothing"),
        ("  limits:\n  - {name: l}\n", 8, "nothing of how much"),
        ("  limits:\n  - {name: L!, concurrent: 1}\n", 8, "write a short name"),
        ("  limits:\n  - {name: l, concurrent: 1}\n  - {name: l, concurrent: 1}\n", 9, "has this name"),
        ("  limits:\n  - {name: l, concurrent: 0}\n", 8, "write 1 or more"),
        ("  limits:\n  - {name: l, concurrent: -1}\n", 8, "invalid value"),
        ("  limits:\n  - {name: l, requests: {perSecond: 0}}\n", 8, "write 1 or more"),
        ("  limits:\n  - {name: l, tokens: {perMinute: 5, burst: 0}}\n", 8, "write 1 or more"),
        ("  limits:\n  - {name: l, requests: {burst: 5}}\n", 8, "either perSecond or perMinute"),
        (
            "  limits:\n  - {name: l, tokens: {perSecond: 5, perMinute: 5}}\n",
            8,
            "either perSecond or perMinute",
        ),
        ("  limits:\n  - {name: l, requests: {perHour: 5}}\n", 8, "there is no such field"),
        ("  limits:\n  - {name: l, concurrent: 1, by: [route]}\n", 8, "a route is an entry of match.to"),
        ("  limits:\n  - {name: l, concurrent: 1, by: [caller]}\n", 8, "unknown variant `caller`"),
        (
            "  limits:\n  - name: l\n    concurrent: 1\n    match:\n      to: [{paths: [x]}]\n",
            11,
            "write a path",
        ),
        ("  limits:\n  - name: l\n    concurrent: 1\n    match:\n      from: []\n", 11, "would be everybody"),
        ("  targetRefs: [{kind: Pod, name: x}]\n  limits: [{name: l, concurrent: 1}]\n", 7, "Pod is no kind"),
        (
            "  targetRefs: [{kind: Service, name: x}]\n  limits: [{name: l, concurrent: 1}]\n",
            7,
            "there is no Service x",
        ),
    ];
    for (spec, line, words) in table {
        let snapshot = compiled(&world("rates.yaml", &rates(spec)));
        let found = snapshot.problems.iter().find(|problem| problem.message.contains(words));
        let found = found.unwrap_or_else(|| panic!("{spec}: {:?}", messages(&snapshot)));
        assert_eq!(found.line, line, "{spec}: {found:?}");
        assert_eq!(limits(&snapshot, "a/digits-0"), [], "{spec}");
    }
}

#[test]
fn a_limit_that_loses_its_sense_leaves_its_last_good_version_in_force() {
    let good = rates("  limits: [{name: l, concurrent: 7}]\n");
    let (first, state) = compile(&world("rates.yaml", &good), &State::default(), &trust());
    let told = limits(&first, "a/digits-0");
    for bad in [good.replace('7', "0"), good.replace("concurrent", "concurent"), "a: [".to_owned()] {
        let (snapshot, state) = compile(&world("rates.yaml", &bad), &state, &trust());
        assert_eq!(limits(&snapshot, "a/digits-0"), told, "{bad}");
        let (snapshot, _) = compile(&world("rates.yaml", ""), &state, &trust());
        assert_eq!(limits(&snapshot, "a/digits-0"), [], "it goes when it is deleted");
    }
}

#[test]
fn admission_of_a_service_holds_for_the_pods_that_it_leads_to_unless_they_say_it_of_themselves() {
    let of_service = PODS.replace(
        "metadata: {name: digits, namespace: a}",
        "metadata: {name: digits, namespace: a, annotations: {penstock.io/admission: limit=adaptive}}",
    );
    let slices = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: digits-1, namespace: a, labels: \
                  {kubernetes.io/service-name: digits}}\naddressType: IPv4\nports: [{name: rest, port: 8000}]\nendpoints: \
                  [{addresses: [10.0.0.1], targetRef: {kind: Pod, namespace: a, name: digits-0}}]\n";
    let of_pod = of_service.replace(
        "tier: gpu}, annotations: {penstock.io/inject: enabled}",
        "tier: gpu}, annotations: {penstock.io/inject: enabled, penstock.io/admission: limit=8}",
    );
    for (text, limit) in [(PODS, None), (&of_service, Some(0)), (&of_pod, Some(8))] {
        let snapshot = compiled(&read("pods.yaml", &format!("{text}{slices}")));
        let admission = |pod: &str| {
            let entry = snapshot.get(Kind::Workload, pod).unwrap();
            match Payload::decode(Kind::Workload, &entry.any.value).unwrap() {
                Payload::Workload(workload) => workload.admission.map(|admission| admission.limit),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((admission("a/digits-0"), admission("a/other")), (limit, None), "{text}");
    }
}
