//! Speaking HTTP with a client: hyper's server over a connection, with the limits of [`Limits`].

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::rc::Rc;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use penstock_api::{Reason, SpiffeId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::age;
use crate::body::ResponseBody;
use crate::coalesce;
use crate::connection::{Connection, To};
use crate::drain::{Farewell, Leave};
use crate::flood::{Flood, Guarded};
use crate::http1::{self, Ended};
use crate::limits::{self, Limits};
use crate::local::LocalExecutor;
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
            handle(Rc::clone(&client), request.map(|body| ClientBody::Hyper(body, None)))
        });
        let serving = http2_server(limits, window).serve_connection(TokioIo::new(stream), service);
        let mut leave = Leave::new(farewell, old, None);
        // Boxed: it is large, and the other kind of connection is to have no room for it.
        let mut serving = Box::pin(serving);
        let result = poll_fn(|cx| {
            if leave.poll(cx).is_ready() {
                serving.as_mut().graceful_shutdown();
            }
            serving.as_mut().poll(cx)
        })
        .await;
        if let Some(flood) = flood.get() {
            return flooded(listener, &connection, flood);
        }
        result.map_err(Ended::Hyper)
    } else {
        let handle = move |request| handle(Rc::clone(&client), request);
        let leave = Leave::new(farewell, old, connection.sidecar.then(Rc::default));
        let rested = || worker.rested();
        if takes_tensors(&connection) {
            let (gate, claims) = Gate::new(stream, limits::DIRECT);
            http1::serve(gate, claims, limits, leave, rested, handle).await
        } else {
            http1::serve(stream, Claims::none(), limits, leave, rested, handle).await
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
        // Of whoever has been starved or cut off, all that was given up meanwhile comes at once; h2 would end the connection with the 21st,
        // and with it the streams of everybody else. How many come over time, the flood guard bounds.
        .max_pending_accept_reset_streams(limits.streams as usize)
        .max_header_list_size(limits.header_bytes)
        .auto_date_header(false)
        .enable_connect_protocol();
    server
}

/// Says whose connection was closed, and why. The client was told in the words of HTTP/2.
fn flooded(listener: &'static str, client: &Connection, flood: Flood) {
    metrics::counter!(metric::FLOODS.name, "listener" => listener, "kind" => flood.name()).increment(1);
    let peer = client.counted.peer();
    let client = client.client_id().map_or("", SpiffeId::as_str);
    tracing::info!(listener, client, %peer, kind = flood.name(), "closed an HTTP/2 connection: {flood}");
}

/// Names the reason for which a connection was closed by us (it has been answered 400, 408 or 431 where HTTP has an answer).
fn ended(listener: &'static str, ended: &Ended) {
    let reason = match ended {
        Ended::TooLate(_) => Reason::HeaderTimeout,
        Ended::Hyper(error) if error.is_parse_too_large() => Reason::HeadersTooLarge,
        Ended::Hyper(error) if error.is_parse() => Reason::BadRequest,
        Ended::Hyper(error) => {
            tracing::debug!(listener, %error, "a client's connection ended");
            return;
        }
    };
    metrics::counter!(metric::MALFORMED.name, "listener" => listener).increment(1);
    tracing::info!(listener, %reason, "closed a client's connection: {ended}");
}
