//! Sockets: listeners that each worker has of its own, connections up to a limit, and where a redirected connection
//! was going.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use penstock_api::Reason;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::telemetry::metric;

/// A listener of one worker; the kernel spreads connections over the workers' listeners (`SO_REUSEPORT`).
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    // As many as the kernel allows (net.core.somaxconn cuts it): connections that wait here are not refused.
    socket.listen(4096)?;
    Ok(socket.into())
}

/// Where a redirected connection was going; `None` when it came to the listener itself.
pub fn original_destination(stream: &TcpStream) -> Option<SocketAddr> {
    // A listener for both families shows IPv4 as addresses in IPv6, and the kernel tracks it as what it is.
    let mut local = stream.local_addr().ok()?;
    local.set_ip(local.ip().to_canonical());
    let socket = SockRef::from(stream);
    let original = match local {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    let original = original.ok()?.as_socket()?;
    let same = original.ip() == local.ip() && original.port() == local.port();
    (!same).then_some(original)
}

/// What every connection of the data path gets, whoever began it: requests are written whole, so waiting for more
/// only adds latency; and a peer that vanished without a word (a node that died, a NAT that forgot) is noticed by the
/// kernel within two minutes, whatever is spoken over the connection and however long it is quiet.
pub fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(PROBE).with_retries(PROBES);
    // Without these a connection works; it only lives longer than its peer.
    let _ = socket.set_tcp_keepalive(&probes);
    let _ = socket.set_tcp_user_timeout(Some(KEEPALIVE + PROBE * PROBES));
}

/// A connection that is quiet so long is probed.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// Between two probes.
const PROBE: Duration = Duration::from_secs(15);
/// Probes without an answer that end a connection.
const PROBES: u32 = 4;

/// Counts the open connections of one listener, over all workers.
#[derive(Debug, Default)]
pub struct OpenConnections(AtomicU32);

/// A connection that counts as open.
#[derive(Debug)]
pub struct Counted(Arc<OpenConnections>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

/// Accepts connections for ever and hands each to `serve` in a task of its own. Above `limit` the newest is handed to
/// `refuse`.
pub async fn accept<S, F>(
    name: &'static str,
    listener: TcpListener,
    open: Arc<OpenConnections>,
    limit: u32,
    serve: S,
) where
    S: Fn(TcpStream, Counted) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let accepted = metrics::counter!(metric::CONNECTIONS_ACCEPTED.name, "listener" => name);
    let refused = metrics::counter!(metric::CONNECTIONS_REFUSED.name, "listener" => name);
    let serve = Rc::new(serve);
    let mut quiet_until: Option<Instant> = None;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: wait for some to be closed instead of spinning.
                tracing::warn!(listener = name, %error, "cannot accept; raise the limit of open files?");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        tune(&stream);
        if open.0.fetch_add(1, Relaxed) >= limit {
            open.0.fetch_sub(1, Relaxed);
            refused.increment(1);
            if quiet_until.is_none_or(|until| Instant::now() >= until) {
                quiet_until = Some(Instant::now() + Duration::from_secs(10));
                tracing::warn!(listener = name, limit, reason = %Reason::TooManyConnections, "refusing connections");
            }
            refuse(stream);
            continue;
        }
        accepted.increment(1);
        let counted = Counted(Arc::clone(&open));
        let serve = Rc::clone(&serve);
        tokio::task::spawn_local(async move { serve(stream, counted).await });
    }
}

/// Says why, if the socket takes it at once, and closes.
fn refuse(stream: TcpStream) {
    const ANSWER: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\npenstock-error: too-many-connections\r\n\
        content-length: 0\r\nconnection: close\r\n\r\n";
    let _ = stream.try_write(ANSWER);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_workers_share_an_address() {
        let first = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = first.local_addr().unwrap();
        listen(address).unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_was_not_redirected_has_no_other_destination() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        assert_eq!(original_destination(&server), None);
    }
}
