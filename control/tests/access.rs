//! From AccessPolicy objects to what each pod's proxy is told; what cannot be read fails safe.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, which clippy doesn't see as such")]

mod common;

use penstock_api::access::{Access, Facts, Http, Model};
use penstock_api::resource::{Kind, Payload};
use penstock_api::v1;
use penstock_control::compile::{State, compile};
use penstock_control::objects::ObjectSet;
use penstock_control::snapshot::Snapshot;

use common::{PODS, compiled, messages, read, trust, world};

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: AccessPolicy\nmetadata:\n  name: p\n  namespace: a\nspec:\n{spec}"
    )
}

fn access(snapshot: &Snapshot, pod: &str) -> v1::Access {
    let entry = snapshot.get(Kind::Access, pod).unwrap_or_else(|| panic!("nothing is said of {pod}"));
    match Payload::decode(Kind::Access, &entry.any.value).unwrap() {
        Payload::Access(access) => access,
        other => panic!("{other:?}"),
    }
}

/// Which of the pods digits-0 (ports 8000 and 9000), other and far may be called by the account `a/front`.
fn open(snapshot: &Snapshot) -> [bool; 4] {
    let front = "spiffe://cluster.local/ns/a/sa/front".parse().unwrap();
    [("a/digits-0", 8000), ("a/digits-0", 9000), ("a/other", 8000), ("b/far", 8000)].map(|(pod, port)| {
        let access = Access::compile(&access(snapshot, pod)).unwrap();
        access.decide(&Facts { client: Some(&front), port, http: None }).denied.is_none()
    })
}

#[test]
fn a_pod_of_the_mesh_is_told_of_its_policies_even_if_there_are_none() {
    let snapshot = compiled(&read("pods.yaml", PODS));
    for pod in ["a/digits-0", "a/other", "b/far"] {
        assert_eq!(access(&snapshot, pod).policies, []);
    }
    assert_eq!(open(&snapshot), [true; 4]);
}

#[test]
fn a_policy_is_about_the_workloads_of_its_targets_in_its_namespace() {
    let jobs = "  action: Allow\n  rules:\n  - from:\n    - serviceAccounts: [jobs]\n";
    let table = [
        ("", [false, false, false, true]),
        ("  targetRefs: [{kind: Service, name: digits}]\n", [false, true, true, true]),
        ("  selector: {matchLabels: {app: digits}}\n", [false, false, true, true]),
        ("  selector: {matchLabels: {app: digits, tier: cpu}}\n", [true, true, true, true]),
    ];
    for (targets, expected) in table {
        assert_eq!(
            open(&compiled(&world("policy.yaml", &policy(&format!("{targets}{jobs}"))))),
            expected,
            "{targets}"
        );
    }
    let front = policy(&format!(
        "  selector: {{matchLabels: {{app: digits}}}}\n{}",
        jobs.replace("[jobs]", "[front]")
    ));
    assert_eq!(open(&compiled(&world("policy.yaml", &front))), [true; 4]);
}

#[test]
fn a_change_of_a_policy_resends_nothing_else() {
    let allow = |who: &str| {
        compiled(&world(
            "policy.yaml",
            &policy(&format!("  action: Allow\n  rules: [{{from: [{{serviceAccounts: [{who}]}}]}}]\n")),
        ))
    };
    let (before, after) = (allow("x"), allow("y"));
    for kind in Kind::PUSH_ORDER {
        let same = before.all(kind).zip(after.all(kind)).all(|(a, b)| a == b);
        assert_eq!(same, kind != Kind::Access, "{kind:?}");
    }
    assert_eq!(before.get(Kind::Access, "b/far"), after.get(Kind::Access, "b/far"));
}

#[test]
fn a_policy_that_makes_no_sense_is_refused_with_its_line_and_fails_safe() {
    let of_digits = "  targetRefs: [{kind: Service, name: digits}]\n";
    let (only, all) = ([false, true, true, true], [false, false, false, true]);
    let table = [
        // Its targets can be read, so they alone are closed.
        (format!("{of_digits}  action: Deny\n"), 6, "it denies nothing", only),
        (format!("{of_digits}  action: Allow\n  rehearse: Deny\n"), 9, "only an Audit", only),
        (
            format!("{of_digits}  action: Allow\n  rules:\n  - to:\n    - paths:\n      - /a/*/b\n"),
            12,
            "\"/a/*/b\": write a path",
            only,
        ),
        (
            format!("{of_digits}  action: Deny\n  rules:\n  - from:\n    - identities: [web]\n"),
            11,
            "\"web\" is not an identity",
            only,
        ),
        (
            format!("{of_digits}  action: Deny\n  rules: [{{from: [{{namespaces: []}}]}}]\n"),
            9,
            "an empty list",
            only,
        ),
        (
            format!("{of_digits}  action: Allow\n  rules: [{{to: [{{ports: [0]}}]}}]\n"),
            9,
            "from 1 to 65535",
            only,
        ),
        (format!("{of_digits}  action: Allow\n  rules: [{{from: []}}]\n"), 9, "would be everybody", only),
        (format!("{of_digits}  action: Allow\n  rules: [{{from: [{{}}]}}]\n"), 9, "it says nothing", only),
        (format!("{of_digits}  action: Allow\n  rules: [{{to: []}}]\n"), 9, "would be everybody", only),
        // They cannot.
        (
            "  targetRefs: [{kind: Deployment, name: x}]\n  action: Allow\n".into(),
            7,
            "Deployment is no kind",
            all,
        ),
        (
            format!("{of_digits}  selector: {{matchLabels: {{}}}}\n  action: Allow\n"),
            8,
            "targetRefs too",
            all,
        ),
        (format!("{of_digits}  action: Refuse\n"), 8, "unknown variant `Refuse`", all),
        (format!("{of_digits}  action: Allow\n  rule: []\n"), 9, "there is no such field", all),
    ];
    for (spec, line, words, expected) in table {
        let snapshot = compiled(&world("policy.yaml", &policy(&spec)));
        let said = messages(&snapshot);
        assert!(said.iter().any(|said| said.contains(words)), "{spec}: {said:?}");
        let at = snapshot.problems.iter().find(|problem| problem.message.contains(words)).unwrap().line;
        assert_eq!(at, line, "{spec}: {said:?}");
        assert_eq!(open(&snapshot), expected, "{spec}: {said:?}");
        let told = access(&snapshot, "a/digits-0").policies;
        assert!(told[0].unreadable.starts_with("policy.yaml:"), "{told:?}");
    }
    // An Audit changes nothing, whatever is wrong with it.
    let audit = compiled(&world(
        "policy.yaml",
        &policy(&format!("{of_digits}  action: Audit\n  rules: [{{to: [{{paths: [x]}}]}}]\n")),
    ));
    assert_eq!((open(&audit), messages(&audit).len()), ([true; 4], 1));
}

#[test]
fn a_policy_that_loses_its_sense_leaves_its_last_good_version_in_force() {
    let good = policy(
        "  selector: {matchLabels: {app: digits}}\n  action: Deny\n  rules: [{from: [{serviceAccounts: [jobs]}]}]\n",
    );
    let (first, state) = compile(&world("policy.yaml", &good), &State::default(), &trust());
    assert_eq!(open(&first), [true; 4]);
    for bad in [good.replace("[jobs]", "['']"), good.replace("Deny", "Denied"), "a: [".to_owned()] {
        let (snapshot, state) = compile(&world("policy.yaml", &bad), &state, &trust());
        assert_eq!(access(&snapshot, "a/digits-0"), access(&first, "a/digits-0"), "{bad}");
        assert!(
            snapshot.problems.iter().any(|problem| problem.last_good_in_force),
            "{:?}",
            snapshot.problems
        );
        // And goes when it is deleted.
        let (snapshot, _) = compile(&world("policy.yaml", ""), &state, &trust());
        assert_eq!(access(&snapshot, "a/digits-0").policies, []);
    }
}

#[test]
fn what_protects_nothing_is_told() {
    let table = [
        ("  targetRefs: [{kind: Service, name: digit}]\n", "there is no Service digit in a"),
        ("  selector: {matchLabels: {app: digit}}\n", "no workload of the mesh"),
    ];
    for (targets, words) in table {
        let snapshot = compiled(&world("policy.yaml", &policy(&format!("{targets}  action: Allow\n"))));
        assert!(messages(&snapshot).iter().any(|said| said.contains(words)), "{:?}", messages(&snapshot));
        assert_eq!(open(&snapshot), [true; 4]);
    }
}

#[test]
fn declared_ports_that_an_allow_leaves_open_are_told() {
    let of_digits = "  targetRefs: [{kind: Service, name: digits}]\n";
    let more = "---\napiVersion: penstock.io/v1alpha1\nkind: AccessPolicy\nmetadata: {name: q, namespace: a}\nspec: {action: Allow, \
                selector: {matchLabels: {tier: gpu}}}\n";
    let table = [
        (policy(&format!("{of_digits}  action: Allow\n")), true),
        (policy(&format!("{of_digits}  action: Deny\n  rules: [{{}}]\n")), false),
        (policy("  selector: {matchLabels: {app: digits}}\n  action: Allow\n"), false),
        (policy(&format!("{of_digits}  action: Allow\n{more}")), false),
    ];
    for (policy, expected) in table {
        let told = messages(&compiled(&world("policy.yaml", &policy)));
        let said = told
            .iter()
            .any(|said| said.contains("Pod a/digits-0 declares 9000 too, which no Allow is about"));
        assert_eq!((said, told.len()), (expected, usize::from(expected)), "{policy}: {told:?}");
    }
}

#[test]
fn a_header_that_is_never_there_is_told() {
    for (name, expected) in [
        ("Host", false),
        ("x-team", false),
        ("penstock-session", false),
        ("penstock-client-id", false),
        ("TE", true),
        ("penstock-protocol", true),
    ] {
        let rules = format!("  action: Deny\n  rules: [{{when: {{headers: [{{name: {name}}}]}}}}]\n");
        let told = messages(&compiled(&world("policy.yaml", &policy(&rules))));
        assert_eq!(told.iter().any(|said| said.contains("never comes so far")), expected, "{name}: {told:?}");
    }
}

#[test]
fn a_workload_says_what_the_kubelet_asks_for() {
    const POD: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: a, annotations: {penstock.io/inject: enabled, penstock.io/forward-identity: 'true'}}
spec:
  containers:
  - name: main
    ports: [{name: rest, containerPort: 8000}]
    readinessProbe: {httpGet: {port: rest, path: '/v2/health/ready?x=1'}}
    livenessProbe: {httpGet: {port: 8080}}
    startupProbe: {httpGet: {port: 8443, path: /s, scheme: HTTPS}}
  - name: helper
    readinessProbe: {httpGet: {port: 8000, path: ready}}
    livenessProbe: {tcpSocket: {port: 8000}}
    startupProbe: {httpGet: {port: nothing, path: /x}}
    lifecycle: {postStart: {httpGet: {port: 8000, path: /warm}}, preStop: {exec: {command: [x]}}}
  - name: calls
    readinessProbe: {grpc: {port: 8001, service: live}}
    livenessProbe: {grpc: {port: 8001}}
status: {podIP: 10.0.0.1}
";
    let snapshot = compiled(&read("pod.yaml", POD));
    let told = messages(&snapshot);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        told[0].starts_with("pod.yaml:10 ")
            && told[0].contains("an HTTPS request of the kubelet to port 8443"),
        "{told:?}"
    );
    assert!(
        told[1].starts_with("pod.yaml:13 ") && told[1].contains("a tcpSocket probe of port 8000"),
        "{told:?}"
    );
    let entry = snapshot.get(Kind::Workload, "a/p").unwrap();
    let Payload::Workload(workload) = Payload::decode(Kind::Workload, &entry.any.value).unwrap() else {
        panic!()
    };
    let probes: Vec<_> =
        workload.probes.iter().map(|probe| (probe.port, &*probe.path, &*probe.application)).collect();
    assert_eq!(
        probes,
        [
            (8000, "/ready", "10.0.0.1:8000"),
            (8000, "/v2/health/ready?x=1", "10.0.0.1:8000"),
            (8000, "/warm", "10.0.0.1:8000"),
            (8080, "/", "10.0.0.1:8080"),
        ]
    );
    let calls: Vec<_> =
        workload.grpc_probes.iter().map(|probe| (probe.port, &*probe.service, &*probe.application)).collect();
    assert_eq!(calls, [(8001, "", "10.0.0.1:8001"), (8001, "live", "10.0.0.1:8001")]);
    assert!(workload.forward_identity);
    assert_eq!(workload.ports.len(), 1, "a port that only a probe knows is nobody else's");
}

#[test]
fn the_example_is_right_and_says_what_its_comments_say() {
    let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/examples");
    let mut set = ObjectSet::default();
    for folder in ["access", "digits"] {
        let more = penstock_control::source::directory::read(&examples.join(folder));
        set.objects.extend(more.objects);
        set.broken.extend(more.broken);
    }
    let snapshot = compiled(&set);
    assert_eq!(messages(&snapshot), Vec::<String>::new());
    let access = Access::compile(&access(&snapshot, "demo/digits-v1-a")).unwrap();
    let names: Vec<_> = access.policies().iter().map(|policy| &*policy.name).collect();
    assert_eq!(names, ["demo/digits-callers", "demo/no-repository", "demo/only-tenants"]);
    let headers = http::HeaderMap::new();
    let decide = |who: &str, method, path, model| {
        let id = format!("spiffe://cluster.local/ns/{who}").parse().unwrap();
        let http = Http { method, path, model, headers: &headers };
        let decision = access.decide(&Facts { client: Some(&id), port: 8000, http: Some(http) });
        (decision.denied.is_none(), decision.would_deny.is_some())
    };
    let infer = "/v2/models/digits/infer";
    let digits = Model::Named("digits");
    assert_eq!(decide("demo/sa/client", "POST", infer, digits), (true, true), "no tenant was named");
    assert!(decide("batch-jobs/sa/nightly", "POST", infer, digits).0);
    assert!(!decide("batch-jobs/sa/experiments", "POST", infer, digits).0);
    assert!(!decide("demo/sa/client", "POST", "/v2/models/faces/infer", Model::Named("faces")).0);
    assert!(decide("batch-jobs/sa/experiments", "GET", "/v2/health/ready", Model::None).0);
    assert!(!decide("demo/sa/client", "GET", "/v2/repository/index", Model::None).0);
}

/// What a policy of one Service protects while the Service comes and goes.
#[test]
fn a_service_that_is_deleted_or_renamed_takes_no_protection_with_it() {
    let protects = policy(
        "  targetRefs: [{kind: Service, name: digits}]\n  action: Allow\n  rules: [{from: [{serviceAccounts: [jobs]}]}]\n",
    );
    let (_, pods) = PODS.split_once("---\n").unwrap();
    let renamed = PODS.replace(
        "name: digits, namespace: a}\nspec:\n  selector",
        "name: numbers, namespace: a}\nspec:\n  selector",
    );
    assert!(renamed != PODS);
    let sees = |pods: &str, policy: &str, before: &State| {
        let mut set = read("pods.yaml", pods);
        set.objects.extend(read("policy.yaml", policy).objects);
        compile(&set, before, &trust())
    };
    let guarded = [false, true, true, true];
    let (snapshot, there) = sees(PODS, &protects, &State::default());
    let told = messages(&snapshot);
    assert_eq!((open(&snapshot), told.len()), (guarded, 1), "{told:?}");
    assert!(told[0].contains("declares 9000 too"), "{told:?}");
    for without in [pods, &renamed] {
        let (snapshot, gone) = sees(without, &protects, &there);
        assert_eq!(open(&snapshot), guarded);
        let told = messages(&snapshot);
        assert!(
            told.len() == 2
                && told
                    .iter()
                    .any(|told| told.contains("policy.yaml:7 ")
                        && told.contains("no Service a/digits any more")),
            "{told:?}"
        );
        // A pod that comes later and has its labels is protected too.
        let more = without
            .replace("name: other, namespace: a,", "name: other, namespace: a, labels: {app: digits},");
        let more = more.replace(
            "ports: [{containerPort: 8000}]}]}\nstatus: {podIP: 10.0.0.2}",
            "ports: [{name: rest, containerPort: 8000}]}]}\nstatus: {podIP: 10.0.0.2}",
        );
        let (snapshot, still) = sees(&more, &protects, &gone);
        assert_eq!(open(&snapshot), [false, true, false, true]);
        // It ends with the policy, or with one that names something else.
        let (snapshot, forgotten) = sees(without, "", &still);
        assert_eq!(open(&snapshot), [true; 4]);
        let (snapshot, _) = sees(without, &protects, &forgotten);
        assert_eq!(
            open(&snapshot),
            [true; 4],
            "nothing is known of a Service that no policy named when it was there"
        );
        let elsewhere = protects.replace("name: digits}", "name: numbers}");
        assert_eq!(open(&sees(&renamed, &elsewhere, &gone).0), guarded);
    }
}

#[test]
fn a_port_that_is_reached_past_the_proxy_is_called_without_an_identity_and_a_policy_says_that_it_does_not_hold_there()
 {
    let skip = PODS.replace(
        "tier: gpu}, annotations: {penstock.io/inject: enabled",
        "tier: gpu}, annotations: {penstock.io/skip-inbound-ports: '9000-9010,7', penstock.io/inject: enabled",
    );
    assert!(skip != PODS);
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: both, namespace: a}\nspec:\n  \
        ports: [{name: rest, port: 80, targetPort: rest}, {name: admin, port: 90, targetPort: admin}]\n---\n\
        apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
        metadata: {name: both-1, namespace: a, labels: {kubernetes.io/service-name: both}}\naddressType: IPv4\n\
        ports: [{name: rest, port: 8000}, {name: admin, port: 9000}]\n\
        endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: digits-0}}]\n";
    let mut set = read("pods.yaml", &format!("{skip}{service}"));
    set.objects.extend(read("policy.yaml", &policy("  selector: {matchLabels: {tier: gpu}}\n  action: Deny\n  rules: [{to: [{ports: [9000]}]}]\n")).objects);
    let snapshot = compiled(&set);
    let Payload::Endpoints(endpoints) =
        Payload::decode(Kind::Endpoints, &snapshot.get(Kind::Endpoints, "a/both").unwrap().any.value)
            .unwrap()
    else {
        panic!("no endpoints")
    };
    let mut found: Vec<_> = endpoints
        .endpoints
        .iter()
        .map(|endpoint| {
            (endpoint.ports.iter().map(|port| port.port).collect::<Vec<_>>(), endpoint.identity.as_str())
        })
        .collect();
    found.sort();
    let identity = "spiffe://cluster.local/ns/a/sa/default";
    assert_eq!(found, [(vec![8000], identity), (vec![9000], "")]);
    for (port, expected) in [(8000, identity), (9000, ""), (0, identity)] {
        let entry = snapshot.get(Kind::Address, &format!("10.0.0.1:{port}")).unwrap();
        let Payload::Address(address) = Payload::decode(Kind::Address, &entry.any.value).unwrap() else {
            panic!("no address")
        };
        let Some(v1::address::Target::Endpoint(endpoint)) = address.target else { panic!("{address:?}") };
        assert_eq!(endpoint.identity, expected, "{port}");
    }
    // The policy names its port in a rule, so nobody can say that it is about that one alone; a Service's port can be told.
    let named = policy("  targetRefs: [{kind: Service, name: both}]\n  action: Deny\n  rules: [{}]\n");
    let mut set = read("pods.yaml", &format!("{skip}{service}"));
    set.objects.extend(read("policy.yaml", &named).objects);
    let told = messages(&compiled(&set));
    assert!(
        told.iter().any(|told| told.contains("port 9000 of Pod a/digits-0 is reached past its proxy")),
        "{told:?}"
    );
    assert!(!told.iter().any(|told| told.contains("port 8000")), "{told:?}");
}
