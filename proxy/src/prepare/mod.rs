//! Preparing: inputs become the tensors that the model takes, before the request reaches the model server.
//!
//! In: a request for tensors of which some inputs are images, video frames or tensors in another form, and the pipelines that
//! an `InferencePolicy` declares for them. Out: the request with finished tensors, in memory that the model server reads too
//! where there is such. Can go wrong: an input is no image, or above a limit ([`Reason::BadInput`], which names input and row); too
//! many wait for their turn; the deadline comes first.
//!
//! The work is done by threads of its own, never by those that serve connections, and as many at a time as there are cores for
//! it (`--prepare-threads`). Who leaves is not worked for: what waits is forgotten, what runs is stopped at the next step.
//! What is computed is `penstock-prepare`'s business; [`read`] takes images from requests that are no inference requests.

pub mod pictures;
pub mod read;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use penstock_api::Reason;
use penstock_inference::oip::{self, Datatype, InferRequest, Tensor};
use penstock_kernels::arena::{Arena, Frozen, RowsMut};
use penstock_prepare::form::Dtype;
use penstock_prepare::{Limits, Pipeline, PrepareError, Scratch};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::failure::Failure;
use crate::telemetry::counter::Counter;
use crate::telemetry::metric;
use crate::worker::Worker;

/// Inputs that wait for a thread at once; above, requests are refused.
pub const MAX_WAITING: usize = 4096;
/// Rows of one request.
const MAX_ROWS: usize = 1024;
/// Bytes of one request's finished tensors.
const MAX_TENSORS: usize = penstock_prepare::MAX_TENSORS;
/// What a thread keeps from one input to the next, bytes.
const KEPT: usize = 64 << 20;

/// How one input of a model is prepared.
#[derive(Debug)]
pub struct Prepare {
    /// The model; `None`: all that no other names.
    pub model: Option<String>,
    /// Its name, as clients send it.
    pub input: String,
    /// Its name, as the model takes it.
    pub tensor: String,
    /// What is done.
    pub pipeline: Pipeline,
    /// The dimensions of a row, as the model takes it: as many elements as the pipeline makes.
    pub shape: Vec<u64>,
}

/// The pipelines for a model.
pub fn of(all: &[Arc<Prepare>], model: &str) -> Vec<Arc<Prepare>> {
    let named = |prepare: &&Arc<Prepare>| prepare.model.as_deref() == Some(model);
    let any = |prepare: &&Arc<Prepare>| prepare.model.is_none();
    let own: Vec<_> = all.iter().filter(named).cloned().collect();
    if own.is_empty() { all.iter().filter(any).cloned().collect() } else { own }
}

/// Whether any of its inputs has to be made.
pub fn is_needed(pipelines: &[Arc<Prepare>], request: &InferRequest) -> bool {
    request.inputs.iter().any(|input| {
        pipelines.iter().any(|prepare| prepare.input == input.name && !is_finished(prepare, input))
    })
}

/// Who prepares, over all workers.
#[derive(Debug)]
pub struct Preparing {
    threads: Arc<Semaphore>,
    waiting: AtomicUsize,
    done: Counter,
    refused: Counter,
    abandoned: Counter,
    busy_us: Counter,
}

impl Preparing {
    /// With so many threads.
    pub fn new(threads: usize) -> Self {
        Self {
            threads: Arc::new(Semaphore::new(threads.max(1))),
            waiting: AtomicUsize::new(0),
            done: Counter::default(),
            refused: Counter::default(),
            abandoned: Counter::default(),
            busy_us: Counter::default(),
        }
    }

    fn over<T>(&self, made: &Result<T, PrepareError>, took: Duration) {
        let count = match made {
            Ok(_) => &self.done,
            Err(PrepareError::Cancelled) => &self.abandoned,
            Err(_) => &self.refused,
        };
        count.add(1);
        self.busy_us.add(took.as_micros() as u64);
    }

    /// Tells the metrics.
    pub fn tell(&self) {
        let results = [("done", &self.done), ("refused", &self.refused), ("abandoned", &self.abandoned)];
        for (result, counter) in results {
            metrics::counter!(metric::PREPARED.name, "result" => result).absolute(counter.get());
        }
        let busy = Duration::from_micros(self.busy_us.get());
        metrics::gauge!(metric::PREPARE_BUSY.name).set(busy.as_secs_f64());
        metrics::gauge!(metric::PREPARE_WAITING.name).set(self.waiting.load(Relaxed) as f64);
    }
}

/// A request whose inputs are finished.
#[derive(Debug)]
pub struct Prepared {
    /// As the model takes it.
    pub request: InferRequest,
    /// Its inputs, all of them and in its order, where they lie in the arena.
    pub placed: Option<Frozen>,
}

/// What becomes of one input of a request.
enum Part<'a> {
    /// It goes as it came.
    Finished(&'a Tensor),
    /// It is made of these, a row each.
    Made(Arc<Prepare>, Vec<Bytes>),
}

/// What becomes of each input of a request, if all of it fits.
fn parts<'a>(pipelines: &[Arc<Prepare>], request: &'a InferRequest) -> Result<Vec<Part<'a>>, Failure> {
    let parts: Vec<Part<'_>> = request
        .inputs
        .iter()
        .map(|input| match pipelines.iter().find(|prepare| prepare.input == input.name) {
            Some(prepare) if !is_finished(prepare, input) => {
                Ok(Part::Made(Arc::clone(prepare), rows(&prepare.pipeline, input)?))
            }
            _ => Ok(Part::Finished(input)),
        })
        .collect::<Result<_, Failure>>()?;
    let sizes = parts.iter().map(|part| match part {
        Part::Finished(_) => 0,
        Part::Made(prepare, sources) => prepare.pipeline.bytes().saturating_mul(sources.len()),
    });
    let bytes = sizes.fold(0usize, usize::saturating_add);
    if bytes > MAX_TENSORS {
        let story = format!("its tensors would have {bytes} bytes, and the limit is {MAX_TENSORS}");
        return Err(Failure::unprocessed(Reason::BadInput, story));
    }
    Ok(parts)
}

/// Prepares a request. Its tensors go to the arena where there is one.
pub async fn request(
    worker: &Rc<Worker>,
    pipelines: &[Arc<Prepare>],
    request: &InferRequest,
    deadline: Option<Duration>,
    arena: Option<&Arena>,
) -> Result<Prepared, Failure> {
    let parts = parts(pipelines, request)?;
    let in_arena = arena.and_then(|arena| in_arena(worker, &parts, deadline, arena));
    let Made { data, placed } = match in_arena {
        Some(made) => made.await?,
        None => Made { data: in_heap(worker, &parts, deadline).await?, placed: None },
    };
    let inputs = parts.iter().zip(data).map(|(part, data)| match part {
        Part::Finished(input) => (*input).clone(),
        Part::Made(prepare, sources) => tensor(prepare, sources.len(), data),
    });
    Ok(Prepared { request: InferRequest { inputs: inputs.collect(), ..request.clone() }, placed })
}

fn tensor(prepare: &Prepare, rows: usize, data: Bytes) -> Tensor {
    Tensor {
        name: prepare.tensor.clone(),
        datatype: datatype(prepare.pipeline.dtype()),
        shape: [&[rows as u64], &prepare.shape[..]].concat(),
        parameters: oip::Parameters::new(),
        data,
    }
}

fn datatype(dtype: Dtype) -> Datatype {
    match dtype {
        Dtype::U8 => Datatype::Uint8,
        Dtype::F16 => Datatype::Fp16,
        Dtype::Bf16 => Datatype::Bf16,
        Dtype::F32 => Datatype::Fp32,
    }
}

/// Whether a client has sent the finished tensor.
fn is_finished(Prepare { pipeline, shape, .. }: &Prepare, input: &Tensor) -> bool {
    let taken = pipeline.takes().is_some_and(|(dtype, _)| datatype(dtype) == input.datatype);
    input.datatype == datatype(pipeline.dtype()) && input.shape.get(1..) == Some(&shape[..]) && !taken
}

/// What each row is made of.
fn rows(pipeline: &Pipeline, input: &Tensor) -> Result<Vec<Bytes>, Failure> {
    let bad =
        |what: String| Failure::unprocessed(Reason::BadInput, format!("input {:?}: {what}", input.name));
    let count = input.shape.first().copied().unwrap_or_default() as usize;
    if !(1..=MAX_ROWS).contains(&count) {
        return Err(bad(format!("{count} rows, where 1 to {MAX_ROWS} can be prepared")));
    }
    if input.in_shared_memory() {
        return Err(bad("it lies in shared memory, which the model server alone reads; send it".to_owned()));
    }
    let sources = match (input.datatype, pipeline.takes()) {
        (Datatype::Bytes, _) => oip::strings(&input.data)
            .map(|string| string.map(|string| input.data.slice_ref(string)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|problem| bad(problem.to_string()))?,
        (sent, Some((dtype, bytes))) if sent == datatype(dtype) && input.data.len() == count * bytes => {
            (0..count).map(|row| input.data.slice(row * bytes..(row + 1) * bytes)).collect()
        }
        (sent, None) => return Err(bad(format!("it is {}, where images are sent as BYTES", sent.name()))),
        (sent, Some((dtype, bytes))) => {
            return Err(bad(format!(
                "{count} rows of {} in {} bytes, where {bytes} bytes of {} are a row",
                sent.name(),
                input.data.len(),
                dtype.protocol_name(),
            )));
        }
    };
    if sources.len() != count {
        return Err(bad(format!("{} elements in {count} rows, where each row is one", sources.len())));
    }
    Ok(sources)
}

/// Finished tensors.
struct Made {
    /// Of each input that was made; of the others nothing.
    data: Vec<Bytes>,
    /// Where they lie in the arena.
    placed: Option<Frozen>,
}

/// Where a row is written.
enum Place {
    /// Its own part of the request's memory.
    Heap(BytesMut),
    /// So many bytes of an input of the arena.
    Arena(RowsMut, usize),
}

impl Place {
    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Arena(rows, input) => rows.input(*input).unwrap_or_default(),
        }
    }
}

async fn in_heap(
    worker: &Rc<Worker>,
    parts: &[Part<'_>],
    deadline: Option<Duration>,
) -> Result<Vec<Bytes>, Failure> {
    try_join_all(parts.iter().map(async |part| {
        let Part::Made(prepare, sources) = part else { return Ok(Bytes::new()) };
        let bytes = prepare.pipeline.bytes();
        let mut room = BytesMut::zeroed(bytes * sources.len());
        let made = try_join_all(sources.iter().enumerate().map(|(row, source)| {
            let place = Place::Heap(room.split_to(bytes));
            one(worker, prepare, row, source.clone(), place, deadline)
        }));
        let mut whole = BytesMut::new();
        for place in made.await? {
            // Neighbours become one again, without a copy.
            if let Place::Heap(row) = place {
                whole.unsplit(row);
            }
        }
        Ok(whole.freeze())
    }))
    .await
}

/// The same in the arena, if all inputs are made, of as many rows each, and there is room.
fn in_arena<'a>(
    worker: &'a Rc<Worker>,
    parts: &'a [Part<'_>],
    deadline: Option<Duration>,
    arena: &Arena,
) -> Option<impl Future<Output = Result<Made, Failure>> + 'a> {
    let made = |part: &'a Part<'_>| match part {
        Part::Finished(_) => None,
        Part::Made(prepare, sources) => Some((prepare, sources)),
    };
    let inputs: Vec<_> = parts.iter().map(made).collect::<Option<_>>()?;
    let rows = inputs.first()?.1.len();
    if inputs.iter().any(|(_, sources)| sources.len() != rows) {
        return None;
    }
    let per_row: Vec<usize> = inputs.iter().map(|(prepare, _)| prepare.pipeline.bytes()).collect();
    let count = u32::try_from(rows).ok()?;
    let run = arena.run(&per_row, count)?;
    // A claim is on a row of all inputs, so each row is one job after the other; rows are done at the same time.
    let claims = (0..count).map(|row| run.rows(row, 1)).collect::<Option<Vec<_>>>()?;
    Some(async move {
        let rows = claims.into_iter().enumerate().map(|(row, claim)| {
            let inputs = inputs.clone();
            async move {
                let mut claim = claim;
                for (at, (prepare, sources)) in inputs.into_iter().enumerate() {
                    let place = Place::Arena(claim, at);
                    claim = match one(worker, prepare, row, sources[row].clone(), place, deadline).await? {
                        Place::Arena(claim, _) => claim,
                        Place::Heap(_) => return Err(lost()),
                    };
                }
                Ok(())
            }
        });
        try_join_all(rows).await?;
        let frozen = run.seal().ok_or_else(lost)?.freeze();
        let data = (0..per_row.len()).map(|at| frozen.bytes(at, 0..count).ok_or_else(lost));
        Ok(Made { data: data.collect::<Result<_, _>>()?, placed: Some(frozen) })
    })
}

fn lost() -> Failure {
    Failure::new(Reason::Internal, "a prepared row was lost")
}

/// One that waits for a thread; dropping it leaves the line.
struct Waits<'a>(&'a AtomicUsize);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Stops what nobody waits for.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Makes one row in its place.
async fn one(
    worker: &Rc<Worker>,
    prepare: &Arc<Prepare>,
    row: usize,
    source: Bytes,
    mut place: Place,
    deadline: Option<Duration>,
) -> Result<Place, Failure> {
    on_a_thread(worker, prepare, row, deadline, move |pipeline, scratch, cancelled| {
        let source = decoded(&source);
        pipeline.run(&source, place.bytes(), scratch, &Limits::default(), cancelled).map(|()| place)
    })
    .await
}

/// Does something with a row, on a thread that prepares.
async fn on_a_thread<T: Send + 'static>(
    worker: &Rc<Worker>,
    prepare: &Arc<Prepare>,
    row: usize,
    deadline: Option<Duration>,
    work: impl FnOnce(&Pipeline, &mut Scratch, &dyn Fn() -> bool) -> Result<T, PrepareError> + Send + 'static,
) -> Result<T, Failure> {
    let preparing = &worker.shared.preparing;
    let thread = {
        let waits = Waits(&preparing.waiting);
        if preparing.waiting.fetch_add(1, Relaxed) >= MAX_WAITING {
            let story = format!("{MAX_WAITING} inputs wait to be prepared");
            return Err(Failure { retry_after: 1, ..Failure::unprocessed(Reason::QueueFull, story) });
        }
        let thread = Arc::clone(&preparing.threads).acquire_owned().await;
        drop(waits);
        thread.map_err(|_| lost())?
    };
    if deadline.is_some_and(|deadline| deadline <= worker.now()) {
        let story = format!("input {:?} waited beyond the request's deadline to be prepared", prepare.input);
        return Err(Failure::unprocessed(Reason::TooLate, story));
    }
    let stop = Stop(Arc::default());
    let (stopped, of) = (Arc::clone(&stop.0), Arc::clone(prepare));
    let preparing = Arc::clone(preparing);
    let job = tokio::task::spawn_blocking(move || {
        let begun = Instant::now();
        let made = SCRATCH.with_borrow_mut(|scratch| {
            let cancelled = || stopped.load(Relaxed);
            let made = work(&of.pipeline, scratch, &cancelled);
            scratch.shrink(KEPT);
            made
        });
        preparing.over(&made, begun.elapsed());
        // The next may begin only now, also when nobody waits for this one any more.
        drop(thread);
        made
    });
    job.await.map_err(|_| lost())?.map_err(|error| {
        let reason = if error.is_clients() { Reason::BadInput } else { Reason::Internal };
        Failure::unprocessed(reason, format!("input {:?}, row {row}: {error}", prepare.input))
    })
}

/// In JSON, where there are no bytes, images are base64; no image begins as the base64 of one does.
fn decoded(source: &Bytes) -> Bytes {
    let begins = |text: &str| source.starts_with(text.as_bytes());
    if begins("/9j/") || begins("iVBORw0KGgo") || begins("UklGR") {
        let text = source.trim_ascii();
        if let Ok(bytes) = base64::engine::general_purpose::STANDARD.decode(text) {
            return bytes.into();
        }
    }
    source.clone()
}
