//! Preparing in two halves: images are decoded here, on the threads that prepare, and become tensors when their batch is
//! executed, all of them in one launch of a kernel that writes them where the model server reads them.
//!
//! JPEGs may stay as they came, for a decoder on the GPU; what is wrong with one of them is known only then, and is told to
//! whoever sent it, not to its batch ([`Pictures::spoilt`]).
//!
//! In: a request, as for [`request`](super::request), and where decoded pixels are kept. Out: the request without the data of
//! those inputs, and their [`Pictures`]; later, if no GPU took them, the same tensors from the CPU ([`finish`]). Can go
//! wrong: as with [`request`](super::request). Which half is whose is decided by [`gpu`](crate::coalesce::gpu).

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use futures_util::future::{join_all, try_join_all};
use penstock_inference::oip::{self, Datatype, InferRequest, Tensor};
use penstock_kernels::arena::Arena;
use penstock_kernels::fused;
use penstock_prepare::{Limits, Picture, PrepareError, head};

use super::line::Turn;
use super::{
    Part, Prepare, Preparing, Whose, claim, here, of_the_line, on_a_thread, parts, rejoined, text, turn, with,
};
use crate::failure::Failure;
use crate::held::Held;
use crate::worker::Worker;

/// A JPEG of more pixels is the CPU's: at full size it would take too much of the GPU's room for pictures.
const MOST: u64 = 16 << 20;
/// What is left to nvJPEG at a time, in pixels times scans: of one file, and of a batch. It unpacks files on the thread that
/// fills a batch, one after the other; at 64 Mi a second, which is slow, that takes a second. 32 photographs of 1080p are as
/// much.
pub const MOST_WORK: u64 = 64 << 20;

/// How images are decoded.
#[derive(Debug)]
pub struct Rules {
    /// Where pixels are kept.
    pub arena: Option<Arena>,
    /// Usual JPEGs stay as they came.
    pub jpegs: bool,
}

/// The decoded images of one request.
#[derive(Debug)]
pub struct Pictures(Vec<Input>);

/// Those of one of its inputs, a row each.
#[derive(Debug)]
pub struct Input {
    prepare: Arc<Prepare>,
    /// What they become.
    pub tensor: fused::Tensor,
    /// Each image.
    pub rows: Vec<Arc<Row>>,
}

/// Decoded pixels, how they lie, and what becomes of them; or all of a file.
#[derive(Debug)]
struct Image {
    bytes: Bytes,
    picture: Picture,
}

/// One image.
#[derive(Debug)]
pub struct Row {
    prepare: Arc<Prepare>,
    number: usize,
    whose: Whose,
    image: Image,
    /// It was not decoded.
    is_jpeg: bool,
    /// What the CPU decoded after all.
    after_all: OnceLock<Image>,
    /// Why there is nothing of it.
    spoilt: OnceLock<Failure>,
}

impl Pictures {
    /// Those of a tensor of this name; `None`: it has its data.
    pub fn of(&self, tensor: &str) -> Option<&Input> {
        self.0.iter().find(|input| input.prepare.tensor == tensor)
    }

    fn rows(&self) -> impl Iterator<Item = &Arc<Row>> {
        self.0.iter().flat_map(|input| &input.rows)
    }

    /// Whether any of them came to be decoded on the GPU.
    pub fn has_jpegs(&self) -> bool {
        self.rows().any(|row| row.is_jpeg)
    }

    /// Those that nobody has decoded yet.
    pub fn jpegs(&self) -> impl Iterator<Item = &Arc<Row>> {
        self.rows().filter(|row| row.now().is_some_and(|(.., is_jpeg)| is_jpeg))
    }

    /// Why its request has no answer, whatever the model said: there is nothing of one of its images, and a tensor of zeros
    /// stood in its place so that others had theirs.
    pub fn spoilt(&self) -> Option<Failure> {
        self.rows().find_map(|row| row.spoilt.get()).cloned()
    }
}

impl Row {
    fn new(prepare: &Arc<Prepare>, number: usize, whose: Whose, image: Image, is_jpeg: bool) -> Self {
        let (after_all, spoilt) = (OnceLock::new(), OnceLock::new());
        Self { prepare: Arc::clone(prepare), number, whose, image, is_jpeg, after_all, spoilt }
    }

    /// All of a JPEG, or pixels; what becomes of them; and whether it is a JPEG. `None`: there is nothing of it.
    pub fn now(&self) -> Option<(&Bytes, &Picture, bool)> {
        let image = self.after_all.get();
        let is_jpeg = self.is_jpeg && image.is_none();
        let Image { bytes, picture } = image.unwrap_or(&self.image);
        self.spoilt.get().is_none().then_some((bytes, picture, is_jpeg))
    }

    fn becomes(&self, made: Result<Image, Failure>) {
        // Whoever was first has said it.
        match made {
            Ok(image) => drop(self.after_all.set(image)),
            Err(failure) => drop(self.spoilt.set(failure)),
        }
    }

    /// What decoding it takes, in pixels.
    fn work(&self) -> u64 {
        self.image.picture.work()
    }

    /// Decodes it on a thread that prepares.
    async fn decode(&self, preparing: &Arc<Preparing>, arena: Option<Arena>) {
        let Self { prepare, number, whose, image: Image { bytes, .. }, .. } = self;
        let decoded = async {
            let turn = turn(preparing, prepare, bytes, *whose).await?;
            let source = bytes.clone();
            let work = move |pipeline: &_, scratch: &mut _, cancelled: &dyn Fn() -> bool| {
                decoded(pipeline, &source, scratch, cancelled, arena.as_ref())
            };
            on_a_thread(preparing, prepare, *number, *whose, turn, work).await
        };
        self.becomes(decoded.await);
    }

    /// The same on this thread, which has a turn, unless nobody waits any more.
    pub fn decode_here(&self, preparing: &Preparing, stopped: &AtomicBool, arena: Option<&Arena>) {
        let Self { prepare, number, whose, image: Image { bytes, .. }, .. } = self;
        let made = here(preparing, prepare, *number, *whose, stopped, |pipeline, scratch, cancelled| {
            decoded(pipeline, bytes, scratch, cancelled, arena)
        });
        // Whoever does it another way now is not to hear that it was stopped.
        if made.is_ok() || !stopped.load(Relaxed) {
            self.becomes(made);
        }
    }
}

fn decoded(
    pipeline: &penstock_prepare::Pipeline,
    source: &[u8],
    scratch: &mut penstock_prepare::Scratch,
    cancelled: &dyn Fn() -> bool,
    arena: Option<&Arena>,
) -> Result<Image, PrepareError> {
    let keep = |pixels: &[u8], picture| Image { bytes: kept(arena, pixels), picture };
    pipeline.decode(source, scratch, &Limits::default(), cancelled, keep)
}

/// Of the JPEGs of a batch, decodes those on the CPU that would be too much for the thread that fills it, and waits for its turn
/// as one of the threads that prepare. `None`: there is none to wait for, since nothing is left, or the line is full.
pub async fn unpacks(preparing: &Arc<Preparing>, jpegs: &[&Arc<Row>], arena: Option<&Arena>) -> Option<Turn> {
    let mut work = 0u64;
    let left = jpegs.iter().take_while(|row| {
        work = work.saturating_add(row.work());
        work <= MOST_WORK
    });
    let (left, rest) = jpegs.split_at(left.count());
    join_all(rest.iter().map(|row| row.decode(preparing, arena.cloned()))).await;
    // It is of all callers, and stands in the line as the first of them; their own deadlines are theirs.
    let whose = Whose { caller: left.first()?.whose.caller, deadline: None };
    let cost = left.iter().map(|row| row.work()).sum();
    of_the_line(preparing, cost, whose, || "a batch".to_owned()).await.ok()
}

/// Whether all that would be made for these pipelines begins with pixels, and how many bytes a row of all tensors has.
pub fn are_pictures(pipelines: &[Arc<Prepare>]) -> Option<usize> {
    let bytes = |prepare: &Arc<Prepare>| prepare.pipeline.tensor().map(|_| prepare.pipeline.bytes());
    pipelines.iter().map(bytes).sum()
}

/// Bytes of the inputs that have JPEGs as they are among their elements; of text it is not asked what it stands for.
pub fn jpegs(pipelines: &[Arc<Prepare>], request: &InferRequest) -> usize {
    let has = |input: &&Tensor| {
        let is_jpeg = |element: Result<&[u8], _>| element.is_ok_and(head::is_jpeg);
        let prepared = pipelines.iter().any(|prepare| prepare.input == input.name);
        prepared && input.datatype == Datatype::Bytes && oip::strings(&input.data).any(is_jpeg)
    };
    request.inputs.iter().filter(has).map(|input| input.data.len()).sum()
}

/// Decodes the images of a request. What it becomes has no data where there are pictures.
pub async fn decode(
    worker: &Rc<Worker>,
    pipelines: &[Arc<Prepare>],
    request: &InferRequest,
    whose: Whose,
    rules: &Rules,
) -> Result<(InferRequest, Pictures, Held), Failure> {
    let parts = parts(pipelines, request)?;
    let held = claim(worker, &parts, whose)?;
    let made = parts.iter().map(async |part| {
        let Part::Made(prepare, sources) = part else { return Ok(None) };
        let Some(tensor) = prepare.pipeline.tensor() else { return Err(super::lost()) };
        let rows = sources.iter().enumerate().map(async |(number, source)| {
            let (source, arena, jpegs) = (source.clone(), rules.arena.clone(), rules.jpegs);
            let preparing = &worker.shared.preparing;
            let turn = turn(preparing, prepare, &source, whose).await?;
            let work =
                move |pipeline: &penstock_prepare::Pipeline, scratch: &mut _, cancelled: &dyn Fn() -> _| {
                    let source = text::decoded(pipeline, &source)?;
                    let usual = || pipeline.undecoded(&source, &Limits::default(), MOST);
                    match jpegs.then(usual).flatten().filter(|picture| picture.work() <= MOST_WORK) {
                        Some(picture) => Ok((Image { bytes: source, picture }, true)),
                        None => {
                            let image = decoded(pipeline, &source, scratch, cancelled, arena.as_ref())?;
                            Ok((image, false))
                        }
                    }
                };
            let (image, is_jpeg) = on_a_thread(preparing, prepare, number, whose, turn, work).await?;
            Ok(Arc::new(Row::new(prepare, number, whose, image, is_jpeg)))
        });
        let rows = try_join_all(rows).await?;
        Ok(Some(Input { prepare: Arc::clone(prepare), tensor, rows }))
    });
    let made: Vec<Option<Input>> = try_join_all(made).await?;
    let request = with(request, &parts, std::iter::repeat(Bytes::new()));
    Ok((request, Pictures(made.into_iter().flatten().collect()), held))
}

/// Pixels in memory that a device reads by itself, or where there is no room for them in any.
fn kept(arena: Option<&Arena>, pixels: &[u8]) -> Bytes {
    let place = || {
        let run = arena?.run(&[pixels.len()], 1)?;
        run.rows(0, 1)?.write(0, 0, pixels).ok()?;
        run.seal()?.freeze().bytes(0, 0..1)
    };
    place().unwrap_or_else(|| Bytes::copy_from_slice(pixels))
}

/// The tensor of an input, made here after all. A row that is not made is its request's own trouble ([`Pictures::spoilt`]): its
/// neighbours in the batch, who may be others', are not to hear of it.
pub async fn finish(preparing: &Arc<Preparing>, input: &Input) -> Bytes {
    let Input { prepare, rows, .. } = input;
    let bytes = prepare.pipeline.bytes();
    let mut room = BytesMut::zeroed(bytes * rows.len());
    let places: Vec<_> = rows.iter().map(|_| room.split_to(bytes)).collect();
    let made = rows.iter().zip(places).map(async |(row, mut place)| {
        let Some((source, picture, is_jpeg)) = row.now() else { return BytesMut::zeroed(bytes) };
        let (source, picture, whose) = (source.clone(), *picture, row.whose);
        let made = async {
            let turn = turn(preparing, prepare, &source, whose).await?;
            on_a_thread(preparing, prepare, row.number, whose, turn, move |pipeline, scratch, cancelled| {
                if is_jpeg {
                    let limits = Limits::default();
                    return pipeline.run(&source, &mut place, scratch, &limits, cancelled).map(|()| place);
                }
                pipeline.make(&source, &picture, &mut place, scratch).map(|()| place)
            })
            .await
        };
        made.await.unwrap_or_else(|failure| {
            row.becomes(Err(failure));
            BytesMut::zeroed(bytes)
        })
    });
    rejoined(join_all(made).await)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::line::MAX_WAITING;
    use super::*;
    use futures_util::FutureExt as _;
    use penstock_api::Reason;
    use penstock_prepare::Pipeline;
    use tokio::time::Instant;

    const PHOTO: &[u8] = include_bytes!("../../prepare/tests/images/baseline-420.jpg");

    fn preparing(epoch: Instant) -> Arc<Preparing> {
        Arc::new(Preparing::new(1, epoch))
    }

    /// A request's photographs, which were left to nvJPEG.
    fn jpegs(whose: Whose, rows: usize) -> (Pictures, Vec<u8>) {
        let declared =
            serde_json::json!({"resize": {"mode": "exact", "width": 8, "height": 8}, "dtype": "u8"});
        let pipeline = Pipeline::new(&serde_json::from_value(declared).unwrap()).unwrap();
        let mut wanted = vec![0; pipeline.bytes()];
        let mut scratch = penstock_prepare::Scratch::default();
        pipeline.run(PHOTO, &mut wanted, &mut scratch, &Limits::default(), &|| false).unwrap();
        let picture = pipeline.undecoded(PHOTO, &Limits::default(), MOST).unwrap();
        let tensor = pipeline.tensor().unwrap();
        let shape = vec![3, 8, 8];
        let prepare = Arc::new(Prepare {
            model: None,
            input: "image".into(),
            tensor: "pixels".into(),
            pipeline,
            shape,
        });
        let row = |number| {
            let image = Image { bytes: Bytes::from_static(PHOTO), picture };
            Arc::new(Row::new(&prepare, number, whose, image, true))
        };
        let rows = (0..rows).map(row).collect();
        (Pictures(vec![Input { prepare: Arc::clone(&prepare), tensor, rows }]), wanted)
    }

    fn of(caller: u64, deadline: Option<Duration>) -> Whose {
        Whose { caller, deadline }
    }

    #[tokio::test]
    async fn a_row_that_finds_the_line_full_or_comes_too_late_is_its_requests_trouble_alone() {
        let preparing = preparing(Instant::now());
        let running = preparing.line.turn(1, 1).await.unwrap();
        // One caller has half of the line, which is as much as it may have.
        let mut waiting: Vec<_> = (0..MAX_WAITING / 2).map(|_| Box::pin(preparing.line.turn(1, 1))).collect();
        waiting.iter_mut().for_each(|waits| assert!(waits.as_mut().now_or_never().is_none()));
        let all = [
            (of(1, None), Some(Reason::QueueFull)),
            (of(2, Some(Duration::ZERO)), Some(Reason::TooLate)),
            (of(3, None), None),
        ];
        let (requests, wanted): (Vec<_>, Vec<_>) = all.iter().map(|(whose, _)| jpegs(*whose, 1)).unzip();
        let finished = join_all(requests.iter().map(|request| finish(&preparing, &request.0[0])));
        let frees = async {
            tokio::task::yield_now().await;
            drop((waiting, running));
        };
        let (finished, ()) = futures_util::future::join(finished, frees).await;
        for (((made, wanted), request), (whose, why)) in finished.iter().zip(&wanted).zip(&requests).zip(all)
        {
            let reason = request.spoilt().map(|failure| failure.reason);
            assert_eq!(reason, why, "{whose:?}");
            assert_eq!(made == wanted, why.is_none(), "{whose:?}");
            assert!(why.is_none() || made.iter().all(|byte| *byte == 0), "{whose:?}");
        }
    }

    #[tokio::test]
    async fn what_is_too_much_for_the_thread_that_fills_is_decoded_before() {
        let preparing = preparing(Instant::now());
        let (pictures, _) = jpegs(of(1, None), 4);
        let work = pictures.rows().next().unwrap().work();
        assert_eq!(work, 97 * 61);
        // As many of the same as are too much by one.
        let all: Vec<_> = pictures.jpegs().collect();
        let rows: Vec<_> = all.iter().copied().cycle().take((MOST_WORK / work) as usize + 2).collect();
        let (most, last) = rows.split_at(rows.len() - 2);
        assert!(unpacks(&preparing, most, None).await.is_some());
        assert_eq!(pictures.jpegs().count(), 4, "they are left to nvJPEG");
        let turn = unpacks(&preparing, &rows, None).await;
        assert!(turn.is_some());
        assert!(preparing.line.turn(2, 1).now_or_never().is_none(), "a batch has a thread of the line");
        drop(turn);
        assert!(last.iter().all(|row| matches!(row.now(), Some((.., false)))));
        assert_eq!(pictures.jpegs().count(), 2, "the CPU has decoded what was too much");
    }

    #[test]
    fn who_is_stopped_says_nothing_of_the_file() {
        let preparing = preparing(Instant::now());
        let (pictures, _) = jpegs(of(1, None), 1);
        let row = pictures.rows().next().unwrap();
        row.decode_here(&preparing, &AtomicBool::new(true), None);
        assert!(row.now().is_some_and(|(.., is_jpeg)| is_jpeg) && pictures.spoilt().is_none());
        row.decode_here(&preparing, &AtomicBool::new(false), None);
        assert!(row.now().is_some_and(|(.., is_jpeg)| !is_jpeg));
    }
}
