//! See `penstock_fuzz::xds_resources`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| penstock_fuzz::xds_resources(data));
