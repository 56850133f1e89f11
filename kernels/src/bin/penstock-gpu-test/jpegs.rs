//! nvJPEG, where there is one: its pixels beside libjpeg's, and pictures per second.

use std::path::Path;

use bytes::Bytes;
use penstock_kernels::cuda::{JpegError, Jpegs, NoJpegs};
use penstock_kernels::fused::{Format, Frame};

use crate::bed::{Bed, Failure, Said, wrong};

/// What each file is, and what Pillow (libjpeg-turbo) makes of it, row by row: RGB, or gray, 8 bits, 97 x 61. The first two
/// have the same coefficients, so they have the same pixels.
const FILES: [(&str, &[u8], Format, &[u8]); 3] = [
    (
        "baseline",
        include_bytes!("../../../../proxy/prepare/tests/images/baseline-420.jpg"),
        Format::Rgb,
        include_bytes!("photo.rgb"),
    ),
    (
        "progressive",
        include_bytes!("../../../../proxy/prepare/tests/images/progressive.jpg"),
        Format::Rgb,
        include_bytes!("photo.rgb"),
    ),
    (
        "gray",
        include_bytes!("../../../../proxy/prepare/tests/images/gray.jpg"),
        Format::Gray,
        include_bytes!("gray.luma"),
    ),
];
const SIZE: (u32, u32) = (97, 61);
/// 640 x 427: what is timed.
const LARGE: &[u8] = include_bytes!("../../../../proxy/prepare/tests/images/large.jpg");
const LARGE_SIZE: (u32, u32) = (640, 427);
/// Decodes that are timed.
const TIMES: u32 = 100;
/// How far decoders may differ, as the sidecar's own test has it: on average, and all but one sample in a hundred, of 255.
const NEAR: (f64, u8) = (3.0, 48);

/// Decodes all of them by the library at `path`, or the machine's own. Where the machine has none and nobody named one this is
/// skipped; one that is there has to work.
pub(crate) fn check(bed: &Bed, path: Option<&Path>) -> Result<Said, Failure> {
    let jpegs = match Jpegs::open(&bed.context, path) {
        Ok(jpegs) => jpegs,
        Err(none @ NoJpegs::Library { .. }) if path.is_none() => return Ok(Said::Skipped(none.to_string())),
        Err(none) => return Err(wrong(none.to_string())),
    };
    let mut distances = Vec::new();
    for (name, file, format, pixels) in FILES {
        let (mean, most) = distance(bed, &jpegs, file, format, pixels).map_err(|failure| match failure {
            Failure::Wrong(told) => wrong(format!("{name}: {told}")),
            other => other,
        })?;
        distances.push(format!("{name} {mean:.2} of 255 from libjpeg on average, {most} at most"));
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
    Ok(Said::Done(format!(
        "{major}.{minor}.{patch}: {}; {rate:.0} pictures of {} x {} a second, one after the other",
        distances.join(", "),
        LARGE_SIZE.0,
        LARGE_SIZE.1
    )))
}

fn told(error: JpegError) -> Failure {
    wrong(error.to_string())
}

/// How far a file's pixels are from those that are right, on average and at most.
fn distance(
    bed: &Bed,
    jpegs: &Jpegs,
    file: &'static [u8],
    format: Format,
    pixels: &[u8],
) -> Result<(f64, u8), Failure> {
    let frame = Frame::tight(format, SIZE.0, SIZE.1);
    let place = bed.context.alloc(pixels.len())?;
    jpegs.decode(&bed.stream, Bytes::from_static(file), &frame, &place.whole()).map_err(told)?.wait()?;
    let found = bed.download(&place)?;
    let off = || found.iter().zip(pixels).map(|(found, right)| found.abs_diff(*right));
    let mean = off().map(f64::from).sum::<f64>() / pixels.len() as f64;
    let far = off().filter(|off| *off > NEAR.1).count();
    let most = off().max().unwrap_or_default();
    if mean > NEAR.0 || far * 100 > pixels.len() {
        return Err(wrong(format!(
            "pixels differ from libjpeg's by {mean:.2} on average, by {most} at most, and {far} by more than {}",
            NEAR.1
        )));
    }
    Ok((mean, most))
}
