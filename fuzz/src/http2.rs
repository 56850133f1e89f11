//! What a client sends over HTTP/2.

use std::cell::RefCell;
use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use penstock_proxy::flood::allowance::{EACH_SECOND, IDLE, RESETS};
use penstock_proxy::flood::frames::{DATA, END_STREAM, HEAD, HEADERS, PING, RST_STREAM, SETTINGS};
use penstock_proxy::flood::{Allowance, Flood, Frames, Guarded, Head};
use penstock_proxy::limits::{self, Limits};
use penstock_proxy::serve;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex, split};
use tokio::time::Instant;

use crate::{choice, pieces, served, within};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes that are sent at most: more than it takes to overdraw any account.
const MOST: usize = 256 << 10;

/// What a client sends has cost and brought, counted without any end.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    idle: u64,
    resets: u64,
    requests: u64,
    bytes: u64,
}

impl Sent {
    fn count(&mut self, head: Head) {
        match head.kind {
            RST_STREAM => self.resets += 1,
            HEADERS => self.requests += 1,
            DATA if head.length > 0 || head.has(END_STREAM) => self.bytes += u64::from(head.length),
            _ => self.idle += 1,
        }
    }

    /// Idle frames that work may have paid for, the answers' among it.
    fn earned(&self, by_answer: u64) -> u64 {
        self.requests * (1 + by_answer) + self.bytes.div_ceil(1024)
    }
}

/// Frames, behind a byte for where they are cut and one for how often they are sent. Their heads are the same however they are cut. A
/// connection is given what work and time bring and nothing else, nobody is cut off before he has overdrawn that, and whoever floods
/// is; nothing that is sent takes more memory than its own size allows.
pub fn http2_entry(data: &[u8]) {
    let (cuts, data) = choice(data);
    let (times, frames) = choice(data);
    let times = (1 + usize::from(times)).min(MOST / frames.len().max(1));
    let sent = [PREFACE, &frames.repeat(times)].concat();
    let heads = heads(&sent[PREFACE.len()..]);
    let (mut follows, mut found) = (Frames::after(PREFACE.len()), Vec::new());
    pieces(&sent, cuts).for_each(|piece| follows.pass(piece, |head| found.push(head)));
    assert_eq!(found, heads, "in pieces");
    overdraws(&heads);

    let mut count = Sent::default();
    heads.iter().for_each(|head| count.count(*head));
    let most = sent.len() * crate::LARGEST + (4 << 20);
    let hears = |cut| within(most, &sent, || served::run(hears(&sent, cut)));
    let in_pieces = hears(Some(cuts));
    in_pieces.check(&count);
    if sent.len() < 16 << 10 {
        let at_once = hears(None);
        at_once.check(&count);
        // Who resets or is cut off races with what he sent before.
        if count.resets == 0 && !at_once.ended && !in_pieces.ended {
            assert_eq!(at_once.requests, in_pieces.requests, "in pieces");
        }
    }
}

/// The heads of frames one after the other (RFC 9113, 4.1).
fn heads(mut bytes: &[u8]) -> Vec<Head> {
    let mut heads = Vec::new();
    while let Some((&[a, b, c, kind, flags, s @ ..], rest)) = bytes.split_first_chunk::<HEAD>() {
        let length = u32::from(a) << 16 | u32::from(b) << 8 | u32::from(c);
        heads.push(Head { length, kind, flags, stream: u32::from_be_bytes(s) & 0x7fff_ffff });
        bytes = rest.get(length as usize..).unwrap_or_default();
    }
    heads
}

/// Draws on an allowance while no time passes, and then for a second.
fn overdraws(heads: &[Head]) {
    let start = Instant::now();
    let (mut allowance, mut sent) = (Allowance::new(1, start), Sent::default());
    for head in heads {
        sent.count(*head);
        match allowance.comes(*head, || start) {
            None => {
                assert!(sent.idle <= u64::from(IDLE) + sent.earned(0), "for nothing: {sent:?}");
                assert!(sent.resets <= u64::from(RESETS), "for nothing: {sent:?}");
            }
            Some(Flood::Idle) => {
                assert!(sent.idle > u64::from(IDLE), "cut off for little: {sent:?}");
                let later = start + Duration::from_secs(1);
                let ping = Head { length: 8, kind: PING, flags: 0, stream: 0 };
                let more = (0..).take_while(|_| allowance.comes(ping, || later).is_none()).count();
                assert!(more <= EACH_SECOND as usize, "{more} in a second");
                return;
            }
            Some(Flood::Resets) => {
                assert!(sent.resets > u64::from(RESETS), "cut off for little: {sent:?}");
                return;
            }
        }
    }
}

/// What became of a connection.
struct Served {
    /// It ended before its client left.
    ended: bool,
    flood: Option<Flood>,
    /// What the handlers heard, as hashes.
    requests: Vec<u64>,
    /// What the client was told.
    told: Vec<u8>,
}

impl Served {
    fn check(&self, sent: &Sent) {
        let Self { ended, flood, told, .. } = self;
        match flood {
            Some(Flood::Idle) => assert!(sent.idle > u64::from(IDLE), "cut off for little: {sent:?}"),
            Some(Flood::Resets) => assert!(sent.resets > u64::from(RESETS), "cut off for little: {sent:?}"),
            None => {}
        }
        assert!(flood.is_none() || *ended, "a flood goes on: {sent:?}");
        // An answer is one frame, and pays for two of its client's and one reset; our own settings for one.
        let floods = sent.idle > u64::from(IDLE) + sent.earned(2) + 1
            || sent.resets > u64::from(RESETS) + sent.requests;
        assert!(!floods || *ended, "a flood goes on: {sent:?}");
        if let Some(first) = heads(told).first() {
            assert_eq!((first.kind, first.stream), (SETTINGS, 0), "RFC 9113, 3.4");
        }
    }
}

async fn hears(sent: &[u8], cut: Option<u8>) -> Served {
    let (client, server) = duplex(64 << 10);
    let (guarded, flood) = Guarded::new(server, 1, Instant::now());
    let limits = Limits::default();
    let requests: Rc<RefCell<Vec<u64>>> = Rc::default();
    let all = Rc::clone(&requests);
    let service = service_fn(move |request: Request<Incoming>| {
        let (head, body) = request.into_parts();
        let size = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>();
        assert!(size <= limits.header_bytes as usize, "headers of {size} bytes");
        let passes = served::passes(&head);
        let mut hasher = DefaultHasher::new();
        (&head.method, &head.uri, passes).hash(&mut hasher);
        head.headers.iter().for_each(|header| header.hash(&mut hasher));
        all.borrow_mut().push(hasher.finish());
        async move {
            let _ = body.collect().await;
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let server = serve::http2_server(&Limits::default(), limits::client_window(1));
    let serving = tokio::task::spawn_local(server.serve_connection(TokioIo::new(guarded), service));
    let (mut reading, mut writing) = split(client);
    let told = tokio::task::spawn_local(async move {
        let mut told = Vec::new();
        let _ = reading.read_to_end(&mut told).await;
        told
    });
    match cut {
        Some(seed) => served::send(&mut writing, pieces(sent, seed), Duration::ZERO).await,
        None => served::send(&mut writing, std::iter::once(sent), Duration::ZERO).await,
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
    let ended = serving.is_finished();
    let _ = writing.shutdown().await;
    let _ = serving.await.unwrap();
    let told = told.await.unwrap();
    Served { ended, flood: flood.get(), requests: requests.take(), told }
}
