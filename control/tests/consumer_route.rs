//! A route in the clients' namespace is for these clients alone, and there it takes the place of the Service's own routes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use penstock_api::resource::{Kind, Payload};
use penstock_control::outcome::Reason;
use penstock_control::snapshot::Snapshot;

use common::{compiled, files, messages};

/// The models of `vision`, a Service in `shop` whose pods ask for them, and a route of the models' owner.
const SERVICES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: resnet, namespace: vision}
spec: {ports: [{name: http, port: 80}, {name: admin, port: 90}, {name: more, port: 91}]}
---
apiVersion: v1
kind: Service
metadata: {name: resnet-v2, namespace: vision}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: cache, namespace: shop}
spec: {ports: [{name: http, port: 80}]}
"#;

const PRODUCER: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: canary, namespace: vision}
spec:
  parentRefs: [{group: "", kind: Service, name: resnet}]
  rules: [{backendRefs: [{name: resnet-v2, port: 80}]}]
"#;

const CONSUMER: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: slow, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: resnet, namespace: vision}]
  rules:
    - timeouts: {request: 30s}
      backendRefs: [{name: resnet, namespace: vision, port: 80}]
    - matches: [{path: {value: /cached}}]
      backendRefs: [{name: cache, port: 80}]
"#;

fn with(routes: &[&str]) -> Snapshot {
    let routes = routes.join("\n---\n");
    compiled(&files(&[("s.yaml", SERVICES), ("r.yaml", &routes)]))
}

/// The rules of `vision/resnet` as clients in a namespace see them: route, number, port.
fn seen(snapshot: &Snapshot, namespace: &str) -> Vec<String> {
    let routes = snapshot.seen(namespace, Kind::Routes, "vision/resnet");
    let [(_, entry)] = routes.as_slice() else { return Vec::new() };
    let Payload::Routes(routes) = Payload::decode(Kind::Routes, &entry.any.value).unwrap() else { panic!() };
    let weights = snapshot.seen(namespace, Kind::Weights, "vision/resnet");
    for rule in &routes.rules {
        assert!(weights.iter().any(|(name, _)| *name == rule.weights), "{namespace}: {}", rule.weights);
    }
    routes.rules.iter().map(|rule| format!("{}#{}:{}", rule.route, rule.index, rule.port)).collect()
}

fn services(snapshot: &Snapshot, namespace: &str) -> Vec<String> {
    let seen = snapshot.seen(namespace, Kind::Service, "vision/resnet");
    seen.iter().map(|(name, _)| (*name).to_owned()).collect()
}

#[test]
fn only_clients_in_the_namespace_of_a_route_see_it() {
    let snapshot = with(&[CONSUMER]);
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    assert_eq!(seen(&snapshot, "shop"), ["shop/slow#1:0", "shop/slow#0:0"]);
    assert_eq!(services(&snapshot, "shop"), ["vision/resnet", "shop/cache"]);
    for other in ["vision", "elsewhere"] {
        assert_eq!(seen(&snapshot, other), [""; 0]);
        assert_eq!(services(&snapshot, other), ["vision/resnet"]);
        assert_eq!(snapshot.seen(other, Kind::Weights, "vision/resnet"), []);
    }
}

#[test]
fn there_it_takes_the_place_of_the_routes_of_the_services_owner() {
    let snapshot = with(&[PRODUCER, CONSUMER]);
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    assert_eq!(seen(&snapshot, "vision"), ["vision/canary#0:0"]);
    assert_eq!(seen(&snapshot, "shop"), ["shop/slow#1:0", "shop/slow#0:0"]);
    assert_eq!(services(&snapshot, "elsewhere"), ["vision/resnet", "vision/resnet-v2"]);
}

#[test]
fn ports_of_which_it_says_nothing_stay_as_their_owner_has_them() {
    let of_80 = CONSUMER.replace("namespace: vision}]\n", "namespace: vision, port: 80}]\n");
    let snapshot = with(&[PRODUCER, &of_80]);
    let own = ["shop/slow#1:80", "shop/slow#0:80"];
    assert_eq!(seen(&snapshot, "shop"), [&own[..], &["vision/canary#0:90", "vision/canary#0:91"]].concat());
    // Routes for some ports alone: the others have rules that lead to the Service itself.
    let of_90 = PRODUCER.replace("name: resnet}", "name: resnet, port: 90}");
    let snapshot = with(&[&of_90, &of_80]);
    let rest = ["vision/canary#0:90", "vision/resnet#1:91"];
    assert_eq!(seen(&snapshot, "shop"), [&own[..], &rest].concat());
    assert_eq!(seen(&snapshot, "vision"), ["vision/canary#0:90", "vision/resnet#0:80", "vision/resnet#1:91"]);
}

#[test]
fn its_parents_need_no_grant_and_every_other_service_there_does() {
    let other = CONSUMER.replace(
        "{name: resnet, namespace: vision, port: 80}",
        "{name: resnet-v2, namespace: vision, port: 80}",
    );
    let snapshot = with(&[&other]);
    let (_, outcome) = snapshot.outcomes.iter().find(|(id, _)| id.name == "slow").unwrap();
    assert_eq!(outcome.findings.len(), 1, "{:?}", outcome.findings);
    assert_eq!(outcome.findings[0].reason, Reason::RefNotPermitted);
    let grant = r#"
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: shop, namespace: vision}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]
  to: [{group: "", kind: Service, name: resnet-v2}]
"#;
    assert_eq!(messages(&with(&[&other, grant])), Vec::<String>::new());
}
