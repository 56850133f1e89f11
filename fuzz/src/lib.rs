//! What every reader of the wire promises of any bytes, one function a reader. Each takes what libFuzzer made up and
//! panics where a promise is broken; `fuzz_targets/` only calls them, and [`seeds`] gives them something to begin with.
//!
//! Promised by all: no panic, no arithmetic that wraps, and no more memory than [`LARGEST`] times the input, or, of images,
//! than their limits say. Time is
//! libFuzzer's to watch: `make fuzz` gives each input of at most 64 KiB two seconds, which a reader in quadratic time
//! does not keep.

mod access;
mod http1;
mod http2;
mod json;
mod load;
mod oip;
mod prepare;
pub mod seeds;
mod served;
mod text;
mod wire;
mod xds;

use std::alloc::System;

use penstock_kernels::allocated::Counting;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

pub use access::access;
pub use http1::http1_entry;
pub use http2::http2_entry;
pub use json::{coalesce_json, openai};
pub use load::{metrics_page, orca};
pub use oip::{oip_grpc, oip_prefix, oip_rest};
pub use prepare::{image_head, image_jpeg, image_pipeline, image_png, image_webp};
pub use text::{annotations, yaml};
pub use wire::{first_bytes, path};
pub use xds::xds_resources;

/// What was allocated at all, for the promises here; and, as in the sidecar, what a thread holds, which stops decoders.
#[global_allocator]
static COUNTING: Counting<&StatsAlloc<System>> = Counting(ALLOCATOR);

static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// The most that a reader allocates, all that it frees again included, in bytes for one byte of input. A tensor of which
/// nothing is said but `{"name":"","datatype":"","shape":[]}` is 36 bytes, and some 200 in memory, twice while its list
/// grows; what is packed more tightly is protobuf, where the two bytes `2a 00` are an input: 160 bytes in prost's list,
/// four times that while it grows, and an error that gives up after 256.
pub const LARGEST: usize = 512;

/// What is allocated whatever the input is: tables, messages of errors.
pub const ALWAYS: usize = 64 << 10;

/// Reads, and looks at what that took.
fn bounded<T>(input: &[u8], read: impl FnOnce() -> T) -> T {
    within(input.len() * LARGEST + ALWAYS, input, read)
}

/// The same, where more than that is allowed.
fn within<T>(most: usize, input: &[u8], read: impl FnOnce() -> T) -> T {
    let region = Region::new(ALLOCATOR);
    let read = read();
    let taken = region.change().bytes_allocated;
    assert!(taken <= most, "{taken} bytes were allocated for an input of {}", input.len());
    read
}

/// The longest sentence about what is wrong, bytes: it becomes a header in gRPC, and stands in logs.
const LONGEST_SENTENCE: usize = 2048;

/// What is wrong with what control or an operator says is said, as long as it may be.
fn says(error: &impl std::fmt::Display) {
    assert!(!error.to_string().is_empty());
}

/// What is wrong is said in a sentence, whatever was sent.
fn sentence(error: &impl std::fmt::Display) {
    let sentence = error.to_string();
    says(error);
    assert!(sentence.len() <= LONGEST_SENTENCE, "a sentence of {} bytes: {sentence:.200}", sentence.len());
}

/// The first byte, and the rest.
fn choice(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(first, rest)| (*first, rest))
}

/// Cuts of a text, the same for the same seed: lengths between 1 and 64 that follow each other as xorshift has it.
fn pieces(data: &[u8], seed: u8) -> impl Iterator<Item = &[u8]> {
    let (mut rest, mut state) = (data, u32::from(seed) << 8 | 1);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let (piece, after) = rest.split_at(rest.len().min(1 + (state % 64) as usize));
        rest = after;
        Some(piece)
    })
}
