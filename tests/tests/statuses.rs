//! What control writes back, on the real API server: whether a route or a policy is accepted, and whether every proxy that it concerns has
//! it. The definitions are those that the Gateway API releases.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::events::v1::Event;
use kube::Client;
use kube::api::{Api, ListParams};
use penstock_api::names::port;
use penstock_control::identity::review::AUDIENCE;
use penstock_tests::testkit::kubernetes::{
    self, ApiServer, account, apply_status, control, install_definitions, installed, read, sidecar,
};
use penstock_tests::testkit::wire::{Wire, get};
use penstock_tests::testkit::{PATIENCE, own_ip, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const NAMESPACE: &str = "team-a";
/// A refusal is told in an Event after 10 s.
const SETTLED: Duration = Duration::from_secs(20);

async fn apply(client: &Client, object: &Value) {
    kubernetes::apply(client, object, false).await.unwrap();
    if object.get("status").is_some() {
        apply_status(client, object).await.unwrap();
    }
}

fn named(name: &str) -> Value {
    json!({"name": name, "namespace": NAMESPACE})
}

fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": named(name),
        "spec": {"ports": [{"name": "http", "port": 80, "targetPort": 8000}]},
    })
}

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": NAMESPACE, "labels": {"app": name},
            "annotations": {"penstock.io/inject": "enabled"},
        },
        "spec": {
            "serviceAccountName": name,
            "containers": [{"name": "main", "image": "none", "ports": [{"containerPort": 8000}]}],
        },
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    })
}

/// A route of the Service `resnet`, and of a Gateway that is somebody else's.
fn route(rule: Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": named("resnet"),
        "spec": {
            "parentRefs": [
                {"name": "gateway"},
                {"group": "", "kind": "Service", "name": "resnet"},
            ],
            "rules": [rule],
        },
    })
}

fn to(name: &str) -> Value {
    json!({"backendRefs": [{"name": name, "port": 80}]})
}

/// The conditions that control has written of the route's parent, or of a policy, as `type=status/reason`.
async fn conditions(client: &Client, object: &Value) -> Vec<String> {
    let found = read(client, object).await;
    let ours = |entry: &&Value| entry["controllerName"] == "penstock.io/control";
    let conditions = match found["status"]["parents"].as_array() {
        Some(parents) => parents.iter().find(ours).map(|entry| entry["conditions"].clone()),
        None => Some(found["status"]["conditions"].clone()),
    };
    let conditions = conditions.as_ref().and_then(Value::as_array).cloned().unwrap_or_default();
    let word = |one: &Value, key: &str| one[key].as_str().unwrap().to_owned();
    conditions
        .iter()
        .filter(|one| one["observedGeneration"] == found["metadata"]["generation"])
        .map(|one| format!("{}={}/{}", word(one, "type"), word(one, "status"), word(one, "reason")))
        .collect()
}

async fn says(client: &Client, object: &Value, expected: &[&str]) {
    let mut said = Vec::new();
    let what = format!("{} says {expected:?}", object["kind"]);
    let waited = tokio::time::timeout(
        PATIENCE,
        wait_until(&what, PATIENCE * 2, async || {
            said = conditions(client, object).await;
            said == expected
        }),
    )
    .await;
    assert!(waited.is_ok(), "{what}, and not {said:?}: {:#}", read(client, object).await["status"]);
}

/// Has the application beside the sidecar call `resnet`, and waits until the sidecar has applied its routes.
async fn calls(control: Ipv4Addr, ip: Ipv4Addr) {
    let mut wire = Wire::connect(SocketAddr::new(ip.into(), port::OUTBOUND)).await;
    let answer = wire.ask("GET / HTTP/1.1\r\nhost: resnet\r\n\r\n").await.unwrap();
    assert_eq!(answer.status(), 503, "there is no endpoint: {}", answer.text());
    let status = SocketAddr::new(control.into(), port::CONTROL_API);
    wait_until("the sidecar has applied everything", PATIENCE, async || {
        get(status, "/routes").await.unwrap().text().contains(r#""applied":1"#)
    })
    .await;
}

const IN_FORCE: [&str; 3] =
    ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=True/Programmed"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pain_12_a_route_is_programmed_when_every_proxy_that_it_concerns_has_it() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    install_definitions(&client).await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = installed(&server, &client, folder.path()).await;
    let ip = own_ip();
    for object in [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        account(NAMESPACE, "client"),
        pod("client", &ip.to_string()),
        pod("resnet", "198.51.100.7"),
        service("resnet"),
        service("resnet-v2"),
    ] {
        apply(&client, &object).await;
    }
    // A Gateway's controller was here first.
    let others = json!({
        "parentRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gateway"},
        "controllerName": "example.com/gateway",
        "conditions": [{
            "type": "Accepted", "status": "True", "reason": "Accepted", "message": "ours",
            "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1,
        }],
    });
    let mut first = route(to("resnet"));
    first["status"] = json!({"parents": [others]});
    apply(&client, &first).await;

    let _control = control("control", ip, folder.path(), &kubeconfig, &[]).await;
    says(&client, &first, &IN_FORCE).await;
    let message = |found: &Value| found["status"]["parents"][1]["conditions"][2]["message"].clone();
    assert_eq!(message(&read(&client, &first).await), "no connected proxy is concerned");

    // A proxy that asks for the Service is concerned.
    let sidecar = sidecar(&client, ip, (NAMESPACE, "client"), (ip, AUDIENCE), folder.path()).await;
    calls(ip, ip).await;
    // It does not read what is pushed, and so has not applied it.
    sidecar.signal(Signal::STOP);
    let second = route(to("resnet-v2"));
    apply(&client, &second).await;
    let pending = ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=False/Pending"];
    says(&client, &second, &pending).await;
    let found = read(&client, &second).await;
    assert_eq!(message(&found), "applied by 0 of 1 connected proxies that it concerns");
    sidecar.signal(Signal::CONT);
    says(&client, &second, &IN_FORCE).await;
    let found = read(&client, &second).await;
    assert_eq!(message(&found), "applied by 1 of 1 connected proxies that it concerns");
    assert_eq!(found["status"]["parents"][0], others, "what others have written stays");

    // Nothing is written that is there already.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let later = read(&client, &second).await;
    assert_eq!(later["metadata"]["resourceVersion"], found["metadata"]["resourceVersion"]);
    let fields = later["metadata"]["managedFields"].as_array().unwrap();
    assert!(fields.iter().any(|entry| entry["manager"] == "penstock-control-status"), "{fields:?}");

    // A reference into nothing, then a filter that is not supported: the last good version goes on, and that is said.
    let nowhere = route(to("resnet-v3"));
    apply(&client, &nowhere).await;
    let expected =
        ["Accepted=True/Accepted", "ResolvedRefs=False/BackendNotFound", "Programmed=False/Invalid"];
    says(&client, &nowhere, &expected).await;
    let mut rule = to("resnet");
    rule["filters"] = json!([{"type": "ExtensionRef", "extensionRef": {"group": "example.com", "kind": "Other", "name": "x"}}]);
    let unsupported = route(rule);
    apply(&client, &unsupported).await;
    let expected =
        ["Accepted=False/UnsupportedValue", "ResolvedRefs=True/ResolvedRefs", "Programmed=False/Invalid"];
    says(&client, &unsupported, &expected).await;
    let told = read(&client, &unsupported).await["status"]["parents"][1]["conditions"].clone();
    let accepted = told[0]["message"].as_str().unwrap();
    assert!(accepted.starts_with("spec.rules[0].filters[0].type: filters of type"), "{accepted}");
    assert!(
        told[2]["message"].as_str().unwrap().starts_with("an earlier version of it is in force"),
        "{told}"
    );
    let events: Api<Event> = Api::namespaced(client.clone(), NAMESPACE);
    let refused = async || {
        let all = events.list(&ListParams::default()).await.unwrap().items;
        let on_route = |event: &&Event| {
            event.reason.as_deref() == Some("Refused")
                && event.regarding.as_ref().is_some_and(|what| what.kind.as_deref() == Some("HTTPRoute"))
        };
        all.iter().filter(on_route).filter_map(|event| event.note.clone()).collect::<Vec<_>>()
    };
    wait_until("it is told in an Event", SETTLED, async || {
        refused().await.iter().any(|note| note.contains("ExtensionRef"))
    })
    .await;
    assert!(refused().await.len() <= 2, "each complaint is told once: {:?}", refused().await);

    // Mended, and a parent that is gone.
    apply(&client, &first_again()).await;
    says(&client, &first, &IN_FORCE).await;
    let mut theirs = route(to("resnet"));
    theirs["spec"]["parentRefs"] = json!([{"name": "gateway"}]);
    apply(&client, &theirs).await;
    wait_until("the entry of a parent that is gone goes", PATIENCE, async || {
        read(&client, &theirs).await["status"]["parents"] == json!([others])
    })
    .await;
}

fn first_again() -> Value {
    route(to("resnet"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_say_whether_they_are_in_force() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    install_definitions(&client).await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = installed(&server, &client, folder.path()).await;
    let access = |name: &str, spec: Value| json!({"apiVersion": "penstock.io/v1alpha1", "kind": "AccessPolicy", "metadata": named(name), "spec": spec});
    let inference = |name: &str, service: &str| {
        json!({
            "apiVersion": "penstock.io/v1alpha1", "kind": "InferencePolicy", "metadata": named(name),
            "spec": {"targetRef": {"kind": "Service", "name": service}, "balance": "least-request"},
        })
    };
    let allow = json!({"action": "Allow", "rules": [{"from": [{"serviceAccounts": ["client"]}]}]});
    let mut nowhere = allow.clone();
    nowhere["targetRefs"] = json!([{"kind": "Service", "name": "nowhere"}]);
    // What the schema lets pass and control does not.
    let odd = json!({"action": "Deny", "rules": [{"to": [{"paths": ["/a/../b"]}]}]});
    let odd_path = json!({"to": [{"paths": ["/a/../b"]}]});
    let rates = |name: &str, limits: Value| json!({"apiVersion": "penstock.io/v1alpha1", "kind": "RateLimit", "metadata": named(name), "spec": {"limits": limits}});
    let in_force = ["Accepted=True/Accepted", "Programmed=True/Programmed"];
    let table = [
        (access("allow", allow), in_force),
        (access("nowhere", nowhere), ["Accepted=False/TargetNotFound", "Programmed=False/Invalid"]),
        (access("odd", odd), ["Accepted=False/Invalid", "Programmed=False/Invalid"]),
        (inference("a", "resnet"), in_force),
        (inference("b", "resnet"), ["Accepted=False/Conflicted", "Programmed=False/Invalid"]),
        (inference("c", "nowhere"), ["Accepted=False/TargetNotFound", "Programmed=False/Invalid"]),
        (rates("few", json!([{"name": "l", "concurrent": 1}])), in_force),
        (
            rates("odd", json!([{"name": "l", "concurrent": 1, "match": odd_path}])),
            ["Accepted=False/Invalid", "Programmed=False/Invalid"],
        ),
    ];
    for object in [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        pod("resnet", "198.51.100.7"),
        service("resnet"),
    ] {
        apply(&client, &object).await;
    }
    for (object, _) in &table {
        apply(&client, object).await;
    }
    let _control = control("control", own_ip(), folder.path(), &kubeconfig, &[]).await;
    for (object, expected) in &table {
        says(&client, object, expected).await;
        let found = read(&client, object).await;
        assert_eq!(found["status"]["observedGeneration"], found["metadata"]["generation"]);
    }
    // The target comes.
    apply(&client, &service("nowhere")).await;
    says(&client, &table[5].0, &in_force).await;
}

/// A GRPCRoute and an InferencePool, as their own definitions have them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grpc_route_to_a_pool_is_in_force_and_both_say_so() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    install_definitions(&client).await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = installed(&server, &client, folder.path()).await;
    let pool = json!({
        "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "metadata": named("llama"),
        "spec": {
            "selector": {"matchLabels": {"app": "llama"}},
            "targetPorts": [{"number": 8000}],
            "endpointPickerRef": {"name": "picker", "port": {"number": 9002}},
        },
    });
    let route = |pool: &str| {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute", "metadata": named("chat"),
            "spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": "chat"}],
                "rules": [{
                    "matches": [{"method": {"service": "inference.GRPCInferenceService"}}],
                    "backendRefs": [{"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": pool}],
                }],
            },
        })
    };
    let mut llama = pod("llama", "198.51.100.7");
    llama["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    for object in [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        llama.clone(),
        service("chat"),
        pool.clone(),
        route("mistral"),
    ] {
        apply(&client, &object).await;
    }
    let ip = own_ip();
    let _control = control("control", ip, folder.path(), &kubeconfig, &[]).await;
    let nowhere =
        ["Accepted=True/Accepted", "ResolvedRefs=False/BackendNotFound", "Programmed=True/Programmed"];
    says(&client, &route("mistral"), &nowhere).await;
    assert_eq!(read(&client, &pool).await["status"]["parents"], Value::Null, "nobody leads there yet");
    apply(&client, &route("llama")).await;
    says(&client, &route("llama"), &IN_FORCE).await;
    says(&client, &pool, &IN_FORCE).await;
    let parents = read(&client, &pool).await["status"]["parents"].clone();
    assert_eq!(
        parents[0]["parentRef"],
        json!({"group": "", "kind": "Service", "name": "chat", "namespace": NAMESPACE})
    );
    // A pod is an endpoint while it is ready.
    let endpoints =
        async || get(SocketAddr::new(ip.into(), port::CONTROL_API), "/endpoints").await.unwrap().text();
    assert!(!endpoints().await.contains("198.51.100.7"), "{}", endpoints().await);
    llama["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    apply(&client, &llama).await;
    wait_until("the pod is an endpoint of the pool", PATIENCE, async || {
        let page = endpoints().await;
        page.contains("team-a/llama.pool") && page.contains("198.51.100.7:8000")
    })
    .await;
}

/// The proxies of all replicas count, whichever of them writes, and a replica that says nothing has not said yes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_is_programmed_when_the_proxies_of_every_replica_have_it() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    install_definitions(&client).await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = installed(&server, &client, folder.path()).await;
    let (a, b, ip) = (own_ip(), own_ip(), own_ip());
    let of_control = |name: &str, ip: Ipv4Addr| {
        let mut pod = pod(name, &ip.to_string());
        pod["metadata"] = json!({
            "name": name, "namespace": "penstock-system",
            "labels": {"app.kubernetes.io/name": "penstock", "app.kubernetes.io/component": "control"},
        });
        pod
    };
    for object in [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        account(NAMESPACE, "client"),
        pod("client", &ip.to_string()),
        service("resnet"),
        service("resnet-v2"),
        of_control("control-a", a),
        of_control("control-b", b),
        route(to("resnet")),
    ] {
        apply(&client, &object).await;
    }
    let _writer = control("control-a", a, folder.path(), &kubeconfig, &[]).await;
    let first = route(to("resnet"));
    let unheard = ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=Unknown/Pending"];
    says(&client, &first, &unheard).await;
    let mut other = control("control-b", b, folder.path(), &kubeconfig, &[]).await;
    says(&client, &first, &IN_FORCE).await;

    // The proxy is connected to the replica that does not write.
    let sidecar = sidecar(&client, b, (NAMESPACE, "client"), (ip, AUDIENCE), folder.path()).await;
    calls(b, ip).await;
    sidecar.signal(Signal::STOP);
    let second = route(to("resnet-v2"));
    apply(&client, &second).await;
    let pending = ["Accepted=True/Accepted", "ResolvedRefs=True/ResolvedRefs", "Programmed=False/Pending"];
    says(&client, &second, &pending).await;
    sidecar.signal(Signal::CONT);
    says(&client, &second, &IN_FORCE).await;
    other.kill();
    says(&client, &second, &unheard).await;
}
