//! The device: opened, tested, and filled. Everything here may wait, and runs on threads that have nothing else to do.
//!
//! JPEGs are decoded by nvJPEG ([`Decoder`]) where that is asked for, is there, and passes a test of its own; its pixels differ
//! a little from the CPU's.
//!
//! In: a driver's library and a device's number; then runs of the device's memory, and what is to lie there. Out: the
//! same runs, filled. Can go wrong: there is no driver or no device; what comes back is not what was sent; the device is
//! lost. A run that is being filled is kept until the device is done with it, whether anybody waits for that or not.

use std::path::Path;
use std::sync::OnceLock;

use bytes::Bytes;
use penstock_kernels::arena::{Arena, DeviceArena, DeviceRun, Kind};
use penstock_kernels::cuda::{
    Absent, Context, Driver, Error, IpcHandle, JpegError, JpegKind, Kernels, NoJpegs, Order, Source, Span,
    Stream,
};
use penstock_kernels::fused::{self, Format, Frame, Part, Tensor, reference};
use penstock_kernels::normalise::{Channels, Dtype, Layout};

use super::jpegs::{self, Decoder};

/// Pinned memory that tensors of ordinary memory pass through on their way, bytes: some batches of photographs.
const STAGING: usize = 64 << 20;
/// Memory of the device for decoded pictures, bytes: two batches of 32 that were decoded at half of 1080p.
const PICTURES: usize = 128 << 20;
/// JPEGs that are decoded at once for one batch: each takes memory of nvJPEG's besides its pixels.
const AT_ONCE: usize = 8;
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
    /// The same, and it is the file's fault alone.
    #[error("{0}; another file is decoded, so it is this one's fault")]
    Refused(JpegError),
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
    /// It is still to be decoded.
    pub(super) is_jpeg: bool,
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
    /// Pictures, each of which becomes such a row.
    Pictures(Vec<Picture>, Tensor),
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
                    tracing::info!(version, %device, "JPEGs may be decoded by nvJPEG");
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
        let run = self.fill(&arena, run, 2, vec![vec![(2, piece)]])?;
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
        let picture = Picture { bytes: pixels.into(), is_jpeg: false, frame, part };
        let to = run.span(0, 0..1).ok_or(NO_ROOM)?;
        let mut flights = Vec::new();
        self.launch((&kernels, None), &run, &[picture], &tensor, &to, &mut flights)?;
        flights.into_iter().try_for_each(|wait| wait())?;
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

    /// Fills a run of so many rows, all of it, and waits until that is done.
    pub(super) fn fill(
        &self,
        arena: &DeviceArena,
        run: DeviceRun,
        rows: u32,
        inputs: Vec<Input>,
    ) -> Result<DeviceRun, Unfit> {
        const MISFIT: Unfit = Unfit::Test("tensors and their place differ in size");
        let mut flights: Vec<Flight> = Vec::new();
        // Whatever another left there is gone before anything is seen of it, also between the inputs.
        self.keep(&run, self.stream.fill(arena.memory(), run.whole(), 0)?, &mut flights);
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
                        self.keep(&run, copy, &mut flights);
                    }
                    Piece::Pinned(bytes) if bytes.len() == to.bytes() => {
                        let copy = self.stream.upload(bytes, arena.memory(), at)?;
                        self.keep(&run, copy, &mut flights);
                    }
                    Piece::Pictures(pictures, tensor) => {
                        let kernels = self.kernels.as_ref().ok_or(MISFIT)?;
                        let decoder = self.jpegs.get().and_then(Option::as_ref);
                        self.launch((kernels, decoder), &run, &pictures, &tensor, &to, &mut flights)?;
                    }
                    Piece::Bytes(_) | Piece::Pinned(_) => return Err(MISFIT),
                }
            }
            if row != rows {
                return Err(MISFIT);
            }
        }
        // One stream does one after the other: when the last is done all are.
        flights.into_iter().try_for_each(|wait| wait())?;
        Ok(run)
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
        pictures: &[Picture],
        tensor: &Tensor,
        to: &Span,
        flights: &mut Vec<Flight>,
    ) -> Result<(), Unfit> {
        const MISFIT: Unfit = Unfit::Test("pictures and their place differ in number");
        let mut first = 0;
        while first < pictures.len() {
            let count = together(&pictures[first..]);
            let part = first * tensor.bytes()..(first + count) * tensor.bytes();
            let to = to.part(part).ok_or(MISFIT)?;
            self.launch_some(by, run, &pictures[first..first + count], tensor, &to, flights)?;
            first += count;
        }
        Ok(())
    }

    fn launch_some(
        &self,
        (kernels, decoder): (&Kernels, Option<&Decoder>),
        run: &DeviceRun,
        pictures: &[Picture],
        tensor: &Tensor,
        to: &Span,
        flights: &mut Vec<Flight>,
    ) -> Result<(), Unfit> {
        const MISFIT: Unfit = Unfit::Test("pictures and their place differ in number");
        let mut places = Vec::with_capacity(pictures.len());
        let mut end = 0usize;
        for picture in pictures {
            let bytes = picture.room().ok_or(MISFIT)?;
            places.push(end..end + bytes);
            end = (end + bytes).next_multiple_of(ALIGN);
        }
        let room = match self.pictures.run(&[end.max(ALIGN)], 1) {
            Some(room) => room,
            None => {
                // What is on its way may have all of it.
                landed(flights)?;
                self.pictures.run(&[end.max(ALIGN)], 1).ok_or(Unfit::Full)?
            }
        };
        let whole = room.span(0, 0..1).ok_or(MISFIT)?;
        let begin = room.whole().start;
        let mut sources = Vec::with_capacity(pictures.len());
        for (Picture { bytes, is_jpeg, frame, part }, place) in pictures.iter().zip(places) {
            let to = whole.part(place.clone()).ok_or(MISFIT)?;
            if *is_jpeg {
                let decoder = decoder.ok_or(Unfit::Test("nvJPEG is asked for and is not there"))?;
                let decode = || decoder.jpegs.decode(&self.stream, bytes.clone(), frame, &to);
                let decoded = match decode() {
                    Err(error) if error.kind() == JpegKind::Busy => {
                        landed(flights)?;
                        decode()
                    }
                    decoded => decoded,
                };
                let decoded = match decoded {
                    Ok(decoded) => decoded,
                    Err(error) => return Err(Unfit::Refused(decoder.judge(error)?)),
                };
                self.keep(&room, decoded, flights);
            } else {
                let copy = self.stream.upload(bytes.clone(), self.pictures.memory(), begin + place.start)?;
                self.keep(&room, copy, flights);
            }
            sources.push(Source { bytes: to, frame: *frame, part: *part });
        }
        let mut first = 0;
        for alike in sources.chunk_by(|a, b| a.frame.format == b.frame.format) {
            let part = first * tensor.bytes()..(first + alike.len()) * tensor.bytes();
            first += alike.len();
            let to = to.part(part).ok_or(MISFIT)?;
            let launch = kernels.prepare(&self.stream, alike, tensor, &to)?;
            self.keep(run, launch.keeping(room.clone()), flights);
        }
        Ok(())
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
    /// Bytes of the device's memory that its pixels take; `None`: no number has so many.
    fn room(&self) -> Option<usize> {
        if self.is_jpeg { self.frame.bytes() } else { Some(self.bytes.len()) }
    }
}

/// Waits for all that is on its way.
fn landed(flights: &mut Vec<Flight>) -> Result<(), Unfit> {
    Ok(std::mem::take(flights).into_iter().try_for_each(|wait| wait())?)
}

/// How many of them are made together, one at least: as have room in half of the memory for pictures, and no more JPEGs
/// than are decoded at once.
fn together(pictures: &[Picture]) -> usize {
    let (mut bytes, mut jpegs) = (0usize, 0);
    let fit = pictures.iter().take_while(|picture| {
        bytes = bytes.saturating_add(picture.room().unwrap_or(usize::MAX)).saturating_add(ALIGN);
        jpegs += usize::from(picture.is_jpeg);
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

    fn jpeg(width: u32, height: u32) -> Picture {
        let frame = Frame::tight(Format::Rgb, width, height);
        Picture { bytes: Bytes::new(), is_jpeg: true, frame, part: Part::whole(&frame, (8, 8)) }
    }

    #[test]
    fn pictures_are_made_in_parts_that_have_room() {
        assert_eq!(together(&vec![jpeg(100, 100); 20]), AT_ONCE);
        // Of 1080p ten would fit, of 16 megapixels one.
        assert_eq!(together(&vec![jpeg(1920, 1080); 20]), AT_ONCE);
        assert_eq!(together(&vec![jpeg(4096, 4096); 3]), 1);
        assert_eq!(together(&[jpeg(9000, 9000)]), 1, "one that has no room is told so when it is tried");
        let pixels = Picture { is_jpeg: false, bytes: vec![0; 3000].into(), ..jpeg(10, 100) };
        assert_eq!(together(&vec![pixels; 100]), 100, "what is decoded is copied all at once");
    }
}
