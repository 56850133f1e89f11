//! See `penstock_fuzz::oip_prefix`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::oip_prefix(data));
