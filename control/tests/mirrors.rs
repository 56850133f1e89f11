//! The filter RequestMirror of HTTPRoutes and GRPCRoutes becomes mirrors beside the weights, and says of itself what is wrong as a backend
//! does; the requests themselves go on.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use penstock_api::resource::{Kind, Payload};
use penstock_api::v1;
use penstock_control::outcome::Reason;
use penstock_control::snapshot::Snapshot;

use common::{compiled, files, messages};

const SERVICES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: shop}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: shop-v2}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: shop, namespace: other}
spec: {ports: [{port: 80}]}
"#;

fn with(kind: &str, filters: &str, more: &str) -> Snapshot {
    let route = format!(
        r#"apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: r}}
spec:
  parentRefs: [{{group: "", kind: Service, name: shop}}]
  rules:
    - backendRefs: [{{name: shop, port: 80}}]
      filters:
{filters}"#
    );
    compiled(&files(&[("s.yaml", SERVICES), ("r.yaml", &route), ("more.yaml", more)]))
}

fn mirror(to: &str, more: &str) -> String {
    format!("        - {{type: RequestMirror, requestMirror: {{backendRef: {{{to}}}{more}}}}}\n")
}

fn weights(snapshot: &Snapshot, kind: &str) -> v1::Weights {
    let route = if kind == "GRPCRoute" { "r:grpc" } else { "r" };
    let entry = snapshot.get(Kind::Weights, &format!("default/shop/default/{route}/0")).unwrap();
    let Payload::Weights(weights) = Payload::decode(Kind::Weights, &entry.any.value).unwrap() else {
        panic!()
    };
    weights
}

/// `service:port=share`, and `!` before what is invalid.
fn mirrors(snapshot: &Snapshot, kind: &str) -> Vec<String> {
    let mirrors = weights(snapshot, kind).mirrors;
    let words = mirrors.iter().map(|mirror| {
        let invalid = if mirror.invalid.is_empty() { "" } else { "!" };
        assert!(mirror.compare.is_none());
        format!("{invalid}{}:{}={}", mirror.service, mirror.port, mirror.share_ppm)
    });
    words.collect()
}

#[test]
fn a_rule_may_have_several_mirrors_each_with_its_share() {
    for kind in ["HTTPRoute", "GRPCRoute"] {
        let filters = [
            mirror("name: shop-v2, port: 80", ""),
            mirror("name: shop-v2, port: 80", ", percent: 10"),
            mirror("name: shop, port: 80", ", fraction: {numerator: 1, denominator: 1000}"),
        ];
        let snapshot = with(kind, &filters.concat(), "");
        assert_eq!(messages(&snapshot), Vec::<String>::new());
        let expected = ["default/shop-v2:80=1000000", "default/shop-v2:80=100000", "default/shop:80=1000"];
        assert_eq!(mirrors(&snapshot, kind), expected, "{kind}");
        let known: Vec<_> =
            snapshot.expand(Kind::Endpoints, "default/shop").iter().map(|(name, _)| *name).collect();
        assert_eq!(known, ["default/shop", "default/shop-v2"], "a client's sidecar knows whom it copies to");
    }
}

#[test]
fn a_mirror_that_is_not_there_is_told_and_requests_go_on() {
    let table = [
        (
            mirror("name: gone, port: 80", ""),
            "!default/gone:80=1000000",
            "does not exist",
            Reason::BackendNotFound,
        ),
        (
            mirror("name: shop-v2, port: 81", ""),
            "!default/shop-v2:81=1000000",
            "no port 81",
            Reason::BackendNotFound,
        ),
        (mirror("name: shop-v2", ""), "!default/shop-v2:0=1000000", "no port said", Reason::BackendNotFound),
        (
            mirror("name: x, kind: Bucket, group: x.io", ""),
            "!:0=1000000",
            "only Services and InferencePools",
            Reason::InvalidKind,
        ),
        (
            mirror("name: shop, namespace: other, port: 80", ""),
            "!other/shop:80=1000000",
            "add a ReferenceGrant for HTTPRoutes",
            Reason::RefNotPermitted,
        ),
    ];
    for (filter, expected, words, reason) in table {
        let snapshot = with("HTTPRoute", &filter, "");
        assert_eq!(mirrors(&snapshot, "HTTPRoute"), [expected]);
        let told = messages(&snapshot);
        assert!(told.len() == 1 && told[0].starts_with("r.yaml:9 ") && told[0].contains(words), "{told:?}");
        let outcome = snapshot.outcomes.iter().find(|(id, _)| id.name == "r").unwrap().1;
        assert_eq!(outcome.findings[0].reason, reason, "{told:?}");
        let backends = weights(&snapshot, "HTTPRoute").backends;
        assert!(backends[0].invalid.is_empty(), "requests are served: {backends:?}");
        let known = snapshot.expand(Kind::Endpoints, "default/shop").len();
        assert_eq!(known, 1, "what cannot be copied to is not told");
    }
}

#[test]
fn another_namespace_grants_its_services_as_mirrors_too() {
    let grant = r#"
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: g, namespace: other}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: default}]
  to: [{group: "", kind: Service}]
"#;
    let snapshot =
        with("HTTPRoute", &mirror("name: shop, namespace: other, port: 80", ", percent: 1"), grant);
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    assert_eq!(mirrors(&snapshot, "HTTPRoute"), ["other/shop:80=10000"]);
}

#[test]
fn a_share_that_makes_no_sense_is_told_and_nothing_is_copied() {
    let snapshot = with("HTTPRoute", &mirror("name: shop-v2, port: 80", ", percent: 101"), "");
    let told = messages(&snapshot);
    assert!(told.len() == 1 && told[0].contains("101 is not a whole number from 0 to 100"), "{told:?}");
    assert!(mirrors(&snapshot, "HTTPRoute").is_empty());
    assert!(weights(&snapshot, "HTTPRoute").backends[0].invalid.is_empty());
}

#[test]
fn a_change_of_the_share_changes_nothing_but_the_weights() {
    let of = |percent: u32| {
        with("HTTPRoute", &mirror("name: shop-v2, port: 80", &format!(", percent: {percent}")), "")
    };
    let (before, after) = (of(1), of(50));
    for kind in Kind::PUSH_ORDER {
        let versions = |snapshot: &Snapshot| -> Vec<Vec<u8>> {
            snapshot.all(kind).map(|(_, entry)| entry.any.value.to_vec()).collect()
        };
        assert_eq!(versions(&before) == versions(&after), kind != Kind::Weights, "{kind:?}");
    }
}
