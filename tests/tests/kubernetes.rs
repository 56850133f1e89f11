//! Control on the real API of Kubernetes: what is in it is what sidecars get, tokens of service accounts are what they prove themselves
//! with, and an API server that is away changes nothing.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind};
use penstock_api::names::port;
use penstock_api::view::Status;
use penstock_api::yaml;
use penstock_control::identity::review::{AUDIENCE, ApiReview};
use penstock_control::identity::token::{TokenError, TokenReview};
use penstock_tests::testkit::kubernetes::{self, ApiServer, CONTEXT, ISSUER, account, installed, token};
use penstock_tests::testkit::process::{Process, program};
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, own_ip, wait_until};
use serde_json::{Value, json};

const NAMESPACE: &str = "team-a";

/// Makes an object so, with its status if it has one.
async fn apply(client: &Client, object: Value) {
    kubernetes::apply(client, &object, false).await.unwrap();
    if object.get("status").is_some() {
        kubernetes::apply_status(client, &object).await.unwrap();
    }
}

fn named(name: &str) -> Value {
    json!({"name": name, "namespace": NAMESPACE})
}

fn service(name: &str, annotations: Value) -> Value {
    let mut metadata = named(name);
    metadata["annotations"] = annotations;
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {"ports": [{"name": "http", "port": 80, "targetPort": 8000}]},
    })
}

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "annotations": {"penstock.io/inject": "enabled"}},
        "spec": {
            "serviceAccountName": name,
            "containers": [{"name": "main", "image": "none", "ports": [{"containerPort": 8000}]}],
        },
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    })
}

fn slice(service: &str, pod: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-1"), "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
        "endpoints": [{
            "addresses": [ip], "conditions": {"ready": true},
            "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": pod},
        }],
    })
}

/// Control as a process that reads the API.
struct Control {
    process: Process,
    ip: Ipv4Addr,
}

impl Control {
    async fn start(folder: &Path, kubeconfig: &Path) -> Self {
        let ip = own_ip();
        let process = kubernetes::control("control", ip, folder, kubeconfig, &[]).await;
        Self { process, ip }
    }

    async fn page(&self, path: &str) -> String {
        get(SocketAddr::new(self.ip.into(), port::CONTROL_API), path).await.unwrap().text()
    }

    async fn says(&self, path: &str, words: &str) {
        wait_until(&format!("{path} says {words}"), PATIENCE, async || self.page(path).await.contains(words))
            .await;
    }

    async fn status(&self) -> Status {
        serde_json::from_str(&self.page("/status").await).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_api_has_is_what_sidecars_get_and_an_outage_changes_nothing() {
    let Some(mut server) = ApiServer::start().await else { return };
    let client = server.client().await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = installed(&server, &client, folder.path()).await;
    let ip = own_ip();
    for object in [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        account(NAMESPACE, "client"),
        pod("client", &ip.to_string()),
        pod("resnet", "198.51.100.7"),
        service("resnet", json!({})),
        slice("resnet", "resnet", "198.51.100.7"),
    ] {
        apply(&client, object).await;
    }
    let control = Control::start(folder.path(), &kubeconfig).await;
    control.says("/endpoints", "198.51.100.7:8000").await;
    assert_eq!(control.page("/problems").await.trim(), "[]");

    // The anchors are where injected pods mount them, and a sidecar proves itself with the token that the kubelet would project.
    let place = (NAMESPACE, "client");
    let _sidecar = kubernetes::sidecar(&client, control.ip, place, (ip, AUDIENCE), folder.path()).await;
    wait_until("the sidecar has applied everything", PATIENCE, async || {
        let status = control.status().await;
        status.proxies.iter().any(|proxy| proxy.connected) && status.all_applied()
    })
    .await;

    // A weight.
    apply(&client, service("resnet-v2", json!({}))).await;
    let before = control.status().await.snapshot;
    apply(&client, service("resnet", json!({"penstock.io/traffic-split": "resnet=90,resnet-v2=10"}))).await;
    control.says("/routes", "resnet-v2").await;
    assert_ne!(control.status().await.snapshot, before);
    // A mistake is named, and what was good stays in force.
    apply(&client, service("resnet", json!({"penstock.io/traffic-split": "resnet=ninety"}))).await;
    control.says("/problems", "Service team-a/resnet").await;
    let check = std::process::Command::new(program("penstock"))
        .args(["check", "--source", &format!("kubernetes:{CONTEXT}")])
        .env("KUBECONFIG", &kubeconfig)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(!check.status.success() && said.contains("Service team-a/resnet"), "{said}");
    control.says("/routes", "resnet-v2").await;
    apply(&client, service("resnet", json!({"penstock.io/traffic-split": "resnet=80,resnet-v2=20"}))).await;
    wait_until("the mistake is forgotten", PATIENCE, async || control.page("/problems").await.trim() == "[]")
        .await;

    // The API server is away: nothing changes, and control goes on.
    let in_force = control.status().await.snapshot;
    server.stop();
    wait_until("control has noticed", PATIENCE, async || {
        control.process.said().contains("the Kubernetes API does not tell")
    })
    .await;
    assert_eq!(control.status().await.snapshot, in_force);
    server.restart().await;
    let client = server.client().await;
    apply(&client, slice("resnet", "resnet", "198.51.100.8")).await;
    control.says("/endpoints", "198.51.100.8:8000").await;
    let slices = ApiResource::from_gvk(&GroupVersionKind::gvk("discovery.k8s.io", "v1", "EndpointSlice"));
    let slices: Api<DynamicObject> = Api::namespaced_with(client.clone(), NAMESPACE, &slices);
    slices.delete("resnet-1", &DeleteParams::default()).await.unwrap();
    wait_until("the endpoint is gone", PATIENCE, async || {
        !control.page("/endpoints").await.contains("198.51.100.8")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_proves_its_account_to_its_audience_while_its_pod_is_there() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    for object in [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        account(NAMESPACE, "client"),
        pod("client", "198.51.100.9"),
    ] {
        apply(&client, object).await;
    }
    let review = ApiReview::new(client.clone());
    let bound = token(&client, NAMESPACE, "client", AUDIENCE, Some("client")).await;
    let workload = review.check(&bound, 0).await.unwrap();
    assert_eq!((&*workload.namespace, &*workload.account), (NAMESPACE, "client"));
    assert_eq!(workload.pod.as_deref(), Some("client"));

    let for_the_api = token(&client, NAMESPACE, "client", ISSUER, None).await;
    let refused = |answer: Result<_, TokenError>| match answer {
        Err(TokenError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let why = refused(review.check(&for_the_api, 0).await);
    assert!(why.contains("audience"), "{why}");
    refused(review.check("no token at all", 0).await);

    // A pod that is gone gets no certificate any more, whatever its token's expiry says.
    let pods = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"));
    let pods: Api<DynamicObject> = Api::namespaced_with(client.clone(), NAMESPACE, &pods);
    pods.delete("client", &DeleteParams { grace_period_seconds: Some(0), ..Default::default() })
        .await
        .unwrap();
    wait_until("the token of a deleted pod is refused", PATIENCE, async || {
        matches!(review.check(&bound, 0).await, Err(TokenError::Refused(_)))
    })
    .await;
}

/// What injection makes of pods is what the API server takes: every golden file of `penstock inject`, as it would be applied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn injected_pods_are_accepted_by_the_api_server() {
    const KINDS: [&str; 7] =
        ["Pod", "Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob"];
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../control/inject/tests/golden");
    let mut accepted = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        // Those that are refused are a sentence, and no object.
        let documents = yaml::parse(&text).unwrap_or_default();
        for mut object in documents.iter().map(yaml::Node::to_json) {
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            // One has fields of a Kubernetes to come, on purpose.
            if !name.ends_with(".out.yaml") || name.starts_with("unknown-fields") || !KINDS.contains(&&*kind)
            {
                continue;
            }
            object["metadata"]["namespace"] = "default".into();
            if object["metadata"]["name"].is_null() {
                object["metadata"]["name"] = "generated".into();
            }
            // As the admission of service accounts would have it, which is off here.
            if kind == "Pod" && object["spec"]["serviceAccountName"].is_null() {
                object["spec"]["serviceAccountName"] = "default".into();
            }
            let answer = kubernetes::apply(&client, &object, true).await;
            assert!(answer.is_ok(), "{name}: {answer:?}");
            accepted += 1;
        }
    }
    assert!(accepted >= 25, "only {accepted} were tried");
}
