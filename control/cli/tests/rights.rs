//! Control may do what it does and nothing else: each verb in the roles of `manifests/install` is in the table below with its reason,
//! and the other way round. What is watched comes from the code that watches it.

#![allow(clippy::unwrap_used, missing_docs, reason = "what fails here fails the test")]

use std::collections::BTreeSet;
use std::path::Path;

use penstock_control::source::kubernetes::WATCHED;
use serde_json::Value;

/// Verb, API group, resource, the one name that it is for, and who needs it.
type Right = (&'static str, &'static str, &'static str, &'static str, &'static str);

/// In all namespaces, besides what is watched.
const EVERYWHERE: [Right; 17] = [
    ("get", "", "namespaces", "", "whether a pod that is made now is injected"),
    ("list", "", "namespaces", "", "whose pods are injected, and where trust anchors are wanted"),
    ("watch", "", "namespaces", "", "whose pods are injected, and where trust anchors are wanted"),
    ("patch", "", "pods/status", "", "cluster::gates: whether a Canary lets a pod serve"),
    ("patch", "gateway.networking.k8s.io", "grpcroutes/status", "", "whether a route is accepted"),
    ("patch", "gateway.networking.k8s.io", "httproutes/status", "", "whether a route is accepted"),
    ("patch", "inference.networking.k8s.io", "inferencepools/status", "", "whether a pool is reached"),
    ("patch", "penstock.io", "accesspolicies/status", "", "whether a policy is accepted"),
    ("patch", "penstock.io", "canaries/status", "", "how far a canary is"),
    ("patch", "penstock.io", "inferencepolicies/status", "", "whether a policy is accepted"),
    ("patch", "penstock.io", "ratelimits/status", "", "whether a limit is accepted"),
    ("create", "events.k8s.io", "events", "", "that a pod was not injected, why an object is refused"),
    ("create", "authentication.k8s.io", "tokenreviews", "", "identity::review"),
    ("create", "", "configmaps", "", "trust anchors; `create` cannot be held to a name"),
    ("patch", "", "configmaps", "penstock-anchors", "trust anchors: cluster::anchors applies them"),
    (
        "get",
        "admissionregistration.k8s.io",
        "mutatingwebhookconfigurations",
        "penstock-injector",
        "its caBundle",
    ),
    (
        "patch",
        "admissionregistration.k8s.io",
        "mutatingwebhookconfigurations",
        "penstock-injector",
        "its caBundle",
    ),
];

/// In penstock-system.
const HOME: [Right; 9] = [
    ("create", "coordination.k8s.io", "leases", "", "who writes; `create` cannot be held to a name"),
    ("get", "coordination.k8s.io", "leases", "penstock-control", "who writes"),
    ("update", "coordination.k8s.io", "leases", "penstock-control", "who writes"),
    ("create", "", "secrets", "", "the root, the webhook's key; `create` cannot be held to a name"),
    ("get", "", "secrets", "penstock-ca", "the root"),
    (
        "patch",
        "",
        "secrets",
        "penstock-ca",
        "what replicas say of a rotation, and notes on a root of somebody else's",
    ),
    ("update", "", "secrets", "penstock-ca", "the root's rotation"),
    ("get", "", "secrets", "penstock-webhook-tls", "the webhook's key"),
    ("update", "", "secrets", "penstock-webhook-tls", "the webhook's key made anew"),
];

type Rights = BTreeSet<[String; 4]>;

fn row(verb: &str, group: &str, resource: &str, name: &str) -> [String; 4] {
    [verb, group, resource, name].map(str::to_owned)
}

fn table(rights: &[Right]) -> Rights {
    let all: Rights =
        rights.iter().map(|(verb, group, resource, name, _)| row(verb, group, resource, name)).collect();
    assert_eq!(all.len(), rights.len(), "one of them is there twice");
    all
}

/// What a role grants, one verb at a time.
fn granted(kind: &str) -> Rights {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/install/rbac.yaml");
    let text = std::fs::read_to_string(file).unwrap();
    let mut roles = text.split("---\n").map(|document| serde_saphyr::from_str::<Value>(document).unwrap());
    let role = roles.find(|object| object["kind"] == kind).unwrap();
    let words = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    let mut all = Rights::new();
    for rule in role["rules"].as_array().unwrap() {
        let mut names = words(&rule["resourceNames"]);
        if names.is_empty() {
            names.push(String::new());
        }
        for group in words(&rule["apiGroups"]) {
            for resource in words(&rule["resources"]) {
                for verb in words(&rule["verbs"]) {
                    for name in &names {
                        assert!(![&verb, &resource, &group].iter().any(|word| word.contains('*')), "{rule}");
                        assert!(all.insert(row(&verb, &group, &resource, name)), "granted twice: {rule}");
                    }
                }
            }
        }
    }
    all
}

fn same(granted: &Rights, used: &Rights) {
    let many: Vec<_> = granted.difference(used).collect();
    let few: Vec<_> = used.difference(granted).collect();
    assert!(many.is_empty() && few.is_empty(), "too many: {many:?}\ntoo few: {few:?}");
}

#[test]
fn in_the_cluster_control_may_do_what_it_does_and_nothing_else() {
    let mut used = table(&EVERYWHERE);
    for watched in WATCHED {
        for verb in ["list", "watch"] {
            used.insert(row(verb, watched.group, watched.plural, ""));
        }
    }
    same(&granted("ClusterRole"), &used);
}

#[test]
fn at_home_it_may_do_what_it_does_and_nothing_else() {
    same(&granted("Role"), &table(&HOME));
}

#[test]
fn one_verb_too_many_or_too_few_is_found() {
    let fails = |granted: Rights| {
        let used = table(&HOME);
        std::panic::catch_unwind(move || same(&granted, &used)).is_err()
    };
    let all = table(&HOME);
    assert!(!fails(all.clone()));
    let mut few = all.clone();
    few.pop_first();
    assert!(fails(few));
    let mut many = all;
    many.insert(row("delete", "", "secrets", "penstock-ca"));
    assert!(fails(many));
}
