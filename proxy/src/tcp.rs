//! Connections whose bytes are not looked at: declared opaque, the application's own TLS, or unknown.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use penstock_api::reason::Blame;
use penstock_api::v1::Direction;
use penstock_api::{Reason, ServiceName, SpiffeId};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::access;
use crate::config::Rule;
use crate::config::static_file::Listener;
use crate::connection::To;
use crate::drain::Drain;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::route;
use crate::send::Choice;
use crate::send::connect::{Connected, Wire, connect};
use crate::splice;
use crate::work::Work;
use crate::worker::Worker;

/// What one direction of a connection may have under way: a full TLS record. It is held as long as the connection is
/// open, so a thousand of them hold 32 MiB.
pub const BUFFER: usize = 16 << 10;

/// A connection of which one side has ended, and over which nothing has passed for this long, holds up no departure.
const ABANDONED: Duration = Duration::from_secs(3);

/// What a connection's bytes come over: a socket, or TLS over one.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// The socket, if nothing is between it and the bytes.
    fn socket(&self) -> Option<&TcpStream> {
        None
    }
}

impl Stream for TcpStream {
    fn socket(&self) -> Option<&TcpStream> {
        Some(self)
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for tokio_rustls::client::TlsStream<T> {}
impl<T: AsyncRead + AsyncWrite + Unpin> Stream for tokio_rustls::server::TlsStream<T> {}
impl<T: hyper::rt::Read + hyper::rt::Write + Unpin> Stream for hyper_util::rt::TokioIo<T> {}

/// Lets bytes pass both ways until both sides are done; an end of one side is passed on to the other. A side that
/// breaks off is named, and counts as the reason why the exchange failed.
pub async fn join<A: Stream, B: Stream>(exchange: &Exchange, client: A, server: B) {
    let (up, down) = (Passed::default(), Passed::default());
    let copied = tokio::select! {
        copied = pass(client, server, &up, &down) => copied,
        () = abandoned(&exchange.worker.shared.drain, &up, &down) => {
            tracing::debug!(server = exchange.whither(), "leaving: one side has ended, and the other is silent");
            Ok(())
        }
    };
    exchange.sent(up.bytes() as usize);
    exchange.received(down.bytes() as usize);
    if let Err(error) = copied {
        let reason = if down.broke.get() { Reason::UpstreamIncomplete } else { Reason::ClientClosed };
        tracing::debug!(server = exchange.whither(), %reason, %error, "a connection broke off");
        exchange.broken(reason);
    }
    exchange.complete();
}

async fn pass<A: Stream, B: Stream>(client: A, server: B, up: &Passed, down: &Passed) -> io::Result<()> {
    if let (Some(client), Some(server)) = (client.socket(), server.socket()) {
        return splice::join(client, server, up, down).await;
    }
    let (mut client, mut server) =
        (Side { stream: client, passed: up }, Side { stream: server, passed: down });
    tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER, BUFFER).await?;
    Ok(())
}

/// Returns once this proxy has to end and nobody needs the connection any more. An application that is gone has ended its
/// side, and a peer that does not care for that would hold up the end of a Job.
async fn abandoned(drain: &Drain, up: &Passed, down: &Passed) {
    let mut ending = drain.ending();
    if ending.wait_for(|ending| *ending).await.is_err() {
        return std::future::pending().await;
    }
    loop {
        let before = (up.bytes(), down.bytes());
        tokio::time::sleep(ABANDONED).await;
        if (up.ended.get() || down.ended.get()) && before == (up.bytes(), down.bytes()) {
            return;
        }
    }
}

/// What came from one side of a joined connection.
#[derive(Debug, Default)]
pub struct Passed {
    read: Cell<u64>,
    ended: Cell<bool>,
    /// An error came from it, rather than from the other side.
    broke: Cell<bool>,
}

impl Passed {
    /// So many bytes have.
    pub fn bytes(&self) -> u64 {
        self.read.get()
    }

    /// So many bytes came at once; 0: it has ended.
    pub fn read(&self, bytes: usize) {
        self.read.set(self.read.get() + bytes as u64);
        self.ended.set(self.ended.get() || bytes == 0);
    }

    /// Notes whether it broke off.
    pub fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        self.broke.set(self.broke.get() || result.is_err());
        result
    }
}

/// One side of a joined connection.
struct Side<'a, S> {
    stream: S,
    passed: &'a Passed,
}

impl<S> Side<'_, S> {
    fn note<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        polled.map(|result| self.passed.note(result))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Side<'_, S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        if polled.is_ready() {
            this.passed.read(buf.filled().len() - before);
        }
        this.note(polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Side<'_, S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write(cx, data);
        this.note(polled)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_flush(cx);
        this.note(polled)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.note(polled)
    }
}

/// Notes a connection that cannot be served. TCP has no way to tell the client why, so the log does.
pub fn refused(listener: &'static str, failure: &Failure) {
    tracing::info!(listener, %failure, "closed a connection");
}

/// Takes a connection of the application where it was going.
pub async fn outbound(
    worker: &Rc<Worker>,
    stream: TcpStream,
    listener: Option<&Listener>,
    original: Option<SocketAddr>,
) {
    let destination = match (listener, original) {
        (Some(listener), _) => Ok(listener.destination.clone()),
        (None, Some(address)) => route::at_address(worker, address).await,
        (None, None) => Err(Failure::unprocessed(
            Reason::BadRequest,
            "bytes that are not HTTP on the outbound listener, with no destination of their own",
        )),
    };
    let exchange = Exchange::begin(worker, Direction::Outbound);
    let result = async {
        let destination = destination?;
        // Routes match requests; a connection goes to its port's own endpoints.
        let port = destination.service.port(destination.port).ok_or_else(|| {
            let story = format!("{} has no port {}", destination.service.name, destination.port);
            Failure::unprocessed(Reason::UnknownPort, story)
        })?;
        forward(&exchange, &port.itself, &destination.service.name, None, stream).await
    };
    finish(&exchange, result.await, "outbound");
}

/// Takes a connection of the mesh to the application.
pub async fn inbound<T>(worker: &Rc<Worker>, stream: T, to: &To, client: Option<&SpiffeId>)
where
    T: Stream,
{
    let exchange = Exchange::begin(worker, Direction::Inbound);
    let result =
        match to.rule().and_then(|rule| access::authorize_bytes(&exchange, to, client).map(|()| rule)) {
            Ok(rule) => {
                let asked = rule.backends[0].cluster.service.clone();
                let result = tokio::select! {
                    biased;
                    failure = access::revoked(worker, to, client) => {
                    exchange.judged("denied");
                    Err(failure)
                }
                    result = forward(&exchange, rule, &asked, client, stream) => result,
                };
                exchange.secured(client.is_some());
                result
            }
            Err(failure) => {
                exchange.keep_connection(client);
                Err(failure)
            }
        };
    finish(&exchange, result, "inbound");
}

fn finish(exchange: &Exchange, result: Result<(), Failure>, listener: &'static str) {
    if let Err(failure) = result {
        exchange.failed(&failure);
        exchange.complete();
        refused(listener, &failure);
    }
}

async fn forward<T>(
    exchange: &Rc<Exchange>,
    rule: &Rule,
    asked: &ServiceName,
    client: Option<&SpiffeId>,
    stream: T,
) -> Result<(), Failure>
where
    T: Stream,
{
    let worker = &exchange.worker;
    let cluster = &rule.backends[0].cluster;
    let policy = cluster.policy();
    exchange.keep_connection(client);
    worker.shared.memory.admit()?;
    crate::send::admit(cluster, &policy)?;
    cluster.budget.request(worker.now());
    let mut tried = Vec::new();
    let server = loop {
        let Choice { endpoint, sent, at, decision, .. } =
            crate::send::pick(worker, cluster, &policy, &Work::one(), &tried)?;
        exchange.goes_to(rule, asked, cluster, &endpoint, sent);
        exchange.explained(decision);
        exchange.secured(endpoint.identity.is_some());
        match connect(worker, &endpoint, Wire::Bytes, policy.connect_timeout).await {
            Ok(server) => {
                endpoint.state.ejection.success();
                break server;
            }
            Err(failure) => {
                let at_fault = failure.reason.blame() == Blame::Upstream;
                if at_fault {
                    endpoint.state.ejection.failure(&policy.outlier, at, worker.now());
                }
                tried.push(endpoint.id);
                let more = tried.len() as u32 <= policy.retry.attempts
                    && cluster.budget.take(policy.budget_percent, worker.now());
                if !more {
                    return Err(failure);
                }
                if at_fault {
                    exchange.try_failed();
                }
            }
        }
    };
    exchange.answered(200);
    exchange.began();
    match server {
        Connected::Plain(server) => join(exchange, stream, server).await,
        Connected::Secured(server) => join(exchange, stream, *server).await,
    }
    Ok(())
}
