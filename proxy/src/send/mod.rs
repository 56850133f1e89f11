//! Sending a request to an endpoint, and again to another where that is allowed.
//!
//! In: a request, the backend that the split chose. Out: a response whose body still streams, with the lease of its
//! connection; or a failure that says whether the server can have begun to work.

pub mod connect;
pub mod pool;
pub mod replay;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use penstock_api::reason::Blame;
use penstock_api::v1::Decision;
use penstock_api::{Reason, ServiceName, names};
use penstock_balance::{Ask, Candidate as _, Explained, Picked, Sent};
use tokio::time::Instant;

use crate::admission::facts;
use crate::body::{RequestBody, RequestBroken};
use crate::config::{Backend, Cluster, Endpoint, Policy, RetryPolicy, Rule, Speak, Timeouts};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers::{self, Form};
use crate::limits;
use crate::loaded;
use crate::probe;
use crate::telemetry::decision::decision;
use crate::telemetry::metric;
use crate::work::{BLOCK_UNITS, Work};
use crate::worker::Worker;

pub use pool::Lease;
use replay::Replay;

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
pub const STALE: u32 = 8;

/// Sends a request to the endpoints of a backend until one answers or nothing more may be tried.
pub async fn send(
    exchange: &Rc<Exchange>,
    rule: &Rule,
    asked: &ServiceName,
    backend: &Backend,
    work: &Work,
    mut outgoing: Box<Outgoing>,
) -> Result<Answered, Failure> {
    let cluster = &backend.cluster;
    let worker = &exchange.worker;
    let policy = cluster.policy();
    let retry = rule.retry.as_ref().unwrap_or(&policy.retry);
    let times = Times::new(exchange.started(), &rule.timeouts, &policy);
    if !exchange.is_inbound() {
        exchange.is_waited_for(facts::timeout(outgoing.request.headers(), None));
    }
    admit(cluster, &policy)?;
    cluster.budget.request(worker.now());

    let mut replay = None;
    let mut tried: Vec<u32> = Vec::new();
    let mut stale_connections = 0;
    loop {
        let last = tried.len() as u32 >= retry.attempts;
        let Choice { endpoint, sent, at, little_known, decision } =
            pick(worker, cluster, &policy, work, &tried)?;
        if let Some(endpoint) = little_known {
            probe::ask(worker, cluster, endpoint, &work.model);
        }
        exchange.goes_to(rule, asked, cluster, &endpoint, sent);
        exchange.explained(decision);
        if replay.is_none() && worth_keeping(retry, &endpoint, &outgoing) {
            replay = Replay::keep(&mut outgoing, exchange, retry);
        }
        let result = try_once(exchange, cluster, &policy, &endpoint, outgoing, &times).await;
        let ejection = &endpoint.state.ejection;
        let again = |replay: &Option<Box<Replay>>| {
            let next =
                replay.as_ref().filter(|_| !last && times.left(exchange)).and_then(|replay| replay.again());
            next.filter(|_| cluster.budget.take(policy.budget_percent, worker.now()))
        };
        let Failed { failure, back, stale } = match result {
            Ok(mut answered) => {
                let status = grpc_as_http(&answered.response);
                if matches!(status, 502..=504) {
                    ejection.failure(&policy.outlier, at, worker.now());
                } else {
                    ejection.success();
                }
                // A sidecar says when it could not hand the request to its application.
                let untouched = endpoint.sidecar
                    && status >= 400
                    && answered.response.headers_mut().remove(headers::UNTOUCHED).is_some();
                if (untouched || retry.codes.contains(&status))
                    && let Some(next) = again(&replay)
                {
                    exchange.try_failed();
                    tried.push(endpoint.id);
                    outgoing = next;
                    continue;
                }
                return Ok(answered);
            }
            Err(failed) => failed,
        };
        // A pooled connection that was closed before it took the request is no fault of anyone's: it counts neither
        // against the endpoint nor as a try.
        let back = if stale && stale_connections < STALE && times.left(exchange) {
            match back.or_else(|| replay.as_ref().and_then(|replay| replay.again())) {
                Some(back) => {
                    stale_connections += 1;
                    exchange.was_no_try();
                    outgoing = back;
                    continue;
                }
                None => None,
            }
        } else {
            back
        };
        let at_fault = failure.reason.blame() == Blame::Upstream;
        if at_fault && let Some(time) = ejection.failure(&policy.outlier, at, worker.now()) {
            tracing::info!(endpoint = %endpoint.name, reason = %failure, "ejected for {time:?}");
        }
        // What never reached a server can go to another; what may have, only if the route says that its kind of
        // failure is worth a retry.
        let next = match back {
            Some(back) if failure.unprocessed => {
                let allowed =
                    !last && times.left(exchange) && cluster.budget.take(policy.budget_percent, worker.now());
                allowed.then_some(back)
            }
            _ if failure.unprocessed || retry.codes.contains(&failure.reason.status()) => again(&replay),
            _ => None,
        };
        let Some(next) = next else { return Err(failure) };
        if at_fault {
            exchange.try_failed();
        }
        tried.push(endpoint.id);
        outgoing = next;
    }
}

/// Sends a copy of a request: once, and so that whatever becomes of it takes nothing from requests that somebody waits for: no
/// part of the budget for retries, and no endpoint's good name.
pub async fn copy(
    exchange: &Rc<Exchange>,
    rule: &Rule,
    cluster: &Arc<Cluster>,
    work: &Work,
    mut outgoing: Box<Outgoing>,
) -> Result<Answered, Failure> {
    let policy = cluster.policy();
    let times = Times::new(exchange.started(), &rule.timeouts, &policy);
    admit(cluster, &policy)?;
    for _ in 0..=STALE {
        let Choice { endpoint, sent, .. } = pick(&exchange.worker, cluster, &policy, work, &[])?;
        exchange.copy_goes_to(cluster, &endpoint, sent);
        match try_once(exchange, cluster, &policy, &endpoint, outgoing, &times).await {
            Ok(answered) => return Ok(answered),
            // Its connection was on its way out.
            Err(Failed { back: Some(back), stale: true, .. }) if times.left(exchange) => outgoing = back,
            Err(Failed { failure, .. }) => return Err(failure),
        }
    }
    Err(Failure::unprocessed(
        Reason::UpstreamReset,
        format!("{} closed {} connections before one took the copy", cluster.service, STALE + 1),
    ))
}

/// Whether a copy of the request is worth its price: the route declares something retryable, or HTTP/2 is spoken,
/// where a server can say that it has not touched a request (a refused stream, a GOAWAY).
fn worth_keeping(retry: &RetryPolicy, endpoint: &Endpoint, outgoing: &Outgoing) -> bool {
    retry.attempts > 0 && (!retry.codes.is_empty() || over_http2(endpoint, outgoing))
}

/// Whether a request is sent over HTTP/2.
fn over_http2(endpoint: &Endpoint, outgoing: &Outgoing) -> bool {
    let speaks = match (endpoint.sidecar, endpoint.speak) {
        (true, _) | (false, Speak::Http2) => true,
        (false, Speak::Http1) => false,
        (false, Speak::Same) => outgoing.spoken == Version::HTTP_2,
    };
    speaks && !outgoing.upgrade
}

/// Whether a request to a sidecar has a body that others should not have to wait for. One that came over HTTP/2 may have more to say than
/// HTTP/1.1 has words for, trailers and the words of gRPC among it, and stays.
fn is_large(endpoint: &Endpoint, outgoing: &Outgoing) -> bool {
    let length = outgoing.request.body().size_hint().exact();
    let plain = outgoing.spoken == Version::HTTP_11 && !outgoing.upgrade;
    endpoint.sidecar && endpoint.identity.is_some() && plain && length >= Some(limits::LANE)
}

/// The status of a response; of a gRPC response that failed before it began (its status is among the headers), the
/// HTTP status that means the same (gRPC, "HTTP to gRPC Status Code Mapping", read backwards).
fn grpc_as_http<B>(response: &Response<B>) -> u16 {
    match response.headers().get("grpc-status").map(HeaderValue::as_bytes) {
        Some(b"4") => 504,
        Some(b"8") => 429,
        Some(b"13") => 500,
        Some(b"14") => 503,
        _ => response.status().as_u16(),
    }
}

/// Refuses what is above the limit of requests (and of connections whose bytes are not looked at) in flight.
pub fn admit(cluster: &Cluster, policy: &Policy) -> Result<(), Failure> {
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

/// What was picked.
#[derive(Debug)]
pub struct Choice {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// The request, as it counts there.
    pub sent: Sent,
    /// From when on.
    pub at: Duration,
    /// Another, of which it would be worth to know more.
    pub little_known: Option<Arc<Endpoint>>,
    /// How it was chosen, if somebody asked.
    pub decision: Option<Box<Decision>>,
}

/// Picks an endpoint, where the request counts as sent from then on; those whose ids are in `tried` only if nothing
/// else is there.
pub fn pick(
    worker: &Worker,
    cluster: &Cluster,
    policy: &Policy,
    work: &Work,
    tried: &[u32],
) -> Result<Choice, Failure> {
    let endpoints = cluster.endpoints();
    // The list may have been replaced since the last try, so what was tried is looked up in it anew.
    let place = |id: &u32| endpoints.iter().position(|endpoint| endpoint.id == *id);
    let avoid: Vec<usize> = tried.iter().filter_map(place).collect();
    let ask = Ask {
        units: work.units,
        key: work.key,
        blocks: &work.blocks,
        block_units: BLOCK_UNITS,
        model: if cluster.lists_models() && !work.model.is_empty() { loaded::hash(&work.model) } else { 0 },
        avoid: &avoid,
        now: worker.now(),
    };
    let at = ask.now;
    let settings = &policy.balance;
    let mut looks = Explained::default();
    let mut choose = |ask: &Ask<'_>| {
        worker.with_random(|random| cluster.pool.explain(&endpoints, settings, ask, random, &mut looks))
    };
    let picked = choose(&ask).or_else(|none| {
        // What nobody has is somebody's to refuse, in its own words.
        let unknown = none.unfit > 0 && !endpoints.iter().any(|endpoint| endpoint.serves(&ask));
        if unknown { choose(&Ask { model: 0, ..ask }) } else { Err(none) }
    });
    match picked {
        Ok(Picked { index, sent, worth_asking, .. }) => Ok(Choice {
            endpoint: Arc::clone(&endpoints[index]),
            sent,
            at,
            little_known: worth_asking.and_then(|index| endpoints.get(index)).map(Arc::clone),
            decision: if worker.telemetry.wants_decisions() {
                decision(&endpoints, settings.policy, &looks)
            } else {
                None
            },
        }),
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
    /// The connection was on its way out when the request met it.
    stale: bool,
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
    let pool = worker.pools.of(endpoint);
    let lane = is_large(endpoint, &outgoing) && pool.has_lane(policy.max_connections);
    let over_http2 = over_http2(endpoint, &outgoing) && !lane;
    // A connection first: as long as there is none the request is untouched and can go elsewhere.
    let deadline = times.of_a_try();
    let repeatable = is_repeatable(&outgoing);
    // Our own application may be about to end, and closes what rests just when a request comes. What must not be asked
    // twice goes over a connection of its own then: that is made, or refused and the request still untouched.
    let ending = !endpoint.sidecar && exchange.is_inbound() && worker.shared.drain.leaving();
    let alone = outgoing.upgrade || (ending && !repeatable && !over_http2);
    let ready = async {
        if alone {
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
        Err(failure) => return Err(Failed { failure, back: Some(outgoing), stale: false }),
    };

    let form = if over_http2 { Form::Absolute } else { Form::Origin };
    let fail = |failure| Failed { failure, back: None, stale: false };
    headers::shape(&mut outgoing.request, &outgoing.authority, form).map_err(fail)?;
    if form == Form::Origin {
        headers::announce(&mut outgoing.request);
    }
    if endpoint.sidecar && outgoing.spoken != Version::HTTP_2 {
        let version = if outgoing.spoken == Version::HTTP_10 { "HTTP/1.0" } else { "HTTP/1.1" };
        outgoing.request.headers_mut().insert(headers::PROTOCOL, HeaderValue::from_static(version));
    } else {
        // An earlier try may have been for a sidecar.
        outgoing.request.headers_mut().remove(headers::PROTOCOL);
    }
    // The other side's clock begins when the request comes: it is told what is left.
    if let Some(left) =
        what_is_left(exchange.started().elapsed(), exchange.said()).filter(|_| endpoint.sidecar)
        && let Ok(left) = HeaderValue::try_from(format!("{}ms", left.as_millis()))
    {
        outgoing.request.headers_mut().insert(names::header::REQUEST_TIMEOUT, left);
    }
    let Outgoing { request, authority, spoken, upgrade } = *outgoing;
    let whole = |request| Some(Box::new(Outgoing { request, authority, spoken, upgrade }));

    exchange.sending();
    let (result, lease) = match sender {
        Sender::Http1(mut sender) => {
            if lane {
                metrics::counter!(metric::LANE_REQUESTS.name).increment(1);
            }
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
            let stale = back.is_some() || is_above_goaway(error.error());
            let mut failure = explain(endpoint, error.error(), back.is_some());
            failure.unprocessed |= repeatable && failure.reason == Reason::UpstreamReset;
            Err(Failed { failure, back: back.and_then(whole), stale })
        }
    }
}

/// Whether it may be asked twice: what a server that closes a resting connection just as a request arrives has done with
/// that, nobody can know, and with such a request it does not matter (RFC 9110, 9.2.1 and 9.2.2). A server that ends in
/// good order closes all of them; without this each rolling restart would cost a few requests.
fn is_repeatable(outgoing: &Outgoing) -> bool {
    matches!(*outgoing.request.method(), Method::GET | Method::HEAD | Method::OPTIONS)
        && outgoing.request.body().is_end_stream()
        && !outgoing.upgrade
}

enum Sender {
    Http1(hyper::client::conn::http1::SendRequest<RequestBody>),
    Http2(hyper::client::conn::http2::SendRequest<RequestBody>, Lease),
    Own(hyper::client::conn::http1::SendRequest<RequestBody>),
}

fn http2_cause(error: &hyper::Error) -> Option<&h2::Error> {
    std::error::Error::source(error).and_then(|cause| cause.downcast_ref())
}

/// Whether the stream is above the last that a GOAWAY names. Only such streams see a GOAWAY without an error (RFC 9113,
/// 6.8): the others are served to their end.
fn is_above_goaway(error: &hyper::Error) -> bool {
    http2_cause(error).is_some_and(|cause| {
        cause.is_go_away() && cause.is_remote() && cause.reason() == Some(h2::Reason::NO_ERROR)
    })
}

fn explain(endpoint: &Endpoint, error: &hyper::Error, came_back: bool) -> Failure {
    let who = format!("{} at {}", endpoint.name, endpoint.address);
    if came_back {
        return Failure::unprocessed(
            Reason::UpstreamReset,
            format!("{who} closed before it took the request: {error}"),
        );
    }
    if let Some(cause) = http2_cause(error) {
        if is_above_goaway(error) || (cause.is_remote() && cause.reason() == Some(h2::Reason::REFUSED_STREAM))
        {
            return Failure::unprocessed(Reason::UpstreamReset, format!("{who} refused the stream: {cause}"));
        }
        // We reset it ourselves, because the body broke off.
        if cause.is_reset() && !cause.is_remote() && !cause.is_library() {
            return Failure::new(Reason::ClientClosed, format!("the client's body broke off: {cause}"));
        }
        // It had too much of what others sent over the same connection, which is no reason to shun it.
        if cause.is_go_away() && cause.is_remote() && cause.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM) {
            return Failure::new(
                Reason::TooManyRequests,
                format!("{who} closed the connection as flooded: {cause}"),
            );
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

/// Less than this is no time for another try, and too little to be told.
const MOMENT: Duration = Duration::from_millis(5);

/// What is left of the time that the client said, once some of it has gone by.
fn what_is_left(gone: Duration, said: Option<Duration>) -> Option<Duration> {
    let said = said.filter(|_| gone >= MOMENT)?;
    // Zero would mean that nobody said anything.
    Some(said.saturating_sub(gone).max(Duration::from_millis(1)))
}

/// Whether the client waits long enough for another try. Its word bounds tries, and not answers: a server that is slower than some
/// client likes is not at fault.
fn is_worth_a_try(gone: Duration, said: Option<Duration>) -> bool {
    said.is_none_or(|said| gone + MOMENT < said)
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

    fn left(&self, exchange: &Exchange) -> bool {
        self.deadline.is_none_or(|deadline| Instant::now() < deadline)
            && is_worth_a_try(exchange.started().elapsed(), exchange.said())
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
                // The server is not at fault for what it has not been sent, and is not to be shunned for it.
                if exchange.client_stalls() {
                    return Err(Failure::new(
                        Reason::BodyTimeout,
                        format!("the client sent no byte of its request's body in {limit:?}"),
                    ));
                }
                return Err(Failure::new(
                    Reason::IdleTimeout,
                    format!("no byte to or from {} in {limit:?}", who()),
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_own_deadline_bounds_tries_and_the_next_is_told_what_is_left() {
        let ms = Duration::from_millis;
        for (gone, said, left, again) in [
            (0, Some(1_000), None, true),
            (700, Some(1_000), Some(300), true),
            // One is too late that was refused when time was up.
            (999, Some(1_000), Some(1), false),
            (2_000, Some(1_000), Some(1), false),
            (2_000, None, None, true),
        ] {
            let said = said.map(ms);
            assert_eq!(what_is_left(ms(gone), said), left.map(ms), "after {gone} ms");
            assert_eq!(is_worth_a_try(ms(gone), said), again, "after {gone} ms");
        }
    }

    #[test]
    fn a_grpc_response_that_failed_before_it_began_counts_by_its_own_status() {
        let response = |status| http::Response::builder().header("grpc-status", status).body(()).unwrap();
        let table = [("0", 200), ("3", 200), ("4", 504), ("8", 429), ("13", 500), ("14", 503)];
        for (grpc, http) in table {
            assert_eq!(grpc_as_http(&response(grpc)), http, "{grpc}");
        }
        assert_eq!(grpc_as_http(&http::Response::builder().status(502).body(()).unwrap()), 502);
    }
}
