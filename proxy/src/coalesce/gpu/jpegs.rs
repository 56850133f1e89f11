//! nvJPEG on a device, and the photograph that shows that it works.
//!
//! In: a device, and the library. Out: a [`Decoder`], which was tested. The same test tells later whose fault it is when the
//! library says of a file what it says of single files and of a device that is broken alike. Can go wrong: whatever the
//! library says; pixels that are another picture's ([`NEAR`]); a decode that does not end. The test has a stream of its own, so
//! that one that never ends holds up nothing else, and it is not waited for longer than [`LIMIT`].

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use penstock_kernels::arena::{Arena, DeviceArena, Kind};
use penstock_kernels::cuda::{Context, JpegError, JpegKind, Jpegs, Pending, Stream};
use penstock_kernels::fused::Frame;
use penstock_prepare::{Limits, Pipeline, Scratch};
use tokio::time::Instant;

use super::device::{SLOT, Unfit};

/// A small photograph with colours, 4:2:0.
const PHOTO: &[u8] = include_bytes!("photo.jpg");
/// What makes its pixels.
const PIPELINE: &str =
    r#"{"crop":{"width":97,"height":61},"jpeg-scaling":"off","dtype":"u8","layout":"nhwc"}"#;
/// How near nvJPEG's pixels have to be to the CPU's in the test, in 255ths: on average, and for all but one sample in a
/// hundred. Decoders differ by some units in what the standard leaves open, and by more at the edges of colours, which
/// some interpolate; another order of colours, or another picture, is further away by far.
const NEAR: (f64, u8) = (3.0, 48);
/// How long the device may take for it. It is done in microseconds; what comes before it on the device is some batches.
pub(super) const LIMIT: Duration = Duration::from_secs(2);
/// How often it is asked for.
const GLANCE: Duration = Duration::from_millis(1);

/// nvJPEG, tested.
#[derive(Debug)]
pub(super) struct Decoder {
    pub(super) jpegs: Jpegs,
    photo: Photo,
}

/// What the photograph becomes, and where.
#[derive(Debug)]
struct Photo {
    frame: Frame,
    wanted: Vec<u8>,
    arena: DeviceArena,
    stream: Stream,
    /// One test at a time.
    turn: Mutex<()>,
}

impl Photo {
    fn new(context: &Context) -> Result<Self, Unfit> {
        const FAULT: Unfit = Unfit::Test("the picture that is built in cannot be decoded");
        let declared = serde_json::from_str(PIPELINE).map_err(|_| FAULT)?;
        let pipeline = Pipeline::new(&declared).map_err(|_| FAULT)?;
        let limits = Limits::default();
        let mut wanted = vec![0; pipeline.bytes()];
        pipeline.run(PHOTO, &mut wanted, &mut Scratch::default(), &limits, &|| false).map_err(|_| FAULT)?;
        let frame = pipeline.undecoded(PHOTO, &limits, u64::MAX).ok_or(FAULT)?.frame();
        let arena = DeviceArena::new(context, wanted.len(), SLOT)?;
        Ok(Self { frame, wanted, arena, stream: context.stream()?, turn: Mutex::default() })
    }
}

impl Decoder {
    /// Opens the library, and tests it.
    pub(super) fn open(context: &Context, library: Option<&Path>) -> Result<Self, Unfit> {
        let jpegs = Jpegs::open(context, library)?;
        let decoder = Self { jpegs, photo: Photo::new(context)? };
        match decoder.test() {
            Ok(()) => Ok(decoder),
            Err(error) => {
                // Its decode may be on its way for ever, and whether ending a stream waits for what is on it is the
                // driver's choice.
                if matches!(error, Unfit::Late) {
                    std::mem::forget(decoder);
                }
                Err(error)
            }
        }
    }

    /// Whether it gives the pixels that the CPU gives, as far as two decoders do.
    fn test(&self) -> Result<(), Unfit> {
        let Photo { frame, wanted, arena, stream, turn } = &self.photo;
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = wanted.len();
        // One that was late has it until the device is done.
        let run = arena.run(&[bytes], 1).ok_or(Unfit::Late)?;
        let to = run.span(0, 0..1).ok_or(Unfit::Late)?;
        within(self.jpegs.decode(stream, Bytes::from_static(PHOTO), frame, &to)?.keeping(run.clone()))?;
        let landing = Arena::new(Kind::Heap, bytes, SLOT)?.run(&[bytes], 1).and_then(|run| run.seal());
        let landing = landing.ok_or(Unfit::Test("there is no room for what comes back"))?;
        let copy = stream.download(arena.memory(), run.whole().start, landing, 0, 0..1)?.keeping(run);
        let ((landed, _), _) = within(copy)?;
        if are_near(landed.input(0, 0..1).unwrap_or_default(), wanted) { Ok(()) } else { Err(Unfit::Pixels) }
    }

    /// Whose fault it was that a file was not decoded: `Ok`, the file's alone; an error: the library's, or the device's.
    pub(super) fn judge(&self, error: JpegError) -> Result<JpegError, Unfit> {
        match error.kind() {
            JpegKind::File => Ok(error),
            JpegKind::Doubtful => match self.test() {
                Ok(()) => Ok(error),
                // It works for others.
                Err(Unfit::Jpeg(busy)) if busy.kind() == JpegKind::Busy => Ok(error),
                Err(fault) => Err(fault),
            },
            JpegKind::Busy | JpegKind::Passing | JpegKind::Broken | JpegKind::Driver => {
                Err(Unfit::Jpeg(error))
            }
        }
    }
}

/// Waits for something, but not for ever. What is late stays with the context until the device is done with it.
fn within<T: Send + 'static>(mut pending: Pending<T>) -> Result<T, Unfit> {
    let begun = Instant::now();
    loop {
        match pending.poll()? {
            Some(done) => return Ok(done),
            None if begun.elapsed() >= LIMIT => return Err(Unfit::Late),
            None => std::thread::park_timeout(GLANCE),
        }
    }
}

/// Whether two decoders' samples may be of the same picture.
fn are_near(found: &[u8], wanted: &[u8]) -> bool {
    let off = || found.iter().zip(wanted).map(|(found, wanted)| found.abs_diff(*wanted));
    let mean = off().map(f64::from).sum::<f64>() / wanted.len().max(1) as f64;
    let far = off().filter(|off| *off > NEAR.1).count();
    found.len() == wanted.len() && mean <= NEAR.0 && far * 100 <= wanted.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_picture_is_not_near() {
        let wanted: Vec<u8> = (0..3000u32).map(|at| (at * 7 % 256) as u8).collect();
        let changed = |change: fn(usize, u8) -> u8| -> Vec<u8> {
            wanted.iter().enumerate().map(|(at, byte)| change(at, *byte)).collect()
        };
        assert!(are_near(&wanted, &wanted));
        assert!(are_near(&changed(|_, byte| byte.saturating_add(3)), &wanted), "another rounding");
        assert!(are_near(&changed(|at, byte| if at % 200 == 0 { !byte } else { byte }), &wanted), "edges");
        assert!(!are_near(&changed(|_, byte| byte.saturating_add(12)), &wanted));
        assert!(!are_near(&changed(|at, byte| if at % 20 == 0 { !byte } else { byte }), &wanted));
        let mut turned = wanted.clone();
        turned.chunks_exact_mut(3).for_each(|pixel| pixel.reverse());
        assert!(!are_near(&turned, &wanted), "BGR");
        assert!(!are_near(&wanted[1..], &wanted) && !are_near(&[], &wanted));
    }
}
