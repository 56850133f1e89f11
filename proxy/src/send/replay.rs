//! A request that can be sent again: its head is copied, and its body kept as it passes.
//!
//! Nothing waits for a body to be whole. Each try reads what earlier tries have read already and goes on from there;
//! once a body has outgrown its buffer it is let go, and the request can no longer be sent again.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::Request;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::Outgoing;
use crate::body::{RequestBody, RequestBroken};
use crate::config::RetryPolicy;
use crate::exchange::Exchange;

/// What a further try starts from.
pub struct Replay {
    parts: http::request::Parts,
    body: Option<Rc<Kept>>,
    authority: http::uri::Authority,
    spoken: http::Version,
}

impl Replay {
    /// Has the request kept, as far as `retry` allows. A body that says that it is too large is not kept at all.
    pub fn keep(outgoing: &mut Outgoing, exchange: &Rc<Exchange>, retry: &RetryPolicy) -> Option<Box<Self>> {
        let request = &mut outgoing.request;
        if outgoing.upgrade || request.body().size_hint().lower() > retry.buffer as u64 {
            return None;
        }
        let body = match std::mem::replace(request.body_mut(), RequestBody::Empty) {
            RequestBody::Client(body, _) if !body.is_end_stream() => {
                let kept = Rc::new(Kept::new(body, Rc::clone(exchange), retry.buffer));
                *request.body_mut() = RequestBody::Kept(kept.again());
                Some(kept)
            }
            _ => None,
        };
        let mut copy = Request::new(());
        *copy.method_mut() = request.method().clone();
        *copy.uri_mut() = request.uri().clone();
        *copy.version_mut() = request.version();
        *copy.headers_mut() = request.headers().clone();
        let parts = copy.into_parts().0;
        Some(Box::new(Self { parts, body, authority: outgoing.authority.clone(), spoken: outgoing.spoken }))
    }

    /// The request for another try, if its body is still known from the beginning.
    pub fn again(&self) -> Option<Box<Outgoing>> {
        let body = match &self.body {
            Some(kept) if kept.lost.get() => return None,
            Some(kept) => RequestBody::Kept(kept.again()),
            None => RequestBody::Empty,
        };
        Some(Box::new(Outgoing {
            request: Request::from_parts(self.parts.clone(), body),
            authority: self.authority.clone(),
            spoken: self.spoken,
            upgrade: false,
        }))
    }
}

/// A client's body, with what has passed of it.
#[derive(Debug)]
struct Kept {
    body: RefCell<Incoming>,
    exchange: Rc<Exchange>,
    passed: RefCell<Vec<Bytes>>,
    /// Bytes that may still be kept.
    room: Cell<usize>,
    /// It can no longer be read from its beginning.
    lost: Cell<bool>,
    /// The try that reads; an earlier one may still be told so.
    reader: Cell<u32>,
    whole: SizeHint,
}

impl Kept {
    fn new(body: Incoming, exchange: Rc<Exchange>, room: usize) -> Self {
        Self {
            whole: body.size_hint(),
            body: RefCell::new(body),
            exchange,
            passed: RefCell::default(),
            room: Cell::new(room),
            lost: Cell::new(false),
            reader: Cell::new(0),
        }
    }

    fn again(self: &Rc<Self>) -> Reading {
        let reader = self.reader.get() + 1;
        self.reader.set(reader);
        Reading { kept: Rc::clone(self), reader, at: 0 }
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
        let frame = ready!(Pin::new(&mut *kept.body.borrow_mut()).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => match frame.data_ref() {
                Some(data) => {
                    kept.exchange.came_in(data.len())?;
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
        Poll::Ready(frame.map(|frame| frame.map_err(RequestBroken::Client)))
    }

    fn is_end_stream(&self) -> bool {
        self.is_up_to_date() && self.kept.body.borrow().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // Asked before the first byte, and then never again by hyper.
        match self.at {
            0 => self.kept.whole,
            _ => SizeHint::default(),
        }
    }
}
