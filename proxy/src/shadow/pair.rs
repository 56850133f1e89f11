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
                let kept =
                    of_copy == Ended::Whole && of_client == Ended::Whole && !copy.unkept && !client.unkept;
                // Whatever comes of it, nothing is held here any more.
                let (bytes, answers) = ([copy.bytes, client.bytes], [copy.take(), client.take()]);
                if failed[0] != failed[1] {
                    tell(&self.cell, bytes, &Verdict::default());
                } else if kept {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Tolerance;
    use crate::telemetry::Shadows;
    use crate::telemetry::shadow::{Counts, Parties};
    use http_body_util::{BodyExt as _, Full};

    const MOST: u64 = 1 << 20;

    struct Bed {
        shadows: Shadows,
        cell: Arc<Shadow>,
        budget: Rc<Budget>,
    }

    impl Bed {
        fn new() -> Self {
            let shadows = Shadows::default();
            let of = Parties { service: "a/x".parse().unwrap(), mirror: "a/y".parse().unwrap() };
            let cell = shadows.cell(of);
            Self { shadows, cell, budget: Budget::new(4 * MOST) }
        }

        fn pair(&self) -> Rc<Pair> {
            let rules = Compare { tolerance: Tolerance::default(), outputs: Vec::new(), max_bytes: MOST };
            let comparing = Rc::new(Semaphore::new(1));
            Pair::new(Arc::clone(&self.cell), Some(Arc::new(rules)), Wire::Other, &self.budget, &comparing)
        }

        /// Compared, and of those agreed, since the last time.
        fn counted(&self) -> (u64, u64) {
            let counts = self.shadows.take_rows().pop().map_or_else(Counts::default, |(_, counts)| counts);
            assert_eq!(self.budget.held(), 0, "nothing is held any more");
            (counts.of(Count::Compared), counts.of(Count::Agreed))
        }
    }

    fn answer(pair: &Pair, which: Which, status: u16, body: &[u8]) {
        let head = StatusCode::from_u16(status).unwrap();
        pair.head(which, head, &HeaderMap::new(), Duration::from_millis(1));
        pair.frame(which, &Frame::data(Bytes::copy_from_slice(body)));
    }

    #[test]
    fn how_two_answers_end_decides_whether_they_are_compared() {
        use Ended::{Failed, Lost, Whole};
        // The copy's status and end, the client's, how many are compared and agree.
        let table = [
            ((200, Whole), (200, Whole), (1, 1)),
            ((500, Whole), (200, Whole), (1, 0)),
            ((200, Whole), (503, Whole), (1, 0)),
            ((200, Failed), (200, Whole), (1, 0)),
            ((200, Whole), (200, Failed), (1, 0)),
            // Both have failed in the same words; or without any.
            ((500, Whole), (500, Whole), (1, 1)),
            ((200, Failed), (200, Failed), (0, 0)),
            ((200, Lost), (200, Whole), (0, 0)),
            ((200, Whole), (200, Lost), (0, 0)),
        ];
        let bed = Bed::new();
        for ((status, ended), (client_status, client_ended), expected) in table {
            for client_first in [false, true] {
                let pair = bed.pair();
                answer(&pair, Which::Copy, status, b"body");
                answer(&pair, Which::Client, client_status, b"body");
                let mut ends = [(Which::Copy, ended), (Which::Client, client_ended)];
                if client_first {
                    ends.reverse();
                }
                for (which, ended) in ends {
                    pair.end(which, ended);
                    // The first word counts.
                    pair.end(which, Lost);
                }
                let case = format!("{status} {ended:?} against {client_status} {client_ended:?}");
                assert_eq!(bed.counted(), expected, "{case}");
            }
        }
    }

    #[test]
    fn what_is_above_the_bound_or_encoded_is_not_compared_and_not_held() {
        let bed = Bed::new();
        let pair = bed.pair();
        answer(&pair, Which::Copy, 200, &vec![0; MOST as usize + 1]);
        assert_eq!(bed.budget.held(), 0);
        answer(&pair, Which::Client, 200, b"x");
        for which in [Which::Copy, Which::Client] {
            pair.end(which, Ended::Whole);
        }
        drop(pair);
        assert_eq!(bed.counted(), (0, 0));

        let pair = bed.pair();
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_ENCODING, http::HeaderValue::from_static("gzip"));
        pair.head(Which::Client, StatusCode::OK, &headers, Duration::ZERO);
        answer(&pair, Which::Copy, 200, b"");
        for which in [Which::Copy, Which::Client] {
            pair.end(which, Ended::Whole);
        }
        drop(pair);
        assert_eq!(bed.counted(), (0, 0));
    }

    #[tokio::test]
    async fn large_answers_are_compared_by_a_thread_and_held_until_then() {
        let bed = Bed::new();
        let local = tokio::task::LocalSet::new();
        let held = local.run_until(async {
            let body = vec![7; limits::COMPARE_INLINE as usize];
            let pair = bed.pair();
            for which in [Which::Copy, Which::Client] {
                answer(&pair, which, 200, &body);
                pair.end(which, Ended::Whole);
            }
            bed.budget.held()
        });
        assert_eq!(held.await, 2 * limits::COMPARE_INLINE);
        local.await;
        assert_eq!(bed.counted(), (1, 1));
    }

    #[tokio::test]
    async fn the_clients_answer_passes_untouched_and_one_that_it_leaves_is_lost() {
        let bed = Bed::new();
        let pair = bed.pair();
        answer(&pair, Which::Copy, 200, b"abc");
        pair.end(Which::Copy, Ended::Whole);
        pair.head(Which::Client, StatusCode::OK, &HeaderMap::new(), Duration::ZERO);
        let body = Full::new(Bytes::from_static(b"abc"));
        let mut watched = Watched::new(body, vec![pair]).unwrap();
        assert_eq!(watched.size_hint().exact(), Some(3));
        let frame = std::future::poll_fn(|cx| watched.poll_frame(cx)).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "abc");
        // hyper asks for no more.
        drop(watched);
        assert_eq!(bed.counted(), (1, 1));

        let pair = bed.pair();
        answer(&pair, Which::Copy, 200, b"abc");
        pair.end(Which::Copy, Ended::Whole);
        let body = Full::new(Bytes::from_static(b"abc")).map_err(|never| match never {});
        let unread: Watched<http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>> =
            Watched::new(body.boxed_unsync(), vec![pair]).unwrap();
        drop(unread);
        assert_eq!(bed.counted(), (0, 0));
    }
}
