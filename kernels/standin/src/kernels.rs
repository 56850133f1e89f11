//! The kernels, as `host.c` has them.

use std::ffi::{CStr, c_char, c_int};

unsafe extern "C" {
    fn penstock_standin_find(name: *const c_char, bytes: *mut u32) -> c_int;
    fn penstock_standin_run(
        kernel: c_int,
        grid: *const u32,
        block: *const u32,
        args: *const u64,
        downwards: c_int,
    ) -> c_int;
}

/// A kernel, and how many bytes of arguments it takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    number: c_int,
    pub(crate) bytes: usize,
}

/// The kernel of this name.
pub(crate) fn find(name: &CStr) -> Option<Kernel> {
    let mut bytes = 0;
    // SAFETY: the name ends, and the other function writes one number.
    let number = unsafe { penstock_standin_find(name.as_ptr(), &raw mut bytes) };
    (number >= 0).then_some(Kernel { number, bytes: bytes as usize })
}

/// Runs it to its end. `args` has its arguments, at an address that fits any of them. `false`: it takes no blocks of
/// that size.
pub(crate) fn run(kernel: Kernel, grid: [u32; 3], block: [u32; 3], args: &[u64], backward: bool) -> bool {
    assert!(args.len() * 8 >= kernel.bytes);
    // SAFETY: the arguments are as long as this kernel's. Addresses in them are the caller's to answer for, as with a
    // real driver; behind each allocation lies a page that nobody may touch.
    let code = unsafe {
        penstock_standin_run(
            kernel.number,
            grid.as_ptr(),
            block.as_ptr(),
            args.as_ptr(),
            c_int::from(backward),
        )
    };
    code == 0
}
