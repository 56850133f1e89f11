//! One execution over the GPU: what it needs, how its run is filled, and how it is asked.
//!
//! In: an execution, as [`handover`] gets it, and what [`Gpu`](super::Gpu) decides. Out: its answer. Can go wrong: whatever
//! the device or the server refuses, and then the execution goes as without a GPU.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::HeaderMap;
use penstock_coalesce::key;
use penstock_inference::oip::batch::Joined;
use penstock_kernels::arena::Arena;
use rand::Rng as _;
use tokio::sync::oneshot;

use super::device::{self, Device, Filled, Input, Picture, Piece, Unpacking};
use super::{Region, Test, Turn, cost};
use crate::coalesce::call::{Answered, Trouble, Way};
use crate::coalesce::handover::{self, Hand, Inputs, Places};
use crate::coalesce::learn::Known;
use crate::coalesce::told;
use crate::failure::Failure;
use crate::prepare::Stop;
use crate::prepare::pictures::{self, Pictures};
use crate::worker::Worker;

/// How long filling a run may take: a batch of 19 MB needs some milliseconds, and what takes a thousand times as long will
/// not come. Unpacking JPEGs, which is a CPU's work and bounded by [`pictures::MOST_WORK`], has as much for itself.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// An execution, as far as the GPU's way may have to do with it.
pub(super) struct Execution<'a> {
    /// Name and version.
    pub(super) model: (&'a str, &'a str),
    /// Who executes it.
    pub(super) server: SocketAddr,
    /// Of all inputs.
    pub(super) bytes: usize,
    /// Of each of them.
    pub(super) rows: u32,
    /// Bytes of a row of each input.
    pub(super) per_row: Vec<usize>,
    /// It may be executed twice.
    pub(super) is_repeatable: bool,
}

/// An execution over the GPU if that can be and pays; otherwise as without one.
pub async fn infer(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&str, &str),
    mut joined: Joined,
    headers: &HeaderMap,
    known: &Known,
    hand: &Hand<'_>,
) -> Result<Answered, Trouble> {
    let gpu = &worker.shared.sharing.gpu;
    let ready = ready(worker, way, model, &joined, known, hand);
    let Some((run, region, device, always)) = ready else {
        finish(worker, &mut joined, hand).await?;
        return handover::without(worker, way, model, joined, headers, known, hand).await;
    };
    // What was decoded for a kernel is not asked again which way it goes, and says nothing of how long the ways take.
    let pictures = hand.pictures.iter().any(Option::is_some);
    let begun = worker.now();
    let chance = worker.with_random(|random| random.random::<f64>());
    let turn = gpu.decide(&run, always || pictures, begun, chance);
    let by_device = match turn {
        Turn::Device | Turn::Both => {
            over(worker, way, &joined, headers, known, hand, (&run, &region, device)).await
        }
        Turn::Host | Turn::Plain => None,
    };
    let took = |which: cost::Way| {
        if pictures {
            return;
        }
        let now = worker.now();
        gpu.model(run.server, model.0, |model| {
            model.cost.took(run.bytes, which, now.saturating_sub(begun), now);
        });
    };
    match (by_device, turn) {
        (Some(answered), Turn::Both) => {
            finish(worker, &mut joined, hand).await?;
            let host = handover::without(worker, way, model, joined, headers, known, hand).await;
            gpu.tested(&run, &answered, &host);
            host
        }
        (Some(answered), _) => {
            if answered.is_ok() {
                took(cost::Way::Device);
            }
            answered
        }
        (None, turn) => {
            if turn == Turn::Both {
                gpu.model(run.server, model.0, |model| model.test = Test::Open);
            }
            finish(worker, &mut joined, hand).await?;
            let answered = handover::without(worker, way, model, joined, headers, known, hand).await;
            if turn == Turn::Host && answered.is_ok() {
                took(cost::Way::Host);
            }
            answered
        }
    }
}

/// All that the GPU's way needs, if it is there; the server is told of the region if it has not been.
fn ready<'a>(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&'a str, &'a str),
    joined: &Joined,
    known: &Known,
    hand: &Hand<'_>,
) -> Option<(Execution<'a>, Arc<Region>, Arc<Device>, bool)> {
    let gpu = &worker.shared.sharing.gpu;
    let asked = worker.workload()?.gpu?;
    if way.http2 || !known.gpu_memory || (worker.now().as_millis() as u64) < gpu.rests_until.load(Relaxed) {
        return None;
    }
    let device = gpu.device()?;
    let (rows, per_row) = handover::rows(&joined.head)?;
    let bytes = per_row.iter().sum::<usize>().checked_mul(rows as usize)?;
    if bytes < handover::WORTH_IT {
        return None;
    }
    let server = way.endpoint().ok()?.address;
    let region = gpu.region(worker, &asked, hand.tenant)?;
    if !gpu.is_known(worker, way, server, &region) {
        return None;
    }
    // Where JPEGs are decoded twice, by two decoders, another answer says nothing of the way.
    let jpegs = hand.pictures.iter().flatten().any(|pictures| pictures.has_jpegs());
    let is_repeatable = key::is_repeatable(&joined.head) && !jpegs;
    Some((Execution { model, server, bytes, rows, per_row, is_repeatable }, region, device, asked.always))
}

/// An execution over the GPU. `None`: it was not begun, or the server did not know the region, and it can go as without.
async fn over(
    worker: &Rc<Worker>,
    way: &Way,
    joined: &Joined,
    headers: &HeaderMap,
    known: &Known,
    hand: &Hand<'_>,
    (run, region, device): (&Execution<'_>, &Arc<Region>, Arc<Device>),
) -> Option<Result<Answered, Trouble>> {
    let gpu = &worker.shared.sharing.gpu;
    // What lies in pinned shared memory already is copied from there.
    let pinned = hand.there.is_some() && {
        let ground = worker.shared.sharing.memory.ground(worker, hand.tenant);
        ground.is_some_and(|ground| ground.arena(worker).is_some_and(Arena::is_pinned))
    };
    let preparing = &worker.shared.preparing;
    let jpegs: Vec<_> = hand.pictures.iter().flatten().flat_map(|pictures| pictures.jpegs()).collect();
    let stop = Stop::default();
    let (mut unpacking, mut unpacked) = (None, None);
    if !jpegs.is_empty() {
        if !gpu.decodes(&device, worker.now()) {
            return None;
        }
        if let Some(turn) = pictures::unpacks(preparing, &jpegs, device.staging.as_ref()).await {
            let (done, is_done) = oneshot::channel();
            let (preparing, stopped) = (Arc::clone(preparing), Arc::clone(&stop.0));
            (unpacking, unpacked) =
                (Some(Unpacking { _turn: turn, preparing, stopped, _done: done }), Some(is_done));
        } else if hand.pictures.iter().flatten().any(|pictures| pictures.jpegs().next().is_some()) {
            return None;
        }
    }
    let inputs = inputs(joined, hand, pinned)?;
    let of_pictures =
        |piece: &(u32, Piece)| if matches!(piece.1, Piece::Pictures(..)) { piece.0.into() } else { 0 };
    let pictures: u64 = inputs.iter().flatten().map(of_pictures).sum();
    let room = region.arena.run(&run.per_row, run.rows)?;
    let (arena, rows) = (region.arena.clone(), run.rows);
    // A driver may block, and is given a thread for it. Whoever leaves meanwhile takes nothing with him: the thread has
    // the run until it is filled.
    let filling = tokio::task::spawn_blocking(move || device.fill(&arena, room, rows, inputs, unpacking));
    if let Some(unpacked) = unpacked
        && tokio::time::timeout(PATIENCE, unpacked).await.is_err()
    {
        // It says nothing of the GPU. The thread stops at the next file.
        gpu.failed.add(1);
        gpu.jpegs_are_late(worker.now());
        return None;
    }
    let Filled { run: filled, decoded, refused } = match tokio::time::timeout(PATIENCE, filling).await {
        Ok(Ok(Ok(filled))) => filled,
        Ok(Ok(Err(unfit))) => {
            gpu.fails(&unfit, worker.now());
            return None;
        }
        Ok(Err(_)) => return None,
        Err(_) => {
            gpu.failed.add(1);
            gpu.off(&format!("a copy to it was not done within {PATIENCE:?}"));
            return None;
        }
    };
    let outputs = handover::outputs(worker, way, &joined.head, run.rows, known, run.server, hand);
    let lease = filled.hand_over_to(told::number(run.server));
    let places =
        Places { region: &region.name, inputs: Inputs::Device(lease), rows, outputs, server: run.server };
    let placed = places.ask(run.model, &joined.head, headers)?;
    let ended = handover::by_memory(worker, way, placed).await;
    match &ended {
        Ok(Some(_)) => {
            gpu.handed.add(1);
            gpu.prepared.add(pictures);
            gpu.decoded.add(decoded);
            gpu.refused.add(refused);
        }
        // It was started anew and knows the region no more, or the connection broke.
        Ok(None) | Err(Trouble::Way(_)) => gpu.forget(run.server),
        // Of its own GPU it says so in its own words; asked without it may answer.
        Err(Trouble::Model(error)) if error.message.to_ascii_lowercase().contains("cuda") => {
            gpu.failed.add(1);
            gpu.forget(run.server);
            return None;
        }
        Err(Trouble::Model(_)) => {}
    }
    ended.transpose()
}

/// What each input is filled with; `None`: a kernel cannot make it.
fn inputs(joined: &Joined, hand: &Hand<'_>, pinned: bool) -> Option<Vec<Input>> {
    let mut inputs = Vec::with_capacity(joined.data.len());
    for (input, data) in joined.head.inputs.iter().zip(&joined.data) {
        let row = handover::row(input)?.max(1);
        let mut pieces: Input = Vec::new();
        for (member, data) in data.iter().enumerate() {
            let pictures = hand.pictures.get(member).copied().flatten().and_then(|all| all.of(&input.name));
            let Some(pictures) = pictures else {
                let data = data.clone();
                let rows = (data.len() / row) as u32;
                pieces.push((rows, if pinned { Piece::Pinned(data) } else { Piece::Bytes(data) }));
                continue;
            };
            let tensor = pictures.tensor;
            let mut rows = pictures.rows.iter().map(|row| match Picture::of(row) {
                Some(picture) => device::fits(&picture, &tensor).then_some(Some(picture)),
                None => Some(None),
            });
            // Those of neighbours are made by one launch.
            let count = pictures.rows.len() as u32;
            match pieces.last_mut() {
                Some((before, Piece::Pictures(all, of))) if *of == tensor => {
                    all.extend(rows.by_ref().collect::<Option<Vec<_>>>()?);
                    *before += count;
                }
                _ => pieces.push((count, Piece::Pictures(rows.collect::<Option<_>>()?, tensor))),
            }
        }
        inputs.push(pieces);
    }
    Some(inputs)
}

/// Gives inputs their data on the CPU, where it was left to a kernel that does not make it.
async fn finish(worker: &Rc<Worker>, joined: &mut Joined, hand: &Hand<'_>) -> Result<(), Failure> {
    let preparing = &worker.shared.preparing;
    for (input, data) in joined.head.inputs.iter().zip(&mut joined.data) {
        for (data, pictures) in data.iter_mut().zip(hand.pictures) {
            if let Some(pictures) = pictures.and_then(|all| all.of(&input.name)) {
                *data = pictures::finish(preparing, pictures).await;
            }
        }
    }
    // Nobody is left whom the model could answer.
    let spoilt = |pictures: &Option<&Pictures>| pictures.and_then(Pictures::spoilt);
    let spoilt: Option<Vec<_>> = hand.pictures.iter().map(spoilt).collect();
    spoilt.and_then(|failures| failures.into_iter().next()).map_or(Ok(()), Err)
}
