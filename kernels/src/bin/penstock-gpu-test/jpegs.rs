//! nvJPEG, where there is one: its pixels beside libjpeg's, and pictures per second.

use std::path::Path;

use bytes::Bytes;
use penstock_kernels::cuda::Jpegs;
use penstock_kernels::fused::{Format, Frame};

use crate::bed::{Bed, Failure, wrong};

/// 97 x 61, colours at half the resolution, and what Pillow (libjpeg-turbo) makes of it: RGB, 8 bits, row by row.
const PHOTO: &[u8] = include_bytes!("../../../../proxy/prepare/tests/images/baseline-420.jpg");
const PIXELS: &[u8] = include_bytes!("photo.rgb");
const SIZE: (u32, u32) = (97, 61);
/// 640 x 427: what is timed.
const LARGE: &[u8] = include_bytes!("../../../../proxy/prepare/tests/images/large.jpg");
const LARGE_SIZE: (u32, u32) = (640, 427);
/// Decodes that are timed.
const TIMES: u32 = 100;
/// How far decoders may differ, as the sidecar's own test has it: on average, and all but one sample in a hundred, of 255.
const NEAR: (f64, u8) = (3.0, 48);

/// Decodes both pictures by the library at `path`, or the machine's own. Says so where there is none, which is no failure.
pub(crate) fn check(bed: &Bed, path: Option<&Path>) -> Result<String, Failure> {
    let jpegs = match Jpegs::open(&bed.context, path) {
        Ok(jpegs) => jpegs,
        Err(none) => return Ok(format!("skipped: {none}")),
    };
    let told = |error| wrong(format!("{error}"));
    let frame = Frame::tight(Format::Rgb, SIZE.0, SIZE.1);
    let place = bed.context.alloc(PIXELS.len())?;
    jpegs.decode(&bed.stream, Bytes::from_static(PHOTO), &frame, &place.whole()).map_err(told)?.wait()?;
    let found = bed.download(&place)?;
    let off = || found.iter().zip(PIXELS).map(|(found, right)| found.abs_diff(*right));
    let mean = off().map(f64::from).sum::<f64>() / PIXELS.len() as f64;
    let far = off().filter(|off| *off > NEAR.1).count();
    let most = off().max().unwrap_or_default();
    if mean > NEAR.0 || far * 100 > PIXELS.len() {
        return Err(wrong(format!(
            "pixels differ from libjpeg's by {mean:.2} on average, by {most} at most, and {far} by more than {}",
            NEAR.1
        )));
    }
    let frame = Frame::tight(Format::Rgb, LARGE_SIZE.0, LARGE_SIZE.1);
    let place = bed.context.alloc(frame.bytes().unwrap_or_default())?;
    // By the device's clock, on which the time between two decodes counts as well.
    let begin = bed.stream.mark()?;
    for _ in 0..TIMES {
        let file = Bytes::from_static(LARGE);
        jpegs.decode(&bed.stream, file, &frame, &place.whole()).map_err(told)?.wait()?;
    }
    let seconds = f64::from(bed.stream.mark()?.milliseconds_since(&begin)?) / 1000.0;
    let rate = f64::from(TIMES) / seconds;
    let (major, minor, patch) = jpegs.version();
    Ok(format!(
        "{major}.{minor}.{patch}: {mean:.2} of 255 from libjpeg on average, {most} at most; {rate:.0} pictures of {} x {} a second, one after the other",
        LARGE_SIZE.0, LARGE_SIZE.1
    ))
}
