//! An arena in memory of a GPU, for a model server that maps it by CUDA IPC.
//!
//! In: a device, and how many bytes of it. Out: runs of rows, as of an [`Arena`](super::Arena), but nothing here reads or
//! writes them: copies and kernels do, which are told [spans](Span). Can go wrong: the device has no memory; the arena is
//! full. The same book says which slots are free, so that what was said of quarantine there is so here.
//!
//! ```text
//! DeviceArena ──▶ DeviceRun ── hand_over_to ─▶ DeviceLease ── returned ─▶ DeviceRun ──▶ free
//!                                                └─ dropped ─▶ quarantine ── amnesty_of ─▶ free
//! ```
//!
//! A copy or a kernel that fills a run has to [keep](crate::cuda::Pending::keeping) it: it knows of the memory only, whose
//! slots would be another's as soon as the run is gone.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::extent::Extent;
use super::run::Region;
use super::space::Space;
use super::{Error, Ground, Occupancy, whole};
use crate::cuda::{Context, DeviceMemory, Span};

/// Memory of a device, and who has which part of it. Clones are the same arena.
#[derive(Debug, Clone)]
pub struct DeviceArena(Arc<Ground<DeviceMemory>>);

impl DeviceArena {
    /// An arena of at least so many bytes of plain `cuMemAlloc` memory, in slots as of [`Arena::new`](super::Arena::new).
    pub fn new(context: &Context, bytes: usize, slot: usize) -> Result<Self, Error> {
        let whole = whole(bytes, slot)?;
        let memory = context.alloc(whole).map_err(|source| Error::Device { bytes: whole, source })?;
        Ok(Self(Arc::new(Ground { memory, slot, space: Mutex::new(Space::new(whole / slot)) })))
    }

    /// The memory, to export it whole.
    pub fn memory(&self) -> &DeviceMemory {
        &self.0.memory
    }

    /// Room for so many rows of inputs with so many bytes a row. What others left there is still there: to be overwritten
    /// ([`DeviceRun::whole`]) before it is handed to anybody. `None`: there is no room, or nothing to put there.
    pub fn run(&self, bytes_per_row: &[usize], rows: u32) -> Option<DeviceRun> {
        Extent::take(&self.0, bytes_per_row, rows).map(|extent| DeviceRun(Arc::new(extent)))
    }

    /// How full it is.
    pub fn occupancy(&self) -> Occupancy {
        Occupancy::of(self.0.memory.bytes(), self.0.slot, &self.0.space())
    }

    /// As [`Arena::amnesty_of`](super::Arena::amnesty_of).
    pub fn amnesty_of(&self, server: u64) -> usize {
        self.0.space().amnesty(server) * self.0.slot
    }
}

/// A run that is ours. Clones are the same run, whose slots are free when the last is gone.
#[derive(Debug, Clone)]
pub struct DeviceRun(Arc<Extent<DeviceMemory>>);

impl DeviceRun {
    fn part(&self, range: Range<usize>) -> Option<Span> {
        self.0.ground.memory.span(range)
    }

    /// Rows of an input, for a copy or a kernel.
    pub fn span(&self, input: usize, rows: Range<u32>) -> Option<Span> {
        self.part(self.0.rows_of(input, rows)?)
    }

    /// From the beginning of the arena: all bytes of the run, those between inputs too.
    pub fn whole(&self) -> Range<usize> {
        self.0.whole()
    }

    /// Where rows of an input lie for a model server that mapped the arena.
    pub fn region(&self, input: usize, rows: Range<u32>) -> Option<Region> {
        let range = self.0.rows_of(input, rows)?;
        Some(Region { offset: range.start as u64, bytes: range.len() as u64 })
    }

    /// A model server reads it from now on.
    pub fn hand_over_to(self, server: u64) -> DeviceLease {
        self.0.lend(server);
        DeviceLease(self)
    }
}

/// A run that a model server has. Dropping it says that the server never gave it back, which puts its memory into quarantine.
#[must_use = "a lease that is dropped puts its memory into quarantine"]
#[derive(Debug)]
pub struct DeviceLease(DeviceRun);

impl DeviceLease {
    /// Where rows of an input lie.
    pub fn region(&self, input: usize, rows: Range<u32>) -> Option<Region> {
        self.0.region(input, rows)
    }

    /// The server has answered, with whatever: it will not touch this run any more.
    pub fn returned(self) -> DeviceRun {
        self.0.0.returned();
        self.0
    }
}
