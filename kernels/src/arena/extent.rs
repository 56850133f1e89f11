//! A part of the arena that has one owner, and where in it the rows of each input lie.
//!
//! Inputs follow one another; the rows of one are contiguous, which is what a server and a kernel want of a tensor.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::Ground;
use super::memory::Memory;
use super::run::ALIGN;
use super::space::{Lent, Slots};

/// Slots of memory `M`, and what lies in them.
#[derive(Debug)]
pub(super) struct Extent<M = Memory> {
    pub(super) ground: Arc<Ground<M>>,
    slots: Slots,
    inputs: Box<[Input]>,
    pub(super) rows: u32,
    /// To whom it was handed who has not returned it.
    lent: Mutex<Option<Lent>>,
}

/// Where an input lies, from the beginning of the arena.
#[derive(Debug, Clone, Copy)]
struct Input {
    begin: usize,
    row: usize,
}

impl<M> Extent<M> {
    pub(super) fn take(ground: &Arc<Ground<M>>, bytes_per_row: &[usize], rows: u32) -> Option<Self> {
        let count = rows as usize;
        let mut inputs = Vec::with_capacity(bytes_per_row.len());
        let mut end = 0_usize;
        for row in bytes_per_row {
            let begin = end.checked_next_multiple_of(ALIGN)?;
            end = begin.checked_add(row.checked_mul(count)?)?;
            inputs.push(Input { begin, row: *row });
        }
        if rows == 0 || inputs.is_empty() {
            return None;
        }
        let slots = ground.space().take(end.div_ceil(ground.slot))?;
        inputs.iter_mut().for_each(|input| input.begin += slots.start * ground.slot);
        let ground = Arc::clone(ground);
        Some(Self { ground, slots, inputs: inputs.into(), rows, lent: Mutex::new(None) })
    }

    /// All of it.
    pub(super) fn whole(&self) -> Range<usize> {
        self.slots.start * self.ground.slot..self.slots.end * self.ground.slot
    }

    /// What belongs to it and to no row: gaps between inputs, and what is left of the last slot.
    pub(super) fn slack(&self) -> Vec<Range<usize>> {
        let Range { start: mut at, end } = self.whole();
        let mut slack = Vec::new();
        for Input { begin, row } in &self.inputs {
            slack.push(at..*begin);
            at = begin + row * self.rows as usize;
        }
        slack.push(at..end);
        slack.retain(|part| !part.is_empty());
        slack
    }

    /// How many inputs there are.
    pub(super) fn inputs(&self) -> usize {
        self.inputs.len()
    }

    /// Where these rows of an input lie; `None`: there are none such.
    pub(super) fn rows_of(&self, input: usize, rows: Range<u32>) -> Option<Range<usize>> {
        let Input { begin, row } = *self.inputs.get(input)?;
        let inside = rows.start <= rows.end && rows.end <= self.rows;
        inside.then(|| begin + rows.start as usize * row..begin + rows.end as usize * row)
    }

    /// It is that server's now.
    pub(super) fn lend(&self, server: u64) {
        let lent = self.ground.space().lend(server);
        *self.lent.lock().unwrap_or_else(PoisonError::into_inner) = Some(lent);
    }

    /// It is ours again.
    pub(super) fn returned(&self) {
        *self.lent.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl<M> Drop for Extent<M> {
    fn drop(&mut self) {
        let lent = self.lent.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        self.ground.space().give(self.slots.clone(), lent);
    }
}
