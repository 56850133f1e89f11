//! From YAML to resources: what a reader of the Kubernetes and Gateway API documents would expect.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use penstock_api::resource::{Kind, Payload};
use penstock_api::v1::{self, Protocol};
use penstock_control::compile::{State, compile};
use penstock_control::objects::ObjectSet;
use penstock_control::snapshot::Snapshot;

use common::{compiled, mesh, messages, read, trust};

fn get(snapshot: &Snapshot, kind: Kind, name: &str) -> Payload {
    let entry = snapshot.get(kind, name).unwrap_or_else(|| panic!("no {kind:?} {name}"));
    Payload::decode(kind, &entry.any.value).unwrap()
}

fn routes(snapshot: &Snapshot, name: &str) -> Vec<v1::Rule> {
    match get(snapshot, Kind::Routes, name) {
        Payload::Routes(routes) => routes.rules,
        other => panic!("{other:?}"),
    }
}

/// `service:port=weight`, and `!` before what is invalid.
fn weights(snapshot: &Snapshot, name: &str) -> Vec<String> {
    let Payload::Weights(weights) = get(snapshot, Kind::Weights, name) else { panic!("{name}") };
    weights
        .backends
        .iter()
        .map(|backend| {
            let invalid = if backend.invalid.is_empty() { "" } else { "!" };
            format!("{invalid}{}:{}={}", backend.service, backend.port, backend.weight)
        })
        .collect()
}

#[test]
fn a_mesh_is_compiled_whole() {
    let snapshot = compiled(&mesh());
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    let mut text = String::new();
    for kind in Kind::PUSH_ORDER {
        for (name, entry) in snapshot.all(kind) {
            let payload = Payload::decode(kind, &entry.any.value).unwrap();
            text.push_str(&format!("--- {name}\n{payload:#?}\n"));
        }
    }
    insta::assert_snapshot!(text);
}

#[test]
fn the_order_of_files_and_objects_changes_nothing() {
    let set = mesh();
    let first = compiled(&set);
    // Every rotation and its mirror: each object comes first, last and next to each other once.
    for turn in 0..set.objects.len() {
        let mut objects = set.objects.clone();
        objects.rotate_left(turn);
        for _ in 0..2 {
            objects.reverse();
            let snapshot = compiled(&ObjectSet { objects: objects.clone(), ..ObjectSet::default() });
            assert_eq!(snapshot.version, first.version, "rotated by {turn}");
            assert_eq!(snapshot.problems, first.problems);
        }
    }
}

#[test]
fn trust_anchors_are_part_of_the_snapshot() {
    let before = compiled(&mesh());
    let mut anchors = trust();
    anchors.anchors.push(vec![4, 5, 6]);
    let (after, _) = compile(&mesh(), &State::default(), &anchors);
    assert_ne!(before.version, after.version);
    let Payload::TrustBundle(bundle) = get(&after, Kind::TrustBundle, "cluster.local") else { panic!() };
    assert_eq!(bundle.anchors, [vec![1, 2, 3], vec![4, 5, 6]]);
}

#[test]
fn a_subscription_to_a_service_spans_what_its_routes_lead_to() {
    let snapshot = compiled(&mesh());
    let names: Vec<_> =
        snapshot.expand(Kind::Endpoints, "vision/resnet").iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["vision/resnet", "vision/resnet-v1", "vision/resnet-v2"]);
}

const ROUTE: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: canary, namespace: vision}
spec:
  parentRefs: [{group: "", kind: Service, name: resnet}]
  rules:
    - backendRefs: [{name: resnet-v1, port: 80, weight: 3}, {name: resnet-v2, port: 80}]
    - matches:
        - path: {value: /v2}
        - path: {type: Exact, value: /v2/models}
          method: GET
      filters:
        - type: URLRewrite
          urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /}}
      timeouts: {request: 10s, backendRequest: 2s}
      retry: {attempts: 3, codes: [503]}
      sessionPersistence: {sessionName: user, type: Cookie}
      backendRefs:
        - name: resnet-v2
          port: 80
          filters:
            - type: RequestHeaderModifier
              requestHeaderModifier: {add: [{name: X-Version, value: v2}]}
    - matches: [{path: {value: /old}}]
      filters: [{type: RequestRedirect, requestRedirect: {hostname: new.example.com}}]
"#;

#[test]
fn a_route_wins_over_the_annotation_and_its_rules_are_in_order() {
    let mut set = mesh();
    set.objects.extend(read("route.yaml", ROUTE).objects);
    let snapshot = compiled(&set);
    assert_eq!(messages(&snapshot), Vec::<String>::new());

    let rules = routes(&snapshot, "vision/resnet");
    let order: Vec<_> = rules.iter().map(|rule| (rule.route.as_str(), rule.index)).collect();
    // The exact path, then the longest prefix, then the rest.
    assert_eq!(
        order,
        [("vision/canary", 1), ("vision/canary", 2), ("vision/canary", 1), ("vision/canary", 0)]
    );
    let exact = &rules[0];
    assert_eq!(exact.matches[0].method, "GET");
    assert_eq!(exact.timeouts.unwrap().per_try_ms, Some(2_000));
    assert_eq!(exact.retry.as_ref().unwrap().attempts, Some(3));
    assert_eq!(exact.sticky.as_ref().unwrap().key, Some(v1::sticky::Key::Cookie("user".into())));
    assert_eq!(exact.weights, "vision/resnet/vision/canary/1");
    assert_eq!(rules[1].weights, "", "a redirect answers by itself");
    assert!(rules[3].matches.is_empty());

    assert_eq!(
        weights(&snapshot, "vision/resnet/vision/canary/0"),
        ["vision/resnet-v1:80=3", "vision/resnet-v2:80=1"]
    );
    assert!(snapshot.get(Kind::Weights, "vision/resnet/vision/resnet/0").is_none());
    assert!(snapshot.get(Kind::Routes, "vision/resnet-v1").is_none(), "no route, no resource");
}

#[test]
fn moving_a_weight_changes_nothing_but_the_weights() {
    let with = |text: &str| {
        let mut set = mesh();
        set.objects.extend(read("route.yaml", text).objects);
        compiled(&set)
    };
    let (before, after) = (with(ROUTE), with(&ROUTE.replace("weight: 3", "weight: 4")));
    let mut changed = Vec::new();
    for kind in Kind::PUSH_ORDER {
        let entries = after.all(kind).filter(|(name, entry)| before.get(kind, name) != Some(*entry));
        changed.extend(entries.map(|(name, _)| (kind, name.to_owned())));
    }
    assert_eq!(changed, [(Kind::Weights, "vision/resnet/vision/canary/0".to_owned())]);
}

#[test]
fn ports_without_a_rule_go_where_they_went() {
    let mut set = mesh();
    let route = ROUTE.replace("name: resnet}]", "name: resnet-v1, port: 80}]");
    set.objects.extend(read("route.yaml", &route.replace("name: canary", "name: resnet-v1")).objects);
    let snapshot = compiled(&set);
    let rules = routes(&snapshot, "vision/resnet-v1");
    assert!(rules[..4].iter().all(|rule| rule.port == 80), "{rules:?}");
    // The route has the name of the Service, and three rules.
    let rest = &rules[4];
    assert_eq!(
        (rest.port, rest.index, rest.weights.as_str()),
        (8001, 3, "vision/resnet-v1/vision/resnet-v1/3")
    );
    assert_eq!(weights(&snapshot, &rest.weights), ["vision/resnet-v1:8001=1"]);
}

#[test]
fn a_split_of_several_ports_leads_each_to_its_own() {
    let set = read(
        "x.yaml",
        r#"
apiVersion: v1
kind: Service
metadata: {name: a, annotations: {penstock.io/traffic-split: "a=1,b=2,c=0"}}
spec: {ports: [{name: http, port: 80}, {name: grpc, port: 81}]}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {ports: [{name: http, port: 80}, {name: grpc, port: 9000}]}
---
apiVersion: v1
kind: Service
metadata: {name: c}
spec: {ports: [{port: 7000}]}
"#,
    );
    let snapshot = compiled(&set);
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    let ports: Vec<_> = routes(&snapshot, "default/a").iter().map(|rule| rule.port).collect();
    assert_eq!(ports, [80, 81]);
    assert_eq!(
        weights(&snapshot, "default/a/default/a/0"),
        ["default/a:80=1", "default/b:80=2", "default/c:7000=0"]
    );
    assert_eq!(
        weights(&snapshot, "default/a/default/a/1"),
        ["default/a:81=1", "default/b:9000=2", "default/c:7000=0"]
    );
}

#[test]
fn hostnames_and_parents_multiply_a_rule() {
    let set = read(
        "x.yaml",
        r#"
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {ports: [{name: http, port: 80}, {name: alt, port: 81}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r}
spec:
  hostnames: ["*.Example.com", a.example.com]
  parentRefs:
    - {group: "", kind: Service, name: a, sectionName: alt}
    - {kind: Gateway, name: front}
  rules: [{backendRefs: [{name: a, port: 80}]}]
"#,
    );
    let snapshot = compiled(&set);
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    let rules = routes(&snapshot, "default/a");
    let seen: Vec<_> = rules.iter().map(|rule| (rule.port, rule.hostnames.concat())).collect();
    let expected = [(81, "a.example.com"), (81, "*.example.com"), (80, "")];
    assert_eq!(seen, expected.map(|(port, host)| (port, host.to_owned())));
}

#[test]
fn another_namespace_must_grant_its_backends() {
    let set = |grant: &str| {
        read(
            "x.yaml",
            &format!(
                r#"
apiVersion: v1
kind: Service
metadata: {{name: a, namespace: one}}
spec: {{ports: [{{port: 80}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: b, namespace: two}}
spec: {{ports: [{{port: 80}}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: one}}
spec:
  parentRefs: [{{group: "", kind: Service, name: a}}]
  rules: [{{backendRefs: [{{name: b, namespace: two, port: 80}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {{name: g, namespace: two}}
spec:
  from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {grant}}}]
  to: [{{group: "", kind: Service}}]
"#
            ),
        )
    };
    let granted = compiled(&set("one"));
    assert_eq!(messages(&granted), Vec::<String>::new());
    assert_eq!(weights(&granted, "one/a/one/r/0"), ["two/b:80=1"]);

    let refused = compiled(&set("three"));
    assert_eq!(weights(&refused, "one/a/one/r/0"), ["!two/b:80=1"]);
    assert_eq!(
        messages(&refused),
        ["x.yaml:17 HTTPRoute one/r: the backend two/b is not permitted to namespace one; \
          add a ReferenceGrant for HTTPRoutes from one in namespace two"]
    );
    assert_eq!(refused.expand(Kind::Endpoints, "one/a").len(), 1, "what is not permitted is not told");
}

#[test]
fn an_opaque_port_is_opaque_on_both_sides() {
    let mut set = mesh();
    let text = include_str!("mesh/pods.yaml")
        .replace("    penstock.io/inbound-port: \"15006\"\n", "    penstock.io/opaque-ports: \"8000\"\n");
    set.objects.retain(|object| &*object.origin.file != "pods.yaml");
    set.objects.extend(read("pods.yaml", &text).objects);
    let snapshot = compiled(&set);
    let Payload::Service(service) = get(&snapshot, Kind::Service, "vision/resnet-v1") else { panic!() };
    let protocols: Vec<_> = service.ports.iter().map(v1::ServicePort::protocol).collect();
    assert_eq!(protocols, [Protocol::Opaque, Protocol::Grpc]);
    let Payload::Workload(workload) = get(&snapshot, Kind::Workload, "vision/resnet-v1-0") else { panic!() };
    assert_eq!(workload.ports[0].protocol(), Protocol::Opaque);
}

#[test]
fn a_pod_is_the_same_at_each_of_its_addresses_and_what_it_does_not_declare_is_known_to_be_its() {
    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: both, namespace: a, annotations: {penstock.io/inject: enabled}}\n\
        spec: {containers: [{name: main, ports: [{containerPort: 8000}]}]}\n\
        status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}\n";
    let snapshot = compiled(&read("pod.yaml", POD));
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    for (name, port) in
        [("10.0.0.1:8000", 8000), ("[fd00::1]:8000", 8000), ("10.0.0.1:0", 0), ("[fd00::1]:0", 0)]
    {
        let Payload::Address(address) = get(&snapshot, Kind::Address, name) else { panic!("{name}") };
        let Some(v1::address::Target::Endpoint(pod)) = address.target else { panic!("{name}") };
        assert_eq!((address.port, pod.name.as_str()), (port, "a/both"), "{name}");
        assert_eq!(pod.identity, "spiffe://cluster.local/ns/a/sa/default", "{name}");
    }
    // A pod outside the mesh may be called in plaintext, whatever the port.
    let outside = compiled(&read("pod.yaml", &POD.replace("inject: enabled", "inject: disabled")));
    assert!(
        outside.get(Kind::Address, "10.0.0.1:8000").is_some()
            && outside.get(Kind::Address, "10.0.0.1:0").is_none()
    );
}

#[test]
fn a_pod_without_an_address_is_a_problem_but_for_one_that_has_just_been_made() {
    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: one, namespace: a, annotations: {penstock.io/inject: enabled}}\n\
        spec: {containers: [{name: main}]}\nstatus: {phase: Pending}\n";
    assert_eq!(messages(&compiled(&read("pod.yaml", POD))), Vec::<String>::new());
    let running = messages(&compiled(&read("pod.yaml", &POD.replace("Pending", "Running"))));
    assert!(running.len() == 1 && running[0].contains("status.podIP"), "{running:?}");
}

/// A Service `digits` with one endpoint, and policies for it.
fn with_policy(annotations: &str, policies: &str) -> ObjectSet {
    let objects = format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: digits\n  annotations: {annotations}\nspec:\n  ports: [{{port: 80, targetPort: 8000}}]\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: digits-1\n  labels: {{kubernetes.io/service-name: digits}}\n\
         addressType: IPv4\nports: [{{port: 8000, protocol: TCP}}]\nendpoints:\n- addresses: [10.0.0.9]\n  targetRef: {{kind: Pod, name: digits-a}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: digits-a\n  annotations: {{penstock.io/inject: enabled}}\n\
         spec: {{serviceAccountName: digits, containers: [{{name: server}}]}}\nstatus: {{podIP: 10.0.0.9}}\n{policies}"
    );
    read("digits.yaml", &objects)
}

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: {name}}}\nspec:\n{spec}"
    )
}

const PREPARES: &str = "  targetRef: {kind: Service, name: digits}\n  batch: {max: 32, delay: 2ms}\n  coalesce: single-flight\n  \
                        models:\n  - name: digits\n    prepare:\n    - input: picture\n      tensor: image\n      shape: [64]\n      \
                        pipeline: {resize: {mode: exact, width: 8, height: 8}, colour: gray}\n";

#[test]
fn a_policy_says_what_annotations_do_and_how_inputs_are_prepared() {
    let snapshot = compiled(&with_policy("{}", &policy("digits", PREPARES)));
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    let Payload::Workload(workload) = get(&snapshot, Kind::Workload, "default/digits-a") else { panic!() };
    let [port] = &workload.ports[..] else { panic!("{workload:?}") };
    assert_eq!(port.batch.map(|batch| (batch.rows, batch.delay_ms)), Some((32, Some(2))));
    assert!(port.coalesce.as_ref().is_some_and(|coalesce| coalesce.single_flight));
    let [pipeline] = &port.pipelines[..] else { panic!("{port:?}") };
    let said = (&*pipeline.model, &*pipeline.input, &*pipeline.tensor, &pipeline.shape[..]);
    assert_eq!(said, ("digits", "picture", "image", &[64][..]));
    assert!(pipeline.declaration.contains(r#""colour":"gray""#), "{}", pipeline.declaration);
    // Clients need to know nothing of pipelines.
    let Payload::Service(service) = get(&snapshot, Kind::Service, "default/digits") else { panic!() };
    let clients = service.policy.unwrap();
    assert!(clients.batch.is_some() && clients.pipelines.is_empty());
}

#[test]
fn a_policy_that_makes_no_sense_is_told_with_its_line_and_changes_nothing() {
    let target = "  targetRef: {kind: Service, name: digits}\n";
    let pipeline = |pipeline: &str| {
        format!("{target}  models:\n  - name: m\n    prepare:\n    - input: x\n      pipeline: {pipeline}\n")
    };
    let both = |of_x: &str, of_y: &str| {
        let pipeline = "pipeline: {preset: imagenet}";
        format!(
            "{target}  models:\n  - name: m\n    prepare:\n    - {{input: x, {of_x}, {pipeline}}}\n    \
             - {{input: \"y\", {of_y}, {pipeline}}}\n"
        )
        .replace("input: \"y\", input: \"y\"", "input: \"y\"")
    };
    let table = [
        ("  targetRef: {kind: Deployment, name: digits}\n".to_owned(), "write `kind: Service`"),
        ("  targetRef: {kind: Service, name: digit}\n".to_owned(), "there is no Service digit"),
        (format!("{target}  batch: {{max: 0}}\n"), "from 1 to 65536"),
        (format!("{target}  batch: {{max: [1, {{}}]}}\n"), "is neither a text nor a number"),
        (format!("{target}  batches: {{max: 1}}\n"), "spec.batches: there is no such field"),
        (pipeline("{preset: imagnet}"), "unknown variant `imagnet`"),
        (pipeline("{preset: imagenet, cropp: {}}"), "unknown field `cropp`"),
        (pipeline("{resize: {mode: shortest-side, size: 256}}"), "add a crop"),
        (
            format!(
                "{}      shape: [63]\n",
                pipeline("{resize: {mode: exact, width: 8, height: 8}, colour: gray}")
            ),
            "[63] has not as many elements as [1, 8, 8]",
        ),
        (
            pipeline("{resize: {mode: exact, width: 8192, height: 8192}}"),
            "805306368 bytes, and those of a request have at most 268435456",
        ),
        (both("tensor: t", "tensor: t"), "\"t\" is made from another input already"),
        // `y` is made from what is sent as `x`, or from what is sent as `y`?
        (both("tensor: \"y\"", "input: \"y\""), "\"y\" is an input of its own"),
        (both("tensor: a", "tensor: \"x\""), "\"x\" is an input of its own"),
        (both("tensor: y", "tensor: b"), "quote it"),
    ];
    for (spec, words) in table {
        let snapshot = compiled(&with_policy("{}", &policy("p", &spec)));
        let messages = messages(&snapshot);
        let [message] = &messages[..] else { panic!("{spec}: {messages:?}") };
        assert!(message.contains(words), "{spec}: {message}");
        let line: usize = message.split(':').nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(line > 28, "{message}");
        let Payload::Workload(workload) = get(&snapshot, Kind::Workload, "default/digits-a") else {
            panic!()
        };
        assert!(
            workload.ports.iter().all(|port| port.pipelines.is_empty() && port.batch.is_none()),
            "{spec}"
        );
    }
}

#[test]
fn a_policy_wins_over_annotations_and_of_two_one_is_in_force() {
    let annotations = "{penstock.io/batch: max=8}";
    let snapshot = compiled(&with_policy(annotations, &policy("digits", PREPARES)));
    let told = messages(&snapshot);
    assert!(told.len() == 1 && told[0].contains("penstock.io/batch too, and this wins"), "{told:?}");
    let second = "  targetRef: {kind: Service, name: digits}\n  batch: max=4\n";
    let both = format!("{}{}", policy("digits", PREPARES), policy("other", second));
    let snapshot = compiled(&with_policy("{}", &both));
    let told = messages(&snapshot);
    assert!(
        told.len() == 1 && told[0].contains("has the policy InferencePolicy default/digits already"),
        "{told:?}"
    );
    let Payload::Workload(workload) = get(&snapshot, Kind::Workload, "default/digits-a") else { panic!() };
    assert_eq!(workload.ports[0].batch.unwrap().rows, 32);
}

/// What Flagger writes while a canary goes on (pkg/router/gateway_api.go of 1.36): with sessions that stay, with a mirror, by a header.
#[test]
fn each_route_that_flagger_writes_is_followed() {
    let backends = "
      - {group: '', kind: Service, name: m-primary, port: 80, weight: 90}
      - {group: '', kind: Service, name: m-canary, port: 80, weight: 10}";
    let route = |rules: &str| {
        let service = |name: &str| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: a}}\nspec: {{ports: [{{port: 80}}]}}\n---\n"
            )
        };
        let services = ["m", "m-primary", "m-canary"].map(service).concat();
        let parent = "parentRefs: [{group: '', kind: Service, name: m, port: 80}]";
        let head =
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: m, namespace: a}";
        let snapshot =
            compiled(&read("x.yaml", &format!("{services}{head}\nspec:\n  {parent}\n  rules:{rules}\n")));
        assert_eq!(messages(&snapshot), Vec::<String>::new());
        (routes(&snapshot, "a/m"), snapshot)
    };
    let everything = "{type: PathPrefix, value: /}";
    let first = |rule: &v1::Rule| format!("{:?}", rule.matches);

    let (rules, snapshot) = route(&format!(
        "
  - matches:
    - path: {everything}
      headers: [{{type: RegularExpression, name: Cookie, value: '.*flagger-cookie.*tVeqwmQzVe.*'}}]
    backendRefs:
      - {{group: '', kind: Service, name: m-primary, port: 80, weight: 0}}
      - {{group: '', kind: Service, name: m-canary, port: 80, weight: 100}}
  - matches: [{{path: {everything}}}]
    backendRefs:
      - {{group: '', kind: Service, name: m-primary, port: 80, weight: 90}}
      - {{group: '', kind: Service, name: m-canary, port: 80, weight: 10, filters: [
          {{type: ResponseHeaderModifier, responseHeaderModifier: {{add: [
            {{name: Set-Cookie, value: flagger-cookie=tVeqwmQzVe; Max-Age=60}}]}}}}]}}"
    ));
    assert!(first(&rules[0]).contains("cookie"), "who was with the candidate comes first: {rules:?}");
    assert_eq!(weights(&snapshot, &rules[0].weights), ["a/m-primary:80=0", "a/m-canary:80=100"]);
    assert_eq!(weights(&snapshot, &rules[1].weights), ["a/m-primary:80=90", "a/m-canary:80=10"]);
    let Payload::Weights(shared) = get(&snapshot, Kind::Weights, &rules[1].weights) else { panic!() };
    assert!(format!("{:?}", shared.backends[1].filters).contains("Max-Age=60"), "{shared:?}");

    // Mirrored before it is sent any, and the sign that a session stayed is taken away when all is over.
    let (rules, snapshot) = route(&format!(
        "
  - matches: [{{path: {everything}}}]
    filters:
      - {{type: RequestMirror, requestMirror: {{backendRef: {{group: '', kind: Service, name: m-canary, port: 80}}}}}}
      - {{type: ResponseHeaderModifier, responseHeaderModifier: {{add: [
          {{name: Set-Cookie, value: flagger-cookie=tVeqwmQzVe; Max-Age=-1}}]}}}}
    backendRefs:{backends}"
    ));
    assert!(format!("{:?}", rules[0].filters).contains("Max-Age=-1"), "{rules:?}");
    let Payload::Weights(copied) = get(&snapshot, Kind::Weights, &rules[0].weights) else { panic!() };
    assert_eq!((copied.mirrors.len(), copied.mirrors[0].service.as_str()), (1, "a/m-canary"), "{copied:?}");

    // By a header, and everybody else to primary.
    let (rules, snapshot) = route(&format!(
        "
  - matches: [{{path: {everything}, headers: [{{type: Exact, name: x-user, value: insider}}]}}]
    timeouts: {{request: 5s}}
    backendRefs:{backends}
  - matches: [{{path: {everything}}}]
    timeouts: {{request: 5s}}
    backendRefs: [{{group: '', kind: Service, name: m-primary, port: 80, weight: 100}}]"
    ));
    assert!(first(&rules[0]).contains("insider"), "{rules:?}");
    assert_eq!(weights(&snapshot, &rules[1].weights), ["a/m-primary:80=100"]);
}
