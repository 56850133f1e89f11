//! Configuration on its way to a proxy.

use std::time::Duration;

use penstock_api::discovery::{DeltaDiscoveryRequest, Status};
use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::view;
use penstock_control::snapshot::Builder;
use tokio::time::Instant;

use crate::mesh::{Ads, DOMAIN, Mesh, eventually, subscription};

const HOUR: Duration = Duration::from_secs(3_600);
const WEIGHTS: &str = "a/s/a/s/0";

/// `a/s` splits over two versions.
fn canary(v2: u32) -> impl Fn(&mut Builder) {
    move |builder| {
        let backend =
            |name: &str, weight| v1::Backend { service: name.into(), weight, ..v1::Backend::default() };
        for name in ["a/s", "a/v1", "a/v2"] {
            builder.add(Kind::Endpoints, name, &v1::Endpoints::default());
            builder.add(Kind::Service, name, &v1::Service { name: name.into(), ..v1::Service::default() });
            builder.leads_to("a/s", name);
        }
        let rule = v1::Rule { route: "a/s".into(), weights: WEIGHTS.into(), ..v1::Rule::default() };
        builder.add(Kind::Routes, "a/s", &v1::Routes { rules: vec![rule] });
        let backends = vec![backend("a/v1", 100 - v2), backend("a/v2", v2)];
        builder.add(
            Kind::Weights,
            WEIGHTS,
            &v1::Weights { route: "a/s".into(), rule: 0, backends, ..Default::default() },
        );
    }
}

async fn subscribed(mesh: &Mesh, node: &str) -> Ads {
    let mut ads = Ads::open(mesh.proxy_channel("team-a").await, node, Kind::Service, &["a/s"]).await.unwrap();
    for kind in [Kind::Endpoints, Kind::Routes, Kind::Weights] {
        ads.send(subscription(kind, &["a/s"])).await;
    }
    for _ in 0..4 {
        ads.take().await;
    }
    ads
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_step_reaches_the_proxy_within_milliseconds_and_status_says_so() {
    let mesh = Mesh::start(HOUR).await;
    mesh.publish(canary(0));
    let mut ads = subscribed(&mesh, "team-a/p").await;
    let mut took = Vec::new();
    for step in 1..=50 {
        let start = Instant::now();
        mesh.publish(canary(step));
        let response = ads.take().await;
        took.push(start.elapsed());
        assert_eq!(response.resources[0].name, WEIGHTS);
        assert_eq!((response.resources.len(), response.removed_resources.len()), (1, 0));
    }
    took.sort();
    // Typically under a millisecond; the bound leaves room for a machine that is busy with other tests.
    assert!(took[25] < Duration::from_millis(10), "median {:?}, slowest {:?}", took[25], took[49]);

    eventually("the acknowledgement", || async {
        let status: view::Status = mesh.json("/status").await;
        status.proxies.len() == 1 && status.all_applied()
    })
    .await;
    let status: view::Status = mesh.json("/status").await;
    let proxy = &status.proxies[0];
    assert_eq!((&*proxy.node, &*proxy.identity), ("team-a/p", "spiffe://cluster.local/ns/team-a/sa/client"));
    assert_eq!((proxy.connected, proxy.resources), (true, 8));
    assert!(proxy.applied_after_ms.unwrap() < 1_000.0);
    let routes: Vec<view::RouteRow> = mesh.json("/routes").await;
    let rows: Vec<_> = routes.iter().map(|r| (&*r.backend, r.weight, r.applied, r.subscribed)).collect();
    assert_eq!(rows, [("a/v1", 50, 1, 1), ("a/v2", 50, 1, 1)]);

    drop(ads);
    eventually("the end of the stream", || async {
        let status: view::Status = mesh.json("/status").await;
        !status.proxies[0].connected
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_resource_is_shown_with_its_reason_while_its_siblings_apply() {
    let mesh = Mesh::start(HOUR).await;
    mesh.publish(canary(0));
    let names = ["a/v1", "a/v2"];
    let mut ads =
        Ads::open(mesh.proxy_channel("team-a").await, "team-a/p", Kind::Service, &names).await.unwrap();
    let response = ads.next().await;
    ads.send(DeltaDiscoveryRequest {
        type_url: response.type_url,
        response_nonce: response.nonce,
        error_detail: Some(Status { code: 3, message: "a/v2: port 0 is none".into(), details: vec![] }),
        ..DeltaDiscoveryRequest::default()
    })
    .await;
    eventually("the refusal", || async {
        let status: view::Status = mesh.json("/status").await;
        status.proxies[0].refused
            == [view::Refused { kind: "Service".into(), reason: "a/v2: port 0 is none".into() }]
            && status.proxies[0].resources == 1
            && !status.all_applied()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_type_is_answered_and_the_stream_lives_on() {
    let mesh = Mesh::start(HOUR).await;
    let mut ads = Ads::open(mesh.proxy_channel("team-a").await, "team-a/p", Kind::TrustBundle, &[DOMAIN])
        .await
        .unwrap();
    ads.take().await;
    let mut unknown = subscription(Kind::Service, &["x"]);
    unknown.type_url = "type.googleapis.com/penstock.v9.Wonder".into();
    ads.send(unknown).await;
    let answer = ads.take().await;
    assert_eq!(
        (&*answer.type_url, &*answer.removed_resources),
        ("type.googleapis.com/penstock.v9.Wonder", &["x".to_owned()][..])
    );
    ads.send(subscription(Kind::Service, &["a/none"])).await;
    assert_eq!(ads.take().await.removed_resources, ["a/none"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_workload_is_refused_with_a_reason() {
    let mesh = Mesh::start(HOUR).await;
    let channel = mesh.proxy_channel("team-a").await;
    let mut ads = Ads::open(channel, "team-a/p", Kind::Workload, &["team-a/other"]).await.unwrap();
    let status = ads.responses.message().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
    assert!(status.message().contains("its own pod's only"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_every_stream_cleanly_and_at_once() {
    let mesh = Mesh::start(HOUR).await;
    mesh.publish(canary(0));
    let mut ads = subscribed(&mesh, "team-a/p").await;
    let start = Instant::now();
    mesh.stop.cancel();
    assert!(
        ads.responses.message().await.unwrap().is_none(),
        "a clean end, so that the proxy reconnects at once"
    );
    drop(ads);
    mesh.control.finished().await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newer_of_two_streams_of_a_node_counts() {
    let mesh = Mesh::start(HOUR).await;
    mesh.publish(canary(0));
    let older = subscribed(&mesh, "team-a/p").await;
    let newer = subscribed(&mesh, "team-a/p").await;
    drop(older);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let status: view::Status = mesh.json("/status").await;
    assert!(status.proxies.len() == 1 && status.proxies[0].connected);
    drop(newer);
}
