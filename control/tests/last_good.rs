//! An object that makes no sense is told about, with its line, and its last good version stays in force.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use penstock_api::resource::{Kind, Payload};
use penstock_control::compile::{State, compile};
use penstock_control::objects::ObjectSet;
use penstock_control::snapshot::Snapshot;

use common::{compiled, files, messages, trust};

const SERVICES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {ports: [{name: http, port: 80}]}
";

const ROUTE: &str = "\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: r
spec:
  parentRefs:
    - {group: \"\", kind: Service, name: a}
  rules:
    - backendRefs:
        - name: a
          port: 80
          weight: 90
        - name: b
          port: 80
          weight: 10
";

/// A control plane that lives through several versions of its files.
#[derive(Default)]
struct Life {
    state: State,
    snapshot: Snapshot,
}

impl Life {
    fn sees(&mut self, now: &[(&str, &str)]) -> Vec<String> {
        self.sees_set(&files(now))
    }

    fn sees_set(&mut self, set: &ObjectSet) -> Vec<String> {
        (self.snapshot, self.state) = compile(set, &self.state, &trust());
        messages(&self.snapshot)
    }

    /// `service=weight`, `!` before what is invalid.
    fn weights(&self) -> Vec<String> {
        let Some(entry) = self.snapshot.get(Kind::Weights, "default/a/default/r/0") else {
            return Vec::new();
        };
        let Payload::Weights(weights) = Payload::decode(Kind::Weights, &entry.any.value).unwrap() else {
            panic!()
        };
        let backend = |b: &penstock_api::v1::Backend| {
            format!("{}{}={}", if b.invalid.is_empty() { "" } else { "!" }, b.service, b.weight)
        };
        weights.backends.iter().map(backend).collect()
    }
}

const GOOD: [&str; 2] = ["default/a=90", "default/b=10"];

fn started() -> Life {
    let mut life = Life::default();
    assert_eq!(life.sees(&[("r.yaml", ROUTE), ("s.yaml", SERVICES)]), Vec::<String>::new());
    assert_eq!(life.weights(), GOOD);
    life
}

#[test]
fn a_route_that_makes_no_sense_leaves_its_last_good_version() {
    let table = [
        (
            ROUTE.replace("90", "0").replace("10", "0"),
            "*r.yaml:12 HTTPRoute default/r: the weights sum to 0, so no request could go anywhere; give one backend more",
        ),
        (
            ROUTE.replace("name: b", "name: c"),
            "*r.yaml:13 HTTPRoute default/r: the backend default/c does not exist; create the Service, or correct the name",
        ),
        (
            ROUTE.replace(
                "          port: 80\n          weight: 10",
                "          port: 81\n          weight: 10",
            ),
            "*r.yaml:14 HTTPRoute default/r: the backend default/b has no port 81; use one that it has: 80",
        ),
        (
            ROUTE.replace("weight: 10", "weight: -1"),
            "*r.yaml:15 HTTPRoute default/r: a weight is a whole number from 0 to 1000000",
        ),
        (
            ROUTE.replace("weight: 10", "weight: ten"),
            "*r.yaml:15 HTTPRoute default/r: spec.rules[0].backendRefs[1].weight: invalid type: string \"ten\", \
             expected i32; write what the API defines for this field",
        ),
        (
            ROUTE.replace("weight: 10", "weigth: 10"),
            "*r.yaml:15 HTTPRoute default/r: spec.rules[0].backendRefs[1].weigth: there is no such field; \
             is it misspelt, or in the wrong place?",
        ),
        (
            format!(
                "{ROUTE}      filters:\n        - type: ExtensionRef\n          extensionRef: {{group: x.io, kind: X, name: z}}\n"
            ),
            "*r.yaml:17 HTTPRoute default/r: filters of type ExtensionRef are not supported in a rule, \
             and requests to it are answered with 500; remove it",
        ),
        (
            ROUTE.replace("name: a}", "name: z}"),
            "*r.yaml:7 HTTPRoute default/r: its parent, the Service default/z, does not exist; create it, or correct the name",
        ),
    ];
    for (text, problem) in table {
        let mut life = started();
        let before = life.snapshot.version.clone();
        assert_eq!(life.sees(&[("r.yaml", &text), ("s.yaml", SERVICES)]), [problem]);
        assert_eq!(life.weights(), GOOD, "{problem}");
        assert_eq!(life.snapshot.version, before, "{problem}");
        // It is told for as long as it is wrong, and no longer.
        assert_eq!(life.sees(&[("r.yaml", &text), ("s.yaml", SERVICES)]), [problem]);
        let better = ROUTE.replace("90", "50");
        assert_eq!(life.sees(&[("r.yaml", &better), ("s.yaml", SERVICES)]), Vec::<String>::new());
        assert_eq!(life.weights(), ["default/a=50", "default/b=10"]);
    }
}

#[test]
fn yaml_garbage_leaves_all_objects_of_its_file() {
    let mut life = started();
    let before = life.snapshot.version.clone();
    let problems = life.sees(&[("r.yaml", ROUTE), ("s.yaml", &format!("{SERVICES}---\na: [b\n"))]);
    let [problem] = &problems[..] else { panic!("{problems:?}") };
    assert!(problem.starts_with("*s.yaml:") && problem.contains("this is not YAML"), "{problem}");
    assert_eq!(life.snapshot.version, before);
    // Again, because what is held must survive being held; then a deletion that is real.
    life.sees(&[("r.yaml", ROUTE), ("s.yaml", "{")]);
    assert_eq!(life.snapshot.version, before);
    life.sees(&[("r.yaml", ROUTE)]);
    assert!(life.snapshot.get(Kind::Service, "default/b").is_none());
}

#[test]
fn a_document_that_lost_its_name_leaves_what_the_file_had() {
    let mut life = started();
    let problems = life.sees(&[("r.yaml", ROUTE), ("s.yaml", &SERVICES.replace("{name: b}", "{}"))]);
    assert_eq!(problems, ["*s.yaml:8: this Service has no metadata.name; give it one"]);
    assert_eq!(life.weights(), GOOD);
}

#[test]
fn an_object_that_is_deleted_goes_away() {
    let mut life = started();
    assert_eq!(life.sees(&[("s.yaml", SERVICES)]), Vec::<String>::new());
    assert_eq!(life.weights(), Vec::<String>::new());
    // Nothing of it is remembered: what comes back wrong has no last good version.
    life.sees(&[("r.yaml", &ROUTE.replace("name: b", "name: c")), ("s.yaml", SERVICES)]);
    assert_eq!(life.weights(), ["default/a=90", "!default/c=10"]);
}

#[test]
fn a_backend_that_goes_away_is_told_and_its_share_refused() {
    let mut life = started();
    let only_a = SERVICES.split("---").next().unwrap();
    let problem = "r.yaml:13 HTTPRoute default/r: the backend default/b does not exist; create the Service, or correct the name";
    assert_eq!(life.sees(&[("r.yaml", ROUTE), ("s.yaml", only_a)]), [problem]);
    assert_eq!(life.weights(), ["default/a=90", "!default/b=10"]);
    // Another mistake in the same route: the version that was good once stays, and both are told.
    let problems = life
        .sees(&[("r.yaml", &ROUTE.replace("90", "91").replace("name: b", "name: c")), ("s.yaml", only_a)]);
    assert_eq!(problems.len(), 2, "{problems:?}");
    for words in [
        "its last good version, which is in force: the backend default/b",
        ": the backend default/c does not",
    ] {
        assert!(problems.iter().any(|problem| problem.contains(words)), "{words}: {problems:?}");
    }
    assert_eq!(life.weights(), ["default/a=90", "!default/b=10"]);
    assert_eq!(life.sees(&[("r.yaml", ROUTE), ("s.yaml", SERVICES)]), Vec::<String>::new());
    assert_eq!(life.weights(), GOOD);
}

#[test]
fn at_the_first_start_a_wrong_object_is_in_force_as_far_as_it_makes_sense() {
    let route = ROUTE.replace("name: b", "name: c");
    let mut life = Life::default();
    let problems = life.sees(&[("r.yaml", &route), ("s.yaml", SERVICES)]);
    assert!(problems[0].starts_with("r.yaml:13 HTTPRoute default/r: the backend default/c"), "{problems:?}");
    assert_eq!(life.weights(), ["default/a=90", "!default/c=10"]);
    // The Service that was missing comes: what was wrong is good, without a change to the route.
    let more =
        format!("{SERVICES}---\n{}", SERVICES.split("---\n").last().unwrap().replace("name: b", "name: c"));
    assert_eq!(life.sees(&[("r.yaml", &route), ("s.yaml", &more)]), Vec::<String>::new());
    assert_eq!(life.weights(), ["default/a=90", "default/c=10"]);
}

#[test]
fn a_service_that_falls_back_does_not_take_its_route_with_it() {
    let mut life = started();
    // The Service drops port 80 and is wrong besides, so port 80 stays; the route, which still wants it, is right.
    let services = SERVICES.replace(
        "metadata: {name: b}\nspec: {ports: [{name: http, port: 80}]}",
        "metadata:\n  name: b\n  annotations:\n    penstock.io/balance: random\nspec: {ports: [{name: http, port: 81}]}",
    );
    let route = ROUTE.replace("weight: 90", "weight: 50");
    assert_eq!(
        life.sees(&[("r.yaml", &route), ("s.yaml", &services)]),
        [
            "*s.yaml:11 Service default/b: annotation penstock.io/balance: \"random\" is not a way to balance; \
          write gpu, prefix, least-request, round-robin, ring-hash or orca-wrr"
        ]
    );
    assert_eq!(life.weights(), ["default/a=50", "default/b=10"]);
}

#[test]
fn of_two_objects_of_a_name_the_one_that_was_there_stays() {
    let mut life = started();
    let copy = ROUTE.replace("90", "1");
    let problems = life.sees(&[("a.yaml", &copy), ("r.yaml", ROUTE), ("s.yaml", SERVICES)]);
    assert_eq!(
        problems,
        ["a.yaml:1 HTTPRoute default/r: it is already defined at r.yaml:1, and that version is in force; \
          remove one of the two"]
    );
    assert_eq!(life.weights(), GOOD);
}

#[test]
fn a_port_that_no_endpoint_has_is_told() {
    let slice = "\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{name: http, port: 8000}]
endpoints: [{addresses: [192.0.2.1]}]
";
    let service = "\
apiVersion: v1
kind: Service
metadata: {name: a}
spec:
  ports:
    - {name: http, port: 80}
    - {name: grpc, port: 81}
";
    let problems = messages(&compiled(&files(&[("e.yaml", slice), ("s.yaml", service)])));
    assert_eq!(
        problems,
        [
            "s.yaml:7 Service default/a: no endpoint of default/a has a port named \"grpc\" for service port 81 \
          (the endpoints' ports: \"http\"); name a port of its EndpointSlices so, or remove it from the Service"
        ]
    );
    let none = slice.replace("[{addresses: [192.0.2.1]}]", "[]");
    assert_eq!(messages(&compiled(&files(&[("e.yaml", &none), ("s.yaml", service)]))), Vec::<String>::new());
}

#[test]
fn pods_whose_nodes_are_not_heard_of_stay_in_use_where_they_are_the_most() {
    // After an outage of the API server: what the node controller writes, until the kubelet has spoken again.
    let unheard = "{type: Ready, status: 'False'}, {type: ContainersReady, status: 'True'}";
    let gate = "{type: Ready, status: 'False', reason: ReadinessGatesNotReady}, {type: ContainersReady, status: 'True'}";
    let broken = "{type: Ready, status: 'False'}, {type: ContainersReady, status: 'False'}";
    let used = |ready: usize, others: usize, conditions: &str, leaving: bool| {
        let (mut pods, mut endpoints) = (String::new(), String::new());
        for number in 0..ready + others {
            let well = number < ready;
            let said = if well { "{type: Ready, status: 'True'}" } else { conditions };
            pods.push_str(&format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{number}}}\nspec: {{containers: [{{name: main}}]}}\n\
                 status: {{phase: Running, podIP: 192.0.2.{number}, conditions: [{said}]}}\n---\n"
            ));
            endpoints.push_str(&format!(
                "  - {{addresses: [192.0.2.{number}], targetRef: {{kind: Pod, name: p{number}}}, conditions: {{ready: {well}, serving: {well}, \
                 terminating: {leaving}}}}}\n"
            ));
        }
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: a-1, labels: {{kubernetes.io/service-name: a}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: 8000}}]\nendpoints:\n{endpoints}"
        );
        let snapshot = compiled(&files(&[("e.yaml", &slice), ("p.yaml", &pods), ("s.yaml", SERVICES)]));
        let entry = snapshot.get(Kind::Endpoints, "default/a").unwrap();
        let Payload::Endpoints(found) = Payload::decode(Kind::Endpoints, &entry.any.value).unwrap() else {
            panic!()
        };
        found.endpoints.len()
    };
    assert_eq!(used(0, 2, unheard, false), 2, "all of them");
    assert_eq!(used(1, 3, unheard, false), 4, "most of them");
    assert_eq!(used(2, 2, unheard, false), 2, "a node is gone");
    assert_eq!(used(0, 2, broken, false), 0, "their containers are not ready");
    assert_eq!(used(0, 2, gate, false), 0, "somebody said no");
    assert_eq!(used(0, 2, unheard, true), 0, "they leave");
}

#[test]
fn an_endpoint_of_an_unknown_pod_is_never_dialled_in_plaintext() {
    let slice = "\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
ports: [{name: http, port: 8000}]
endpoints:
  - addresses: [127.0.0.1]
    targetRef: {kind: Pod, name: p}
";
    let snapshot = compiled(&files(&[("e.yaml", slice), ("s.yaml", SERVICES)]));
    let entry = snapshot.get(Kind::Endpoints, "default/a").unwrap();
    assert!(entry.any.value.is_empty(), "no endpoints");
    let problems = messages(&snapshot);
    assert!(
        problems[0].starts_with("e.yaml:8 EndpointSlice default/a-1: the endpoint 127.0.0.1 is left out"),
        "{problems:?}"
    );
    // Of a pod that goes the slice may know a moment longer, and that is no problem.
    for conditions in ["ready: false, serving: true, terminating: true", "ready: false"] {
        let leaving = format!("{slice}    conditions: {{{conditions}}}\n");
        let snapshot = compiled(&files(&[("e.yaml", &leaving), ("s.yaml", SERVICES)]));
        assert!(snapshot.get(Kind::Endpoints, "default/a").unwrap().any.value.is_empty());
        assert_eq!(messages(&snapshot), Vec::<String>::new(), "{conditions}");
    }
}

#[test]
fn annotations_are_told_with_their_line() {
    let table = [
        (
            "penstock.io/timeout: \"request=never\"",
            "annotation penstock.io/timeout: request: \"never\" is not a duration",
        ),
        (
            "penstock.io/batch: \"max=0\"",
            "annotation penstock.io/batch: max: \"0\" is not a whole number from 1",
        ),
        ("penstock.io/traffic-split: \"b=0\"", "annotation penstock.io/traffic-split: the weights sum to 0"),
        (
            "penstock.io/traffic-split: \"c=1\"",
            "annotation penstock.io/traffic-split: the backend default/c does not exist",
        ),
    ];
    for (annotation, words) in table {
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: a\n  annotations:\n    x: z\n    {annotation}\nspec: {{ports: [{{port: 80}}]}}\n"
        );
        let problems = messages(&compiled(&files(&[("s.yaml", &service)])));
        assert!(problems[0].starts_with(&format!("s.yaml:7 Service default/a: {words}")), "{problems:?}");
    }
}
