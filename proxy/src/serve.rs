//! Speaking HTTP with a client: hyper's server over a connection, with the limits of [`Limits`].

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use penstock_api::{Reason, SpiffeId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep};

use crate::age;
use crate::body::ResponseBody;
use crate::coalesce;
use crate::connection::{Connection, To};
use crate::drain::Farewell;
use crate::flood::{Flood, Guarded};
use crate::limits::{self, Limits};
use crate::local::LocalExecutor;
use crate::receive::gate::Mismatch;
use crate::receive::{Claims, ClientBody, Gate};
use crate::telemetry::metric;

/// Serves requests over a connection until it ends. With `farewell`, the client is asked in the words of its protocol
/// to go elsewhere when this proxy leaves or the connection is old; requests in flight are finished.
pub async fn http<T, H, F>(
    listener: &'static str,
    stream: T,
    http2: bool,
    connection: Rc<Connection>,
    farewell: Option<Rc<Farewell>>,
    handle: H,
) where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Rc<Connection>, Request<ClientBody>) -> F + 'static,
    F: Future<Output = Result<Response<ResponseBody>, Infallible>> + 'static,
{
    let limits = &connection.worker.shared.limits;
    let worker = &connection.worker;
    let age = farewell
        .as_ref()
        .and_then(|_| worker.with_random(|random| age::drawn(worker.shared.limits.connection_age, random)));
    let old = age.map(|age| Box::pin(tokio::time::sleep(age)));
    let client = Rc::clone(&connection);
    let result = if http2 {
        // A sidecar puts the streams of all its callers on one connection.
        let callers = if connection.sidecar { limits::STREAMS } else { 1 };
        let (stream, flood) = Guarded::new(stream, callers, Instant::now());
        let window = limits::client_window(connection.counted.of());
        let service = service_fn(move |request: Request<Incoming>| {
            handle(Rc::clone(&client), request.map(ClientBody::Hyper))
        });
        let serving = http2_server(limits, window).serve_connection(TokioIo::new(stream), service);
        let leave = Leave { farewell, old, lingers: None };
        let result = until_farewell(serving, leave, |serving| serving.graceful_shutdown()).await;
        if let Some(flood) = flood.get() {
            return flooded(listener, &connection, flood);
        }
        result
    } else {
        let handle = move |request| handle(Rc::clone(&client), request);
        let leave = Leave { farewell, old, lingers: connection.sidecar.then(Rc::default) };
        if takes_tensors(&connection) {
            let (gate, claims) = Gate::new(stream, limits::DIRECT);
            http1(gate, claims, limits, leave, handle).await
        } else {
            http1(stream, Claims::none(), limits, leave, handle).await
        }
    };
    if let Err(error) = result {
        ended(listener, &error);
    }
}

/// Whether requests that come over it may share executions, so that large tensors are worth to be taken past hyper.
fn takes_tensors(connection: &Connection) -> bool {
    matches!(connection.to, To::Application(..)) && coalesce::applies(connection.to.port()).is_some()
}

async fn http1<T, H, F>(
    stream: T,
    claims: Claims,
    limits: &Limits,
    leave: Leave,
    handle: H,
) -> hyper::Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<ClientBody>) -> F + 'static,
    F: Future<Output = Result<Response<ResponseBody>, Infallible>> + 'static,
{
    let leaving = leave.lingers.clone().unwrap_or_default();
    let claims = Rc::new(claims);
    let service = service_fn(move |request: Request<Incoming>| {
        let (mut parts, body) = request.into_parts();
        let claimed = claims.of(&mut parts.headers);
        let handled = claimed.map(|direct| {
            let body = direct.map_or(ClientBody::Hyper(body), |direct| ClientBody::Direct(Box::new(direct)));
            handle(Request::from_parts(parts, body))
        });
        let (leaving, claims, number) = (Rc::clone(&leaving), Rc::clone(&claims), claims.number());
        async move {
            let mut response = handled?.await.map_err(|never| -> Mismatch { match never {} })?;
            // What has become something else is nobody's to end.
            if (leaving.get() || claims.ends_with(number)) && !response.headers().contains_key(UPGRADE) {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Mismatch>(response)
        }
    });
    let serving = http1_server(limits).serve_connection(TokioIo::new(stream), service).with_upgrades();
    until_farewell(serving, leave, |serving| serving.graceful_shutdown()).await
}

/// hyper's HTTP/1 server with our limits.
pub fn http1_server(limits: &Limits) -> http1::Builder {
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_time)
        .max_headers(limits.header_count)
        .max_buf_size(limits::READ)
        .max_header_size(limits.header_bytes as usize)
        // A client that ends its side has left: what works for it is cancelled, not finished for nobody.
        .half_close(false)
        .auto_date_header(false);
    server
}

/// hyper's HTTP/2 server with our limits; all streams together may have `window` bytes under way.
pub fn http2_server(limits: &Limits, window: u32) -> http2::Builder<LocalExecutor> {
    let mut server = http2::Builder::new(LocalExecutor);
    server
        .timer(TokioTimer::new())
        .initial_stream_window_size(limits::stream_window(window))
        .initial_connection_window_size(window)
        .max_frame_size(limits::FRAME)
        .max_send_buf_size(limits::SEND_BUFFER)
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(limits.header_bytes)
        .auto_date_header(false)
        .enable_connect_protocol();
    server
}

/// When a connection is to end.
struct Leave {
    farewell: Option<Rc<Farewell>>,
    old: Option<Pin<Box<Sleep>>>,
    /// It rests for a while before it is closed, and what is answered meanwhile says that it will be.
    lingers: Option<Rc<Cell<bool>>>,
}

/// How long a connection between sidecars that carries one request at a time is left open, so that none is lost that was sent before its
/// client has heard: longer than a client keeps one that rests ([`pool`](crate::send::pool)).
const LINGER: Duration = Duration::from_secs(5);

/// Drives a connection, and has it say farewell once that is due, or it is `old`.
async fn until_farewell<C: Future>(serving: C, leave: Leave, say: fn(Pin<&mut C>)) -> C::Output {
    let Leave { farewell, mut old, lingers } = leave;
    let mut serving = pin!(serving);
    let (mut said, mut lingering) = (false, None);
    poll_fn(|cx| {
        if !said
            && (farewell.as_ref().is_some_and(|farewell| farewell.is_due(cx))
                || lingering.is_some()
                || old.as_mut().is_some_and(|old| old.as_mut().poll(cx).is_ready()))
        {
            let wait = lingers.as_ref().map(|lingers| {
                lingers.set(true);
                lingering.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)))
            });
            if wait.is_none_or(|wait| wait.as_mut().poll(cx).is_ready()) {
                said = true;
                say(serving.as_mut());
            }
        }
        serving.as_mut().poll(cx)
    })
    .await
}

/// Says whose connection was closed, and why. The client was told in the words of HTTP/2.
fn flooded(listener: &'static str, client: &Connection, flood: Flood) {
    metrics::counter!(metric::FLOODS.name, "listener" => listener, "kind" => flood.name()).increment(1);
    let peer = client.counted.peer();
    let client = client.client_id().map_or("", SpiffeId::as_str);
    tracing::info!(listener, client, %peer, kind = flood.name(), "closed an HTTP/2 connection: {flood}");
}

/// Names the reason for which hyper closed a connection by itself (it has answered 400, 408 or 431 where HTTP has an
/// answer).
fn ended(listener: &'static str, error: &hyper::Error) {
    let reason = if error.is_parse_too_large() {
        Reason::HeadersTooLarge
    } else if error.is_parse() {
        Reason::BadRequest
    } else if error.is_timeout() {
        Reason::HeaderTimeout
    } else {
        tracing::debug!(listener, %error, "a client's connection ended");
        return;
    };
    metrics::counter!(metric::MALFORMED.name, "listener" => listener).increment(1);
    tracing::info!(listener, %reason, "closed a client's connection: {error}");
}
