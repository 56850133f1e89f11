//! STAND-IN: a CUDA driver that is none. Test only; in nothing that is shipped.
//!
//! It is a library in the place of `libcuda.so.1`, with those of its functions that Penstock calls. Device memory is
//! memory of this machine, in files, so that another process can map what was exported; a stream is a thread; a kernel
//! is the same source, compiled for the CPU (`host.c`). It keeps the driver's rules where breaking them would go
//! unnoticed here and hurt on a GPU: a thread has a current context; host memory is registered once, and unregistered
//! before it goes; copies of registered memory come later, on another thread, and of pageable memory at once; only
//! memory of `cuMemAlloc` is exported; nobody opens his own export; an address that nothing was allocated at ends the
//! context.
//!
//! The same file is a stand-in of nvJPEG too (`nvjpeg.rs`), which decodes on this CPU.
//!
//! It is told by a script (`script.rs`) what to fail and what to delay, and keeps a log of all calls. Its device calls
//! itself "STAND-IN (host CPU, no GPU)". It says nothing about speed, and nothing about what a real driver does beyond
//! these rules.

#[expect(unsafe_code, reason = "the functions of a C library are made here, and get what C gives them")]
mod calls;
#[expect(unsafe_code, reason = "kernels in C are called here")]
mod kernels;
#[expect(unsafe_code, reason = "memory is mapped, and copied between addresses")]
mod memory;
#[expect(unsafe_code, reason = "the functions of another C library are made here")]
mod nvjpeg;
mod script;
mod stream;
mod world;

/// What it is found by: a file of this name lies beside the tests.
pub const FILE: &str = "libpenstock_standin_driver.so";
