//! Bodies on their way through. They are streamed, never collected, and whatever is counted until the last byte
//! (load, outcome, the pooled connection) hangs on them and is let go with them.

use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use penstock_api::Reason;
use tokio::time::{Instant, Sleep};

use crate::age::{self, Age};
use crate::coalesce::record::{self, Cut, Reader};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers;
use crate::kept::Reading;
use crate::oob::Reports;
use crate::receive::{self, ClientBody};
use crate::send::Lease;
use crate::shadow::pair::Watched;
use crate::tee::{Copied, End};

/// A request's body on its way to the server.
#[derive(Debug)]
pub enum RequestBody {
    /// As it comes in from the client.
    Client(ClientBody, Rc<Exchange>),
    /// The same, kept for another try.
    Kept(Reading),
    /// The proxy's own, in parts that are never joined.
    Parts(VecDeque<Bytes>),
    /// A copy of another request's.
    Copy(Copied, Rc<Exchange>),
    /// There is none.
    Empty,
}

/// Why a request's body broke off.
#[derive(Debug, thiserror::Error)]
pub enum RequestBroken {
    /// The client stopped.
    #[error(transparent)]
    Client(#[from] receive::body::Broken),
    /// More came than is allowed.
    #[error("the body is above the limit of {0} bytes (--max-body)")]
    TooLarge(u64),
    /// This try is over, and another reads the body.
    #[error("the request is being sent again")]
    SentAgain,
    /// It is a copy, and the original broke off, or there was no room to wait for its reader.
    #[error("the copy of a request broke off: {0:?}")]
    Copy(End),
}

/// What every frame of a request meets as it comes in: its bytes count, and its trailers lose what is ours to say.
pub fn came_in(frame: &mut Frame<Bytes>, exchange: &Exchange) -> Result<(), RequestBroken> {
    if let Some(trailers) = frame.trailers_mut() {
        headers::strip_trailers(trailers);
    }
    frame.data_ref().map_or(Ok(()), |data| exchange.came_in(data.len()))
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBroken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBroken>>> {
        match self.get_mut() {
            Self::Client(body, exchange) => {
                let polled = Pin::new(body).poll_frame(cx);
                exchange.awaits_client(polled.is_pending());
                let mut frame = ready!(polled);
                if let Some(Ok(frame)) = &mut frame {
                    came_in(frame, exchange)?;
                }
                Poll::Ready(frame.map(|frame| frame.map_err(RequestBroken::Client)))
            }
            Self::Kept(body) => Pin::new(body).poll_frame(cx),
            Self::Parts(parts) => Poll::Ready(parts.pop_front().map(|part| Ok(Frame::data(part)))),
            Self::Copy(body, exchange) => {
                let frame = ready!(body.poll_frame(cx));
                if let Some(Ok(frame)) = &frame {
                    exchange.sent(frame.data_ref().map_or(0, Bytes::len));
                }
                Poll::Ready(frame.map(|frame| frame.map_err(RequestBroken::Copy)))
            }
            Self::Empty => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Client(body, _) => body.is_end_stream(),
            Self::Kept(body) => body.is_end_stream(),
            Self::Parts(parts) => parts.is_empty(),
            Self::Copy(body, _) => body.is_end_stream(),
            Self::Empty => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Client(body, _) => body.size_hint(),
            Self::Kept(body) => body.size_hint(),
            Self::Parts(parts) => SizeHint::with_exact(parts.iter().map(|part| part.len() as u64).sum()),
            Self::Copy(body, _) => body.size_hint(),
            Self::Empty => SizeHint::with_exact(0),
        }
    }
}

/// A response's body on its way to the client.
#[derive(Debug)]
pub enum ResponseBody {
    /// The proxy's own.
    Whole(Option<Bytes>),
    /// An answer that was shared: what the client gets of it.
    Shared(Share),
    /// An answer that is shared while it comes in.
    Replay(Replay),
    /// Load reports, for as long as the client listens.
    Reports(Reports),
    /// As it comes in from the server.
    Upstream(Upstream),
    /// Any of these, which is compared with a copy's.
    Watched(Box<Watched<ResponseBody>>),
}

impl ResponseBody {
    /// No body.
    pub fn empty() -> Self {
        Self::Whole(None)
    }

    /// A short text.
    pub fn whole(text: String) -> Self {
        Self::Whole(Some(text.into()))
    }
}

/// The client's own part of an answer that others got parts of too.
#[derive(Debug)]
pub struct Share {
    parts: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
    exchange: Rc<Exchange>,
}

impl Share {
    /// A body of these parts, and behind them the trailers, if it has any.
    pub fn new(parts: Vec<Bytes>, trailers: Option<HeaderMap>, exchange: &Rc<Exchange>) -> Self {
        Self { parts: parts.into(), trailers, exchange: Rc::clone(exchange) }
    }

    fn next(&mut self) -> Option<Frame<Bytes>> {
        let frame = match self.parts.pop_front() {
            Some(part) => {
                self.exchange.came_back(&part);
                Some(Frame::data(part))
            }
            None => self.trailers.take().map(|mut trailers| {
                crate::report::stamp_trailers(&self.exchange, &mut trailers);
                Frame::trailers(trailers)
            }),
        };
        if self.parts.is_empty() && self.trailers.is_none() {
            self.exchange.complete();
        }
        frame
    }
}

/// One client's reading of an answer that others read too.
#[derive(Debug)]
pub struct Replay {
    reader: Reader,
    /// What this reading counts for; `None`: the request whose execution it is, which counts as the answer comes in.
    exchange: Option<Rc<Exchange>>,
}

impl Replay {
    /// A body that is read there.
    pub fn new(reader: Reader, exchange: Option<&Rc<Exchange>>) -> Self {
        Self { reader, exchange: exchange.cloned() }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let next = ready!(Pin::new(&mut self.reader).poll_next(cx));
        let exchange = self.exchange.as_deref();
        let failure = match next {
            Some(Ok(frame)) => {
                if let Some((exchange, data)) = exchange.zip(frame.data_ref()) {
                    exchange.began();
                    exchange.came_back(data);
                }
                return Poll::Ready(Some(Ok(frame)));
            }
            None => {
                if let Some(exchange) = exchange {
                    exchange.began();
                    exchange.complete();
                }
                return Poll::Ready(None);
            }
            Some(Err(Cut::Broken(failure))) => failure,
            Some(Err(Cut::Lagged)) => Failure::new(
                Reason::ClientClosed,
                format!("the client reads {} bytes behind others that share the answer", record::KEPT),
            ),
        };
        if let Some(exchange) = exchange {
            exchange.broken(failure.reason);
        }
        Poll::Ready(Some(Err(Broken(failure))))
    }
}

/// A response's body with what ends when it ends.
#[derive(Debug)]
pub struct Upstream {
    body: Incoming,
    exchange: Rc<Exchange>,
    lease: Option<Lease>,
    idle: Idle,
    on_trailers: fn(&Exchange, &mut HeaderMap),
    age: Age,
}

impl Upstream {
    /// Takes over a response's body. `on_trailers` sees the trailers before the client does.
    pub fn new(
        body: Incoming,
        exchange: Rc<Exchange>,
        lease: Lease,
        idle: Option<Duration>,
        on_trailers: fn(&Exchange, &mut HeaderMap),
    ) -> Self {
        Self { body, exchange, lease: Some(lease), idle: Idle::new(idle), on_trailers, age: Age::Unlimited }
    }

    /// Has it end in good order when it is old, or when little time is left: a gRPC stream has words for that.
    pub fn ages(mut self) -> Self {
        self.age = Age::Young;
        self
    }

    fn end(&mut self) {
        // The connection is free for the next request before the client has read its last byte.
        self.lease = None;
        self.exchange.began();
        self.exchange.complete();
    }
}

/// Why a response's body broke off.
#[derive(Debug)]
pub struct Broken(pub Failure);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Broken {}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let upstream = match self.get_mut() {
            Self::Whole(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Shared(share) => return Poll::Ready(share.next().map(Ok)),
            Self::Reports(reports) => return reports.poll_next(cx).map(|frame| frame.map(Ok)),
            Self::Replay(replay) => return replay.poll_frame(cx),
            Self::Watched(body) => return body.poll_frame(cx),
            Self::Upstream(upstream) => upstream,
        };
        if matches!(upstream.age, Age::Over) {
            return Poll::Ready(None);
        }
        match Pin::new(&mut upstream.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(mut frame))) => {
                upstream.idle.moved();
                if let Some(data) = frame.data_ref() {
                    upstream.exchange.began();
                    upstream.exchange.came_back(data);
                    if upstream.body.is_end_stream() {
                        upstream.end();
                    }
                } else if let Some(trailers) = frame.trailers_mut() {
                    (upstream.on_trailers)(&upstream.exchange, trailers);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                let story =
                    format!("{} closed in the middle of its response: {error}", upstream.exchange.whither());
                let failure = Failure::new(Reason::UpstreamIncomplete, story);
                upstream.exchange.broken(failure.reason);
                Poll::Ready(Some(Err(Broken(failure))))
            }
            Poll::Ready(None) => {
                upstream.end();
                Poll::Ready(None)
            }
            Poll::Pending => {
                // What still goes up is movement too: a server may answer long before a large body is through.
                upstream.idle.seen(upstream.exchange.request_bytes());
                if upstream.age.poll_over(cx, &upstream.exchange).is_ready() {
                    upstream.end();
                    return Poll::Ready(Some(Ok(Frame::trailers(age::farewell()))));
                }
                let limit = ready!(upstream.idle.poll_elapsed(cx));
                let story = format!("no byte from {} in {limit:?}", upstream.exchange.whither());
                upstream.exchange.broken(Reason::IdleTimeout);
                Poll::Ready(Some(Err(Broken(Failure::new(Reason::IdleTimeout, story)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Shared(share) => share.parts.is_empty() && share.trailers.is_none(),
            Self::Reports(_) => false,
            Self::Replay(_) => false,
            Self::Upstream(upstream) => upstream.body.is_end_stream(),
            Self::Watched(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Shared(share) => {
                SizeHint::with_exact(share.parts.iter().map(|part| part.len() as u64).sum())
            }
            Self::Replay(_) => SizeHint::default(),
            Self::Reports(_) => SizeHint::default(),
            Self::Upstream(upstream) => upstream.body.size_hint(),
            Self::Watched(body) => body.size_hint(),
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        // A body that was known to be at its end is never asked for another frame.
        if self.lease.is_some() && self.body.is_end_stream() {
            self.end();
        }
    }
}

/// Notices that nothing moves. Costs nothing while bytes flow: the timer is set when a read first has to wait, and is
/// pushed on only when it fires.
#[derive(Debug)]
struct Idle {
    limit: Option<Duration>,
    timer: Option<Pin<Box<Sleep>>>,
    moved: bool,
    /// Bytes of the request, when it was last looked at.
    other_way: u64,
}

impl Idle {
    fn new(limit: Option<Duration>) -> Self {
        Self { limit: limit.filter(|limit| !limit.is_zero()), timer: None, moved: false, other_way: 0 }
    }

    fn moved(&mut self) {
        self.moved = true;
    }

    /// So many bytes have gone the other way.
    fn seen(&mut self, other_way: u64) {
        self.moved |= other_way != std::mem::replace(&mut self.other_way, other_way);
    }

    /// Ready with the limit once nothing has moved for at least that long (at most twice).
    fn poll_elapsed(&mut self, cx: &mut Context<'_>) -> Poll<Duration> {
        let Some(limit) = self.limit else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        loop {
            ready!(timer.as_mut().poll(cx));
            if !std::mem::take(&mut self.moved) {
                return Poll::Ready(limit);
            }
            timer.as_mut().reset(Instant::now() + limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[tokio::test(start_paused = true)]
    async fn idle_fires_only_when_nothing_moves() {
        let limit = Duration::from_secs(10);
        let mut idle = Idle::new(Some(limit));
        let start = Instant::now();
        for _ in 0..5 {
            let waited =
                tokio::time::timeout(Duration::from_secs(6), poll_fn(|cx| idle.poll_elapsed(cx))).await;
            assert!(waited.is_err(), "fired although bytes moved, after {:?}", start.elapsed());
            idle.moved();
        }
        assert_eq!(poll_fn(|cx| idle.poll_elapsed(cx)).await, limit);
        let quiet = start.elapsed() - Duration::from_secs(30);
        assert!(quiet >= limit && quiet <= limit * 2, "{quiet:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_limit_never_fires() {
        for limit in [None, Some(Duration::ZERO)] {
            let mut idle = Idle::new(limit);
            let wait = poll_fn(|cx| idle.poll_elapsed(cx));
            assert!(tokio::time::timeout(Duration::from_secs(1 << 20), wait).await.is_err());
        }
    }
}
