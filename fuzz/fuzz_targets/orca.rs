//! See `penstock_fuzz::orca`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::orca(data));
