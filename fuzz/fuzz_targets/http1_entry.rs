//! See `penstock_fuzz::http1_entry`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::http1_entry(data));
