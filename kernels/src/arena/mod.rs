//! The arena: memory that is sized once, and given out in runs of rows.
//!
//! In: how many bytes a row of each input has, and how many rows there are. Out: a [`Run`] where those who have claimed rows
//! write them at the same time; then, [`Sealed`], the whole of it to read, to close holes in, and to hand over to a model
//! server as a region of shared memory; then, [`Frozen`], slices of it that are [`Bytes`](bytes::Bytes). Its memory is free
//! again when the last of these is gone.
//!
//! ```text
//!            rows, write            move_rows, input          bytes
//! Arena ──▶ Run ───────────▶ seal ─▶ Sealed ──── freeze ─────▶ Frozen ──▶ free
//!                                      │                         ▲
//!                                      └─ hand_over ─▶ Lease ─ returned
//!                                                        └─ dropped ──▶ quarantine ── amnesty ──▶ free
//! ```
//!
//! Can go wrong: there is no room ([`Arena::run`] says `None`, and the caller sends bytes, or waits); rows are claimed by
//! another; somebody still writes. What a server was handed and never returned is not given to others: the server may still
//! read it, or write to it.
//!
//! A tensor whose rows differ in length (BYTES) has no run of rows; it takes a run of one row that is as long as all of it.

mod device;
mod extent;
mod file;
#[expect(unsafe_code, reason = "memory is mapped and unmapped here")]
mod memory;
#[expect(unsafe_code, reason = "claims on rows become slices here")]
mod run;
mod space;

pub use device::{DeviceArena, DeviceLease, DeviceRun};
pub use file::sweep;
pub use run::{Frozen, Lease, Misfit, Region, RowsMut, Run, Sealed};

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use extent::Extent;
use memory::{Memory, PAGE};
use space::Space;

use crate::cuda::Context;

/// What memory an arena has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind<'a> {
    /// This process's own.
    Heap,
    /// A file `/dev/shm/penstock-<node>-<pid>-<name>`, which a model server can map. It goes with the arena; those that
    /// dead processes left are removed when the next is made.
    Shared {
        /// The node or pod, so that who looks into `/dev/shm` sees whose it is.
        node: &'a str,
        /// What it is for.
        name: &'a str,
        /// Who may open it.
        access: Access,
    },
    /// This process's own, pinned by the driver of a GPU, which copies from it and to it without the CPU and while that does
    /// something else.
    Pinned {
        /// The GPU.
        context: &'a Context,
    },
    /// As [`Kind::Shared`], and pinned as well. Pinned are the pages for this process only: a model server that maps the file sees
    /// plain memory.
    Registered {
        /// The GPU.
        context: &'a Context,
        /// As for [`Kind::Shared`].
        node: &'a str,
        /// As for [`Kind::Shared`].
        name: &'a str,
        /// As for [`Kind::Shared`].
        access: Access,
    },
}

/// Who may open a file of shared memory, besides the user that Penstock runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Mode 0660: the members of a group; of none in particular, that of Penstock's user. In a pod this is its `fsGroup`,
    /// which both containers have.
    Group(Option<u32>),
    /// Mode 0666: every user who sees this `/dev/shm`. For a volume that only the pod's own containers mount, where the model
    /// server runs as a user that shares no group with Penstock.
    Everyone,
}

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Sizes that make no arena.
    #[error(
        "an arena of {bytes} bytes in slots of {slot} cannot be: slots have a power of two of bytes, at least {}, and there is at least one",
        run::ALIGN
    )]
    Size {
        /// The arena.
        bytes: usize,
        /// A slot.
        slot: usize,
    },
    /// The system gives no memory.
    #[error(
        "the system has no {bytes} bytes of memory for an arena: ask for a smaller one, or raise the memory limit"
    )]
    Heap {
        /// The arena.
        bytes: usize,
    },
    /// The file system of shared memory is full.
    #[error(
        "{dir} has no room for an arena of {bytes} bytes ({free} are free): mount an `emptyDir` there with `medium: Memory` and a larger `sizeLimit` (a container's own has 64 MiB), or ask for a smaller arena"
    )]
    Full {
        /// Where.
        dir: &'static str,
        /// The arena.
        bytes: usize,
        /// What is free.
        free: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file of shared memory cannot be had.
    #[error("the shared memory {path:?} could not be {doing}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A living process has it.
    #[error(
        "the shared memory {path:?} is in use by a living process: give each arena of a process a name of its own, and each pod on a node too"
    )]
    Taken {
        /// The file.
        path: PathBuf,
    },
    /// The device gives no memory.
    #[error(
        "the GPU gives no arena of {bytes} bytes of its memory; tensors take another way to the model server: {source}"
    )]
    Device {
        /// The arena.
        bytes: usize,
        /// What the driver said.
        source: crate::cuda::Error,
    },
    /// The driver of the GPU pins no memory.
    #[error(
        "the GPU's driver pins no arena of {bytes} bytes; an arena of another kind works without it: {source}"
    )]
    Gpu {
        /// The arena.
        bytes: usize,
        /// What the driver said.
        source: crate::cuda::Error,
    },
}

/// Memory, and who has which part of it. Clones are the same arena; it lives as long as they and what came out of it.
#[derive(Debug, Clone)]
pub struct Arena {
    ground: Arc<Ground>,
    zeroing: bool,
}

/// What all handles share; `M` is the memory.
#[derive(Debug)]
struct Ground<M = Memory> {
    memory: M,
    slot: usize,
    /// Held for some tens of nanoseconds.
    space: Mutex<Space>,
}

impl<M> Ground<M> {
    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How full an arena is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupancy {
    /// Its size, bytes.
    pub bytes: usize,
    /// Bytes that are not free, those in quarantine among them.
    pub in_use: usize,
    /// The most that were ever in use.
    pub peak: usize,
    /// Runs that are out.
    pub runs: usize,
    /// Bytes whose server may still read or write them.
    pub quarantined: usize,
    /// Runs that found no room, since the start.
    pub refused: u64,
}

/// The size of an arena of whole slots and whole pages.
fn whole(bytes: usize, slot: usize) -> Result<usize, Error> {
    let whole = bytes.checked_next_multiple_of(slot.max(PAGE));
    let whole = whole.filter(|whole| slot.is_power_of_two() && slot >= run::ALIGN && *whole > 0);
    whole.ok_or(Error::Size { bytes, slot })
}

impl Occupancy {
    /// Two arenas together; the peaks were not at the same time, but no more was ever in use.
    pub fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            in_use: self.in_use + other.in_use,
            peak: self.peak + other.peak,
            runs: self.runs + other.runs,
            quarantined: self.quarantined + other.quarantined,
            refused: self.refused + other.refused,
        }
    }

    fn of(bytes: usize, slot: usize, space: &Space) -> Self {
        Self {
            bytes,
            in_use: space.in_use * slot,
            peak: space.peak * slot,
            runs: space.runs,
            quarantined: space.quarantined() * slot,
            refused: space.refused,
        }
    }
}

impl Arena {
    /// An arena of at least so many bytes, given out in slots: a power of two of bytes, the unit of every run.
    pub fn new(kind: Kind<'_>, bytes: usize, slot: usize) -> Result<Self, Error> {
        let whole = whole(bytes, slot)?;
        let memory = match kind {
            Kind::Heap => Memory::heap(whole)?,
            Kind::Shared { node, name, access } => Memory::shared(node, name, access, whole)?,
            Kind::Pinned { context } => Memory::pinned(context, whole)?,
            Kind::Registered { context, node, name, access } => {
                Memory::registered(context, node, name, access, whole)?
            }
        };
        let space = Mutex::new(Space::new(whole / slot));
        Ok(Self { ground: Arc::new(Ground { memory, slot, space }), zeroing: false })
    }

    /// The same arena; runs from this handle are zeroed first, so that nobody reads what another left. For what a server
    /// writes, which need not write all of it. Of other runs only that is zeroed which belongs to no row: whoever has a
    /// run writes its rows before it is handed to anybody.
    pub fn zeroing(&self) -> Self {
        Self { zeroing: true, ..self.clone() }
    }

    /// Room for so many rows of inputs with so many bytes a row. `None`: there is none, or nothing to put there.
    pub fn run(&self, bytes_per_row: &[usize], rows: u32) -> Option<Run> {
        let extent = Extent::take(&self.ground, bytes_per_row, rows)?;
        Some(Run::new(extent, self.zeroing))
    }

    /// The same, in the half of the arena that may be taken by who cannot say when he is done with it: the other is left for
    /// batches and for what is answered.
    pub fn run_in_half(&self, bytes_per_row: &[usize], rows: u32) -> Option<Run> {
        let bytes = bytes_per_row.iter().sum::<usize>().checked_mul(rows as usize)?;
        if self.occupancy().in_use.checked_add(bytes)? > self.bytes() / 2 {
            self.ground.space().refused += 1;
            return None;
        }
        self.run(bytes_per_row, rows)
    }

    /// The name under which a model server finds the arena (`shm_open`, `key` of its register call); `None`: it cannot. To be
    /// registered whole, from its beginning.
    pub fn key(&self) -> Option<&str> {
        self.ground.memory.key()
    }

    /// Whether a GPU reads and writes it by itself.
    pub fn is_pinned(&self) -> bool {
        self.ground.memory.is_pinned()
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.ground.memory.bytes()
    }

    /// How full it is.
    pub fn occupancy(&self) -> Occupancy {
        Occupancy::of(self.ground.memory.bytes(), self.ground.slot, &self.ground.space())
    }

    /// The model server is gone, or has taken back the region: whatever it has not returned is free again. To be called before
    /// anything is handed to its successor. Returns how many bytes that freed at once.
    pub fn amnesty(&self) -> usize {
        self.amnesty_of(0)
    }

    /// The same for what was [handed over](Sealed::hand_over_to) to one of several servers.
    pub fn amnesty_of(&self, server: u64) -> usize {
        self.ground.space().amnesty(server) * self.ground.slot
    }
}
