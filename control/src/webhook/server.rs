//! The HTTPS that API servers call: handshakes, HTTP/1.1 and HTTP/2, and bounds on all of it.
//!
//! In: TCP connections. Out: each request's answer from `respond`. Anybody in the cluster reaches the port and nobody shows a
//! certificate, so connections, bytes in memory, work at a time and time itself are bounded; where connections run out, the
//! one that has been idle longest makes room.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use metrics::counter;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::Webhook;
use super::certificate::{Certificate, config};
use crate::metric;

/// Connections at once. An API server has a few; there are three of them, or five.
const CONNECTIONS: usize = 512;
/// A client that has not finished its handshake by then is not going to.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A connection without requests lives as long. Longer than the 90 s after which Go's client gives one up, since a request
/// that meets a server's closing fails.
const IDLE: Duration = Duration::from_secs(120);
/// Over HTTP/2 the other end is asked whether it is still there.
const PING: Duration = Duration::from_secs(20);
const PONG: Duration = Duration::from_secs(10);
/// Reviews at once on one connection.
const STREAMS: u32 = 64;
/// What is being answered when control stops has so long.
const GRACE: Duration = Duration::from_secs(4);

/// A connection, as the accepting loop sees it.
#[derive(Debug)]
struct Open {
    state: Mutex<State>,
    /// Ends it once its answers are out.
    end: CancellationToken,
}

#[derive(Debug)]
struct State {
    /// Requests that are being answered; the handshake counts as one.
    busy: usize,
    /// Since when it is as it is.
    since: Instant,
}

impl Open {
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        state.since = Instant::now();
    }

    /// Since when nothing has been asked on it.
    fn idle_since(&self) -> Option<Instant> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.busy == 0 && !self.end.is_cancelled()).then_some(state.since)
    }
}

/// A request, or the handshake, that is going on.
struct Busy(Arc<Open>);

impl Busy {
    fn begin(open: &Arc<Open>) -> Self {
        open.change(|state| state.busy += 1);
        Self(open.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.change(|state| state.busy -= 1);
    }
}

/// Serves until told to stop, then answers what has been asked.
pub(super) async fn serve(
    listener: TcpListener,
    certificate: Certificate,
    webhook: Arc<Webhook>,
    stop: CancellationToken,
) -> Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(config(certificate)?));
    let mut connections = JoinSet::new();
    let mut open: Vec<Weak<Open>> = Vec::new();
    loop {
        if connections.len() >= CONNECTIONS {
            open.retain(|one| one.strong_count() > 0);
            make_room(&open);
            tokio::select! {
                () = stop.cancelled() => break,
                _ = connections.join_next() => continue,
                // Whoever was busy may be idle by now.
                () = tokio::time::sleep(Duration::from_millis(50)) => continue,
            }
        }
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        let (tcp, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: an immediate retry would only spin.
                tracing::warn!("accepting a connection of the webhook failed: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let one = Arc::new(Open {
            state: Mutex::new(State { busy: 0, since: Instant::now() }),
            end: stop.child_token(),
        });
        open.retain(|one| one.strong_count() > 0);
        open.push(Arc::downgrade(&one));
        connections.spawn(connection(tcp, address, acceptor.clone(), webhook.clone(), one));
    }
    drop(listener);
    let rest = async { while connections.join_next().await.is_some() {} };
    if timeout(GRACE, rest).await.is_err() {
        tracing::warn!("the webhook leaves requests unanswered that took longer than {GRACE:?}");
    }
    Ok(())
}

/// Has the connection end that has been idle longest.
fn make_room(open: &[Weak<Open>]) {
    let idle = open.iter().filter_map(Weak::upgrade).filter_map(|one| Some((one.idle_since()?, one)));
    if let Some((_, one)) = idle.min_by_key(|(since, _)| *since) {
        one.end.cancel();
    }
}

async fn connection(
    tcp: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    webhook: Arc<Webhook>,
    open: Arc<Open>,
) {
    let handshake = Busy::begin(&open);
    let tls = match shake(tcp, acceptor).await {
        Ok(tls) => tls,
        Err(error) => {
            counter!(metric::HANDSHAKE_FAILURES.name).increment(1);
            tracing::debug!(%address, "a TLS handshake with the webhook failed: {error}");
            return;
        }
    };
    drop(handshake);
    let h2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
    let end = open.end.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (webhook, busy) = (webhook.clone(), Busy::begin(&open));
        async move {
            let response: Response<Full<Bytes>> = webhook.respond(request).await;
            drop(busy);
            Ok::<_, Infallible>(response)
        }
    });
    // A graceful end waits for the answers that are being made, and for no others.
    macro_rules! run {
        ($connection:expr) => {{
            let mut connection = std::pin::pin!($connection);
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = end.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        }};
    }
    let io = TokioIo::new(tls);
    let ended = if h2 {
        let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .keep_alive_interval(PING)
            .keep_alive_timeout(PONG)
            .max_concurrent_streams(STREAMS);
        run!(http.serve_connection(io, service))
    } else {
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(IDLE);
        run!(http.serve_connection(io, service))
    };
    if let Err(error) = ended {
        tracing::debug!(%address, "a connection of the webhook ended: {error}");
    }
}

async fn shake(tcp: TcpStream, acceptor: TlsAcceptor) -> io::Result<TlsStream<TcpStream>> {
    tcp.set_nodelay(true)?;
    timeout(HANDSHAKE, acceptor.accept(tcp))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client did not finish it in time"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_has_been_idle_longest_makes_room_and_who_is_being_answered_never() {
        let mut all = Vec::new();
        for _ in 0..3 {
            all.push(Arc::new(Open {
                state: Mutex::new(State { busy: 0, since: Instant::now() }),
                end: CancellationToken::new(),
            }));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let weak: Vec<_> = all.iter().map(Arc::downgrade).collect();
        let busy = Busy::begin(&all[0]);
        make_room(&weak);
        let ended = || all.iter().map(|one| one.end.is_cancelled()).collect::<Vec<_>>();
        assert_eq!(ended(), [false, true, false]);
        drop(busy);
        // It has just answered, so the other has been idle longer.
        make_room(&weak);
        assert_eq!(ended(), [false, true, true]);
        make_room(&weak);
        assert_eq!(ended(), [true, true, true]);
    }
}
