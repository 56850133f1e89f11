//! A worker's connections to endpoints.
//!
//! HTTP/1.1 connections carry one request at a time and are lent out; HTTP/2 connections are shared, one to an
//! endpoint until its streams run out. Requests that need a connection while one is being made wait for that one.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ahash::AHashMap;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use penstock_api::Reason;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::connect::{Connected, Wire, connect};
use crate::body::RequestBody;
use crate::config::{Cluster, Endpoint, Policy};
use crate::failure::Failure;
use crate::limits::{self, STREAMS};
use crate::local::LocalExecutor;
use crate::worker::Worker;

/// An idle HTTP/1.1 connection is given up before common servers give it up (uvicorn and Node after 5 s), since a
/// request that crosses their close on the way is lost.
const IDLE: Duration = Duration::from_secs(4);
/// A peer that does not answer a ping for this long is gone.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a connection with streams is pinged.
const PING: Duration = Duration::from_secs(15);

/// All pools of a worker.
#[derive(Debug, Default)]
pub struct Pools {
    by_endpoint: RefCell<AHashMap<u32, Rc<Pool>>>,
}

impl Pools {
    /// The pool of an endpoint.
    pub fn of(&self, endpoint: &Arc<Endpoint>) -> Rc<Pool> {
        let mut pools = self.by_endpoint.borrow_mut();
        Rc::clone(pools.entry(endpoint.id).or_insert_with(|| Rc::new(Pool::new(endpoint))))
    }

    /// Closes what has been idle, and drops the pools of endpoints that nobody else knows any more.
    pub fn tidy(&self) {
        self.by_endpoint.borrow_mut().retain(|_, pool| {
            pool.idle.borrow_mut().retain(|idle| idle.since.elapsed() < IDLE && !idle.sender.is_closed());
            // Load gathers on the first; of the others those that nothing is left on can go.
            let mut first = true;
            pool.shared.borrow_mut().retain(|shared| {
                let stays = std::mem::take(&mut first) || shared.streams.get() > 0;
                stays && !shared.sender.is_closed()
            });
            let known = pool.endpoint.strong_count() > 0;
            if !known {
                // A connection lives as long as it could be asked again, and keeps its pool alive: let go of both.
                pool.idle.borrow_mut().clear();
                pool.shared.borrow_mut().retain(|shared| shared.streams.get() > 0);
            }
            known || pool.open.get() > 0
        });
    }
}

/// Connections to one endpoint.
#[derive(Debug)]
pub struct Pool {
    /// Weak, since every worker has a pool of it: none of them keeps an endpoint alive that control has dropped.
    endpoint: Weak<Endpoint>,
    /// Its name and address, for errors.
    whither: Rc<str>,
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<SharedConnection>>,
    /// Connections that are open or being made.
    open: Cell<u32>,
    connecting: Cell<bool>,
    /// Why the last attempt at a shared connection failed.
    failure: RefCell<Option<Failure>>,
    /// A connection was made, given back, or failed.
    changed: Notify,
}

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<RequestBody>,
    since: Instant,
}

#[derive(Debug)]
struct SharedConnection {
    sender: http2::SendRequest<RequestBody>,
    streams: Rc<Cell<u32>>,
    /// Streams that it takes, as the peer last said.
    limit: Rc<Cell<u32>>,
}

/// What a request holds of a connection until its response ends.
#[derive(Debug)]
pub enum Lease {
    /// The connection itself; it goes back to the pool.
    Http1(Option<http1::SendRequest<RequestBody>>, Rc<Pool>),
    /// A stream.
    Http2(Rc<Cell<u32>>),
    /// A connection that no other request will use.
    Own,
}

impl Drop for Lease {
    fn drop(&mut self) {
        match self {
            Self::Http1(sender, pool) => {
                if let Some(sender) = sender.take().filter(|sender| !sender.is_closed()) {
                    pool.idle.borrow_mut().push(Idle { sender, since: Instant::now() });
                    pool.changed.notify_one();
                }
            }
            Self::Http2(streams) => streams.set(streams.get() - 1),
            Self::Own => {}
        }
    }
}

impl Pool {
    fn new(endpoint: &Arc<Endpoint>) -> Self {
        Self {
            endpoint: Arc::downgrade(endpoint),
            whither: format!("{} at {}", endpoint.name, endpoint.address).into(),
            idle: RefCell::default(),
            shared: RefCell::default(),
            open: Cell::new(0),
            connecting: Cell::new(false),
            failure: RefCell::default(),
            changed: Notify::new(),
        }
    }

    /// An HTTP/1.1 connection for one request. The common case, an idle one, is decided at once; making one is a large
    /// future and rare, so it is boxed to keep every request's own future small.
    pub async fn http1(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        endpoint: &Arc<Endpoint>,
        cluster: &Cluster,
        policy: &Policy,
    ) -> Result<http1::SendRequest<RequestBody>, Failure> {
        match self.take_idle() {
            Some(sender) => Ok(sender),
            None => Box::pin(self.make_http1(worker, endpoint, cluster, policy)).await,
        }
    }

    async fn make_http1(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        endpoint: &Arc<Endpoint>,
        cluster: &Cluster,
        policy: &Policy,
    ) -> Result<http1::SendRequest<RequestBody>, Failure> {
        loop {
            if let Some(sender) = self.take_idle() {
                return Ok(sender);
            }
            if self.open.get() < policy.max_connections {
                break;
            }
            let _waiting = Waiting::new(cluster, policy)?;
            // One that was just given back takes the next request as soon as its own task has run.
            let soon = self.idle.borrow_mut().pop();
            match soon {
                Some(Idle { mut sender, since }) => {
                    let ready = tokio::select! {
                        ready = sender.ready() => Some(ready.is_ok()),
                        () = self.changed.notified() => None,
                    };
                    match ready {
                        Some(true) => return Ok(sender),
                        Some(false) => {}
                        // Its last request's body is still on its way; another connection has become free.
                        None => self.idle.borrow_mut().insert(0, Idle { sender, since }),
                    }
                }
                None => self.changed.notified().await,
            }
        }
        let (open, _waiting) = (Open::new(self), Waiting::new(cluster, policy)?);
        match connect(worker, endpoint, Wire::Http1, policy.connect_timeout).await? {
            Connected::Plain(stream) => handshake1(stream, open).await,
            Connected::Secured(stream) => handshake1(*stream, open).await,
        }
    }

    fn take_idle(&self) -> Option<http1::SendRequest<RequestBody>> {
        let mut idle = self.idle.borrow_mut();
        // The one used last is the one least likely to be closed by the server, and lets the others grow old.
        let mut i = idle.len();
        while i > 0 {
            i -= 1;
            if idle[i].sender.is_closed() || idle[i].since.elapsed() >= IDLE {
                idle.swap_remove(i);
            } else if idle[i].sender.is_ready() {
                return Some(idle.swap_remove(i).sender);
            }
        }
        None
    }

    /// Whether a request with a large body finds a connection for itself, or room for one. Only beside a shared connection that the peer
    /// has not asked to leave: on that one it says so in time for those that rest, too, and a request cannot meet their end.
    pub fn has_lane(&self, max_connections: u32) -> bool {
        let shared = self.shared.borrow();
        if !shared.iter().any(|connection| !connection.sender.is_closed()) {
            return false;
        }
        let open = self.open.get();
        let lanes = open.saturating_sub(shared.len() as u32);
        let rests =
            self.idle.borrow().iter().any(|idle| idle.sender.is_ready() && idle.since.elapsed() < IDLE);
        rests || (open < max_connections && lanes < limits::LANES)
    }

    /// A stream of an HTTP/2 connection.
    pub async fn http2(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        endpoint: &Arc<Endpoint>,
        cluster: &Cluster,
        policy: &Policy,
    ) -> Result<(http2::SendRequest<RequestBody>, Lease), Failure> {
        match self.take_stream(policy.max_connections) {
            Some(stream) => Ok(stream),
            None => Box::pin(self.make_http2(worker, endpoint, cluster, policy)).await,
        }
    }

    async fn make_http2(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        endpoint: &Arc<Endpoint>,
        cluster: &Cluster,
        policy: &Policy,
    ) -> Result<(http2::SendRequest<RequestBody>, Lease), Failure> {
        loop {
            if let Some(stream) = self.take_stream(policy.max_connections) {
                return Ok(stream);
            }
            let _waiting = Waiting::new(cluster, policy)?;
            let changed = self.changed.notified();
            if !self.connecting.replace(true) {
                self.failure.replace(None);
                // In a task of its own, since others wait for it too: the request that began it may be cancelled.
                let (pool, worker, limit) = (Rc::clone(self), Rc::clone(worker), policy.connect_timeout);
                let endpoint = Arc::clone(endpoint);
                tokio::task::spawn_local(async move {
                    let result = pool.open_shared(&worker, &endpoint, limit).await;
                    pool.failure.replace(result.err());
                    pool.connecting.set(false);
                    pool.changed.notify_waiters();
                });
            }
            changed.await;
            if let Some(failure) = &*self.failure.borrow() {
                return Err(failure.clone());
            }
        }
    }

    fn take_stream(&self, max_connections: u32) -> Option<(http2::SendRequest<RequestBody>, Lease)> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|connection| !connection.sender.is_closed());
        let full = shared.len() as u32 >= max_connections;
        // The first that has room: load gathers on few connections, and the others can be closed. At the limit of
        // connections the least used one takes more streams than it should; they wait in its queue.
        let connection =
            shared.iter().find(|connection| connection.streams.get() < connection.limit.get()).or_else(
                || shared.iter().filter(|_| full).min_by_key(|connection| connection.streams.get()),
            )?;
        connection.streams.set(connection.streams.get() + 1);
        Some((connection.sender.clone(), Lease::Http2(Rc::clone(&connection.streams))))
    }

    async fn open_shared(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        endpoint: &Endpoint,
        limit: Duration,
    ) -> Result<(), Failure> {
        let open = Open::new(self);
        let connection = match connect(worker, endpoint, Wire::Http2, limit).await? {
            Connected::Plain(stream) => handshake2(stream, open, endpoint.sidecar).await,
            Connected::Secured(stream) => handshake2(*stream, open, endpoint.sidecar).await,
        }?;
        self.shared.borrow_mut().push(connection);
        Ok(())
    }
}

async fn handshake1<T>(stream: T, open: Open) -> Result<http1::SendRequest<RequestBody>, Failure>
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(limits::READ)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| handshake_failed(&open, &error))?;
    tokio::task::spawn_local(async move {
        if let Err(error) = connection.await {
            tracing::debug!(endpoint = %open.0.whither, %error, "an HTTP/1.1 connection to an endpoint ended");
        }
        drop(open);
    });
    Ok(sender)
}

async fn handshake2<T>(stream: T, open: Open, sidecar: bool) -> Result<SharedConnection, Failure>
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let (sender, mut connection) = http2::Builder::new(LocalExecutor)
        .timer(TokioTimer::new())
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_frame_size(limits::FRAME)
        .max_send_buf_size(limits::SEND_BUFFER)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING_TIMEOUT)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| handshake_failed(&open, &error))?;
    let limit = Rc::new(Cell::new(STREAMS));
    let told = Rc::clone(&limit);
    tokio::task::spawn_local(async move {
        let result = poll_fn(|cx| {
            let polled = Pin::new(&mut connection).poll(cx);
            // A sidecar takes more than STREAMS, also before its settings have said so.
            if !sidecar {
                let takes = u32::try_from(connection.current_max_send_streams()).unwrap_or(STREAMS);
                told.set(takes.clamp(1, STREAMS));
            }
            polled
        });
        if let Err(error) = result.await {
            tracing::debug!(endpoint = %open.0.whither, %error, "an HTTP/2 connection to an endpoint ended");
        }
        drop(open);
    });
    Ok(SharedConnection { sender, streams: Rc::default(), limit })
}

fn handshake_failed(open: &Open, error: &hyper::Error) -> Failure {
    let who = &open.0.whither;
    Failure::unprocessed(
        Reason::ConnectFailed,
        format!("{who} accepted a connection and spoke no HTTP: {error}"),
    )
}

/// An HTTP/1.1 connection of its own, for a request that turns it into something else.
pub async fn dedicated(
    worker: &Rc<Worker>,
    endpoint: &Arc<Endpoint>,
    limit: Duration,
) -> Result<http1::SendRequest<RequestBody>, Failure> {
    async fn over<T>(stream: T, endpoint: &Endpoint) -> Result<http1::SendRequest<RequestBody>, Failure>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| {
            Failure::unprocessed(Reason::ConnectFailed, format!("{} spoke no HTTP: {error}", endpoint.name))
        })?;
        tokio::task::spawn_local(connection.with_upgrades());
        Ok(sender)
    }
    match connect(worker, endpoint, Wire::Http1, limit).await? {
        Connected::Plain(stream) => over(stream, endpoint).await,
        Connected::Secured(stream) => over(*stream, endpoint).await,
    }
}

/// A connection that counts as open.
struct Open(Rc<Pool>);

impl Open {
    fn new(pool: &Rc<Pool>) -> Self {
        pool.open.set(pool.open.get() + 1);
        Self(Rc::clone(pool))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.changed.notify_one();
    }
}

/// A request that waits for a connection counts as pending.
struct Waiting<'a>(&'a Cluster);

impl<'a> Waiting<'a> {
    fn new(cluster: &'a Cluster, policy: &Policy) -> Result<Self, Failure> {
        if cluster.pending.fetch_add(1, Relaxed) >= policy.max_pending {
            cluster.pending.fetch_sub(1, Relaxed);
            return Err(Failure::unprocessed(
                Reason::TooManyPending,
                format!(
                    "{} requests wait for a connection to {} already",
                    policy.max_pending, cluster.service
                ),
            ));
        }
        Ok(Self(cluster))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Speak;

    #[test]
    fn workers_do_not_keep_an_endpoint_alive_for_each_other() {
        let address = "127.0.0.1:1".parse().unwrap();
        let endpoint = Arc::new(Endpoint::new("a/pod".into(), address, 1, None, false, Speak::Same));
        let workers = [Pools::default(), Pools::default()];
        let counts = || workers.each_ref().map(|pools| pools.by_endpoint.borrow().len());
        workers.iter().for_each(|pools| drop(pools.of(&endpoint)));
        workers.iter().for_each(Pools::tidy);
        assert_eq!(counts(), [1, 1], "it is still listed");
        drop(endpoint);
        workers.iter().for_each(Pools::tidy);
        assert_eq!(counts(), [0, 0]);
    }
}
