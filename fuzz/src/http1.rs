//! What a client sends over HTTP/1.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version, header};
use http_body_util::BodyExt as _;
use penstock_proxy::body::ResponseBody;
use penstock_proxy::drain::Leave;
use penstock_proxy::headers::strip_trailers;
use penstock_proxy::http1::{self, Ended};
use penstock_proxy::limits::Limits;
use penstock_proxy::receive::framing::{self, Framing};
use penstock_proxy::receive::{Claims, ClientBody, Gate};
use tokio::io::{AsyncRead, AsyncWrite, duplex};

use crate::{choice, pieces, served, within};

/// After a pause of this a connection rests, if nothing has been begun.
const REST: Duration = Duration::from_millis(1_100);
/// Bodies of so many bytes are kept from hyper here.
const LEAST: u64 = 64;

/// A request as its handler hears it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Heard {
    method: Method,
    version: Version,
    target: String,
    /// `Content-Length`, without zeros that say nothing.
    lengths: Vec<String>,
    /// `Transfer-Encoding`.
    codings: Vec<String>,
    hosts: usize,
    passes: bool,
    /// `None`: it broke off.
    body: Option<Bytes>,
}

/// A connection's bytes, behind one for where they are cut. However they are cut, and however long a client pauses so that its connection rests,
/// handlers hear the same requests; with the tensor path's gate before hyper the same again; and where the two readers follow a request both, they agree on its body and on where the next one
/// begins. Of two lengths, and of a length beside chunks, neither makes anything.
pub fn http1_entry(data: &[u8]) {
    let (cuts, bytes) = choice(data);
    let most = 2 * bytes.len() * crate::LARGEST + (1 << 20);
    let hears = |cut, pause, gated| within(most, bytes, || served::run(hears(bytes, cut, pause, gated)));
    let at_once = hears(None, Duration::ZERO, false);
    assert_eq!(whole(hears(Some(cuts), Duration::ZERO, false)), whole(at_once.clone()), "in pieces");
    assert_eq!(whole(hears(Some(cuts), REST, cuts & 1 == 0)), whole(at_once.clone()), "with rests");
    assert_eq!(whole(hears(Some(!cuts), Duration::ZERO, true)), whole(at_once.clone()), "behind a gate");
    for heard in &at_once {
        let two = heard.lengths.windows(2).any(|two| two[0] != two[1]);
        assert!(!two, "two lengths: {heard:?}");
        assert!(heard.codings.is_empty() || heard.lengths.is_empty(), "a length beside chunks: {heard:?}");
        assert!(heard.codings.is_empty() || heard.version != Version::HTTP_10, "chunks in 1.0: {heard:?}");
        let codings = heard.codings.join(",").to_ascii_lowercase();
        let chunked = codings.split(',').map(str::trim).filter(|coding| !coding.is_empty());
        assert!(
            !heard.passes || chunked.eq((!codings.is_empty()).then_some("chunked")),
            "coded otherwise: {heard:?}"
        );
        assert!(!heard.passes || heard.hosts <= 1, "two hosts: {heard:?}");
    }
    follow(bytes, &at_once);
}

/// Of a body that broke off there is no saying how much was read, and whether its request was given up before.
fn whole(mut heard: Vec<Heard>) -> Vec<Heard> {
    heard.retain(|heard| heard.body.is_some());
    heard
}

/// Goes from request to request as the tensor path's reader does, beside what hyper has heard.
fn follow(bytes: &[u8], all: &[Heard]) {
    let mut rest = bytes;
    for (number, heard) in all.iter().enumerate() {
        let (head, length) = match framing::of(rest, LEAST) {
            Framing::Plain { head, body } | Framing::Held { head, body, .. } => (head, body),
            Framing::More => panic!("hyper has heard {heard:?} before its head was there"),
            Framing::Other => {
                let (lengths, coded) = said(rest);
                // Nothing that follows is taken for a request, since others could take it for a body.
                assert!(
                    lengths == 0 || !coded || number + 1 == all.len(),
                    "a length beside chunks, and more: {heard:?}"
                );
                return;
            }
        };
        let (lengths, coded) = said(&rest[..head]);
        assert!(lengths <= 1 && !coded, "{lengths} lengths, coded: {coded}");
        let line = String::from_utf8_lossy(&rest[..head]);
        let mut words = line.trim_start().split(' ');
        assert_eq!(words.next(), Some(heard.method.as_str()));
        let target = words.next().unwrap_or_default();
        assert!(
            !target.starts_with('/') || target.split('#').next() == Some(&*heard.target),
            "{target} is {heard:?}"
        );
        let end = usize::try_from(length).ok().and_then(|length| head.checked_add(length));
        let Some(body) = end.and_then(|end| rest.get(head..end)) else {
            assert_eq!(heard.body, None, "{length} bytes are not there");
            return;
        };
        assert_eq!(heard.body.as_deref(), Some(body), "{length} bytes");
        rest = &rest[head + body.len()..];
    }
}

/// How many lengths a head names, and whether it names a coding: line by line, as little as that takes.
fn said(bytes: &[u8]) -> (usize, bool) {
    let lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
    let fields = lines.skip_while(|line| line.is_empty()).take_while(|line| !line.is_empty());
    let (mut lengths, mut coded) = (0, false);
    for name in fields.filter_map(|line| line.split(|byte| *byte == b':').next()) {
        lengths += usize::from(name.eq_ignore_ascii_case(b"content-length"));
        coded |= name.eq_ignore_ascii_case(b"transfer-encoding");
    }
    (lengths, coded)
}

/// What handlers hear of a connection's bytes, in pieces with pauses between them, or at once.
async fn hears(bytes: &[u8], cut: Option<u8>, pause: Duration, gated: bool) -> Vec<Heard> {
    let (mut client, server) = duplex(1 << 20);
    let server = tokio::task::spawn_local(async move {
        if gated {
            let (gate, claims) = Gate::new(server, LEAST);
            serve(gate, claims).await
        } else {
            serve(server, Claims::none()).await
        }
    });
    match cut {
        Some(seed) => served::send(&mut client, pieces(bytes, seed), pause).await,
        None => served::send(&mut client, std::iter::once(bytes), pause).await,
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
    drop(client);
    server.await.unwrap()
}

async fn serve<T>(stream: T, claims: Claims) -> Vec<Heard>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let heard: Rc<RefCell<Vec<Heard>>> = Rc::default();
    let all = Rc::clone(&heard);
    let handle = move |request: Request<ClientBody>| {
        let (head, body) = request.into_parts();
        let text = |name: header::HeaderName| {
            let values = head.headers.get_all(name).iter();
            values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect::<Vec<_>>()
        };
        let lengths = text(header::CONTENT_LENGTH);
        let lengths = lengths.iter().map(|length| length.trim_start_matches('0').to_owned()).collect();
        all.borrow_mut().push(Heard {
            version: head.version,
            target: head.uri.to_string(),
            lengths,
            codings: text(header::TRANSFER_ENCODING),
            hosts: text(header::HOST).len(),
            passes: served::passes(&head),
            body: None,
            method: head.method.clone(),
        });
        let all = Rc::clone(&all);
        async move {
            let at = all.borrow().len() - 1;
            if let Ok(body) = body.collect().await {
                let mut trailers = body.trailers().cloned().unwrap_or_default();
                strip_trailers(&mut trailers);
                let framing = [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::HOST];
                assert!(!framing.iter().any(|name| trailers.contains_key(name)), "{trailers:?}");
                all.borrow_mut()[at].body = Some(body.to_bytes());
            }
            let mut response = Response::new(ResponseBody::empty());
            // 200 to a CONNECT would make a tunnel of what follows.
            if head.method == Method::CONNECT {
                *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
            }
            Ok::<_, Infallible>(response)
        }
    };
    // However long the pauses are, what is wrong is not that they are.
    let limits = Limits { header_time: Duration::from_secs(1 << 20), ..Limits::default() };
    let ended = http1::serve(stream, claims, &limits, Leave::new(None, None, None), || {}, handle).await;
    assert!(!matches!(ended, Err(Ended::TooLate(_))), "a head was waited for in vain");
    heard.take()
}
