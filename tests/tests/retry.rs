//! What a server provably has not touched is asked of another, without anything being declared: refused streams, and
//! streams above the last that a GOAWAY names (RFC 9113, 8.7 and 6.8).

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_tests::testkit::proxy::{Proxy, Static};
use penstock_tests::testkit::{PATIENCE, anywhere};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// An HTTP/2 server that reads each request to its end and then writes what `answer` makes of the stream's number.
async fn unwilling(answer: fn([u8; 4]) -> Vec<u8>) -> SocketAddr {
    // 1 MiB for each stream, and for all of them together.
    const SETTINGS: [u8; 15] = [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0x10, 0, 0];
    const WINDOW: [u8; 13] = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0];
    let listener = TcpListener::bind(anywhere()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                stream.write_all(&[&SETTINGS[..], &WINDOW].concat()).await.unwrap();
                let mut preface = [0; 24];
                stream.read_exact(&mut preface).await.unwrap();
                // Frames until one of a stream ends it: length, type, flags, stream (RFC 9113, 4.1).
                loop {
                    let mut head = [0; 9];
                    if stream.read_exact(&mut head).await.is_err() {
                        return;
                    }
                    let length =
                        usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
                    let mut rest = vec![0; length];
                    stream.read_exact(&mut rest).await.unwrap();
                    let ends_stream = matches!(head[3], 0 | 1) && head[4] & 1 == 1;
                    // The connection stays open: only the frame says what became of the request.
                    if ends_stream {
                        stream.write_all(&answer([head[5], head[6], head[7], head[8]])).await.unwrap();
                    }
                }
            });
        }
    });
    address
}

/// RST_STREAM with REFUSED_STREAM.
fn refused(stream: [u8; 4]) -> Vec<u8> {
    [&[0, 0, 4, 3, 0][..], &stream, &[0, 0, 0, 7]].concat()
}

/// RST_STREAM with INTERNAL_ERROR.
fn broken(stream: [u8; 4]) -> Vec<u8> {
    [&[0, 0, 4, 3, 0][..], &stream, &[0, 0, 0, 2]].concat()
}

/// GOAWAY with no stream processed and no error.
fn gone(_: [u8; 4]) -> Vec<u8> {
    vec![0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// An HTTP/2 server that sends the body back.
async fn willing() -> SocketAddr {
    let listener = TcpListener::bind(anywhere()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async {
                let body = request.into_body().collect().await?.to_bytes();
                Ok::<_, hyper::Error>(http::Response::new(Full::new(body)))
            });
            let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(serving.serve_connection(TokioIo::new(stream), service));
        }
    });
    address
}

/// Sends `body` so often that each endpoint is the first choice many times; the statuses, and bodies as they came back.
async fn ask(proxy: &Proxy, body: &Bytes, count: usize) -> Vec<(u16, Bytes)> {
    let stream = TcpStream::connect(proxy.front()).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut answers = Vec::new();
    for _ in 0..count {
        let request = http::Request::post("http://models.example/").body(Full::new(body.clone())).unwrap();
        let response = timeout(PATIENCE, client.send_request(request)).await.unwrap().unwrap();
        let status = response.status().as_u16();
        answers.push((status, response.into_body().collect().await.unwrap().to_bytes()));
    }
    answers
}

async fn between(bad: SocketAddr, good: SocketAddr) -> Proxy {
    Static::new("proxy")
        .upstream("servers", &[bad, good], "h2", None)
        .listener("http", None, "servers")
        .start()
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_has_not_touched_goes_to_another() {
    let good = willing().await;
    for (word, answer) in [("refused", refused as fn([u8; 4]) -> Vec<u8>), ("gone", gone)] {
        let proxy = between(unwilling(answer).await, good).await;
        for body in [Bytes::new(), Bytes::from(vec![b'x'; 20_000])] {
            for (status, came_back) in ask(&proxy, &body, 20).await {
                assert_eq!((status, &came_back), (200, &body), "{word}");
            }
        }
        proxy.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_may_have_touched_does_not() {
    let proxy = between(unwilling(broken).await, willing().await).await;
    let answers = ask(&proxy, &Bytes::from_static(b"x"), 20).await;
    let failed = answers.iter().filter(|(status, _)| *status == 502).count();
    assert!(failed > 0, "the first choice was never the bad server in {} requests", answers.len());
    assert!(answers.iter().all(|(status, _)| matches!(status, 200 | 502)));
    proxy.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_outgrew_its_buffer_is_not_sent_again() {
    let proxy = between(unwilling(refused).await, willing().await).await;
    let large = Bytes::from(vec![b'x'; 200_000]);
    let answers = ask(&proxy, &large, 20).await;
    for (status, came_back) in &answers {
        assert!(*status == 502 || (*status == 200 && *came_back == large), "{status}");
    }
    assert!(answers.iter().any(|(status, _)| *status == 502));
    proxy.is_quiet().await;
}

/// nginx and others name their last stream at once when they have had enough of a connection: whatever else was sent on
/// it goes out again on a new one, and the server is none the worse for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goaway_in_the_middle_of_many_streams_loses_none_and_ejects_nobody() {
    let listener = TcpListener::bind(anywhere()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        // The first connection leaves without having served anything.
        let (mut first, _) = listener.accept().await.unwrap();
        first.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        first.write_all(&gone([0; 4])).await.unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|_: http::Request<hyper::body::Incoming>| async {
                Ok::<_, hyper::Error>(http::Response::new(Full::new(Bytes::from_static(b"served"))))
            });
            let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(serving.serve_connection(TokioIo::new(stream), service));
        }
    });
    let proxy = Static::new("proxy")
        .upstream("server", &[address], "h2", None)
        .listener("http", None, "server")
        .start()
        .await;
    let empty = Bytes::new();
    let asked = (0..100).map(|_| ask(&proxy, &empty, 1));
    for answers in futures_util::future::join_all(asked).await {
        assert_eq!(answers, [(200, Bytes::from_static(b"served"))]);
    }
    proxy.is_quiet().await;
}
