//! What is left over: of answers that say more than they may, and of bodies that nobody read to their end. None of it is ever
//! taken for the next answer or the next request.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::one_hop;
use penstock_tests::testkit::wire::{Message, Wire};

/// An answer to each `GET /innocent`, and nothing else.
const INNOCENT: &str = "GET /innocent HTTP/1.1\r\nhost: innocent.test\r\n\r\n";
const FORGED: &str = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged";

fn answer(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Answers what is innocent, and everything else with these bytes.
async fn origin(bad: String) -> Origin {
    Origin::start(move |mut client| {
        let bad = bad.clone();
        async move {
            while let Ok(request) = client.request().await {
                let is_innocent = request.head.first.contains("/innocent");
                let said = if is_innocent { answer("innocent") } else { bad.clone() };
                if client.send(said).await.is_err() {
                    return;
                }
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_says_more_than_it_may_answers_nobody_else() {
    let behind = |head: &str| format!("{head}{FORGED}");
    let answers = [
        ("HEAD", behind("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")),
        ("HEAD", behind("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")),
        ("HEAD", behind("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")),
        ("GET", behind("HTTP/1.1 204 No Content\r\n\r\n")),
        ("GET", behind("HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\nhello")),
        (
            "GET",
            behind("HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
        ),
        ("GET", behind("HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\nhello")),
        ("GET", behind("HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")),
        ("GET", behind("HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n")),
        ("GET", behind(&answer("hello"))),
        ("GET", behind("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")),
        ("GET", behind("HTTP/1.1 101 Switching Protocols\r\n\r\n")),
        ("GET", behind("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: foo\r\n\r\n")),
        ("GET", behind("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!")),
        (
            "GET",
            behind("HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
        ),
        ("GET", behind("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;a\nb\r\nhello\r\n0\r\n\r\n")),
        ("CONNECT", behind("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")),
    ];
    for (method, bad) in answers {
        let origin = origin(bad.clone()).await;
        let proxy = one_hop(origin.address, "http").await;
        for round in 0..3 {
            let mut client = proxy.client().await;
            let target = if method == "CONNECT" { "a:80" } else { "/" };
            client.send(format!("{method} {target} HTTP/1.1\r\nhost: a:80\r\n\r\n")).await.unwrap();
            // Whatever it is told, it is told no more than one answer's worth, and the next is somebody else's.
            let _ = tokio::time::timeout(Duration::from_secs(5), client.head()).await;
            let other = proxy.client().await.ask(INNOCENT).await;
            let other = other.unwrap_or_else(|error| panic!("{bad:?}, {round}: {error}"));
            assert_eq!(other.text(), "innocent", "{bad:?}, {round}: {other:?}");
        }
        proxy.is_quiet().await;
    }
}

/// A body of so many bytes that is made of requests.
fn forged(length: usize) -> Vec<u8> {
    "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n".bytes().cycle().take(length).collect()
}

/// Sends half of a body, waits for the answer that comes before the rest, sends the rest, and asks once more; and so does
/// another client. `None`: the connection was closed meanwhile.
async fn half_and_half(front: std::net::SocketAddr, head: &str, body: &[u8]) -> (Message, Option<Message>) {
    let mut client = Wire::connect(front).await;
    let (first, second) = body.split_at(body.len() / 2);
    client.send([head.as_bytes(), first].concat()).await.unwrap();
    let told = client.response().await.unwrap();
    let _ = client.send(second).await;
    let after = client.ask(INNOCENT).await.ok();
    let other = Wire::connect(front).await.ask(INNOCENT).await.unwrap();
    assert_eq!(other.text(), "innocent", "{other:?}");
    (told, after)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_a_body_is_never_the_next_request() {
    // It answers by the head alone, and then takes what the head says for the body: a proxy that sends another request before all
    // of that loses it.
    let seen = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&seen);
    let hasty = move |mut client: Wire| {
        let seen = Arc::clone(&all);
        async move {
            while let Ok(head) = client.head().await {
                let is_innocent = head.first.contains("/innocent");
                let length = head.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
                seen.lock().unwrap().push(head.first);
                let said = answer(if is_innocent { "innocent" } else { "early" });
                if client.send(said).await.is_err() || client.bytes(length).await.is_err() {
                    return;
                }
            }
        }
    };
    let mesh = Mesh::default().service("model", &[(annotation::BATCH, "max=8")]).pod("a", Some("model"));
    let mesh = mesh.annotate_pod("a", annotation::MTLS, "permissive");
    let application = Origin::start_at(mesh.application("a"), hasty.clone()).await;
    let mesh = mesh.start().await;
    let proxy = one_hop(application.address, "http").await;
    for front in [proxy.front(), mesh.inbound("a")] {
        // Small, above what is read at once, and above what the tensor path skips of a body that nobody wants.
        for length in [600, 60_000, 900_000] {
            for framing in ["length", "refused"] {
                // The second is refused by the proxy itself, which reads no body.
                let host = if framing == "refused" { "host: a\r\nhost: b" } else { "host: a" };
                let head = format!(
                    "POST /v2/models/m/infer HTTP/1.1\r\n{host}\r\ninference-header-content-length: 2\r\ncontent-length: {length}\r\n\r\n"
                );
                let (told, after) = half_and_half(front, &head, &forged(length)).await;
                let expected = if framing == "refused" { 400 } else { 200 };
                assert_eq!(told.status(), expected, "{length}, {framing}: {told:?}");
                if let Some(after) = after {
                    assert_eq!(after.text(), "innocent", "{length}, {framing}: {after:?}");
                }
            }
        }
    }
    let seen = seen.lock().unwrap();
    let smuggled: Vec<_> = seen.iter().filter(|line| line.contains("smuggled")).collect();
    assert!(smuggled.is_empty(), "{smuggled:?}");
}
