//! One request, from its first header to the last byte of its response: what is known of it, and what is recorded
//! when the last part of it is dropped.
//!
//! Both bodies hold the exchange. However a request ends (served, failed, the client gone, the task cancelled), the
//! last of them to go records it, once. So a stream counts as load until it ends, and nothing leaks.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Response};
use penstock_api::reason::Blame;
use penstock_api::v1::{Decision, Direction};
use penstock_api::{Reason, SpiffeId};
use penstock_balance::estimate::Watched;
use penstock_balance::{LoadReport, Outcome as How, Sent};
use penstock_inference::orca::Format;
use tokio::time::Instant;

use crate::admission::Permit;
use crate::body::RequestBroken;
use crate::config::{Cluster, Endpoint, Rule};
use crate::failure::Failure;
use crate::headers::LOAD_REPORT_FORMAT;
use crate::loaded::Loaded;
use crate::models::Model;
use crate::rates::Held;
use crate::telemetry::Details;
use crate::telemetry::outcome::{End, Outcome};
use crate::telemetry::trace::Span;
use crate::work::Work;
use crate::worker::Worker;

/// One request and its response.
#[derive(Debug)]
pub struct Exchange {
    /// The worker that serves it.
    pub worker: Rc<Worker>,
    direction: Direction,
    /// It is a copy of a request: nobody waits for it, and it counts nowhere but as load of its endpoint.
    copy: bool,
    started: Instant,
    status: Cell<u16>,
    grpc_failed: Cell<bool>,
    reason: Cell<Option<Reason>>,
    tries: Cell<u32>,
    headers: Cell<Duration>,
    began: Cell<bool>,
    /// What the access log's flags say beyond the reason's.
    flag: Cell<&'static str>,
    /// What access policies said of it beyond nothing.
    verdict: Cell<&'static str>,
    /// The span of what was executed for it and others.
    executed: Cell<Option<Span>>,
    request_bytes: Cell<u64>,
    /// Whoever reads the request's body waits for the client to send more of it.
    awaits_client: Cell<bool>,
    /// It is a call of gRPC, whose client may have said all that it has to say without ending its stream.
    grpc: Cell<bool>,
    /// How long the client waits, by its own word.
    said: Cell<Option<Duration>>,
    response_bytes: Cell<u64>,
    mtls: Cell<bool>,
    complete: Cell<bool>,
    /// The client wants to see load reports itself.
    wants_report: Cell<Option<Format>>,
    /// The response carries a load report.
    reports: Cell<bool>,
    /// Policies let the client in, so that it may know how loaded the application is.
    let_in: Cell<bool>,
    place: RefCell<Option<Place>>,
    asked: RefCell<Option<Asked>>,
    /// What it holds of the limits that count it.
    held: RefCell<Option<Held>>,
    details: OnceCell<Box<Details>>,
    decision: RefCell<Option<Box<Decision>>>,
}

/// Where the current try goes, and where it counts.
#[derive(Debug)]
struct Place {
    /// `None`: of a copy, which counts nowhere.
    outcome: Option<Arc<Outcome>>,
    cluster: Arc<Cluster>,
    endpoint: Arc<Endpoint>,
    /// The request as it counts there; `None`: another's answer is shared, and nothing goes there.
    sent: Option<Sent>,
}

/// The model that the application is asked, and how its work is watched.
#[derive(Debug)]
struct Asked {
    model: Arc<Model>,
    watched: Watched,
    /// What it costs when nothing else runs, as far as is known.
    alone: Duration,
    /// From being sent to the beginning of the answer.
    took: Duration,
    permit: Option<Permit>,
}

impl Exchange {
    /// A request's headers have arrived.
    pub fn begin(worker: &Rc<Worker>, direction: Direction) -> Rc<Self> {
        worker.shared.drain.begin(direction);
        Self::new(worker, direction, false)
    }

    /// A copy of a request is about to be sent.
    pub fn begin_copy(worker: &Rc<Worker>) -> Rc<Self> {
        Self::new(worker, Direction::Outbound, true)
    }

    fn new(worker: &Rc<Worker>, direction: Direction, copy: bool) -> Rc<Self> {
        Rc::new(Self {
            worker: Rc::clone(worker),
            direction,
            copy,
            started: Instant::now(),
            status: Cell::new(0),
            grpc_failed: Cell::new(false),
            reason: Cell::new(None),
            tries: Cell::new(0),
            headers: Cell::new(Duration::ZERO),
            began: Cell::new(false),
            flag: Cell::new(""),
            verdict: Cell::new(""),
            executed: Cell::new(None),
            request_bytes: Cell::new(0),
            awaits_client: Cell::new(false),
            grpc: Cell::new(false),
            said: Cell::new(None),
            response_bytes: Cell::new(0),
            mtls: Cell::new(false),
            complete: Cell::new(false),
            wants_report: Cell::new(None),
            reports: Cell::new(true),
            let_in: Cell::new(false),
            place: RefCell::new(None),
            asked: RefCell::new(None),
            held: RefCell::new(None),
            details: OnceCell::new(),
            decision: RefCell::new(None),
        })
    }

    /// When it began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The client has said how long it waits.
    pub fn is_waited_for(&self, said: Option<Duration>) {
        self.said.set(said);
    }

    /// How long the client waits, if it has said so.
    pub fn said(&self) -> Option<Duration> {
        self.said.get()
    }

    /// Keeps what logs, taps and traces want to know of a request, if anybody looks; a trace goes on in its headers.
    pub fn keep_request(
        &self,
        parts: &mut http::request::Parts,
        authority: &Authority,
        client: Option<&SpiffeId>,
    ) {
        let telemetry = &self.worker.telemetry;
        if !telemetry.wants_details(self.direction) {
            return;
        }
        let trace = self.worker.with_random(|random| telemetry.start_span(&parts.headers, random));
        if let Some(span) = &trace {
            span.apply(&mut parts.headers);
        }
        self.keep(Details {
            method: Some(parts.method.clone()),
            authority: Some(authority.clone()),
            path: parts.uri.path_and_query().cloned(),
            version: Some(parts.version),
            trace,
            ..Details::of(client)
        });
    }

    /// The same for a connection whose bytes are not looked at.
    pub fn keep_connection(&self, client: Option<&SpiffeId>) {
        if self.worker.telemetry.wants_details(self.direction) {
            self.keep(Details::of(client));
        }
    }

    fn keep(&self, details: Details) {
        // Kept once, at the beginning.
        let _ = self.details.set(Box::new(details));
    }

    /// Notes whom the other side proved to be.
    pub fn secured(&self, mtls: bool) {
        self.mtls.set(mtls);
    }

    /// The client asked to see load reports.
    pub fn show_reports(&self, headers: &HeaderMap) {
        self.wants_report.set(headers.get(LOAD_REPORT_FORMAT).map(Format::of));
    }

    /// Says whether the response carries a load report.
    pub fn set_reports(&self, reports: bool) {
        self.reports.set(reports);
    }

    /// The client may ask this of the application.
    pub fn let_in(&self) {
        self.let_in.set(true);
    }

    /// Whether it may.
    pub fn is_let_in(&self) -> bool {
        self.let_in.get()
    }

    /// Whether the response carries a load report.
    pub fn reports(&self) -> bool {
        self.reports.get() || self.shows_reports().is_some()
    }

    /// The form in which the client asked to see load reports, if it did.
    pub fn shows_reports(&self) -> Option<Format> {
        self.wants_report.get()
    }

    /// A try goes to an endpoint; it counts there until the next try or the end.
    pub fn goes_to(
        &self,
        rule: &Rule,
        asked: &penstock_api::ServiceName,
        cluster: &Arc<Cluster>,
        endpoint: &Arc<Endpoint>,
        sent: Sent,
    ) {
        // A try that nobody has judged came back unsent.
        self.leave(How::Abandoned);
        self.tries.set(self.tries.get() + 1);
        let outcome = self.worker.outcome(self.direction, rule, asked, cluster, endpoint);
        outcome.in_flight.fetch_add(1, Relaxed);
        cluster.in_flight.fetch_add(1, Relaxed);
        self.place_at(Some(outcome), cluster, endpoint, Some(sent));
    }

    /// A copy goes to an endpoint. It takes none of what the Service's limit of requests leaves for others.
    pub fn copy_goes_to(&self, cluster: &Arc<Cluster>, endpoint: &Arc<Endpoint>, sent: Sent) {
        self.leave(How::Abandoned);
        self.place_at(None, cluster, endpoint, Some(sent));
    }

    fn place_at(
        &self,
        outcome: Option<Arc<Outcome>>,
        cluster: &Arc<Cluster>,
        endpoint: &Arc<Endpoint>,
        sent: Option<Sent>,
    ) {
        let place = Place { outcome, cluster: Arc::clone(cluster), endpoint: Arc::clone(endpoint), sent };
        *self.place.borrow_mut() = Some(place);
    }

    /// The request shares the answer of another that went to that endpoint: it counts as answered from there, and as no
    /// load.
    pub fn shares(
        &self,
        rule: &Rule,
        asked: &penstock_api::ServiceName,
        cluster: &Arc<Cluster>,
        endpoint: &Arc<Endpoint>,
    ) {
        self.leave(How::Abandoned);
        let outcome = self.worker.outcome(self.direction, rule, asked, cluster, endpoint);
        outcome.in_flight.fetch_add(1, Relaxed);
        self.place_at(Some(outcome), cluster, endpoint, None);
    }

    /// How the endpoint of the current try was chosen, if somebody asked.
    pub fn explained(&self, decision: Option<Box<Decision>>) {
        self.decision.replace(decision);
    }

    /// The request came back unsent from a connection that was closing: that was no try.
    pub fn was_no_try(&self) {
        self.tries.set(self.tries.get().saturating_sub(1));
    }

    /// The current try is over by the endpoint's fault, and another follows. The last try is judged by how the request
    /// ends, and counts where it went.
    pub fn try_failed(&self) {
        self.leave(How::Failed);
    }

    fn leave(&self, how: How) -> Option<Arc<Outcome>> {
        let place = self.place.borrow_mut().take()?;
        let counts = place.outcome.is_some();
        if let Some(outcome) = &place.outcome {
            outcome.in_flight.fetch_sub(1, Relaxed);
        }
        if let Some(sent) = place.sent {
            place.cluster.pool.over(&place.endpoint.state, sent, how, self.worker.now());
            if counts {
                place.cluster.in_flight.fetch_sub(1, Relaxed);
            }
        }
        place.outcome
    }

    /// The endpoint of the current try.
    pub fn endpoint(&self) -> Option<Arc<Endpoint>> {
        self.place.borrow().as_ref().map(|place| Arc::clone(&place.endpoint))
    }

    /// The endpoint of the current try, in words.
    pub fn whither(&self) -> String {
        match &*self.place.borrow() {
            Some(place) => format!("{} ({})", place.endpoint.name, place.endpoint.address),
            None => "nobody".to_owned(),
        }
    }

    /// The request is on its way to the server: what the application's own requests waited is told as load.
    pub fn sending(&self) {
        if self.direction == Direction::Inbound {
            self.worker.shared.queue_wait.waited(self.started.elapsed());
        }
    }

    /// Limits count it, for as long as it lasts.
    pub fn holds(&self, held: Held) {
        self.held.replace(Some(held));
    }

    /// The client gets that answer, whose body those limits may count too.
    pub fn answers<B>(&self, response: &Response<B>) {
        if let Some(held) = &mut *self.held.borrow_mut() {
            held.answered(response.status(), response.headers());
        }
    }

    /// The application is asked for a model's work.
    pub fn asks(&self, model: Arc<Model>, work: &Work, permit: Option<Permit>) {
        if let Some(held) = &mut *self.held.borrow_mut() {
            held.asks(work.units);
        }
        let now = self.worker.now();
        let units = model.units(work, now);
        let alone = permit.as_ref().map_or(Duration::ZERO, |_| model.outlook(units, now).service);
        let watched = model.estimator.arrived(units, now);
        *self.asked.borrow_mut() = Some(Asked { model, watched, alone, took: Duration::ZERO, permit });
    }

    /// The model that the application was asked for.
    pub fn model(&self) -> Option<Arc<Model>> {
        self.asked.borrow().as_ref().map(|asked| Arc::clone(&asked.model))
    }

    /// A load report of the current try's endpoint has come.
    pub fn told(&self, report: LoadReport) {
        if let Some(place) = &*self.place.borrow() {
            place.cluster.pool.told(&place.endpoint.state, report, self.worker.now());
        }
    }

    /// The current try's endpoint has said what it has loaded.
    pub fn told_models(&self, value: &HeaderValue) {
        if let Some(place) = &*self.place.borrow()
            && let Some(models) = Loaded::of_header(value)
        {
            place.cluster.told_models(&place.endpoint, models, self.worker.now());
        }
    }

    /// The response's headers have arrived, or are made here.
    pub fn answered(&self, status: u16) {
        self.status.set(status);
        self.headers.set(self.started.elapsed());
    }

    /// The headers of an answer with that body have arrived. Whoever knows the length of its answer has the answer.
    pub fn answered_with(&self, status: u16, body: &impl http_body::Body) {
        self.answered(status);
        if body.size_hint().exact().is_some() {
            self.began();
        }
    }

    /// Logs and taps show this word among its flags.
    pub fn flag(&self, word: &'static str) {
        self.flag.set(word);
    }

    /// Access policies deny it, or would: logs and taps show the word among its flags.
    pub fn judged(&self, verdict: &'static str) {
        self.verdict.set(verdict);
    }

    /// Our span, if it is recorded.
    pub fn span(&self) -> Option<Span> {
        self.details.get()?.trace.filter(|span| span.sampled)
    }

    /// It was answered by an execution, or shares the answer of a request, that has a span of its own.
    pub fn executed_in(&self, span: Option<Span>) {
        self.executed.set(span);
    }

    /// The first byte of the answer is here: the work that the request waited for is done. A server that streams sends
    /// its headers long before that, when it has only begun to work.
    pub fn began(&self) {
        // A failure is no measurement: it would make a broken server look fast.
        if self.status.get() >= 500 || self.began.replace(true) {
            return;
        }
        let now = self.worker.now();
        if let Some(place) = &mut *self.place.borrow_mut()
            && let Some(sent) = &mut place.sent
        {
            place.cluster.pool.first_byte(&place.endpoint.state, sent, now);
        }
        if let Some(Asked { model, watched, took, .. }) = &mut *self.asked.borrow_mut() {
            let ms = model.estimator.started(watched, now);
            *took = Duration::try_from_secs_f32(ms / 1e3).unwrap_or_default();
        }
    }

    /// The proxy answers itself.
    pub fn failed(&self, failure: &Failure) {
        self.reason.set(Some(failure.reason));
        self.answered(failure.reason.status());
    }

    /// The response broke off.
    pub fn broken(&self, reason: Reason) {
        self.reason.set(Some(reason));
        if reason.blame() == Blame::Upstream
            && let Some(place) = &*self.place.borrow()
            && place.sent.is_some()
            && place.outcome.is_some()
        {
            let policy = place.cluster.policy();
            // Not of its last try, but that does not matter: the head of its answer was a success, which ends a probation.
            let began = self.started.saturating_duration_since(self.worker.shared.epoch);
            place.endpoint.state.ejection.failure(&policy.outlier, began, self.worker.now());
        }
    }

    /// The gRPC status in the trailers says that the server failed.
    pub fn grpc_failed(&self) {
        self.grpc_failed.set(true);
    }

    /// The response's last byte has passed.
    pub fn complete(&self) {
        self.complete.set(true);
    }

    /// Bytes of the request's body have passed.
    pub fn sent(&self, bytes: usize) {
        self.request_bytes.set(self.request_bytes.get() + bytes as u64);
    }

    /// Bytes of the request's body have come in. A body whose length was not said shows only here that it is too
    /// large.
    pub fn came_in(&self, bytes: usize) -> Result<(), RequestBroken> {
        self.sent(bytes);
        self.body_too_large().map_or(Ok(()), |limit| Err(RequestBroken::TooLarge(limit)))
    }

    /// Bytes of the response's body have passed.
    pub fn received(&self, bytes: usize) {
        self.response_bytes.set(self.response_bytes.get() + bytes as u64);
    }

    /// Whether more of the request's body was asked for than the client has sent.
    pub fn awaits_client(&self, waits: bool) {
        self.awaits_client.set(waits);
    }

    /// It is a call of gRPC, or not.
    pub fn speaks_grpc(&self, grpc: bool) {
        self.grpc.set(grpc);
    }

    /// Whether it is the client's fault that nothing moves. Of a call of gRPC nobody can tell.
    pub fn client_stalls(&self) -> bool {
        self.awaits_client.get() && !self.grpc.get()
    }

    /// Bytes of an answer to the client have passed.
    pub fn came_back(&self, data: &[u8]) {
        self.received(data.len());
        if let Some(held) = &mut *self.held.borrow_mut() {
            held.passes(data);
        }
    }

    /// Bytes of the request's body so far.
    pub fn request_bytes(&self) -> u64 {
        self.request_bytes.get()
    }

    /// Whether it is a request to the application of this pod.
    pub fn is_inbound(&self) -> bool {
        self.direction == Direction::Inbound
    }

    /// The limit on a request's body, if more than that has come in for the application.
    pub fn body_too_large(&self) -> Option<u64> {
        let limit = self.worker.shared.limits.body_bytes;
        let above = self.is_inbound() && limit > 0 && self.request_bytes.get() > limit;
        above.then_some(limit)
    }

    fn end(&self) -> End {
        let mut reason = self.reason.get();
        if reason.is_none() && !self.complete.get() {
            reason = Some(Reason::ClientClosed);
        }
        let status = match self.status.get() {
            0 => reason.map_or(0, Reason::status),
            status => status,
        };
        let total = self.started.elapsed();
        let ours = reason.is_some_and(|reason| reason.blame() != Blame::Client);
        End {
            status,
            reason,
            failed: ours || (reason.is_none() && (status >= 500 || self.grpc_failed.get())),
            mtls: self.mtls.get(),
            tries: self.tries.get(),
            headers: if self.headers.get().is_zero() { total } else { self.headers.get() },
            total,
            request_bytes: self.request_bytes.get(),
            response_bytes: self.response_bytes.get(),
        }
    }

    /// The identity that the other side is expected to have proven, for logs.
    fn server(&self) -> Option<SpiffeId> {
        self.place.borrow().as_ref().and_then(|place| place.endpoint.identity.clone())
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let end = self.end();
        let server = self.server();
        let how = match end.reason.map(Reason::blame) {
            None if end.failed => How::Failed,
            None => How::Served,
            Some(Blame::Upstream) => How::Failed,
            Some(_) => How::Abandoned,
        };
        if self.copy {
            // That a mirror fails is no reason to send clients' requests elsewhere.
            self.leave(if how == How::Served { how } else { How::Abandoned });
            return;
        }
        if let Some(Asked { model, watched, alone, took, permit }) = self.asked.take() {
            model.estimator.finished(watched, how != How::Served, self.worker.now());
            if let Some(permit) = permit.filter(|_| how == How::Served) {
                permit.answered(took, Some(alone).filter(|alone| !alone.is_zero()), None);
            }
        }
        if let Some(held) = self.held.take() {
            held.settle(self.worker.now());
        }
        let outcome = match self.leave(how) {
            Some(outcome) => outcome,
            None => self.worker.unrouted(self.direction),
        };
        outcome.finish(&end);
        if end.failed && self.direction == Direction::Outbound {
            self.worker.telemetry.request_failed();
        }
        self.worker.shared.drain.end(self.direction);
        let details = self.details.take().map(|details| {
            let mut details = *details;
            if details.server.is_none() {
                details.server = server;
            }
            details.flags = self.flag.get();
            details.verdict = self.verdict.get();
            details.executed = self.executed.get();
            details.decision = self.decision.take();
            details
        });
        if details.is_some() || end.reason.is_some() {
            self.worker.telemetry.finish(&outcome.labels, &end, details);
        }
    }
}
