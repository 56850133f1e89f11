//! See `penstock_fuzz::openai`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::openai(data));
