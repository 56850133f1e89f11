//! HTTP/1 connections at rest.
//!
//! Between two requests hyper keeps a connection's buffers, 8 KiB to read into and 8 to write from, and the place of a handler's
//! future. Clients keep hundreds of connections that rest nearly all of the time. So one that has carried nothing for a while is
//! taken out of hyper, and what is left of it is its socket and a timer, until the next byte comes.
//!
//! hyper has the last word on whether a connection rests: it is asked to shut down gracefully, which it does at once only where nothing has
//! been begun and everything is written. [`Wire`] keeps it from closing the socket then, and gives the next hyper the byte that has come. It gives none
//! to a hyper that shuts down: one that wants to read is in the middle of something, and where it ends then is no place for a request to begin.
//!
//! The timer is looked at twice a second, and costs nothing for each request, as a timer of hyper's would. It closes what has waited for the
//! end of a head for too long, too.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// How often it is looked whether a connection rests: after one to two of these it does.
const LOOK: Duration = Duration::from_millis(500);

/// What goes on over a connection.
#[derive(Debug)]
pub struct Activity {
    /// Handlers that run and bodies that are not at their ends.
    busy: Cell<u32>,
    /// Whether something has begun, or ended, since it was last looked.
    stirred: Cell<bool>,
    /// Whether one has been served since hyper took the connection: without one, nobody can tell half a head from none.
    served: Cell<bool>,
    /// It may become something else, which hyper decides where we do not see it.
    stays: Cell<bool>,
    /// When a head was first waited for, as far as was looked.
    since: Cell<Instant>,
    flags: Arc<Flags>,
}

/// What [`Wire`] is told and tells. hyper wants a socket that could be sent to other threads; this one never is.
#[derive(Debug, Default)]
struct Flags {
    /// hyper shuts down for the sake of rest alone.
    resting: AtomicBool,
    /// It wanted to read meanwhile, so that it was in the middle of something.
    disturbed: AtomicBool,
    /// The socket takes no more for now.
    blocked: AtomicBool,
}

/// What a look at a connection says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Something goes on.
    Busy,
    /// Nothing has been going on since the last look.
    Rests,
    /// A head has been waited for until it was too late.
    TooLate,
}

/// Something goes on over a connection while this is held.
#[derive(Debug)]
pub struct Busy(Rc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.set(self.0.busy.get() - 1);
        // hyper has yet to hear of it: what was not read of a body may still be before it.
        self.0.stirred.set(true);
    }
}

impl Activity {
    /// Of a connection from which nothing has been read.
    pub fn new(now: Instant) -> Rc<Self> {
        Rc::new(Self {
            busy: Cell::new(0),
            stirred: Cell::new(false),
            served: Cell::new(false),
            stays: Cell::new(false),
            since: Cell::new(now),
            flags: Arc::default(),
        })
    }

    /// A request has come.
    pub fn begin(self: &Rc<Self>) -> Busy {
        self.stirred.set(true);
        self.served.set(true);
        self.another()
    }

    /// A request asks to make something else of the connection: it stays with hyper from now on, whatever is answered.
    pub fn stays(&self) {
        self.stays.set(true);
    }

    /// Something else goes on for it.
    pub fn another(self: &Rc<Self>) -> Busy {
        self.busy.set(self.busy.get() + 1);
        Busy(Rc::clone(self))
    }

    /// When to look for the first time, or again.
    pub fn next_look(now: Instant, patience: Duration) -> Instant {
        now + LOOK.min(patience / 2).max(Duration::from_millis(1))
    }

    /// Looks, at a moment that [`next_look`](Self::next_look) gave.
    pub fn look(&self, now: Instant, patience: Duration) -> Look {
        let blocked = self.flags.blocked.load(Relaxed);
        if self.stirred.replace(false) || self.busy.get() > 0 || blocked {
            self.since.set(now);
            return Look::Busy;
        }
        match self.served.get() && !self.stays.get() {
            true => Look::Rests,
            false if now >= self.too_late(patience) => Look::TooLate,
            false => Look::Busy,
        }
    }

    /// When the next head has been waited for too long.
    pub fn too_late(&self, patience: Duration) -> Instant {
        self.since.get() + patience
    }

    /// hyper is about to be asked for the connection, or has not given it.
    pub fn set_resting(&self, resting: bool) {
        self.flags.resting.store(resting, Relaxed);
        self.flags.disturbed.store(false, Relaxed);
        // It is asked once: where it has said no, it closes the connection after this request.
        self.served.set(false);
    }

    /// Whether what hyper has let go of is between two requests for certain.
    pub fn is_between_requests(&self) -> bool {
        !self.flags.disturbed.load(Relaxed)
    }

    /// The connection goes back to hyper, since a byte has come.
    pub fn wakes(&self, now: Instant) {
        self.set_resting(false);
        self.since.set(now);
    }
}

/// A client's socket, as hyper has it.
#[derive(Debug)]
pub struct Wire<T> {
    stream: T,
    /// What was read of it before hyper had it.
    ahead: Bytes,
    flags: Arc<Flags>,
}

impl<T> Wire<T> {
    /// Nothing of `stream` has been read.
    pub fn new(stream: T, activity: &Activity) -> Self {
        Self { stream, ahead: Bytes::new(), flags: Arc::clone(&activity.flags) }
    }

    /// Gives back what hyper had read and not taken for a request.
    pub fn put_back(&mut self, bytes: Bytes) {
        // A copy, since these hold the whole buffer that they came in.
        self.ahead = Bytes::copy_from_slice(&bytes);
    }
}

impl<T: AsyncRead + Unpin> Wire<T> {
    /// Whether something has come of the next request.
    pub fn is_in_head(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Where nothing is ahead, waits for the next byte, without a buffer. `false`: the client has ended its side.
    pub fn poll_byte(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut byte = [0; 1];
        let mut read = ReadBuf::new(&mut byte);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read))?;
        let came = !read.filled().is_empty();
        if came {
            self.ahead = Bytes::copy_from_slice(read.filled());
        }
        Poll::Ready(Ok(came))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Wire<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.flags.resting.load(Relaxed) {
            // Who has nothing begun reads nothing to shut down. It is asked again, or the connection ends.
            this.flags.disturbed.store(true, Relaxed);
            return Poll::Pending;
        }
        if this.ahead.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, out);
        }
        let bytes = this.ahead.len().min(out.remaining());
        out.put_slice(&this.ahead[..bytes]);
        this.ahead.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> Wire<T> {
    /// Notes whether the socket has taken something.
    fn note<R>(&self, written: Poll<R>) -> Poll<R> {
        self.flags.blocked.store(written.is_pending(), Relaxed);
        written
    }

    /// Says a last word, and closes. Nobody waits for a client that takes neither.
    pub fn poll_close(&mut self, word: &[u8], cx: &mut Context<'_>) -> Poll<()> {
        let mut stream = Pin::new(&mut self.stream);
        let _ = word.is_empty() || stream.as_mut().poll_write(cx, word).is_ready();
        let _ = stream.poll_shutdown(cx);
        Poll::Ready(())
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Wire<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, data);
        this.note(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, data);
        this.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.stream).poll_flush(cx);
        this.note(flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match this.flags.resting.load(Relaxed) {
            true => Poll::Ready(Ok(())),
            false => Pin::new(&mut this.stream).poll_shutdown(cx),
        }
    }
}

/// An answer's body, which is something that goes on.
#[derive(Debug)]
pub struct Answer<B> {
    body: B,
    _busy: Busy,
}

impl<B> Answer<B> {
    /// It is over when it is dropped.
    pub fn new(body: B, busy: Busy) -> Self {
        Self { body, _busy: busy }
    }
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
