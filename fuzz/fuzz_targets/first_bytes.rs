//! See `penstock_fuzz::first_bytes`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::first_bytes(data));
