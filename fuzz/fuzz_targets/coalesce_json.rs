//! See `penstock_fuzz::coalesce_json`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::coalesce_json(data));
