//! Who may touch which bytes of a run, and when.
//!
//! - A [`Run`] reads and writes nothing; it gives out claims.
//! - [`RowsMut`] is a claim on rows. No two that live at the same time have a row in common, and rows have no byte in common,
//!   so that each may write its own.
//! - [`Sealed`] is made while there is no claim, and then there will never be one: it is alone.
//! - [`Frozen`] is all that remains of a [`Sealed`], and only reads; its clones and its [`Bytes`] do the same.
//! - A [`Lease`] touches nothing: the bytes are the server's.
//!
//! Each of them keeps the [`Extent`], without which its slots could be another's.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::extent::Extent;

/// What the address of an input is a multiple of: a cache line, the widest register, and what a GPU loads at once.
pub(super) const ALIGN: usize = 64;

/// Room for the rows of a batch. Clones are the same run; once it is sealed they are of no use, and keep no memory.
#[derive(Debug, Clone)]
pub struct Run(Arc<Mutex<Claims>>);

#[derive(Debug)]
struct Claims {
    /// `None`: sealed.
    extent: Option<Arc<Extent>>,
    rows: Vec<Range<u32>>,
}

fn lock(claims: &Mutex<Claims>) -> MutexGuard<'_, Claims> {
    claims.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Run {
    pub(super) fn new(extent: Extent, zero: bool) -> Self {
        let parts = if zero { vec![extent.whole()] } else { extent.slack() };
        for part in parts {
            let bytes = extent.ground.memory.at(part);
            // SAFETY: the extent is new, and its slots are nobody else's.
            unsafe { &mut *bytes }.fill(0);
        }
        Self(Arc::new(Mutex::new(Claims { extent: Some(Arc::new(extent)), rows: Vec::new() })))
    }

    /// Claims rows, to write them. `None`: there are none such, or somebody has claimed one of them, or the run is sealed.
    pub fn rows(&self, first: u32, count: u32) -> Option<RowsMut> {
        let rows = first..first.checked_add(count)?;
        let mut claims = lock(&self.0);
        let extent = Arc::clone(claims.extent.as_ref()?);
        let free = claims.rows.iter().all(|other| other.end <= rows.start || rows.end <= other.start);
        if rows.is_empty() || rows.end > extent.rows || !free {
            return None;
        }
        claims.rows.push(rows.clone());
        Some(RowsMut { run: Arc::clone(&self.0), extent, rows })
    }

    /// Ends all writing. `None`: somebody still writes, or it was sealed before.
    pub fn seal(&self) -> Option<Sealed> {
        let mut claims = lock(&self.0);
        if claims.rows.is_empty() { claims.extent.take().map(Sealed) } else { None }
    }
}

/// Bytes that do not fit where they were to go. None of them was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{given} bytes do not fit rows that take {takes} bytes of input {input}")]
pub struct Misfit {
    /// The input, by its place.
    pub input: usize,
    /// What its rows take from there on; 0 also for an input that there is not.
    pub takes: usize,
    /// What was to be written.
    pub given: usize,
}

/// Rows that are one writer's; dropping it ends the claim.
#[derive(Debug)]
pub struct RowsMut {
    run: Arc<Mutex<Claims>>,
    extent: Arc<Extent>,
    rows: Range<u32>,
}

impl RowsMut {
    /// These rows of an input, to be written in place. They may hold anything, unless the arena is
    /// [zeroing](super::Arena::zeroing). `None`: there is no such input.
    pub fn input(&mut self, input: usize) -> Option<&mut [u8]> {
        let range = self.extent.rows_of(input, self.rows.clone())?;
        // SAFETY: while this claim lives nobody else has these rows, and it gives out one borrow at a time.
        Some(unsafe { &mut *self.extent.ground.memory.at(range) })
    }

    /// Where some of these rows are, counted from the first of them, for a copy that keeps the claim.
    pub(crate) fn place(&mut self, input: usize, rows: Range<u32>) -> Option<*mut [u8]> {
        let first = self.rows.start;
        let rows = first.checked_add(rows.start)?..first.checked_add(rows.end)?;
        let inside = rows.end <= self.rows.end;
        let range = self.extent.rows_of(input, rows).filter(|_| inside)?;
        Some(self.extent.ground.memory.at(range))
    }

    /// Writes bytes into these rows of an input, so many bytes behind their beginning.
    pub fn write(&mut self, input: usize, offset: usize, bytes: &[u8]) -> Result<(), Misfit> {
        let rows = self.input(input).and_then(|rows| rows.get_mut(offset..)).unwrap_or_default();
        let (takes, given) = (rows.len(), bytes.len());
        let place = rows.get_mut(..given).ok_or(Misfit { input, takes, given })?;
        place.copy_from_slice(bytes);
        Ok(())
    }

    /// Fills these rows of an input with pieces, one after the other. They have exactly as many bytes as the rows.
    pub fn write_all<'a>(
        &mut self,
        input: usize,
        pieces: impl IntoIterator<Item = &'a [u8], IntoIter: Clone>,
    ) -> Result<(), Misfit> {
        let (mut rest, pieces) = (self.input(input).unwrap_or_default(), pieces.into_iter());
        let (takes, given) = (rest.len(), pieces.clone().map(<[u8]>::len).sum());
        let misfit = Misfit { input, takes, given };
        if takes != given {
            return Err(misfit);
        }
        for piece in pieces {
            let (place, behind) = rest.split_at_mut_checked(piece.len()).ok_or(misfit)?;
            place.copy_from_slice(piece);
            rest = behind;
        }
        Ok(())
    }
}

impl Drop for RowsMut {
    fn drop(&mut self) {
        let mut claims = lock(&self.run);
        if let Some(at) = claims.rows.iter().position(|rows| *rows == self.rows) {
            claims.rows.swap_remove(at);
        }
    }
}

/// Where bytes lie in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// From the beginning of the arena.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

fn region(extent: &Extent, input: usize, rows: Range<u32>) -> Option<Region> {
    let range = extent.rows_of(input, rows)?;
    Some(Region { offset: range.start as u64, bytes: range.len() as u64 })
}

/// A run that nobody writes any more.
#[derive(Debug)]
pub struct Sealed(Arc<Extent>);

impl Sealed {
    /// Moves rows of all inputs, as when the last ones close a hole. The places may overlap. `false`: there are no such rows,
    /// and nothing was moved.
    pub fn move_rows(&mut self, from: u32, to: u32, count: u32) -> bool {
        let range =
            |first: u32| Some(first..first.checked_add(count)?).filter(|rows| rows.end <= self.0.rows);
        let (Some(from), Some(to)) = (range(from), range(to)) else { return false };
        let all = 0..self.0.rows;
        for input in 0..self.0.inputs() {
            let place = |rows: &Range<u32>| self.0.rows_of(input, rows.clone());
            let (Some(all), Some(from), Some(to)) = (place(&all), place(&from), place(&to)) else {
                return false;
            };
            // SAFETY: a sealed run has no writers, and `self` is borrowed for this alone.
            let bytes = unsafe { &mut *self.0.ground.memory.at(all.clone()) };
            bytes.copy_within(from.start - all.start..from.end - all.start, to.start - all.start);
        }
        true
    }

    /// Rows of an input.
    pub fn input(&self, input: usize, rows: Range<u32>) -> Option<&[u8]> {
        let range = self.0.rows_of(input, rows)?;
        // SAFETY: a sealed run has no writers, and moving rows borrows `self` alone.
        Some(unsafe { &*self.0.ground.memory.at(range) })
    }

    /// Where rows of an input lie for a model server.
    pub fn region(&self, input: usize, rows: Range<u32>) -> Option<Region> {
        region(&self.0, input, rows)
    }

    /// Where rows of an input are, for a copy that keeps all of the run.
    pub(crate) fn place(&mut self, input: usize, rows: Range<u32>) -> Option<*mut [u8]> {
        Some(self.0.ground.memory.at(self.0.rows_of(input, rows)?))
    }

    /// It stays as it is from now on.
    pub fn freeze(self) -> Frozen {
        Frozen(self.0)
    }

    /// The model server reads it, or writes it, from now on.
    pub fn hand_over(self) -> Lease {
        self.hand_over_to(0)
    }

    /// The same, where an arena has several servers; each has a number, which is the caller's to choose.
    pub fn hand_over_to(self, server: u64) -> Lease {
        self.0.lend(server);
        Lease(self.0)
    }
}

/// A run that a model server has. Dropping it says that the server never gave it back, which puts its memory into quarantine.
#[must_use = "a lease that is dropped puts its memory into quarantine"]
#[derive(Debug)]
pub struct Lease(Arc<Extent>);

impl Lease {
    /// Where rows of an input lie.
    pub fn region(&self, input: usize, rows: Range<u32>) -> Option<Region> {
        region(&self.0, input, rows)
    }

    /// The server has answered, with whatever: it will not touch this run any more. Of outputs this is where the answer is.
    pub fn returned(self) -> Frozen {
        self.0.returned();
        Frozen(self.0)
    }
}

/// A run that does not change any more. Clones are the same run.
#[derive(Debug, Clone)]
pub struct Frozen(Arc<Extent>);

impl Frozen {
    /// The model server reads it from now on; whoever holds it goes on reading too. The server has a number, as in
    /// [`Sealed::hand_over_to`].
    pub fn hand_over_to(&self, server: u64) -> Lease {
        self.0.lend(server);
        Lease(Arc::clone(&self.0))
    }

    /// Rows of an input, without a copy. They keep the whole run.
    pub fn bytes(&self, input: usize, rows: Range<u32>) -> Option<Bytes> {
        let range = self.0.rows_of(input, rows)?;
        Some(Bytes::from_owner(View { extent: Arc::clone(&self.0), range }))
    }
}

/// Bytes of a frozen run.
struct View {
    extent: Arc<Extent>,
    range: Range<usize>,
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: views are of frozen runs only, which nobody writes.
        unsafe { &*self.extent.ground.memory.at(self.range.clone()) }
    }
}
