//! See `penstock_fuzz::metrics_page`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::metrics_page(data));
