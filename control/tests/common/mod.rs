//! What the tests of the compiler share.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use penstock_control::compile::{State, TrustAnchors, compile};
use penstock_control::objects::{ObjectSet, decode};
use penstock_control::snapshot::Snapshot;

/// An anchor nobody looks into.
pub fn trust() -> TrustAnchors {
    TrustAnchors { trust_domain: "cluster.local".into(), anchors: vec![vec![1, 2, 3]] }
}

/// The objects of a text.
pub fn read(file: &str, text: &str) -> ObjectSet {
    decode::file(&file.into(), text)
}

/// Several files in one set.
pub fn files(files: &[(&str, &str)]) -> ObjectSet {
    let mut set = ObjectSet::default();
    for (file, text) in files {
        let read = read(file, text);
        set.objects.extend(read.objects);
        set.broken.extend(read.broken);
    }
    set
}

/// A Service with a pod, a pod beside it, and one of the same labels in another namespace.
pub const PODS: &str = "\
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

/// These, and what a file says of them.
pub fn world(file: &str, text: &str) -> ObjectSet {
    files(&[("pods.yaml", PODS), (file, text)])
}

/// The small mesh of `tests/mesh`.
pub fn mesh() -> ObjectSet {
    files(&[
        ("endpoints.yml", include_str!("../mesh/endpoints.yml")),
        ("pods.yaml", include_str!("../mesh/pods.yaml")),
        ("services.yaml", include_str!("../mesh/services.yaml")),
    ])
}

/// Compiled with nothing before it.
pub fn compiled(set: &ObjectSet) -> Snapshot {
    compile(set, &State::default(), &trust()).0
}

/// The problems, one a line; `*` before those where an earlier version is in force.
pub fn messages(snapshot: &Snapshot) -> Vec<String> {
    snapshot
        .problems
        .iter()
        .map(|problem| {
            let star = if problem.last_good_in_force { "*" } else { "" };
            let object =
                if problem.object.is_empty() { String::new() } else { format!(" {}", problem.object) };
            format!("{star}{}:{}{object}: {}", problem.file, problem.line, problem.message)
        })
        .collect()
}
