//! Preparing in two halves: images are decoded here, on the threads that prepare, and become tensors when their batch is
//! executed, all of them in one launch of a kernel that writes them where the model server reads them.
//!
//! In: a request, as for [`request`](super::request), and where decoded pixels are kept. Out: the request without the data of
//! those inputs, and their [`Pictures`]; later, if no GPU took them, the same tensors from the CPU ([`finish`]). Can go
//! wrong: as with [`request`](super::request). Which half is whose is decided by [`gpu`](crate::coalesce::gpu).

use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use penstock_inference::oip::InferRequest;
use penstock_kernels::arena::Arena;
use penstock_kernels::fused;
use penstock_prepare::{Limits, Picture};

use super::{Part, Prepare, Whose, claim, on_a_thread, parts, rejoined, text, turn, with};
use crate::failure::Failure;
use crate::held::Held;
use crate::worker::Worker;

/// The decoded images of one request.
#[derive(Debug)]
pub struct Pictures(Vec<Input>);

/// Those of one of its inputs, a row each.
#[derive(Debug)]
pub struct Input {
    prepare: Arc<Prepare>,
    /// What they become.
    pub tensor: fused::Tensor,
    /// The pixels of each, and how they lie.
    pub rows: Vec<(Bytes, Picture)>,
}

impl Pictures {
    /// Those of a tensor of this name; `None`: it has its data.
    pub fn of(&self, tensor: &str) -> Option<&Input> {
        self.0.iter().find(|input| input.prepare.tensor == tensor)
    }
}

/// Whether all that would be made for these pipelines begins with pixels, and how many bytes a row of all tensors has.
pub fn are_pictures(pipelines: &[Arc<Prepare>]) -> Option<usize> {
    let bytes = |prepare: &Arc<Prepare>| prepare.pipeline.tensor().map(|_| prepare.pipeline.bytes());
    pipelines.iter().map(bytes).sum()
}

/// Decodes the images of a request. What it becomes has no data where there are pictures.
pub async fn decode(
    worker: &Rc<Worker>,
    pipelines: &[Arc<Prepare>],
    request: &InferRequest,
    whose: Whose,
    arena: Option<&Arena>,
) -> Result<(InferRequest, Pictures, Held), Failure> {
    let parts = parts(pipelines, request)?;
    let held = claim(worker, &parts, whose)?;
    let made = parts.iter().map(async |part| {
        let Part::Made(prepare, sources) = part else { return Ok(None) };
        let Some(tensor) = prepare.pipeline.tensor() else { return Err(super::lost()) };
        let rows = sources.iter().enumerate().map(async |(row, source)| {
            let (source, arena) = (source.clone(), arena.cloned());
            let turn = turn(worker, prepare, &source, whose).await?;
            on_a_thread(worker, prepare, row, whose, turn, move |pipeline, scratch, cancelled| {
                let keep = |pixels: &[u8], picture| (kept(arena.as_ref(), pixels), picture);
                let source = text::decoded(pipeline, &source)?;
                pipeline.decode(&source, scratch, &Limits::default(), cancelled, keep)
            })
            .await
        });
        Ok(Some(Input { prepare: Arc::clone(prepare), tensor, rows: try_join_all(rows).await? }))
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
    let Input { prepare, rows, .. } = input;
    let bytes = prepare.pipeline.bytes();
    let mut room = BytesMut::zeroed(bytes * rows.len());
    let places: Vec<_> = rows.iter().map(|_| room.split_to(bytes)).collect();
    let made = rows.iter().zip(places).enumerate().map(async |(row, ((pixels, picture), mut place))| {
        let (pixels, picture) = (pixels.clone(), *picture);
        // Of several callers, who have waited already.
        let whose = Whose::default();
        let turn = turn(worker, prepare, &pixels, whose).await?;
        on_a_thread(worker, prepare, row, whose, turn, move |pipeline, scratch, _| {
            pipeline.make(&pixels, &picture, &mut place, scratch).map(|()| place)
        })
        .await
    });
    Ok(rejoined(try_join_all(made).await?))
}
