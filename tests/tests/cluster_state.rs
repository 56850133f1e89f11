//! What control keeps in the cluster, on a real API server: one root and one writer for all replicas, anchors where sidecars are, and a webhook
//! that API servers trust.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use penstock_api::names::port;
use penstock_api::view::{Certificate, Status};
use penstock_api::yaml;
use penstock_control::identity::review::AUDIENCE;
use penstock_tests::testkit::kubernetes::{
    ApiServer, account, apply, apply_status, control, installed, token,
};
use penstock_tests::testkit::process::{Process, program};
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, own_ip, wait_until};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};

const HOME: &str = "penstock-system";

/// A replica of control, at `ip`, whose certificates are short.
async fn replica(name: &str, ip: Ipv4Addr, folder: &Path, kubeconfig: &Path) -> Process {
    control(name, ip, folder, kubeconfig, &["--leaf-lifetime=20s".to_owned()]).await
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
    let kubeconfig = installed(&server, &client, folder.path()).await;
    let webhook = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/install/webhook.yaml");
    let installed = yaml::parse(&std::fs::read_to_string(webhook).unwrap()).unwrap();
    let injector = installed
        .iter()
        .map(yaml::Node::to_json)
        .find(|object| object["kind"] == "MutatingWebhookConfiguration")
        .unwrap();
    apply(&client, &injector, false).await.unwrap();

    let mut first = replica("control-a", own_ip(), folder.path(), &kubeconfig).await;
    wait_until("the first holds the Lease", PATIENCE, async || holder(&client).await == "control-a").await;
    let made = root(&client).await.unwrap().data.unwrap();
    let second = replica("control-b", own_ip(), folder.path(), &kubeconfig).await;
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

/// A sidecar, connected to the control at an address.
struct Sidecar {
    name: &'static str,
    ip: Ipv4Addr,
    process: Process,
}

impl Sidecar {
    async fn start(client: &Client, name: &'static str, control: Ipv4Addr, folder: &Path) -> Self {
        let ip = own_ip();
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "team-a"},
            "spec": {"serviceAccountName": name, "containers": [{"name": "main", "image": "none"}]},
            "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
        });
        apply(client, &account("team-a", name), false).await.unwrap();
        apply(client, &pod, false).await.unwrap();
        apply_status(client, &pod).await.unwrap();
        let token_file = folder.join(format!("{name}.token"));
        std::fs::write(&token_file, token(client, "team-a", name, AUDIENCE, Some(name)).await).unwrap();
        let at = |port: u16| SocketAddr::new(ip.into(), port);
        let args = [
            "run".to_owned(),
            format!("--control={}", SocketAddr::new(control.into(), port::CONTROL)),
            format!("--control-ca={}", folder.join("anchors.pem").display()),
            format!("--token={}", token_file.display()),
            format!("--node=team-a/{name}"),
            format!("--service-account={name}"),
            format!("--outbound={}", at(port::OUTBOUND)),
            format!("--inbound={}", at(port::INBOUND)),
            format!("--admin={}", at(port::ADMIN)),
            format!("--health={}", at(port::HEALTH)),
        ];
        let mut process = Process::start(name, &program("penstock-proxy"), &args, folder);
        wait_until("the sidecar is ready", PATIENCE, async || {
            assert!(process.runs(), "the sidecar ended: {}", process.said());
            ready(ip).await
        })
        .await;
        Self { name, ip, process }
    }
}

async fn ready(ip: Ipv4Addr) -> bool {
    get((ip, port::ADMIN).into(), "/ready").await.is_ok_and(|answer| answer.status() == 200)
}

async fn certificates(ip: Ipv4Addr) -> Vec<Certificate> {
    let page = get((ip, port::ADMIN).into(), "/certs").await.unwrap();
    serde_json::from_str(&page.text()).unwrap()
}

fn of(role: &str, certificates: &[Certificate]) -> BTreeSet<String> {
    certificates.iter().filter(|one| one.role == role).map(|one| one.serial.clone()).collect()
}

/// What a sidecar lacked at some moment: readiness, or a certificate that is good now.
async fn lack(ip: Ipv4Addr) -> Option<String> {
    if !ready(ip).await {
        return Some("not ready".to_owned());
    }
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
    let good = certificates(ip).await.iter().any(|one| one.role == "leaf" && one.not_after > now);
    (!good).then(|| "no certificate that is good".to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connected_sidecars_lack_nothing_while_the_root_is_rotated_and_its_holder_goes() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = installed(&server, &client, folder.path()).await;
    let team = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a"}});
    apply(&client, &team, false).await.unwrap();
    let (at_a, at_b) = (own_ip(), own_ip());
    let first = replica("control-a", at_a, folder.path(), &kubeconfig).await;
    wait_until("the first holds the Lease", PATIENCE, async || holder(&client).await == "control-a").await;
    let second = replica("control-b", at_b, folder.path(), &kubeconfig).await;
    let pem = folder.path().join("anchors.pem");
    wait_until("the anchors are in the cluster", PATIENCE, async || {
        anchors(&client, HOME).await.is_some_and(|anchors| std::fs::write(&pem, anchors).is_ok())
    })
    .await;
    let mut sidecars = [
        Sidecar::start(&client, "a", at_a, folder.path()).await,
        Sidecar::start(&client, "b", at_b, folder.path()).await,
    ];
    let before = of("anchor", &certificates(sidecars[0].ip).await);
    assert_eq!(before.len(), 1);

    let lacks = Arc::new(Mutex::new(Vec::new()));
    let watched = sidecars.each_ref().map(|sidecar| (sidecar.name, sidecar.ip));
    let watch = tokio::spawn({
        let lacks = lacks.clone();
        async move {
            loop {
                for (name, ip) in watched {
                    if let Some(lack) = lack(ip).await {
                        lacks.lock().unwrap().push(format!("{name}: {lack}"));
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });

    // The operator asks, and looks on.
    let admin = [("KUBECONFIG", server.kubeconfig().display().to_string())];
    let mut asking =
        Process::start_with("rotate", &program("penstock"), &["rotate-root"], &admin, folder.path());
    wait_until("both roots are known to both sidecars", PATIENCE, async || {
        assert!(asking.runs(), "{}", asking.said());
        for sidecar in &sidecars {
            if of("anchor", &certificates(sidecar.ip).await).len() != 2 {
                return false;
            }
        }
        true
    })
    .await;
    // The holder is replaced in the middle, as by an upgrade; its sidecars come back to its successor.
    first.terminate();
    wait_until("the other one holds the Lease", PATIENCE, async || holder(&client).await == "control-b")
        .await;
    drop(first);
    let first = replica("control-a", at_a, folder.path(), &kubeconfig).await;
    wait_until("the rotation is over", PATIENCE * 4, async || !asking.runs()).await;
    let said = asking.said();
    for words in ["Both roots are announced", "The new root signs", "The root is another one"] {
        assert!(said.contains(words), "{said}");
    }
    wait_until("both sidecars know the new root alone", PATIENCE, async || {
        let mut all = BTreeSet::new();
        for sidecar in &sidecars {
            all.extend(of("anchor", &certificates(sidecar.ip).await));
        }
        all.len() == 1 && all.is_disjoint(&before)
    })
    .await;
    // And they live on: another certificate is signed by the new root, and control pushes to both.
    for sidecar in &mut sidecars {
        let leaf = of("leaf", &certificates(sidecar.ip).await);
        wait_until("the certificate is renewed", PATIENCE, async || {
            of("leaf", &certificates(sidecar.ip).await).is_disjoint(&leaf)
        })
        .await;
        assert!(sidecar.process.runs());
    }
    for ip in [at_a, at_b] {
        let page = get((ip, port::CONTROL_API).into(), "/status").await.unwrap();
        let status: Status = serde_json::from_str(&page.text()).unwrap();
        assert!(status.proxies.iter().any(|proxy| proxy.connected), "{status:?}");
        assert!(status.all_applied(), "{status:?}");
    }
    watch.abort();
    assert_eq!(*lacks.lock().unwrap(), Vec::<String>::new());
    drop((first, second));
}

/// A root as cert-manager keeps one that signed itself: no key but the one that signs.
fn supplied(name: &str) -> Value {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&key).unwrap().pem();
    let base64 = |text: String| ByteString(text.into_bytes());
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "penstock-ca", "namespace": HOME},
        "data": {"tls.crt": base64(pem.clone()), "tls.key": base64(key.serialize_pem()), "ca.crt": base64(pem)},
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_supplied_root_is_followed_with_overlap_and_its_data_never_written() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = installed(&server, &client, folder.path()).await;
    apply(&client, &supplied("old"), false).await.unwrap();
    let old = root(&client).await.unwrap().data.unwrap();
    let control = replica("control-a", own_ip(), folder.path(), &kubeconfig).await;
    let at_home = async || anchors(&client, HOME).await.unwrap_or_default();
    // Lines end differently here and there.
    let body = |text: &str| text.split_whitespace().collect::<String>();
    let is = |bundle: &str, roots: &[&BTreeMap<String, ByteString>]| {
        let has = |root: &BTreeMap<String, ByteString>| {
            body(bundle).contains(&body(std::str::from_utf8(&root["ca.crt"].0).unwrap()))
        };
        bundle.matches("BEGIN").count() == roots.len() && roots.iter().all(|root| has(root))
    };
    wait_until("its anchor is the mesh's", PATIENCE, async || is(&at_home().await, &[&old])).await;

    // Nobody but whoever supplies it rotates it.
    let asked = std::process::Command::new(program("penstock"))
        .arg("rotate-root")
        .env("KUBECONFIG", server.kubeconfig())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(asked.status.code() == Some(1) && said.contains("whoever made it rotates it"), "{said}");

    apply(&client, &supplied("new"), false).await.unwrap();
    let new = root(&client).await.unwrap().data.unwrap();
    wait_until("both are announced", PATIENCE, async || is(&at_home().await, &[&old, &new])).await;
    wait_until("the old one is forgotten", PATIENCE * 3, async || is(&at_home().await, &[&new])).await;
    let last = root(&client).await.unwrap();
    assert_eq!(last.data.unwrap(), new);
    assert_eq!(last.metadata.annotations.unwrap_or_default(), BTreeMap::new());
    assert!(!control.said().contains("PRIVATE"));
}
