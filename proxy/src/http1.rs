//! Speaking HTTP/1 with a client: hyper while something goes on, and [`rest`](crate::rest) in between.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep};

use crate::body::ResponseBody;
use crate::drain::Leave;
use crate::limits::{self, Limits};
use crate::receive::gate::Mismatch;
use crate::receive::{Claims, ClientBody};
use crate::rest::{Activity, Answer, Look, Wire};

/// Why a connection was closed that could have gone on.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// As hyper says it.
    #[error(transparent)]
    Hyper(hyper::Error),
    /// A request's head did not come.
    #[error("no whole head of a request came within {0:?}")]
    TooLate(Duration),
}

/// Serves requests over a connection until it ends; `rested` hears of each time that it comes to rest.
pub async fn serve<T, H, F>(
    stream: T,
    claims: Claims,
    limits: &Limits,
    leave: Leave,
    rested: impl Fn(),
    handle: H,
) -> Result<(), Ended>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<ClientBody>) -> F + 'static,
    F: Future<Output = Result<Response<ResponseBody>, Infallible>> + 'static,
{
    let patience = limits.header_time;
    let activity = Activity::new(Instant::now());
    let (leaving, goes_on) = (leave.lingers.clone().unwrap_or_default(), Rc::clone(&activity));
    let claims = Rc::new(claims);
    let gate = Rc::clone(&claims);
    let mut service = service_fn(move |request: Request<Incoming>| {
        let busy = goes_on.begin();
        let (mut parts, body) = request.into_parts();
        if parts.extensions.get::<OnUpgrade>().is_some() {
            goes_on.stays();
        }
        let claimed = claims.of(&mut parts.headers);
        let handled = claimed.map(|direct| {
            let body = match direct {
                Some(direct) => ClientBody::Direct(Box::new(direct)),
                None => {
                    let comes = (!hyper::body::Body::is_end_stream(&body)).then(|| goes_on.another());
                    ClientBody::Hyper(body, comes)
                }
            };
            handle(Request::from_parts(parts, body))
        });
        let (leaving, claims, number) = (Rc::clone(&leaving), Rc::clone(&claims), claims.number());
        async move {
            let mut response = handled?.await.map_err(|never| -> Mismatch { match never {} })?;
            // What has become something else is nobody's to end.
            if (leaving.get() || claims.ends_with(number)) && !response.headers().contains_key(UPGRADE) {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Mismatch>(response.map(|body| Answer::new(body, busy)))
        }
    });
    let mut wire = Wire::new(stream, &activity);
    let clock = pin!(tokio::time::sleep_until(Activity::next_look(Instant::now(), patience)));
    let mut course = Course { activity, leave, clock, patience };
    loop {
        let serving = server(limits).serve_connection(TokioIo::new(wire), service).with_upgrades();
        // Boxed: it goes when the connection rests.
        let mut serving = Box::new(serving);
        let turn =
            poll_fn(|cx| course.poll_turn(&mut *serving, |serving| serving.graceful_shutdown(), cx)).await;
        let turn = turn.map_err(Ended::Hyper)?;
        // Or it has become something else, which is its end here.
        let (Some(turn), Some(parts)) = (turn, serving.into_parts()) else { return Ok(()) };
        (wire, service) = (parts.io.into_inner(), parts.service);
        wire.put_back(parts.read_buf);
        let next = match turn {
            Turn::Broken => Next::Nothing,
            Turn::TooLate if wire.is_in_head() || gate.is_in_head() => Next::TooLate,
            Turn::TooLate => Next::Nothing,
            Turn::Rests if wire.is_in_head() => Next::Byte,
            Turn::Rests => {
                course.rests();
                rested();
                poll_fn(|cx| course.poll_next(&mut wire, &gate, cx)).await
            }
        };
        course.wakes();
        match next {
            Next::Byte => {}
            Next::Nothing => {
                poll_fn(|cx| wire.poll_close(b"", cx)).await;
                return Ok(());
            }
            Next::TooLate => {
                poll_fn(|cx| wire.poll_close(TOO_LATE, cx)).await;
                return Err(Ended::TooLate(patience));
            }
        }
    }
}

/// hyper's HTTP/1 server with our limits.
fn server(limits: &Limits) -> http1::Builder {
    let mut server = http1::Builder::new();
    server
        .max_headers(limits.header_count)
        .max_buf_size(limits::READ)
        .max_header_size(limits.header_bytes as usize)
        // A client that ends its side has left: what works for it is cancelled, not finished for nobody.
        .half_close(false)
        .auto_date_header(false);
    server
}

/// The answer to whoever has not finished a head.
const TOO_LATE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\npenstock-error: header-timeout\r\n\
    content-length: 0\r\nconnection: close\r\n\r\n";

/// What ends hyper's turn before the connection is over.
enum Turn {
    /// Nothing goes on.
    Rests,
    /// The same, but in the middle of a request: nobody can tell where the next would begin.
    Broken,
    /// A head did not come.
    TooLate,
}

/// What ends a connection's rest.
enum Next {
    /// The beginning of a request.
    Byte,
    /// Its end: the client has left, or it has rested for too long, or it is time to leave.
    Nothing,
    /// A head that has begun did not end.
    TooLate,
}

/// The course of one connection.
struct Course<'a> {
    activity: Rc<Activity>,
    leave: Leave,
    /// The next look, or the end of a rest.
    clock: Pin<&'a mut Sleep>,
    patience: Duration,
}

impl Course<'_> {
    /// Drives hyper; `say` has it shut down gracefully. `None`: the connection is over.
    fn poll_turn<C>(
        &mut self,
        serving: &mut C,
        say: fn(Pin<&mut C>),
        cx: &mut Context<'_>,
    ) -> Poll<hyper::Result<Option<Turn>>>
    where
        C: Future<Output = hyper::Result<()>> + Unpin,
    {
        if self.leave.poll(cx).is_ready() {
            say(Pin::new(serving));
        }
        loop {
            if let Poll::Ready(result) = Pin::new(&mut *serving).poll(cx) {
                return Poll::Ready(result.map(|()| None));
            }
            ready!(self.clock.as_mut().poll(cx));
            let now = Instant::now();
            self.clock.as_mut().reset(Activity::next_look(now, self.patience));
            match self.activity.look(now, self.patience) {
                Look::Busy => {}
                Look::TooLate => return Poll::Ready(Ok(Some(Turn::TooLate))),
                Look::Rests if self.leave.has_said() => {}
                Look::Rests => {
                    self.activity.set_resting(true);
                    say(Pin::new(serving));
                    if let Poll::Ready(result) = Pin::new(&mut *serving).poll(cx) {
                        let between = self.activity.is_between_requests();
                        return Poll::Ready(
                            result.map(|()| Some(if between { Turn::Rests } else { Turn::Broken })),
                        );
                    }
                    self.activity.set_resting(false);
                }
            }
        }
    }

    /// The connection rests, for as long as the next head is waited for.
    fn rests(&mut self) {
        self.clock.as_mut().reset(self.activity.too_late(self.patience));
    }

    /// It does no more.
    fn wakes(&mut self) {
        let now = Instant::now();
        self.activity.wakes(now);
        self.clock.as_mut().reset(Activity::next_look(now, self.patience));
    }

    /// Waits for the end of a rest.
    fn poll_next<T>(&mut self, wire: &mut Wire<T>, gate: &Claims, cx: &mut Context<'_>) -> Poll<Next>
    where
        T: AsyncRead + Unpin,
    {
        if self.leave.poll(cx).is_ready() {
            return Poll::Ready(Next::Nothing);
        }
        if let Poll::Ready(came) = wire.poll_byte(cx) {
            // Whoever breaks off a connection that rests has lost nothing.
            return Poll::Ready(if came.unwrap_or(false) { Next::Byte } else { Next::Nothing });
        }
        if gate.is_in_head() {
            return Poll::Ready(Next::Byte);
        }
        self.clock.as_mut().poll(cx).map(|()| Next::Nothing)
    }
}

#[cfg(test)]
#[path = "http1_tests.rs"]
mod tests;
