//! Sockets: listeners that each worker has of its own, connections up to a limit, and where a redirected connection
//! was going.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use penstock_api::Reason;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use crate::files;
use crate::telemetry::metric;
use crate::telemetry::seldom::Seldom;

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

/// How many connections a listener takes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// In all.
    pub connections: u32,
    /// From one address; 0: as many as in all.
    pub per_peer: u32,
}

/// The open connections of one listener, over all workers.
#[derive(Debug, Default)]
pub struct OpenConnections {
    all: AtomicU32,
    /// By address, of those that have any. Connections come and go much less often than requests, so a lock it may be.
    peers: Mutex<HashMap<IpAddr, Peer>>,
    /// What is said of those that cannot be accepted, have to wait for a file, or are refused.
    failing: Seldom<1>,
    waiting: Seldom<1>,
    refusing: Seldom<10>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Peer {
    open: u32,
    /// Of these, in their handshakes.
    shaking: u32,
}

/// What a connection was one too many for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TooMany {
    InAll,
    FromPeer,
}

impl TooMany {
    const fn name(self) -> &'static str {
        match self {
            Self::InAll => "all",
            Self::FromPeer => "peer",
        }
    }
}

impl OpenConnections {
    fn open(self: &Arc<Self>, peer: IpAddr, bounds: Bounds) -> Result<Counted, TooMany> {
        if self.all.fetch_add(1, Relaxed) >= bounds.connections {
            self.all.fetch_sub(1, Relaxed);
            return Err(TooMany::InAll);
        }
        let counts_for = (bounds.per_peer > 0).then(|| one_peer(peer));
        if let Some(peer) = counts_for {
            let mut peers = self.lock();
            let known = peers.entry(peer).or_default();
            if known.open >= bounds.per_peer {
                self.all.fetch_sub(1, Relaxed);
                return Err(TooMany::FromPeer);
            }
            known.open += 1;
        }
        Ok(Counted { open: Arc::clone(self), peer, counts_for })
    }

    fn change(&self, peer: IpAddr, change: impl FnOnce(&mut Peer)) {
        let mut peers = self.lock();
        if let Entry::Occupied(mut known) = peers.entry(peer) {
            change(known.get_mut());
            if known.get().open == 0 {
                known.remove();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Peer>> {
        // Every change is one assignment.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that counts as open.
#[derive(Debug)]
pub struct Counted {
    open: Arc<OpenConnections>,
    peer: IpAddr,
    /// Under what it counts for its peer, if peers are counted.
    counts_for: Option<IpAddr>,
}

/// Who counts as one peer: an address, of IPv6 the network that one host has for itself.
fn one_peer(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address => address,
    }
}

impl Counted {
    /// Connections of the same listener, this one among them.
    pub fn of(&self) -> u32 {
        self.open.all.load(Relaxed)
    }

    /// The other end.
    pub fn peer(&self) -> IpAddr {
        self.peer
    }

    /// Its handshake begins; `None`: so many of its peer's are going on already. Only where a peer's connections are counted.
    pub fn shakes(&self, limit: u32) -> Option<Shaking<'_>> {
        let Some(peer) = self.counts_for.filter(|_| limit > 0) else { return Some(Shaking(None)) };
        let mut begun = false;
        self.open.change(peer, |peer| {
            begun = peer.shaking < limit;
            peer.shaking += u32::from(begun);
        });
        begun.then(|| Shaking(Some((&self.open, peer))))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.open.all.fetch_sub(1, Relaxed);
        if let Some(peer) = self.counts_for {
            self.open.change(peer, |peer| peer.open -= 1);
        }
    }
}

/// A connection in its handshake.
#[derive(Debug)]
pub struct Shaking<'a>(Option<(&'a OpenConnections, IpAddr)>);

impl Drop for Shaking<'_> {
    fn drop(&mut self) {
        if let Some((open, peer)) = self.0 {
            open.change(peer, |peer| peer.shaking -= 1);
        }
    }
}

/// How long a listener waits that could not accept, or has too few files to accept more.
const LOOK: Duration = Duration::from_millis(50);

/// Accepts connections for ever and hands each to `serve` in a task of its own. Beyond `bounds` the newest is refused.
pub async fn accept<S, F>(
    name: &'static str,
    listener: TcpListener,
    open: Arc<OpenConnections>,
    bounds: Bounds,
    serve: S,
) where
    S: Fn(TcpStream, Counted) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let accepted = metrics::counter!(metric::CONNECTIONS_ACCEPTED.name, "listener" => name);
    let serve = Rc::new(serve);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok((stream, peer)) => (stream, peer.ip().to_canonical()),
            Err(error) => {
                if let Some(times) = open.failing.happened(Instant::now()) {
                    tracing::warn!(listener = name, %error, times, "cannot accept a connection");
                }
                tokio::time::sleep(LOOK).await;
                continue;
            }
        };
        tune(&stream);
        let mut short = files::is_spared(&stream);
        match open.open(peer, bounds) {
            Ok(counted) => {
                accepted.increment(1);
                let serve = Rc::clone(&serve);
                tokio::task::spawn_local(async move { serve(stream, counted).await });
            }
            Err(too_many) => {
                let limit = too_many.name();
                metrics::counter!(metric::CONNECTIONS_REFUSED.name, "listener" => name, "limit" => limit)
                    .increment(1);
                if let Some(times) = open.refusing.happened(Instant::now()) {
                    let Bounds { connections, per_peer } = bounds;
                    let of = match too_many {
                        TooMany::InAll => connections,
                        TooMany::FromPeer => per_peer,
                    };
                    tracing::warn!(
                        listener = name, %peer, limit, of, times, reason = %Reason::TooManyConnections,
                        "refusing connections"
                    );
                }
                refuse(stream);
            }
        }
        while short {
            if open.waiting.happened(Instant::now()).is_some() {
                tracing::warn!(listener = name, "new connections wait; raise the limit of open files?");
            }
            tokio::time::sleep(LOOK).await;
            short = files::only_spared_are_left(&listener);
        }
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

    #[test]
    fn a_peer_has_its_share_and_what_is_closed_leaves_nothing() {
        let open = Arc::new(OpenConnections::default());
        let bounds = Bounds { connections: 5, per_peer: 2 };
        let [greedy, other] = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let mut held: Vec<_> = (0..2).map(|_| open.open(greedy, bounds).unwrap()).collect();
        assert_eq!(open.open(greedy, bounds).unwrap_err(), TooMany::FromPeer);
        held.push(open.open(other, bounds).unwrap());
        held.pop();
        held.pop();
        held.push(open.open(greedy, bounds).unwrap());
        let all = Bounds { connections: 2, per_peer: 0 };
        assert_eq!(open.open(other, all).unwrap_err(), TooMany::InAll);
        drop(held);
        assert_eq!((open.all.load(Relaxed), open.lock().len()), (0, 0));
    }

    #[test]
    fn handshakes_of_a_peer_are_counted_while_they_last() {
        let open = Arc::new(OpenConnections::default());
        let bounds = Bounds { connections: 5, per_peer: 5 };
        // Two addresses of one network are one peer.
        let [one, two] = ["fd00::1", "fd00::2"].map(|ip| open.open(ip.parse().unwrap(), bounds).unwrap());
        let shaking = one.shakes(1).unwrap();
        assert!(two.shakes(1).is_none());
        drop(shaking);
        assert!(two.shakes(1).is_some());
    }
}
