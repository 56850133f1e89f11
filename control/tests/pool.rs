//! An InferencePool is a backend like a Service: its pods by their labels, as they are ready.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use penstock_api::resource::{Kind, Payload};
use penstock_api::v1;
use penstock_control::objects::ObjectKind;
use penstock_control::outcome::{Outcome, Reason};
use penstock_control::snapshot::Snapshot;

use common::{compiled, files, messages};

const POOL: &str = r#"
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: llama}
spec:
  selector: {matchLabels: {app: llama}}
  targetPorts: [{number: 8000}]
  endpointPickerRef: {name: picker, port: {number: 9002}}
"#;

const ROUTE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: chat}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: chat}
spec:
  parentRefs: [{group: "", kind: Service, name: chat}]
  rules:
    - backendRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: llama}]
"#;

fn pod(name: &str, app: &str, rest: &str, status: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {app}, extra: x}}, \
         annotations: {{penstock.io/inject: enabled}}{rest}}}\n\
         spec: {{containers: [{{name: server, ports: [{{containerPort: 8000}}]}}]}}\nstatus: {{{status}}}\n"
    )
}

fn pods() -> String {
    let gone = ", deletionTimestamp: \"2026-01-01T00:00:00Z\"";
    let ready = |ip: &str, ready: &str| {
        format!("phase: Running, podIP: {ip}, conditions: [{{type: Ready, status: \"{ready}\"}}]")
    };
    [
        pod("ready", "llama", "", &ready("10.0.0.1", "True")),
        pod("starting", "llama", "", &ready("10.0.0.2", "False")),
        pod("draining", "llama", gone, &ready("10.0.0.3", "True")),
        pod("ended", "llama", "", "phase: Succeeded, podIP: 10.0.0.4"),
        pod("other", "mistral", "", &ready("10.0.0.5", "True")),
        pod("unscheduled", "llama", "", "phase: Pending"),
        pod("by-phase", "llama", "", "phase: Running, podIP: 10.0.0.6"),
    ]
    .concat()
}

/// Name, whether it is draining, and from which port of the pool to which of its own.
type Shown = (String, bool, Vec<(u32, u32)>);

fn endpoints(snapshot: &Snapshot) -> Vec<Shown> {
    let entry = snapshot.get(Kind::Endpoints, "default/llama.pool").unwrap();
    let Payload::Endpoints(all) = Payload::decode(Kind::Endpoints, &entry.any.value).unwrap() else {
        panic!()
    };
    let ports = |one: &v1::Endpoint| one.ports.iter().map(|port| (port.service_port, port.port)).collect();
    all.endpoints.iter().map(|one| (one.name.clone(), one.draining, ports(one))).collect()
}

fn of_pool(snapshot: &Snapshot) -> &Outcome {
    snapshot.outcomes.iter().find(|(id, _)| id.kind == ObjectKind::InferencePool).unwrap().1
}

#[test]
fn its_pods_are_found_by_labels_and_as_they_are_ready() {
    let snapshot = compiled(&files(&[("pool.yaml", POOL), ("route.yaml", ROUTE), ("pods.yaml", &pods())]));
    // One that has no address yet is no complaint.
    assert_eq!(messages(&snapshot), [""; 0]);
    let at = vec![(8000, 8000)];
    assert_eq!(
        endpoints(&snapshot),
        [
            ("default/by-phase".to_owned(), false, at.clone()),
            ("default/draining".to_owned(), true, at.clone()),
            ("default/ready".to_owned(), false, at),
        ]
    );
    // A client of the route's parent gets the pool with it.
    let names: Vec<_> =
        snapshot.expand(Kind::Endpoints, "default/chat").iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["default/chat", "default/llama.pool"]);
    let entry = snapshot.get(Kind::Weights, "default/chat/default/chat/0").unwrap();
    let Payload::Weights(weights) = Payload::decode(Kind::Weights, &entry.any.value).unwrap() else {
        panic!()
    };
    let backend = &weights.backends[0];
    assert_eq!((&*backend.service, backend.port, &*backend.invalid), ("default/llama.pool", 8000, ""));
    // It has no address: nobody reaches it but through a route.
    assert!(!snapshot.all(Kind::Address).any(|(_, entry)| {
        let Ok(address) = <v1::Address as prost::Message>::decode(&*entry.any.value) else { return false };
        address.target == Some(v1::address::Target::Service("default/llama.pool".into()))
    }));
    // The pods' own proxies know what they are part of.
    let entry = snapshot.get(Kind::Workload, "default/ready").unwrap();
    let Payload::Workload(workload) = Payload::decode(Kind::Workload, &entry.any.value).unwrap() else {
        panic!()
    };
    assert_eq!(workload.ports[0].services, ["default/llama.pool"]);

    let outcome = of_pool(&snapshot);
    let parents: Vec<_> = outcome.parents.iter().map(|parent| parent.reference.to_string()).collect();
    assert_eq!(parents, [r#"{"group":"","kind":"Service","name":"chat","namespace":"default"}"#]);
    assert_eq!(outcome.resources.iter().next(), Some(&(Kind::Service, "default/llama.pool".to_owned())));
}

#[test]
fn what_cannot_be_is_refused_with_its_reason() {
    let table = [
        (POOL.replace("{app: llama}", "{}"), "it selects every pod of its namespace"),
        (POOL.replace("[{number: 8000}]", "[]"), "it has no port"),
        (POOL.replace("number: 8000", "number: 70000"), "70000 is not a port"),
        (
            POOL.replace("name: llama}", "name: llama.v2}"),
            "the name of a pool that is a backend is one DNS label",
        ),
    ];
    for (pool, words) in table {
        let snapshot = compiled(&files(&[("pool.yaml", &pool)]));
        let finding = &of_pool(&snapshot).findings[0];
        assert!(finding.refused && finding.message.contains(words), "{finding:?}");
    }
    let two = POOL.replace("{number: 8000}", "{number: 8000}, {number: 8001}");
    let snapshot = compiled(&files(&[("pool.yaml", &two)]));
    let finding = &of_pool(&snapshot).findings[0];
    assert!(
        !finding.refused && finding.message.contains("only the first port (8000) is called"),
        "{finding:?}"
    );

    let of_route = |text: &str| {
        let snapshot = compiled(&files(&[("pool.yaml", POOL), ("route.yaml", text)]));
        let route = snapshot.outcomes.iter().find(|(id, _)| id.kind == ObjectKind::HTTPRoute).unwrap().1;
        route.findings.first().map(|finding| finding.reason)
    };
    let table = [
        (ROUTE.to_owned(), None),
        (ROUTE.replace("name: llama", "name: mistral"), Some(Reason::BackendNotFound)),
        (ROUTE.replace("name: llama", "name: llama, namespace: two"), Some(Reason::RefNotPermitted)),
        (ROUTE.replace("kind: InferencePool", "kind: Model"), Some(Reason::InvalidKind)),
    ];
    for (text, expected) in table {
        assert_eq!(of_route(&text), expected, "{text}");
    }
}

#[test]
fn a_policy_of_balancing_is_said_on_the_pool_itself() {
    let pool = POOL.replace("{name: llama}", "{name: llama, annotations: {penstock.io/balance: prefix}}");
    let snapshot = compiled(&files(&[("pool.yaml", &pool)]));
    let entry = snapshot.get(Kind::Service, "default/llama.pool").unwrap();
    let Payload::Service(service) = Payload::decode(Kind::Service, &entry.any.value).unwrap() else {
        panic!()
    };
    assert_eq!(service.policy.unwrap().balance(), v1::Balance::Prefix);
    let by_default = compiled(&files(&[("pool.yaml", POOL)]));
    let entry = by_default.get(Kind::Service, "default/llama.pool").unwrap();
    let Payload::Service(service) = Payload::decode(Kind::Service, &entry.any.value).unwrap() else {
        panic!()
    };
    assert_eq!(service.policy.unwrap_or_default().balance(), v1::Balance::Gpu);
}
