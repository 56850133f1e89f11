//! Requests wait in front of an application that is declared to take few at once, and are refused where that helps them.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::wire::Message;
use tokio::time::Instant;

/// A client, and one replica that takes `time` for a request.
async fn slow(time: Duration, rules: &str) -> (Mesh, Origin) {
    // What is refused would be tried elsewhere, and there is no elsewhere.
    let mesh = Mesh::default()
        .pod("client", None)
        .service("shop", &[(annotation::RETRY, "attempts=0")])
        .pod("a", Some("shop"))
        .annotate_pod("a", annotation::ADMISSION, rules);
    let origin = Origin::named(mesh.application("a"), "a", time).await;
    let mesh = mesh.start().await;
    mesh.reaches("client", "shop").await;
    (mesh, origin)
}

/// As many requests at once, each on a connection of its own.
async fn at_once(mesh: &Mesh, count: usize, headers: &str) -> Vec<Message> {
    let request = format!("GET / HTTP/1.1\r\nhost: shop.test\r\n{headers}\r\n");
    let asked = (0..count).map(|_| async {
        let mut client = mesh.client("client").await;
        client.ask(&request).await.unwrap()
    });
    futures_util::future::join_all(asked).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_at_a_time_two_wait_and_the_rest_is_told_when_to_come_back() {
    let (mesh, _origin) = slow(Duration::from_millis(200), "limit=1,queue=2").await;
    let begun = Instant::now();
    let answers = at_once(&mesh, 6, "").await;
    let served = answers.iter().filter(|answer| answer.status() == 200).count();
    assert_eq!(served, 3, "{answers:#?}");
    assert!(begun.elapsed() >= Duration::from_millis(600), "two were served at once");
    for refused in answers.iter().filter(|answer| answer.status() != 200) {
        assert_eq!((refused.status(), refused.reason()), (429, Some("queue-full")), "{refused:?}");
        assert!(refused.head.get("retry-after").is_some_and(|after| after.parse::<u64>().is_ok()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_answered_in_time_is_refused_at_once() {
    let (mesh, _origin) = slow(Duration::from_millis(200), "limit=1,queue=16").await;
    // It learns what a request costs.
    for _ in 0..5 {
        at_once(&mesh, 1, "").await;
    }
    let busy = at_once(&mesh, 5, "");
    let hurried = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let begun = Instant::now();
        let answer = at_once(&mesh, 1, "x-request-timeout: 300ms\r\n").await.remove(0);
        (answer, begun.elapsed())
    };
    let (busy, (answer, took)) = tokio::join!(busy, hurried);
    assert!(busy.iter().all(|answer| answer.status() == 200), "{busy:#?}");
    assert_eq!((answer.status(), answer.reason()), (503, Some("too-late")), "{answer:?}");
    assert!(took < Duration::from_millis(150), "it was told only after {took:?}");
}
