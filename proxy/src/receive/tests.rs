//! hyper behind a gate hears what it would hear without one, whatever comes and however it is cut.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::task::JoinHandle;

use super::{Claims, ClientBody, Direct, Gate};

/// In these tests bodies of so many bytes are held.
const LEAST: u64 = 64;

/// What a handler heard: the request line, its length as the header says it, and its body or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Heard {
    line: String,
    length: Option<String>,
    body: Result<Vec<u8>, &'static str>,
}

/// What handlers do with bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Habit {
    /// Read them, piece by piece.
    Read,
    /// Read those that are held into memory of their own.
    Fill,
    /// Answer without having looked.
    Drop,
}

async fn fill(mut body: Direct) -> Result<Vec<u8>, &'static str> {
    let (mut all, mut at) = (vec![0; body.left() as usize], 0);
    while at < all.len() {
        at += poll_fn(|cx| body.poll_fill(cx, &mut all[at..])).await.map_err(|_| "broken")?;
    }
    Ok(all)
}

async fn hear(habit: Habit, request: Request<ClientBody>) -> Heard {
    let (head, body) = request.into_parts();
    let body = match (habit, body) {
        (Habit::Drop, _) => Ok(Vec::new()),
        (Habit::Fill, ClientBody::Direct(body)) => fill(*body).await,
        (_, body) => body.collect().await.map(|body| body.to_bytes().to_vec()).map_err(|_| "broken"),
    };
    let length = head.headers.get("content-length").map(|length| length.to_str().unwrap().to_owned());
    Heard { line: format!("{} {}", head.method, head.uri), length, body }
}

/// Serves a connection until it ends; what was heard, and how many bodies were held.
async fn serve<T>(stream: T, claims: Claims, habit: Habit) -> (Vec<Heard>, usize)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let heard = Rc::new(RefCell::new((Vec::new(), 0)));
    let (all, claims) = (Rc::clone(&heard), Rc::new(claims));
    let service = service_fn(move |request: Request<Incoming>| {
        let (mut head, body) = request.into_parts();
        let held = claims.of(&mut head.headers).unwrap();
        all.borrow_mut().1 += usize::from(held.is_some());
        let body = held.map_or(ClientBody::Hyper(body, None), |held| ClientBody::Direct(Box::new(held)));
        let (all, claims, number) = (Rc::clone(&all), Rc::clone(&claims), claims.number());
        async move {
            let heard = hear(habit, Request::from_parts(head, body)).await;
            all.borrow_mut().0.push(heard);
            let mut response = Response::new(Empty::<Bytes>::new());
            if claims.ends_with(number) {
                response.headers_mut().insert("connection", http::HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let _ = http1::Builder::new().half_close(false).serve_connection(TokioIo::new(stream), service).await;
    Rc::try_unwrap(heard).unwrap().into_inner()
}

/// A client, and a server that hears it.
fn start(gated: bool, habit: Habit) -> (DuplexStream, JoinHandle<(Vec<Heard>, usize)>) {
    let (client, server) = duplex(1 << 20);
    let server = tokio::task::spawn_local(async move {
        if gated {
            let (gate, claims) = Gate::new(server, LEAST);
            serve(gate, claims, habit).await
        } else {
            serve(server, Claims::none(), habit).await
        }
    });
    (client, server)
}

/// Has everything heard, sent in pieces, and then the end of the connection once all that will be answered is.
async fn hears(bytes: &[u8], cuts: &[usize], gated: bool, habit: Habit) -> (Vec<Heard>, usize) {
    let (mut client, server) = start(gated, habit);
    let (mut rest, mut cuts) = (bytes, cuts.iter().cycle());
    while !rest.is_empty() {
        let at = cuts.next().map_or(rest.len(), |cut| (*cut).clamp(1, rest.len()));
        let (piece, behind) = rest.split_at(at);
        if client.write_all(piece).await.is_err() {
            break;
        }
        rest = behind;
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
    }
    // Time is paused: it goes on when nobody has anything to do any more.
    tokio::time::sleep(Duration::from_millis(1)).await;
    drop(client);
    server.await.unwrap()
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

const INFER: &str = "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: 2\r\n";

fn infer(body: &[u8]) -> Vec<u8> {
    let head = format!("{INFER}content-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

#[derive(Clone, Debug)]
enum Sent {
    Get,
    Small(Vec<u8>),
    Held(Vec<u8>),
    /// Held, and made of what looks like requests.
    Forged(usize),
    Chunked(Vec<u8>),
}

impl Sent {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Get => b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(),
            Self::Small(body) => {
                let head =
                    format!("POST /small HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", body.len());
                [head.as_bytes(), body].concat()
            }
            Self::Held(body) => infer(body),
            Self::Forged(times) => infer(&infer(&[b'x'; 100]).repeat(*times)),
            Self::Chunked(body) => {
                let head = "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: 2\r\n\
                            transfer-encoding: chunked\r\n\r\n";
                let forged = infer(&[b'y'; 100]);
                let (one, two) = (format!("{:x}\r\n", body.len()), format!("\r\n{:x}\r\n", forged.len()));
                [head.as_bytes(), one.as_bytes(), body, two.as_bytes(), &forged, b"\r\n0\r\n\r\n"].concat()
            }
        }
    }
}

fn sent() -> impl Strategy<Value = Sent> {
    let body = |size| prop::collection::vec(any::<u8>(), size);
    prop_oneof![
        2 => Just(Sent::Get),
        2 => body(0..200).prop_map(Sent::Small),
        4 => body(64..9000).prop_map(Sent::Held),
        2 => (1usize..4).prop_map(Sent::Forged),
        1 => body(1..300).prop_map(Sent::Chunked),
    ]
}

/// What heads, bodies, and things that are neither are made of.
fn scraps() -> impl Strategy<Value = Vec<u8>> {
    let scraps: Vec<&[u8]> = vec![
        b"POST /v2/models/m/infer HTTP/1.1\r\n",
        b"POST /v2/models/m/infer HTTP/1.0\r\n",
        b"GET /b HTTP/1.1\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n",
        b"host: a\r\n",
        b"connection: close\r\n",
        b"Content-Length: 64\r\n",
        b"Content-Length: 0064\r\n",
        b"Content-Length: 00\r\n",
        b"content-length: 65\r\n",
        b"content-length: +64\r\n",
        b"content-length : 64\r\n",
        b"content-length: 64, 64\r\n",
        b"content-length:\r\n 64\r\n",
        b"transfer-encoding: chunked\r\n",
        b"transfer-encoding: gzip\r\n",
        b"transfer-encoding:\x0bchunked\r\n",
        b"expect: 100-continue\r\n",
        b"upgrade: x\r\nconnection: upgrade\r\n",
        b"inference-header-content-length: 2\r\n",
        b"inference-header-content-length: 2\n",
        b"\r\n",
        b"\n",
        b"\r",
        b"40\r\n",
        b"0\r\n\r\n",
        &[b'z'; 64],
        &[b'z'; 65],
        b" ",
        b"\0",
    ];
    prop::sample::select(scraps).prop_map(<[u8]>::to_vec)
}

/// Of a body that broke off there is no saying how much was read.
fn whole(heard: Vec<Heard>) -> Vec<Heard> {
    heard.into_iter().filter(|heard| heard.body.is_ok()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn requests_are_heard_as_without_a_gate(
        sent in prop::collection::vec(sent(), 1..8),
        cuts in prop::collection::vec(prop_oneof![1usize..20, 1usize..6000], 1..20),
        habit in prop::sample::select(vec![Habit::Read, Habit::Fill, Habit::Drop]),
    ) {
        let bytes = sent.iter().map(Sent::bytes).collect::<Vec<_>>().concat();
        let (heard, held) = run(hears(&bytes, &cuts, true, habit));
        // Behind a body that is not framed by its length nothing is held.
        let followed = sent.iter().take_while(|sent| !matches!(sent, Sent::Chunked(_)));
        let expected = followed.filter(|sent| matches!(sent, Sent::Held(_) | Sent::Forged(_))).count();
        if habit == Habit::Drop {
            // hyper may close where the rest of a body is not worth its while; the gate never does.
            let follows = !sent.iter().any(|sent| matches!(sent, Sent::Small(_) | Sent::Chunked(_)));
            prop_assert!(!follows || (heard.len(), held) == (sent.len(), expected), "{} of {}", heard.len(), sent.len());
        } else {
            let (without, none) = run(hears(&bytes, &cuts, false, habit));
            prop_assert_eq!(none, 0);
            prop_assert_eq!(&heard, &without);
            prop_assert_eq!((heard.len(), held), (sent.len(), expected));
        }
    }

    #[test]
    fn scraps_are_heard_as_without_a_gate(
        scraps in prop::collection::vec(scraps(), 1..24),
        cuts in prop::collection::vec(1usize..300, 1..6),
    ) {
        let bytes = scraps.concat();
        let (heard, _) = run(hears(&bytes, &cuts, true, Habit::Read));
        let (without, _) = run(hears(&bytes, &cuts, false, Habit::Read));
        prop_assert_eq!(whole(heard), whole(without), "{:?}", String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn likely_scraps_are_heard_as_without_a_gate(
        fields in prop::collection::vec(prop::collection::vec(scraps(), 0..3), 1..4),
        cuts in prop::collection::vec(1usize..300, 1..6),
    ) {
        let request = |more: Vec<Vec<u8>>| {
            [INFER.as_bytes(), b"content-length: 64\r\n", &more.concat(), b"\r\n", &[b'b'; 64]].concat()
        };
        let bytes = fields.into_iter().map(request).collect::<Vec<_>>().concat();
        let (heard, _) = run(hears(&bytes, &cuts, true, Habit::Fill));
        let (without, _) = run(hears(&bytes, &cuts, false, Habit::Read));
        prop_assert_eq!(whole(heard), whole(without), "{:?}", String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn a_client_that_leaves_half_way_ends_the_request() {
    run(async {
        let (mut client, server) = duplex(1 << 16);
        let (gate, claims) = Gate::new(server, LEAST);
        let began = Rc::new(RefCell::new((false, false)));
        let seen = Rc::clone(&began);
        struct Gone(Rc<RefCell<(bool, bool)>>);
        impl Drop for Gone {
            fn drop(&mut self) {
                self.0.borrow_mut().1 = true;
            }
        }
        let service = service_fn(move |request: Request<Incoming>| {
            let (mut head, _) = request.into_parts();
            let body = claims.of(&mut head.headers).unwrap().unwrap();
            let gone = Gone(Rc::clone(&seen));
            async move {
                gone.0.borrow_mut().0 = true;
                assert_eq!(fill(body).await, Err("broken"));
                // Works on for nobody.
                std::future::pending::<()>().await;
                Ok::<_, std::convert::Infallible>(Response::new(Empty::<Bytes>::new()))
            }
        });
        let serving = http1::Builder::new().half_close(false).serve_connection(TokioIo::new(gate), service);
        let serving = tokio::task::spawn_local(serving);
        let whole = infer(&[1; 1000]);
        client.write_all(&whole[..whole.len() - 1]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(*began.borrow(), (true, false));
        drop(client);
        let ended = tokio::time::timeout(Duration::from_secs(5), serving).await.expect("it ends").unwrap();
        assert!(ended.unwrap_err().is_incomplete_message());
        assert_eq!(*began.borrow(), (true, true), "the handler was cancelled");
    });
}

#[test]
fn an_answer_before_the_body_leaves_the_connection_usable() {
    run(async {
        let (mut client, server) = start(true, Habit::Drop);
        let first = infer(&[1; 100_000]);
        client.write_all(&first[..5000]).await.unwrap();
        let mut answer = [0; 15];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
        client.write_all(&first[5000..]).await.unwrap();
        client.write_all(b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        drop(client);
        let (heard, held) = server.await.unwrap();
        assert_eq!(
            heard.iter().map(|heard| heard.line.as_str()).collect::<Vec<_>>(),
            ["POST /v2/models/m/infer", "GET /next"]
        );
        assert_eq!((held, heard[0].length.as_deref()), (1, Some("100000")));
    });
}

/// Writes as fast as it may: how many bytes were taken before the connection was closed, and what was answered.
async fn upload(announced: u64) -> (usize, String, Vec<Heard>) {
    let (client, server) = start(true, Habit::Drop);
    let (mut reading, mut writing) = tokio::io::split(client);
    let head = format!("{INFER}content-length: {announced}\r\n\r\n");
    let writes = async {
        writing.write_all(head.as_bytes()).await.unwrap();
        let (mut taken, piece) = (0_u64, vec![1; 64 << 10]);
        while taken < announced.min(64 << 20) {
            let most = piece.len().min((announced - taken) as usize);
            let Ok(bytes) = writing.write(&piece[..most]).await else { break };
            taken += bytes as u64;
        }
        let _ = writing.shutdown().await;
        taken as usize
    };
    let mut answer = String::new();
    let (taken, _) = tokio::join!(writes, reading.read_to_string(&mut answer));
    (taken, answer, server.await.unwrap().0)
}

#[test]
fn nobody_skips_more_of_a_refused_body_than_was_on_its_way() {
    run(async {
        for announced in [257 << 10, 16 << 20, 999_999_999_999_999_999] {
            let (taken, answer, heard) = upload(announced).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer:?}");
            assert!(answer.contains("connection: close"), "{answer:?}");
            // What the pipe holds, and what came with the head.
            assert!(taken <= (1 << 20) + (8 << 10), "{taken} of {announced}");
            assert_eq!(heard.len(), 1);
        }
        let (taken, answer, _) = upload(256 << 10).await;
        assert_eq!(taken, 256 << 10);
        assert!(!answer.contains("connection: close"), "{answer:?}");
    });
}

#[test]
fn a_body_that_is_still_read_when_hyper_lets_go_ends() {
    run(async {
        let (mut client, server) = duplex(1 << 16);
        let (mut gate, claims) = Gate::new(server, LEAST);
        let whole = infer(&[1; 1000]);
        client.write_all(&whole[..whole.len() - 500]).await.unwrap();
        let mut head = vec![0; whole.len() - 1000];
        gate.read_exact(&mut head).await.unwrap();
        assert!(String::from_utf8_lossy(&head).contains("content-length: 0000\r\n"));
        let mut headers = http::HeaderMap::new();
        headers.insert("content-length", http::HeaderValue::from_static("0000"));
        let body = claims.of(&mut headers).unwrap().unwrap();
        assert_eq!((headers["content-length"].as_bytes(), body.left()), (&b"1000"[..], 1000));
        let reading = tokio::task::spawn_local(fill(body));
        tokio::time::sleep(Duration::from_millis(1)).await;
        drop(gate);
        client.write_all(&[1; 500]).await.unwrap_err();
        drop(client);
        let ended = tokio::time::timeout(Duration::from_secs(5), reading).await.expect("it ends");
        assert_eq!(ended.unwrap(), Err("broken"));
    });
}

#[test]
fn a_body_goes_to_nobody_but_its_own_request() {
    run(async {
        let (mut client, server) = duplex(1 << 16);
        let (mut gate, claims) = Gate::new(server, LEAST);
        let pipelined = [b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(), infer(&[1; 100])].concat();
        client.write_all(&pipelined).await.unwrap();
        let mut heads = vec![0; pipelined.len() - 100];
        gate.read_exact(&mut heads).await.unwrap();
        let headers = |length: &'static str| {
            let mut headers = http::HeaderMap::new();
            headers.insert("content-length", http::HeaderValue::from_static(length));
            headers
        };
        assert!(claims.of(&mut headers("000")).unwrap().is_none(), "it is the second's");
        assert!(claims.of(&mut headers("100")).is_err(), "hyper has read another head than the gate");
        assert!(claims.of(&mut headers("000")).is_err(), "a third is none of it");
    });
}
