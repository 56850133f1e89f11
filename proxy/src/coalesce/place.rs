//! Tensors that are received where the model server reads them.
//!
//! In: a request whose body can be taken from its connection ([`Direct`](crate::receive::Direct)). Out: its JSON, and its tensors
//! in the arena, each in its place, as if they had been written there from somewhere; nobody has. The JSON comes first, and says how
//! many rows there are of what, so room is taken when it has come. Can go wrong: there is no room, or the body is of another kind,
//! and it is read as it always was; it is too slow or breaks off, and then what has come so far passes on from where it lies.

use std::rc::Rc;

use bytes::Bytes;
use penstock_inference::oip::rest::{self, Expected};
use penstock_kernels::arena::{Arena, Frozen, Run};

use super::MAX_BODY;
use crate::body::RequestBody;
use crate::exchange::Exchange;
use crate::held::PATIENCE;
use crate::kept::{self, Kept};

/// The longest JSON before tensors that is waited for; with a tensor's name and shape it has some hundreds of bytes.
const MAX_JSON: usize = 64 << 10;

/// What came of it.
#[derive(Debug)]
pub enum Received {
    /// The tensors lie in the arena.
    There(Tensors),
    /// The body is still to be read.
    NotYet,
    /// Some of it has come, and the rest is not waited for: it is to be passed on.
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
    let patience = tokio::time::sleep(PATIENCE);
    tokio::select! {
        biased;
        received = Box::pin(all(&kept, length, tensors as usize, arena)) => received,
        () = patience => Received::Passes,
    }
}

/// The whole of it, however long that takes. What has come when this is dropped has passed.
async fn all(kept: &Kept, length: usize, tensors: usize, arena: &Arena) -> Received {
    let mut came = kept.passed().concat();
    if came.len() < length {
        let mut json = Partly { kept, piece: vec![0; length - came.len()], filled: 0 };
        let whole = kept.fill(&mut json.piece, &mut json.filled).await;
        came.extend_from_slice(&json.piece[..json.filled]);
        drop(json);
        if !whole {
            return Received::Passes;
        }
    }
    let came = Bytes::from(came);
    let (json, first) = (came.slice(..length), came.slice(length..));
    let Some(inputs) = rest::expected(&json) else { return Received::NotYet };
    let Some(run) = room(arena, &inputs, tensors) else { return Received::NotYet };
    let mut filling = Filling { kept, run, json, inputs, came: 0 };
    if !filling.fill(&first).await {
        return Received::Passes;
    }
    let Some((there, data)) = filling.place() else { return Received::Passes };
    let json = filling.json.clone();
    Received::There(Tensors { json, data, there })
}

/// Room for these inputs, which are so many bytes; half of the arena is left for batches and for what is answered.
fn room(arena: &Arena, inputs: &[Expected], bytes: usize) -> Option<Run> {
    let rows = inputs.first()?.rows;
    let alike = inputs.iter().all(|input| input.rows == rows);
    let sum = inputs.iter().try_fold(0_usize, |sum, input| sum.checked_add(input.bytes()?))?;
    let fits = arena.occupancy().in_use.checked_add(bytes)? <= arena.bytes() / 2;
    if !alike || sum != bytes || !fits {
        return None;
    }
    arena.run(&inputs.iter().map(|input| input.row).collect::<Vec<_>>(), rows)
}

/// A part of the JSON on its way in; dropping it says what has come of it.
struct Partly<'a> {
    kept: &'a Kept,
    piece: Vec<u8>,
    filled: usize,
}

impl Drop for Partly<'_> {
    fn drop(&mut self) {
        if self.filled > 0 {
            self.piece.truncate(self.filled);
            let mut passed = self.kept.passed();
            passed.push(std::mem::take(&mut self.piece).into());
            self.kept.lies(passed);
        }
    }
}

/// Tensors on their way in; dropping it says where what has come of them lies.
struct Filling<'a> {
    kept: &'a Kept,
    run: Run,
    json: Bytes,
    inputs: Vec<Expected>,
    /// Bytes of all tensors that have come.
    came: usize,
}

impl Filling<'_> {
    /// Fills all places; `first` has come with the JSON. `false`: the body broke off.
    async fn fill(&mut self, mut first: &[u8]) -> bool {
        let Some(rows) = self.inputs.first().map(|input| input.rows) else { return false };
        let Some(mut places) = self.run.rows(0, rows) else { return false };
        for input in 0..self.inputs.len() {
            let Some(place) = places.input(input) else { return false };
            let copied = first.len().min(place.len());
            place[..copied].copy_from_slice(&first[..copied]);
            first = &first[copied..];
            let mut here = Here { came: &mut self.came, filled: copied };
            if !self.kept.fill(place, &mut here.filled).await {
                return false;
            }
        }
        true
    }

    /// Where they lie, once nobody writes any more, and what of them has come. Once.
    fn place(&mut self) -> Option<(Frozen, Vec<Bytes>)> {
        let there = self.run.seal()?.freeze();
        let mut left = self.came;
        let data = self.inputs.iter().enumerate().map(|(at, input)| {
            let all = there.bytes(at, 0..input.rows)?;
            let came = all.len().min(left);
            left -= came;
            Some(all.slice(..came))
        });
        let data = data.collect::<Option<Vec<_>>>()?;
        let pieces = data.iter().filter(|piece| !piece.is_empty()).cloned();
        self.kept.lies(std::iter::once(self.json.clone()).chain(pieces).collect());
        Some((there, data))
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        // `None`: it has been asked before.
        let _ = self.place();
    }
}

/// Counts what has come of one tensor when it is dropped, however that is.
struct Here<'a> {
    came: &'a mut usize,
    filled: usize,
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        *self.came += self.filled;
    }
}
