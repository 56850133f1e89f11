//! One execution for many requests: what was answered lately is not executed again, what is in flight is executed once,
//! and what differs only in its rows is executed together.
//!
//! In: a request for the application, and what its port's configuration asks for ([`Batch`](crate::config::Batch),
//! [`Coalesce`]). Out: its answer; or nothing, and then it goes its way as it came. What is not understood, too
//! large or asked to be left alone passes untouched, and so does everything while too much is held already: sharing makes
//! service better and is never the reason for a refusal.
//!
//! [`wire`] reads and writes what clients speak, [`batcher`] forms and runs batches, [`handover`] brings tensors to the
//! server, [`place`] receives them there, [`learn`] asks it what it can, [`text`] shares what language models answer, [`outbound`] what an application
//! asks of the mesh. What is decided is decided in the crate `penstock-coalesce`.

pub mod batcher;
pub mod call;
pub mod gpu;
pub mod handover;
pub mod learn;
pub mod outbound;
pub mod place;
pub mod record;
pub mod tally;
pub mod text;
pub mod told;
pub mod wire;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use penstock_api::{Reason, SpiffeId, names};
use penstock_coalesce::batch::{Ask, Limits};
use penstock_coalesce::cache::{self, Cache, Control, Terms};
use penstock_coalesce::flight::{Flights, Joined, Seat};
use penstock_coalesce::key::{self, Hash, Scope};
use penstock_inference::oip::{Datatype, InferRequest, InferResponse, rest};
use penstock_kernels::arena::Frozen;
use tokio::sync::oneshot;

use crate::admission::facts;
use crate::body::{RequestBody, ResponseBody};
use crate::config::{Coalesce, WorkloadPort};
use crate::connection::Connection;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::held::{self, Held};
use crate::models::{Model, Models};
use crate::prepare::pictures::Rules;
use crate::prepare::{self, Prepare, Whose, intake};
use crate::send;
use crate::telemetry::metric::{self, Metric};
use crate::work::Work;

use batcher::{Executed, Learn, Told};
use call::{Trouble, Way};
use handover::Ground;
use place::Received;
use tally::Tally;
use wire::{Asked, Form, ModelError};

/// The largest body that is held to be shared, bytes; a larger one passes.
pub const MAX_BODY: usize = 64 << 20;
/// A cache that nobody has asked for so long makes way for one of another size.
const UNUSED: Duration = Duration::from_secs(60);

/// What requests share, over all workers.
#[derive(Debug)]
pub struct Sharing {
    flights: Mutex<Flights<oneshot::Sender<Word>>>,
    /// Answers that come in and are read by all who asked the same.
    records: record::Records,
    /// By size: Services of one pod may ask for different ones.
    caches: Mutex<Vec<OfSize>>,
    /// Memory that the model server reads too.
    pub memory: handover::Memory,
    /// A GPU whose memory the model server reads too.
    pub gpu: Arc<gpu::Gpu>,
    /// What it was worth.
    pub tally: Tally,
}

/// A cache, and when it was last asked for.
#[derive(Debug)]
struct OfSize {
    bytes: u64,
    used: Duration,
    cache: Arc<Cache<Stored>>,
}

/// An answer that is kept.
#[derive(Clone, Debug)]
enum Stored {
    /// Of a model for tensors.
    Tensors(InferResponse),
    /// Of a language model.
    Text(Arc<text::Text>),
}

/// What a follower is told.
#[derive(Debug)]
enum Word {
    /// The leader has left, it leads now.
    Lead(Seat),
    /// The answer, and in which execution it was given.
    Answer(Told),
    /// The leader failed in a way that says nothing about others.
    Alone,
}

impl Sharing {
    /// With the library of a GPU's driver, which is opened when a GPU is asked for.
    pub fn new(driver: PathBuf, nvjpeg: Option<PathBuf>) -> Self {
        Self {
            flights: Mutex::default(),
            records: record::Records::default(),
            caches: Mutex::default(),
            memory: handover::Memory::default(),
            gpu: Arc::new(gpu::Gpu::new(driver, nvjpeg)),
            tally: Tally::default(),
        }
    }

    /// The cache of that size.
    fn cache(&self, bytes: u64, now: Duration) -> Arc<Cache<Stored>> {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = caches.iter_mut().find(|known| known.bytes == bytes) {
            known.used = now;
            return Arc::clone(&known.cache);
        }
        // Of a size that is not configured any more.
        caches.retain(|other| now.saturating_sub(other.used) < UNUSED);
        let cache = Arc::new(Cache::new(bytes));
        caches.push(OfSize { bytes, used: now, cache: Arc::clone(&cache) });
        cache
    }

    /// A request's body, whole, and held. `None`: there is no room for it, and it passes.
    async fn take_in(
        &self,
        exchange: &Rc<Exchange>,
        body: &mut RequestBody,
        limit: usize,
    ) -> Option<(Bytes, Held)> {
        let whole = held::whole(exchange, body, limit).await;
        if whole.is_none() {
            self.tally.passed.add(1);
        }
        whole
    }

    /// Tells the metrics what goes on now, and what was counted.
    pub fn tell(&self, models: &Models) {
        self.tally.tell(&self.memory);
        self.gpu.tell();
        let (mut waiting, mut flying) = (0, 0);
        for model in models.all().iter() {
            let (waits, flies) = model.open_batches();
            waiting += waits;
            flying += flies;
        }
        let gauge = |metric: &Metric, value: u64| metrics::gauge!(metric.name).set(value as f64);
        gauge(&metric::BATCH_WAITING, waiting as u64);
        gauge(&metric::BATCHES_IN_FLIGHT, flying as u64);
        gauge(&metric::COALESCE_FLIGHTS, self.flights().len() as u64);
    }

    fn flights(&self) -> std::sync::MutexGuard<'_, Flights<oneshot::Sender<Word>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the client itself says of sharing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Wish {
    /// In a batch.
    batched: bool,
    /// With requests that are the same.
    coalesced: bool,
    /// It wants to see with how many it was executed.
    shown: bool,
}

impl Wish {
    fn of(headers: &HeaderMap) -> Self {
        let said = |name: &str| headers.get(name).map(HeaderValue::as_bytes);
        Self {
            batched: said(names::header::BATCH) != Some(b"off"),
            coalesced: said(names::header::CACHE) != Some(b"off"),
            shown: said(names::header::BATCH) == Some(b"show"),
        }
    }
}

/// A request on its way through this stage.
struct Sharer<'a> {
    exchange: &'a Rc<Exchange>,
    model: &'a Arc<Model>,
    way: Way,
    asked: Arc<Asked>,
    /// As it came.
    request: &'a Request<RequestBody>,
    body: VecDeque<Bytes>,
    /// Where its tensors lie in the arena, if they were received there.
    there: Option<Frozen>,
    /// Whose it is; empty: not proven.
    client: &'a str,
    /// Whose it is, where callers have regions of shared memory of their own.
    tenant: Option<u64>,
    /// How it can share an execution; `None`: it goes alone.
    together: Option<(Limits, Ask)>,
    /// What is still to be done before it can be executed.
    unprepared: Option<Unprepared>,
    /// Names of headers that the configuration says make a difference.
    named: &'a [HeaderName],
    /// Headers that decide its answer, credentials among them; all of an execution have the same.
    deciding: HeaderMap,
}

/// Inputs that are not yet what the model takes.
struct Unprepared {
    pipelines: Vec<Arc<Prepare>>,
    /// How it can share an execution when they are.
    limits: Option<Limits>,
    ask: Ask,
    /// Whether the server takes tensors behind the JSON, or over gRPC.
    binary: bool,
    shared_memory: bool,
    gpu_memory: bool,
}

/// How a request can share an execution, if it can.
fn together(
    limits: Limits,
    ask: Ask,
    asked: &Asked,
    tenant: Option<u64>,
    named: &[HeaderName],
    headers: &HeaderMap,
) -> Option<(Limits, Ask)> {
    let scope = Scope { client: "", model: &asked.model, version: &asked.version, load: 0, headers: named };
    let (rows, key) = key::compatible(&asked.request, &scope, headers)?;
    // What lies in a region of one's own lies beside nobody's.
    let key = key ^ u128::from(tenant.unwrap_or_default());
    (rows <= limits.rows).then_some((limits, Ask { key, rows, ..ask }))
}

/// Whether the server can be sent it: as binary tensors, or in JSON (the protocol, "Tensor Data": half-precision numbers travel
/// as bytes alone).
pub(super) fn can_be_sent(request: &InferRequest, binary: bool) -> bool {
    binary || !request.inputs.iter().any(|input| matches!(input.datatype, Datatype::Fp16 | Datatype::Bf16))
}

/// Whether anything is shared, or prepared, on a port.
pub fn applies(port: Option<&WorkloadPort>) -> Option<&WorkloadPort> {
    port.filter(|port| port.batch.is_some() || port.coalesce.is_some() || !port.pipelines.is_empty())
}

/// What a request weighs in a batch.
fn weigh(request: &InferRequest) -> (u64, u64) {
    // Those of pictures are not there yet.
    let bytes = request.inputs.iter().map(|input| {
        let size = input.datatype.size().unwrap_or_default() as u64;
        size.saturating_mul(input.shape.iter().product::<u64>()).max(input.data.len() as u64)
    });
    let bytes = bytes.sum();
    let elements = request.inputs.iter().map(|input| input.shape.iter().product::<u64>()).sum();
    (bytes, elements)
}

/// Answers a request by sharing, if that can be.
pub async fn serve(
    connection: &Connection,
    exchange: &Rc<Exchange>,
    port: &WorkloadPort,
    model: &Arc<Model>,
    work: &Work,
    request: &mut Request<RequestBody>,
) -> Result<Option<Response<ResponseBody>>, Failure> {
    let worker = &exchange.worker;
    let sharing = &worker.shared.sharing;
    let mut wish = Wish::of(request.headers());
    let (name, version) = work.model.split_once('/').unwrap_or((&work.model, ""));
    let pipelines = prepare::of(&port.pipelines, name);
    let prepares = !pipelines.is_empty();
    if !wish.batched && !wish.coalesced && !prepares {
        return Ok(None);
    }
    if prepares {
        intake::check(request)?;
    }
    let mut form = Form::of(request.method(), request.uri(), request.headers());
    if form.is_none() && prepares {
        form = Form::with_query(request.method(), request.uri(), request.headers());
        (wish.batched, wish.coalesced) = (wish.batched && form.is_none(), wish.coalesced && form.is_none());
    }
    let Some(form) = form else {
        return match port.coalesce.as_ref().filter(|_| wish.coalesced && text::is_text(request)) {
            Some(rules) => text::serve(connection, exchange, port, rules, model, work, request).await,
            None => Ok(None),
        };
    };
    let way = Way { cluster: Arc::clone(&port.cluster), http2: form != Form::Rest };
    let learn = || Learn { model: name.to_owned(), version: version.to_owned() };
    // Of what is no model in particular, since there are too many or its name came too late, nothing can be known: it may be
    // several.
    let is_known = !model.name.is_empty();
    let known = is_known.then(|| model.batcher().known(worker, model, &way, learn)).flatten();
    let rules = port.batch.as_ref().filter(|_| wish.batched);
    let limits = rules
        .zip(known.as_ref())
        .and_then(|(rules, known)| model.batcher().limits(rules, known, worker.now()));
    let coalesced = port.coalesce.as_ref().filter(|_| wish.coalesced);
    // Whether it takes binary tensors, and how an answer over gRPC is written, depends on the server.
    let shares = (limits.is_some() || coalesced.is_some()) && known.is_some();
    let (limits, coalesced) = (limits.filter(|_| shares), coalesced.filter(|_| shares));
    if !shares && !prepares {
        return Ok(None);
    }
    let client = connection.client_id().map_or("", SpiffeId::as_str);
    let caller = facts::tenant(client, &worker.shared.hasher);
    let tenant = worker.workload().filter(|workload| workload.tenant_regions > 0).map(|_| caller);
    // Tensors that are made here lie elsewhere than those that came.
    let in_place = !prepares && known.as_ref().is_some_and(|known| known.shared_memory);
    let ground = if in_place { sharing.memory.ground(worker, tenant) } else { None };
    let timeout = facts::timeout(request.headers(), port.rule.timeouts.request);
    let began = exchange.started().saturating_duration_since(worker.shared.epoch);
    let deadline = timeout.map(|timeout| began + timeout);
    let whose = Whose { caller, deadline };
    let Some(taken) = take_in(exchange, whose, form, request, &pipelines, ground.as_deref()).await? else {
        sharing.tally.passed.add(1);
        return Ok(None);
    };
    let Taken { mut asked, body, there, held: _held } = taken;
    // The name may have come too late to be told from the beginning.
    let mut pipelines =
        if asked.model == name { pipelines } else { prepare::of(&port.pipelines, &asked.model) };
    // Who sends what the model takes is served as where nothing is prepared: its tensors may be where only the server sees them.
    if !prepare::is_needed(&pipelines, &asked.request) {
        prepare::misnamed(&pipelines, &asked.request)?;
        pipelines.clear();
    }
    if !shares && pipelines.is_empty() {
        return Ok(None);
    }
    // Tensors that are made here have no form of the client's in which the server could be asked.
    let known = match known {
        None if is_known && !pipelines.is_empty() => model.batcher().learned().await,
        known => known,
    };
    if !pipelines.is_empty() {
        prepare::are_taken(&asked.request, known.as_ref().and_then(|known| known.max_rows))?;
    }
    if known.as_ref().is_some_and(|known| known.binary) {
        asked.answers_raw();
    }
    let (bytes, elements) = weigh(&asked.request);
    let ask = Ask {
        key: 0,
        rows: 0,
        bytes,
        elements,
        deadline,
        tenant: caller,
        priority: facts::Priorities::default().of(client, request.headers()) as u8,
    };
    let binary = way.http2 || known.as_ref().is_some_and(|known| known.binary);
    let named = port.coalesce.as_ref().map_or(&[][..], |rules| &rules.headers);
    let shared_memory = known.as_ref().is_some_and(|known| known.shared_memory);
    let gpu_memory = known.as_ref().is_some_and(|known| known.gpu_memory);
    let unprepared = (!pipelines.is_empty()).then_some(Unprepared {
        pipelines,
        limits,
        ask,
        binary,
        shared_memory,
        gpu_memory,
    });
    // What is prepared can tell only then with whom it can share.
    let together = limits
        .filter(|_| unprepared.is_none() && can_be_sent(&asked.request, binary))
        .and_then(|limits| together(limits, ask, &asked, tenant, named, request.headers()));
    let coalesced = coalesced.filter(|_| key::is_repeatable(&asked.request));
    if together.is_none() && coalesced.is_none() && unprepared.is_none() {
        return Ok(None);
    }

    counts(exchange, port, work)?;
    exchange.sending();
    let asked = Arc::new(asked);
    let sharer = Sharer {
        exchange,
        model,
        way,
        asked: Arc::clone(&asked),
        request,
        body,
        there,
        client,
        tenant,
        together,
        unprepared,
        named,
        deciding: key::deciding(request.headers(), named),
    };
    let (told, how) = match coalesced {
        Some(rules) => sharer.answer(rules).await.map(|(told, how)| (told, Some(how)))?,
        None => (sharer.execute().await?, None),
    };
    exchange.secured(connection.client.is_some());
    exchange.executed_in(told.executed.span.filter(|span| Some(*span) != exchange.span()));
    let answer = match told.answer {
        Ok(answer) => Ok(answer),
        Err(Trouble::Model(error)) => Err(error),
        Err(Trouble::Way(failure)) => return Err(failure),
    };
    let mut response = wire::write(&asked, answer, exchange);
    exchange.answered(response.status().as_u16());
    exchange.began();
    exchange.flag(match how {
        Some(How::Hit) => "hit",
        Some(How::Coalesced) => "coalesced",
        Some(How::Miss) | None if told.executed.members > 1 => "batched",
        Some(How::Miss) | None => "",
    });
    let headers = response.headers_mut();
    if let Some(how) = how {
        headers.insert(names::header::CACHE, HeaderValue::from_static(how.as_str()));
    }
    // What was kept was answered in an execution of long ago.
    if wish.shown && how != Some(How::Hit) {
        let Executed { id, rows, .. } = told.executed;
        if let Ok(value) = HeaderValue::try_from(format!("{id};rows={rows}")) {
            headers.insert(names::header::BATCH, value);
        }
    }
    Ok(Some(response))
}

/// A request that is here whole, and understood.
struct Taken {
    asked: Asked,
    /// Its body, in the pieces that it lies in.
    body: VecDeque<Bytes>,
    /// Where its tensors lie in the arena, if they were received there.
    there: Option<Frozen>,
    /// What it takes of the memory for bodies.
    held: Option<Held>,
}

/// Takes in the body, which must be known whole: its tensors into this region, if that can be. `None`: it passes on, with what has
/// come of it.
async fn take_in(
    exchange: &Rc<Exchange>,
    whose: Whose,
    form: Form,
    request: &mut Request<RequestBody>,
    pipelines: &[Arc<Prepare>],
    ground: Option<&Ground>,
) -> Result<Option<Taken>, Failure> {
    let worker = &exchange.worker;
    if form == Form::Rest
        && let Some(arena) = ground.and_then(|ground| ground.arena(worker))
    {
        let length = rest::header_length(request.headers()).ok().flatten();
        match place::receive(exchange, request.body_mut(), length, arena).await {
            Received::There(place::Tensors { json, data, there }) => {
                worker.shared.sharing.tally.received.add(1);
                let asked = wire::read_pieces(request.uri().path(), &json, data.clone());
                let body = std::iter::once(json).chain(data).collect();
                return Ok(asked.map(|asked| Taken { asked, body, there: Some(there), held: None }));
            }
            Received::Passes => return Ok(None),
            Received::NotYet => {}
        }
    }
    let taken = match pipelines.is_empty() {
        true => held::whole(exchange, request.body_mut(), MAX_BODY).await,
        false => intake::take(exchange, whose.caller, request, pipelines).await?,
    };
    let Some((body, held)) = taken else { return Ok(None) };
    let asked = match pipelines.is_empty() {
        true => wire::read(form, request.uri().path(), request.headers(), &body),
        false => intake::read(exchange, whose, form, request, &body, pipelines.to_vec()).await?,
    };
    Ok(asked.map(|asked| Taken { asked, body: [body].into(), there: None, held: Some(held) }))
}

/// From here on a request counts where it goes, as every request does.
fn counts(exchange: &Exchange, port: &WorkloadPort, work: &Work) -> Result<(), Failure> {
    let choice = send::pick(&exchange.worker, &port.cluster, &port.cluster.policy(), work, &[])?;
    exchange.goes_to(&port.rule, &port.cluster.service, &port.cluster, &choice.endpoint, choice.sent);
    Ok(())
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// The cache.
    Hit,
    /// It was executed.
    Miss,
    /// Another request was in flight that was the same.
    Coalesced,
}

impl How {
    fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Coalesced => "coalesced",
        }
    }
}

impl Sharer<'_> {
    /// The answer: from the cache, of one that is in flight, or of an execution.
    async fn answer(self, rules: &Coalesce) -> Result<(Told, How), Failure> {
        let worker = Rc::clone(&self.exchange.worker);
        let sharing = &worker.shared.sharing;
        let batcher = self.model.batcher();
        let (asked, headers) = (Arc::clone(&self.asked), self.request.headers());
        let scope = Scope {
            client: if rules.shared { "" } else { self.client },
            model: &asked.model,
            version: &asked.version,
            load: batcher.load(),
            headers: &rules.headers,
        };
        let key = key::of_tensors(&asked.request, &scope, headers);
        let control = Control::of(headers);
        let cache = rules.cache.map(|(bytes, age)| (sharing.cache(bytes, worker.now()), age));
        if let Some((cache, _)) = &cache
            && let Some(Stored::Tensors(answer)) = cache.get(&key, control, worker.now())
        {
            sharing.tally.hits.add(1);
            return Ok((
                Told { answer: Ok(answer), headers: Arc::default(), executed: Executed::default() },
                How::Hit,
            ));
        }
        let (told, how) = match rules.single_flight {
            true => self.once(key).await?,
            false => (self.execute().await?, How::Miss),
        };
        match how {
            How::Coalesced => sharing.tally.coalesced.add(1),
            How::Hit | How::Miss => sharing.tally.misses.add(1),
        };
        if how == How::Miss
            && let (Some((cache, age)), Ok(answer)) = (cache, &told.answer)
            && let terms = (Terms { age, shared: rules.shared, headers: &rules.headers })
            && let Some(age) = cache::cacheable(headers, &told.headers, StatusCode::OK, terms)
            && batcher.load() == scope.load
        {
            let bytes: usize = answer.outputs.iter().map(|output| output.data.len() + 64).sum();
            // A slice would keep the whole batch's answer in memory.
            cache.put(key, Stored::Tensors(wire::own(answer)), bytes as u64, worker.now(), age);
        }
        Ok((told, how))
    }

    /// Executed, unless one that is the same is in flight.
    async fn once(self, key: Hash) -> Result<(Told, How), Failure> {
        let sharing = &Arc::clone(&self.exchange.worker.shared.sharing);
        let (reply, word) = oneshot::channel();
        let joined = sharing.flights().join(key, || reply);
        let seat = match joined {
            Joined::Apart => return Ok((self.execute().await?, How::Miss)),
            Joined::Lead(seat) => Aboard { sharing, key, seat },
            Joined::Follow(seat) => {
                let mut place = Aboard { sharing, key, seat };
                match word.await {
                    Ok(Word::Answer(told)) => return Ok((told, How::Coalesced)),
                    Ok(Word::Lead(seat)) => place.seat = seat,
                    Ok(Word::Alone) | Err(_) => return Ok((self.execute().await?, How::Miss)),
                }
                place
            }
        };
        let told = self.execute().await;
        if is_leaders_own(&told) {
            // Another leads, as if this one had left.
            return Ok((told?, How::Miss));
        }
        let waiting: Vec<_> = sharing.flights().done(key, seat.seat).collect();
        for waiter in waiting {
            let word = match &told {
                Ok(told @ Told { answer: Ok(_), .. }) => Word::Answer(told.clone()),
                Ok(told @ Told { answer: Err(trouble), .. }) if is_for_all(trouble) => {
                    Word::Answer(told.clone())
                }
                Ok(_) | Err(_) => Word::Alone,
            };
            let _ = waiter.send(word);
        }
        Ok((told?, How::Miss))
    }

    /// Executed, prepared if it has to be: with others, if it can be, or alone.
    async fn execute(self) -> Result<Told, Failure> {
        let worker = &self.exchange.worker;
        let span = self.exchange.span();
        let is_prepared = self.unprepared.is_some();
        let mut made_for = None;
        // What is made counts until it has been executed.
        let mut _made = None;
        let (asked, together, there, pictures) = match self.unprepared {
            None => (self.asked, self.together, self.there, None),
            Some(Unprepared { pipelines, limits, ask, binary, shared_memory, gpu_memory }) => {
                let request = &self.asked.request;
                let whose = Whose { caller: ask.tenant, deadline: ask.deadline };
                let gpu = &worker.shared.sharing.gpu;
                made_for = gpu.prepares(worker, &self.way, &self.asked, &pipelines, gpu_memory);
                let (request, there, pictures) = match &made_for {
                    Some(turn) if turn.is_on_the_gpu() => {
                        let rules = Rules { arena: gpu.staging(), jpegs: turn.leaves_jpegs() };
                        let (request, pictures, held) =
                            prepare::pictures::decode(worker, &pipelines, request, whose, &rules).await?;
                        _made = Some(held);
                        if let Some(turn) = &mut made_for {
                            turn.left(pictures.has_jpegs());
                        }
                        (request, None, Some(Arc::new(pictures)))
                    }
                    Some(_) | None => {
                        let ground = worker
                            .shared
                            .sharing
                            .memory
                            .ground(worker, self.tenant)
                            .filter(|_| shared_memory);
                        let arena = ground.as_ref().and_then(|ground| ground.arena(worker));
                        let made = prepare::request(worker, &pipelines, request, whose, arena).await?;
                        _made = Some(made.held);
                        (made.request, made.placed, None)
                    }
                };
                let (bytes, elements) = weigh(&request);
                let limits = limits.filter(|_| can_be_sent(&request, binary));
                let asked = Asked { request, ..(*self.asked).clone() };
                let ask = Ask { bytes, elements, ..ask };
                let headers = self.request.headers();
                let together =
                    limits.and_then(|limits| together(limits, ask, &asked, self.tenant, self.named, headers));
                (Arc::new(asked), together, there, pictures)
            }
        };
        if together.is_none() && !is_prepared {
            let outgoing = call::original_to_be_read(self.request, self.body);
            let mut told = batcher::alone(worker, self.model, &self.way, outgoing).await;
            // Nothing but the request itself; who shares its answer links to it.
            told.executed.span = span;
            return Ok(told);
        }
        let spoilt = pictures.clone();
        let wants = batcher::Wants {
            asked,
            way: self.way,
            deciding: self.deciding,
            span,
            there,
            pictures,
            tenant: self.tenant,
        };
        let told = match together {
            Some((limits, ask)) => batcher::execute(worker, self.model, limits, ask, wants).await?,
            None => batcher::anew(worker, self.model, &wants).await,
        };
        // A file that was found damaged only when its batch was executed: the others have their answers.
        if let Some(failure) = spoilt.as_ref().and_then(|pictures| pictures.spoilt()) {
            return Err(failure);
        }
        if let Some(turn) = made_for.filter(|_| told.answer.is_ok()) {
            worker.shared.sharing.gpu.prepared(turn, worker.now());
        }
        Ok(told)
    }
}

/// Whether what went wrong went wrong for everybody: the server could not be reached, or could not work.
fn is_for_all(trouble: &Trouble) -> bool {
    match trouble {
        Trouble::Model(error) => ModelError::is_unavailable(error),
        Trouble::Way(failure) => failure.reason != Reason::Internal,
    }
}

/// Whether a leader got no answer for a reason that says nothing about who follows: its deadline, and its share of the line,
/// are its own.
fn is_leaders_own(told: &Result<Told, Failure>) -> bool {
    match told {
        Err(failure) | Ok(Told { answer: Err(Trouble::Way(failure)), .. }) => {
            matches!(failure.reason, Reason::TooLate | Reason::QueueFull)
        }
        Ok(_) => false,
    }
}

/// A place in a flight; dropping it leaves.
struct Aboard<'a> {
    sharing: &'a Sharing,
    key: Hash,
    seat: Seat,
}

impl Drop for Aboard<'_> {
    fn drop(&mut self) {
        let mut next = self.sharing.flights().leave(self.key, self.seat);
        // One that has left without a word cannot lead either.
        while let Some((seat, waiter)) = next {
            match waiter.send(Word::Lead(seat)) {
                Ok(()) => return,
                Err(_) => next = self.sharing.flights().leave(self.key, seat),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_of_two_sizes_do_not_take_turns_and_one_that_is_unused_goes() {
        let sharing = Sharing::new(PathBuf::new(), None);
        let at = Duration::from_secs;
        let (small, large) = (sharing.cache(1 << 20, at(0)), sharing.cache(2 << 20, at(0)));
        assert!(Arc::ptr_eq(&small, &sharing.cache(1 << 20, at(50))));
        assert!(Arc::ptr_eq(&large, &sharing.cache(2 << 20, at(1))));
        drop(sharing.cache(3 << 20, at(70)));
        assert!(Arc::ptr_eq(&small, &sharing.cache(1 << 20, at(70))));
        assert_eq!(Arc::strong_count(&large), 1, "the large one is gone");
    }

    #[test]
    fn a_leaders_deadline_and_share_of_the_line_are_its_own() {
        let told = |trouble| Ok(Told::failed(trouble, Executed::default()));
        let failure = |reason| Failure::unprocessed(reason, "");
        assert!(is_leaders_own(&Err(failure(Reason::QueueFull))));
        assert!(is_leaders_own(&told(Trouble::Way(failure(Reason::TooLate)))));
        for of_all in [Reason::ConnectFailed, Reason::UpstreamReset, Reason::NoEndpoint] {
            assert!(!is_leaders_own(&told(Trouble::Way(failure(of_all)))), "{of_all}");
        }
        assert!(!is_leaders_own(&told(Trouble::Model(ModelError::of(503, 14, String::new())))));
    }
}
