//! Large bodies between sidecars: they have connections of their own, and nothing else changes.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::rc::Rc;
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::PATIENCE;
use penstock_tests::testkit::mesh::{Listed, Mesh};
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::wire::{Message, Wire};
use tokio::time::Instant;

/// More than is needed for a lane.
const LARGE: usize = 3 << 20;

/// Bytes that no other seed has, and what a server says of them.
fn body(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at.wrapping_mul(31).wrapping_add(seed * 7 + (at >> 12))) as u8).collect()
}

fn said(body: &[u8]) -> String {
    let sum = body.iter().fold(1_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    format!("{} {sum}", body.len())
}

/// Says what came, and from whom.
async fn server(mesh: &Mesh, pod: &'static str) -> Origin {
    Origin::start_at(mesh.application(pod), move |mut client| async move {
        while let Ok(request) = client.request().await {
            let text = said(&request.body);
            let head =
                format!("HTTP/1.1 200 OK\r\nserver: {pod}\r\ncontent-length: {}\r\n\r\n{text}", text.len());
            if client.send(head).await.is_err() {
                return;
            }
        }
    })
    .await
}

async fn mesh(pods: &[&str]) -> Mesh {
    // Nothing is declared worth a retry, so a request that had begun and broke is seen as failed.
    let care = [(annotation::RETRY, "attempts=2")];
    let mesh = Mesh::default().pod("client", None).service("shop", &care);
    pods.iter().fold(mesh, |mesh, pod| mesh.pod(pod, Some("shop"))).start().await
}

async fn post(wire: &mut Wire, body: &[u8]) -> Message {
    let head = format!("POST /take HTTP/1.1\r\nhost: shop.test\r\ncontent-length: {}\r\n\r\n", body.len());
    wire.ask([head.as_bytes(), body].concat()).await.unwrap()
}

async fn laned(mesh: &Mesh) -> f64 {
    tokio::time::sleep(Duration::from_millis(1200)).await;
    metric(mesh.admin("client"), "penstock_lane_requests_total", &[]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_take_a_lane_and_small_ones_do_not() {
    let mesh = mesh(&["a"]).await;
    let _a = server(&mesh, "a").await;
    mesh.reaches("client", "shop").await;
    let mut wire = mesh.client("client").await;
    for seed in 0..10 {
        let small = body(seed, 100_000);
        assert_eq!(post(&mut wire, &small).await.text(), said(&small));
    }
    assert_eq!(laned(&mesh).await, 0.0);
    for seed in 0..10 {
        let large = body(seed, LARGE + seed);
        let answer = post(&mut wire, &large).await;
        assert_eq!((answer.status(), answer.text()), (200, said(&large)), "{}", answer.text());
    }
    assert_eq!(laned(&mesh).await, 10.0, "all over the lane: one connection of the client is one worker's");
    // A body whose length nobody knows is streamed as ever.
    let large = body(3, LARGE);
    let mut chunked =
        b"POST /take HTTP/1.1\r\nhost: shop.test\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for piece in large.chunks(200_000) {
        chunked.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        chunked.extend_from_slice(piece);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    assert_eq!(wire.ask(chunked).await.unwrap().text(), said(&large));
    assert_eq!(laned(&mesh).await, 10.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_drains_loses_no_large_body() {
    let mut mesh = mesh(&["a", "b"]).await;
    let (_a, b) = (server(&mesh, "a").await, server(&mesh, "b").await);
    mesh.reaches("client", "shop").await;
    let (until, outbound) = (Rc::new(std::cell::Cell::new(None::<Instant>)), mesh.outbound("client"));
    let clients = (0..4_usize).map(|client| {
        let until = Rc::clone(&until);
        async move {
            let (mut wire, large) = (Wire::connect(outbound).await, body(client, LARGE / 2));
            let (expected, mut by) = (said(&large), [0, 0]);
            while until.get().is_none_or(|until| Instant::now() < until) {
                let answer = post(&mut wire, &large).await;
                assert_eq!((answer.status(), answer.text()), (200, expected.clone()), "{}", answer.text());
                by[usize::from(answer.head.get("server") == Some("b"))] += 1;
            }
            by
        }
    });
    let leaving = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        mesh.sidecar("b").terminate();
        mesh.list("b", Listed::Terminating);
        mesh.write();
        let status = mesh.sidecar("b").ended(PATIENCE).await;
        assert!(status.success(), "{status}");
        drop(b);
        mesh.list("b", Listed::Not);
        mesh.write();
        until.set(Some(Instant::now() + Duration::from_secs(2)));
    };
    let (by, ()) = tokio::join!(futures_util::future::join_all(clients), leaving);
    let sum = by.iter().fold([0, 0], |sum, by| [sum[0] + by[0], sum[1] + by[1]]);
    assert!(sum[0] > 0 && sum[1] > 0, "both have served: {sum:?}");
    assert!(laned(&mesh).await > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_requests_pass_while_large_bodies_are_on_their_way() {
    let mesh = mesh(&["a"]).await;
    let _a = server(&mesh, "a").await;
    mesh.reaches("client", "shop").await;
    // Clients that stop in the middle of their bodies keep lanes busy, and more of them than there are lanes.
    let large = body(1, LARGE);
    let mut stuck = Vec::new();
    for _ in 0..24 {
        let mut wire = mesh.client("client").await;
        let head = format!("POST /take HTTP/1.1\r\nhost: shop.test\r\ncontent-length: {LARGE}\r\n\r\n");
        wire.send([head.as_bytes(), &large[..1 << 20]].concat()).await.unwrap();
        stuck.push(wire);
    }
    let mut wire = mesh.client("client").await;
    for seed in 0..20 {
        let small = body(seed, 2000);
        assert_eq!(post(&mut wire, &small).await.text(), said(&small));
    }
    for mut wire in stuck {
        wire.send(&large[1 << 20..]).await.unwrap();
        assert_eq!(wire.response().await.unwrap().text(), said(&large));
    }
    let laned = laned(&mesh).await;
    assert!((8.0..=16.0).contains(&laned), "{laned} over lanes, of which two workers have eight each");
}
