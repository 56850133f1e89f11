//! Speaking HTTP with a client: hyper's server over a connection, with the limits of [`Limits`](crate::limits::Limits).

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use penstock_api::Reason;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Sleep;

use crate::age;
use crate::body::ResponseBody;
use crate::coalesce;
use crate::connection::{Connection, To};
use crate::drain::Farewell;
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
        let service = service_fn(move |request: Request<Incoming>| {
            handle(Rc::clone(&client), request.map(ClientBody::Hyper))
        });
        let serving = http2::Builder::new(LocalExecutor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(limits::STREAM_WINDOW)
            .initial_connection_window_size(limits::CONNECTION_WINDOW)
            .max_frame_size(limits::FRAME)
            .max_send_buf_size(limits::SEND_BUFFER)
            .max_concurrent_streams(limits.streams)
            .max_header_list_size(limits.header_bytes)
            .auto_date_header(false)
            .enable_connect_protocol()
            .serve_connection(TokioIo::new(stream), service);
        until_farewell(serving, farewell, old, |serving| serving.graceful_shutdown()).await
    } else {
        let handle = move |request| handle(Rc::clone(&client), request);
        if takes_tensors(&connection) {
            let (gate, claims) = Gate::new(stream, limits::DIRECT);
            http1(gate, claims, limits, farewell, old, handle).await
        } else {
            http1(stream, Claims::none(), limits, farewell, old, handle).await
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
    farewell: Option<Rc<Farewell>>,
    old: Option<Pin<Box<Sleep>>>,
    handle: H,
) -> hyper::Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<ClientBody>) -> F + 'static,
    F: Future<Output = Result<Response<ResponseBody>, Infallible>> + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let (mut parts, body) = request.into_parts();
        let claimed = claims.of(&mut parts.headers);
        let handled = claimed.map(|direct| {
            let body = direct.map_or(ClientBody::Hyper(body), ClientBody::Direct);
            handle(Request::from_parts(parts, body))
        });
        async move { handled?.await.map_err(|never| -> Mismatch { match never {} }) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_time)
        .max_headers(limits.header_count)
        .max_header_size(limits.header_bytes as usize)
        // A client that ends its side has left: what works for it is cancelled, not finished for nobody.
        .half_close(false)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    until_farewell(serving, farewell, old, |serving| serving.graceful_shutdown()).await
}

/// Drives a connection, and has it say farewell once that is due, or it is `old`.
async fn until_farewell<C: Future>(
    serving: C,
    farewell: Option<Rc<Farewell>>,
    mut old: Option<Pin<Box<Sleep>>>,
    say: fn(Pin<&mut C>),
) -> C::Output {
    let mut serving = pin!(serving);
    let mut said = false;
    poll_fn(|cx| {
        if !said
            && (farewell.as_ref().is_some_and(|farewell| farewell.is_due(cx))
                || old.as_mut().is_some_and(|old| old.as_mut().poll(cx).is_ready()))
        {
            said = true;
            say(serving.as_mut());
        }
        serving.as_mut().poll(cx)
    })
    .await
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
