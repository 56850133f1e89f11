//! Reading much at once under TLS.
//!
//! rustls asks its socket for 4 KiB at a time, so a record of 16 KiB costs five system calls. Here, as soon as a read
//! has filled what it was given, which only bulk data does, the next ones go through a buffer of 64 KiB. The buffer is
//! borrowed from the thread and given back when it has been drained, so connections at rest hold none, and small
//! requests never see one.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Four records, and about what a socket has received when bulk data flows.
const SIZE: usize = 64 << 10;
/// Buffers that a thread keeps for the next connection that needs one.
const SPARE: usize = 16;

thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn borrow() -> Box<[u8]> {
    SPARES.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SIZE].into())
}

fn give_back(buffer: Box<[u8]>) {
    SPARES.with_borrow_mut(|spares| {
        if spares.len() < SPARE {
            spares.push(buffer);
        }
    });
}

/// A socket that reads ahead while bulk data comes in.
#[derive(Debug)]
pub struct ReadAhead {
    stream: TcpStream,
    /// What was read ahead: the buffer and the part of it that has not been taken.
    ahead: Option<(Box<[u8]>, std::ops::Range<usize>)>,
    bulk: bool,
}

impl ReadAhead {
    /// Takes over a socket from which nothing has been read.
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, ahead: None, bulk: false }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        if let Some((buffer, _)) = self.ahead.take() {
            give_back(buffer);
        }
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ahead.is_none() {
            if !this.bulk {
                let room = out.remaining();
                ready!(Pin::new(&mut this.stream).poll_read(cx, out))?;
                this.bulk = out.remaining() == 0 && room > 0;
                return Poll::Ready(Ok(()));
            }
            let mut buffer = borrow();
            let mut read = ReadBuf::new(&mut buffer);
            let polled = Pin::new(&mut this.stream).poll_read(cx, &mut read);
            let filled = read.filled().len();
            if !matches!(polled, Poll::Ready(Ok(()))) || filled == 0 {
                give_back(buffer);
                return polled;
            }
            this.ahead = Some((buffer, 0..filled));
        }
        if let Some((buffer, left)) = &mut this.ahead {
            let taken = left.len().min(out.remaining());
            out.put_slice(&buffer[left.start..left.start + taken]);
            left.start += taken;
            if left.start == left.end {
                this.bulk = left.end == SIZE || left.end > out.capacity();
                if let Some((buffer, _)) = this.ahead.take() {
                    give_back(buffer);
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, ReadAhead) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, ReadAhead::new(listener.accept().await.unwrap().0))
    }

    /// As rustls reads: 4 KiB at a time.
    async fn read(from: &mut ReadAhead, bytes: usize) -> Vec<u8> {
        let (mut all, mut piece) = (Vec::new(), [0; 4096]);
        while all.len() < bytes {
            let read = from.read(&mut piece).await.unwrap();
            assert!(read > 0);
            all.extend_from_slice(&piece[..read]);
        }
        all
    }

    #[tokio::test]
    async fn bytes_come_in_order_whatever_their_number() {
        let (mut client, mut server) = pair().await;
        for size in [1, 4095, 4096, 4097, 70_000, 300_000, 5] {
            let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            let (result, came) = tokio::join!(client.write_all(&sent), read(&mut server, size));
            result.unwrap();
            assert!(came == sent, "{size} bytes");
        }
        drop(client);
        assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0, "the end is seen");
    }

    #[tokio::test]
    async fn a_connection_at_rest_holds_no_buffer() {
        let (mut client, mut server) = pair().await;
        let (result, _) = tokio::join!(client.write_all(&[7; 200_000]), read(&mut server, 200_000));
        result.unwrap();
        assert!(server.ahead.is_none());
        client.write_all(b"small").await.unwrap();
        assert_eq!(read(&mut server, 5).await, b"small");
        assert!(server.ahead.is_none());
    }
}
