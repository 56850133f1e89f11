//! Sending a request to an endpoint, and again to another where that is allowed.
//!
//! In: a request, the backend that the split chose. Out: a response whose body still streams, with the lease of its
//! connection; or a failure that says whether the server can have begun to work.

pub mod connect;
pub mod pool;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Version};
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use penstock_api::reason::Blame;
use penstock_api::{Reason, ServiceName};
use tokio::time::Instant;

use crate::body::{RequestBody, RequestBroken};
use crate::config::{Backend, Cluster, Endpoint, Policy, RetryPolicy, Rule, Speak, Timeouts};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers::{self, Form};
use crate::worker::Worker;

pub use pool::Lease;

/// A request on its way out. It is boxed once and then handed from stage to stage: by value it would be copied at each.
#[derive(Debug)]
pub struct Outgoing {
    /// The request; its target and Host are brought into the form of the connection later.
    pub request: Request<RequestBody>,
    /// Host and port, as the server shall see them.
    pub authority: http::uri::Authority,
    /// The version that the application spoke.
    pub spoken: Version,
    /// It asks to become another protocol, so it needs a connection of its own.
    pub upgrade: bool,
}

/// A response with what it holds.
#[derive(Debug)]
pub struct Answered {
    /// The response.
    pub response: Response<Incoming>,
    /// Its connection.
    pub lease: Lease,
    /// How long nothing may move.
    pub idle: Option<Duration>,
}

/// Closed connections that a request may meet in the pools before one counts as a failure: after a restart of the
/// server there can be several.
const STALE: u32 = 8;

/// Sends a request to the endpoints of a backend until one answers or nothing more may be tried.
pub async fn send(
    exchange: &Rc<Exchange>,
    rule: &Rule,
    asked: &ServiceName,
    backend: &Backend,
    mut outgoing: Box<Outgoing>,
) -> Result<Answered, Failure> {
    let cluster = &backend.cluster;
    let worker = &exchange.worker;
    let policy = cluster.policy();
    let retry = rule.retry.as_ref().unwrap_or(&policy.retry);
    let times = Times::new(exchange.started(), &rule.timeouts, &policy);
    admit(cluster, &policy)?;
    cluster.budget.request(worker.now());

    let replay = match Replay::wanted(&outgoing, retry) {
        true => {
            let whole = Box::pin(Replay::keep(&mut outgoing));
            Some(before(times.deadline, "the request's body did not arrive", whole).await?)
        }
        false => None,
    };
    let mut tried: Vec<usize> = Vec::new();
    let mut stale_connections = 0;
    loop {
        let last = tried.len() as u32 >= retry.attempts;
        let (index, endpoint) = pick(worker, cluster, &policy, &tried)?;
        exchange.goes_to(rule, asked, cluster, &endpoint);
        let result = try_once(exchange, cluster, &policy, &endpoint, outgoing, &times).await;
        let ejection = &endpoint.state.ejection;
        let (failure, back) = match result {
            Ok(incoming) => {
                let status = incoming.response.status();
                if matches!(status.as_u16(), 502..=504) {
                    ejection.failure(&policy.outlier, worker.now());
                } else {
                    ejection.success();
                }
                match &replay {
                    Some(replay)
                        if !last
                            && times.left()
                            && retry.codes.contains(&status.as_u16())
                            && again(exchange, cluster, &policy) =>
                    {
                        tried.push(index);
                        outgoing = replay.again();
                        continue;
                    }
                    _ => return Ok(incoming),
                }
            }
            Err(Failed { failure, back }) => (failure, back),
        };
        // A pooled connection that was closed before it took the request is no fault of anyone's: it counts neither
        // against the endpoint nor as a try.
        let stale = failure.unprocessed && failure.reason == Reason::UpstreamReset;
        let back = match back {
            Some(back) if stale && stale_connections < STALE => {
                stale_connections += 1;
                outgoing = back;
                continue;
            }
            back => back,
        };
        if failure.reason.blame() == Blame::Upstream
            && let Some(time) = ejection.failure(&policy.outlier, worker.now())
        {
            tracing::info!(endpoint = %endpoint.name, reason = %failure, "ejected for {time:?}");
        }
        // What never reached a server can go to another; what may have, only if the route says that its kind of
        // failure is worth a retry.
        let next = match (back, &replay) {
            (Some(back), _) if failure.unprocessed => Some(back),
            (_, Some(replay)) if failure.unprocessed || retry.codes.contains(&failure.reason.status()) => {
                Some(replay.again())
            }
            _ => None,
        };
        match next {
            Some(next) if !last && times.left() && again(exchange, cluster, &policy) => {
                tried.push(index);
                outgoing = next;
            }
            _ => return Err(failure),
        }
    }
}

fn admit(cluster: &Cluster, policy: &Policy) -> Result<(), Failure> {
    let in_flight = cluster.in_flight.load(std::sync::atomic::Ordering::Relaxed);
    if in_flight >= policy.max_requests {
        return Err(Failure::unprocessed(
            Reason::TooManyRequests,
            format!(
                "{in_flight} requests to {} are in flight, its limit is {}",
                cluster.service, policy.max_requests
            ),
        ));
    }
    Ok(())
}

fn again(exchange: &Exchange, cluster: &Cluster, policy: &Policy) -> bool {
    cluster.budget.take(policy.budget_percent, exchange.worker.now())
}

/// Picks an endpoint, by index and itself.
pub fn pick(
    worker: &Worker,
    cluster: &Cluster,
    policy: &Policy,
    tried: &[usize],
) -> Result<(usize, Arc<Endpoint>), Failure> {
    let endpoints = cluster.endpoints();
    let picked = worker.with_random(|random| {
        penstock_balance::pick(
            endpoints.as_slice(),
            policy.balance,
            policy.outlier.max_ejected_percent,
            tried,
            &cluster.turn,
            worker.now(),
            random,
        )
    });
    match picked {
        Ok(index) => Ok((index, Arc::clone(&endpoints[index]))),
        Err(none) => Err(Failure::unprocessed(
            Reason::NoEndpoint,
            format!("no endpoint of {} port {}: {none}", cluster.service, cluster.port),
        )),
    }
}

/// A try that failed, with the request if it came back whole.
struct Failed {
    failure: Failure,
    back: Option<Box<Outgoing>>,
}

async fn try_once(
    exchange: &Rc<Exchange>,
    cluster: &Cluster,
    policy: &Policy,
    endpoint: &Arc<Endpoint>,
    mut outgoing: Box<Outgoing>,
    times: &Times,
) -> Result<Answered, Failed> {
    let worker = &exchange.worker;
    exchange.secured(endpoint.identity.is_some());
    let over_http2 = !outgoing.upgrade
        && match (endpoint.sidecar, endpoint.speak) {
            (true, _) | (false, Speak::Http2) => true,
            (false, Speak::Http1) => false,
            (false, Speak::Same) => outgoing.spoken == Version::HTTP_2,
        };
    let pool = worker.pools.of(endpoint);
    // A connection first: as long as there is none the request is untouched and can go elsewhere.
    let deadline = times.of_a_try();
    let upgrade = outgoing.upgrade;
    let ready = async {
        if upgrade {
            Box::pin(pool::dedicated(worker, endpoint, policy.connect_timeout)).await.map(Sender::Own)
        } else if over_http2 {
            let stream = pool.http2(worker, endpoint, cluster, policy).await;
            stream.map(|(sender, lease)| Sender::Http2(sender, lease))
        } else {
            pool.http1(worker, endpoint, cluster, policy).await.map(Sender::Http1)
        }
    };
    let sender = match before(deadline, "no connection was free", ready).await {
        Ok(sender) => sender,
        Err(failure) => return Err(Failed { failure, back: Some(outgoing) }),
    };

    let form = if over_http2 { Form::Absolute } else { Form::Origin };
    let fail = |failure| Failed { failure, back: None };
    headers::shape(&mut outgoing.request, &outgoing.authority, form).map_err(fail)?;
    if endpoint.sidecar && outgoing.spoken != Version::HTTP_2 {
        let version = if outgoing.spoken == Version::HTTP_10 { "HTTP/1.0" } else { "HTTP/1.1" };
        outgoing.request.headers_mut().insert(headers::PROTOCOL, HeaderValue::from_static(version));
    }
    let Outgoing { request, authority, spoken, upgrade } = *outgoing;
    let whole = |request| Some(Box::new(Outgoing { request, authority, spoken, upgrade }));

    exchange.sending();
    let (result, lease) = match sender {
        Sender::Http1(mut sender) => {
            let sent = sender.try_send_request(request);
            (times.bound(deadline, exchange, endpoint, sent).await, Lease::Http1(Some(sender), pool))
        }
        Sender::Http2(mut sender, lease) => {
            let sent = sender.try_send_request(request);
            (times.bound(deadline, exchange, endpoint, sent).await, lease)
        }
        Sender::Own(mut sender) => {
            let sent = sender.try_send_request(request);
            (times.bound(deadline, exchange, endpoint, sent).await, Lease::Own)
        }
    };
    match result.map_err(fail)? {
        Ok(response) => Ok(Answered { response, lease, idle: times.idle }),
        Err(mut error) => {
            let back = error.take_message();
            if let Some(limit) = exchange.body_too_large() {
                // The application was given a part of the body; its connection is gone with the try.
                return Err(fail(Failure::new(
                    Reason::BodyTooLarge,
                    RequestBroken::TooLarge(limit).to_string(),
                )));
            }
            let failure = explain(endpoint, error.error(), back.is_some());
            Err(Failed { failure, back: back.and_then(whole) })
        }
    }
}

enum Sender {
    Http1(hyper::client::conn::http1::SendRequest<RequestBody>),
    Http2(hyper::client::conn::http2::SendRequest<RequestBody>, Lease),
    Own(hyper::client::conn::http1::SendRequest<RequestBody>),
}

fn explain(endpoint: &Endpoint, error: &hyper::Error, came_back: bool) -> Failure {
    let who = format!("{} at {}", endpoint.name, endpoint.address);
    if came_back {
        return Failure::unprocessed(
            Reason::UpstreamReset,
            format!("{who} closed before it took the request: {error}"),
        );
    }
    let h2 = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    if let Some(cause) = h2 {
        if cause.reason() == Some(h2::Reason::REFUSED_STREAM) {
            return Failure::unprocessed(Reason::UpstreamReset, format!("{who} refused the stream: {cause}"));
        }
        return Failure::new(Reason::UpstreamReset, format!("{who} reset the request: {cause}"));
    }
    if error.is_user() || error.is_body_write_aborted() {
        return Failure::new(Reason::ClientClosed, format!("the client's body broke off: {error}"));
    }
    if error.is_parse() {
        return Failure::new(
            Reason::UpstreamProtocol,
            format!("{who} answered with something that is not HTTP: {error}"),
        );
    }
    Failure::new(Reason::UpstreamReset, format!("{who} closed before it answered: {error}"))
}

/// Does what has to be done before a request can be sent, until the deadline.
async fn before<F, T>(deadline: Option<Instant>, what: &'static str, work: F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, Failure>>,
{
    let Some(deadline) = deadline else { return work.await };
    tokio::time::timeout_at(deadline, work).await.unwrap_or_else(|_| {
        Err(Failure::unprocessed(Reason::RequestTimeout, format!("{what} within the route's timeout")))
    })
}

/// The bounds on one request.
struct Times {
    /// When the whole request must have been answered.
    deadline: Option<Instant>,
    per_try: Option<Duration>,
    idle: Option<Duration>,
}

impl Times {
    fn new(started: Instant, rule: &Timeouts, policy: &Policy) -> Self {
        let nonzero = |time: Option<Duration>| time.filter(|time| !time.is_zero());
        Self {
            deadline: nonzero(rule.request.or(policy.timeouts.request)).map(|limit| started + limit),
            per_try: nonzero(rule.per_try.or(policy.timeouts.per_try)),
            idle: nonzero(rule.idle.or(policy.timeouts.idle)),
        }
    }

    /// When a try that begins now must have been answered.
    fn of_a_try(&self) -> Option<Instant> {
        let per_try = self.per_try.map(|limit| Instant::now() + limit);
        match (self.deadline, per_try) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn left(&self) -> bool {
        self.deadline.is_none_or(|deadline| Instant::now() < deadline)
    }

    /// Waits for a response's headers within the bounds.
    async fn bound<F, T>(
        &self,
        hard: Option<Instant>,
        exchange: &Exchange,
        endpoint: &Endpoint,
        sent: F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = T>,
    {
        let mut sent = std::pin::pin!(sent);
        loop {
            let seen = exchange.request_bytes();
            let soft = self.idle.map(|limit| Instant::now() + limit);
            let wake = match (hard, soft) {
                (Some(a), Some(b)) => a.min(b),
                (Some(time), None) | (None, Some(time)) => time,
                (None, None) => return Ok(sent.await),
            };
            if let Ok(response) = tokio::time::timeout_at(wake, sent.as_mut()).await {
                return Ok(response);
            }
            let who = || format!("{} at {}", endpoint.name, endpoint.address);
            if hard.is_some_and(|hard| wake >= hard) {
                let after = exchange.started().elapsed();
                return Err(Failure::new(
                    Reason::RequestTimeout,
                    format!("{} did not answer within {after:.1?}", who()),
                ));
            }
            // The body may still be on its way up: only a stall counts.
            if exchange.request_bytes() == seen {
                let limit = self.idle.unwrap_or_default();
                return Err(Failure::new(
                    Reason::IdleTimeout,
                    format!("no byte to or from {} in {limit:?}", who()),
                ));
            }
        }
    }
}

/// A request that can be sent again, because its body is known.
struct Replay {
    parts: http::request::Parts,
    body: Option<Bytes>,
    authority: http::uri::Authority,
    spoken: Version,
}

impl Replay {
    /// Whether the route declares something retryable, and the body is small and of known length.
    fn wanted(outgoing: &Outgoing, retry: &RetryPolicy) -> bool {
        let small = |length| length <= retry.buffer as u64;
        retry.attempts > 0
            && !outgoing.upgrade
            && !retry.codes.is_empty()
            && outgoing.request.body().size_hint().exact().is_some_and(small)
    }

    /// Keeps a copy of the request, its body included.
    async fn keep(outgoing: &mut Outgoing) -> Result<Box<Self>, Failure> {
        let body = if outgoing.request.body().is_end_stream() {
            None
        } else {
            let taken = std::mem::replace(outgoing.request.body_mut(), RequestBody::Whole(None));
            let whole = taken
                .collect()
                .await
                .map_err(|error| {
                    Failure::unprocessed(
                        Reason::ClientClosed,
                        format!("the client's body broke off: {error}"),
                    )
                })?
                .to_bytes();
            *outgoing.request.body_mut() = RequestBody::Whole(Some(whole.clone()));
            Some(whole)
        };
        let mut copy = Request::new(());
        *copy.method_mut() = outgoing.request.method().clone();
        *copy.uri_mut() = outgoing.request.uri().clone();
        *copy.version_mut() = outgoing.request.version();
        *copy.headers_mut() = outgoing.request.headers().clone();
        let parts = copy.into_parts().0;
        Ok(Box::new(Self { parts, body, authority: outgoing.authority.clone(), spoken: outgoing.spoken }))
    }

    fn again(&self) -> Box<Outgoing> {
        Box::new(Outgoing {
            request: Request::from_parts(self.parts.clone(), RequestBody::Whole(self.body.clone())),
            authority: self.authority.clone(),
            spoken: self.spoken,
            upgrade: false,
        })
    }
}
