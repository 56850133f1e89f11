//! The batches of one model: members of all workers join here, and wait for their rows of an answer.
//!
//! The state machine ([`Former`]) stands behind a mutex that is held for less than a microsecond and never across an await:
//! a message to an owner would wake a thread for every request. Whoever finds a batch formed launches it on the worker of
//! its first member, as a task of its own, so that nobody's leaving stops what others wait for; when the last has left, the
//! task is stopped and the server sees its connection close.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http::HeaderMap;
use penstock_api::Reason;
use penstock_api::reason::Blame;
use penstock_coalesce::batch::{
    self, Ask, BatchId, Bisection, Cut, Formed, Former, Left, Limits, Takes, Ticket,
};
use penstock_inference::oip::{InferResponse, batch as rows_of};
use penstock_kernels::arena::Frozen;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::call::{self, Answered, Outgoing, Trouble, Way};
use super::handover::{self, Hand};
use super::learn::{self, Known};
use super::wire::{self, Asked, ModelError};
use crate::config;
use crate::failure::Failure;
use crate::models::Model;
use crate::prepare::pictures::Pictures;
use crate::telemetry::trace::{Execution, Span};
use crate::worker::Worker;

/// Parts of answers up to so many bytes are copied: that costs less than a request, and most classes, boxes and embeddings are.
const SMALL: usize = 16 << 10;
/// How long requests go alone for a model that refused most of a batch.
const APART: Duration = Duration::from_secs(5);
/// Members of a batch from which on most of them being refused is no accident.
const MANY: usize = 8;

/// What a member brings.
#[derive(Debug)]
pub struct Wants {
    /// What it asks.
    pub asked: Arc<Asked>,
    /// How its own server is asked.
    pub way: Way,
    /// Headers that decide its answer, credentials among them; the same for all of an execution.
    pub deciding: HeaderMap,
    /// Its span, if it is recorded.
    pub span: Option<Span>,
    /// Where its inputs lie in the arena, if they do.
    pub there: Option<Frozen>,
    /// Its inputs that have no data yet.
    pub pictures: Option<Arc<Pictures>>,
    /// Whose it is, where callers have regions of shared memory of their own; the same for all of an execution.
    pub tenant: Option<u64>,
}

/// One of a batch.
#[derive(Debug)]
pub struct Member {
    /// What it brings.
    pub wants: Wants,
    /// Its rows.
    pub rows: u32,
    /// Where its answer is waited for.
    pub reply: oneshot::Sender<Told>,
    /// Its worker.
    pub home: UnboundedSender<Order>,
}

/// What a member is told.
#[derive(Clone, Debug)]
pub struct Told {
    /// Its part of the answer.
    pub answer: Result<InferResponse, Trouble>,
    /// The headers with which the server gave it: whether it may be kept.
    pub headers: Arc<HeaderMap>,
    /// In which execution.
    pub executed: Executed,
}

impl Told {
    /// There is no answer.
    pub fn failed(trouble: Trouble, executed: Executed) -> Self {
        Self { answer: Err(trouble), headers: Arc::default(), executed }
    }
}

/// An execution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Executed {
    /// Its number in this process.
    pub id: u64,
    /// Its rows.
    pub rows: u32,
    /// The requests that it answers.
    pub members: u32,
    /// Its span, if a request that it answers is recorded.
    pub span: Option<Span>,
}

/// What a worker is asked to do by others.
#[derive(Debug)]
pub enum Order {
    /// Run a batch.
    Run(Arc<Model>, batch::Batch<Member>),
    /// See what is to be done for a model.
    Look(Arc<Model>),
}

/// Forms and runs the batches of one model.
#[derive(Debug)]
pub struct Batcher {
    state: Mutex<State>,
    known: ArcSwapOption<Known>,
    /// How the server is asked over REST, once a client has.
    rest: ArcSwapOption<Way>,
    /// Milliseconds since the epoch from when on the server is asked again.
    learn_at: AtomicU64,
    learning: AtomicBool,
    /// It has been asked.
    asked: Notify,
    /// Its outputs turned out to have no rows.
    without_rows: AtomicBool,
    /// Milliseconds since the epoch until when its requests go alone.
    apart_until: AtomicU64,
    /// Goes up whenever the model may have changed: what was kept before is not asked for any more.
    load: AtomicU64,
}

#[derive(Debug)]
struct State {
    former: Former<Member>,
    running: HashMap<BatchId, AbortHandle>,
    /// When the next look is due.
    armed: Option<Duration>,
}

impl Default for Batcher {
    fn default() -> Self {
        let former = Former::new(Limits::default());
        Self {
            state: Mutex::new(State { former, running: HashMap::new(), armed: None }),
            known: ArcSwapOption::empty(),
            rest: ArcSwapOption::empty(),
            learn_at: AtomicU64::new(0),
            learning: AtomicBool::new(false),
            asked: Notify::new(),
            without_rows: AtomicBool::new(false),
            apart_until: AtomicU64::new(0),
            load: AtomicU64::new(0),
        }
    }
}

impl Batcher {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which load of the model answers now.
    pub fn load(&self) -> u64 {
        self.load.load(Relaxed)
    }

    /// The model may have changed.
    pub fn changed(&self) {
        self.load.fetch_add(1, Relaxed);
        self.without_rows.store(false, Relaxed);
    }

    /// An execution failed: a server that was not there may come back as another.
    pub fn failed(&self, failure: &Failure) {
        if failure.reason.blame() == Blame::Upstream {
            self.changed();
        }
    }

    /// Requests that wait for an execution, and batches that are on their way.
    pub fn open(&self) -> (usize, usize) {
        let state = self.state();
        (state.former.waiting(), state.former.flying())
    }

    /// What the server says of the model, once it has been asked; asks it if that is long ago.
    pub fn known(
        &self,
        worker: &Rc<Worker>,
        model: &Arc<Model>,
        way: &Way,
        ask: impl FnOnce() -> Learn,
    ) -> Option<Arc<Known>> {
        // Over REST where that can be: not every server tells over gRPC all that it tells there.
        if !way.http2 {
            let known = self.rest.load();
            if known.as_ref().is_none_or(|known| !Arc::ptr_eq(&known.cluster, &way.cluster)) {
                self.rest.store(Some(Arc::new(way.clone())));
                self.learn_at.store(0, Relaxed);
            }
        }
        let due = worker.now().as_millis() as u64 >= self.learn_at.load(Relaxed);
        if due && !self.learning.swap(true, Relaxed) {
            let (worker, model, ask) = (Rc::clone(worker), Arc::clone(model), ask());
            let way = self.rest.load_full().map_or_else(|| way.clone(), |rest| Way::clone(&rest));
            tokio::task::spawn_local(async move {
                let batcher = model.batcher();
                let before = batcher.known.load_full();
                let believed = match learn::ask(&worker, &way, &ask.model, &ask.version).await {
                    Ok(known) => {
                        if before.is_some_and(|before| *before != known) {
                            batcher.changed();
                        }
                        batcher.known.store(Some(Arc::new(known)));
                        learn::BELIEVED
                    }
                    // It is not there yet, or too busy to tell: then what it told before is more likely than nothing, and of
                    // one that told nothing yet nothing is known.
                    Err(failure) => {
                        tracing::info!(model = %model.name, %failure, "the server tells nothing of its model now");
                        if before.is_some() {
                            batcher.changed();
                        }
                        learn::FAILED_FOR
                    }
                };
                let again = worker.now() + believed;
                batcher.learn_at.store(again.as_millis() as u64, Relaxed);
                batcher.learning.store(false, Relaxed);
                batcher.asked.notify_waiters();
            });
        }
        self.known.load_full()
    }

    /// The same, once the server that is being asked has told, or has not.
    pub async fn learned(&self) -> Option<Arc<Known>> {
        // From here on it would be woken.
        let asked = self.asked.notified();
        if self.learning.load(Relaxed) {
            asked.await;
        }
        self.known.load_full()
    }

    /// How batches of the model are bounded; `None`: it takes none.
    pub fn limits(&self, rules: &config::Batch, known: &Known, now: Duration) -> Option<Limits> {
        let rows = match (rules.rows, known.max_rows) {
            (Some(rules), Some(known)) => rules.min(known),
            (one, other) => one.or(other)?,
        };
        let apart = (now.as_millis() as u64) < self.apart_until.load(Relaxed);
        if rows < 2 || apart || self.without_rows.load(Relaxed) {
            return None;
        }
        let concurrent = rules.concurrent.unwrap_or_else(|| known.instances.unwrap_or(1) + 1);
        Some(Limits {
            rows,
            bytes: rules.bytes.unwrap_or(u64::MAX),
            elements: rules.elements.unwrap_or(u64::MAX),
            delay: rules.delay,
            concurrent: concurrent as usize,
            target: rules.target,
        })
    }
}

/// What is asked to learn of a model.
#[derive(Debug)]
pub struct Learn {
    /// Its name.
    pub model: String,
    /// Its version; empty: none in particular.
    pub version: String,
}

/// Has a request executed together with others, and waits for its answer.
pub async fn execute(
    worker: &Rc<Worker>,
    model: &Arc<Model>,
    limits: Limits,
    ask: Ask,
    wants: Wants,
) -> Result<Told, Failure> {
    let (reply, told) = oneshot::channel();
    let member = Member { wants, rows: ask.rows, reply, home: worker.orders.clone() };
    let ticket = {
        let mut state = model.batcher().state();
        state.former.set(limits);
        state.former.join(ask, member, worker.now()).map_err(|batch::Full| {
            let story = format!("{} requests wait for the model {}", batch::MAX_WAITING, model.name);
            Failure { retry_after: 1, ..Failure::unprocessed(Reason::QueueFull, story) }
        })?
    };
    let seat = Seat { model, ticket, worker, answered: false };
    look(worker, model);
    let told = told.await;
    seat.answered();
    told.map_err(|_| Failure::new(Reason::Internal, "a batch was lost"))
}

/// A member that waits; dropping it leaves.
struct Seat<'a> {
    worker: &'a Rc<Worker>,
    model: &'a Arc<Model>,
    ticket: Ticket,
    answered: bool,
}

impl Seat<'_> {
    fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let mut state = self.model.batcher().state();
        if let Left::Last(batch) = state.former.leave(self.ticket)
            && let Some(running) = state.running.remove(&batch)
        {
            running.abort();
            self.worker.shared.sharing.tally.cancelled.add(1);
        }
        drop(state);
        // Its place is free for another.
        let _ = self.worker.orders.send(Order::Look(Arc::clone(self.model)));
    }
}

/// Does what other workers ask for.
pub fn obey(worker: &Rc<Worker>, order: Order) {
    match order {
        Order::Run(model, batch) => launch(worker, &model, batch),
        Order::Look(model) => look(worker, &model),
    }
}

/// Launches what is ready, and sees to it that somebody looks again when the next is.
fn look(worker: &Rc<Worker>, model: &Arc<Model>) {
    let takes = model.estimator.cost().map_or_else(Takes::default, |cost| {
        let time = |ms: f32| Duration::try_from_secs_f32(ms / 1e3).unwrap_or_default();
        Takes { fixed: time(cost.fixed_ms), row: time(cost.unit_ms) }
    });
    loop {
        let now = worker.now();
        let (formed, wake) = {
            let mut state = model.batcher().state();
            state.former.expect(takes);
            let formed = state.former.next(now);
            let wake = if formed.is_none() { state.former.wake() } else { None };
            // What is due already waits for a batch to end, and then somebody looks.
            let wake = wake.filter(|wake| *wake > now && state.armed.is_none_or(|armed| *wake < armed));
            state.armed = wake.or(state.armed);
            (formed, wake)
        };
        match formed {
            None => return wake.map_or((), |wake| look_later(worker, model, wake)),
            Some(Formed::Late(member)) => {
                let story = format!("{} could not have answered before the request's deadline", model.name);
                let trouble = Trouble::Way(Failure::unprocessed(Reason::TooLate, story));
                let _ = member.reply.send(Told::failed(trouble, Executed::default()));
            }
            Some(Formed::Batch(batch)) => {
                // Connections belong to workers: a batch runs where its first member came in.
                let home = batch.members.first().map(|(_, member)| member.home.clone());
                match home {
                    Some(home) if !home.same_channel(&worker.orders) => {
                        if let Err(lost) = home.send(Order::Run(Arc::clone(model), batch)) {
                            obey(worker, lost.0);
                        }
                    }
                    _ => launch(worker, model, batch),
                }
            }
        }
    }
}

/// Looks again at that time, unless it is superseded by an earlier one.
fn look_later(worker: &Rc<Worker>, model: &Arc<Model>, at: Duration) {
    let (worker, model) = (Rc::clone(worker), Arc::clone(model));
    tokio::task::spawn_local(async move {
        tokio::time::sleep(at.saturating_sub(worker.now())).await;
        if model.batcher().state().armed.take_if(|armed| *armed == at).is_some() {
            look(&worker, &model);
        }
    });
}

/// Runs a batch as a task of its own.
fn launch(worker: &Rc<Worker>, model: &Arc<Model>, batch: batch::Batch<Member>) {
    worker.shared.sharing.tally.sent(&batch);
    let id = batch.id;
    let flight =
        Flight { model: Arc::clone(model), id, began: worker.now(), failed: true, worker: Rc::clone(worker) };
    let task = tokio::task::spawn_local(run(flight, batch));
    model.batcher().state().running.insert(id, task.abort_handle());
}

/// A batch in flight; dropping it says that it is over, however it ended.
struct Flight {
    worker: Rc<Worker>,
    model: Arc<Model>,
    id: BatchId,
    began: Duration,
    failed: bool,
}

impl Drop for Flight {
    fn drop(&mut self) {
        let took = self.worker.now().saturating_sub(self.began);
        let mut state = self.model.batcher().state();
        state.running.remove(&self.id);
        state.former.done(self.id, took, self.failed);
        drop(state);
        let _ = self.worker.orders.send(Order::Look(Arc::clone(&self.model)));
    }
}

async fn run(mut flight: Flight, batch: batch::Batch<Member>) {
    let members: Vec<Member> = batch.members.into_iter().map(|(_, member)| member).collect();
    let mut bisection = Bisection::of(members.len());
    let (all, mut guilty) = (members.len(), 0);
    let (mut failed, mut was_cut) = (true, false);
    // What was cut is executed at the same time: one after the other, neighbours would wait for each other's executions, and
    // where all are guilty the last for as many as there are members.
    let mut parts = FuturesUnordered::from_iter([part(&flight, members)]);
    while let Some((mut members, answer)) = parts.next().await {
        // Everybody of it has left.
        let Some(answer) = answer else { continue };
        failed &= answer.is_err();
        match answer {
            Ok((answers, headers, executed)) => {
                for (member, answer) in members.into_iter().zip(answers) {
                    let (answer, headers) = (loose(answer, executed.members), Arc::clone(&headers));
                    let _ = member.reply.send(Told { answer: Ok(answer), headers, executed });
                }
            }
            Err((trouble, executed)) => {
                let guilt = matches!(&trouble, Trouble::Model(error) if !error.is_unavailable());
                if guilt && let Some(cut) = bisection.cut(members.len()) {
                    flight.worker.shared.sharing.tally.bisected.add(1);
                    was_cut = true;
                    match cut {
                        Cut::Half(at) => {
                            let rest = members.split_off(at);
                            parts.extend([members, rest].map(|members| part(&flight, members)));
                        }
                        Cut::Each => {
                            parts.extend(members.into_iter().map(|member| part(&flight, vec![member])))
                        }
                    }
                    continue;
                }
                guilty += if guilt { members.len() } else { 0 };
                for member in members {
                    let _ = member.reply.send(Told::failed(trouble.clone(), executed));
                }
            }
        }
    }
    drop(parts);
    if all >= MANY && guilty * 2 > all {
        // To find out again and again that most are guilty costs more executions than to ask for each alone.
        let until = flight.worker.now() + APART;
        flight.model.batcher().apart_until.store(until.as_millis() as u64, Relaxed);
        tracing::info!(model = %flight.model.name, guilty, of = all, "it refuses most of what it is asked, so its requests go alone for {APART:?}");
    }
    // What several executions took says nothing of one.
    flight.failed = failed || was_cut;
}

/// A member's part of an answer, which is a slice of all of it: a small part gets memory of its own, so that one who reads
/// slowly does not keep what all others were answered, or the arena.
fn loose(answer: InferResponse, members: u32) -> InferResponse {
    let bytes: usize = answer.outputs.iter().map(|output| output.data.len()).sum();
    if members > 1 && bytes <= SMALL { wire::own(&answer) } else { answer }
}

/// Those of a batch, or of a part of it, who have not left, and what they are answered.
async fn part(flight: &Flight, mut members: Vec<Member>) -> (Vec<Member>, Option<Answers>) {
    members.retain(|member| !member.reply.is_closed());
    let answer = match members.first() {
        Some(first) => Some(together(flight, &first.wants, &members).await),
        None => None,
    };
    (members, answer)
}

/// An execution that is a part of somebody's trace.
struct Traced {
    span: Span,
    of: Vec<Span>,
    began: Instant,
}

impl Traced {
    /// If any of the members is recorded.
    fn begin(worker: &Worker, members: &[Member]) -> Option<Self> {
        let of: Vec<Span> = members.iter().filter_map(|member| member.wants.span).collect();
        let span = worker.with_random(|random| of.first().map(|first| first.child(random)))?;
        Some(Self { span, of, began: Instant::now() })
    }

    fn end(self, worker: &Worker, model: &str, executed: &Executed, failed: bool) {
        let Self { span, of, began } = self;
        let Executed { id, rows, members, .. } = *executed;
        let took = began.elapsed();
        worker.telemetry.executed(&Execution { span, of: &of, model, id, rows, members, took, failed });
    }
}

/// The way on which all of these can be asked together. A server that can be asked over REST takes tensors as pieces, and by
/// shared memory; but one that knows no binary tensors there would have to be told in JSON, which cannot say everything that
/// came over gRPC (NaN, FP16, bytes that are no text).
fn best<'a>(mut ways: impl Iterator<Item = &'a Way>, binary: bool) -> Option<&'a Way> {
    ways.find(|way| way.http2 != binary)
}

type Answers = Result<(Vec<InferResponse>, Arc<HeaderMap>, Executed), (Trouble, Executed)>;

/// One execution for all of these.
async fn together(flight: &Flight, first: &Wants, members: &[Member]) -> Answers {
    let (worker, model) = (&flight.worker, &flight.model);
    let batcher = model.batcher();
    let rows: Vec<u32> = members.iter().map(|member| member.rows).collect();
    let mut executed = worker.shared.sharing.tally.execution(rows.iter().sum(), rows.len());
    let traced = Traced::begin(worker, members);
    executed.span = traced.as_ref().map(|traced| traced.span);
    let known = batcher.known.load_full().unwrap_or_default();
    let way = best(members.iter().map(|member| &member.wants.way), known.binary).unwrap_or(&first.way);
    // As they were asked for: what counts work reads of a name only what came in time.
    let (name, version) = (first.asked.model.as_str(), first.asked.version.as_str());
    let requests = members.iter().map(|member| &member.wants.asked.request);
    let mut headers = first.deciding.clone();
    executed.span.inspect(|span| span.apply(&mut headers));
    let there = if let [only] = members { only.wants.there.as_ref() } else { None };
    let pictures: Vec<_> = members.iter().map(|member| member.wants.pictures.as_deref()).collect();
    let hand = Hand { there, tenant: first.tenant, pictures: &pictures };
    let answered = handover::infer(worker, way, (name, version), requests, &headers, &known, hand).await;
    if let Some(traced) = traced {
        traced.end(worker, &model.name, &executed, answered.is_err());
    }
    let Answered { response: answer, headers } = match answered {
        Ok(answered) => answered,
        Err(trouble) => {
            if let Trouble::Way(failure) = &trouble {
                batcher.failed(failure);
            }
            return Err((trouble, executed));
        }
    };
    match rows_of::split(&answer, &rows) {
        Ok(answers) => Ok((answers, headers.into(), executed)),
        Err(not_rows) if members.len() > 1 => {
            // From now on its requests go alone; these are asked one by one.
            batcher.without_rows.store(true, Relaxed);
            tracing::warn!(model = %model.name, %not_rows, "its answers cannot be cut into rows, so it is not batched");
            let error = ModelError::of(500, 13, not_rows.to_string());
            Err((Trouble::Model(error), executed))
        }
        Err(_) => Ok((vec![answer], headers.into(), executed)),
    }
}

/// One execution for one request, which is written anew: its inputs are not those that came.
pub async fn anew(worker: &Rc<Worker>, model: &Model, wants: &Wants) -> Told {
    let Wants { asked, way, deciding, span, there, pictures, tenant } = wants;
    let rows = asked.request.inputs.first().and_then(|input| input.shape.first()).copied();
    let mut executed = worker.shared.sharing.tally.execution(rows.unwrap_or(1) as u32, 1);
    executed.span = *span;
    let mut headers = deciding.clone();
    span.inspect(|span| span.apply(&mut headers));
    let known = model.batcher().known.load_full().unwrap_or_default();
    let (name, requests) = ((&*asked.model, &*asked.version), [&asked.request]);
    let pictures = [pictures.as_deref()];
    let hand = Hand { there: there.as_ref(), tenant: *tenant, pictures: &pictures };
    told(model, executed, handover::infer(worker, way, name, requests, &headers, &known, hand).await)
}

/// One execution for one request, which goes as it came.
pub async fn alone(worker: &Rc<Worker>, model: &Model, way: &Way, outgoing: Outgoing) -> Told {
    let executed = worker.shared.sharing.tally.execution(1, 1);
    let answered = async {
        let answer = call::whole(worker, way, outgoing).await?;
        Ok(Answered { response: call::read(way, &answer)?, headers: answer.headers })
    };
    told(model, executed, answered.await)
}

/// What the only member of an execution is told.
fn told(model: &Model, executed: Executed, answered: Result<Answered, Trouble>) -> Told {
    match answered {
        Ok(Answered { response, headers }) => {
            Told { answer: Ok(response), headers: headers.into(), executed }
        }
        Err(trouble) => {
            if let Trouble::Way(failure) = &trouble {
                model.batcher().failed(failure);
            }
            Told::failed(trouble, executed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_was_not_there_may_be_another_and_what_a_client_did_wrong_says_nothing_of_it() {
        let batcher = Batcher::default();
        for (reason, changes) in [
            (Reason::ConnectFailed, 1),
            (Reason::UpstreamReset, 1),
            (Reason::BadRequest, 0),
            (Reason::TooLate, 0),
        ] {
            let before = batcher.load();
            batcher.failed(&Failure::new(reason, ""));
            assert_eq!(batcher.load() - before, changes, "{reason}");
        }
    }
}
