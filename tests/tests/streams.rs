//! A server that streams sends its headers when it has only begun to work. What waits for the first byte of its answer is
//! load all the same.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::time::Duration;

use penstock_inference::orca::Load;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::wire::Wire;

/// From the headers to the first token.
const PREFILL: Duration = Duration::from_millis(200);

const ASK: &str = "POST /v1/chat/completions HTTP/1.1\r\nhost: llm.test\r\ncontent-type: application/json\r\n\
                   endpoint-load-metrics-format: text\r\ncontent-length: 79\r\n\r\n\
                   {\"model\":\"m\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"a question\"}]}";

async fn llm() -> (Mesh, Origin) {
    let mesh = Mesh::default().pod("client", None).service("llm", &[]).pod("a", Some("llm"));
    let origin = Origin::start_at(mesh.application("a"), |mut client| async move {
        while client.request().await.is_ok() {
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            if client.send(head).await.is_err() {
                return;
            }
            tokio::time::sleep(PREFILL).await;
            if client.send("9\r\ndata: 1\n\n\r\n0\r\n\r\n").await.is_err() {
                return;
            }
        }
    });
    let origin = origin.await;
    let mesh = mesh.start().await;
    mesh.reaches("client", "llm").await;
    (mesh, origin)
}

/// Asks, and returns what is reported with the headers.
async fn reported(client: &mut Wire) -> Load {
    client.send(ASK).await.unwrap();
    let head = client.head().await.unwrap();
    let report = head.get("endpoint-load-metrics").unwrap();
    let mut headers = http::HeaderMap::new();
    headers.insert("endpoint-load-metrics", report.parse().unwrap());
    Load::from_headers(&headers).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_its_first_token_is_load_although_the_headers_are_there() {
    let (mesh, _origin) = llm().await;
    // The cost is learned from first tokens, not from headers.
    for _ in 0..3 {
        let mut client = mesh.client("client").await;
        reported(&mut client).await;
        while client.chunk().await.unwrap().is_some() {}
    }
    let (mut first, mut second) = (mesh.client("client").await, mesh.client("client").await);
    reported(&mut first).await;
    let load = reported(&mut second).await;
    assert_eq!(load.in_flight, Some(2.0), "{load:?}");
    let backlog = load.backlog_ms.unwrap();
    assert!(backlog > 0.5 * PREFILL.as_secs_f64() * 1e3, "two prompts are waiting: {load:?}");
}
