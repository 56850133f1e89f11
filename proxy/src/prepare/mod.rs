//! Preparing: inputs become the tensors that the model takes, before the request reaches the model server.
//!
//! In: a request for tensors of which some inputs are images, video frames or tensors in another form, and the pipelines that
//! an `InferencePolicy` declares for them. Out: the request with finished tensors, in memory that the model server reads too
//! where there is such. Can go wrong: an input is no image, or above a limit ([`Reason::BadInput`], which names input and row); too
//! many wait for their turn; the deadline comes first.
//!
//! The work is done by threads of its own, never by those that serve connections, and as many at a time as there are cores for
//! it (`--prepare-threads`); whose turn it is says the [`mod@line`]. Who leaves is not worked for: what waits is forgotten, what
//! runs is stopped at the next step. What is computed is `penstock-prepare`'s business; [`read`] takes images from requests that are no inference requests.

pub mod intake;
pub mod line;
pub mod pictures;
pub mod read;
pub mod text;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use penstock_api::Reason;
use penstock_inference::oip::{self, Datatype, InferRequest, Tensor};
use penstock_kernels::arena::{Arena, Frozen, RowsMut, Run};
use penstock_prepare::form::Dtype;
use penstock_prepare::{Limits, MAX_TENSORS, Pipeline, PrepareError, Scratch};
use tokio::time::Instant;

use crate::failure::Failure;
use crate::held::{Budget, Held};
use crate::telemetry::counter::Counter;
use crate::telemetry::metric;
use crate::worker::Worker;

use line::{Line, Turn};

/// Rows of one request.
const MAX_ROWS: usize = 1024;
/// Bytes of finished tensors, over all requests: a few kilobytes of request can ask for a quarter of a gigabyte.
const MAX_MADE: u64 = 512 << 20;
/// Pixels of one request's images: 40 photographs of 12 megapixels.
const MAX_PIXELS: u64 = 512 << 20;
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

/// Refuses more rows than the server takes at once, before any is made. A server that knows no batches says 0.
pub fn are_taken(request: &InferRequest, most: Option<u32>) -> Result<(), Failure> {
    let Some(most) = most.map(u64::from).filter(|most| *most > 0) else { return Ok(()) };
    let rows = |input: &Tensor| input.shape.first().copied().unwrap_or_default();
    match request.inputs.iter().find(|input| rows(input) > most) {
        Some(input) => {
            let story = format!("input {:?}: {} rows, and the model takes {most}", input.name, rows(input));
            Err(Failure::unprocessed(Reason::BadInput, story))
        }
        None => Ok(()),
    }
}

/// Refuses an image in an input that no pipeline takes, where the one that a pipeline takes is missing: it has another name.
pub fn misnamed(pipelines: &[Arc<Prepare>], request: &InferRequest) -> Result<(), Failure> {
    let has = |name: &str| request.inputs.iter().any(|input| input.name == name);
    let missing: Vec<_> =
        pipelines.iter().filter(|prepare| !has(&prepare.input) && !has(&prepare.tensor)).collect();
    let is_image = |input: &&Tensor| {
        let first = oip::strings(&input.data).next().and_then(Result::ok);
        let known = pipelines.iter().any(|prepare| prepare.input == input.name);
        let image =
            |first: &[u8]| penstock_prepare::head::is_image(&text::beginning(&input.data.slice_ref(first)));
        !known && input.datatype == Datatype::Bytes && first.is_some_and(image)
    };
    match request.inputs.iter().find(is_image).filter(|_| !missing.is_empty()) {
        Some(input) => {
            let names: Vec<_> = missing.iter().map(|prepare| prepare.input.as_str()).collect();
            let story = format!("input {:?} has no pipeline; write {}", input.name, names.join(" or "));
            Err(Failure::unprocessed(Reason::BadInput, story))
        }
        None => Ok(()),
    }
}

/// Who prepares, over all workers.
#[derive(Debug)]
pub struct Preparing {
    line: Arc<Line>,
    /// Of every deadline.
    epoch: Instant,
    made: Arc<Budget>,
    done: Counter,
    refused: Counter,
    abandoned: Counter,
    busy_us: Counter,
}

impl Preparing {
    /// With so many threads; deadlines count from `epoch`.
    pub fn new(threads: usize, epoch: Instant) -> Self {
        Self {
            line: Arc::new(Line::new(threads)),
            epoch,
            made: Arc::new(Budget::new(MAX_MADE)),
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
        metrics::gauge!(metric::PREPARE_WAITING.name).set(self.line.waiting() as f64);
    }
}

/// A request whose inputs are finished.
#[derive(Debug)]
pub struct Prepared {
    /// As the model takes it.
    pub request: InferRequest,
    /// Its inputs, all of them and in its order, where they lie in the arena.
    pub placed: Option<Frozen>,
    /// Its claim on the memory for finished tensors.
    pub held: Held,
}

/// Whose request is prepared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Whose {
    /// The caller, as the line knows it.
    pub caller: u64,
    /// When it is no longer waited for, since the worker's epoch.
    pub deadline: Option<Duration>,
}

/// What becomes of one input of a request.
enum Part<'a> {
    /// It goes as it came.
    Finished(&'a Tensor),
    /// It is made of these, a row each.
    Made(Arc<Prepare>, Vec<Bytes>),
}

/// A refusal that another moment may not give.
fn later(reason: Reason, story: String) -> Failure {
    Failure { retry_after: 1, ..Failure::unprocessed(reason, story) }
}

/// Claims the memory of what is made, before the first row is.
fn claim(worker: &Worker, parts: &[Part<'_>], whose: Whose) -> Result<Held, Failure> {
    let bytes = bytes(parts) as u64;
    worker.shared.preparing.made.claim(whose.caller, bytes).ok_or_else(|| {
        let most = MAX_MADE >> 20;
        let story = format!(
            "no room for {bytes} bytes of tensors: all that are made may have {most} MiB, and a caller no more than is free"
        );
        later(Reason::NoRoom, story)
    })
}

impl Part<'_> {
    fn bytes(&self) -> usize {
        match self {
            Self::Finished(_) => 0,
            Self::Made(prepare, sources) => prepare.pipeline.bytes().saturating_mul(sources.len()),
        }
    }

    fn pixels(&self) -> u64 {
        match self {
            Self::Finished(_) => 0,
            Self::Made(prepare, sources) => sources.iter().map(|source| cost(prepare, source)).sum(),
        }
    }
}

/// Bytes of all tensors that are made.
fn bytes(parts: &[Part<'_>]) -> usize {
    parts.iter().map(Part::bytes).fold(0, usize::saturating_add)
}

/// What a row costs, in pixels, as far as its head says; bytes otherwise. What lies is found out when it is decoded, with its own limit.
fn cost(prepare: &Prepare, source: &Bytes) -> u64 {
    let image = || match prepare.pipeline.takes() {
        None => penstock_prepare::head::size(&text::beginning(source)),
        Some(_) => None,
    };
    let size = image().map(|(width, height)| u64::from(width) * u64::from(height));
    size.unwrap_or(0).min(Limits::default().pixels).max(source.len() as u64)
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
    let bytes = bytes(&parts);
    if bytes > MAX_TENSORS {
        let story = format!("its tensors would have {bytes} bytes, and the limit is {MAX_TENSORS}");
        return Err(Failure::unprocessed(Reason::BadInput, story));
    }
    let pixels: u64 = parts.iter().map(Part::pixels).fold(0, u64::saturating_add);
    if pixels > MAX_PIXELS {
        let story = format!("its images have {pixels} pixels, and the limit of a request is {MAX_PIXELS}");
        return Err(Failure::unprocessed(Reason::BadInput, story));
    }
    Ok(parts)
}

/// Prepares a request. Its tensors go to the arena where there is one.
pub async fn request(
    worker: &Rc<Worker>,
    pipelines: &[Arc<Prepare>],
    request: &InferRequest,
    whose: Whose,
    arena: Option<&Arena>,
) -> Result<Prepared, Failure> {
    let parts = parts(pipelines, request)?;
    let held = claim(worker, &parts, whose)?;
    // Memory is taken when there is a thread that writes it: who waits holds nothing.
    let first = parts.iter().find_map(|part| match part {
        Part::Made(prepare, sources) => Some((prepare, sources.first()?)),
        Part::Finished(_) => None,
    });
    let turn = match first {
        Some((prepare, source)) => Some(turn(&worker.shared.preparing, prepare, source, whose).await?),
        None => None,
    };
    let Made { data, placed } = match arena.and_then(|arena| lease(&parts, arena)) {
        Some(leased) => in_arena(worker, leased, whose, turn).await?,
        None => Made { data: in_heap(worker, &parts, whose, turn).await?, placed: None },
    };
    Ok(Prepared { request: with(request, &parts, data), placed, held })
}

/// The request with what its parts became, each with its data.
fn with(request: &InferRequest, parts: &[Part<'_>], data: impl IntoIterator<Item = Bytes>) -> InferRequest {
    let inputs = parts.iter().zip(data).map(|(part, data)| match part {
        Part::Finished(input) => (*input).clone(),
        Part::Made(prepare, sources) => Tensor {
            name: prepare.tensor.clone(),
            datatype: datatype(prepare.pipeline.dtype()),
            shape: [&[sources.len() as u64], &prepare.shape[..]].concat(),
            parameters: oip::Parameters::new(),
            data,
        },
    });
    InferRequest { inputs: inputs.collect(), ..request.clone() }
}

/// Rows that were parts of one memory, as that again: neighbours are joined without a copy.
fn rejoined(rows: impl IntoIterator<Item = BytesMut>) -> Bytes {
    let mut whole = BytesMut::new();
    rows.into_iter().for_each(|row| whole.unsplit(row));
    whole.freeze()
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
    whose: Whose,
    turn: Option<Turn>,
) -> Result<Vec<Bytes>, Failure> {
    // The first row of all has its turn already.
    let turn = Cell::new(turn);
    try_join_all(parts.iter().map(async |part| {
        let Part::Made(prepare, sources) = part else { return Ok(Bytes::new()) };
        let bytes = prepare.pipeline.bytes();
        // Pages of it are taken as they are written.
        let mut room = BytesMut::zeroed(bytes * sources.len());
        let made = try_join_all(sources.iter().enumerate().map(|(row, source)| {
            let place = Place::Heap(room.split_to(bytes));
            one(worker, prepare, row, source.clone(), place, whose, turn.take())
        }));
        Ok(rejoined(made.await?.into_iter().filter_map(|place| match place {
            Place::Heap(row) => Some(row),
            Place::Arena(..) => None,
        })))
    }))
    .await
}

/// Room in the arena for a request.
struct Leased<'a> {
    inputs: Vec<(&'a Arc<Prepare>, &'a Vec<Bytes>)>,
    run: Run,
    rows: u32,
}

/// Leases it, if all inputs are made, of as many rows each, and there is room.
fn lease<'a>(parts: &'a [Part<'_>], arena: &Arena) -> Option<Leased<'a>> {
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
    let rows = u32::try_from(rows).ok()?;
    Some(Leased { inputs, run: arena.run_in_half(&per_row, rows)?, rows })
}

/// The same in the arena.
async fn in_arena(
    worker: &Rc<Worker>,
    Leased { inputs, run, rows: count }: Leased<'_>,
    whose: Whose,
    turn: Option<Turn>,
) -> Result<Made, Failure> {
    let turn = Cell::new(turn);
    // A claim is on a row of all inputs, so each row is one job after the other; rows are done at the same time.
    let claims = (0..count).map(|row| run.rows(row, 1)).collect::<Option<Vec<_>>>().ok_or_else(lost)?;
    let rows = claims.into_iter().enumerate().map(|(row, claim)| {
        let (inputs, turn) = (&inputs, &turn);
        async move {
            let mut claim = claim;
            for (at, (prepare, sources)) in inputs.iter().enumerate() {
                let place = Place::Arena(claim, at);
                let made = one(worker, prepare, row, sources[row].clone(), place, whose, turn.take()).await?;
                claim = match made {
                    Place::Arena(claim, _) => claim,
                    Place::Heap(_) => return Err(lost()),
                };
            }
            Ok(())
        }
    });
    try_join_all(rows).await?;
    let frozen = run.seal().ok_or_else(lost)?.freeze();
    let data = (0..inputs.len()).map(|at| frozen.bytes(at, 0..count).ok_or_else(lost));
    Ok(Made { data: data.collect::<Result<_, _>>()?, placed: Some(frozen) })
}

fn lost() -> Failure {
    Failure::new(Reason::Internal, "a prepared row was lost")
}

/// Stops what nobody waits for, when it is dropped.
#[derive(Debug, Default)]
pub struct Stop(pub Arc<AtomicBool>);

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
    whose: Whose,
    has: Option<Turn>,
) -> Result<Place, Failure> {
    let preparing = &worker.shared.preparing;
    let turn = match has {
        Some(turn) => turn,
        None => turn(preparing, prepare, &source, whose).await?,
    };
    on_a_thread(preparing, prepare, row, whose, turn, move |pipeline, scratch, cancelled| {
        let source = text::decoded(pipeline, &source)?;
        pipeline.run(&source, place.bytes(), scratch, &Limits::default(), cancelled).map(|()| place)
    })
    .await
}

fn too_late(what: &str, did: &str) -> Failure {
    let story = format!("{what} {did} beyond the request's deadline to be prepared");
    Failure::unprocessed(Reason::TooLate, story)
}

/// Waits for a thread, no longer than the request is waited for.
async fn turn(
    preparing: &Preparing,
    prepare: &Prepare,
    source: &Bytes,
    whose: Whose,
) -> Result<Turn, Failure> {
    let what = || format!("input {:?}", prepare.input);
    of_the_line(preparing, cost(prepare, source), whose, what).await
}

/// The same for anything of that cost.
async fn of_the_line(
    preparing: &Preparing,
    cost: u64,
    whose: Whose,
    what: impl Fn() -> String,
) -> Result<Turn, Failure> {
    let turn = preparing.line.turn(whose.caller, cost);
    let turn = match whose.deadline.map(|deadline| preparing.epoch + deadline) {
        Some(deadline) if deadline <= Instant::now() => return Err(too_late(&what(), "waited")),
        Some(deadline) => {
            tokio::time::timeout_at(deadline, turn).await.map_err(|_| too_late(&what(), "waited"))?
        }
        None => turn.await,
    };
    turn.ok_or_else(|| {
        let most = line::MAX_WAITING;
        let story =
            format!("too many wait to be prepared: of {most} places a caller may have as many as are free");
        later(Reason::QueueFull, story)
    })
}

/// Does something with a row, on a thread that prepares.
async fn on_a_thread<T: Send + 'static>(
    preparing: &Arc<Preparing>,
    prepare: &Arc<Prepare>,
    row: usize,
    whose: Whose,
    turn: Turn,
    work: impl FnOnce(&Pipeline, &mut Scratch, &dyn Fn() -> bool) -> Result<T, PrepareError> + Send + 'static,
) -> Result<T, Failure> {
    let stop = Stop(Arc::default());
    let (stopped, of, preparing) = (Arc::clone(&stop.0), Arc::clone(prepare), Arc::clone(preparing));
    let job = tokio::task::spawn_blocking(move || {
        let made = here(&preparing, &of, row, whose, &stopped, work);
        // The next may begin only now, also when nobody waits for this one any more.
        drop(turn);
        made
    });
    job.await.map_err(|_| lost())?
}

/// The same on this thread, which has a turn.
fn here<T>(
    preparing: &Preparing,
    prepare: &Prepare,
    row: usize,
    whose: Whose,
    stopped: &AtomicBool,
    work: impl FnOnce(&Pipeline, &mut Scratch, &dyn Fn() -> bool) -> Result<T, PrepareError>,
) -> Result<T, Failure> {
    let deadline = whose.deadline.map(|deadline| preparing.epoch + deadline);
    let begun = Instant::now();
    let made = SCRATCH.with_borrow_mut(|scratch| {
        let late = || deadline.is_some_and(|deadline| deadline <= Instant::now());
        let cancelled = || stopped.load(Relaxed) || late();
        let made = work(&prepare.pipeline, scratch, &cancelled);
        scratch.shrink(KEPT);
        made
    });
    preparing.over(&made, begun.elapsed());
    made.map_err(|error| match error {
        // Nobody else cancels what is still waited for.
        PrepareError::Cancelled => too_late(&format!("input {:?}", prepare.input), "took"),
        error => {
            let reason = if error.is_clients() { Reason::BadInput } else { Reason::Internal };
            Failure::unprocessed(reason, format!("input {:?}, row {row}: {error}", prepare.input))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(declaration: serde_json::Value) -> Arc<Prepare> {
        let pipeline = Pipeline::new(&serde_json::from_value(declaration).unwrap()).unwrap();
        let shape = pipeline.shape().iter().map(|side| *side as u64).collect();
        Arc::new(Prepare { model: None, input: "image".into(), tensor: "pixels".into(), pipeline, shape })
    }

    fn asks(name: &str, rows: &[&[u8]]) -> InferRequest {
        let inputs = vec![Tensor::bytes(name, vec![rows.len() as u64], rows.iter().copied())];
        InferRequest { inputs, ..InferRequest::default() }
    }

    /// What a PNG begins with.
    fn png(side: u32) -> Vec<u8> {
        [&b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"[..], &side.to_be_bytes(), &side.to_be_bytes()].concat()
    }

    #[test]
    fn what_is_too_much_is_refused_before_a_row_is_made() {
        let pipelines = [image(serde_json::json!({"preset": "imagenet"}))];
        let huge = png(8_000);
        assert!(parts(&pipelines, &asks("image", &[&huge[..]; 8])).is_ok());
        let refused = parts(&pipelines, &asks("image", &[&huge[..]; 9])).err().unwrap();
        assert!(refused.story.contains("576000000 pixels"), "{refused}");
        // An image that says to be larger than any may be counts as the largest, and is refused with its own limit.
        assert!(parts(&pipelines, &asks("image", &[&png(60_000)])).is_ok());
        let rows = asks("image", &[&huge[..]; 3]);
        assert!(are_taken(&rows, Some(3)).is_ok() && are_taken(&rows, Some(0)).is_ok());
        let refused = are_taken(&rows, Some(2)).unwrap_err();
        assert!(refused.story.contains("3 rows, and the model takes 2"), "{refused}");
    }

    #[test]
    fn an_image_under_another_name_is_told_the_right_one_and_a_text_is_let_be() {
        let pipelines = [image(serde_json::json!({"preset": "imagenet"}))];
        let refused = misnamed(&pipelines, &asks("img", &[&png(8)])).unwrap_err();
        assert!(refused.story.contains("input \"img\" has no pipeline; write image"), "{refused}");
        assert!(misnamed(&pipelines, &asks("prompt", &[b"what is there to be seen?"])).is_ok());
        assert!(misnamed(&pipelines, &asks("pixels", &[&png(8)])).is_ok());
    }
}
