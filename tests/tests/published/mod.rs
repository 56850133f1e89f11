//! A control in this process that publishes what a test says in place of a source, past the compiler, and one real sidecar of it: what is
//! proven there needs no mesh.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_control::compile::TrustAnchors;
use penstock_control::serve::{Control, Options, start};
use penstock_control::snapshot::{Builder, Snapshot};
use penstock_tests::testkit::process::{Process, program};
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, anywhere, own_ip, wait_until};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The trust domain.
pub(crate) const DOMAIN: &str = "cluster.local";

/// What a test publishes.
pub(crate) trait World: Send + Sync + 'static {
    /// All resources besides those of [`client`].
    fn add(&self, builder: &mut Builder);
}

fn snapshot(world: &impl World, trust: &TrustAnchors) -> Arc<Snapshot> {
    let mut builder = Builder::default();
    client(&mut builder, trust);
    world.add(&mut builder);
    Arc::new(builder.build(Vec::new()))
}

/// The trust bundle, and the sidecar's own pod.
fn client(builder: &mut Builder, trust: &TrustAnchors) {
    builder.add(Kind::TrustBundle, DOMAIN, &v1::TrustBundle { anchors: trust.anchors.clone() });
    let client = v1::Workload {
        namespace: "test".into(),
        name: "client".into(),
        service_account: "client".into(),
        ..Default::default()
    };
    builder.add(Kind::Workload, "test/client", &client);
}

/// Adds the Service `test/<name>`, of which `server` is the only endpoint: outside the mesh, so that one sidecar is all it takes.
pub(crate) fn service(builder: &mut Builder, name: &str, server: SocketAddr) {
    let full = format!("test/{name}");
    let ports = vec![v1::ServicePort { port: 80, name: "main".into(), protocol: v1::Protocol::Http.into() }];
    let service = v1::Service { namespace: "test".into(), name: name.into(), ports, policy: None };
    builder.add(Kind::Service, full.as_str(), &service);
    let endpoint = v1::Endpoint {
        name: format!("{full}-0"),
        ip: server.ip().to_string(),
        ports: vec![v1::PortTarget { service_port: 80, port: server.port().into() }],
        ..Default::default()
    };
    builder.add(Kind::Endpoints, full.as_str(), &v1::Endpoints { endpoints: vec![endpoint] });
}

/// All of the program but its source.
pub(crate) async fn control(folder: &Path, mut world: watch::Receiver<impl World>) -> Control {
    let snapshots = move |mut trust: watch::Receiver<Arc<TrustAnchors>>| {
        let (sender, receiver) = watch::channel(snapshot(&*world.borrow(), &trust.borrow()));
        tokio::spawn(async move {
            while tokio::select! { ok = world.changed() => ok, ok = trust.changed() => ok }.is_ok() {
                let next = snapshot(&*world.borrow_and_update(), &trust.borrow_and_update());
                sender.send_replace(next);
            }
        });
        receiver
    };
    let options = Options {
        state: folder.join("state"),
        listen: anywhere(),
        api: anywhere(),
        trust_domain: DOMAIN.into(),
        leaf_lifetime: Duration::from_secs(3_600),
        review: None,
        cluster: None,
        analysis_to: Vec::new(),
        canaries: None,
    };
    start(options, snapshots, None, CancellationToken::new()).await.unwrap()
}

/// A sidecar that is ready.
pub(crate) struct Sidecar {
    pub(crate) process: Process,
    pub(crate) outbound: SocketAddr,
    pub(crate) admin: SocketAddr,
}

/// Starts the sidecar of the pod `test/client`.
pub(crate) async fn sidecar(folder: &Path, control: SocketAddr) -> Sidecar {
    let token = std::process::Command::new(program("penstock-control"))
        .args(["token", "--namespace=test", "--service-account=client", "--state"])
        .arg(folder.join("state"))
        .output()
        .unwrap();
    std::fs::write(folder.join("token"), token.stdout).unwrap();
    let ip = own_ip();
    let [outbound, inbound, admin, health] =
        [15_001, 15_006, 15_000, 15_020].map(|port| SocketAddr::new(ip.into(), port));
    let args = [
        "run".to_owned(),
        format!("--control={control}"),
        format!("--control-ca={}", folder.join("state/anchors.pem").display()),
        format!("--token={}", folder.join("token").display()),
        "--node=test/client".to_owned(),
        "--service-account=client".to_owned(),
        format!("--outbound={outbound}"),
        format!("--inbound={inbound}"),
        format!("--admin={admin}"),
        format!("--health={health}"),
    ];
    let process = Process::start("client", &program("penstock-proxy"), &args, folder);
    wait_until("the sidecar is ready", PATIENCE, async || {
        get(admin, "/ready").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    Sidecar { process, outbound, admin }
}
