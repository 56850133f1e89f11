//! How much memory a thread has allocated and not freed, and giving back what it has.
//!
//! What a decoder allocates is not always told by the header that it reads first: the prefix codes of a lossless WebP stand
//! behind compressed data that says how many there are, some thirty bytes of a file for each twenty thousand of tables. So
//! whoever bounds a decoder looks at what it has taken, now and then, and stops it.
//!
//! Frees count where they happen, so a thread that gives its memory to another can hold less than nothing; differences over a
//! piece of work that keeps to one thread are exact.

#![allow(unsafe_code)] // An allocator is one by an unsafe trait; this one hands everything on as it is. mimalloc is written in C.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;

thread_local! {
    // Neither set up nor torn down, so that it can be used by an allocator, also while a thread ends.
    static ALLOCATED: Cell<isize> = const { Cell::new(0) };
}

/// Bytes that this thread has allocated and not freed; always 0 where [`Counting`] is not the program's allocator.
pub fn bytes() -> isize {
    ALLOCATED.get()
}

/// Gives back to the system what mimalloc keeps of this thread's for later. It does so by itself while it is used, some milliseconds after
/// memory was freed; a thread that frees much and then rests would keep it. Costs some tens of microseconds, so: now and then.
/// Without an effect where mimalloc is not the program's allocator.
pub fn give_back() {
    // SAFETY: may be called by any thread at any time. `false`: nothing that is in use by others is waited for.
    unsafe { libmimalloc_sys::mi_collect(false) }
}

fn more(bytes: usize) {
    ALLOCATED.set(ALLOCATED.get().wrapping_add_unsigned(bytes));
}

fn less(bytes: usize) {
    ALLOCATED.set(ALLOCATED.get().wrapping_sub_unsigned(bytes));
}

/// An allocator that counts for each thread what `A` gives and takes back: an addition each, without a lock or an atomic.
///
/// ```
/// use penstock_kernels::allocated::{self, Counting};
///
/// #[global_allocator]
/// static ALLOCATOR: Counting<std::alloc::System> = Counting(std::alloc::System);
///
/// let before = allocated::bytes();
/// let kept = vec![0_u8; 1000];
/// assert_eq!(allocated::bytes() - before, 1000);
/// drop(kept);
/// assert_eq!(allocated::bytes(), before);
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Counting<A>(pub A);

// SAFETY: every call goes to `A`, with the arguments that came, and what `A` says is what is answered. What is done besides
// touches no memory but a thread's own number.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: the caller's promise is handed on.
        unsafe { self.0.alloc(layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: as above.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        less(layout.size());
        // SAFETY: as above.
        unsafe { self.0.dealloc(at, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        less(layout.size());
        more(size);
        // SAFETY: as above.
        unsafe { self.0.realloc(at, layout, size) }
    }
}
