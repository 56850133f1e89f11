//! From AccessPolicy objects to what each pod's proxy is told; what cannot be read fails safe.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, which clippy doesn't see as such")]

mod common;

use penstock_api::access::{Access, Facts, Http, Model};
use penstock_api::resource::{Kind, Payload};
use penstock_api::v1;
use penstock_control::compile::{State, compile};
use penstock_control::objects::ObjectSet;
use penstock_control::snapshot::Snapshot;

use common::{compiled, messages, read, trust};

const PODS: &str = "\
apiVersion: v1
kind: Service
metadata: {name: digits, namespace: a}
spec:
  selector: {app: digits}
  ports: [{name: rest, port: 80, targetPort: rest}]
---
apiVersion: v1
kind: Pod
metadata: {name: digits-0, namespace: a, labels: {app: digits, tier: gpu}, annotations: {penstock.io/inject: enabled}}
spec: {containers: [{name: main, ports: [{name: rest, containerPort: 8000}, {name: admin, containerPort: 9000}]}]}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: a, annotations: {penstock.io/inject: enabled}}
spec: {containers: [{name: main, ports: [{containerPort: 8000}]}]}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: b, labels: {app: digits}, annotations: {penstock.io/inject: enabled}}
spec: {containers: [{name: main, ports: [{containerPort: 8000}]}]}
status: {podIP: 10.0.0.3}
";

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: AccessPolicy\nmetadata:\n  name: p\n  namespace: a\nspec:\n{spec}"
    )
}

fn world(policy: &str) -> ObjectSet {
    let mut set = read("pods.yaml", PODS);
    let more = read("policy.yaml", policy);
    set.objects.extend(more.objects);
    set.broken.extend(more.broken);
    set
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
        assert_eq!(open(&compiled(&world(&policy(&format!("{targets}{jobs}"))))), expected, "{targets}");
    }
    let front = policy(&format!(
        "  selector: {{matchLabels: {{app: digits}}}}\n{}",
        jobs.replace("[jobs]", "[front]")
    ));
    assert_eq!(open(&compiled(&world(&front))), [true; 4]);
}

#[test]
fn a_change_of_a_policy_resends_nothing_else() {
    let allow = |who: &str| {
        compiled(&world(&policy(&format!(
            "  action: Allow\n  rules: [{{from: [{{serviceAccounts: [{who}]}}]}}]\n"
        ))))
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
        let snapshot = compiled(&world(&policy(&spec)));
        let said = messages(&snapshot);
        assert!(said.iter().any(|said| said.contains(words)), "{spec}: {said:?}");
        let at = snapshot.problems.iter().find(|problem| problem.message.contains(words)).unwrap().line;
        assert_eq!(at, line, "{spec}: {said:?}");
        assert_eq!(open(&snapshot), expected, "{spec}: {said:?}");
        let told = access(&snapshot, "a/digits-0").policies;
        assert!(told[0].unreadable.starts_with("policy.yaml:"), "{told:?}");
    }
    // An Audit changes nothing, whatever is wrong with it.
    let audit = compiled(&world(&policy(&format!(
        "{of_digits}  action: Audit\n  rules: [{{to: [{{paths: [x]}}]}}]\n"
    ))));
    assert_eq!((open(&audit), messages(&audit).len()), ([true; 4], 1));
}

#[test]
fn a_policy_that_loses_its_sense_leaves_its_last_good_version_in_force() {
    let good = policy(
        "  selector: {matchLabels: {app: digits}}\n  action: Deny\n  rules: [{from: [{serviceAccounts: [jobs]}]}]\n",
    );
    let (first, state) = compile(&world(&good), &State::default(), &trust());
    assert_eq!(open(&first), [true; 4]);
    for bad in [good.replace("[jobs]", "['']"), good.replace("Deny", "Denied"), "a: [".to_owned()] {
        let (snapshot, state) = compile(&world(&bad), &state, &trust());
        assert_eq!(access(&snapshot, "a/digits-0"), access(&first, "a/digits-0"), "{bad}");
        assert!(
            snapshot.problems.iter().any(|problem| problem.last_good_in_force),
            "{:?}",
            snapshot.problems
        );
        // And goes when it is deleted.
        let (snapshot, _) = compile(&world(""), &state, &trust());
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
        let snapshot = compiled(&world(&policy(&format!("{targets}  action: Allow\n"))));
        assert!(messages(&snapshot).iter().any(|said| said.contains(words)), "{:?}", messages(&snapshot));
        assert_eq!(open(&snapshot), [true; 4]);
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
status: {podIP: 10.0.0.1}
";
    let snapshot = compiled(&read("pod.yaml", POD));
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
            (8080, "/", "10.0.0.1:8080"),
        ]
    );
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
