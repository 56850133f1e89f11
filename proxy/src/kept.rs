//! A request's body that is kept as it passes: its beginning can be looked at before it is sent, and it can be sent again.
//!
//! Nothing waits for a body to be whole. Each reader reads what earlier ones have read already and goes on from there;
//! a body that outgrows the room it was given is let go, and can no longer be read from its beginning.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::body::{self, RequestBody, RequestBroken};
use crate::exchange::Exchange;
use crate::receive::ClientBody;
use crate::receive::body::Broken;

/// Has a body kept from now on; `None`: there is none.
pub fn keep(body: &mut RequestBody, exchange: &Rc<Exchange>) -> Option<Rc<Kept>> {
    match std::mem::replace(body, RequestBody::Empty) {
        RequestBody::Client(from, _) if !from.is_end_stream() => {
            let kept = Rc::new(Kept::new(from, Rc::clone(exchange)));
            *body = RequestBody::Kept(kept.again());
            Some(kept)
        }
        RequestBody::Kept(reading) => {
            let kept = Rc::clone(&reading.kept);
            *body = RequestBody::Kept(reading);
            Some(kept)
        }
        _ => None,
    }
}

/// The first pieces of a body, which is read whole later all the same. The first is waited for, no longer than
/// `patience`; what is there at once besides is taken up to `limit` bytes.
pub async fn look_ahead(
    body: &mut RequestBody,
    exchange: &Rc<Exchange>,
    limit: usize,
    patience: Duration,
) -> Vec<Bytes> {
    let Some(kept) = keep(body, exchange) else { return Vec::new() };
    let mut bytes = 0;
    let more = poll_fn(|cx| {
        while bytes < limit && kept.left_over.borrow().is_none() {
            match kept.poll(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        bytes += data.len();
                        kept.passed.borrow_mut().push(data);
                    }
                    Err(trailers) => drop(kept.left_over.replace(Some(Ok(trailers)))),
                },
                Poll::Ready(Some(Err(error))) => drop(kept.left_over.replace(Some(Err(error)))),
                Poll::Ready(None) => break,
                Poll::Pending if bytes == 0 => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready(())
    });
    // What has not come in time is not looked at.
    let _ = tokio::time::timeout(patience, more).await;
    kept.passed.borrow().clone()
}

/// All of a body, in pieces, which can be read whole later all the same. `None`: it is larger than `limit`, or than there is
/// `room` for, which is told of each piece as it comes; or it has not all come within `patience`, or broke off, or has
/// trailers.
pub async fn whole(
    body: &mut RequestBody,
    exchange: &Rc<Exchange>,
    limit: usize,
    patience: Duration,
    mut room: impl FnMut(usize) -> bool,
) -> Option<Vec<Bytes>> {
    let Some(kept) = keep(body, exchange) else { return Some(Vec::new()) };
    let mut bytes: usize = kept.passed.borrow().iter().map(Bytes::len).sum();
    let mut fits = room(bytes);
    let all = poll_fn(|cx| {
        while fits && bytes <= limit && kept.left_over.borrow().is_none() {
            match ready!(kept.poll(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        bytes += data.len();
                        fits = room(data.len());
                        kept.passed.borrow_mut().push(data);
                    }
                    Err(trailers) => drop(kept.left_over.replace(Some(Ok(trailers)))),
                },
                Some(Err(error)) => drop(kept.left_over.replace(Some(Err(error)))),
                None => return Poll::Ready(true),
            }
        }
        Poll::Ready(false)
    });
    let whole = tokio::time::timeout(patience, all).await.unwrap_or(false);
    whole.then(|| kept.passed.borrow().clone())
}

/// A client's body, with what has passed of it.
#[derive(Debug)]
pub struct Kept {
    body: RefCell<ClientBody>,
    exchange: Rc<Exchange>,
    passed: RefCell<Vec<Bytes>>,
    /// What was met beyond the data while looking ahead: trailers, or an error.
    left_over: RefCell<Option<Result<Frame<Bytes>, RequestBroken>>>,
    /// Bytes that may still be kept; none, unless the request may be sent again.
    room: Cell<usize>,
    /// It can no longer be read from its beginning.
    lost: Cell<bool>,
    /// The try that reads, and how to wake it; an earlier one may still have to be told that it no longer does.
    reader: Cell<u32>,
    waker: RefCell<Option<Waker>>,
    whole: SizeHint,
}

impl Kept {
    fn new(body: ClientBody, exchange: Rc<Exchange>) -> Self {
        Self {
            whole: body.size_hint(),
            body: RefCell::new(body),
            exchange,
            passed: RefCell::default(),
            left_over: RefCell::default(),
            room: Cell::new(0),
            lost: Cell::new(false),
            reader: Cell::new(0),
            waker: RefCell::default(),
        }
    }

    /// Whether it can no longer be read from its beginning.
    pub fn is_lost(&self) -> bool {
        self.lost.get()
    }

    /// Another reader, from the beginning; the one before it reads no further.
    pub fn again(self: &Rc<Self>) -> Reading {
        let reader = self.reader.get() + 1;
        self.reader.set(reader);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
        Reading { kept: Rc::clone(self), reader, at: 0 }
    }

    /// How many bytes may be kept in all.
    pub fn set_room(&self, room: usize) {
        let kept: usize = self.passed.borrow().iter().map(Bytes::len).sum();
        self.room.set(room.saturating_sub(kept));
    }

    /// The next frame from the client.
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, RequestBroken>>> {
        let polled = Pin::new(&mut *self.body.borrow_mut()).poll_frame(cx);
        self.exchange.awaits_client(polled.is_pending());
        let Poll::Ready(mut frame) = polled else {
            self.waker.replace(Some(cx.waker().clone()));
            return Poll::Pending;
        };
        if let Some(Ok(frame)) = &mut frame {
            body::came_in(frame, &self.exchange)?;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(RequestBroken::Client)))
    }

    /// What is left of a body that its reader can take from the connection itself; `None`: it is no such body, or the beginning is
    /// not there any more.
    pub fn directly(&self) -> Option<u64> {
        let whole = !self.lost.get() && self.left_over.borrow().is_none();
        match &*self.body.borrow() {
            ClientBody::Direct(body) if whole => Some(body.left()),
            _ => None,
        }
    }

    /// What has passed so far.
    pub fn passed(&self) -> Vec<Bytes> {
        self.passed.borrow().clone()
    }

    /// What has passed so far lies elsewhere now, and more of it.
    pub fn lies(&self, passed: Vec<Bytes>) {
        self.passed.replace(passed);
    }

    /// Fills `out`, from the connection itself. `false`: the body broke off, and whoever reads on is told why.
    pub async fn fill(&self, out: &mut [u8], filled: &mut usize) -> bool {
        poll_fn(|cx| {
            while *filled < out.len() {
                let ClientBody::Direct(body) = &mut *self.body.borrow_mut() else {
                    return Poll::Ready(false);
                };
                let read = match ready!(body.poll_fill(cx, &mut out[*filled..])) {
                    Ok(0) => return Poll::Ready(false),
                    Ok(bytes) => self.exchange.came_in(bytes).map(|()| bytes),
                    Err(error) => Err(RequestBroken::Client(Broken::Direct(error))),
                };
                match read {
                    Ok(bytes) => *filled += bytes,
                    Err(error) => {
                        self.left_over.replace(Some(Err(error)));
                        return Poll::Ready(false);
                    }
                }
            }
            Poll::Ready(true)
        })
        .await
    }

    fn keep(&self, data: &Bytes) {
        match self.room.get().checked_sub(data.len()) {
            Some(room) => {
                self.room.set(room);
                self.passed.borrow_mut().push(data.clone());
            }
            None => self.lose(),
        }
    }

    fn lose(&self) {
        self.lost.set(true);
        self.passed.take();
    }
}

/// One try's way through the body.
#[derive(Debug)]
pub struct Reading {
    kept: Rc<Kept>,
    reader: u32,
    /// Pieces of what was kept that this try has sent.
    at: usize,
}

impl Reading {
    /// Everything that was kept has been sent, or there is nothing kept any more.
    fn is_up_to_date(&self) -> bool {
        self.kept.lost.get() || self.at == self.kept.passed.borrow().len()
    }
}

impl Body for Reading {
    type Data = Bytes;
    type Error = RequestBroken;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBroken>>> {
        let this = self.get_mut();
        let kept = &this.kept;
        if kept.reader.get() != this.reader {
            return Poll::Ready(Some(Err(RequestBroken::SentAgain)));
        }
        if let Some(data) = kept.passed.borrow().get(this.at) {
            this.at += 1;
            return Poll::Ready(Some(Ok(Frame::data(data.clone()))));
        }
        let left_over = kept.left_over.take();
        let frame = match left_over {
            Some(left_over) => Some(left_over),
            None => ready!(kept.poll(cx)),
        };
        match &frame {
            Some(Ok(frame)) => match frame.data_ref() {
                Some(data) => {
                    if !kept.lost.get() {
                        kept.keep(data);
                        this.at += 1;
                    }
                }
                // Trailers are rare on requests, and not kept.
                None => kept.lose(),
            },
            Some(Err(_)) => kept.lose(),
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let nothing_left = self.is_up_to_date() && self.kept.left_over.borrow().is_none();
        nothing_left && self.kept.body.borrow().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // Asked before the first byte, and then never again by hyper.
        match self.at {
            0 => self.kept.whole,
            _ => SizeHint::default(),
        }
    }
}
