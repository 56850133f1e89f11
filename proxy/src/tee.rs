//! Bodies that are copied while they pass: whoever reads one reads it as ever, and each piece is put into the queues of its copies too.
//!
//! In: a client's body, and how many copies there are. Out: the same body, and for each copy one that follows it. The reader never
//! waits for a copy: what a copy has not read yet lies in its queue, as a reference to the same memory, under a bound for each
//! copy and a budget for all of them. A queue that outgrows either is let go, and its copy breaks off ([`End::Dropped`]).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::Notify;

use crate::headers;

/// A piece counts as at least so many bytes: many that are tiny are not free either.
const LEAST: u64 = 256;

/// Bytes that are held for copies; of one worker.
#[derive(Debug)]
pub struct Budget {
    most: u64,
    held: Cell<u64>,
}

impl Budget {
    /// Of so many bytes.
    pub fn new(most: u64) -> Rc<Self> {
        Rc::new(Self { most, held: Cell::new(0) })
    }

    /// Held now.
    pub fn held(&self) -> u64 {
        self.held.get()
    }
}

/// What one copy holds of a budget.
#[derive(Debug)]
pub struct Claim {
    budget: Rc<Budget>,
    most: u64,
    bytes: u64,
}

impl Claim {
    /// Nothing yet, and never more than `most`.
    pub fn new(budget: &Rc<Budget>, most: u64) -> Self {
        Self { budget: Rc::clone(budget), most, bytes: 0 }
    }

    /// Holds a piece of so many bytes too; `false`: there is no room for it.
    pub fn grow(&mut self, length: usize) -> bool {
        let more = (length as u64).max(LEAST);
        let fits = self.bytes + more <= self.most && self.budget.held.get() + more <= self.budget.most;
        if fits {
            self.bytes += more;
            self.budget.held.set(self.budget.held.get() + more);
        }
        fits
    }

    /// Lets go of a piece of so many bytes.
    fn shrink(&mut self, length: usize) {
        let less = (length as u64).max(LEAST);
        self.bytes -= less;
        self.budget.held.set(self.budget.held.get() - less);
    }

    /// What is held, as a claim of its own; this one holds nothing then.
    pub fn split(&mut self) -> Self {
        Self { budget: Rc::clone(&self.budget), most: self.most, bytes: std::mem::take(&mut self.bytes) }
    }

    /// Lets go of everything.
    pub fn clear(&mut self) {
        self.budget.held.set(self.budget.held.get() - std::mem::take(&mut self.bytes));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.clear();
    }
}

/// How a copy's body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All of it is there.
    Whole,
    /// There was no room for what the copy had not read yet.
    Dropped,
    /// The original broke off, or its reader let go of it.
    Broken,
}

/// What a copy has still to read.
#[derive(Debug)]
pub struct Queue {
    frames: RefCell<VecDeque<Frame<Bytes>>>,
    claim: RefCell<Claim>,
    end: Cell<Option<End>>,
    /// Nobody reads any more.
    left: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    broke: Notify,
}

impl Queue {
    fn new(claim: Claim) -> Rc<Self> {
        Rc::new(Self {
            frames: RefCell::default(),
            claim: RefCell::new(claim),
            end: Cell::new(None),
            left: Cell::new(false),
            waker: RefCell::default(),
            broke: Notify::new(),
        })
    }

    /// How the body ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.end.get()
    }

    /// Returns once it has broken off: whoever is stuck in writing what came before learns it only so.
    pub async fn broken(&self) {
        while !self.end.get().is_some_and(|end| end != End::Whole) {
            self.broke.notified().await;
        }
    }

    fn is_open(&self) -> bool {
        self.end.get().is_none() && !self.left.get()
    }

    fn push(&self, frame: Frame<Bytes>) {
        if !self.is_open() {
            return;
        }
        if !self.claim.borrow_mut().grow(frame.data_ref().map_or(0, Bytes::len)) {
            return self.close(End::Dropped);
        }
        self.frames.borrow_mut().push_back(frame);
        self.wake();
    }

    fn close(&self, end: End) {
        if self.end.get().is_some() {
            return;
        }
        self.end.set(Some(end));
        if end != End::Whole {
            self.let_go();
            self.broke.notify_one();
        }
        self.wake();
    }

    fn let_go(&self) {
        self.frames.borrow_mut().clear();
        self.claim.borrow_mut().clear();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// A body that is copied while it is read.
#[derive(Debug)]
pub struct Teed<B> {
    body: B,
    queues: Vec<Rc<Queue>>,
    /// Of a gRPC request: whether it is one message.
    messages: Option<Messages>,
}

impl<B: Body<Data = Bytes>> Teed<B> {
    /// Has a body copied. Each copy may have `each` bytes waiting; a gRPC request of more than one message is copied only as far as
    /// that, since nobody knows when it ends.
    pub fn new(body: B, copies: usize, budget: &Rc<Budget>, each: u64, grpc: bool) -> (Self, Vec<Copied>) {
        let queues: Vec<_> = (0..copies).map(|_| Queue::new(Claim::new(budget, each))).collect();
        let whole = body.size_hint();
        let copied = queues.iter().map(|queue| Copied { queue: Rc::clone(queue), whole: Some(whole) });
        let copied = copied.collect();
        let messages = grpc.then(|| Messages { most: each, ..Messages::default() });
        (Self { body, queues, messages }, copied)
    }

    /// How many bytes there are, as far as is known.
    pub fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    /// Whether nothing is left of it.
    pub fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn close(&self, end: End) {
        self.queues.iter().for_each(|queue| queue.close(end));
    }

    fn seen(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            if self.messages.as_mut().is_some_and(|messages| messages.goes_on(data)) {
                return self.close(End::Dropped);
            }
            self.queues.iter().for_each(|queue| queue.push(Frame::data(data.clone())));
        } else if let Some(trailers) = frame.trailers_ref() {
            let mut trailers = trailers.clone();
            headers::strip_trailers(&mut trailers);
            self.queues.iter().for_each(|queue| queue.push(Frame::trailers(trailers.clone())));
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Teed<B> {
    /// The next frame, which the copies get too.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                self.seen(frame);
                // A body that is known to be at its end may never be asked again.
                if self.body.is_end_stream() {
                    self.close(End::Whole);
                }
            }
            Some(Err(_)) => self.close(End::Broken),
            None => self.close(End::Whole),
        }
        Poll::Ready(frame)
    }
}

impl<B> Drop for Teed<B> {
    fn drop(&mut self) {
        self.queues.iter().for_each(|queue| queue.close(End::Broken));
    }
}

/// The messages of a gRPC request: each has a byte of flags and four of length before it (gRPC over HTTP/2, "Length-Prefixed-Message").
#[derive(Debug, Default)]
struct Messages {
    head: [u8; 5],
    passed: u64,
    most: u64,
}

impl Messages {
    /// Takes in a piece; `true`: more than one message has come, and more than `most` bytes.
    fn goes_on(&mut self, data: &[u8]) -> bool {
        let at = usize::try_from(self.passed).map_or(5, |at| at.min(5));
        for (to, from) in self.head[at..].iter_mut().zip(data) {
            *to = *from;
        }
        self.passed += data.len() as u64;
        let [_, length @ ..] = self.head;
        self.passed > self.most && self.passed > 5 + u64::from(u32::from_be_bytes(length))
    }
}

/// A copy of a body.
#[derive(Debug)]
pub struct Copied {
    queue: Rc<Queue>,
    /// What was known of the original's length; asked for before the first byte, and not again.
    whole: Option<SizeHint>,
}

impl Copied {
    /// What it reads from.
    pub fn queue(&self) -> &Rc<Queue> {
        &self.queue
    }

    /// The next frame; `Err`: it broke off.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, End>>> {
        self.whole = None;
        let queue = &self.queue;
        if let Some(frame) = queue.frames.borrow_mut().pop_front() {
            queue.claim.borrow_mut().shrink(frame.data_ref().map_or(0, Bytes::len));
            return Poll::Ready(Some(Ok(frame)));
        }
        match queue.end.get() {
            Some(End::Whole) => Poll::Ready(None),
            Some(broken) => Poll::Ready(Some(Err(broken))),
            None => {
                queue.waker.replace(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }

    /// Whether nothing is left of it.
    pub fn is_end_stream(&self) -> bool {
        self.queue.end.get() == Some(End::Whole) && self.queue.frames.borrow().is_empty()
    }

    /// How many bytes there are, as far as is known.
    pub fn size_hint(&self) -> SizeHint {
        self.whole.unwrap_or_default()
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        self.queue.left.set(true);
        self.queue.let_go();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt as _, Full, StreamBody};
    use std::convert::Infallible;
    use std::future::poll_fn;

    type Pieces = StreamBody<tokio_stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

    fn pieces(lengths: &[usize]) -> Pieces {
        let frames: Vec<_> =
            lengths.iter().map(|length| Ok(Frame::data(Bytes::from(vec![7; *length])))).collect();
        StreamBody::new(tokio_stream::iter(frames))
    }

    async fn read<B: Body<Data = Bytes> + Unpin>(body: &mut Teed<B>) -> usize {
        let mut bytes = 0;
        while let Some(Ok(frame)) = poll_fn(|cx| body.poll_frame(cx)).await {
            bytes += frame.data_ref().map_or(0, Bytes::len);
        }
        bytes
    }

    async fn copy(copied: &mut Copied) -> Result<usize, End> {
        let mut bytes = 0;
        while let Some(frame) = poll_fn(|cx| copied.poll_frame(cx)).await {
            bytes += frame?.data_ref().map_or(0, Bytes::len);
        }
        Ok(bytes)
    }

    #[tokio::test]
    async fn every_copy_gets_the_whole_body_and_nothing_stays_held() {
        let budget = Budget::new(10_000);
        let (mut body, mut copies) = Teed::new(pieces(&[1_000, 10, 2_000]), 2, &budget, 5_000, false);
        assert_eq!(read(&mut body).await, 3_010);
        assert_eq!(budget.held(), 2 * 3_256, "a tiny piece counts as {LEAST} bytes");
        for copied in &mut copies {
            assert_eq!(copy(copied).await, Ok(3_010));
            assert!(copied.is_end_stream());
        }
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn a_copy_that_is_too_slow_is_dropped_and_the_original_goes_on() {
        let budget = Budget::new(1 << 20);
        let (mut body, mut copies) = Teed::new(pieces(&[1_000; 6]), 1, &budget, 5_000, false);
        assert_eq!(read(&mut body).await, 6_000);
        assert_eq!(copies[0].queue().end(), Some(End::Dropped));
        assert_eq!(copy(&mut copies[0]).await, Err(End::Dropped));
        assert_eq!(budget.held(), 0);
    }

    #[tokio::test]
    async fn the_budget_bounds_all_copies_together() {
        let budget = Budget::new(1_500);
        let (mut one, copy_of_one) = Teed::new(pieces(&[1_000]), 1, &budget, 5_000, false);
        let (mut other, copy_of_other) = Teed::new(pieces(&[1_000]), 1, &budget, 5_000, false);
        assert_eq!((read(&mut one).await, read(&mut other).await), (1_000, 1_000));
        assert_eq!(copy_of_one[0].queue().end(), Some(End::Whole));
        assert_eq!(copy_of_other[0].queue().end(), Some(End::Dropped));
        drop((copy_of_one, copy_of_other));
        assert_eq!(budget.held(), 0, "who leaves holds nothing");
    }

    #[tokio::test]
    async fn a_body_that_its_reader_lets_go_of_breaks_its_copies_and_one_at_its_end_does_not() {
        let budget = Budget::new(1 << 20);
        let (mut body, mut copies) = Teed::new(pieces(&[10, 10]), 1, &budget, 5_000, false);
        assert!(poll_fn(|cx| body.poll_frame(cx)).await.is_some());
        drop(body);
        assert_eq!(copy(&mut copies[0]).await, Err(End::Broken));
        // hyper asks a body of known length for no frame after the last.
        let (mut body, mut copies) =
            Teed::new(Full::new(Bytes::from_static(b"abc")), 1, &budget, 5_000, false);
        assert_eq!(copies[0].size_hint().exact(), Some(3));
        assert!(poll_fn(|cx| body.poll_frame(cx)).await.is_some());
        drop(body);
        assert_eq!(copy(&mut copies[0]).await, Ok(3));
    }

    #[tokio::test]
    async fn trailers_are_copied() {
        let mut trailers = http::HeaderMap::new();
        trailers.insert("x", http::HeaderValue::from_static("y"));
        let body =
            Full::new(Bytes::from_static(b"abc")).with_trailers(std::future::ready(Some(Ok(trailers))));
        let (mut body, mut copies) = Teed::new(Box::pin(body), 1, &Budget::new(5_000), 5_000, false);
        assert_eq!(read(&mut body).await, 3);
        let mut seen = Vec::new();
        while let Some(Ok(frame)) = poll_fn(|cx| copies[0].poll_frame(cx)).await {
            seen.push(frame.is_trailers());
        }
        assert_eq!(seen, [false, true]);
    }

    #[tokio::test]
    async fn of_a_grpc_stream_no_more_is_copied_than_the_bound_and_of_one_message_all() {
        let message = |length: u32| [&[0][..], &length.to_be_bytes(), &vec![0; length as usize]].concat();
        let table = [
            (vec![message(3_000)], Some(End::Whole)),
            (vec![message(100); 5], Some(End::Whole)),
            (vec![message(100); 20], Some(End::Dropped)),
        ];
        for (messages, expected) in table {
            let sent: Vec<u8> = messages.concat();
            // Cut anywhere, within heads too.
            let frames: Vec<_> = sent
                .chunks(3)
                .map(|cut| Ok::<_, Infallible>(Frame::data(Bytes::copy_from_slice(cut))))
                .collect();
            let (budget, body) = (Budget::new(1 << 20), StreamBody::new(tokio_stream::iter(frames)));
            let (mut body, mut copies) = Teed::new(body, 1, &budget, 1_000, true);
            while let Some(Ok(_)) = poll_fn(|cx| body.poll_frame(cx)).await {
                // It keeps up, so that only what has passed in all counts.
                let _ = poll_fn(|cx| Poll::Ready(copies[0].poll_frame(cx))).await;
            }
            assert_eq!(copies[0].queue().end(), expected, "{} messages", messages.len());
        }
    }
}
