//! The memory itself: one range of bytes at one address, from its making until it is dropped.
//!
//! In: what kind, and how many bytes. Out: pointers into it. Can go wrong: the system has none left. All bytes are zero at
//! first, so that there is never one that was not written; whether a pointer may be followed is for the caller to know
//! (the extent, which owns a part of it). Each kind is a [`Backing`]: one way to get it and one to give it back.
//!
//! Shared memory is also in another process, which Rust knows nothing of. That process is told to read inputs and to write
//! outputs only between hand-over and answer, while nothing here holds a reference to them. One that writes at other times
//! can change bytes under a reader, who must therefore take nothing that depends on them for settled, and can do no other
//! harm: the size of the file is not looked at again, and bytes have no invalid values.

use std::alloc::Layout;
use std::ops::Range;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

use super::file::SharedFile;
use super::{Access, Error};
use crate::cuda::{Context, Pinned, Registered};

/// What every address and size is a multiple of.
pub(super) const PAGE: usize = 4096;

/// Bytes at one address.
#[derive(Debug)]
pub(super) struct Memory {
    base: NonNull<u8>,
    bytes: usize,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Heap(Layout),
    /// And whether a GPU reads and writes it too.
    Shared(SharedFile, Option<Registered>),
    /// Of the GPU's driver, to which it goes back when this is dropped.
    Pinned {
        _memory: Pinned,
    },
}

// SAFETY: the memory belongs to no thread, and `Memory` gives out nothing but pointers.
unsafe impl Send for Memory {}
// SAFETY: as above; none of its methods follows a pointer.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory of this process. `bytes` is a multiple of [`PAGE`] and not zero.
    pub(super) fn heap(bytes: usize) -> Result<Self, Error> {
        let layout = Layout::from_size_align(bytes, PAGE).ok().filter(|layout| layout.size() > 0);
        let layout = layout.ok_or(Error::Heap { bytes })?;
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or(Error::Heap { bytes })?;
        Ok(Self { base, bytes, backing: Backing::Heap(layout) })
    }

    /// Memory of a file. `bytes` as for [`Memory::heap`].
    pub(super) fn shared(node: &str, name: &str, access: Access, bytes: usize) -> Result<Self, Error> {
        let file = SharedFile::create(node, name, access, bytes)?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
        // SAFETY: the address is the kernel's to choose, so that nothing is mapped over; the file has this size and keeps it.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, &file.file, 0) };
        let base = base.ok().and_then(|base| NonNull::new(base.cast())).ok_or(Error::Heap { bytes })?;
        Ok(Self { base, bytes, backing: Backing::Shared(file, None) })
    }

    /// Memory that a GPU reads and writes by itself. `bytes` as for [`Memory::heap`].
    pub(super) fn pinned(context: &Context, bytes: usize) -> Result<Self, Error> {
        let memory = Pinned::new(context, bytes).map_err(|source| Error::Gpu { bytes, source })?;
        Ok(Self { base: memory.base(), bytes, backing: Backing::Pinned { _memory: memory } })
    }

    /// Memory of a file, which a GPU reads and writes by itself too. `bytes` as for [`Memory::heap`].
    pub(super) fn registered(
        context: &Context,
        node: &str,
        name: &str,
        access: Access,
        bytes: usize,
    ) -> Result<Self, Error> {
        let mut memory = Self::shared(node, name, access, bytes)?;
        let registered = Registered::new(context, memory.base, bytes);
        let registered = registered.map_err(|source| Error::Gpu { bytes, source })?;
        if let Backing::Shared(_, of) = &mut memory.backing {
            *of = Some(registered);
        }
        Ok(memory)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The name of the file, as `shm_open` wants it.
    pub(super) fn key(&self) -> Option<&str> {
        match &self.backing {
            Backing::Heap(_) | Backing::Pinned { .. } => None,
            Backing::Shared(file, _) => Some(&file.key),
        }
    }

    /// Whether a GPU reads and writes it by itself.
    pub(super) fn is_pinned(&self) -> bool {
        matches!(self.backing, Backing::Pinned { .. } | Backing::Shared(_, Some(_)))
    }

    /// Where these bytes are.
    pub(super) fn at(&self, range: Range<usize>) -> *mut [u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        std::ptr::slice_from_raw_parts_mut(self.base.as_ptr().wrapping_add(range.start), range.len())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.backing {
            // SAFETY: allocated in `heap` with this layout; who has a pointer keeps `self`.
            Backing::Heap(layout) => unsafe { std::alloc::dealloc(self.base.as_ptr(), *layout) },
            Backing::Pinned { .. } => {}
            // A driver that does not let go of it may still write there: the pages stay this process's.
            Backing::Shared(_, Some(registered)) if !registered.give_back() => {}
            Backing::Shared(..) => {
                // SAFETY: mapped in `shared` with this size; who has a pointer keeps `self`.
                let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
                debug_assert_eq!(unmapped, Ok(()));
            }
        }
    }
}
