//! HTTP/2 clients that send what costs them nothing and a server work: each kind ends with the connection, is counted where it is ours to
//! count, takes no memory, and nobody else notices. The frames are written by hand (RFC 9113, 6).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails here fails the test")]

use std::time::Duration;

use penstock_tests::testkit::PATIENCE;
use penstock_tests::testkit::certificates::Authority;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::{Proxy, Static, one_hop};
use penstock_tests::testkit::wire::Wire;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

const ENHANCE_YOUR_CALM: u32 = 0xb;

/// `GET http://a/` in HPACK: indexed fields, and the authority as a literal (RFC 7541, 6.1 and 6.2.2).
const REQUEST: &[u8] = &[0x82, 0x86, 0x84, 0x01, 0x01, b'a'];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// How a connection ended.
#[derive(Debug)]
struct End {
    /// The code of the GOAWAY that was said, if one was.
    goaway: Option<u32>,
    /// Frames of the flood that were written until then.
    written: u32,
}

/// Reads frames until the connection ends; answers the code of the last GOAWAY.
fn listen(mut reader: OwnedReadHalf) -> JoinHandle<Option<u32>> {
    tokio::spawn(async move {
        let mut goaway = None;
        let mut head = [0; 9];
        while reader.read_exact(&mut head).await.is_ok() {
            let [a, b, c, kind, ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            if reader.read_exact(&mut payload).await.is_err() {
                break;
            }
            if kind == GOAWAY {
                goaway = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
            }
        }
        goaway
    })
}

/// Sends what `first` has, then the frames that `more` makes, a thousand times a thousand at most, until the connection ends.
async fn flood(proxy: &Proxy, first: &[u8], more: impl Fn(u32) -> Vec<u8>) -> End {
    let stream = TcpStream::connect(proxy.front()).await.unwrap();
    let (reader, mut writer) = stream.into_split();
    let listening = listen(reader);
    let mut begin = PREFACE.to_vec();
    begin.extend(frame(SETTINGS, 0, 0, &[]));
    begin.extend(first);
    writer.write_all(&begin).await.unwrap();
    let mut written = 0;
    for round in 0..1_000 {
        let batch: Vec<u8> = (0..1_000).flat_map(|number| more(1_000 * round + number)).collect();
        let sent = timeout(PATIENCE, writer.write_all(&batch)).await;
        if sent.expect("the proxy takes no more, and does not end the connection").is_err() {
            break;
        }
        written += 1_000;
        if listening.is_finished() {
            break;
        }
    }
    let goaway = timeout(PATIENCE, listening).await.expect("the connection is still open").unwrap();
    End { goaway, written }
}

/// The next frame: its type and what it holds; `None`: the connection ended.
async fn next(client: &mut Wire) -> Option<(u8, Vec<u8>)> {
    let head = client.bytes(9).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    Some((head[3], client.bytes(length as usize).await.ok()?))
}

/// Reads frames until one of this kind, which is 0, or a GOAWAY, which is its code; `None`: the connection ended.
async fn until(client: &mut Wire, wanted: u8) -> Option<u32> {
    loop {
        match next(client).await? {
            (GOAWAY, payload) => return Some(u32::from_be_bytes(payload[4..8].try_into().unwrap())),
            (kind, _) if kind == wanted => return Some(0),
            _ => {}
        }
    }
}

/// Streams of a client have odd numbers.
fn stream(number: u32) -> u32 {
    2 * number + 1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_carry_nothing_end_their_connection_and_no_other() {
    let origin = Origin::mirror().await;
    let proxy = one_hop(origin.address, "http").await;
    let mut neighbour = proxy.client().await;
    let open = frame(HEADERS, END_HEADERS, 1, REQUEST);
    let kinds: [(&str, &[u8], Vec<u8>); 6] = [
        ("PING", &[], frame(PING, 0, 0, &[0; 8])),
        ("SETTINGS", &[], frame(SETTINGS, 0, 0, &[])),
        ("PRIORITY", &[], frame(PRIORITY, 0, 3, &[0, 0, 0, 0, 1])),
        ("empty DATA", &open, frame(DATA, 0, 1, &[])),
        ("WINDOW_UPDATE", &[], frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
        ("a type that nobody knows", &[], frame(0xfa, 0, 0, b"x")),
    ];
    let memory = proxy.process.memory_kib();
    for (kind, first, again) in kinds {
        let end = flood(&proxy, first, |_| again.clone()).await;
        // Where each is answered, the socket may be full of answers, and the last word does not get through.
        let unheard = matches!(kind, "PING" | "SETTINGS") && end.goaway.is_none();
        assert!(end.goaway == Some(ENHANCE_YOUR_CALM) || unheard, "{kind}: {end:?}");
        assert!(end.written >= 1_000, "{kind}: {end:?}");
        assert_eq!(neighbour.ask(GET).await.unwrap().status(), 200, "{kind}");
    }
    let counted = proxy.metric("penstock_http2_floods_total", &["outbound", "idle-frames"]).await;
    // That empty DATA has an end is h2's own work.
    assert_eq!(counted, 5.0);
    proxy.logs("closed an HTTP/2 connection: too many frames that carry nothing").await;
    let grown = proxy.process.memory_kib().saturating_sub(memory);
    assert!(grown < 8 << 10, "the proxy has grown by {grown} KiB");
    proxy.serves().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_reset_as_soon_as_they_are_begun_end_their_connection() {
    // It never answers, so none of them is over when it is reset.
    let origin = Origin::start(|mut client| async move {
        while client.request().await.is_ok_and(|request| request.head.first.starts_with("GET /ok")) {
            client.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        }
        let _ = client.rest().await;
    })
    .await;
    let proxy = one_hop(origin.address, "http").await;
    let memory = proxy.process.memory_kib();
    let mut client = proxy.client().await;
    client.send([PREFACE, &frame(SETTINGS, 0, 0, &[])[..]].concat()).await.unwrap();
    let mut reset = 0;
    let goaway = loop {
        // In waves, and a PING that is answered before the streams are reset: h2 itself counts streams that are reset before
        // anybody has looked at them, and these are on their way to the server.
        let wave = |kind: u8, flags: u8, payload: &'static [u8]| {
            (reset..reset + 50)
                .flat_map(move |number| frame(kind, flags, stream(number), payload))
                .collect::<Vec<u8>>()
        };
        let begun = [wave(HEADERS, END_HEADERS | END_STREAM, REQUEST), frame(PING, 0, 0, &[7; 8])].concat();
        if client.send(begun).await.is_err() {
            break None;
        }
        let answered = until(&mut client, PING).await;
        if answered != Some(0) {
            break answered;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        let _ = client.send(wave(RST_STREAM, 0, &[0, 0, 0, 8])).await;
        reset += 50;
    };
    println!("GOAWAY {goaway:?} after {reset} resets");
    assert!((1_000..20_000).contains(&reset), "{reset}");
    assert_eq!(proxy.metric("penstock_http2_floods_total", &["kind=\"resets\""]).await, 1.0);
    proxy.is_quiet().await;
    let answer = proxy.client().await.ask("GET /ok HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    assert_eq!(answer.status(), 200);
    let grown = proxy.process.memory_kib().saturating_sub(memory);
    assert!(grown < 16 << 10, "the proxy has grown by {grown} KiB");
}

/// So it looks when a server has stood still until its clients had enough of waiting: 200 streams of the 256 that it allows are begun and given
/// up in one piece. h2 by itself ends a connection with the 21st of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_given_up_before_anybody_looked_ends_no_connection() {
    let origin = Origin::mirror().await;
    let proxy = one_hop(origin.address, "http").await;
    let mut client = proxy.client().await;
    let mut sent = [PREFACE, &frame(SETTINGS, 0, 0, &[])[..]].concat();
    for number in 0..200 {
        sent.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream(number), REQUEST));
        sent.extend(frame(RST_STREAM, 0, stream(number), &[0, 0, 0, 8]));
    }
    sent.extend(frame(HEADERS, END_HEADERS | END_STREAM, stream(200), REQUEST));
    client.send(sent).await.unwrap();
    assert_eq!(until(&mut client, HEADERS).await, Some(0), "it was told GOAWAY");
}

/// The server is made to reset the streams (CVE-2025-8671): an increment of nothing is an error of the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_we_are_made_to_reset_end_their_connection() {
    let origin = Origin::start(|mut client| async move {
        let _ = client.request().await;
        let _ = client.rest().await;
    })
    .await;
    let proxy = one_hop(origin.address, "http").await;
    let end = flood(&proxy, &[], |number| {
        let mut both = frame(HEADERS, END_HEADERS | END_STREAM, stream(number), REQUEST);
        both.extend(frame(WINDOW_UPDATE, 0, stream(number), &[0; 4]));
        both
    })
    .await;
    assert!(end.goaway.is_some_and(|code| code != 0), "{end:?}");
    assert!(end.written < 20_000, "{end:?}");
    proxy.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn header_sections_without_end_or_of_any_size_take_no_memory() {
    let origin = Origin::mirror().await;
    let proxy = one_hop(origin.address, "http").await;
    let memory = proxy.process.memory_kib();
    let begun = frame(HEADERS, END_STREAM, 1, REQUEST);
    // A new name each time, `x…`, as a literal that is not to be remembered, 1,000 bytes long.
    let mut literal = vec![0x00, 0x01, b'x', 0x7f, 0xe9, 0x06];
    literal.extend([b'v'; 1_000]);
    let kinds: [(&str, &[u8], Vec<u8>); 2] = [
        ("CONTINUATION", &begun, frame(CONTINUATION, 0, 1, &literal)),
        ("empty CONTINUATION", &begun, frame(CONTINUATION, 0, 1, &[])),
    ];
    for (kind, first, again) in kinds {
        let end = flood(&proxy, first, |_| again.clone()).await;
        assert!(end.written < 50_000, "{kind}: {end:?}");
    }
    // What is remembered once (index 62, 4,000 bytes) and meant many times, and crumbs of cookies, each of which is next to nothing on the wire:
    // what counts is what they mean (RFC 9113, 10.5.1). Answered with 431, or refused; never passed on.
    let mut bomb = REQUEST.to_vec();
    bomb.extend([0x40, 0x01, b'b', 0x7f, 0xa1, 0x1e]);
    bomb.extend([b'v'; 4_000]);
    bomb.extend([0xbe; 3_000]);
    let mut crumbs = REQUEST.to_vec();
    crumbs.extend([0x0f, 0x11, 0x00].repeat(5_000));
    for (kind, block) in [("indexed", bomb), ("crumbs", crumbs)] {
        let mut client = proxy.client().await;
        let mut all = PREFACE.to_vec();
        all.extend(frame(SETTINGS, 0, 0, &[]));
        all.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block));
        client.send(&all).await.unwrap();
        let answered = timeout(PATIENCE, answer_of(&mut client)).await.expect(kind);
        assert!(answered.as_ref().is_none_or(|block| !block.contains(&0x88)), "{kind}: {answered:x?}");
    }
    let grown = proxy.process.memory_kib().saturating_sub(memory);
    assert!(grown < 8 << 10, "the proxy has grown by {grown} KiB");
    proxy.serves().await;
}

/// The header section of the answer to stream 1, in HPACK (0x88 is a status of 200); `None`: it was reset, or the connection ended.
async fn answer_of(client: &mut Wire) -> Option<Vec<u8>> {
    loop {
        match next(client).await? {
            (HEADERS, block) => return Some(block),
            (RST_STREAM | GOAWAY, _) => return None,
            _ => {}
        }
    }
}

/// What an honest client does much of is no flood: a large answer, for each 4 KiB of which both windows are opened again (as Go's client does),
/// and after it many that are given up when they have begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_works_hard_is_not_taken_for_a_flood() {
    const LARGE: usize = 48 << 20;
    let origin = Origin::start(|mut client| async move {
        while let Ok(request) = client.request().await {
            let length = if request.head.first.starts_with("GET /large") { LARGE } else { 100_000 };
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
            if client.send(head).await.is_err() || client.send(vec![b'x'; length]).await.is_err() {
                return;
            }
        }
    })
    .await;
    let proxy = Static::new("proxy")
        .listener("http", None, "application")
        .upstream("application", &[origin.address], "http1", None)
        .start()
        .await;
    let mut client = proxy.client().await;
    // `GET /large` in HPACK, with the path as a literal.
    let large = [&[0x82, 0x86, 0x04, 0x06][..], b"/large", &[0x01, 0x01, b'a']].concat();
    let begin =
        [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(HEADERS, END_HEADERS | END_STREAM, 1, &large)].concat();
    client.send(begin).await.unwrap();
    let mut read = 0;
    while read < LARGE {
        let (kind, payload) = next(&mut client).await.unwrap();
        let length = payload.len();
        assert_ne!(kind, GOAWAY, "after {read} bytes");
        if kind == DATA {
            read += length;
            for piece in (0..length).step_by(4 << 10) {
                let opened = u32::try_from((length - piece).min(4 << 10)).unwrap().to_be_bytes();
                let both =
                    [frame(WINDOW_UPDATE, 0, 0, &opened), frame(WINDOW_UPDATE, 0, 1, &opened)].concat();
                client.send(both).await.unwrap();
            }
        }
    }
    for number in 1..2_500 {
        client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream(number), REQUEST)).await.unwrap();
        assert_eq!(until(&mut client, HEADERS).await, Some(0), "stream {number}");
        client.send(frame(RST_STREAM, 0, stream(number), &[0, 0, 0, 8])).await.unwrap();
    }
    assert_eq!(proxy.metric("penstock_http2_floods_total", &[]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_cannot_take_all_connections_of_a_pod() {
    let authority = Authority::default();
    let origin = Origin::mirror().await;
    let proxy = Static::new("guarded")
        .identity(&authority.leaf("server"), &authority)
        .listener("http", Some(&["client"]), "application")
        .upstream("application", &[origin.address], "http1", None)
        .args(&["--peer-connections", "20"])
        .start()
        .await;
    // Loopback has many addresses: the greedy one is 127.0.0.1 (the kernel's choice), another is this.
    let mut greedy = Vec::new();
    for _ in 0..60 {
        greedy.push(Wire::connect(proxy.front()).await);
    }
    let told = timeout(PATIENCE, greedy.last_mut().unwrap().response()).await.unwrap().unwrap();
    assert_eq!((told.status(), told.reason()), (503, Some("too-many-connections")));
    let refused = proxy.metric("penstock_connections_refused_total", &["inbound", "limit=\"peer\""]).await;
    assert_eq!(refused, 40.0);
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.77:0".parse().unwrap()).unwrap();
    let stream = socket.connect(proxy.front()).await.unwrap();
    let leaf = authority.leaf("client");
    let name = ServerName::try_from("localhost").unwrap();
    let secured = authority.client(Some(&leaf), &[b"http/1.1"]).connect(name, stream).await.unwrap();
    let answer = Wire::new(secured).ask(GET).await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stalls_in_its_body_is_at_fault_and_not_the_server() {
    let mut mesh = Mesh::default()
        .service(
            "shop",
            &[
                ("penstock.io/timeout", "idle=400ms"),
                ("penstock.io/outlier", "failures=1,base=1m,ejected=100%"),
            ],
        )
        .pod("client", None)
        .pod("server", Some("shop"));
    mesh = mesh.start().await;
    let origin = Origin::start_at(mesh.application("server"), |mut client| async move {
        while let Ok(request) = client.request().await {
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", request.body.len());
            if client.send(answer + &"x".repeat(request.body.len())).await.is_err() {
                return;
            }
        }
    })
    .await;
    mesh.reaches("client", "shop").await;
    for head in ["content-length: 100\r\n\r\nabc", "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"] {
        let mut client = mesh.client("client").await;
        client.send(format!("POST / HTTP/1.1\r\nhost: shop.test\r\n{head}")).await.unwrap();
        let answer = timeout(Duration::from_secs(5), client.response()).await.unwrap().unwrap();
        assert_eq!((answer.status(), answer.reason()), (408, Some("body-timeout")), "{}", answer.text());
    }
    // One failure would have been enough to eject it.
    let answer = mesh.client("client").await.ask("GET / HTTP/1.1\r\nhost: shop.test\r\n\r\n").await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text());
    drop(origin);
}
