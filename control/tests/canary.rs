//! What a Canary makes of the rules of its Service, as its course says.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use penstock_api::resource::{Kind, Payload};
use penstock_api::v1;
use penstock_control::compile::{State, compile};
use penstock_control::objects::canary::Course;
use penstock_control::objects::{Body, ObjectSet, decode};
use penstock_control::snapshot::Snapshot;

use common::{compiled, messages, trust};

const SERVICES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: resnet}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: resnet-v1}
spec: {ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: resnet-v2}
spec: {ports: [{name: http, port: 9090}]}
---
apiVersion: v1
kind: Service
metadata: {name: other}
spec: {ports: [{port: 80}]}
"#;

const OTHER: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: other}\nspec: {ports: [{port: 80}]}\n";

const CANARY: &str = r#"
---
apiVersion: penstock.io/v1alpha1
kind: Canary
metadata: {name: resnet}
spec:
  service: resnet
  stable: resnet-v1
  candidate: resnet-v2
  steps: [{weight: 5}]
  sticky: header:x-user
  match: [{headers: [{name: X-Tester, value: "yes"}]}]
  shadow: {}
"#;

fn route(backends: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r}}\nspec:\n  \
         parentRefs: [{{group: \"\", kind: Service, name: resnet}}]\n  rules:\n    \
         - matches: [{{path: {{type: PathPrefix, value: /v2}}}}]\n      backendRefs: [{backends}]\n"
    )
}

/// The objects, with the course that the canary's status would have.
fn set(text: &str, weight: u32, shadow: u32, matching: bool) -> ObjectSet {
    let mut set = decode::file(&"mesh.yaml".into(), text);
    for object in &mut set.objects {
        let mut changed = (**object).clone();
        if let Body::Canary(canary) = &mut changed.body {
            let run = canary.spec.run_id();
            let course = serde_json::json!({"run": run, "stable": "resnet-v1", "candidate": "resnet-v2", "weight": weight, "shadow": shadow, "matching": matching});
            canary.status.course = Some(serde_json::from_value(course).unwrap());
        }
        *object = changed.into();
    }
    set
}

/// `service:port=weight` of each backend of all weights of `resnet`, and `~service=share` of each mirror.
fn weights(snapshot: &Snapshot) -> Vec<String> {
    let of = |(name, entry): (&str, &penstock_control::snapshot::Entry)| {
        let Payload::Weights(weights) = Payload::decode(Kind::Weights, &entry.any.value).unwrap() else {
            panic!()
        };
        let backend = |one: &v1::Backend| format!("{}:{}={}", one.service, one.port, one.weight);
        let mirror = |one: &v1::Mirror| format!("~{}:{}={}", one.service, one.port, one.share_ppm);
        let all: Vec<_> =
            weights.backends.iter().map(backend).chain(weights.mirrors.iter().map(mirror)).collect();
        format!("{name} {}", all.join(" "))
    };
    snapshot.all(Kind::Weights).map(of).collect()
}

fn rules(snapshot: &Snapshot) -> Vec<v1::Rule> {
    let entry = snapshot.get(Kind::Routes, "default/resnet").unwrap();
    let Payload::Routes(routes) = Payload::decode(Kind::Routes, &entry.any.value).unwrap() else { panic!() };
    routes.rules
}

#[test]
fn the_service_itself_is_divided_where_nothing_else_is_said() {
    let text = format!("{SERVICES}{CANARY}");
    let divided = |weight, shadow| weights(&compiled(&set(&text, weight, shadow, false)));
    let name = "default/resnet/default/resnet/0";
    assert_eq!(divided(0, 0), [format!("{name} default/resnet-v1:8080=100 default/resnet-v2:9090=0")]);
    assert_eq!(divided(5, 0), [format!("{name} default/resnet-v1:8080=95 default/resnet-v2:9090=5")]);
    let copied =
        format!("{name} default/resnet-v1:8080=100 default/resnet-v2:9090=0 ~default/resnet-v2:9090=100000");
    assert_eq!(divided(0, 10), [copied]);
    // The candidate's endpoints are known before the first request goes to it.
    let snapshot = compiled(&set(&text, 0, 0, false));
    let known = snapshot.expand(Kind::Service, "default/resnet");
    assert_eq!(known.len(), 3, "{known:?}");
    assert_eq!(messages(&snapshot), [""; 0]);
    assert_eq!(
        rules(&snapshot)[0].sticky,
        Some(v1::Sticky { key: Some(v1::sticky::Key::Header("x-user".into())) })
    );
}

#[test]
fn what_a_route_sends_to_both_versions_is_divided_and_the_rest_stays() {
    let backends = "{name: resnet-v1, port: 8080, weight: 6}, {name: resnet-v2, port: 9090, weight: 2}, \
                    {name: other, port: 80, weight: 2}";
    let text = format!("{SERVICES}{}{CANARY}", route(backends));
    let snapshot = compiled(&set(&text, 25, 0, false));
    let expected = "default/resnet/default/r/0 default/resnet-v1:8080=600 default/resnet-v2:9090=200 default/other:80=200";
    assert_eq!(weights(&snapshot), [expected]);

    let text = format!("{SERVICES}{}{CANARY}", route("{name: other, port: 80}"));
    let snapshot = compiled(&set(&text, 25, 0, true));
    assert_eq!(weights(&snapshot), ["default/resnet/default/r/0 default/other:80=1"]);
    assert_eq!(rules(&snapshot).len(), 1);
}

#[test]
fn whoever_fits_has_a_rule_of_his_own_before_the_one_that_all_have() {
    let text = format!("{SERVICES}{}{CANARY}", route("{name: resnet-v1, port: 8080}"));
    let snapshot = compiled(&set(&text, 0, 0, true));
    let rules = rules(&snapshot);
    let [matched, all] = &rules[..] else { panic!("{rules:?}") };
    assert_eq!(
        (&*matched.weights, &*all.weights),
        ("default/resnet/default/r:matched/0", "default/resnet/default/r/0")
    );
    let [only] = &matched.matches[..] else { panic!("{matched:?}") };
    assert_eq!(only.path, all.matches[0].path, "the exception is one of the same requests");
    assert_eq!(only.headers[0].name, "x-tester");
    let expected = [
        "default/resnet/default/r/0 default/resnet-v1:8080=100 default/resnet-v2:9090=0",
        "default/resnet/default/r:matched/0 default/resnet-v2:9090=1",
    ];
    assert_eq!(weights(&snapshot), expected);
}

#[test]
fn a_course_names_its_versions_whatever_the_next_run_is_about() {
    let mut text = format!("{SERVICES}{CANARY}");
    text = text
        .replace("stable: resnet-v1", "stable: resnet-v2")
        .replace("candidate: resnet-v2", "candidate: other");
    let other = "---\napiVersion: v1\nkind: Service\nmetadata: {name: other}\nspec: {ports: [{name: http, port: 80}]}\n";
    let of = |weight| weights(&compiled(&set(&text.replace(OTHER, other), weight, 0, false)));
    assert_eq!(
        of(50),
        ["default/resnet/default/resnet/0 default/resnet-v1:8080=50 default/resnet-v2:9090=50"]
    );
}

#[test]
fn what_a_version_would_get_whose_service_is_gone_the_other_gets() {
    let without = |name: &str| {
        let documents = SERVICES.split("---\n").filter(|one| !one.contains(&format!("{{name: {name}}}")));
        format!("{}{CANARY}", documents.collect::<Vec<_>>().join("---\n"))
    };
    let of = |name, weight| weights(&compiled(&set(&without(name), weight, 10, true)));
    let stable = "default/resnet/default/resnet/0 default/resnet-v1:8080=100";
    assert_eq!(of("resnet-v2", 50), [stable]);
    // As after a success: the old version is deleted.
    let all = of("resnet-v1", 100);
    assert!(
        all.iter().any(|one| one.starts_with("default/resnet/default/resnet/0 default/resnet-v2:9090=100")),
        "{all:?}"
    );
}

#[test]
fn a_version_without_a_ready_endpoint_gets_nothing_if_the_other_has_one() {
    let slice = |name: &str, port: u16| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\n\
             ports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [10.0.0.1]}}]\n"
        )
    };
    let (stable, candidate) = (slice("resnet-v1", 8080), slice("resnet-v2", 9090));
    let of = |slices: &[&str], weight| {
        let all =
            weights(&compiled(&set(&format!("{SERVICES}{CANARY}{}", slices.concat()), weight, 0, false)));
        all[0].rsplit('=').next().unwrap().parse::<u32>().unwrap()
    };
    assert_eq!(of(&[&stable, &candidate], 20), 20);
    assert_eq!((of(&[&stable], 20), of(&[&candidate], 20), of(&[], 20)), (0, 100, 20));
    assert_eq!(of(&[&candidate], 0), 0, "what went back does not serve even so");
}

#[test]
fn what_an_older_control_has_written_names_no_versions() {
    let mut all = set(&format!("{SERVICES}{CANARY}"), 25, 0, false);
    for object in &mut all.objects {
        let mut changed = (**object).clone();
        if let Body::Canary(canary) = &mut changed.body {
            let course = serde_json::json!({"run": "0123456789abcdef", "weight": 25});
            canary.status.course = Some(serde_json::from_value(course).unwrap());
        }
        *object = changed.into();
    }
    assert!(weights(&compiled(&all))[0].ends_with("resnet-v1:8080=75 default/resnet-v2:9090=25"));
}

#[test]
fn a_version_that_is_refused_keeps_the_last_good_one_and_where_requests_go_now() {
    let text = format!("{SERVICES}{CANARY}");
    let (_, state) = compile(&set(&text, 5, 0, false), &State::default(), &trust());
    // Meanwhile it has gone on, or back.
    let wrong = set(&text.replace("weight: 5", "weight: 105"), 0, 0, false);
    let (snapshot, state) = compile(&wrong, &state, &trust());
    assert!(weights(&snapshot)[0].ends_with("resnet-v1:8080=100 default/resnet-v2:9090=0"));
    let steps = |snapshot: &Snapshot| match &snapshot.canaries[..] {
        [one] => match &one.body {
            Body::Canary(canary) => canary.spec.steps[0].weight,
            _ => panic!(),
        },
        all => panic!("{all:?}"),
    };
    assert_eq!(steps(&snapshot), 5);
    // The same of a file that cannot be read at all, of which only the diaries say where its requests go.
    let mut broken = decode::file(&"mesh.yaml".into(), &format!("{text}  steps: [\n"));
    assert_eq!((broken.objects.len(), broken.broken.len()), (0, 1));
    let id = snapshot.canaries[0].id.clone();
    let course =
        Course { weight: 25, stable: "resnet-v1".into(), candidate: "resnet-v2".into(), ..Course::default() };
    broken.courses.insert(id, course);
    let (snapshot, _) = compile(&broken, &state, &trust());
    assert!(
        weights(&snapshot)[0].ends_with("resnet-v1:8080=75 default/resnet-v2:9090=25"),
        "{:?}",
        weights(&snapshot)
    );
    assert_eq!(snapshot.canaries.len(), 1);
}

#[test]
fn before_there_is_a_course_the_stable_version_gets_everything_if_it_is_there() {
    let text = format!("{SERVICES}{CANARY}");
    let read = |text: &str| decode::file(&"mesh.yaml".into(), text);
    assert_eq!(weights(&compiled(&read(&text))), [""; 0]);
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {name: v1, labels: {kubernetes.io/service-name: resnet-v1}}\naddressType: IPv4\n\
                 ports: [{name: http, port: 8080}]\nendpoints: [{addresses: [10.0.0.1]}]\n";
    let all = weights(&compiled(&read(&format!("{text}{slice}"))));
    assert_eq!(all, ["default/resnet/default/resnet/0 default/resnet-v1:8080=100 default/resnet-v2:9090=0"]);
}

#[test]
fn what_is_wrong_is_told() {
    let table = [
        (
            CANARY.replace("candidate: resnet-v2", "candidate: resnet-v3"),
            "the Service default/resnet-v3 does not exist",
        ),
        (CANARY.replace("header:x-user", "user"), "write header:<name> or cookie:<name>"),
        (
            format!("{CANARY}{}", CANARY.replace("{name: resnet}", "{name: second}")),
            "is about the Service default/resnet already",
        ),
        (CANARY.replace("X-Tester", "a b"), "is not a header name"),
    ];
    for (canary, words) in table {
        let snapshot = compiled(&decode::file(&"mesh.yaml".into(), &format!("{SERVICES}{canary}")));
        let told = messages(&snapshot);
        assert!(told.iter().any(|one| one.contains(words)), "{words}: {told:?}");
    }
}

#[test]
fn clients_that_have_a_route_of_their_own_take_part_too() {
    let own = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: patient, namespace: shop}\nspec:\n  \
               parentRefs: [{group: \"\", kind: Service, name: resnet, namespace: default}]\n  rules:\n    \
               - timeouts: {request: 30s}\n      backendRefs: [{name: resnet, namespace: default, port: 80}]\n";
    let snapshot = compiled(&set(&format!("{SERVICES}{CANARY}{own}"), 25, 0, true));
    let all = weights(&snapshot);
    for wanted in [
        "default/resnet/shop/patient/0 default/resnet-v1:8080=75 default/resnet-v2:9090=25",
        "default/resnet/shop/patient:matched/0 default/resnet-v2:9090=1",
    ] {
        assert!(all.iter().any(|one| one == wanted), "{all:#?}");
    }
    // Its clients know where both versions are, and first the way by header, then the rest.
    let names: Vec<_> =
        snapshot.seen("shop", Kind::Endpoints, "default/resnet").iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names.len(),
        snapshot.all(Kind::Endpoints).filter(|(name, _)| !name.ends_with("/other")).count()
    );
    let seen = snapshot.seen("shop", Kind::Routes, "default/resnet");
    let Payload::Routes(routes) = Payload::decode(Kind::Routes, &seen[0].1.any.value).unwrap() else {
        panic!()
    };
    let rules: Vec<_> = routes.rules.iter().map(|rule| rule.weights.as_str()).collect();
    assert_eq!(rules, ["default/resnet/shop/patient:matched/0", "default/resnet/shop/patient/0"]);
}
