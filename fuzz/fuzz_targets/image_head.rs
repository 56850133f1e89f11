//! See `penstock_fuzz::image_head`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::image_head(data));
