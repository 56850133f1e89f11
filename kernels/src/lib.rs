//! Memory for tensors: written once by whoever produces a tensor, read by whoever needs it.
//!
//! [`arena`] has the memory: runs of rows for batches, on the heap or in files that a model server maps too. [`normalise`]
//! writes pixels into it as tensors. [`cuda`] has the GPU, where there is one: memory that it reads by itself, copies, and
//! kernels that do what [`fused`] says, to the same bits.
//!
//! This is the only crate of Penstock with `unsafe` in it, and only some modules of it may: the one that maps memory, the
//! one that turns claims on rows into slices, the one with a CPU's vectors, those that call a GPU's driver, and [`allocated`], an
//! allocator that counts. What they promise stands at the head of each, and each allows it to itself.
//!
//! # A batch in shared memory
//!
//! ```
//! use penstock_kernels::arena::{Arena, Kind};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // With `Kind::Shared` a model server finds the same bytes under `arena.key()`.
//! let arena = Arena::new(Kind::Heap, 1 << 20, 4096)?;
//!
//! // Two requests share an execution: of one input of 4 bytes a row, 3 rows; of the output, 8 bytes a row.
//! let inputs = arena.run(&[4], 3).ok_or("the arena is full: send bytes instead")?;
//! let outputs = arena.run(&[8], 3).and_then(|run| run.seal()).ok_or("the arena is full")?;
//!
//! // Each writes its rows, where and when it likes; rows that another has claimed are refused.
//! let mut first = inputs.rows(0, 2).ok_or("taken")?;
//! let mut second = inputs.rows(2, 1).ok_or("taken")?;
//! first.write_all(0, [&b"one "[..], &b"two "[..]])?;
//! second.write(0, 0, b"last")?;
//! drop((first, second));
//!
//! // Nobody writes any more: the batch can be read, and the server can be told where it lies.
//! let inputs = inputs.seal().ok_or("somebody still writes")?;
//! assert_eq!(inputs.input(0, 0..3), Some(&b"one two last"[..]));
//! let region = inputs.region(0, 0..3).ok_or("no such input")?;
//! assert_eq!(region.bytes, 12);
//!
//! // Until the server has answered nobody touches what it was handed.
//! let (inputs, outputs) = (inputs.hand_over(), outputs.hand_over());
//! // … the server answers …
//! inputs.returned();
//! let answer = outputs.returned();
//! assert_eq!(answer.bytes(0, 2..3).ok_or("no such output")?, &[0; 8][..]);
//! # drop(answer);
//! # assert_eq!(arena.occupancy().in_use, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Had a lease been dropped instead, because the request was cancelled or timed out, its memory would stay in quarantine
//! until [`Arena::amnesty`](arena::Arena::amnesty).

pub mod allocated;
pub mod arena;
pub mod cuda;
pub mod fused;
pub mod normalise;
