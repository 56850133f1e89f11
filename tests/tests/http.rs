//! HTTP and bytes through one proxy and through two: the application and the server see each other as if nothing were
//! between them.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_tests::testkit::PATIENCE;
use penstock_tests::testkit::certificates::spiffe;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::{TwoHops, one_hop};
use penstock_tests::testkit::wire::{Head, Message, Wire};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// Whatever a client is: a direct one, or one behind a proxy.
enum Way {
    One(penstock_tests::testkit::proxy::Proxy),
    Two(TwoHops),
}

impl Way {
    async fn both(origin: &Origin) -> [Self; 2] {
        [
            Self::One(one_hop(origin.address, "http").await),
            Self::Two(TwoHops::start(origin.address, "http").await),
        ]
    }

    async fn client(&self) -> Wire {
        match self {
            Self::One(proxy) => proxy.client().await,
            Self::Two(hops) => hops.client().await,
        }
    }

    async fn is_quiet(&self) {
        match self {
            Self::One(proxy) => proxy.is_quiet().await,
            Self::Two(hops) => hops.is_quiet().await,
        }
    }
}

/// Reads what a mirror said: request line, headers, body.
fn seen(answer: &Message) -> Message {
    let text = answer.text();
    let (head, body) = text.split_once("\n\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let first = lines.next().unwrap().to_owned();
    let headers =
        lines.filter_map(|line| line.split_once(": ")).map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
    Message { head: Head { first, headers }, body: body.as_bytes().to_vec(), trailers: Vec::new() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_carries_many_requests_also_before_the_first_is_answered() {
    let origin = Origin::mirror().await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        for number in 0..5 {
            let answer = client.ask(format!("GET /{number} HTTP/1.1\r\nhost: a\r\n\r\n")).await.unwrap();
            assert_eq!(seen(&answer).head.first, format!("GET /{number} HTTP/1.1"));
        }
        let pipelined: String = (0..5)
            .map(|n| format!("POST /p{n} HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n{n}"))
            .collect();
        client.send(pipelined).await.unwrap();
        for number in 0..5 {
            let request = seen(&client.response().await.unwrap());
            assert_eq!(request.head.first, format!("POST /p{number} HTTP/1.1"));
            assert_eq!(request.body, number.to_string().as_bytes());
        }
        way.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_does_not_wait_for_the_rest_of_the_next_request() {
    let origin = Origin::mirror().await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        let answer = client.ask("GET /one HTTP/1.1\r\nhost: a\r\n\r\nGET /two HT").await.unwrap();
        assert_eq!(seen(&answer).head.first, "GET /one HTTP/1.1");
        let answer = client.ask("TP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!(seen(&answer).head.first, "GET /two HTTP/1.1");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_sees_the_request_as_the_client_wrote_it() {
    let origin = Origin::mirror().await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        let answer = client
            .ask(
                "POST /a%20b//c?x=1&x=2 HTTP/1.1\r\nHost: shop.example:8080\r\nX-Twice: one\r\nX-Other: o\r\n\
                 X-Twice: two\r\nCookie: a=1; b=2\r\nContent-Length: 4\r\n\r\nbody",
            )
            .await
            .unwrap();
        let request = seen(&answer);
        assert_eq!(request.head.first, "POST /a%20b//c?x=1&x=2 HTTP/1.1");
        assert_eq!(request.head.all("host"), ["shop.example:8080"]);
        assert_eq!(request.head.all("x-twice"), ["one", "two"]);
        assert_eq!(request.head.all("cookie"), ["a=1; b=2"]);
        assert_eq!(request.head.all("content-length"), ["4"]);
        assert_eq!(request.head.get("transfer-encoding"), None);
        assert_eq!(request.body, b"body");
        // The host, twice x-twice, x-other, cookie, content-length; between two sidecars the client's identity.
        let ours = matches!(way, Way::Two(_)) as usize;
        assert_eq!(request.head.headers.len(), 6 + ours, "{:#?}", request.head.headers);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_belongs_to_one_hop_or_is_ours_does_not_pass() {
    let origin = Origin::mirror().await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        let answer = client
            .ask(
                "GET / HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, x-private\r\nkeep-alive: timeout=5\r\n\
                 x-private: 1\r\nproxy-connection: keep-alive\r\nte: gzip\r\npenstock-client-id: spiffe://x/ns/a/sa/b\r\n\
                 penstock-protocol: HTTP/1.0\r\npenstock-endpoint: draining\r\nx-public: 1\r\n\r\n",
            )
            .await
            .unwrap();
        let request = seen(&answer);
        for name in
            ["keep-alive", "x-private", "proxy-connection", "te", "penstock-protocol", "penstock-endpoint"]
        {
            assert_eq!(request.head.get(name), None, "{name}");
        }
        assert_eq!(request.head.get("x-public"), Some("1"));
        let proven = spiffe("client");
        let expected = match way {
            Way::One(_) => vec![],
            Way::Two(_) => vec![proven.as_str()],
        };
        assert_eq!(request.head.all("penstock-client-id"), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_absolute_target_names_the_host() {
    let origin = Origin::mirror().await;
    for way in Way::both(&origin).await {
        let answer = way
            .client()
            .await
            .ask("GET http://shop.example/x HTTP/1.1\r\nhost: other\r\n\r\n")
            .await
            .unwrap();
        let request = seen(&answer);
        assert_eq!(request.head.first, "GET /x HTTP/1.1");
        assert_eq!(request.head.all("host"), ["shop.example"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunked_bodies_stay_chunked_both_ways_and_keep_their_trailers() {
    let origin = Origin::start(|mut client| async move {
        while let Ok(request) = client.request().await {
            assert_eq!(request.head.get("transfer-encoding"), Some("chunked"), "{request:?}");
            let trailer = request.trailers.iter().find(|(name, _)| name.eq_ignore_ascii_case("x-sum")).cloned();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n{:x}\r\n{}\r\n0\r\nx-sum: {}\r\n\r\n",
                request.body.len(),
                String::from_utf8_lossy(&request.body),
                trailer.map_or("none".to_owned(), |(_, value)| value)
            );
            client.send(answer).await.unwrap();
        }
    })
    .await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        let answer = client
            .ask(
                "POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
                 5\r\nhello\r\n6\r\n world\r\n0\r\nx-sum: 11\r\n\r\n",
            )
            .await
            .unwrap();
        assert_eq!(answer.head.get("transfer-encoding"), Some("chunked"));
        assert_eq!(answer.text(), "hello world");
        assert_eq!(answer.trailers, [("x-sum".to_owned(), "11".to_owned())]);
        way.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_without_a_body_stay_so() {
    let origin = Origin::start(|mut client| async move {
        while let Ok(request) = client.head().await {
            let answer = match request.first.split(' ').nth(1).unwrap() {
                "/head" => "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n",
                "/204" => "HTTP/1.1 204 No Content\r\nx-a: b\r\n\r\n",
                _ => "HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n",
            };
            client.send(answer).await.unwrap();
        }
    })
    .await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        client.send("HEAD /head HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let head = client.head().await.unwrap();
        assert_eq!((head.status(), head.get("content-length")), (200, Some("1000")));
        let answer = client.ask("GET /204 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!((answer.status(), answer.head.get("x-a")), (204, Some("b")));
        assert_eq!(answer.head.get("content-length"), None);
        let answer = client.ask("GET /304 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!((answer.status(), answer.head.get("etag")), (304, Some("\"x\"")));
        way.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_http_1_0_client_is_answered_and_its_connection_closed() {
    let origin = Origin::mirror().await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        let answer = client.ask("GET /old HTTP/1.0\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(seen(&answer).head.first.starts_with("GET /old HTTP/1."), "{answer:?}");
        assert_eq!(client.rest().await, b"");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_waits_for_100_continue_gets_it_and_sends_its_body() {
    let origin = Origin::mirror().await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        client
            .send("POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
            .await
            .unwrap();
        assert_eq!(client.head().await.unwrap().status(), 100);
        let answer = client.ask("hello").await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.text().ends_with("hello"), "{}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_turns_into_a_two_way_stream_of_bytes() {
    let origin = Origin::start(|mut client| async move {
        let request = client.head().await.unwrap();
        assert_eq!(request.get("upgrade"), Some("websocket"), "{request:?}");
        assert!(request.get("connection").unwrap().eq_ignore_ascii_case("upgrade"));
        assert_eq!(request.get("sec-websocket-key"), Some("k"));
        let agreed = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
        client.send(agreed).await.unwrap();
        while let Ok(bytes) = client.bytes(4).await {
            client.send(bytes).await.unwrap();
        }
    })
    .await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        let answer = client
            .ask("GET /chat HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: k\r\n\r\n")
            .await
            .unwrap();
        assert_eq!((answer.status(), answer.head.get("upgrade")), (101, Some("websocket")));
        for word in ["ping", "pong", "\0\r\n\0"] {
            client.send(word).await.unwrap();
            assert_eq!(client.bytes(4).await.unwrap(), word.as_bytes());
        }
        drop(client);
        way.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connect_opens_a_tunnel_through_two_hops() {
    let origin = Origin::start(|mut client| async move {
        let request = client.head().await.unwrap();
        assert!(request.first.starts_with("CONNECT db.example:5432 "), "{request:?}");
        client.send("HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        while let Ok(bytes) = client.bytes(4).await {
            client.send(bytes).await.unwrap();
        }
    })
    .await;
    let hops = TwoHops::start(origin.address, "http").await;
    let mut client = hops.client().await;
    client.send("CONNECT db.example:5432 HTTP/1.1\r\nhost: db.example:5432\r\n\r\n").await.unwrap();
    assert_eq!(client.head().await.unwrap().status(), 200);
    for word in ["ping", "pong"] {
        client.send(word).await.unwrap();
        assert_eq!(client.bytes(4).await.unwrap(), word.as_bytes());
    }
    drop(client);
    hops.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_sent_events_arrive_one_by_one() {
    const PAUSE: Duration = Duration::from_millis(300);
    let origin = Origin::start(|mut client| async move {
        client.request().await.unwrap();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        client.send(head).await.unwrap();
        for number in 0..4 {
            client.send(format!("9\r\ndata: {number}\n\n\r\n")).await.unwrap();
            tokio::time::sleep(PAUSE).await;
        }
        client.send("0\r\n\r\n").await.unwrap();
    })
    .await;
    for way in Way::both(&origin).await {
        let mut client = way.client().await;
        client.send("GET /events HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!(client.head().await.unwrap().status(), 200);
        let mut arrivals = Vec::new();
        while let Some(event) = client.chunk().await.unwrap() {
            assert_eq!(event, format!("data: {}\n\n", arrivals.len()).into_bytes());
            arrivals.push(Instant::now());
        }
        assert_eq!(arrivals.len(), 4);
        // Had anything been kept back, two would have come together.
        for two in arrivals.windows(2) {
            assert!(two[1] - two[0] > PAUSE / 3, "{:?}", two[1] - two[0]);
        }
        way.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_pass_whole_both_ways() {
    let origin = Origin::mirror().await;
    let body: Vec<u8> = (0..5_000_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    for way in Way::both(&origin).await {
        let client = way.client().await;
        let (mut read, mut write) = tokio::io::split(client.io);
        let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", body.len());
        let sent = [head.as_bytes(), &body].concat();
        let sending = tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut write, &sent).await.unwrap();
            write
        });
        let mut answer = Wire::new(tokio::io::join(&mut read, tokio::io::sink()));
        let answer = answer.response().await.unwrap();
        sending.await.unwrap();
        assert!(answer.body.ends_with(&body));
        way.is_quiet().await;
    }
}

/// What a gRPC server and client need of HTTP/2: frames as they come, trailers after them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_2_streams_and_trailers_pass_two_hops() {
    let listener = tokio::net::TcpListener::bind(penstock_tests::testkit::anywhere()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service =
                hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async move {
                    assert_eq!(request.version(), http::Version::HTTP_2);
                    assert_eq!(request.headers()["te"], "trailers");
                    // Each frame goes back at once; the trailers count them.
                    let body = request.into_body();
                    let frames = futures_util::stream::unfold((body, 0u32), |(mut body, count)| async move {
                        if count == u32::MAX {
                            return None;
                        }
                        match body.frame().await {
                            Some(Ok(frame)) => {
                                // An end of the stream may come as a frame without data.
                                let counts = frame.data_ref().is_some_and(|data| !data.is_empty());
                                Some((Ok::<_, hyper::Error>(frame), (body, count + u32::from(counts))))
                            }
                            _ => {
                                let mut trailers = http::HeaderMap::new();
                                trailers.insert("grpc-status", "0".parse().unwrap());
                                trailers.insert("x-frames", count.to_string().parse().unwrap());
                                Some((Ok(Frame::trailers(trailers)), (body, u32::MAX)))
                            }
                        }
                    });
                    let response = http::Response::builder().header("content-type", "application/grpc");
                    Ok::<_, std::convert::Infallible>(response.body(StreamBody::new(frames)).unwrap())
                });
            let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(serving.serve_connection(TokioIo::new(stream), service));
        }
    });
    let hops = TwoHops::start(address, "http").await;
    let stream = TcpStream::connect(hops.outbound.front()).await.unwrap();
    let (mut client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, std::convert::Infallible>>(1);
    let body = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let request = http::Request::post("http://models.example/a.B/Infer")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap();
    let response = timeout(PATIENCE, client.send_request(request)).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    for word in ["one", "two", "three"] {
        sender.send(Ok(Frame::data(Bytes::from(word)))).await.unwrap();
        let frame = timeout(PATIENCE, body.frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), word);
    }
    drop(sender);
    let trailers = timeout(PATIENCE, body.frame()).await.unwrap().unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(
        (&trailers["grpc-status"], &trailers["x-frames"]),
        (&"0".parse().unwrap(), &"3".parse().unwrap())
    );
    hops.is_quiet().await;
    server.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_2_clients_of_an_http_1_server_are_served_side_by_side() {
    let origin = Origin::named(penstock_tests::testkit::anywhere(), "slow", Duration::from_millis(100)).await;
    let proxy = penstock_tests::testkit::proxy::Static::new("proxy")
        .listener("http", None, "application")
        .upstream("application", &[origin.address], "http1", None)
        .start()
        .await;
    let stream = TcpStream::connect(proxy.front()).await.unwrap();
    let (client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let started = Instant::now();
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let mut client = client.clone();
        asked.spawn(async move {
            let request = http::Request::get("http://a/").body(Full::<Bytes>::default()).unwrap();
            client.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes()
        });
    }
    for answer in asked.join_all().await {
        assert_eq!(answer, "slow");
    }
    // One after another they would take two seconds.
    assert!(started.elapsed() < Duration::from_millis(1_500), "{:?}", started.elapsed());
    proxy.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_pass_as_they_are_and_each_side_may_finish_first() {
    // The server reads to the client's end before it answers, which needs the half-close to travel.
    let origin = Origin::start(|mut client| async move {
        let said = client.rest().await;
        client.send([b"heard ", said.as_slice()].concat()).await.unwrap();
    })
    .await;
    let alone = one_hop(origin.address, "tcp").await;
    let hops = TwoHops::start(origin.address, "tcp").await;
    for front in [alone.front(), hops.outbound.front()] {
        let mut client = Wire::connect(front).await;
        client.send(b"\x00\x01not HTTP\r\n\r\n").await.unwrap();
        client.finish().await;
        assert_eq!(client.rest().await, b"heard \x00\x01not HTTP\r\n\r\n");
    }
    alone.is_quiet().await;
    hops.is_quiet().await;

    // The server speaks first and finishes first.
    let origin = Origin::start(|mut client| async move {
        client.send("220 ready").await.unwrap();
        client.finish().await;
        assert_eq!(client.rest().await, b"thanks");
    })
    .await;
    let hops = TwoHops::start(origin.address, "tcp").await;
    let mut client = hops.client().await;
    assert_eq!(client.rest().await, b"220 ready");
    client.send("thanks").await.unwrap();
    client.finish().await;
    hops.is_quiet().await;
}
