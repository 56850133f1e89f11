//! Connections that rest, on a clock that stands still while anybody has something to do.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadBuf, duplex};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{sleep, timeout};

use super::*;
use crate::drain::Farewells;
use crate::receive::Gate;

const PATIENCE: Duration = Duration::from_secs(10);
const SHORTLY: Duration = Duration::from_secs(3);

/// A server's end that tells into how much room it was read last: a buffer of hyper's, or a byte.
struct Room {
    stream: DuplexStream,
    last: Arc<AtomicUsize>,
}

impl AsyncRead for Room {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.last.store(out.remaining(), Relaxed);
        Pin::new(&mut this.stream).poll_read(cx, out)
    }
}

impl AsyncWrite for Room {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// How a server is to be.
struct Server {
    header_time: Duration,
    /// Its handler takes so long.
    takes: Duration,
    /// Its socket holds so much.
    holds: usize,
    lingers: bool,
    /// Its handler reads bodies; otherwise it answers without.
    reads: bool,
    /// The tensor path's gate is before hyper.
    gated: bool,
}

impl Default for Server {
    fn default() -> Self {
        let (takes, holds) = (Duration::ZERO, 64 << 10);
        Self { header_time: PATIENCE, takes, holds, lingers: false, reads: true, gated: false }
    }
}

struct Client {
    stream: DuplexStream,
    room: Arc<AtomicUsize>,
    farewells: Farewells,
    asked: Rc<RefCell<Vec<String>>>,
    server: JoinHandle<Result<(), Ended>>,
}

impl Client {
    /// Of a server whose handler takes so long, answers with its request's path, over a socket that holds so much.
    fn new(takes: Duration, holds: usize, lingers: bool) -> Self {
        Self::start(Server { takes, holds, lingers, ..Server::default() })
    }

    fn start(server: Server) -> Self {
        let Server { header_time, takes, holds, lingers, reads, gated } = server;
        let (stream, server) = duplex(holds);
        let (room, farewells) = (Arc::<AtomicUsize>::default(), Farewells::default());
        let asked = Rc::<RefCell<Vec<String>>>::default();
        let limits = Limits { header_time, ..Limits::default() };
        let leave = Leave::new(Some(farewells.add()), None, lingers.then(Rc::default));
        let (wire, all) = (Room { stream: server, last: Arc::clone(&room) }, Rc::clone(&asked));
        let server = spawn_local(async move {
            let handle = move |request: Request<ClientBody>| {
                let path = request.uri().path().to_owned();
                let all = Rc::clone(&all);
                async move {
                    let body = match reads {
                        true => request.into_body().collect().await.unwrap().to_bytes(),
                        false => Bytes::new(),
                    };
                    all.borrow_mut().push(format!("{path}{}", String::from_utf8_lossy(&body)));
                    sleep(takes).await;
                    Ok(Response::new(ResponseBody::whole(path)))
                }
            };
            if gated {
                let (gate, claims) = Gate::new(wire, 1 << 20);
                return serve(gate, claims, &limits, leave, || {}, handle).await;
            }
            serve(wire, Claims::none(), &limits, leave, || {}, handle).await
        });
        Self { stream, room, farewells, asked, server }
    }

    fn quick() -> Self {
        Self::new(Duration::ZERO, 64 << 10, false)
    }

    async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// What the server says until it has said `end`, or all that it says.
    async fn hears(&mut self, end: Option<&str>) -> String {
        let mut heard = Vec::new();
        let mut byte = [0];
        while end.is_none_or(|end| !heard.ends_with(end.as_bytes())) {
            let read = timeout(Duration::from_secs(600), self.stream.read(&mut byte)).await;
            if read.expect("the server says no more and stays").unwrap() == 0 {
                break;
            }
            heard.push(byte[0]);
        }
        String::from_utf8(heard).unwrap()
    }

    async fn asks(&mut self, path: &str) -> String {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        self.hears(Some(&format!("\r\n\r\n{path}"))).await
    }

    fn rests(&self) -> bool {
        self.room.load(Relaxed) == 1
    }
}

async fn alone<F: Future>(test: F) -> F::Output {
    LocalSet::new().run_until(test).await
}

#[tokio::test(start_paused = true)]
async fn it_rests_between_requests_and_none_is_lost() {
    alone(async {
        let mut client = Client::quick();
        for path in ["/1", "/2", "/3"] {
            assert!(client.asks(path).await.starts_with("HTTP/1.1 200 OK\r\n"));
            assert!(!client.rests());
            sleep(SHORTLY).await;
            assert!(client.rests(), "after {path}");
        }
        assert_eq!(*client.asked.borrow(), ["/1", "/2", "/3"]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn half_a_head_before_and_after_a_pause_makes_a_request() {
    alone(async {
        let mut client = Client::quick();
        client.send("GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HT").await;
        client.hears(Some("\r\n\r\n/1")).await;
        sleep(SHORTLY).await;
        assert!(!client.rests());
        client.send("TP/1.1\r\nhos").await;
        sleep(SHORTLY).await;
        client.send("t: a\r\n\r\n").await;
        client.hears(Some("\r\n\r\n/2")).await;
        assert!(!client.asks("/3").await.contains("close"));
        assert_eq!(*client.asked.borrow(), ["/1", "/2", "/3"]);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_end_is_answered_in_time() {
    alone(async {
        for (served, gated) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut client = Client::start(Server { gated, ..Server::default() });
            if served {
                client.asks("/").await;
                sleep(SHORTLY).await;
            }
            let begun = Instant::now();
            client.send("GE").await;
            // One byte now and then is no head either.
            let said = loop {
                if let Ok(said) = timeout(Duration::from_secs(1), client.hears(None)).await {
                    break said;
                }
                client.send("T").await;
            };
            assert!(said.starts_with("HTTP/1.1 408 "), "{said:?}");
            assert!(begun.elapsed() <= PATIENCE + SHORTLY, "{:?}", begun.elapsed());
            assert!(matches!(client.server.await.unwrap(), Err(Ended::TooLate(PATIENCE))));
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_rests_too_long_is_closed_without_a_word() {
    alone(async {
        let mut client = Client::quick();
        client.asks("/").await;
        let begun = Instant::now();
        assert_eq!(client.hears(None).await, "");
        assert!(
            begun.elapsed() >= PATIENCE && begun.elapsed() <= PATIENCE + SHORTLY,
            "{:?}",
            begun.elapsed()
        );
        client.server.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_handler_a_body_and_an_answer_have_their_time() {
    alone(async {
        let mut client = Client::new(PATIENCE * 3, 64, false);
        client.send("POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nab").await;
        sleep(PATIENCE * 2).await;
        assert!(!client.rests());
        client.send("cd").await;
        // The answer is there, and larger than what the socket holds.
        sleep(PATIENCE * 2).await;
        assert!(!client.rests());
        assert!(client.hears(Some("\r\n\r\n/slow")).await.starts_with("HTTP/1.1 200 OK\r\n"));
        assert!(!client.asks("/next").await.contains("connection: close"));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_body_that_nobody_read_is_never_taken_for_requests() {
    alone(async {
        let forged = "GET /forged HTTP/1.1\r\nhost: a\r\n\r\n";
        for (tenths, gated) in (0..40).flat_map(|tenths| [(tenths, false), (tenths, true)]) {
            let takes = Duration::from_millis(100 * tenths);
            let mut client = Client::start(Server { takes, reads: false, gated, ..Server::default() });
            let length = 3 * forged.len();
            client.send(&format!("POST /1 HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n")).await;
            // The last part comes when the answer has been given, some answers at the very moment of a look.
            for pause in [0, 250, 4_000] {
                sleep(Duration::from_millis(pause)).await;
                // The server may have closed by now.
                let _ = client.stream.write_all(forged.as_bytes()).await;
            }
            sleep(SHORTLY * 2).await;
            // What stands behind the body is a request, if the connection goes on at all.
            let _ = client.stream.write_all(b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n").await;
            sleep(SHORTLY).await;
            let asked = client.asked.borrow();
            assert!(asked.iter().all(|path| path == "/1" || path == "/next"), "after {takes:?}: {asked:?}");
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_never_asks_is_closed_without_a_word() {
    alone(async {
        for gated in [false, true] {
            let mut client = Client::start(Server { gated, ..Server::default() });
            assert_eq!(client.hears(None).await, "");
            client.server.await.unwrap().unwrap();
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_was_asked_to_become_something_else_and_did_not_goes_on() {
    alone(async {
        let mut client = Client::quick();
        client.send("GET /1 HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await;
        client.hears(Some("\r\n\r\n/1")).await;
        sleep(SHORTLY).await;
        assert!(!client.rests());
        assert!(client.asks("/2").await.starts_with("HTTP/1.1 200 OK\r\n"));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn who_leaves_closes_what_rests() {
    alone(async {
        let mut client = Client::quick();
        client.asks("/").await;
        sleep(SHORTLY).await;
        let begun = Instant::now();
        client.farewells.set_due();
        assert_eq!(client.hears(None).await, "");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn between_sidecars_it_lingers_even_at_rest() {
    alone(async {
        let mut client = Client::new(Duration::ZERO, 64 << 10, true);
        client.asks("/").await;
        sleep(SHORTLY).await;
        client.farewells.set_due();
        sleep(Duration::from_secs(1)).await;
        assert!(client.asks("/late").await.contains("connection: close"));
        assert_eq!(client.hears(None).await, "");
    })
    .await;
}

/// A request by its number: with or without a body, in chunks or not.
fn numbered(number: usize) -> String {
    match number % 3 {
        0 => format!("GET /{number} HTTP/1.1\r\nhost: a\r\n\r\n"),
        1 => format!("POST /{number} HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"),
        _ => format!(
            "PUT /{number} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        ),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 1_000, ..ProptestConfig::default() })]

    /// Wherever a client pauses, and however it puts its requests together, the same ones are heard.
    #[test]
    fn pauses_change_nothing(
        pieces in prop::collection::vec((1..60_usize, 0..2_500_u64), 1..40),
        requests in 1..8_usize,
        gated: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(alone(async {
            let mut client = Client::start(Server { header_time: Duration::from_secs(3_600), gated, ..Server::default() });
            let all: String = (0..requests).map(numbered).collect();
            let mut left = all.as_str();
            for (bytes, pause) in pieces {
                let (piece, behind) = left.split_at(bytes.min(left.len()));
                client.send(piece).await;
                sleep(Duration::from_millis(pause)).await;
                left = behind;
            }
            client.send(left).await;
            client.hears(Some(&format!("\r\n\r\n/{}", requests - 1))).await;
            let body = |number| if number % 3 == 0 { "" } else { "abc" };
            let expected: Vec<_> = (0..requests).map(|number| format!("/{number}{}", body(number))).collect();
            assert_eq!(*client.asked.borrow(), expected);
        }));
    }
}
