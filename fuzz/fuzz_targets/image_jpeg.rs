//! See `penstock_fuzz::image_jpeg`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::image_jpeg(data));
