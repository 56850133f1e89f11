//! See `penstock_fuzz::http2_entry`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::http2_entry(data));
