//! HTTP/2 clients that send what brings nothing.
//!
//! A few bytes of PING, SETTINGS, PRIORITY, of an empty frame or of a stream that is reset as soon as it is begun cost their sender
//! nothing and a server work; the protocol allows them in any number (RFC 9113, 10.5, names this and leaves the numbers to
//! implementations; CVE-2019-9511, -9512, -9513, -9515 and -9518, CVE-2023-44487). So each connection has an [`Allowance`] of them, which grows
//! with time and with the work that is really done over it. [`Guarded`] reads the head of each frame as it passes, in both
//! directions, and says GOAWAY with ENHANCE_YOUR_CALM to whoever overdraws. What is wrong rather than too much (lengths, order, header
//! sections without end) is h2's to refuse.
//!
//! | | decides | pure |
//! | --- | --- | --- |
//! | [`frames`] | where one frame ends and the next begins | yes |
//! | [`allowance`] | what a frame costs or brings, and when it is too much | yes |
//! | [`Guarded`] | nothing: it carries this out | |

pub mod allowance;
pub mod frames;

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

pub use allowance::{Allowance, Flood};
pub use frames::{Frames, Head};

/// What a client begins an HTTP/2 connection with, before its first frame (RFC 9113, 3.4).
const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();

/// A client's HTTP/2 connection, none of it read yet.
#[derive(Debug)]
pub struct Guarded<S> {
    stream: S,
    incoming: Frames,
    outgoing: Frames,
    allowance: Allowance,
    /// The last stream that the client began.
    last: u32,
    flood: Rc<Cell<Option<Flood>>>,
}

impl<S> Guarded<S> {
    /// Guards `stream`, which so many callers share. The cell tells afterwards whether the connection ended because of a flood: an error would lose that on
    /// its way through h2.
    pub fn new(stream: S, callers: u32, now: Instant) -> (Self, Rc<Cell<Option<Flood>>>) {
        let flood = Rc::new(Cell::new(None));
        let guarded = Self {
            stream,
            incoming: Frames::after(PREFACE),
            outgoing: Frames::after(0),
            allowance: Allowance::new(callers, now),
            last: 0,
            flood: Rc::clone(&flood),
        };
        (guarded, flood)
    }

    fn comes(&mut self, bytes: &[u8]) -> Option<Flood> {
        let Self { incoming, allowance, last, .. } = self;
        let mut flood = None;
        incoming.pass(bytes, |head| {
            if head.kind == frames::HEADERS {
                *last = (*last).max(head.stream);
            }
            flood = flood.or(allowance.comes(head, Instant::now));
        });
        flood
    }

    fn goes(&mut self, bytes: &[u8]) {
        let Self { outgoing, allowance, .. } = self;
        outgoing.pass(bytes, |head| allowance.goes(head));
    }
}

impl<S: AsyncWrite + Unpin> Guarded<S> {
    /// Says why, if the socket takes it at once and h2 is not in the middle of a frame.
    fn say_goodbye(&mut self, cx: &mut Context<'_>) {
        if self.outgoing.between() {
            let _ = Pin::new(&mut self.stream).poll_write(cx, &goaway(self.last));
            let _ = Pin::new(&mut self.stream).poll_flush(cx);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let known = out.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, out))?;
        if let Some(flood) = this.comes(&out.filled()[known..]) {
            this.flood.set(Some(flood));
            // Who gets an error gets no bytes with it.
            out.set_filled(known);
            this.say_goodbye(cx);
            return Poll::Ready(Err(io::Error::other(flood)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, bytes))?;
        this.goes(&bytes[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, slices))?;
        let mut left = written;
        for slice in slices {
            let of_it = left.min(slice.len());
            this.goes(&slice[..of_it]);
            left -= of_it;
        }
        Poll::Ready(Ok(written))
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

/// GOAWAY with ENHANCE_YOUR_CALM (RFC 9113, 6.8 and 7).
fn goaway(last: u32) -> [u8; frames::HEAD + 8] {
    let mut frame = [0, 0, 8, frames::GOAWAY, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ENHANCE_YOUR_CALM];
    frame[9..13].copy_from_slice(&last.to_be_bytes());
    frame
}

const ENHANCE_YOUR_CALM: u8 = 0xb;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn who_floods_is_told_so_between_frames_and_cut_off() {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let (mut guarded, flood) = Guarded::new(server, 1, Instant::now());
        let mut sent = vec![b'x'; PREFACE];
        sent.extend([0, 0, 0, frames::HEADERS, 5, 0, 0, 0, 7]);
        for _ in 0..2 * allowance::IDLE {
            sent.extend([0, 0, 8, frames::PING, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        }
        client.write_all(&sent).await.unwrap();
        let error = guarded.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(flood.get(), Some(Flood::Idle), "{error}");
        drop(guarded);
        let mut told = Vec::new();
        client.read_to_end(&mut told).await.unwrap();
        assert_eq!(told, [0, 0, 8, frames::GOAWAY, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, ENHANCE_YOUR_CALM]);
    }

    #[tokio::test]
    async fn nothing_is_said_into_the_middle_of_a_frame() {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let (mut guarded, _flood) = Guarded::new(server, 1, Instant::now());
        guarded.write_all(&[0, 0, 8, frames::DATA, 0, 0, 0, 0, 1, b'h', b'a']).await.unwrap();
        let mut sent = vec![b'x'; PREFACE];
        for _ in 0..2 * allowance::IDLE {
            sent.extend([0, 0, 0, frames::SETTINGS, 0, 0, 0, 0, 0]);
        }
        client.write_all(&sent).await.unwrap();
        guarded.read_to_end(&mut Vec::new()).await.unwrap_err();
        drop(guarded);
        let mut told = Vec::new();
        client.read_to_end(&mut told).await.unwrap();
        assert_eq!(told.len(), 11);
    }
}
