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
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use penstock_api::Reason;
use penstock_inference::oip::{self, Datatype, InferRequest, Tensor};
use penstock_kernels::arena::Arena;
use penstock_kernels::fused;
use penstock_prepare::{Limits, Picture, head};

use super::{Part, Prepare, Whose, claim, on_a_thread, parts, rejoined, text, turn, with};
use crate::failure::Failure;
use crate::held::Held;
use crate::worker::Worker;

/// A JPEG of more pixels is the CPU's: at full size it would take too much of the GPU's room for pictures.
const MOST: u64 = 16 << 20;

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
    pub rows: Vec<Row>,
    /// Why one of them is no image after all.
    spoilt: OnceLock<Failure>,
}

/// One image.
#[derive(Debug)]
pub struct Row {
    /// Its pixels, or all of the file.
    pub bytes: Bytes,
    /// How its pixels lie, and what becomes of them.
    pub picture: Picture,
    /// It is a JPEG that was not decoded.
    pub is_jpeg: bool,
}

impl Pictures {
    /// Those of a tensor of this name; `None`: it has its data.
    pub fn of(&self, tensor: &str) -> Option<&Input> {
        self.0.iter().find(|input| input.prepare.tensor == tensor)
    }

    /// Whether any of them is still to be decoded.
    pub fn has_jpegs(&self) -> bool {
        self.0.iter().flat_map(|input| &input.rows).any(|row| row.is_jpeg)
    }

    /// Why its request has no answer, whatever the model said: one of its images is damaged, and a tensor of zeros stood in
    /// its place so that others had theirs.
    pub fn spoilt(&self) -> Option<Failure> {
        self.0.iter().find_map(|input| input.spoilt.get()).cloned()
    }
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
        let rows = sources.iter().enumerate().map(async |(row, source)| {
            let (source, arena, jpegs) = (source.clone(), rules.arena.clone(), rules.jpegs);
            let turn = turn(worker, prepare, &source, whose).await?;
            on_a_thread(worker, prepare, row, whose, turn, move |pipeline, scratch, cancelled| {
                let keep = |pixels: &[u8], picture| {
                    let bytes = kept(arena.as_ref(), pixels);
                    Row { bytes, picture, is_jpeg: false }
                };
                let source = text::decoded(pipeline, &source)?;
                let limits = Limits::default();
                let usual = || pipeline.undecoded(&source, &limits, MOST);
                if let Some(picture) = jpegs.then(usual).flatten() {
                    return Ok(Row { bytes: source, picture, is_jpeg: true });
                }
                pipeline.decode(&source, scratch, &limits, cancelled, keep)
            })
            .await
        });
        let rows = try_join_all(rows).await?;
        Ok(Some(Input { prepare: Arc::clone(prepare), tensor, rows, spoilt: OnceLock::new() }))
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

/// The tensor of an input, made here after all.
pub async fn finish(worker: &Rc<Worker>, input: &Input) -> Result<Bytes, Failure> {
    let Input { prepare, rows, spoilt, .. } = input;
    let bytes = prepare.pipeline.bytes();
    let mut room = BytesMut::zeroed(bytes * rows.len());
    let places: Vec<_> = rows.iter().map(|_| room.split_to(bytes)).collect();
    let made = rows.iter().zip(places).enumerate().map(async |(row, (image, mut place))| {
        let Row { bytes: source, picture, is_jpeg } = image;
        let (source, picture, is_jpeg) = (source.clone(), *picture, *is_jpeg);
        // Of several callers, who have waited already.
        let whose = Whose::default();
        let turn = turn(worker, prepare, &source, whose).await?;
        let made = on_a_thread(worker, prepare, row, whose, turn, move |pipeline, scratch, cancelled| {
            if is_jpeg {
                let limits = Limits::default();
                return pipeline.run(&source, &mut place, scratch, &limits, cancelled).map(|()| place);
            }
            pipeline.make(&source, &picture, &mut place, scratch).map(|()| place)
        })
        .await;
        match made {
            // Its neighbours in the batch are not to hear of it.
            Err(failure) if is_jpeg && failure.reason == Reason::BadInput => {
                spoilt.get_or_init(|| failure);
                Ok(BytesMut::zeroed(bytes))
            }
            made => made,
        }
    });
    Ok(rejoined(try_join_all(made).await?))
}
