//! Connections that are opened, asked one thing over, and then left alone: what does a proxy keep for each?
//!
//! They come from several addresses of the loopback network, as from several machines: a proxy may well bound how many it takes from
//! one. What is measured is the growth of the proxy's resident memory from before the first of them until all have rested, divided by
//! their number; a buffer that it got for their requests and never gave back is in it. A connection that the proxy has closed
//! meanwhile costs nothing and proves nothing, so one is enough for there to be no figure.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::client::TlsStream;

use super::{LoadArgs, Measured, Reading, Target, encrypt, h1};

/// Addresses that connections come from. 5,000 are 313 from each.
const SOURCES: usize = 16;
/// Connections that are being opened at once. Few, since each of them may cost the proxy one to the upstream, which it may keep.
const OPENING: usize = 16;

/// An idle connection.
enum Kept {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Opens `--connections`, and measures when they have rested for `--seconds`.
pub(super) async fn measure(args: &LoadArgs, target: &Target) -> Result<Measured> {
    let before = Reading::take(args)?;
    let kept: Vec<Kept> = stream::iter(0..args.connections)
        .map(async |nth| {
            target.keep(nth).await.with_context(|| format!("connection {} of {}", nth + 1, args.connections))
        })
        .buffer_unordered(OPENING)
        .try_collect()
        .await?;
    tokio::time::sleep(Duration::from_secs_f64(args.seconds)).await;
    let after = Reading::take(args)?;
    let closed = kept.iter().filter(|kept| !kept.is_open()).count();
    ensure!(closed == 0, "{closed} of {} connections were closed while they were idle", args.connections);
    Ok(Measured {
        requests: args.connections as u64,
        kib_per_conn: kib_each(before.memory.now, after.memory.now, args.connections),
        ..after.since(&before)
    })
}

/// What `count` connections have in common that grew from `before` to `after` MiB, in KiB for each.
fn kib_each(before: f64, after: f64, count: usize) -> f64 {
    (after - before) * 1024.0 / count as f64
}

impl Target {
    /// Opens the `nth` connection and sends one request.
    async fn keep(&self, nth: usize) -> io::Result<Kept> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(source(nth))?;
        let stream = socket.connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(match &self.tls {
            None => Kept::Plain(self.ask(stream).await?),
            Some(tls) => Kept::Tls(Box::new(self.ask(encrypt(stream, tls).await?).await?)),
        })
    }

    /// One request, after which the stream is left as it is.
    async fn ask<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<S> {
        let mut connection = h1::Connection::new(stream);
        match connection.exchange(&self.request).await?.status {
            200 => Ok(connection.into_stream()),
            status => Err(io::Error::other(format!("answered with status {status}"))),
        }
    }
}

/// Where the `nth` connection comes from; 127.0.0.1 is everybody else's.
fn source(nth: usize) -> SocketAddr {
    (Ipv4Addr::new(127, 0, 0, 2 + (nth % SOURCES) as u8), 0).into()
}

impl Kept {
    /// Whether the other side still holds it. What it may have said meanwhile is of no interest.
    fn is_open(&self) -> bool {
        let stream = match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        };
        let mut said = [0; 1024];
        loop {
            match stream.try_read(&mut said) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn growth_is_shared_by_all() {
        assert_eq!(kib_each(20.0, 20.0 + 5000.0 / 1024.0 * 6.0, 5000), 6.0);
        assert_eq!(kib_each(20.0, 19.0, 1024), -1.0, "what shrinks is not hidden");
    }

    #[test]
    fn no_address_sends_more_than_its_share() {
        let from = |source_: Ipv4Addr| (0..5000).filter(|nth| source(*nth).ip() == source_).count();
        assert!((2..18).all(|last| (312..=313).contains(&from(Ipv4Addr::new(127, 0, 0, last)))));
    }

    #[tokio::test]
    async fn a_connection_that_was_closed_is_seen_whatever_was_said_before() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        let kept = Kept::Plain(near);
        far.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n").await.unwrap();
        assert!(kept.is_open());
        drop(far);
        let seen = async {
            while kept.is_open() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), seen).await.unwrap();
    }
}
