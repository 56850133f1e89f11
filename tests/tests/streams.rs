//! Streams of tokens. A server that streams sends its headers when it has only begun to work: what waits for the first byte of its answer is
//! load all the same. And many streams of many small frames share a connection without disturbing each other.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails here fails the test")]

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;
use penstock_inference::orca::Load;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::wire::Wire;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

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

/// Streams on one connection.
const STREAMS: usize = 100;
/// A token as a server writes it.
const TOKEN: usize = 200;
/// Longer than this no stream waits for its next token while its server writes and its client reads.
const STALL: Duration = Duration::from_secs(10);

/// More than fit into the windows and buffers between a server and a client that does not read: 8 MB.
const MANY: usize = 40_000;

/// Tokens of each; 10,000 with `PENSTOCK_THOROUGH=1`.
fn tokens() -> usize {
    if std::env::var_os("PENSTOCK_THOROUGH").is_some() { 10_000 } else { 1_000 }
}

/// Answers with tokens, one by one, as fast as they are taken.
async fn write(mut respond: h2::server::SendResponse<Bytes>, tokens: usize) {
    let response = http::Response::builder().header("content-type", "text/event-stream").body(()).unwrap();
    let Ok(mut body) = respond.send_response(response, false) else { return };
    let token = Bytes::from(format!("data: {}\n\n", "t".repeat(TOKEN - 8)));
    for _ in 0..tokens {
        body.reserve_capacity(TOKEN);
        while body.capacity() < TOKEN {
            match poll_fn(|cx| body.poll_capacity(cx)).await {
                Some(Ok(_)) => {}
                _ => return,
            }
        }
        if body.send_data(token.clone(), false).is_err() {
            return;
        }
        tokio::task::yield_now().await;
    }
    let _ = body.send_data(Bytes::new(), true);
}

/// A body to its end.
async fn read(mut body: h2::RecvStream) -> usize {
    let mut bytes = 0;
    while let Some(data) = timeout(STALL, body.data()).await.expect("a stream stalls") {
        let length = data.unwrap().len();
        bytes += length;
        body.flow_control().release_capacity(length).unwrap();
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_streams_of_tokens_share_a_connection_beside_one_that_nobody_reads() {
    let mesh = Mesh::default().pod("client", None).service("llm", &[]).pod("a", Some("llm"));
    let _origin = Origin::start_at(mesh.application("a"), |client| async move {
        // The sidecar looks for metrics, too, over HTTP/1.
        let Ok(mut connection) = h2::server::handshake(client.io).await else { return };
        while let Some(Ok((request, respond))) = connection.accept().await {
            // How many stands in the path.
            let tokens = request.uri().path()[1..].parse().unwrap_or_default();
            tokio::spawn(write(respond, tokens));
        }
    })
    .await;
    let mesh = mesh.start().await;
    let stream = TcpStream::connect(mesh.outbound("client")).await.unwrap();
    // A client that does not read a stream needs a window for the connection that holds more than that stream.
    let mut client = h2::client::Builder::new();
    client.initial_window_size(64 << 10).initial_connection_window_size(1 << 20);
    let (mut sender, connection) = client.handshake::<_, Bytes>(stream).await.unwrap();
    let driving = tokio::spawn(connection);
    let mut ask = async |tokens: usize| {
        sender = sender.clone().ready().await.unwrap();
        let request = http::Request::get(format!("http://llm.test/{tokens}")).body(()).unwrap();
        let response = sender.send_request(request, true).unwrap().0.await.unwrap();
        assert_eq!(response.status(), 200, "{response:?}");
        response.into_body()
    };
    let began = tokio::time::Instant::now();
    // It takes what the windows on its way hold, and then its server waits.
    let unread = ask(MANY).await;
    let mut all = JoinSet::new();
    for _ in 0..STREAMS {
        all.spawn(read(ask(tokens()).await));
    }
    while let Some(bytes) = all.join_next().await {
        assert_eq!(bytes.unwrap(), tokens() * TOKEN);
    }
    println!("{STREAMS} streams of {} tokens: {:?}", tokens(), began.elapsed());
    assert_eq!(read(unread).await, MANY * TOKEN);
    // No GOAWAY, no reset: it ends because we are done.
    drop(sender);
    driving.await.unwrap().unwrap();
    for pod in ["client", "a"] {
        assert_eq!(metric(mesh.admin(pod), "penstock_http2_floods_total", &[]).await, 0.0);
    }
}
