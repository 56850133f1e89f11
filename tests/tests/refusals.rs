//! What one program must refuse of another, tried between the real programs: a resource that makes no sense, a type
//! that does not exist, a certificate for somebody else. Each is refused alone, its siblings are served, and the
//! reason can be read where an operator looks: in control's `/status`, in the log, on a metric.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod published;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use penstock_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use penstock_api::discovery::{DeltaDiscoveryRequest, Node};
use penstock_api::names::annotation;
use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::view::Status;
use penstock_control::snapshot::Builder;
use penstock_proxy::identity::Identity;
use penstock_proxy::identity::control::Control as Way;
use penstock_proxy::identity::sign::{Signer, keep_signed};
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::wire::{Message, Wire, get};
use penstock_tests::testkit::{PATIENCE, anywhere, wait_until};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use self::published::{DOMAIN, Sidecar};

/// What the test publishes in place of a source: control's own compiler passes nothing that a proxy of the same
/// version refuses, so the only way there is past the compiler.
#[derive(Clone, Default)]
struct World {
    /// A response header that the route of `test/good` adds.
    header: &'static str,
    /// The route of `test/bad` has a filter of a kind that this build does not know.
    from_the_future: bool,
    origin: Option<SocketAddr>,
}

impl published::World for World {
    fn add(&self, builder: &mut Builder) {
        for (name, full) in [("good", "test/good"), ("bad", "test/bad")] {
            let mut filters = Vec::new();
            if name == "good" {
                let header = v1::Header { name: "x-version".into(), value: self.header.into() };
                let change = v1::HeaderChange { set: vec![header], ..Default::default() };
                filters.push(v1::Filter { kind: Some(v1::filter::Kind::ResponseHeaders(change)) });
            } else if self.from_the_future {
                filters.push(v1::Filter { kind: None });
            }
            published::service(builder, name, self.origin.unwrap());
            let weights = format!("{full}/0");
            let rule =
                v1::Rule { route: full.into(), filters, weights: weights.clone(), ..Default::default() };
            builder.add(Kind::Routes, full, &v1::Routes { rules: vec![rule] });
            let backend = v1::Backend { service: full.into(), port: 80, weight: 1, ..Default::default() };
            let message = v1::Weights { backends: vec![backend], ..Default::default() };
            builder.add(Kind::Weights, weights, &message);
        }
    }
}

async fn status(api: SocketAddr) -> Status {
    serde_json::from_slice(&get(api, "/status").await.unwrap().body).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resource_that_a_sidecar_must_refuse_is_told_while_its_siblings_apply() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::named(anywhere(), "origin", Duration::ZERO).await;
    let (world, publishes) =
        watch::channel(World { header: "1", origin: Some(origin.address), ..World::default() });
    let control = published::control(folder.path(), publishes).await;
    let Sidecar { process: sidecar, outbound, admin } =
        published::sidecar(folder.path(), control.address).await;
    let ask = async |service: &str| -> Message {
        Wire::connect(outbound)
            .await
            .ask(format!("GET / HTTP/1.1\r\nhost: {service}.test\r\n\r\n"))
            .await
            .unwrap()
    };
    assert_eq!(ask("good").await.head.get("x-version"), Some("1"));
    assert_eq!(ask("bad").await.status(), 200);

    // One snapshot changes both routes: the one is sound, the other must be refused.
    world.send_modify(|world| (world.header, world.from_the_future) = ("2", true));
    wait_until("the sibling applies", PATIENCE, async || {
        ask("good").await.head.get("x-version") == Some("2")
    })
    .await;
    let mut refused = Vec::new();
    wait_until("control knows what was refused", PATIENCE, async || {
        refused = status(control.api).await.proxies.remove(0).refused;
        !refused.is_empty()
    })
    .await;
    assert_eq!(refused.len(), 1, "{refused:?}");
    let told = format!("{} {}", refused[0].kind, refused[0].reason);
    assert!(told.contains("Routes test/bad") && told.contains("upgrade the proxy"), "{told}");
    assert!(!told.contains("test/good"), "{told}");
    assert_eq!(ask("bad").await.status(), 200, "its last good version is gone");
    let said = sidecar.said();
    assert!(said.contains("refused configuration") && said.contains("Routes test/bad"), "{said}");
    let nacks = ["kind=\"routes\"", "answer=\"nack\""];
    assert_eq!(metric(admin, "penstock_configuration_responses_total", &nacks).await, 1.0);

    // What is mended is no longer told.
    world.send_modify(|world| (world.header, world.from_the_future) = ("3", false));
    wait_until("nothing is refused any more", PATIENCE, async || {
        let status = status(control.api).await;
        status.all_applied() && status.proxies[0].refused.is_empty()
    })
    .await;
    assert_eq!(ask("good").await.head.get("x-version"), Some("3"));
}

/// What a proxy has, for a client that the test plays with the proxy's own code.
fn signer(mesh: &Mesh, pod: &str, id: &str) -> Signer {
    let control = Way {
        address: mesh.push().to_string(),
        ca: mesh.state().join("anchors.pem"),
        trust_domain: DOMAIN.into(),
    };
    Signer {
        control,
        token: mesh.token(pod),
        id: format!("spiffe://{DOMAIN}/ns/test/sa/{id}").parse().unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_type_that_does_not_exist_is_told_and_its_siblings_are_served() {
    let mesh = Mesh::default().pod("client", None).service("shop", &[(annotation::OUTLIER, "failures=5")]);
    let mesh = mesh.start().await;
    let signer = signer(&mesh, "client", "client");
    let identity = Arc::new(Identity::new());
    let mut signed = identity.changed();
    tokio::spawn(keep_signed(Arc::clone(&identity), signer.clone()));
    tokio::time::timeout(PATIENCE, signed.changed()).await.unwrap().unwrap();
    let channel = signer.control.connect(&identity).await.unwrap();

    let (say, requests) = mpsc::channel(4);
    let ask = |type_url: &str, name: &str| DeltaDiscoveryRequest {
        node: Some(Node { id: "test/newer".into(), ..Default::default() }),
        type_url: type_url.into(),
        resource_names_subscribe: vec![name.into()],
        ..Default::default()
    };
    say.send(ask("type.googleapis.com/penstock.v2.Tarot", "test/shop")).await.unwrap();
    say.send(ask(Kind::Service.type_url(), "test/shop")).await.unwrap();
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let opened = client.delta_aggregated_resources(ReceiverStream::new(requests)).await.unwrap();
    let mut responses = opened.into_inner();
    let response = loop {
        let next = tokio::time::timeout(PATIENCE, responses.message()).await;
        let next = next.expect("no answer").expect("the stream broke").expect("control closed the stream");
        // An empty answer under the unknown type would do no harm; resources of it could not be.
        if next.type_url == Kind::Service.type_url() {
            break next;
        }
        assert!(next.resources.is_empty(), "{next:?}");
    };
    assert_eq!(response.resources[0].name, "test/shop");

    let said = mesh.control.as_ref().unwrap().said();
    assert!(said.contains("a type that does not exist") && said.contains("penstock.v2.Tarot"), "{said}");
    assert!(said.contains("is the proxy newer than control?"), "{said}");
    assert_eq!(metric(mesh.api(), "penstock_control_unknown_types_total", &[]).await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_csr_for_somebody_else_is_refused_and_both_sides_say_whose() {
    let mut mesh = Mesh::default().pod("honest", None).pod("greedy", None).start().await;
    // A thief's proxy: the token of one, the name of another.
    mesh.sidecar("greedy").kill();
    std::fs::copy(mesh.token("honest"), mesh.token("greedy")).unwrap();
    mesh.start_sidecar("greedy");
    let asked = format!("spiffe://{DOMAIN}/ns/test/sa/greedy");
    let proven = format!("spiffe://{DOMAIN}/ns/test/sa/honest");
    let told = format!("the CSR asks for {asked}, but the token proves {proven}");
    wait_until("the proxy says why it has no certificate", PATIENCE, async || {
        mesh.sidecar("greedy").said().contains(&told)
    })
    .await;
    let said = mesh.control.as_ref().unwrap().said();
    assert!(said.contains("a certificate was refused") && said.contains(&told), "{said}");
    let name = ["reason=\"csr-name\""];
    assert!(metric(mesh.api(), "penstock_control_sign_refused_total", &name).await >= 1.0);
    let ready = get(mesh.admin("greedy"), "/ready").await.unwrap();
    assert_eq!(ready.status(), 503, "{}", ready.text());
    // Nor does it help to ask directly.
    let refused = signer(&mesh, "honest", "greedy").sign(&Identity::new()).await.unwrap_err().to_string();
    assert!(refused.contains(&told), "{refused}");
    wait_until("control shows that the proxy is not connected", PATIENCE, async || {
        let status = mesh.status().await;
        status.proxies.iter().any(|proxy| proxy.node == "test/greedy" && !proxy.connected)
            && status.proxies.iter().any(|proxy| proxy.node == "test/honest" && proxy.connected)
    })
    .await;
}
