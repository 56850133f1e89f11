//! One answer that several clients read while it comes in.
//!
//! A pump writes what the server sends, and each reader reads at its own place. What has come in is kept up to a bound;
//! a reader that lags behind by more is cut, and nobody else notices. The pump goes ahead of the fastest reader by no more
//! than another bound, so that clients that read slowly slow the server down, as they would alone. When the last reader
//! leaves, the pump is stopped. [`Records`] is where those who ask the same find each other.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use ahash::AHashMap;
use bytes::Bytes;
use http::header::SET_COOKIE;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::Frame;
use penstock_api::{Reason, names};
use penstock_coalesce::key::Hash;
use tokio::task::AbortHandle;

use super::{How, wire};
use crate::body::ResponseBody;
use crate::config::Endpoint;
use crate::failure::Failure;
use crate::headers;
use crate::telemetry::trace::Span;

/// Bytes of an answer that are kept for those who lag, and for those who come later.
pub const KEPT: usize = 1 << 20;
/// Bytes that the pump goes ahead of the fastest reader.
const AHEAD: u64 = 256 << 10;

/// Answers that come in at once; above, requests go each its own way.
const MAX_RECORDS: usize = 16_384;

/// What comes before an answer's body.
#[derive(Clone, Debug)]
pub struct Head {
    /// The status.
    pub status: u16,
    /// The headers that every reader gets.
    pub headers: HeaderMap,
    /// It set a cookie: it was for one, and is not kept for others.
    pub for_one: bool,
    /// Who answered.
    pub endpoint: Arc<Endpoint>,
    /// The span of the request that was sent, if it is recorded.
    pub span: Option<Span>,
}

impl Head {
    /// Of an answer's own headers those that every reader gets: not those of the hop, nor what was meant for one alone.
    pub fn for_all(status: u16, mut all: HeaderMap, endpoint: Arc<Endpoint>, span: Option<Span>) -> Self {
        let found = headers::look(&all);
        headers::strip_hop(&mut all, found, false);
        let for_one = all.remove(SET_COOKIE).is_some();
        // Each reader's own load report is put there later; the server's own was about another moment.
        all.remove(headers::LOAD_REPORT);
        all.remove(headers::LOAD_REPORT_BIN);
        Self { status, headers: all, for_one, endpoint, span }
    }

    /// Whether all who ask the same would get it: no error of this one execution.
    pub fn is_for_all(&self) -> bool {
        self.status < 400 || wire::is_unavailable(self.status)
    }

    /// A response of it.
    pub(super) fn response(&self, how: How, body: ResponseBody) -> Response<ResponseBody> {
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_GATEWAY);
        *response.headers_mut() = self.headers.clone();
        let word = HeaderValue::from_static(how.as_str());
        match how {
            // What came from further on may have been somebody's already.
            How::Miss => drop(response.headers_mut().entry(names::header::CACHE).or_insert(word)),
            How::Hit | How::Coalesced => drop(response.headers_mut().insert(names::header::CACHE, word)),
        }
        response
    }
}

/// Answers that come in, by what was asked.
#[derive(Clone, Debug, Default)]
pub struct Records(Arc<Mutex<AHashMap<Hash, Arc<Record>>>>);

impl Records {
    fn lock(&self) -> MutexGuard<'_, AHashMap<Hash, Arc<Record>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reader of the answer to that, and, for the first who asks, the pen: somebody has to see to it that the answer
    /// comes. `None`: too many answers come in.
    pub fn join(&self, key: Hash) -> Option<(Reader, Option<Pen>)> {
        let mut records = self.lock();
        if let Some(reader) = records.get(&key).and_then(Record::reader) {
            return Some((reader, None));
        }
        if records.len() >= MAX_RECORDS {
            return None;
        }
        let (reader, pen) = self.apart(key)?;
        records.insert(key, Arc::clone(&pen.record));
        Some((reader, Some(pen)))
    }

    /// The same for one who shares it with nobody.
    pub fn apart(&self, key: Hash) -> Option<(Reader, Pen)> {
        let record = Arc::new(Record::default());
        Some((record.reader()?, Pen { records: self.clone(), key, record }))
    }
}

/// What writes an answer. Dropping it ends the answer, and nobody finds it any more.
#[derive(Debug)]
pub struct Pen {
    records: Records,
    key: Hash,
    /// What is written.
    pub record: Arc<Record>,
}

impl Drop for Pen {
    fn drop(&mut self) {
        let mut records = self.records.lock();
        if records.get(&self.key).is_some_and(|known| Arc::ptr_eq(known, &self.record)) {
            records.remove(&self.key);
        }
        drop(records);
        self.record.end(Err(given_up()));
    }
}

fn given_up() -> Failure {
    Failure::new(Reason::UpstreamIncomplete, "the answer was given up, since nobody read it")
}

/// An answer while it comes in.
#[derive(Debug, Default)]
pub struct Record {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    head: Option<Head>,
    chunks: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
    /// Chunks that have been let go.
    gone: usize,
    kept: usize,
    written: u64,
    /// Bytes that the fastest has read.
    read: u64,
    ended: Option<Result<(), Failure>>,
    readers: usize,
    waiting: Vec<Waker>,
    pump: Option<Waker>,
    task: Option<AbortHandle>,
}

impl State {
    fn wake(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }
}

impl Record {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What writes it, to be stopped when nobody reads.
    pub fn pumped_by(&self, task: AbortHandle) {
        self.state().task = Some(task);
    }

    /// The headers have come.
    pub fn head(&self, head: Head) {
        let mut state = self.state();
        state.head = Some(head);
        state.wake();
    }

    /// A piece of the body has come; ready when the next may come.
    pub async fn push(&self, chunk: Bytes) {
        {
            let mut state = self.state();
            state.written += chunk.len() as u64;
            state.kept += chunk.len();
            state.chunks.push_back(chunk);
            while state.kept > KEPT
                && let Some(old) = state.chunks.pop_front()
            {
                state.kept -= old.len();
                state.gone += 1;
            }
            state.wake();
        }
        std::future::poll_fn(|cx| {
            let mut state = self.state();
            if state.written.saturating_sub(state.read) <= AHEAD {
                return Poll::Ready(());
            }
            state.pump = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The trailers have come.
    pub fn trailers(&self, trailers: HeaderMap) {
        self.state().trailers = Some(trailers);
    }

    /// It is over, whole or not.
    pub fn end(&self, how: Result<(), Failure>) {
        let mut state = self.state();
        state.ended.get_or_insert(how);
        state.wake();
    }

    /// All of it, once it is over, if all of it was kept and it is for anybody.
    pub fn whole(&self) -> Option<(Head, Vec<Bytes>)> {
        let state = self.state();
        let complete = matches!(state.ended, Some(Ok(()))) && state.gone == 0 && state.trailers.is_none();
        let head = state.head.clone().filter(|head| complete && !head.for_one)?;
        Some((head, state.chunks.iter().cloned().collect()))
    }

    /// Another reader, from the beginning; `None`: the beginning is gone, or it has ended badly.
    pub fn reader(self: &Arc<Self>) -> Option<Reader> {
        let mut state = self.state();
        if state.gone > 0 || matches!(state.ended, Some(Err(_))) {
            return None;
        }
        state.readers += 1;
        drop(state);
        Some(Reader { record: Arc::clone(self), at: 0, read: 0, at_end: false })
    }
}

/// One reader's place.
#[derive(Debug)]
pub struct Reader {
    record: Arc<Record>,
    at: usize,
    read: u64,
    at_end: bool,
}

/// Why a reader gets no further.
#[derive(Clone, Debug)]
pub enum Cut {
    /// The server broke off.
    Broken(Failure),
    /// It lagged behind too far.
    Lagged,
}

impl Reader {
    /// The headers, once they are there.
    pub async fn head(&self) -> Result<Head, Failure> {
        std::future::poll_fn(|cx| {
            let mut state = self.record.state();
            match (&state.head, &state.ended) {
                (Some(head), _) => return Poll::Ready(Ok(head.clone())),
                (None, Some(Err(failure))) => return Poll::Ready(Err(failure.clone())),
                (None, _) => {}
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// The next piece, and behind the last the trailers.
    pub fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let this = self.get_mut();
        let mut state = this.record.state();
        if this.at_end {
            return Poll::Ready(None);
        }
        let Some(at) = this.at.checked_sub(state.gone) else {
            return Poll::Ready(Some(Err(Cut::Lagged)));
        };
        if let Some(chunk) = state.chunks.get(at).cloned() {
            this.at += 1;
            this.read += chunk.len() as u64;
            if this.read > state.read {
                state.read = this.read;
                if let Some(pump) = state.pump.take() {
                    pump.wake();
                }
            }
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        match &state.ended {
            Some(Ok(())) => {
                this.at_end = true;
                Poll::Ready(state.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))))
            }
            Some(Err(failure)) => Poll::Ready(Some(Err(Cut::Broken(failure.clone())))),
            None => {
                state.waiting.push(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.record.state();
        state.readers -= 1;
        if state.readers == 0
            && state.ended.is_none()
            && let Some(task) = state.task.take()
        {
            // Said at once: the task is stopped some time later, and who came in between would be cut with it.
            state.ended = Some(Err(given_up()));
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    /// What nobody asks who has sent it.
    fn head() -> Head {
        let nowhere = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let endpoint = Endpoint::new("a/b".into(), nowhere, 1, None, false, crate::config::Speak::Same);
        Head::for_all(200, HeaderMap::new(), Arc::new(endpoint), None)
    }

    async fn next(reader: &mut Reader) -> Option<Result<Frame<Bytes>, Cut>> {
        poll_fn(|cx| Pin::new(&mut *reader).poll_next(cx)).await
    }

    async fn all(mut reader: Reader) -> Result<Vec<u8>, Cut> {
        let mut bytes = Vec::new();
        while let Some(chunk) = next(&mut reader).await {
            bytes.extend_from_slice(&chunk?.into_data().unwrap());
        }
        Ok(bytes)
    }

    #[tokio::test]
    async fn everybody_reads_all_of_it_whenever_they_came() {
        let record = Arc::new(Record::default());
        let early = tokio::spawn(all(record.reader().unwrap()));
        record.head(head());
        for piece in ["one ", "two ", "three"] {
            record.push(Bytes::from_static(piece.as_bytes())).await;
            tokio::task::yield_now().await;
        }
        let late = record.reader().unwrap();
        record.end(Ok(()));
        assert_eq!(early.await.unwrap().unwrap(), b"one two three");
        assert_eq!(late.head().await.unwrap().status, 200);
        assert_eq!(all(late).await.unwrap(), b"one two three");
        assert_eq!(record.whole().unwrap().1.len(), 3);
    }

    #[tokio::test]
    async fn who_lags_too_far_is_cut_and_nobody_else_is() {
        let record = Arc::new(Record::default());
        let mut slow = record.reader().unwrap();
        let fast = tokio::spawn(all(record.reader().unwrap()));
        let piece = Bytes::from(vec![7; 64 << 10]);
        for _ in 0..40 {
            record.push(piece.clone()).await;
        }
        record.end(Ok(()));
        assert_eq!(fast.await.unwrap().unwrap().len(), 40 * (64 << 10));
        assert!(matches!(next(&mut slow).await, Some(Err(Cut::Lagged))));
        assert!(record.reader().is_none() && record.whole().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn the_pump_waits_for_the_fastest() {
        let record = Arc::new(Record::default());
        let mut reader = record.reader().unwrap();
        let pushing = Arc::clone(&record);
        let mut pump = tokio::spawn(async move {
            for _ in 0..10 {
                pushing.push(Bytes::from(vec![0; 100 << 10])).await;
            }
        });
        let waits = tokio::time::timeout(std::time::Duration::from_secs(1), &mut pump).await;
        assert!(waits.is_err(), "it went ahead of everybody");
        for _ in 0..10 {
            next(&mut reader).await.unwrap().unwrap();
        }
        pump.await.unwrap();
    }

    #[tokio::test]
    async fn what_breaks_off_breaks_off_for_all() {
        let record = Arc::new(Record::default());
        let reader = record.reader().unwrap();
        record.head(head());
        record.push(Bytes::from_static(b"half")).await;
        record.end(Err(Failure::new(Reason::UpstreamIncomplete, "gone")));
        assert!(matches!(all(reader).await, Err(Cut::Broken(_))));
        assert!(record.reader().is_none());
    }

    #[tokio::test]
    async fn the_pump_is_stopped_when_the_last_has_left() {
        let record = Arc::new(Record::default());
        let (one, other) = (record.reader().unwrap(), record.reader().unwrap());
        let task = tokio::spawn(std::future::pending::<()>());
        record.pumped_by(task.abort_handle());
        drop(one);
        tokio::task::yield_now().await;
        assert!(!task.is_finished());
        drop(other);
        // Not even who comes before the task has stopped reads half an answer.
        assert!(record.reader().is_none());
        assert!(task.await.unwrap_err().is_cancelled());
    }

    #[tokio::test]
    async fn trailers_come_last_and_to_everybody() {
        let record = Arc::new(Record::default());
        let readers = [record.reader().unwrap(), record.reader().unwrap()];
        record.push(Bytes::from_static(b"x")).await;
        let trailers: HeaderMap =
            [(http::HeaderName::from_static("grpc-status"), http::HeaderValue::from_static("0"))]
                .into_iter()
                .collect();
        record.trailers(trailers.clone());
        record.end(Ok(()));
        for mut reader in readers {
            assert!(next(&mut reader).await.unwrap().unwrap().is_data());
            assert_eq!(next(&mut reader).await.unwrap().unwrap().into_trailers().unwrap(), trailers);
            assert!(next(&mut reader).await.is_none());
        }
    }

    #[tokio::test]
    async fn the_first_writes_and_those_who_ask_the_same_read() {
        let records = Records::default();
        let (_first, pen) = records.join([1; 32]).unwrap();
        let pen = pen.unwrap();
        let (second, none) = records.join([1; 32]).unwrap();
        assert!(none.is_none());
        assert!(records.join([2; 32]).unwrap().1.is_some(), "another question has an answer of its own");
        drop(pen);
        assert!(second.head().await.is_err(), "given up");
        let (_third, pen) = records.join([1; 32]).unwrap();
        assert!(pen.is_some(), "and asked anew by who comes later");
        let (_own, apart) = records.apart([1; 32]).unwrap();
        drop(apart);
        assert!(records.join([1; 32]).unwrap().1.is_none(), "who is apart takes nobody's place");
    }
}
