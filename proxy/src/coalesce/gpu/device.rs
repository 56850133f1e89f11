//! The device: opened, tested, and filled. Everything here may wait, and runs on threads that have nothing else to do.
//!
//! JPEGs are decoded by nvJPEG ([`Decoder`]) where that is asked for, is there, and passes a test of its own; its pixels differ
//! a little from the CPU's.
//!
//! In: a driver's library and a device's number; then runs of the device's memory, and what is to lie there. Out: the
//! same runs, filled. Can go wrong: there is no driver or no device; what comes back is not what was sent; the device is
//! lost. A run that is being filled is kept until the device is done with it, whether anybody waits for that or not.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use penstock_kernels::arena::{Arena, DeviceArena, DeviceRun, Kind};
use penstock_kernels::cuda::{
    Absent, Context, Decoding, Driver, Error, IpcHandle, JpegError, JpegKind, Kernels, NoJpegs, Order,
    Pending, Source, Span, Stream,
};
use penstock_kernels::fused::{self, Format, Frame, Part, Tensor, reference};
use penstock_kernels::normalise::{Channels, Dtype, Layout};
use tokio::sync::oneshot;

use super::jpegs::{self, Decoder};
use crate::prepare::Preparing;
use crate::prepare::line::Turn;
use crate::prepare::pictures::Row;

/// Pinned memory that tensors of ordinary memory pass through on their way, bytes: some batches of photographs.
const STAGING: usize = 64 << 20;
/// Memory of the device for decoded pictures, bytes: two batches of 32 that were decoded at half of 1080p.
const PICTURES: usize = 128 << 20;
/// JPEGs that are decoded at once for one batch, of the eight for which nvJPEG has room at all: two batches do not wait for one
/// another.
const AT_ONCE: usize = 4;
/// How often nvJPEG is asked again that has no room for another file, and how long after; then the CPU decodes it.
const PATIENT: (u32, Duration) = (200, Duration::from_millis(1));
/// Where a picture begins, rows of four-byte pixels could too.
const ALIGN: usize = 256;
/// The unit of all arenas.
pub(super) const SLOT: usize = 4096;
/// Bytes that the self-test sends there and back.
const TESTED: usize = 1 << 20;

/// Why the device cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    /// There is none.
    #[error(transparent)]
    Absent(#[from] Absent),
    /// The driver said no.
    #[error(transparent)]
    Driver(#[from] Error),
    /// There is no memory.
    #[error(transparent)]
    Arena(#[from] penstock_kernels::arena::Error),
    /// A launch was refused.
    #[error(transparent)]
    Order(#[from] Order),
    /// There is no nvJPEG.
    #[error(transparent)]
    NoJpegs(#[from] NoJpegs),
    /// nvJPEG said no.
    #[error(transparent)]
    Jpeg(#[from] JpegError),
    /// Nobody waits for it any more.
    #[error("nobody waits for it any more")]
    Left,
    /// nvJPEG does not do what it should.
    #[error("nvJPEG gives other pixels than the CPU")]
    Pixels,
    /// It does not come to an end.
    #[error("nvJPEG was not done with the picture that is built in within {:?}", jpegs::LIMIT)]
    Late,
    /// Its room for pictures is used up.
    #[error("the GPU has no room for more pictures now")]
    Full,
    /// It does not do what it should.
    #[error("the GPU's self-test failed: {0}")]
    Test(&'static str),
}

/// What a row of an input is made of.
#[derive(Clone, Debug)]
pub(super) struct Picture {
    /// Its pixels, or a JPEG.
    pub(super) bytes: Bytes,
    /// It is still to be decoded: whose it is.
    pub(super) jpeg: Option<Arc<Row>>,
    /// How its pixels lie.
    pub(super) frame: Frame,
    /// What becomes of them.
    pub(super) part: Part,
}

/// What is to lie in rows of an input.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// The tensor, as it is.
    Bytes(Bytes),
    /// The same in memory that the device reads by itself.
    Pinned(Bytes),
    /// Pictures, each of which becomes such a row; of one that there is nothing of zeros are left.
    Pictures(Vec<Option<Picture>>, Tensor),
}

/// The thread that fills a run, while it unpacks files. Dropped when that is done.
#[derive(Debug)]
pub(super) struct Unpacking {
    /// It is one of the threads that prepare.
    pub(super) _turn: Turn,
    /// Where what it decodes itself is counted.
    pub(super) preparing: Arc<Preparing>,
    /// Nobody waits for it any more.
    pub(super) stopped: Arc<AtomicBool>,
    /// Hears, by its end, that nothing is left but to wait for the device.
    pub(super) _done: oneshot::Sender<()>,
}

/// A run that was filled.
#[derive(Debug)]
pub(super) struct Filled {
    pub(super) run: DeviceRun,
    /// JPEGs that nvJPEG decoded.
    pub(super) decoded: u64,
    /// And those that it did not take.
    pub(super) refused: u64,
}

/// What has been begun for a run.
#[derive(Default)]
struct Work {
    flights: Vec<Flight>,
    unpacking: Option<Unpacking>,
    decoded: u64,
    refused: u64,
}

/// What an input is filled with: pieces, one after the other, with their rows.
pub(super) type Input = Vec<(u32, Piece)>;

/// A device that is ready.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) context: Context,
    stream: Stream,
    /// `None`: none that fit it, or they do not give the CPU's bits.
    pub(super) kernels: Option<Kernels>,
    pub(super) staging: Option<Arena>,
    /// Where pictures lie while kernels read them. Got once, since getting memory waits for all that the device does.
    pictures: DeviceArena,
    /// `None` within: there is none that could be used. Opened when it is first asked for.
    jpegs: OnceLock<Option<Decoder>>,
}

/// Something that is on its way, to be waited for.
type Flight = Box<dyn FnOnce() -> Result<(), Error> + Send>;

impl Device {
    /// Opens and tests it.
    pub(super) fn open(library: &Path, number: u32) -> Result<Self, Unfit> {
        let context = Driver::open(library)?.context(number)?;
        let stream = context.stream()?;
        let staging = Arena::new(Kind::Pinned { context: &context }, STAGING, SLOT)
            .inspect_err(|error| tracing::warn!(%error, "tensors are copied to the GPU from ordinary memory"))
            .ok();
        let pictures = DeviceArena::new(&context, PICTURES, SLOT)?;
        let mut device = Self { context, stream, kernels: None, staging, pictures, jpegs: OnceLock::new() };
        device.test_memory()?;
        // Without kernels tensors are copied all the same.
        device.kernels = device
            .test_kernels()
            .inspect_err(|error| tracing::warn!(%error, "images are prepared on the CPU, not on the GPU"))
            .ok();
        Ok(device)
    }

    /// Whether nvJPEG is there. Waits for nothing.
    pub(super) fn has_jpegs(&self) -> bool {
        self.jpegs.get().is_some_and(Option::is_some)
    }

    /// As [`Jpegs::room`](penstock_kernels::cuda::Jpegs::room).
    pub(super) fn jpegs_room(&self) -> Option<(usize, u64)> {
        Some(self.jpegs.get()?.as_ref()?.jpegs.room())
    }

    /// Looks for nvJPEG, and tests it; the first time only.
    pub(super) fn open_jpegs(&self, library: Option<&Path>) {
        self.jpegs.get_or_init(|| {
            // Without kernels its pixels would have no use.
            self.kernels.as_ref()?;
            match Decoder::open(&self.context, library) {
                Ok(decoder) => {
                    let (major, minor, patch) = decoder.jpegs.version();
                    let version = format!("{major}.{minor}.{patch}");
                    let device = &self.context.device().name;
                    let strict = decoder.jpegs.is_strict();
                    tracing::info!(version, strict, %device, "JPEGs may be decoded by nvJPEG");
                    Some(decoder)
                }
                Err(Unfit::NoJpegs(none)) => {
                    tracing::warn!("{none}");
                    None
                }
                Err(error) => {
                    tracing::warn!(%error, "nvJPEG is not used; JPEGs are decoded on the CPU");
                    None
                }
            }
        });
    }

    /// A region for model servers, and its handle.
    pub(super) fn region(&self, bytes: usize) -> Result<(DeviceArena, IpcHandle), Unfit> {
        let arena = DeviceArena::new(&self.context, bytes, SLOT)?;
        let handle = arena.memory().export()?;
        Ok((arena, handle))
    }

    /// What is sent comes back, and can be exported.
    fn test_memory(&self) -> Result<(), Unfit> {
        const NO_ROOM: Unfit = Unfit::Test("its memory has no room");
        let arena = DeviceArena::new(&self.context, 2 * TESTED, SLOT)?;
        arena.memory().export()?;
        let sent: Vec<u8> = (0..TESTED).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 11) as u8).collect();
        let run = arena.run(&[TESTED / 2], 2).ok_or(NO_ROOM)?;
        let piece = Piece::Bytes(Bytes::from(sent.clone()));
        let Filled { run, .. } = self.fill(&arena, run, 2, vec![vec![(2, piece)]], None)?;
        let found = self.download(&arena, &run, TESTED)?;
        if found != sent {
            return Err(Unfit::Test("bytes that were copied there and back are others"));
        }
        Ok(())
    }

    /// Kernels give the bits that the CPU gives.
    fn test_kernels(&self) -> Result<Kernels, Unfit> {
        const NO_ROOM: Unfit = Unfit::Test("its memory has no room");
        const WRONG: Unfit = Unfit::Test("a kernel gives other bits than the CPU");
        let kernels = Kernels::load(&self.context)?;
        let frame = Frame::tight(Format::Rgb, 61, 47);
        let bytes = frame.bytes().ok_or(WRONG)?;
        let pixels: Vec<u8> = (0..bytes).map(|at| (at.wrapping_mul(0x85eb_ca6b) >> 9) as u8).collect();
        let tensor = Tensor {
            width: 24,
            height: 20,
            channels: Channels::Rgb,
            layout: Layout::Planar,
            dtype: Dtype::F16,
            mul: [1.0 / 255.0, 0.02, 0.01],
            add: [-0.5, 0.25, 0.0],
        };
        let part = Part::whole(&frame, (24, 20));
        let wanted = reference::exact(&frame, &pixels, &part, &tensor).map_err(|_| WRONG)?;
        let arena = DeviceArena::new(&self.context, 4 * SLOT, SLOT)?;
        let run = arena.run(&[tensor.bytes()], 1).ok_or(NO_ROOM)?;
        let picture = Some(Picture { bytes: pixels.into(), jpeg: None, frame, part });
        let to = run.span(0, 0..1).ok_or(NO_ROOM)?;
        let mut work = Work::default();
        self.launch((&kernels, None), &run, &[picture], &tensor, &to, &mut work)?;
        landed(&mut work.flights)?;
        if self.download(&arena, &run, tensor.bytes())? == wanted { Ok(kernels) } else { Err(WRONG) }
    }

    fn download(&self, arena: &DeviceArena, run: &DeviceRun, bytes: usize) -> Result<Vec<u8>, Unfit> {
        let landing = Arena::new(Kind::Heap, bytes, SLOT)?;
        let landing = landing.run(&[bytes], 1).and_then(|run| run.seal());
        let landing = landing.ok_or(Unfit::Test("there is no room for what comes back"))?;
        let at = run.whole().start;
        let (landed, _) = self.stream.download(arena.memory(), at, landing, 0, 0..1)?.wait()?;
        Ok(landed.input(0, 0..1).unwrap_or_default().to_vec())
    }

    /// Fills a run of so many rows, all of it, and waits until that is done. Where there are JPEGs among what it is filled with,
    /// this thread has to have its turn to unpack them.
    pub(super) fn fill(
        &self,
        arena: &DeviceArena,
        run: DeviceRun,
        rows: u32,
        inputs: Vec<Input>,
        unpacking: Option<Unpacking>,
    ) -> Result<Filled, Unfit> {
        const MISFIT: Unfit = Unfit::Test("tensors and their place differ in size");
        let mut work = Work { unpacking, ..Work::default() };
        // Whatever another left there is gone before anything is seen of it, also between the inputs.
        self.keep(&run, self.stream.fill(arena.memory(), run.whole(), 0)?, &mut work.flights);
        for (number, pieces) in inputs.into_iter().enumerate() {
            let mut row = 0;
            for (count, piece) in pieces {
                let end = row + count;
                let to = run.span(number, row..end).filter(|_| end <= rows).ok_or(MISFIT)?;
                let at = run.region(number, row..end).ok_or(MISFIT)?.offset as usize;
                row = end;
                match piece {
                    Piece::Bytes(bytes) if bytes.len() == to.bytes() => {
                        let copy = self.stream.upload(self.staged(bytes), arena.memory(), at)?;
                        self.keep(&run, copy, &mut work.flights);
                    }
                    Piece::Pinned(bytes) if bytes.len() == to.bytes() => {
                        let copy = self.stream.upload(bytes, arena.memory(), at)?;
                        self.keep(&run, copy, &mut work.flights);
                    }
                    Piece::Pictures(pictures, tensor) => {
                        let kernels = self.kernels.as_ref().ok_or(MISFIT)?;
                        let decoder = self.jpegs.get().and_then(Option::as_ref);
                        self.launch((kernels, decoder), &run, &pictures, &tensor, &to, &mut work)?;
                    }
                    Piece::Bytes(_) | Piece::Pinned(_) => return Err(MISFIT),
                }
            }
            if row != rows {
                return Err(MISFIT);
            }
        }
        let Work { mut flights, unpacking, decoded, refused } = work;
        // Another may have the thread's turn: this one only waits.
        drop(unpacking);
        landed(&mut flights)?;
        Ok(Filled { run, decoded, refused })
    }

    /// Keeps a run for as long as something is on its way there.
    fn keep<T: Send + 'static>(
        &self,
        run: &DeviceRun,
        pending: penstock_kernels::cuda::Pending<T>,
        flights: &mut Vec<Flight>,
    ) {
        let pending = pending.keeping(run.clone());
        flights.push(Box::new(move || pending.wait().map(drop)));
    }

    /// Pictures to tensors: each is copied or decoded once, and each format of them is one launch; of very many, or very
    /// large ones, one part after the other.
    fn launch(
        &self,
        by: (&Kernels, Option<&Decoder>),
        run: &DeviceRun,
        pictures: &[Option<Picture>],
        tensor: &Tensor,
        to: &Span,
        work: &mut Work,
    ) -> Result<(), Unfit> {
        const MISFIT: Unfit = Unfit::Test("pictures and their place differ in number");
        let mut first = 0;
        while first < pictures.len() {
            let count = together(&pictures[first..]);
            let part = first * tensor.bytes()..(first + count) * tensor.bytes();
            let to = to.part(part).ok_or(MISFIT)?;
            self.launch_some(by, run, &pictures[first..first + count], tensor, &to, work)?;
            first += count;
        }
        Ok(())
    }

    fn launch_some(
        &self,
        (kernels, decoder): (&Kernels, Option<&Decoder>),
        run: &DeviceRun,
        pictures: &[Option<Picture>],
        tensor: &Tensor,
        to: &Span,
        work: &mut Work,
    ) -> Result<(), Unfit> {
        const MISFIT: Unfit = Unfit::Test("pictures and their place differ in number");
        let mut places = Vec::with_capacity(pictures.len());
        let mut end = 0usize;
        for picture in pictures {
            let bytes = picture.as_ref().map_or(Some(0), Picture::room).ok_or(MISFIT)?;
            places.push(end..end + bytes);
            end = (end + bytes).next_multiple_of(ALIGN);
        }
        let room = match self.pictures.run(&[end.max(ALIGN)], 1) {
            Some(room) => room,
            None => {
                // What is on its way may have all of it.
                landed(&mut work.flights)?;
                self.pictures.run(&[end.max(ALIGN)], 1).ok_or(Unfit::Full)?
            }
        };
        let whole = room.span(0, 0..1).ok_or(MISFIT)?;
        let begin = room.whole().start;
        let mut sources = Vec::with_capacity(pictures.len());
        for (picture, place) in pictures.iter().zip(places) {
            let Some(mut picture) = picture.clone() else {
                sources.push(None);
                continue;
            };
            let mut to = whole.part(place.clone()).ok_or(MISFIT)?;
            if let Some(jpeg) = picture.jpeg.clone() {
                let decoder = decoder.ok_or(Unfit::Test("nvJPEG is asked for and is not there"))?;
                if let Some(decode) = self.unpack(decoder, &picture, &jpeg, &to, work)? {
                    self.keep(&room, decode, &mut work.flights);
                    sources.push(Some(Source { bytes: to, frame: picture.frame, part: picture.part }));
                    continue;
                }
                match Picture::of(&jpeg) {
                    Some(pixels) if pixels.jpeg.is_none() => picture = pixels,
                    Some(_) => return Err(Unfit::Left),
                    None => {
                        sources.push(None);
                        continue;
                    }
                }
                // At full size at most, as its place is.
                if picture.bytes.len() > place.len() || !fits(&picture, tensor) {
                    return Err(MISFIT);
                }
                to = whole.part(place.start..place.start + picture.bytes.len()).ok_or(MISFIT)?;
            }
            let Picture { bytes, frame, part, .. } = picture;
            let copy = self.stream.upload(bytes, self.pictures.memory(), begin + place.start)?;
            self.keep(&room, copy, &mut work.flights);
            sources.push(Some(Source { bytes: to, frame, part }));
        }
        let format = |source: &Option<Source>| source.as_ref().map(|source| source.frame.format);
        let mut first = 0;
        for alike in sources.chunk_by(|a, b| format(a) == format(b)) {
            let part = first * tensor.bytes()..(first + alike.len()) * tensor.bytes();
            first += alike.len();
            let to = to.part(part).ok_or(MISFIT)?;
            let alike: Vec<Source> = alike.iter().flatten().cloned().collect();
            if !alike.is_empty() {
                let launch = kernels.prepare(&self.stream, &alike, tensor, &to)?;
                self.keep(run, launch.keeping(room.clone()), &mut work.flights);
            }
        }
        Ok(())
    }

    /// Has nvJPEG decode a file. `None`: it does not take this one, and this thread has decoded it, or found out what is wrong
    /// with it.
    fn unpack(
        &self,
        decoder: &Decoder,
        Picture { bytes, frame, .. }: &Picture,
        jpeg: &Row,
        to: &Span,
        work: &mut Work,
    ) -> Result<Option<Pending<Decoding>>, Unfit> {
        let Work { flights, unpacking, decoded, refused } = work;
        let unpacking = unpacking.as_ref().ok_or(Unfit::Test("files are unpacked out of turn"))?;
        let mut asked = 0;
        loop {
            if unpacking.stopped.load(Relaxed) {
                return Err(Unfit::Left);
            }
            let error = match decoder.jpegs.decode(&self.stream, bytes.clone(), frame, to) {
                Ok(decode) => {
                    *decoded += 1;
                    return Ok(Some(decode));
                }
                Err(error) => error,
            };
            if error.kind() == JpegKind::Busy {
                landed(flights)?;
                asked += 1;
                if asked < PATIENT.0 {
                    // Others' decodes have all of the room, and nobody says when they are done.
                    if asked > 1 {
                        self.context.reap();
                        std::thread::park_timeout(PATIENT.1);
                    }
                    continue;
                }
            }
            let error = decoder.judge(error)?;
            tracing::debug!(%error, "a JPEG is decoded on the CPU");
            *refused += 1;
            jpeg.decode_here(&unpacking.preparing, &unpacking.stopped, self.staging.as_ref());
            return Ok(None);
        }
    }

    /// The same bytes in pinned memory, which the device reads by itself; where there is no room for them, as they are.
    fn staged(&self, bytes: Bytes) -> Bytes {
        let pinned = || {
            let run = self.staging.as_ref()?.run(&[bytes.len()], 1)?;
            run.rows(0, 1)?.write(0, 0, &bytes).ok()?;
            run.seal()?.freeze().bytes(0, 0..1)
        };
        pinned().unwrap_or(bytes)
    }
}

impl Picture {
    /// A row as it is now; `None`: there is nothing of it.
    pub(super) fn of(row: &Arc<Row>) -> Option<Self> {
        let (bytes, picture, is_jpeg) = row.now()?;
        let (frame, part) = (picture.frame(), picture.part());
        Some(Self { bytes: bytes.clone(), jpeg: is_jpeg.then(|| Arc::clone(row)), frame, part })
    }

    /// Bytes of the device's memory that its pixels take; `None`: no number has so many.
    fn room(&self) -> Option<usize> {
        if self.jpeg.is_some() { self.frame.bytes() } else { Some(self.bytes.len()) }
    }
}

/// Waits for all that is on its way.
fn landed(flights: &mut Vec<Flight>) -> Result<(), Unfit> {
    Ok(std::mem::take(flights).into_iter().try_for_each(|wait| wait())?)
}

/// How many of them are made together, one at least: as have room in half of the memory for pictures, and no more JPEGs
/// than are decoded at once.
fn together(pictures: &[Option<Picture>]) -> usize {
    let size = |picture: &Picture| (picture.room().unwrap_or(usize::MAX), picture.jpeg.is_some());
    fitting(pictures.iter().map(|picture| picture.as_ref().map_or((0, false), size)))
}

/// The same of pictures' bytes, and whether each is a JPEG.
fn fitting(pictures: impl Iterator<Item = (usize, bool)>) -> usize {
    let (mut bytes, mut jpegs) = (0usize, 0);
    let fit = pictures.take_while(|(room, is_jpeg)| {
        bytes = bytes.saturating_add(*room).saturating_add(ALIGN);
        jpegs += usize::from(*is_jpeg);
        bytes <= PICTURES / 2 && jpegs <= AT_ONCE
    });
    fit.count().max(1)
}

/// Whether a kernel can make that of it.
pub(super) fn fits(picture: &Picture, tensor: &Tensor) -> bool {
    let found = picture.room().unwrap_or_default();
    fused::check(&picture.frame, found, &picture.part, tensor).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_made_in_parts_that_have_room() {
        let of = |width: usize, height: usize, is_jpeg, count| {
            fitting(std::iter::repeat_n((3 * width * height, is_jpeg), count))
        };
        assert_eq!(of(100, 100, true, 20), AT_ONCE);
        // Of 1080p ten would fit, of 16 megapixels one.
        assert_eq!(of(1920, 1080, true, 20), AT_ONCE);
        assert_eq!(of(4096, 4096, true, 3), 1);
        assert_eq!(of(9000, 9000, true, 1), 1, "one that has no room is told so when it is tried");
        assert_eq!(of(10, 100, false, 100), 100, "what is decoded is copied all at once");
    }
}
