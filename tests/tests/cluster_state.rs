//! What control keeps in the cluster, on a real API server: one root and one writer for all replicas, anchors where sidecars are, and a webhook
//! that API servers trust.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use penstock_control::objects::yaml;
use penstock_tests::testkit::kubernetes::{ApiServer, CONTEXT, apply};
use penstock_tests::testkit::process::{Process, program};
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, own_ip, wait_until};
use serde_json::json;

const HOME: &str = "penstock-system";

/// A replica of control, on an address of its own.
async fn control(name: &str, folder: &Path, kubeconfig: &Path) -> Process {
    let at = |port: u16| SocketAddr::new(own_ip().into(), port);
    let (push, api) = (at(15010), at(8080));
    let args = [
        "run".to_owned(),
        format!("--source=kubernetes:{CONTEXT}"),
        format!("--state={}", folder.join(name).display()),
        format!("--listen={push}"),
        format!("--api={api}"),
        "--leaf-lifetime=20s".to_owned(),
    ];
    let variables = [("KUBECONFIG", kubeconfig.display().to_string()), ("POD_NAME", name.to_owned())];
    let mut process = Process::start_with(name, &program("penstock-control"), &args, &variables, folder);
    wait_until("control answers", PATIENCE, async || {
        assert!(process.runs(), "control ended at once: {}", process.said());
        get(api, "/healthz").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    process
}

async fn holder(client: &Client) -> String {
    let leases: Api<Lease> = Api::namespaced(client.clone(), HOME);
    let lease = leases.get_opt("penstock-control").await.unwrap();
    lease.and_then(|lease| lease.spec?.holder_identity).unwrap_or_default()
}

async fn root(client: &Client) -> Option<Secret> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), HOME);
    secrets.get_opt("penstock-ca").await.unwrap()
}

async fn anchors(client: &Client, namespace: &str) -> Option<String> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    maps.get_opt("penstock-anchors").await.unwrap()?.data?.remove("anchors.pem")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_have_one_root_and_one_writer_and_who_dies_is_succeeded() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    let folder = tempfile::tempdir().unwrap();
    apply(&client, &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HOME}}), false)
        .await
        .unwrap();
    let webhook = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/install/webhook.yaml");
    let installed = yaml::parse(&std::fs::read_to_string(webhook).unwrap()).unwrap();
    let injector = installed
        .iter()
        .map(yaml::Node::to_json)
        .find(|object| object["kind"] == "MutatingWebhookConfiguration")
        .unwrap();
    apply(&client, &injector, false).await.unwrap();

    let mut first = control("control-a", folder.path(), &server.kubeconfig()).await;
    wait_until("the first holds the Lease", PATIENCE, async || holder(&client).await == "control-a").await;
    let made = root(&client).await.unwrap().data.unwrap();
    let second = control("control-b", folder.path(), &server.kubeconfig()).await;
    assert_eq!(root(&client).await.unwrap().data.unwrap(), made, "there is one root");

    // Anchors: at home, and in a namespace as soon as it asks for sidecars.
    wait_until("anchors are at home", PATIENCE, async || anchors(&client, HOME).await.is_some()).await;
    let team = json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "team-a", "labels": {"penstock.io/inject": "enabled"}}});
    apply(&client, &team, false).await.unwrap();
    wait_until("anchors are in the labelled namespace", Duration::from_secs(2), async || {
        anchors(&client, "team-a").await.is_some()
    })
    .await;
    assert_eq!(anchors(&client, "default").await, None);

    // The webhook's authority is in both entries, and comes back when manifests are applied anew.
    let configurations: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let bundled = async || {
        let found = configurations.get("penstock-injector").await.unwrap();
        found.webhooks.unwrap().iter().filter(|entry| entry.client_config.ca_bundle.is_some()).count()
    };
    wait_until("the caBundle is written", PATIENCE, async || bundled().await == 2).await;
    let name = injector["webhooks"][0]["name"].clone();
    let stripped = json!({"webhooks": [{"name": name, "clientConfig": {"caBundle": null}}]});
    configurations
        .patch("penstock-injector", &PatchParams::default(), &Patch::Strategic(stripped))
        .await
        .unwrap();
    assert!(bundled().await <= 2);
    wait_until("the caBundle is put back", PATIENCE, async || bundled().await == 2).await;

    // A deletion by mistake.
    let secrets: Api<Secret> = Api::namespaced(client.clone(), HOME);
    secrets.delete("penstock-ca", &DeleteParams::default()).await.unwrap();
    wait_until("the root is written back", PATIENCE, async || root(&client).await.is_some()).await;
    assert_eq!(root(&client).await.unwrap().data.unwrap(), made);

    // A rotation is begun by the one and ended by the other.
    let ask = json!({"metadata": {"annotations": {"penstock.io/rotate-root": "now"}}});
    secrets.patch("penstock-ca", &PatchParams::default(), &Patch::Merge(ask)).await.unwrap();
    wait_until("both roots are there", PATIENCE, async || {
        root(&client).await.unwrap().data.unwrap().contains_key("next-ca.crt")
    })
    .await;
    first.kill();
    wait_until("the second holds the Lease", PATIENCE, async || holder(&client).await == "control-b").await;
    wait_until("the rotation is over", PATIENCE * 4, async || {
        let data = root(&client).await.unwrap().data.unwrap();
        !data.contains_key("next-ca.crt") && data["ca.crt"] != made["ca.crt"]
    })
    .await;
    wait_until("the old anchor is gone", PATIENCE, async || {
        anchors(&client, "team-a").await.unwrap().matches("BEGIN").count() == 1
    })
    .await;

    // Who is told to end gives the Lease back.
    second.terminate();
    wait_until("nobody holds the Lease", PATIENCE, async || holder(&client).await.is_empty()).await;
}
