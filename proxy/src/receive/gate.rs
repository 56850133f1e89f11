//! Between a connection and hyper: lets through what is hyper's, and keeps back a body that is somebody else's.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{BufMut as _, BytesMut};
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderValue};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::body::Direct;
use super::framing::{self, Framing};

/// Bytes that are read at once where a head is expected. What of a body comes with it is copied once more, so it is not much.
const LOOK: usize = 4 << 10;
/// Bytes that are skipped at once of a body that nobody wants.
const SKIP: usize = 16 << 10;
/// Bytes of such a body that are skipped in all: what a sender has on its way when it hears that it is refused. Of more the rest is
/// not read, and the connection ends with the answer.
const MOST_SKIPPED: u64 = 256 << 10;

/// What is hyper's of a connection.
pub struct Gate<T> {
    inner: Arc<Mutex<Inner<T>>>,
    /// Asked with each write, and the answer does not change.
    vectored: bool,
}

/// What hyper and the reader of a body share. One task at a time reads: hyper, except while a body is held. There is nobody to
/// wait for the lock: all of them are tasks of one thread.
struct Inner<T> {
    /// `None`: hyper has let go of the connection.
    stream: Option<T>,
    /// Bodies of at least so many bytes are held.
    least: u64,
    place: Place,
    /// What was read and is hyper's.
    hypers: BytesMut,
    /// What was read behind that.
    behind: BytesMut,
    /// Heads that hyper was given.
    heads: u64,
    /// hyper waits to read.
    waker: Option<Waker>,
}

/// Where in the connection the next byte lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In a head.
    Head,
    /// In a request that is hyper's: so many bytes of it are left.
    Hypers(u64),
    /// In a body of so many bytes that is kept from hyper, and belongs to the request of that number.
    Held(u64, u64),
    /// In the same, of which nobody wants the rest.
    Skipped(u64),
    /// In the same, of which so much is left that nobody skips it: hyper hears no more.
    Refused(u64, u64),
    /// Nobody follows any more: everything is hyper's.
    Unknown,
    /// The client has left in the middle of a body that was held.
    Ended,
}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Gate<T> {
    /// Between `stream` and hyper, and what tells which of hyper's requests have a body here: those with tensors of at least
    /// `least` bytes.
    pub fn new(stream: T, least: u64) -> (Self, Claims) {
        let vectored = stream.is_write_vectored();
        let inner = Arc::new(Mutex::new(Inner {
            stream: Some(stream),
            least,
            place: Place::Head,
            hypers: BytesMut::new(),
            behind: BytesMut::new(),
            heads: 0,
            waker: None,
        }));
        let claims = Claims { source: Some(Arc::clone(&inner) as Arc<dyn Source>), requests: 0.into() };
        (Self { inner, vectored }, claims)
    }
}

impl<T> Gate<T> {
    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        lock(&self.inner)
    }
}

impl<T> fmt::Debug for Gate<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("place", &self.lock().place).finish_non_exhaustive()
    }
}

impl<T> Drop for Gate<T> {
    fn drop(&mut self) {
        // A body that is still read elsewhere ends with the connection, as hyper's own would.
        let mut inner = self.lock();
        inner.stream = None;
        inner.waker = None;
    }
}

/// Tells a handler's requests their bodies.
#[derive(Debug, Default)]
pub struct Claims {
    source: Option<Arc<dyn Source>>,
    /// Requests that hyper has given to the handler.
    requests: std::cell::Cell<u64>,
}

/// What hyper and the gate take for the same request cannot be.
#[derive(Debug, thiserror::Error)]
#[error("a request's body is held back for another request")]
pub struct Mismatch;

impl Claims {
    /// Of a connection that has no gate.
    pub fn none() -> Self {
        Self::default()
    }

    /// The next request that hyper gives to the handler has these headers: its body, if it is held back. Its length is what the
    /// client said, then.
    pub fn of(&self, headers: &mut HeaderMap) -> Result<Option<Direct>, Mismatch> {
        let Some(source) = &self.source else { return Ok(None) };
        let number = self.requests.get() + 1;
        self.requests.set(number);
        let Some((held, bytes)) = source.held() else { return Ok(None) };
        if held > number {
            return Ok(None);
        }
        let zeros = |value: &HeaderValue| value.as_bytes().iter().all(|digit| *digit == b'0');
        let length = headers.get_mut(CONTENT_LENGTH).filter(|value| zeros(value));
        let (Some(length), true) = (length, held == number) else { return Err(Mismatch) };
        *length = HeaderValue::from(bytes);
        Ok(Some(Direct::new(Arc::clone(source), bytes)))
    }

    /// Requests that hyper has given to the handler: the number of the last.
    pub fn number(&self) -> u64 {
        self.requests.get()
    }

    /// Whether something has come of the next request that hyper has not seen.
    pub fn is_in_head(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.is_in_head())
    }

    /// Whether the answer to the request of that number, which is there now, is the last of its connection: too much of the
    /// request's body is unread.
    pub fn ends_with(&self, number: u64) -> bool {
        let unread = self.source.as_ref().and_then(|source| source.unread());
        unread.is_some_and(|(of, left)| of == number && left > MOST_SKIPPED)
    }
}

/// A connection that somebody else than hyper reads a body from.
pub trait Source: fmt::Debug + Send + Sync {
    /// The number of the request whose body is held, and how much of that is left.
    fn held(&self) -> Option<(u64, u64)>;
    /// The same of a body that may have been refused meanwhile.
    fn unread(&self) -> Option<(u64, u64)>;
    /// Whether bytes are kept of what comes next.
    fn is_in_head(&self) -> bool;
    /// Reads some of the body into `out`, which has room.
    fn poll_fill(&self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>>;
    /// Reads at most `most` bytes of the body behind what is in `out`.
    fn poll_append(&self, cx: &mut Context<'_>, out: &mut BytesMut, most: usize) -> Poll<io::Result<usize>>;
    /// Nobody wants what is left of the body.
    fn skip(&self);
}

impl<T> fmt::Debug for Inner<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("place", &self.place).finish_non_exhaustive()
    }
}

impl<T: AsyncRead + Unpin> Inner<T> {
    fn stream(&mut self) -> io::Result<Pin<&mut T>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::ConnectionAborted.into())
    }

    /// How much is left of the body that is held.
    fn left(&self) -> usize {
        match self.place {
            Place::Held(_, left) | Place::Skipped(left) => usize::try_from(left).unwrap_or(usize::MAX),
            Place::Head | Place::Hypers(_) | Place::Refused(..) | Place::Unknown | Place::Ended => 0,
        }
    }

    /// So many bytes of the body that is held have been read; none: the client has left.
    fn took(&mut self, bytes: usize) -> io::Result<usize> {
        let left = (self.left() - bytes) as u64;
        self.place = match self.place {
            _ if bytes == 0 => Place::Ended,
            Place::Held(number, _) if left > 0 => Place::Held(number, left),
            Place::Skipped(_) if left > 0 => Place::Skipped(left),
            _ => Place::Head,
        };
        if matches!(self.place, Place::Ended | Place::Head) {
            self.wake();
        }
        if bytes == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
    }

    /// An error of the connection ends it for hyper too.
    fn broke(&mut self, error: io::Error) -> io::Error {
        self.place = Place::Ended;
        self.wake();
        error
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Reads where a request begins, and decides how far what comes is hyper's. `false`: the client has ended its side.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            match framing::of(&self.behind, self.least) {
                Framing::More => {}
                Framing::Plain { head, body } => {
                    self.heads += 1;
                    self.place = Place::Hypers((head as u64).saturating_add(body));
                    return Poll::Ready(Ok(true));
                }
                Framing::Held { head, body, digits } => {
                    self.heads += 1;
                    self.behind[digits].fill(b'0');
                    self.hypers = self.behind.split_to(head);
                    self.place = Place::Held(self.heads, body);
                    return Poll::Ready(Ok(true));
                }
                Framing::Other => {
                    self.place = Place::Unknown;
                    return Poll::Ready(Ok(true));
                }
            }
            self.behind.reserve(LOOK);
            let Self { stream: Some(stream), behind, .. } = self else { return Poll::Ready(Ok(false)) };
            let polled = poll_read_buf(Pin::new(stream), cx, &mut behind.limit(LOOK));
            if behind.is_empty() {
                // A connection at rest holds no buffer.
                *behind = BytesMut::new();
            }
            if ready!(polled)? == 0 {
                // Half a head is hyper's to complain of.
                self.place = if self.behind.is_empty() { Place::Head } else { Place::Unknown };
                return Poll::Ready(Ok(!self.behind.is_empty()));
            }
        }
    }

    /// Skips more of a body that nobody wants.
    fn poll_skip(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut scratch = [0; SKIP];
        let most = self.left().min(SKIP);
        self.poll_body(cx, &mut scratch[..most])
    }

    /// Reads some of the body that is held.
    fn poll_body(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let most = self.left().min(out.len());
        let out = &mut out[..most];
        if out.is_empty() {
            return Poll::Ready(Err(self.no_body()));
        }
        let first = self.behind.len().min(most);
        if first > 0 {
            out[..first].copy_from_slice(&self.behind.split_to(first));
            return Poll::Ready(self.took(first));
        }
        let mut read = ReadBuf::new(out);
        if let Err(error) = ready!(self.stream()?.poll_read(cx, &mut read)) {
            return Poll::Ready(Err(self.broke(error)));
        }
        let bytes = read.filled().len();
        Poll::Ready(self.took(bytes))
    }

    /// Why there is nothing of a body to read.
    fn no_body(&self) -> io::Error {
        let ended = matches!(self.place, Place::Ended);
        if ended { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidInput }.into()
    }

    /// What hyper reads.
    fn poll_read(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if !self.hypers.is_empty() {
                let bytes = self.hypers.len().min(out.remaining());
                out.put_slice(&self.hypers.split_to(bytes));
                if self.hypers.is_empty() {
                    self.hypers = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            match self.place {
                Place::Head => {
                    if !ready!(self.poll_head(cx))? {
                        return Poll::Ready(Ok(()));
                    }
                }
                Place::Hypers(0) => self.place = Place::Head,
                Place::Hypers(left) if !self.behind.is_empty() => {
                    let bytes = self.behind.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.hypers = self.behind.split_to(bytes);
                    self.place = Place::Hypers(left - bytes as u64);
                }
                Place::Hypers(left) => {
                    let before = out.filled().len();
                    let mut part = self.stream()?.get_mut().take(left);
                    ready!(Pin::new(&mut part).poll_read(cx, out))?;
                    self.place = Place::Hypers(left - (out.filled().len() - before) as u64);
                    return Poll::Ready(Ok(()));
                }
                Place::Skipped(_) => {
                    // Its end is hyper's to see.
                    if let Err(error) = ready!(self.poll_skip(cx))
                        && error.kind() != io::ErrorKind::UnexpectedEof
                    {
                        return Poll::Ready(Err(error));
                    }
                }
                Place::Unknown if !self.behind.is_empty() => self.hypers = std::mem::take(&mut self.behind),
                Place::Unknown => return self.stream()?.poll_read(cx, out),
                Place::Held(..) | Place::Refused(..) => {
                    if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                        self.waker = Some(cx.waker().clone());
                    }
                    return Poll::Pending;
                }
                Place::Ended => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl<T: AsyncRead + Unpin + Send> Source for Mutex<Inner<T>> {
    fn held(&self) -> Option<(u64, u64)> {
        match lock(self).place {
            Place::Held(number, left) => Some((number, left)),
            _ => None,
        }
    }

    fn unread(&self) -> Option<(u64, u64)> {
        match lock(self).place {
            Place::Held(number, left) | Place::Refused(number, left) => Some((number, left)),
            _ => None,
        }
    }

    fn is_in_head(&self) -> bool {
        let inner = lock(self);
        !(inner.hypers.is_empty() && inner.behind.is_empty())
    }

    fn poll_fill(&self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        lock(self).poll_body(cx, out)
    }

    fn poll_append(&self, cx: &mut Context<'_>, out: &mut BytesMut, most: usize) -> Poll<io::Result<usize>> {
        let mut inner = lock(self);
        let most = inner.left().min(most);
        if most == 0 {
            return Poll::Ready(Err(inner.no_body()));
        }
        let first = inner.behind.len().min(most);
        if first > 0 {
            out.unsplit(inner.behind.split_to(first));
            return Poll::Ready(inner.took(first));
        }
        match ready!(poll_read_buf(inner.stream()?, cx, &mut out.limit(most))) {
            Ok(bytes) => Poll::Ready(inner.took(bytes)),
            Err(error) => Poll::Ready(Err(inner.broke(error))),
        }
    }

    fn skip(&self) {
        let mut inner = lock(self);
        if let Place::Held(number, left) = inner.place {
            // Its answer has not been given yet, or says already that it is the last: hyper closes behind it.
            let much = left > MOST_SKIPPED;
            inner.place = if much { Place::Refused(number, left) } else { Place::Skipped(left) };
            inner.wake();
        }
    }
}

fn lock<T>(inner: &Mutex<Inner<T>>) -> MutexGuard<'_, Inner<T>> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: AsyncRead + Unpin> AsyncRead for Gate<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.lock().poll_read(cx, out)
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gate<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.lock().stream()?.poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.lock().stream()?.poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.vectored
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.lock().stream()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.lock().stream()?.poll_shutdown(cx)
    }
}
