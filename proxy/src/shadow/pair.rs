//! Two answers to one request, the copy's and the client's: kept as they come, held against each other when both are whole.
//!
//! In: heads, pieces and ends of both, in whatever order they come. Out: counts. The client's answer passes untouched ([`Watched`]); what
//! is kept of it are references to its pieces, under the same budget as the copies' bodies. What is above a bound, or encoded, or broke
//! off because the client left, is not compared.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_ENCODING;
use http::{HeaderMap, StatusCode};
use http_body::{Body, Frame, SizeHint};
use penstock_inference::oip::rest;
use tokio::sync::Semaphore;

use super::compare::{self, Answer, Verdict, Wire};
use crate::config::Compare;
use crate::limits;
use crate::tee::{Budget, Claim};
use crate::telemetry::shadow::{Count, Shadow};

/// Whose answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The mirror's.
    Copy,
    /// The one that the client gets.
    Client,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It is all there.
    Whole,
    /// There was none, or it broke off by the server's fault.
    Failed,
    /// Nobody knows: the client left, or there was no room for the copy.
    Lost,
}

#[derive(Debug)]
struct Side {
    took: Option<Duration>,
    answer: Answer,
    bytes: u64,
    claim: Claim,
    /// It is not kept, or not any more.
    unkept: bool,
    ended: Option<Ended>,
}

/// Two answers to one request.
#[derive(Debug)]
pub struct Pair {
    cell: Arc<Shadow>,
    compare: Option<Arc<Compare>>,
    wire: Wire,
    comparing: Rc<Semaphore>,
    sides: [RefCell<Side>; 2],
    timed: Cell<bool>,
}

impl Pair {
    /// Of which nothing has come yet. `compare`: how the two are held against each other, if they are.
    pub fn new(
        cell: Arc<Shadow>,
        compare: Option<Arc<Compare>>,
        wire: Wire,
        budget: &Rc<Budget>,
        comparing: &Rc<Semaphore>,
    ) -> Rc<Self> {
        let most = compare.as_ref().map_or(0, |compare| compare.max_bytes);
        let side = || {
            RefCell::new(Side {
                took: None,
                answer: Answer::default(),
                bytes: 0,
                claim: Claim::new(budget, most),
                unkept: false,
                ended: None,
            })
        };
        let (sides, comparing) = ([side(), side()], Rc::clone(comparing));
        Rc::new(Self { cell, compare, wire, comparing, sides, timed: Cell::new(false) })
    }

    /// Whether answers are held against each other.
    pub fn compares(&self) -> bool {
        self.compare.is_some()
    }

    fn side(&self, which: Which) -> std::cell::RefMut<'_, Side> {
        self.sides[which as usize].borrow_mut()
    }

    /// An answer's head has come, after so long.
    pub fn head(&self, which: Which, status: StatusCode, headers: &HeaderMap, took: Duration) {
        let mut side = self.side(which);
        side.took = Some(took);
        side.answer.status = status.as_u16();
        side.answer.grpc = compare::grpc_status(headers);
        side.answer.header_length = rest::header_length(headers).ok().flatten();
        let plain = |value: &http::HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
        side.unkept |= !headers.get_all(CONTENT_ENCODING).iter().all(plain);
        drop(side);
        let [copy, client] = [Which::Copy, Which::Client].map(|which| self.side(which).took);
        if let (Some(copy), Some(client)) = (copy, client)
            && !self.timed.replace(true)
        {
            self.cell.took(copy, client);
        }
    }

    /// A piece of an answer, or its trailers.
    pub fn frame(&self, which: Which, frame: &Frame<Bytes>) {
        let mut side = self.side(which);
        if let Some(trailers) = frame.trailers_ref() {
            if let Some(status) = compare::grpc_status(trailers) {
                side.answer.grpc = Some(status);
            }
        } else if let Some(data) = frame.data_ref() {
            side.bytes += data.len() as u64;
            if self.compare.is_none() || side.unkept {
                return;
            }
            if side.bytes <= self.compare.as_ref().map_or(0, |compare| compare.max_bytes)
                && side.claim.grow(data.len())
            {
                side.answer.body.push(data.clone());
            } else {
                side.unkept = true;
                side.let_go();
            }
        }
    }

    /// Whether an answer that has come is a failure of the server's.
    pub fn has_failed(&self, which: Which) -> bool {
        self.side(which).answer.has_failed()
    }

    /// An answer has ended. The first word counts.
    pub fn end(&self, which: Which, ended: Ended) {
        {
            let mut side = self.side(which);
            if side.ended.is_some() {
                return;
            }
            side.ended = Some(ended);
        }
        let Some(rules) = &self.compare else { return };
        let [mut copy, mut client] = [Which::Copy, Which::Client].map(|which| self.side(which));
        match (copy.ended, client.ended) {
            (Some(Ended::Lost), _) | (_, Some(Ended::Lost)) => {
                for side in [&mut copy, &mut client] {
                    side.unkept = true;
                    side.let_go();
                }
            }
            (Some(of_copy), Some(of_client)) => {
                let failed = [
                    of_copy == Ended::Failed || copy.answer.has_failed(),
                    of_client == Ended::Failed || client.answer.has_failed(),
                ];
                let bytes = [copy.bytes, client.bytes];
                if failed[0] != failed[1] {
                    copy.let_go();
                    client.let_go();
                    tell(&self.cell, bytes, &Verdict::default());
                } else if of_copy == Ended::Whole
                    && of_client == Ended::Whole
                    && !copy.unkept
                    && !client.unkept
                {
                    let answers = [copy.take(), client.take()];
                    self.judge(rules, answers, bytes);
                }
                // Two that have no answer say nothing of each other.
            }
            _ => {}
        }
    }

    /// Holds two whole answers against each other: at once if they are small, else by a thread, off the worker's way.
    fn judge(&self, rules: &Arc<Compare>, answers: [(Answer, Claim); 2], bytes: [u64; 2]) {
        let wire = self.wire;
        let [(copy, of_copy), (client, of_client)] = answers;
        if bytes.iter().sum::<u64>() <= limits::COMPARE_INLINE {
            if let Some(verdict) = compare::compare(wire, &copy, &client, rules) {
                tell(&self.cell, bytes, &verdict);
            }
            return;
        }
        let (cell, rules, comparing) =
            (Arc::clone(&self.cell), Arc::clone(rules), Rc::clone(&self.comparing));
        tokio::task::spawn_local(async move {
            // Those that wait for their turn are within the budget of bytes.
            let _turn = comparing.acquire().await;
            let work = move || compare::compare(wire, &copy, &client, &rules);
            if let Ok(Some(verdict)) = tokio::task::spawn_blocking(work).await {
                tell(&cell, bytes, &verdict);
            }
            drop((of_copy, of_client));
        });
    }
}

impl Side {
    fn let_go(&mut self) {
        self.answer.body = Vec::new();
        self.claim.clear();
    }

    fn take(&mut self) -> (Answer, Claim) {
        (std::mem::take(&mut self.answer), self.claim.split())
    }
}

fn tell(cell: &Shadow, [bytes, client_bytes]: [u64; 2], verdict: &Verdict) {
    cell.count(Count::Compared);
    cell.add(Count::Bytes, bytes);
    cell.add(Count::ClientBytes, client_bytes);
    if verdict.agrees {
        cell.count(Count::Agreed);
    }
    if let Some(same) = verdict.same_top {
        cell.count(Count::Ranked);
        if same {
            cell.count(Count::SameTop);
        }
    }
    cell.differed(verdict.largest_difference);
}

/// A client's answer of which what passes is kept too.
#[derive(Debug)]
pub struct Watched<B: Body> {
    body: B,
    pairs: Vec<Rc<Pair>>,
}

impl<B: Body<Data = Bytes> + Unpin> Watched<B> {
    /// Watches an answer. The body comes back if there is none to watch.
    pub fn new(body: B, pairs: Vec<Rc<Pair>>) -> Result<Self, B> {
        if body.is_end_stream() {
            pairs.iter().for_each(|pair| pair.end(Which::Client, Ended::Whole));
            return Err(body);
        }
        Ok(Self { body, pairs })
    }

    /// The next frame.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let ended = match &frame {
            Some(Ok(frame)) => {
                self.pairs.iter().for_each(|pair| pair.frame(Which::Client, frame));
                (frame.is_trailers() || self.body.is_end_stream()).then_some(Ended::Whole)
            }
            Some(Err(_)) => Some(Ended::Failed),
            None => Some(Ended::Whole),
        };
        if let Some(ended) = ended {
            self.end(ended);
        }
        Poll::Ready(frame)
    }

    /// Whether nothing is left of it.
    pub fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    /// How many bytes there are, as far as is known.
    pub fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B: Body> Watched<B> {
    fn end(&mut self, ended: Ended) {
        self.pairs.drain(..).for_each(|pair| pair.end(Which::Client, ended));
    }
}

impl<B: Body> Drop for Watched<B> {
    fn drop(&mut self) {
        let whole = self.body.is_end_stream();
        self.end(if whole { Ended::Whole } else { Ended::Lost });
    }
}
