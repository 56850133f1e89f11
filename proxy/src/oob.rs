//! Load reports out of band (gRFC A51): a stock gRPC client that balances by load subscribes to them, once for each
//! server, and learns of it even while it sends it nothing.
//!
//! In: a call of `/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics` on a connection that leads to the application.
//! Out: one report at once and then one each interval, until the client has enough, its connection ends or we leave; then
//! `UNAVAILABLE`, so that the client looks elsewhere. What can go wrong: a question that is none (`INVALID_ARGUMENT`), a
//! client that does not finish it, or too many streams (`RESOURCE_EXHAUSTED`); clients ask again later by themselves.
//!
//! The application never hears of it. Nor is it a request: it is no load, no outcome, and nothing that a drain waits for.

use std::cell::Cell;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::Stream;
use futures_util::stream::unfold;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt as _, Limited};
use penstock_inference::orca::service::{OrcaLoadReportRequest, interval};
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior};

use crate::access;
use crate::answer;
use crate::body::ResponseBody;
use crate::connection::Connection;
use crate::receive::ClientBody;
use crate::report;
use crate::telemetry::metric;
use crate::worker::Worker;

/// The call.
pub const PATH: &str = "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics";
/// The shortest interval: a load changes with each batch, which takes some milliseconds, but a client that shares out
/// requests by weights takes them up once a second.
pub const LEAST_INTERVAL: Duration = Duration::from_millis(100);
/// Streams of one worker at once: at the shortest interval ten thousand small frames a second.
pub const STREAMS: u32 = 1024;
/// A question has some dozens of bytes for each metric that it names; a gRPC client may name as many as it likes.
const QUESTION_BYTES: usize = 16 << 10;

/// The streams of a worker that are open.
#[derive(Debug, Default)]
pub struct Subscriptions(Cell<u32>);

/// gRPC's statuses, as far as they are answered here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    InvalidArgument = 3,
    ResourceExhausted = 8,
    Unimplemented = 12,
    Unavailable = 14,
}

/// Whether the request is for us rather than for the application. Whom the port or a policy refuses whatever he asks is refused
/// here too: for him it is a request like any other.
pub fn asked<B>(connection: &Connection, request: &Request<B>) -> bool {
    request.version() == Version::HTTP_2
        && request.uri().path() == PATH
        && request.method() == http::Method::POST
        && answer::is_grpc(request.headers())
        && access::may_ask_something(connection)
}

/// Reads the question and begins to answer.
pub async fn answer(worker: &Rc<Worker>, request: Request<ClientBody>) -> Response<ResponseBody> {
    match subscribe(worker, request).await {
        Ok(reports) => grpc(ResponseBody::Reports(reports)),
        Err((status, story)) => {
            let mut response = grpc(ResponseBody::empty());
            *response.headers_mut() = trailers(status, &story);
            response.headers_mut().insert(CONTENT_TYPE, GRPC);
            response
        }
    }
}

async fn subscribe(worker: &Rc<Worker>, request: Request<ClientBody>) -> Result<Reports, (Status, String)> {
    let open = Open::another(worker).ok_or_else(|| {
        let story = format!("{} has {STREAMS} streams of load reports already", worker.shared.node);
        (Status::ResourceExhausted, story)
    })?;
    let limit = worker.shared.limits.header_time;
    let reading = tokio::time::timeout(limit, Limited::new(request.into_body(), QUESTION_BYTES).collect());
    let bad = |why: String| (Status::InvalidArgument, format!("no OrcaLoadReportRequest: {why}"));
    let read = reading.await.map_err(|_| bad(format!("it was not finished within {limit:?}")))?;
    let question = question(&read.map_err(|error| bad(error.to_string()))?.to_bytes())?;
    Ok(Reports::new(open, interval(&question, LEAST_INTERVAL)))
}

/// The one message of the call: a byte that says whether it is compressed, four of length, the message (gRPC over
/// HTTP/2, "Length-Prefixed-Message").
fn question(body: &[u8]) -> Result<OrcaLoadReportRequest, (Status, String)> {
    let bad = |why: &str| (Status::InvalidArgument, format!("no OrcaLoadReportRequest: {why}"));
    let (head, message) = body.split_first_chunk::<5>().ok_or_else(|| bad("it has no message"))?;
    let [compressed, length @ ..] = *head;
    if compressed != 0 {
        return Err((Status::Unimplemented, "compressed questions are not understood".to_owned()));
    }
    if u32::from_be_bytes(length) as usize != message.len() {
        return Err(bad("its length is not what it says"));
    }
    OrcaLoadReportRequest::decode(message).map_err(|error| bad(&error.to_string()))
}

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

fn grpc(body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    response
}

fn trailers(status: Status, story: &str) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(3);
    answer::grpc_status(&mut trailers, status as u8, story);
    trailers
}

/// Counts as an open stream until it is dropped.
struct Open(Rc<Worker>);

impl Open {
    /// One more, if that is not too many.
    fn another(worker: &Rc<Worker>) -> Option<Self> {
        let streams = &worker.subscriptions.0;
        if streams.get() >= STREAMS {
            return None;
        }
        streams.set(streams.get() + 1);
        metrics::gauge!(metric::REPORT_STREAMS.name).increment(1.0);
        Some(Self(Rc::clone(worker)))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let streams = &self.0.subscriptions.0;
        streams.set(streams.get() - 1);
        metrics::gauge!(metric::REPORT_STREAMS.name).decrement(1.0);
    }
}

/// The body of the answer: reports, and at the end the word that we leave.
pub struct Reports(Pin<Box<dyn Stream<Item = Frame<Bytes>>>>);

impl fmt::Debug for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reports")
    }
}

impl Reports {
    fn new(open: Open, every: Duration) -> Self {
        let leaving = open.0.shared.drain.subscribe();
        let mut due = tokio::time::interval(every);
        // A client that reads slowly gets the newest report when it reads, not all that it has missed.
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self(Box::pin(unfold(Some((open, due, leaving)), next)))
    }

    /// The next frame; `None`: there is none any more.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        self.0.as_mut().poll_next(cx)
    }
}

/// What a stream needs for its next frame; `None`: the last one was the end.
type State = Option<(Open, Interval, watch::Receiver<bool>)>;

async fn next(state: State) -> Option<(Frame<Bytes>, State)> {
    let (open, mut due, mut leaving) = state?;
    let over = tokio::select! {
        biased;
        // It cannot fail while the worker, which the guard holds, is there.
        _ = leaving.wait_for(|leaving| *leaving) => true,
        _ = due.tick() => false,
    };
    if over {
        let story = format!("{} is leaving", open.0.shared.node);
        return Some((Frame::trailers(trailers(Status::Unavailable, &story)), None));
    }
    let frame = Frame::data(report(&open.0));
    Some((frame, Some((open, due, leaving))))
}

/// The report of the moment, as one message: of all models together, since the client has not said for which it asks.
fn report(worker: &Worker) -> Bytes {
    let load = report::load(worker, &worker.model(""));
    let mut frame = BytesMut::with_capacity(512);
    frame.put_bytes(0, 5);
    load.write_protobuf(&mut frame);
    let length = (frame.len() - 5) as u32;
    frame[1..5].copy_from_slice(&length.to_be_bytes());
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_one_whole_message() {
        let interval = Some(prost_types::Duration { seconds: 0, nanos: 250_000_000 });
        let asked = OrcaLoadReportRequest { report_interval: interval, ..Default::default() };
        let message = asked.encode_to_vec();
        let framed = |compressed: u8, length: usize| {
            let mut body = vec![compressed];
            body.extend((length as u32).to_be_bytes());
            body.extend(&message);
            body
        };
        assert_eq!(question(&framed(0, message.len())), Ok(asked));
        assert_eq!(question(&[0; 5]), Ok(OrcaLoadReportRequest::default()), "nothing said is the default");
        for (body, status) in [
            (framed(1, message.len()), Status::Unimplemented),
            (framed(0, message.len() - 1), Status::InvalidArgument),
            (framed(0, message.len() + 1), Status::InvalidArgument),
            (vec![0; 4], Status::InvalidArgument),
            (vec![], Status::InvalidArgument),
            (vec![0, 0, 0, 0, 1, 0xff], Status::InvalidArgument),
        ] {
            assert_eq!(question(&body).map_err(|(status, _)| status), Err(status), "{body:?}");
        }
    }
}
