//! Memory of the STAND-IN's device, and of its hosts.
//!
//! Device memory is a file without a name, so that another process can open it. An allocation ends where a page ends,
//! and the page behind it is not there: a kernel that writes too far dies at once.

use std::fs::File;
use std::os::fd::AsRawFd as _;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

const PAGE: usize = 4096;
/// What every address of the driver is a multiple of.
const ALIGN: usize = 256;
/// What memory holds that nobody has written; zeros would hide who relies on them.
const UNWRITTEN: u8 = 0xA5;

/// One allocation.
#[derive(Debug)]
pub(crate) struct Block {
    base: usize,
    mapped: usize,
    pub(crate) at: usize,
    pub(crate) bytes: usize,
    /// Of memory that can be exported.
    pub(crate) file: Option<File>,
    /// It was another's export.
    pub(crate) imported: bool,
}

/// What an exported handle says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Export {
    pub(crate) process: u32,
    file: i32,
    bytes: u64,
}

const MAGIC: [u8; 8] = *b"STAND-IN";

impl Block {
    /// New device memory.
    pub(crate) fn device(bytes: usize) -> Option<Self> {
        let file = File::from(rustix::fs::memfd_create("penstock-standin", MemfdFlags::CLOEXEC).ok()?);
        file.set_len(bytes.max(1).next_multiple_of(PAGE) as u64).ok()?;
        let block = Self::map(file, bytes, false)?;
        block.fill(UNWRITTEN);
        Some(block)
    }

    /// New host memory.
    pub(crate) fn host(bytes: usize) -> Option<Self> {
        let mut block = Self::device(bytes)?;
        block.file = None;
        Some(block)
    }

    fn map(file: File, bytes: usize, imported: bool) -> Option<Self> {
        let pages = bytes.max(1).next_multiple_of(PAGE);
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // Room for the page that nobody may touch, then the file over all but that.
        // SAFETY: the address is the kernel's to choose.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                pages + PAGE,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )
        }
        .ok()?;
        // SAFETY: only over what was mapped a line before, and is nobody's.
        let over = unsafe { rustix::mm::mmap(base, pages, protection, flags | MapFlags::FIXED, &file, 0) };
        let base = base as usize;
        let at = base + pages - bytes.max(1).next_multiple_of(ALIGN);
        let block = Self { base, mapped: pages + PAGE, at, bytes, file: Some(file), imported };
        over.is_ok().then_some(block)
    }

    fn fill(&self, byte: u8) {
        // SAFETY: mapped, and new: nobody has its address yet.
        unsafe { std::ptr::write_bytes(self.base as *mut u8, byte, self.mapped - PAGE) };
    }

    pub(crate) fn contains(&self, at: usize, bytes: usize) -> bool {
        at >= self.at && at.checked_add(bytes).is_some_and(|end| end <= self.at + self.bytes)
    }

    /// A handle for another process.
    pub(crate) fn export(&self) -> Option<[u8; 64]> {
        let file = self.file.as_ref().filter(|_| !self.imported)?;
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&MAGIC);
        handle[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        handle[12..16].copy_from_slice(&file.as_raw_fd().to_le_bytes());
        handle[16..24].copy_from_slice(&(self.bytes as u64).to_le_bytes());
        Some(handle)
    }

    /// What another process exported.
    pub(crate) fn import(export: Export) -> Option<Self> {
        let path = format!("/proc/{}/fd/{}", export.process, export.file);
        let file = File::options().read(true).write(true).open(path).ok()?;
        let bytes = usize::try_from(export.bytes).ok()?;
        let fits = file.metadata().ok()?.len() as usize == bytes.max(1).next_multiple_of(PAGE);
        if fits { Self::map(file, bytes, true) } else { None }
    }
}

impl Export {
    pub(crate) fn read(handle: &[u8; 64]) -> Option<Self> {
        let (magic, rest) = handle.split_first_chunk::<8>()?;
        let (process, rest) = rest.split_first_chunk::<4>()?;
        let (file, rest) = rest.split_first_chunk::<4>()?;
        let (bytes, _) = rest.split_first_chunk::<8>()?;
        let export = Self {
            process: u32::from_le_bytes(*process),
            file: i32::from_le_bytes(*file),
            bytes: u64::from_le_bytes(*bytes),
        };
        (*magic == MAGIC).then_some(export)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`; whoever still has its address broke the driver's rules, and dies of it, as he should
        // in a test.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut _, self.mapped) };
    }
}

/// Copies between addresses that the book of allocations knows, or that the caller vouches for.
pub(crate) fn copy(to: usize, from: usize, bytes: usize) {
    // SAFETY: a driver is told addresses, and its callers answer for those of the host; those of the device were looked
    // up.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
}

/// Fills memory of the device, which was looked up.
pub(crate) fn fill(at: usize, byte: u8, bytes: usize) {
    // SAFETY: as in `copy`.
    unsafe { std::ptr::write_bytes(at as *mut u8, byte, bytes) };
}

/// Pageable memory is read at once.
pub(crate) fn staged(from: usize, bytes: usize) -> Vec<u8> {
    // SAFETY: as in `copy`.
    unsafe { std::slice::from_raw_parts(from as *const u8, bytes) }.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_ends_where_it_says_and_is_not_clean() {
        for bytes in [1, 255, 256, 4096, 5000] {
            let block = Block::device(bytes).unwrap();
            assert_eq!(block.at % ALIGN, 0);
            assert!(block.contains(block.at, bytes) && !block.contains(block.at, bytes + 1));
            assert!(!block.contains(block.at - 1, 1) && !block.contains(block.at, usize::MAX));
            assert_eq!(staged(block.at, bytes), vec![UNWRITTEN; bytes]);
        }
    }

    #[test]
    fn an_export_is_the_same_memory() {
        let block = Block::device(5000).unwrap();
        let export = Export::read(&block.export().unwrap()).unwrap();
        let other = Block::import(export).unwrap();
        copy(other.at, block.at + 7, 100);
        fill(block.at + 4990, 3, 10);
        assert_eq!(staged(other.at + 4990, 10), [3; 10]);
        assert!(other.export().is_none(), "of an import there is no export");
        assert!(Export::read(&[0; 64]).is_none());
    }
}
