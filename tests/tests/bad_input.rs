//! What strangers, broken peers and impatient clients do: each is answered or closed with a named reason, nothing
//! stays in flight, and the next honest request is served.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use penstock_tests::testkit::certificates::{Authority, Leaf};
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::{Proxy, Static, TwoHops, one_hop};
use penstock_tests::testkit::wire::{Message, Wire};
use penstock_tests::testkit::{PATIENCE, wait_until};
use rustls::pki_types::ServerName;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

/// A server's proxy that takes only one account, and what is needed to call it.
struct Guarded {
    proxy: Proxy,
    authority: Authority,
    _origin: Origin,
}

impl Guarded {
    async fn start(args: &[&str]) -> Self {
        let authority = Authority::default();
        let origin = Origin::mirror().await;
        let proxy = Static::new("guarded")
            .identity(&authority.leaf("server"), &authority)
            .listener("http", Some(&["client"]), "application")
            .upstream("application", &[origin.address], "http1", None)
            .args(args)
            .start()
            .await;
        Self { proxy, authority, _origin: origin }
    }

    async fn connect(
        &self,
        authority: &Authority,
        leaf: Option<&Leaf>,
    ) -> std::io::Result<Wire<TlsStream<TcpStream>>> {
        let stream = TcpStream::connect(self.proxy.front()).await?;
        let name = ServerName::try_from("localhost").unwrap();
        Ok(Wire::new(authority.client(leaf, &[b"http/1.1"]).connect(name, stream).await?))
    }

    async fn honest_client_is_served(&self) {
        let leaf = self.authority.leaf("client");
        let answer = self.connect(&self.authority, Some(&leaf)).await.unwrap().ask(GET).await.unwrap();
        assert_eq!(answer.status(), 200, "{}", answer.text());
        self.proxy.is_quiet().await;
    }
}

/// Things that are not HTTP, or that HTTP forbids because a server behind could read them otherwise.
const MALFORMED: [&str; 12] = [
    "\r\n\r\n\r\nnonsense\r\n\r\n",
    "GET / HTTP/9.9\r\nhost: a\r\n\r\n",
    "GET /\r\n\r\n",
    "GET / HTTP/1.1\r\nhost a\r\n\r\n",
    "GET / HTTP/1.1\r\nhost: a\r\nx y: 1\r\n\r\n",
    "GET / HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n",
    "GET / HTTP/1.1\r\nhost: a\r\n folded: 1\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: cow\r\n\r\n",
    "GET / HTTP/1.1\r\n\r\n",
    "GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
];

/// Answered with 400, or the connection closed.
fn assert_refused(bad: &str, answer: std::io::Result<Message>) {
    match answer {
        Ok(answer) => assert_eq!(answer.status(), 400, "{bad:?} got {answer:?}"),
        Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "{bad:?} is not answered"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_requests_are_refused_on_the_outbound_listener() {
    let origin = Origin::mirror().await;
    let proxy = one_hop(origin.address, "http").await;
    for bad in MALFORMED {
        let mut client = proxy.client().await;
        assert_refused(bad, client.ask(bad).await);
    }
    assert!(proxy.metric("penstock_malformed_requests_total", &["outbound"]).await > 0.0);
    proxy.logs("bad-request").await;
    proxy.serves().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_requests_are_refused_on_the_inbound_listener() {
    let guarded = Guarded::start(&[]).await;
    let leaf = guarded.authority.leaf("client");
    for bad in MALFORMED {
        let mut client = guarded.connect(&guarded.authority, Some(&leaf)).await.unwrap();
        assert_refused(bad, client.ask(bad).await);
    }
    assert!(guarded.proxy.metric("penstock_malformed_requests_total", &["inbound"]).await > 0.0);
    guarded.honest_client_is_served().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_http_2_connection_ends_alone() {
    let origin = Origin::mirror().await;
    let proxy = one_hop(origin.address, "http").await;
    let mut client = proxy.client().await;
    // The preface, and then a frame of a type and size that no peer may send first.
    client
        .send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x00\x00\x00\x00\x00\x00garbage")
        .await
        .unwrap();
    timeout(PATIENCE, client.rest()).await.unwrap();
    proxy.serves().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_lengths_never_reach_the_server_as_two_requests() {
    let origin = Origin::mirror().await;
    let hops = TwoHops::start(origin.address, "http").await;
    let smuggled = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n\
                    0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut client = hops.client().await;
    client.send(smuggled).await.unwrap();
    let answer = timeout(PATIENCE, client.response()).await.unwrap();
    if let Ok(answer) = answer
        && answer.status() == 200
    {
        // RFC 9112, 6.3: chunked wins, and the length must not be passed on.
        assert!(!answer.text().contains("content-length: 4"), "{}", answer.text());
    }
    hops.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_identity_is_told_that_it_is_not_authorized() {
    let guarded = Guarded::start(&[]).await;
    let leaf = guarded.authority.leaf("stranger");
    let answer = guarded.connect(&guarded.authority, Some(&leaf)).await.unwrap().ask(GET).await.unwrap();
    assert_eq!((answer.status(), answer.reason()), (403, Some("not-authorized")));
    assert!(answer.text().contains("sa/stranger"), "{}", answer.text());
    guarded.proxy.gave_reason("not-authorized").await;
    guarded.honest_client_is_served().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_a_good_certificate_gets_no_connection() {
    let guarded = Guarded::start(&[]).await;
    let expired = guarded.authority.leaf_until("client", SystemTime::now() - Duration::from_secs(3_600));
    let unknown = Authority::default().leaf("client");
    for (what, leaf) in
        [("none", None), ("expired", Some(&expired)), ("of an unknown authority", Some(&unknown))]
    {
        // With TLS 1.3 the client may learn of the refusal only when it reads.
        let refused = match guarded.connect(&guarded.authority, leaf).await {
            Ok(mut client) => client.ask(GET).await.is_err(),
            Err(_) => true,
        };
        assert!(refused, "a certificate that is {what} was taken");
    }
    wait_until("three handshakes are counted as failed", PATIENCE, async || {
        guarded.proxy.metric("penstock_handshake_failures_total", &["inbound"]).await == 3.0
    })
    .await;
    let said = guarded.proxy.process.said().to_lowercase();
    for word in ["expired", "refused a connection"] {
        assert!(said.contains(word), "the log does not say {word:?}");
    }
    guarded.honest_client_is_served().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_somebody_else_gets_no_request() {
    let authority = Authority::default();
    let origin = Origin::mirror().await;
    let impostor = Static::new("impostor")
        .identity(&authority.leaf("impostor"), &authority)
        .listener("http", Some(&[]), "application")
        .upstream("application", &[origin.address], "same", None)
        .start()
        .await;
    let proxy = Static::new("client-proxy")
        .identity(&authority.leaf("client"), &authority)
        .listener("http", None, "server")
        .upstream("server", &[impostor.front()], "same", Some("server"))
        .start()
        .await;
    let answer = proxy.client().await.ask(GET).await.unwrap();
    assert_eq!((answer.status(), answer.reason()), (503, Some("wrong-identity")), "{}", answer.text());
    assert!(
        answer.text().contains("sa/impostor") && answer.text().contains("sa/server"),
        "{}",
        answer.text()
    );
    assert_eq!(origin.open(), 0);
    proxy.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plaintext_on_a_listener_with_tls_is_refused_in_words() {
    let guarded = Guarded::start(&[]).await;
    let answer = guarded.proxy.client().await.ask(GET).await.unwrap();
    assert_eq!((answer.status(), answer.reason()), (403, Some("plaintext-refused")));
    let mut client = guarded.proxy.client().await;
    client.send(b"\x00\x01\x02\x03 neither TLS nor HTTP\r\n\r\n").await.unwrap();
    timeout(PATIENCE, client.rest()).await.unwrap();
    guarded.proxy.gave_reason("plaintext-refused").await;
    guarded.honest_client_is_served().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_that_breaks_off_is_broken_for_the_client_too_and_named() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ] {
        let origin = Origin::once(answer).await;
        let hops = TwoHops::start(origin.address, "http").await;
        let mut client = hops.client().await;
        let broken = timeout(PATIENCE, client.ask(GET)).await.unwrap();
        assert!(broken.is_err(), "the client took {broken:?} for whole");
        for proxy in [&hops.inbound, &hops.outbound] {
            proxy.gave_reason("upstream-incomplete").await;
            proxy.logs("upstream-incomplete").await;
        }
        hops.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_are_not_http_or_none_at_all_become_a_502_with_the_reason() {
    for (answer, reason) in [("this is not HTTP\r\n\r\n", "upstream-protocol"), ("", "upstream-reset")] {
        let origin = Origin::once(answer).await;
        let hops = TwoHops::start(origin.address, "http").await;
        let told = hops.client().await.ask(GET).await.unwrap();
        assert_eq!((told.status(), told.reason()), (502, Some(reason)), "{}", told.text());
        hops.is_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_listening_becomes_a_503_with_the_reason() {
    let address = Origin::mirror().await.address;
    let proxy = one_hop(address, "http").await;
    let answer = proxy.client().await.ask(GET).await.unwrap();
    assert_eq!((answer.status(), answer.reason()), (503, Some("connect-failed")), "{}", answer.text());
    proxy.is_quiet().await;
    // It counts where it was to go, and not among those that were for nobody.
    proxy.gave_reason("connect-failed").await;
    let nowhere = ["reason=\"connect-failed\"", "service=\"penstock/unrouted\""];
    assert_eq!(proxy.metric("penstock_request_errors_total", &nowhere).await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_client_goes_the_work_behind_is_cancelled() {
    // The server never answers; its connection closes when the proxy gives up.
    let origin = Origin::start(|mut client| async move {
        client.request().await.unwrap();
        let _ = client.io.read_u8().await;
    })
    .await;
    let hops = TwoHops::start(origin.address, "http").await;
    let mut clients = Vec::new();
    for _ in 0..5 {
        let mut client = hops.client().await;
        client.send(GET).await.unwrap();
        clients.push(client);
    }
    wait_until("the server works on all", PATIENCE, async || origin.open() == 5).await;
    drop(clients);
    wait_until("the server has been left", PATIENCE, async || origin.open() == 0).await;
    hops.outbound.gave_reason("client-closed").await;
    hops.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_breaks_off_is_never_taken_for_whole() {
    let (whole, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let origin = Origin::start(move |mut client| {
        let whole = whole.clone();
        async move {
            let _ = whole.send(client.request().await.is_ok());
        }
    })
    .await;
    let hops = TwoHops::start(origin.address, "http").await;
    for start in ["content-length: 100\r\n\r\nhalf", "transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"] {
        let mut client = hops.client().await;
        client.send(format!("POST / HTTP/1.1\r\nhost: a\r\n{start}")).await.unwrap();
        wait_until("the server has the first half", PATIENCE, async || origin.open() == 1).await;
        drop(client);
        assert!(
            !timeout(PATIENCE, seen.recv()).await.unwrap().unwrap(),
            "half a body arrived as a whole one"
        );
        hops.is_quiet().await;
    }
    // The client broke it off, whatever the protocol of the next hop calls that; the server is none the worse.
    hops.outbound.gave_reason("client-closed").await;
    let wrong = hops.outbound.metric("penstock_request_errors_total", &["reason=\"upstream-reset\""]).await;
    assert_eq!(wrong, 0.0, "the server was blamed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_over_the_limit_are_refused_with_431() {
    let origin = Origin::mirror().await;
    let proxy = one_hop(origin.address, "http").await;
    let long = format!("GET / HTTP/1.1\r\nhost: a\r\nx-long: {}\r\n\r\n", "x".repeat(80 << 10));
    let many: String = (0..200).map(|number| format!("x-{number}: 1\r\n")).collect();
    for request in [long, format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n")] {
        let mut client = proxy.client().await;
        // The proxy may close before it has read all.
        let _ = client.send(request).await;
        let answer = timeout(PATIENCE, client.response()).await.unwrap().unwrap();
        assert_eq!(answer.status(), 431);
    }
    proxy.logs("headers-too-large").await;
    proxy.serves().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn huge_headers_of_a_server_do_not_get_through() {
    let huge = format!("HTTP/1.1 200 OK\r\nx-long: {}\r\ncontent-length: 0\r\n\r\n", "x".repeat(1 << 20));
    let origin = Origin::once(huge).await;
    let proxy = one_hop(origin.address, "http").await;
    let answer = timeout(PATIENCE, proxy.client().await.ask(GET)).await.unwrap().unwrap();
    assert_eq!((answer.status(), answer.reason()), (502, Some("upstream-protocol")), "{}", answer.text());
    proxy.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_over_the_limit_is_refused_with_413_whether_its_length_is_said_or_not() {
    let guarded = Guarded::start(&["--max-body", "1000"]).await;
    let leaf = guarded.authority.leaf("client");
    let chunked = format!("transfer-encoding: chunked\r\n\r\n7d0\r\n{}\r\n0\r\n\r\n", "x".repeat(2_000));
    let said = format!("content-length: 2000\r\n\r\n{}", "x".repeat(2_000));
    for body in [said, chunked] {
        let mut client = guarded.connect(&guarded.authority, Some(&leaf)).await.unwrap();
        let _ = client.send(format!("POST / HTTP/1.1\r\nhost: a\r\n{body}")).await;
        let answer = timeout(PATIENCE, client.response()).await.unwrap().unwrap();
        assert_eq!((answer.status(), answer.reason()), (413, Some("body-too-large")), "{}", answer.text());
    }
    guarded.honest_client_is_served().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_headers_do_not_hold_a_connection_for_ever() {
    let origin = Origin::mirror().await;
    let proxy = Static::new("proxy")
        .listener("http", None, "application")
        .upstream("application", &[origin.address], "same", None)
        .args(&["--header-timeout", "1s"])
        .start()
        .await;
    for begin in ["", "GE", "GET / HTTP/1.1\r\nhost: a\r\nx-"] {
        let mut client = proxy.client().await;
        client.send(begin).await.unwrap();
        let answer = timeout(Duration::from_secs(10), client.rest()).await.expect("the connection is held");
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408 "), "{begin:?}: {answer:?}");
    }
    proxy.logs("header-timeout").await;
    proxy.serves().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_over_the_limit_are_refused_and_the_others_served() {
    over_the_limit(200, 50).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_connections_at_a_limit_of_a_thousand() {
    // Ours and the proxy's sockets are counted apart; some room for everything else.
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if files.current.is_some_and(|limit| limit < 11_000) {
        eprintln!("left out: only {:?} files may be open here, 11,000 are needed (ulimit -n)", files.current);
        return;
    }
    over_the_limit(10_000, 1_000).await;
}

async fn over_the_limit(connections: usize, limit: usize) {
    let origin = Origin::mirror().await;
    let proxy = Static::new("proxy")
        .listener("http", None, "application")
        .upstream("application", &[origin.address], "same", None)
        .args(&["--max-connections", &limit.to_string()])
        .start()
        .await;
    proxy.serves().await;
    let (files, memory) = (proxy.process.files(), proxy.process.memory_kib());
    let mut clients = connect_all(proxy.front(), connections).await;
    let refused = (connections - limit) as f64;
    wait_until("all over the limit are refused", PATIENCE, async || {
        proxy.metric("penstock_connections_refused_total", &["outbound"]).await >= refused
    })
    .await;
    // Those that got in were the first.
    let answer = clients[0].ask(GET).await.unwrap();
    assert_eq!(answer.status(), 200);
    let told = clients.last_mut().unwrap().response().await.unwrap();
    assert_eq!((told.status(), told.reason()), (503, Some("too-many-connections")));
    proxy.logs("too-many-connections").await;
    drop(clients);
    wait_until("all sockets are closed", PATIENCE, async || proxy.process.files() <= files + 5).await;
    proxy.serves().await;
    let grown = proxy.process.memory_kib().saturating_sub(memory);
    assert!(grown < 40 << 10, "the proxy has grown by {grown} KiB");
}

async fn connect_all(address: SocketAddr, count: usize) -> Vec<Wire> {
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        all.push(Wire::connect(address).await);
    }
    all
}

/// What stays behind after many bad days is nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_bad_requests_leave_nothing_behind() {
    let origin = Origin::start(|mut client| async move {
        if client.request().await.is_ok_and(|request| request.head.first.starts_with("GET / ")) {
            let _ = client.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        } else {
            let _ = client.send("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this").await;
        }
    })
    .await;
    let hops = TwoHops::start(origin.address, "http").await;
    let round = async || {
        for number in 0..250 {
            let mut client = hops.client().await;
            let _ = match number % 4 {
                0 => client.ask("GET /broken HTTP/1.1\r\nhost: a\r\n\r\n").await,
                1 => client.ask("nonsense\r\n\r\n").await,
                2 => client
                    .send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nx")
                    .await
                    .map(|()| Default::default()),
                _ => client.ask(GET).await,
            };
        }
        hops.is_quiet().await;
    };
    round().await;
    let before =
        [&hops.outbound, &hops.inbound].map(|proxy| (proxy.process.files(), proxy.process.memory_kib()));
    for _ in 0..3 {
        round().await;
    }
    for (proxy, (files, memory)) in [&hops.outbound, &hops.inbound].into_iter().zip(before) {
        wait_until("sockets are closed", PATIENCE, async || proxy.process.files() <= files + 5).await;
        let grown = proxy.process.memory_kib().saturating_sub(memory);
        assert!(grown < 8 << 10, "the proxy has grown by {grown} KiB over 750 bad requests");
    }
}
