//! GRPCRoutes become rules and weights as HTTPRoutes do, and say of themselves what is wrong in the same words.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use penstock_api::resource::{Kind, Payload};
use penstock_api::v1::{self, string_match};
use penstock_control::outcome::Reason;
use penstock_control::snapshot::Snapshot;

use common::{compiled, files, messages};

const SERVICES: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: triton}
spec: {ports: [{name: grpc, port: 8001}]}
---
apiVersion: v1
kind: Service
metadata: {name: triton-v2}
spec: {ports: [{name: grpc, port: 8001}]}
"#;

const ROUTE: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: triton}
spec:
  parentRefs: [{group: "", kind: Service, name: triton}]
  rules:
    - matches: [{method: {service: inference.GRPCInferenceService}}]
      backendRefs: [{name: triton, port: 8001, weight: 9}, {name: triton-v2, port: 8001}]
    - matches:
        - method: {service: inference.GRPCInferenceService, method: ModelInfer}
          headers: [{name: X-User, value: beta}]
        - method: {type: RegularExpression, method: "ModelStream.*"}
      filters:
        - type: RequestHeaderModifier
          requestHeaderModifier: {set: [{name: x-routed, value: "yes"}]}
      backendRefs: [{name: triton-v2, port: 8001}]
"#;

fn with(route: &str) -> Snapshot {
    compiled(&files(&[("s.yaml", SERVICES), ("r.yaml", route)]))
}

fn rules(snapshot: &Snapshot) -> Vec<v1::Rule> {
    let entry = snapshot.get(Kind::Routes, "default/triton").unwrap();
    let Payload::Routes(routes) = Payload::decode(Kind::Routes, &entry.any.value).unwrap() else { panic!() };
    routes.rules
}

#[test]
fn calls_are_requests_and_the_longer_service_and_method_go_first() {
    let snapshot = with(ROUTE);
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    let rules = rules(&snapshot);
    let short: Vec<_> = rules
        .iter()
        .map(|rule| (rule.index, rule.matches[0].path.clone().unwrap().kind.unwrap(), rule.filters.len()))
        .collect();
    let service = "/inference.GRPCInferenceService";
    assert_eq!(
        short,
        [
            (1, string_match::Kind::Exact(format!("{service}/ModelInfer")), 1),
            (0, string_match::Kind::Prefix(service.into()), 0),
            (1, string_match::Kind::Regex("/[^/]+/(?:ModelStream.*)".into()), 1),
        ]
    );
    assert_eq!(rules[0].matches[0].headers[0].name, "x-user");
    assert_eq!(rules[1].weights, "default/triton/default/triton:grpc/0");
    let entry = snapshot.get(Kind::Weights, &rules[1].weights).unwrap();
    let Payload::Weights(weights) = Payload::decode(Kind::Weights, &entry.any.value).unwrap() else {
        panic!()
    };
    let shares: Vec<_> = weights.backends.iter().map(|one| (&*one.service, one.port, one.weight)).collect();
    assert_eq!(shares, [("default/triton", 8001, 9), ("default/triton-v2", 8001, 1)]);
}

#[test]
fn an_http_route_and_a_grpc_route_of_one_name_do_not_get_in_each_others_way() {
    let http = ROUTE
        .replace("GRPCRoute", "HTTPRoute")
        .replace("{method: {service: inference.GRPCInferenceService}}", "{path: {value: /v2}}");
    let http = http.split("    - matches:\n        - method").next().unwrap();
    let snapshot = with(&format!("{ROUTE}---{http}"));
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    let names: Vec<_> = snapshot.all(Kind::Weights).map(|(name, _)| name.to_owned()).collect();
    assert_eq!(
        names,
        [
            "default/triton/default/triton/0",
            "default/triton/default/triton:grpc/0",
            "default/triton/default/triton:grpc/1"
        ]
    );
    assert_eq!(rules(&snapshot).len(), 4);
}

#[test]
fn what_is_refused_is_told_with_its_reason() {
    let table = [
        (
            ROUTE.replace("method: ModelInfer}", "method: a/b}"),
            Reason::Value,
            "r.yaml:11 GRPCRoute default/triton: \"a/b\" has a slash in it, which no method of gRPC has",
        ),
        (
            ROUTE.replace("{name: triton-v2, port: 8001}]", "{name: gone, port: 8001}]"),
            Reason::BackendNotFound,
            "r.yaml:9 GRPCRoute default/triton: the backend default/gone does not exist; create the Service, or correct the name",
        ),
        (
            ROUTE.replace("{name: triton-v2, port: 8001}]", "{name: x, namespace: two, port: 8001}]"),
            Reason::RefNotPermitted,
            "r.yaml:9 GRPCRoute default/triton: the backend two/x is not permitted to namespace default; \
             add a ReferenceGrant for GRPCRoutes from default in namespace two",
        ),
        (
            ROUTE.replace("name: triton}]\n", "name: nobody}]\n"),
            Reason::NoMatchingParent(0),
            "r.yaml:6 GRPCRoute default/triton: its parent, the Service default/nobody, does not exist; create it, or correct the name",
        ),
    ];
    for (text, reason, expected) in table {
        let snapshot = with(&text);
        assert_eq!(messages(&snapshot).first().map(String::as_str), Some(expected));
        let outcome = snapshot.outcomes.iter().find(|(id, _)| id.name == "triton" && id.kind.has_status());
        assert_eq!(outcome.unwrap().1.findings[0].reason, reason);
    }
}
