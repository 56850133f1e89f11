//! What the checks of a cluster say of given facts, one table a module of rules.

use serde_json::{Value, json};

use super::facts::{Fact, Facts};
use super::{Check, Rule, Verdict, before, installed, judged, workloads};
use crate::cluster::Answer;

pub(super) fn found(value: Value) -> Answer {
    Answer::Found(value)
}

fn node(version: &str, kernel: &str, ready: &str) -> Value {
    json!({
        "metadata": {"name": "n"},
        "status": {
            "conditions": [{"type": "Ready", "status": ready}],
            "nodeInfo": {
                "kubeletVersion": version, "kernelVersion": kernel, "operatingSystem": "linux", "architecture": "amd64",
            },
        },
    })
}

fn namespace(name: &str, labels: Value) -> Value {
    json!({"metadata": {"name": name, "labels": labels}, "status": {"phase": "Active"}})
}

/// A pod of `team-a`, with this merged in.
fn pod(labels: Value, spec: Value, status: Value) -> Value {
    json!({
        "metadata": {
            "name": "p", "namespace": "team-a", "labels": labels, "annotations": {"penstock.io/injected-by": env!("CARGO_PKG_VERSION")},
        },
        "spec": spec, "status": status,
    })
}

/// A pod of a Deployment in a namespace that asks for nothing.
fn elsewhere(annotations: Value) -> Value {
    json!({
        "metadata": {
            "name": "p", "namespace": "team-b", "annotations": annotations,
            "ownerReferences": [{"kind": "ReplicaSet", "name": "web-5d", "controller": true}],
        },
        "spec": {}, "status": {"phase": "Running"},
    })
}

fn injected(status: Value) -> Value {
    let spec = json!({"serviceAccountName": "x", "initContainers": [{"name": "penstock-init"}, {"name": "penstock-proxy"}]});
    pod(json!({"penstock.io/injected": "true"}), spec, status)
}

/// A cluster on which everything before installing is as it should be.
pub(super) fn empty() -> Facts {
    let group = |name: &str| json!({"name": name, "versions": [{"version": "v1"}]});
    let groups = [
        "admissionregistration.k8s.io",
        "authentication.k8s.io",
        "apiextensions.k8s.io",
        "discovery.k8s.io",
        "coordination.k8s.io",
    ];
    let mut facts = Facts::default()
        .with(Fact::Version, found(json!({"gitVersion": "v1.34.4"})))
        .with(Fact::Groups, found(json!({"groups": groups.map(group)})))
        .list(Fact::Nodes, json!([node("v1.34.4", "6.1.0", "True"), node("v1.29.0", "5.15.0-aws", "True")]))
        .list(Fact::Namespaces, json!([namespace("team-a", json!({"penstock.io/inject": "enabled"}))]))
        .list(Fact::Pods, json!([]))
        .list(Fact::Webhooks, json!([]))
        .list(Fact::Definitions, json!([]))
        .with(Fact::PriorityClass, found(json!({})))
        .with(Fact::Kubernetes, found(json!({"spec": {"clusterIPs": ["10.96.0.1"]}})));
    facts.rights = vec![("deployments.apps".to_owned(), true)];
    facts.ahead = Some(1.0);
    facts
}

fn of<'a>(checks: &'a [Check], name: &str) -> &'a Check {
    checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no check {name}"))
}

pub(super) fn wrong(checks: &[Check]) -> Vec<(&'static str, Verdict)> {
    checks
        .iter()
        .filter(|check| check.verdict != Verdict::Ok)
        .map(|check| (check.name, check.verdict))
        .collect()
}

/// Each row: what is other than it should be, and the one check that says so.
pub(super) fn table(good: &Facts, rules: &[&[Rule]], rows: Vec<(Facts, &str, Verdict, &str)>) {
    let fine = judged(good, rules);
    assert_eq!(wrong(&fine), [], "{fine:#?}");
    for (facts, name, verdict, told) in rows {
        let checks = judged(&facts, rules);
        let check = of(&checks, name);
        let text = format!("{} {:?}", check.found, check.details);
        assert!(check.verdict == verdict && text.contains(told), "{name}: {check:#?}");
        assert!(
            check.fix.contains("kubectl") || check.fix.contains("timedatectl"),
            "{name} has no command: {}",
            check.fix
        );
        assert!(!check.why.is_empty(), "{name} does not say why");
    }
}

#[test]
fn there_are_as_many_checks_as_the_docs_say_and_each_has_a_name_of_its_own() {
    let names = |rules: &[Rule]| -> Vec<&str> { rules.iter().map(|rule| rule(&empty()).name).collect() };
    for list in [
        names(&before::ALL),
        [names(&before::STAYING), names(&installed::ALL), names(&workloads::ALL)].concat(),
    ] {
        let mut unique = list.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), list.len(), "{list:?}");
    }
    let installed = before::STAYING.len() + installed::ALL.len() + workloads::ALL.len();
    let told = format!("`penstock check --pre` has {}, `penstock check` {installed},", before::ALL.len());
    assert!(include_str!("../../../../docs/KUBERNETES.md").contains(&told), "docs/KUBERNETES.md: {told}");
}

#[test]
fn before_installing_each_thing_that_is_in_the_way_is_named() {
    use Verdict::{Problem, Warning};
    let mut late = empty();
    late.ahead = Some(-120.0);
    let mut nobody = empty();
    nobody.rights = vec![("clusterroles.rbac.authorization.k8s.io".to_owned(), false)];
    let label = |labels: Value| empty().list(Fact::Namespaces, json!([namespace("team-a", labels)]));
    let hook = |selector: Value, policy: &str| {
        empty().list(
            Fact::Webhooks,
            json!([{"metadata": {"name": "other"}, "webhooks": [{
                "name": "h", "failurePolicy": policy, "namespaceSelector": selector, "rules": [{"resources": ["pods"]}],
            }]}]),
        )
    };
    let mut windows = node("v1.34.4", "10.0.20348", "True");
    windows["status"]["nodeInfo"]["operatingSystem"] = json!("windows");
    let terminating = json!({"metadata": {"name": "penstock-system"}, "status": {"phase": "Terminating"}});
    table(
        &empty(),
        &[&before::ALL],
        vec![
            (empty().with(Fact::Version, found(json!({"gitVersion": "v1.28.9-gke.1"}))), "Kubernetes", Problem, "1.29 is needed"),
            (late, "clocks", Warning, "120 s behind"),
            (empty().with(Fact::Groups, found(json!({"groups": []}))), "admission", Problem, "not served"),
            (empty().with(Fact::Groups, found(json!({"groups": []}))), "token reviews", Problem, "not served"),
            (empty().with(Fact::Groups, Answer::Denied("no".to_owned())), "leases", Warning, "not known: no"),
            (nobody, "rights to install", Problem, "create clusterroles"),
            (empty().list(Fact::Nodes, json!([])), "nodes", Problem, "none is ready"),
            (empty().list(Fact::Nodes, json!([node("v1.34.4", "6.1", "True"), node("v1.34.4", "6.1", "False")])), "nodes", Warning, "1 of 2"),
            (empty().list(Fact::Nodes, json!([node("v1.28.0", "6.1", "True")])), "kubelets", Problem, "v1.28.0"),
            (empty().list(Fact::Nodes, json!([node("v1.34.0", "4.15.0-x", "True")])), "kernels", Warning, "4.15.0-x"),
            (empty().list(Fact::Nodes, json!([windows])), "systems of nodes", Warning, "windows/amd64"),
            (empty().list(Fact::Nodes, json!([node("v1.34.0", "6.1", "True")])), "room for two replicas", Warning, "1 node takes"),
            (empty().with(Fact::PriorityClass, Answer::Absent), "priority class", Problem, "no system-cluster-critical"),
            (empty().with(Fact::Kubernetes, found(json!({"spec": {"clusterIPs": ["fd00::1"]}}))), "IP families", Problem, "IPv6 alone"),
            (label(json!({"penstock.io/inject": "enabled", "istio-injection": "enabled"})), "other meshes", Problem, "namespace team-a"),
            (hook(json!({}), "Fail"), "other injectors", Warning, "other: h"),
            (empty().list(Fact::Pods, json!([pod(json!({"k8s-app": "cilium"}), json!({}), json!({}))])), "load balancing in sockets", Warning, "Cilium"),
            (
                empty().list(Fact::Definitions, json!([{"metadata": {"name": "x"}, "spec": {"group": "penstock.io"}, "status": {"storedVersions": ["v2"]}}])),
                "definitions that are there", Problem, "x",
            ),
            (empty().list(Fact::Namespaces, json!([terminating])), "penstock-system", Problem, "being deleted"),
            (empty().list(Fact::Webhooks, json!([{"metadata": {"name": "penstock-injector"}}])), "leftovers", Problem, "no control is there"),
            (
                label(json!({"penstock.io/inject": "enabled", "pod-security.kubernetes.io/enforce": "baseline"})),
                "pod security", Problem, "team-a: baseline",
            ),
            (empty().list(Fact::Pods, json!([pod(json!({}), json!({"hostNetwork": true}), json!({}))])), "host network", Warning, "team-a/p"),
        ],
    );
    // A webhook that exempts somebody, or does no harm when it is away, is nobody's business.
    for fine in [hook(json!({"matchLabels": {"a": "b"}}), "Fail"), hook(json!({}), "Ignore")] {
        assert_eq!(wrong(&judged(&fine, &[&before::ALL])), []);
    }
}

#[test]
fn an_api_server_that_does_not_answer_is_the_only_thing_said() {
    let facts = Facts::default().with(Fact::Version, Answer::Failed("connection refused".to_owned()));
    let checks = judged(&facts, &[&before::ALL]);
    assert_eq!(wrong(&checks), [("Kubernetes", Verdict::Problem)]);
    assert!(checks.len() == 1 && checks[0].found.contains("connection refused"), "{checks:?}");
}

#[test]
fn of_workloads_each_thing_that_is_wrong_is_named() {
    use Verdict::{Problem, Warning};
    let ready = json!({"initContainerStatuses": [{"name": "penstock-proxy", "ready": true}, {"name": "penstock-init", "ready": true}]});
    let pods = |pod: Value| empty().list(Fact::Pods, json!([pod]));
    let good =
        pods(injected(ready)).list(Fact::Events, json!([])).with(Fact::Injection, found(injected(json!({}))));
    let with = |pod: Value| good.clone().list(Fact::Pods, json!([pod]));
    let status = |proxy: Value, init: Value| {
        let mut statuses = [
            json!({"name": "penstock-proxy", "ready": true}),
            json!({"name": "penstock-init", "ready": true}),
        ];
        for (of, more) in statuses.iter_mut().zip([proxy, init]) {
            of.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        }
        with(injected(json!({"initContainerStatuses": statuses})))
    };
    let mut old = injected(json!({}));
    old["metadata"]["annotations"]["penstock.io/injected-by"] = json!("7.1.0");
    let mut shared = injected(json!({}));
    shared["spec"]["serviceAccountName"] = json!("default");
    let condition =
        |kind: &str| json!([{"type": kind, "status": "False", "reason": "Why", "message": "because"}]);
    let policy = |kind: &str| {
        let policy = json!({"kind": "AccessPolicy", "metadata": {"name": "a", "namespace": "b"}, "status": {"conditions": condition(kind)}});
        good.clone().list(Fact::AccessPolicies, json!([policy]))
    };
    let canary = |kind: &str| {
        let canary = json!({"kind": "Canary", "metadata": {"name": "a", "namespace": "b"}, "status": {"conditions": condition(kind)}});
        good.clone().list(Fact::Canaries, json!([canary]))
    };
    let route = json!([{"metadata": {"name": "r", "namespace": "b"}, "status": {"parents": [
        {"controllerName": "other", "conditions": condition("Accepted")},
        {"controllerName": "penstock.io/control", "conditions": condition("ResolvedRefs")},
    ]}}]);
    let none = json!({});
    let rows = vec![
        (
            good.clone().with(Fact::Injection, Answer::Failed("failed calling webhook".to_owned())),
            "injection",
            Problem,
            "failed calling",
        ),
        (good.clone().with(Fact::Injection, found(json!({"spec": {}}))), "injection", Problem, "no sidecar"),
        (
            with(pod(json!({}), json!({}), json!({"phase": "Running"}))),
            "pods without sidecars",
            Problem,
            "team-a/p: its namespace asks",
        ),
        (
            with(pod(json!({"penstock.io/inject": "enabled"}), json!({}), json!({"phase": "Running"}))),
            "pods without sidecars",
            Problem,
            "team-a/p: it has the label",
        ),
        (
            with(elsewhere(json!({"penstock.io/inject": "enabled"}))),
            "pods without sidecars",
            Problem,
            "team-b/p (ReplicaSet web-5d): it asks by its annotation",
        ),
        (
            good.clone().list(
                Fact::Events,
                json!([{"regarding": {"namespace": "a", "name": "b"}, "note": "hostNetwork"}]),
            ),
            "told not to be injected",
            Warning,
            "a/b: hostNetwork",
        ),
        (with(old), "versions of sidecars", Warning, "7.1.0"),
        (
            status(
                json!({"ready": false, "state": {"waiting": {"reason": "ImagePullBackOff"}}}),
                none.clone(),
            ),
            "sidecars ready",
            Problem,
            "ImagePullBackOff",
        ),
        (
            status(
                json!({"restartCount": 3, "lastState": {"terminated": {"reason": "OOMKilled"}}}),
                none.clone(),
            ),
            "sidecars started anew",
            Warning,
            "3 times, last OOMKilled",
        ),
        (
            status(none.clone(), json!({"ready": false, "lastState": {"terminated": {"exitCode": 1}}})),
            "redirect",
            Problem,
            "exit status 1",
        ),
        (with(shared), "identities", Warning, "team-a/p"),
        (good.clone().list(Fact::Routes, route.clone()), "routes", Problem, "b/r: Why: because"),
        (good.clone().list(Fact::Pools, route), "routes", Problem, "b/r: Why: because"),
        (policy("Accepted"), "policies", Problem, "AccessPolicy b/a: Why: because"),
        (policy("Programmed"), "policies in force", Warning, "AccessPolicy b/a"),
        (canary("Accepted"), "policies", Problem, "Canary b/a: Why: because"),
        (canary("Programmed"), "policies in force", Warning, "Canary b/a"),
    ];
    table(&good, &[&workloads::ALL], rows);
    // Who says no, who has ended, who is on the node's network and who is elsewhere asks for nothing.
    for fine in [
        elsewhere(json!({})),
        elsewhere(json!({"penstock.io/inject": "disabled"})),
        pod(json!({"penstock.io/inject": "disabled"}), none.clone(), none.clone()),
        pod(none.clone(), none.clone(), json!({"phase": "Succeeded"})),
        pod(none.clone(), json!({"hostNetwork": true}), none),
    ] {
        assert_eq!(wrong(&judged(&with(fine), &[&workloads::ALL])), []);
    }
}
