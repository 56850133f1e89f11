//! Injection as a cluster does it: a real API server with what `penstock install` prints, and control with the rights of that and no
//! others as its webhook.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::Client;
use kube::api::{Api, ListParams, PostParams};
use penstock_api::names::port;
use penstock_tests::testkit::certificates::{Authority, Leaf};
use penstock_tests::testkit::kubernetes::{ApiServer, ISSUER, apply, control, token};
use penstock_tests::testkit::process::{Process, program};
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, own_ip, wait_until};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use tokio::net::TcpStream;

const WEBHOOK: u16 = 9443;
const IMAGE: &str = "penstock.io/proxy:test";

/// All that is installed, with the webhook at this address instead of behind its Service.
async fn install(client: &Client, address: SocketAddr, authority: &Authority) {
    let printed = Command::new(program("penstock")).args(["install"]).output().unwrap();
    for document in String::from_utf8(printed.stdout).unwrap().split("---\n") {
        let mut object: Value = serde_saphyr::from_str(document).unwrap();
        if object["kind"] == "MutatingWebhookConfiguration" {
            // Control writes it later, once there is an API server that sends the webhook somebody's pods.
            for entry in object["webhooks"].as_array_mut().unwrap() {
                let path = entry["clientConfig"]["service"]["path"].as_str().unwrap();
                let url = format!("https://{address}{path}");
                let bundle = base64::engine::general_purpose::STANDARD.encode(&authority.pem);
                entry["clientConfig"] = json!({"url": url, "caBundle": bundle});
            }
        }
        apply(client, &object, false).await.unwrap_or_else(|error| panic!("{object:#}: {error}"));
    }
}

async fn namespace(client: &Client, name: &str, labels: Value) {
    let object =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
    apply(client, &object, false).await.unwrap();
}

fn pod(name: &str, labels: Value, host_network: bool) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "serviceAccountName": "default", "hostNetwork": host_network,
            "containers": [{"name": "main", "image": "none", "ports": [{"containerPort": 8000}]}],
        },
    }))
    .unwrap()
}

async fn create(client: &Client, namespace: &str, pod: Pod) -> kube::Result<Pod> {
    Api::namespaced(client.clone(), namespace).create(&PostParams::default(), &pod).await
}

/// The images of the sidecar's containers, if it has one.
fn sidecar(pod: &Pod) -> Vec<(String, Option<String>)> {
    let init = pod.spec.as_ref().unwrap().init_containers.iter().flatten();
    init.map(|container| (container.name.clone(), container.image.clone())).collect()
}

fn injected(pod: &Pod) -> bool {
    let expected = ["penstock-init", "penstock-proxy"].map(|name| (name.to_owned(), Some(IMAGE.to_owned())));
    let found = sidecar(pod);
    assert!(found.is_empty() || found == expected, "{found:?}");
    !found.is_empty()
}

fn write(folder: &Path, leaf: &Leaf) {
    // The kubelet changes both at once; control is to bear that somebody does not.
    std::fs::write(folder.join("tls.crt"), &leaf.certificate).unwrap();
    std::fs::write(folder.join("tls.key"), &leaf.key).unwrap();
}

/// Whether a new connection to the webhook is shown this certificate.
async fn shows(address: SocketAddr, authority: &Authority, leaf: &Leaf) -> bool {
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::from(address.ip());
    let tls = authority.client(None, &[b"h2"]).connect(name, tcp).await.unwrap();
    let shown = &tls.get_ref().1.peer_certificates().unwrap()[0];
    *shown == CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap()
}

async fn with_webhook(folder: &Path, ip: Ipv4Addr) -> Process {
    let options = [
        format!("--webhook={}", SocketAddr::new(ip.into(), WEBHOOK)),
        format!("--webhook-certificate={}", folder.display()),
        format!("--proxy-image={IMAGE}"),
    ];
    control("control", ip, folder, &folder.join("control.yaml"), &options).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pain_13_a_webhook_that_is_away_keeps_out_who_asked_and_nobody_else() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    let (folder, ip, authority) = (tempfile::tempdir().unwrap(), own_ip(), Authority::default());
    let (folder, address) = (folder.path(), SocketAddr::new(ip.into(), WEBHOOK));
    install(&client, address, &authority).await;
    let account = token(&client, "penstock-system", "penstock-control", ISSUER, None).await;
    std::fs::write(folder.join("control.yaml"), server.config(&account)).unwrap();
    let first = authority.server(ip);
    write(folder, &first);
    namespace(&client, "team-a", json!({"penstock.io/inject": "enabled"})).await;
    for name in ["plain", "late"] {
        namespace(&client, name, json!({})).await;
    }
    let (none, yes, no) =
        (json!({}), json!({"penstock.io/inject": "enabled"}), json!({"penstock.io/inject": "disabled"}));
    let mut running = with_webhook(folder, ip).await;

    // Labels in and out.
    let table =
        [("team-a", &none, true), ("team-a", &no, false), ("plain", &none, false), ("plain", &yes, true)];
    for (at, (space, labels, wanted)) in table.into_iter().enumerate() {
        let made = create(&client, space, pod(&format!("web-{at}"), labels.clone(), false)).await.unwrap();
        assert_eq!(injected(&made), wanted, "{space} {labels}");
    }
    // Who asks and cannot have one is told why.
    let refused = create(&client, "team-a", pod("host", none.clone(), true)).await.unwrap_err().to_string();
    assert!(refused.contains("pod team-a/host cannot have a sidecar: it has hostNetwork"), "{refused}");
    assert!(running.said().contains("refused, 403: pod team-a/host"), "{}", running.said());
    create(&client, "plain", pod("host", none.clone(), true)).await.unwrap();
    // A dry run is answered alike.
    let pods: Api<Pod> = Api::namespaced(client.clone(), "team-a");
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    assert!(injected(&pods.create(&dry, &pod("dry", none.clone(), false)).await.unwrap()));
    assert!(pods.get_opt("dry").await.unwrap().is_none());

    // A pod that is older than its namespace's label has an Event, one.
    create(&client, "late", pod("old", none.clone(), false)).await.unwrap();
    namespace(&client, "late", yes.clone()).await;
    let events: Api<Event> = Api::namespaced(client.clone(), "late");
    let mut told = Vec::new();
    wait_until("an Event says that it was not injected", PATIENCE * 2, async || {
        told = events.list(&ListParams::default()).await.unwrap().items;
        !told.is_empty()
    })
    .await;
    let [event] = &told[..] else { panic!("{told:?}") };
    assert_eq!(event.reason.as_deref(), Some("NotInjected"));
    assert_eq!(event.regarding.as_ref().and_then(|pod| pod.name.as_deref()), Some("old"));
    assert!(event.note.as_ref().is_some_and(|note| note.contains("kubectl -n late delete pod old")));
    let metrics = get(SocketAddr::new(ip.into(), port::CONTROL_API), "/metrics").await.unwrap().text();
    for line in [
        "penstock_control_pods_not_injected 1",
        "penstock_control_webhook_reviews_total{outcome=\"injected\"} 3",
        "penstock_control_webhook_reviews_total{outcome=\"refused\"} 1",
        "penstock_control_events_total{outcome=\"sent\"} 1",
    ] {
        assert!(metrics.contains(line), "no {line} in {metrics}");
    }

    // A certificate is replaced; the API server's connection goes on, and the next one is shown the new.
    assert!(shows(address, &authority, &first).await);
    let second = authority.server(ip);
    write(folder, &second);
    wait_until("the new certificate is shown", PATIENCE, async || shows(address, &authority, &second).await)
        .await;
    assert!(injected(&create(&client, "team-a", pod("renewed", none.clone(), false)).await.unwrap()));

    // Without control nobody gets in without the sidecar that he asked for, and whoever did not ask notices nothing.
    running.terminate();
    assert!(running.ended(PATIENCE).await.success());
    for (space, labels) in [("team-a", &none), ("plain", &yes)] {
        let refused =
            create(&client, space, pod("away", labels.clone(), false)).await.unwrap_err().to_string();
        assert!(refused.contains("failed calling webhook"), "{refused}");
    }
    for (space, labels) in [("team-a", &no), ("plain", &none)] {
        let made = create(&client, space, pod("away", labels.clone(), false)).await.unwrap();
        assert!(!injected(&made), "{space} {labels}");
    }
    let _again = with_webhook(folder, ip).await;
    assert!(injected(&create(&client, "team-a", pod("back", none, false)).await.unwrap()));
}
