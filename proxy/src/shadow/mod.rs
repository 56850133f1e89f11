//! Copies of requests: to whom a rule's mirrors send them, beside the request, so that nobody waits for them and nobody sees what becomes
//! of them.
//!
//! In: a request that is ready to be sent, and the mirrors of its rule. Out: for each mirror whose share is drawn, a task that sends a
//! copy the ordinary way to a Service: its endpoints, its balancing, its identity. The body is copied as it passes ([`tee`](crate::tee));
//! where there is no room, the copy is dropped and counted, and the request goes on. Where the mirror asks for it, the two answers meet
//! in a [`Pair`] and are held against each other ([`compare`]).
//!
//! What a copy may touch: connections to the mirror's endpoints and what is known of their load. Not: budgets for retries, ejections,
//! limits of requests, the ordinary rows and metrics.

pub mod compare;
pub mod pair;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use ahash::AHashMap;
use http::header::EXPECT;
use http::uri::Authority;
use http::{Request, Response, Version};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use penstock_api::ServiceName;
use penstock_api::resource::WHOLE;
use rand::Rng;
use tokio::sync::Semaphore;

use crate::body::{RequestBody, ResponseBody, Upstream};
use crate::config::{Backend, Mirror, Rule};
use crate::exchange::Exchange;
use crate::receive::ClientBody;
use crate::send::{self, Outgoing};
use crate::tee::{Budget, Copied, End, Queue, Teed};
use crate::telemetry::shadow::{Count, Parties, Shadow};
use crate::work::Work;
use crate::worker::Worker;
use crate::{answer, headers, limits, report};
use compare::Wire;
use pair::{Ended, Pair, Watched, Which};

/// What the copies of a worker share.
#[derive(Debug)]
pub struct Mirroring {
    budget: Rc<Budget>,
    in_flight: Rc<Cell<u32>>,
    /// One pair of large answers is compared at a time: threads take cores that the application has too.
    comparing: Rc<Semaphore>,
    cells: RefCell<AHashMap<Parties, Arc<Shadow>>>,
}

impl Default for Mirroring {
    fn default() -> Self {
        Self {
            budget: Budget::new(limits::COPY_BYTES),
            in_flight: Rc::default(),
            comparing: Rc::new(Semaphore::new(1)),
            cells: RefCell::default(),
        }
    }
}

impl Mirroring {
    fn cell(&self, worker: &Worker, service: &ServiceName, mirror: &ServiceName) -> Arc<Shadow> {
        let parties = Parties { service: service.clone(), mirror: mirror.clone() };
        let mut cells = self.cells.borrow_mut();
        let cell = cells.entry(parties);
        Arc::clone(cell.or_insert_with_key(|parties| worker.telemetry.shadows.cell(parties.clone())))
    }

    /// Lets go of cells; who still counts gets another.
    pub fn tidy(&self) {
        self.cells.borrow_mut().clear();
    }

    fn slot(&self) -> Option<Slot> {
        let taken = self.in_flight.get();
        (taken < limits::COPIES).then(|| {
            self.in_flight.set(taken + 1);
            Slot(Rc::clone(&self.in_flight))
        })
    }
}

/// A copy that is on its way.
#[derive(Debug)]
struct Slot(Rc<Cell<u32>>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Whether a request is one of a mirror's share.
fn is_drawn(share_ppm: u32, random: &mut impl Rng) -> bool {
    share_ppm >= WHOLE || (share_ppm > 0 && random.random_range(0..WHOLE) < share_ppm)
}

/// The copies of one request.
#[derive(Debug)]
pub struct Copies {
    planned: Vec<Planned>,
    pairs: Vec<Rc<Pair>>,
}

/// Has a request copied, if a mirror's share is drawn and there is room for a copy.
pub fn begin(
    exchange: &Rc<Exchange>,
    rule: &Arc<Rule>,
    service: &ServiceName,
    backend: &Backend,
    request: &mut Request<RequestBody>,
    authority: &Authority,
    spoken: Version,
) -> Option<Copies> {
    let worker = &exchange.worker;
    let drawn: Vec<_> = worker.with_random(|random| {
        let drawn = rule.mirrors.iter().enumerate().filter(|(_, mirror)| {
            // Held against itself, a version agrees whatever it answers.
            let itself = mirror.compare.is_some() && mirror.cluster.service == backend.cluster.service;
            !itself && is_drawn(mirror.share_ppm, random)
        });
        drawn.map(|(index, _)| index).collect()
    });
    let mut sent = Vec::with_capacity(drawn.len());
    for index in drawn {
        let mirror = &rule.mirrors[index];
        let cell = worker.mirroring.cell(worker, service, &mirror.cluster.service);
        match worker.mirroring.slot() {
            Some(slot) => sent.push((index, cell, slot)),
            None => cell.count(Count::Dropped),
        }
    }
    if sent.is_empty() {
        return None;
    }
    let mut bodies = tee(worker, request, sent.len()).into_iter();
    let mut copies =
        Copies { planned: Vec::with_capacity(sent.len()), pairs: Vec::with_capacity(sent.len()) };
    for (index, cell, slot) in sent {
        let Mirror { compare, .. } = &rule.mirrors[index];
        let wire = Wire::of(request);
        let Mirroring { budget, comparing, .. } = &worker.mirroring;
        let pair = Pair::new(Arc::clone(&cell), compare.clone(), wire, budget, comparing);
        copies.pairs.push(Rc::clone(&pair));
        let mut head = Request::new(());
        *head.method_mut() = request.method().clone();
        *head.uri_mut() = request.uri().clone();
        *head.version_mut() = request.version();
        *head.headers_mut() = request.headers().clone();
        // Nobody waits for leave to send the copy's body: it comes when the original's does.
        head.headers_mut().remove(EXPECT);
        copies.planned.push(Planned {
            worker: Rc::clone(worker),
            rule: Arc::clone(rule),
            index,
            head,
            body: bodies.next(),
            authority: authority.clone(),
            spoken,
            pair,
            cell,
            _slot: slot,
        });
    }
    Some(copies)
}

/// Has the body copied as it passes; none, if there is no body.
fn tee(worker: &Worker, request: &mut Request<RequestBody>, copies: usize) -> Vec<Copied> {
    let grpc = answer::is_grpc(request.headers());
    match std::mem::replace(request.body_mut(), RequestBody::Empty) {
        RequestBody::Client(body, exchange) if !body.is_end_stream() => {
            let budget = &worker.mirroring.budget;
            let (body, copied) = Teed::new(body, copies, budget, limits::COPY_BODY, grpc);
            *request.body_mut() = RequestBody::Client(ClientBody::Teed(Box::new(body)), exchange);
            copied
        }
        body => {
            *request.body_mut() = body;
            Vec::new()
        }
    }
}

impl Copies {
    /// Sends them, each by a task of its own.
    pub fn send(&mut self, work: &Work) {
        for planned in self.planned.drain(..) {
            let work = work.clone();
            tokio::task::spawn_local(async move { planned.run(&work).await });
        }
    }
}

/// The client gets an answer of the proxy's own.
pub fn failed(copies: &Option<Copies>) {
    for pair in copies.iter().flat_map(|copies| &copies.pairs) {
        pair.end(Which::Client, Ended::Failed);
    }
}

/// The client gets this answer.
pub fn answered(
    copies: Option<Copies>,
    exchange: &Exchange,
    response: Response<ResponseBody>,
) -> Response<ResponseBody> {
    let Some(mut copies) = copies else { return response };
    let (pairs, took) = (std::mem::take(&mut copies.pairs), exchange.started().elapsed());
    for pair in &pairs {
        pair.head(Which::Client, response.status(), response.headers(), took);
    }
    if !pairs.iter().any(|pair| pair.compares()) {
        return response;
    }
    response.map(|body| match Watched::new(body, pairs) {
        Ok(watched) => ResponseBody::Watched(Box::new(watched)),
        Err(body) => body,
    })
}

impl Drop for Copies {
    fn drop(&mut self) {
        // Without an answer: the client has left.
        self.pairs.iter().for_each(|pair| pair.end(Which::Client, Ended::Lost));
    }
}

/// A copy that is about to be sent.
#[derive(Debug)]
struct Planned {
    worker: Rc<Worker>,
    rule: Arc<Rule>,
    /// The place of its mirror in the rule.
    index: usize,
    head: Request<()>,
    body: Option<Copied>,
    authority: Authority,
    spoken: Version,
    pair: Rc<Pair>,
    cell: Arc<Shadow>,
    _slot: Slot,
}

impl Planned {
    async fn run(self, work: &Work) {
        let Self { worker, rule, index, head, body, authority, spoken, pair, cell, _slot } = self;
        let exchange = Exchange::begin_copy(&worker);
        let queue = body.as_ref().map(|body| Rc::clone(body.queue()));
        let body = body.map_or(RequestBody::Empty, |body| RequestBody::Copy(body, Rc::clone(&exchange)));
        let outgoing = Box::new(Outgoing { request: head.map(|()| body), authority, spoken, upgrade: false });
        let sent = ask(exchange, &rule, &rule.mirrors[index], work, outgoing, &pair);
        let broken = async {
            match &queue {
                Some(queue) => queue.broken().await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            ended = sent => ended,
            () = broken => Ended::Lost,
            () = tokio::time::sleep(limits::COPY_TIME) => Ended::Failed,
        };
        let (count, ended) = match queue.as_deref().and_then(Queue::end) {
            Some(End::Dropped) => (Count::Dropped, Ended::Lost),
            Some(End::Broken) => (Count::Abandoned, Ended::Lost),
            Some(End::Whole) | None if ended == Ended::Failed || pair.has_failed(Which::Copy) => {
                (Count::Failed, ended)
            }
            Some(End::Whole) | None => (Count::Answered, ended),
        };
        cell.count(count);
        pair.end(Which::Copy, ended);
    }
}

/// Sends a copy, and reads its answer to the end: a server that was asked shall do what it does for others, and its connection can be used
/// again.
async fn ask(
    exchange: Rc<Exchange>,
    rule: &Rule,
    mirror: &Mirror,
    work: &Work,
    outgoing: Box<Outgoing>,
    pair: &Pair,
) -> Ended {
    let answered = match Box::pin(send::copy(&exchange, rule, &mirror.cluster, work, outgoing)).await {
        Ok(answered) => answered,
        Err(failure) => {
            tracing::debug!(mirror = %mirror.cluster.service, %failure, "a copy of a request failed");
            return Ended::Failed;
        }
    };
    let (mut parts, body) = answered.response.into_parts();
    exchange.answered_with(parts.status.as_u16(), &body);
    let found = headers::look(&parts.headers);
    report::take(&exchange, &mut parts.headers, found);
    pair.head(Which::Copy, parts.status, &parts.headers, exchange.started().elapsed());
    let upstream = Upstream::new(body, exchange, answered.lease, answered.idle, report::take_trailers);
    let mut body = Box::pin(ResponseBody::Upstream(upstream));
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => pair.frame(Which::Copy, &frame),
            Err(_) => return Ended::Failed,
        }
    }
    Ended::Whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    #[test]
    fn a_share_is_drawn_and_none_and_all_are_sure() {
        let mut random = SmallRng::seed_from_u64(7);
        let mut drawn = |share| (0..10_000).filter(|_| is_drawn(share, &mut random)).count();
        assert_eq!((drawn(0), drawn(WHOLE)), (0, 10_000));
        for (share, expected) in [(500_000, 5_000_usize), (10_000, 100)] {
            let drawn = drawn(share);
            assert!(drawn.abs_diff(expected) < expected / 4, "{drawn} of a share of {share} ppm");
        }
    }

    #[test]
    fn no_more_copies_are_on_their_way_than_the_limit() {
        let mirroring = Mirroring::default();
        let mut slots: Vec<_> = std::iter::from_fn(|| mirroring.slot()).collect();
        assert_eq!(slots.len(), limits::COPIES as usize);
        slots.pop();
        assert!(mirroring.slot().is_some());
    }
}
