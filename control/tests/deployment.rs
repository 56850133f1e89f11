//! The templates of a Deployment that has a Canary: backends like Services, of pods whose gates may be closed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use penstock_api::resource::{Kind, Payload};
use penstock_api::v1;
use penstock_control::objects::ObjectKind;
use penstock_control::outcome::Outcome;
use penstock_control::snapshot::Snapshot;

use common::{compiled, messages, read};

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: resnet, annotations: {penstock.io/timeout: request=7s}}
spec: {ports: [{name: http, port: 80, targetPort: web}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: resnet-x, labels: {kubernetes.io/service-name: resnet}}
addressType: IPv4
ports: [{name: http, port: 8000}]
endpoints:
  - {addresses: [10.0.0.1], targetRef: {kind: Pod, name: a-1}, conditions: {ready: true}}
  - {addresses: [10.0.0.3], targetRef: {kind: Pod, name: b-1}, conditions: {ready: false}}
---
"#;

const READY: &str = "{type: Ready, status: \"True\"}";
const GATED: &str = "{type: Ready, status: \"False\", reason: ReadinessGatesNotReady}, {type: ContainersReady, status: \"True\"}";
const STARTING: &str = "{type: Ready, status: \"False\"}, {type: ContainersReady, status: \"False\"}";

/// A pod `<hash>-<number>`, whose server listens on `port`, made so many minutes after midnight.
fn pod(hash: &str, number: u8, port: u16, minute: u8, conditions: &str) -> String {
    let address = number + if hash == "a" { 0 } else { 2 };
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {hash}-{number}, creationTimestamp: \"2026-01-01T00:{minute:02}:00Z\", \
         labels: {{pod-template-hash: {hash}}}, annotations: {{penstock.io/inject: enabled}}, \
         ownerReferences: [{{apiVersion: apps/v1, kind: ReplicaSet, name: resnet-{hash}, uid: u, controller: true}}]}}\n\
         spec: {{containers: [{{name: server, ports: [{{name: web, containerPort: {port}}}]}}]}}\n\
         status: {{phase: Running, podIP: 10.0.0.{address}, conditions: [{conditions}]}}\n---\n"
    )
}

fn pods() -> String {
    [pod("a", 1, 8000, 1, READY), pod("a", 2, 8000, 5, READY), pod("b", 1, 9000, 9, GATED)].concat()
}

fn canary(status: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: Canary\nmetadata: {{name: resnet}}\n\
         spec: {{service: resnet, deployment: resnet, steps: [{{weight: 10}}], match: [{{headers: [{{name: x, value: me}}]}}]}}\n\
         status: {{{status}}}\n---\n"
    )
}

fn course(stable: &str, candidate: &str, weight: u32, more: &str) -> String {
    canary(&format!(
        "course: {{run: r, stable: resnet-{stable}.template, candidate: resnet-{candidate}.template, weight: {weight}{more}}}"
    ))
}

fn snapshot(canary: &str, pods: &str) -> Snapshot {
    compiled(&read("mesh.yaml", &format!("{SERVICE}{pods}{canary}")))
}

/// Each backend of the weights of the Service, with its weight.
fn weights(snapshot: &Snapshot) -> Vec<String> {
    let Some(entry) = snapshot.get(Kind::Weights, "default/resnet/default/resnet/0") else {
        return Vec::new();
    };
    let Payload::Weights(weights) = Payload::decode(Kind::Weights, &entry.any.value).unwrap() else {
        panic!()
    };
    weights.backends.iter().map(|one| format!("{}:{}={}", one.service, one.port, one.weight)).collect()
}

/// Each endpoint, with the port that it is called at; those that drain with a `-`.
fn endpoints(snapshot: &Snapshot, service: &str) -> Vec<String> {
    let entry = snapshot.get(Kind::Endpoints, service).unwrap();
    let Payload::Endpoints(all) = Payload::decode(Kind::Endpoints, &entry.any.value).unwrap() else {
        panic!()
    };
    let one = |one: &v1::Endpoint| {
        let drains = if one.draining { "-" } else { "" };
        let ports: Vec<_> = one.ports.iter().map(|port| (port.service_port, port.port)).collect();
        format!("{drains}{} {ports:?}", one.name)
    };
    all.endpoints.iter().map(one).collect()
}

fn outcome(snapshot: &Snapshot) -> &Outcome {
    snapshot.outcomes.iter().find(|(id, _)| id.kind == ObjectKind::Canary).unwrap().1
}

#[test]
fn requests_are_divided_between_templates_though_a_gate_is_closed() {
    let snapshot = snapshot(&course("a", "b", 10, ""), &pods());
    assert_eq!(messages(&snapshot), [""; 0]);
    assert_eq!(weights(&snapshot), ["default/resnet-a.template:80=90", "default/resnet-b.template:80=10"]);
    // Each pod is called where its own port of that name is.
    let of = |template: &str| endpoints(&snapshot, template);
    assert_eq!(of("default/resnet-a.template"), ["default/a-1 [(80, 8000)]", "default/a-2 [(80, 8000)]"]);
    assert_eq!(of("default/resnet-b.template"), ["default/b-1 [(80, 9000)]"]);
    assert_eq!(of("default/resnet"), ["default/a-1 [(80, 8000)]"], "as the API server says");
    // What is asked of the Service is asked of its templates, of which a client knows all as soon as it knows the Service.
    let entry = snapshot.get(Kind::Service, "default/resnet-b.template").unwrap();
    let Payload::Service(service) = Payload::decode(Kind::Service, &entry.any.value).unwrap() else {
        panic!()
    };
    assert!(service.policy.unwrap().timeouts.is_some());
    let known = snapshot.expand(Kind::Endpoints, "default/resnet");
    assert_eq!(known.len(), 3, "{known:?}");
    // Nobody reaches a template by an address.
    let named = |(_, entry): (&str, &penstock_control::snapshot::Entry)| {
        let address = <v1::Address as prost::Message>::decode(&*entry.any.value).unwrap();
        matches!(address.target, Some(v1::address::Target::Service(name)) if name.ends_with(".template"))
    };
    assert!(!snapshot.all(Kind::Address).any(named));
    let told = &outcome(&snapshot).templates;
    let told: Vec<_> =
        told.iter().map(|one| (one.name.as_str(), one.pods, one.since.unwrap().to_string())).collect();
    let expected = [
        ("resnet-a.template", 2, "2026-01-01T00:01:00Z".to_owned()),
        ("resnet-b.template", 1, "2026-01-01T00:09:00Z".to_owned()),
    ];
    assert_eq!(told, expected);
}

#[test]
fn while_it_is_promoted_each_of_its_pods_gets_what_each_pod_got_before() {
    let promoting = course("a", "b", 100, ", open: 4, matching: true");
    let of = |pods: &str| weights(&snapshot(&promoting, pods));
    assert_eq!(of(&pods()), ["default/resnet-a.template:80=75", "default/resnet-b.template:80=25"]);
    let more = pods() + &pod("b", 2, 9000, 10, READY) + &pod("b", 3, 9000, 11, STARTING);
    assert_eq!(of(&more), ["default/resnet-a.template:80=50", "default/resnet-b.template:80=50"]);
    // One that is being ended takes no new requests, and the last of a template takes its share along.
    let ending = pod("a", 1, 8000, 1, READY)
        .replace("metadata: {", "metadata: {deletionTimestamp: \"2026-01-01T01:00:00Z\", ");
    let last = format!("{ending}{}", pod("b", 1, 9000, 9, READY));
    let left = snapshot(&promoting, &last);
    assert_eq!(weights(&left), ["default/resnet-a.template:80=0", "default/resnet-b.template:80=100"]);
    assert_eq!(endpoints(&left, "default/resnet-a.template"), ["-default/a-1 [(80, 8000)]"]);
    assert_eq!(outcome(&left).templates[0].pods, 0);
    assert_eq!(of(&pod("b", 1, 9000, 9, READY)), ["default/resnet-b.template:80=100"]);
}

#[test]
fn where_there_is_nothing_to_divide_all_go_to_what_serves() {
    let idle = snapshot(&course("a", "a", 0, ""), &pods());
    assert_eq!(weights(&idle), ["default/resnet-a.template:80=100"]);
    assert_eq!(outcome(&idle).course.as_ref().unwrap().stable, "resnet-a.template");
    // Before it has begun they go where they would without it.
    let before = snapshot(&canary(""), &pods());
    assert_eq!((weights(&before), outcome(&before).templates.len()), (Vec::new(), 2));
    assert_eq!(messages(&before), [""; 0]);
}

#[test]
fn what_cannot_be_is_told_at_its_field() {
    let second = course("a", "b", 10, "")
        .replace("name: resnet}", "name: second}")
        .replace("service: resnet", "service: other");
    let table = [
        (course("a", "b", 10, ""), String::new(), "the Deployment default/resnet has no pod"),
        (
            format!("{}{second}", course("a", "b", 10, "")),
            pods(),
            "is about the Deployment default/resnet already",
        ),
        (canary("").replace("deployment: resnet", "stable: resnet"), pods(), "\"\" is no name of a Service"),
        (
            canary("").replace("deployment: resnet", "run: \"1\""),
            pods(),
            "write a deployment, or stable and candidate",
        ),
        (
            canary("").replace("deployment: resnet", "deployment: resnet, stable: x"),
            pods(),
            "remove one of the two",
        ),
    ];
    for (canary, pods, words) in table {
        let told = messages(&snapshot(&canary, &pods));
        assert!(told.iter().any(|one| one.contains(words)), "{words}: {told:?}");
    }
}
