//! Tensors that are received where the model server reads them.
//!
//! In: a request whose body can be taken from its connection ([`Direct`](crate::receive::Direct)). Out: its JSON, and its tensors
//! in the arena, each in its place, as if they had been written there from somewhere; nobody has. The JSON comes first, and says how
//! many rows there are of what, so room is taken when it has come. Can go wrong: there is no room, or the body is of another kind,
//! and it is read as it always was; it is too slow or breaks off, and then what has come so far is copied out of the arena: room
//! there is for those who send.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use penstock_inference::oip::rest::{self, Expected};
use penstock_kernels::arena::{Arena, Frozen, Run};
use tokio::time::{Instant, timeout_at};

use super::MAX_BODY;
use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::held::PATIENCE;
use crate::kept::{self, Kept};

/// The longest JSON before tensors that is waited for; with a tensor's name and shape it has some hundreds of bytes.
const MAX_JSON: usize = 64 << 10;
/// In each such time a tenth of all tensors has to come, or the rest of one: who is slower would not be done within [`PATIENCE`].
const PACE: Duration = Duration::from_secs(1);
const TENTHS: usize = (PATIENCE.as_millis() / PACE.as_millis()) as usize;
/// Bytes that are copied out of the arena before others have their turn on this thread.
const PIECE: usize = 1 << 20;

/// What came of it.
#[derive(Debug)]
pub enum Received {
    /// The tensors lie in the arena.
    There(Tensors),
    /// The body is still to be read, from its beginning.
    NotYet,
    /// It broke off or took too long: it is to be passed on.
    Passes,
}

/// A request's body: its JSON, and its tensors where they lie.
#[derive(Debug)]
pub struct Tensors {
    /// The JSON.
    pub json: Bytes,
    /// The data of each input.
    pub data: Vec<Bytes>,
    /// The same for a model server.
    pub there: Frozen,
}

/// Receives a body whose JSON has `length` bytes.
pub async fn receive(
    exchange: &Rc<Exchange>,
    body: &mut RequestBody,
    length: Option<usize>,
    arena: &Arena,
) -> Received {
    let Some(length) = length.filter(|length| (1..=MAX_JSON).contains(length)) else {
        return Received::NotYet;
    };
    let Some(kept) = kept::keep(body, exchange) else { return Received::NotYet };
    let Some(left) = kept.directly() else { return Received::NotYet };
    let came: usize = kept.passed().iter().map(Bytes::len).sum();
    let Some(tensors) = (came as u64 + left).checked_sub(length as u64) else { return Received::NotYet };
    if tensors > MAX_BODY as u64 {
        return Received::NotYet;
    }
    let until = Instant::now() + PATIENCE;
    let mut came = kept.passed().concat();
    if came.len() < length {
        let (mut piece, mut filled) = (vec![0; length - came.len()], 0);
        let whole = timeout_at(until, kept.fill(&mut piece, &mut filled)).await.unwrap_or(false);
        came.extend_from_slice(&piece[..filled]);
        if !whole {
            kept.lies(vec![came.into()]);
            return Received::Passes;
        }
    }
    let came = Bytes::from(came);
    kept.lies(vec![came.clone()]);
    let (json, first) = (came.slice(..length), came.slice(length..));
    let Some(inputs) = rest::expected(&json) else { return Received::NotYet };
    let Some(run) = room(arena, &inputs, tensors as usize) else { return Received::NotYet };
    let mut filling = Filling { kept: &kept, run, json, inputs, bytes: tensors as usize, came: 0 };
    let ended = Box::pin(filling.fill(&first, until)).await;
    let Some((there, data)) = filling.place() else { return Received::Passes };
    let json = filling.json;
    match ended {
        Ended::Whole => {
            kept.lies(std::iter::once(json.clone()).chain(data.iter().cloned()).collect());
            return Received::There(Tensors { json, data, there });
        }
        Ended::Broken | Ended::Slow => kept.lies(copied(json, &data).await),
    }
    match ended {
        Ended::Slow if Instant::now() < until => Received::NotYet,
        _ => Received::Passes,
    }
}

/// How the tensors came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Whole,
    Broken,
    Slow,
}

/// The JSON, and what has come of the tensors, outside of the arena.
async fn copied(json: Bytes, data: &[Bytes]) -> Vec<Bytes> {
    let mut all = vec![json];
    for piece in data.iter().flat_map(|data| data.chunks(PIECE)) {
        all.push(Bytes::copy_from_slice(piece));
        tokio::task::yield_now().await;
    }
    all
}

/// Room for these inputs, which are so many bytes.
fn room(arena: &Arena, inputs: &[Expected], bytes: usize) -> Option<Run> {
    let rows = inputs.first()?.rows;
    let alike = inputs.iter().all(|input| input.rows == rows);
    let sum = inputs.iter().try_fold(0_usize, |sum, input| sum.checked_add(input.bytes()?))?;
    if !alike || sum != bytes {
        return None;
    }
    arena.run_in_half(&inputs.iter().map(|input| input.row).collect::<Vec<_>>(), rows)
}

/// Tensors on their way in.
struct Filling<'a> {
    kept: &'a Kept,
    run: Run,
    json: Bytes,
    inputs: Vec<Expected>,
    /// Bytes of all tensors, and how many of them have come.
    bytes: usize,
    came: usize,
}

impl Filling<'_> {
    /// Fills all places; `first` has come with the JSON.
    async fn fill(&mut self, mut first: &[u8], until: Instant) -> Ended {
        let Some(rows) = self.inputs.first().map(|input| input.rows) else { return Ended::Broken };
        let Some(mut places) = self.run.rows(0, rows) else { return Ended::Broken };
        for input in 0..self.inputs.len() {
            let Some(place) = places.input(input) else { return Ended::Broken };
            let mut filled = first.len().min(place.len());
            place[..filled].copy_from_slice(&first[..filled]);
            first = &first[filled..];
            let ended = loop {
                let before = filled;
                let soon = until.min(Instant::now() + PACE);
                match timeout_at(soon, self.kept.fill(place, &mut filled)).await {
                    Ok(true) => break Ended::Whole,
                    Ok(false) => break Ended::Broken,
                    Err(_) if soon == until || (filled - before) * TENTHS < self.bytes => break Ended::Slow,
                    Err(_) => {}
                }
            };
            self.came += filled;
            if ended != Ended::Whole {
                return ended;
            }
        }
        Ended::Whole
    }

    /// Where they lie, now that nobody writes any more, and what of them has come.
    fn place(&self) -> Option<(Frozen, Vec<Bytes>)> {
        let there = self.run.seal()?.freeze();
        let mut left = self.came;
        let data = self.inputs.iter().enumerate().map(|(at, input)| {
            let all = there.bytes(at, 0..input.rows)?;
            let came = all.len().min(left);
            left -= came;
            Some(all.slice(..came))
        });
        let data = data.collect::<Option<Vec<_>>>()?;
        Some((there, data))
    }
}
