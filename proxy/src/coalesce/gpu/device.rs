//! The device: opened, tested, and filled. Everything here may wait, and runs on threads that have nothing else to do.
//!
//! In: a driver's library and a device's number; then runs of the device's memory, and what is to lie there. Out: the
//! same runs, filled. Can go wrong: there is no driver or no device; what comes back is not what was sent; the device is
//! lost. A run that is being filled is kept until the device is done with it, whether anybody waits for that or not.

use std::path::Path;

use bytes::Bytes;
use penstock_kernels::arena::{Arena, DeviceArena, DeviceRun, Kind};
use penstock_kernels::cuda::{Absent, Context, Driver, Error, IpcHandle, Kernels, Order, Source, Stream};
use penstock_kernels::fused::{self, Format, Frame, Part, Tensor, reference};
use penstock_kernels::normalise::{Channels, Dtype, Layout};

/// Pinned memory that tensors of ordinary memory pass through on their way, bytes: some batches of photographs.
const STAGING: usize = 64 << 20;
/// Memory of the device for decoded pictures, bytes: two batches of 32 that were decoded at half of 1080p.
const PICTURES: usize = 128 << 20;
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
    /// Its pixels.
    pub(super) pixels: Bytes,
    /// How they lie.
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
        let mut device = Self { context, stream, kernels: None, staging, pictures };
        device.test_memory()?;
        // Without kernels tensors are copied all the same.
        device.kernels = device
            .test_kernels()
            .inspect_err(|error| tracing::warn!(%error, "images are prepared on the CPU, not on the GPU"))
            .ok();
        Ok(device)
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
        let picture = Picture { pixels: pixels.into(), frame, part };
        let to = run.span(0, 0..1).ok_or(NO_ROOM)?;
        let mut flights = Vec::new();
        self.launch(&kernels, &run, &[picture], &tensor, &to, &mut flights)?;
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
                        self.launch(kernels, &run, &pictures, &tensor, &to, &mut flights)?;
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

    /// Pictures to tensors: each is copied once, and each format of them is one launch.
    fn launch(
        &self,
        kernels: &Kernels,
        run: &DeviceRun,
        pictures: &[Picture],
        tensor: &Tensor,
        to: &penstock_kernels::cuda::Span,
        flights: &mut Vec<Flight>,
    ) -> Result<(), Unfit> {
        const MISFIT: Unfit = Unfit::Test("pictures and their place differ in number");
        // Where a picture begins, rows of four-byte pixels could too.
        const ALIGN: usize = 256;
        let mut places = Vec::with_capacity(pictures.len());
        let mut end = 0usize;
        for picture in pictures {
            places.push(end..end + picture.pixels.len());
            end = (end + picture.pixels.len()).next_multiple_of(ALIGN);
        }
        let room = self.pictures.run(&[end.max(ALIGN)], 1).ok_or(Unfit::Full)?;
        let whole = room.span(0, 0..1).ok_or(MISFIT)?;
        let begin = room.whole().start;
        let mut sources = Vec::with_capacity(pictures.len());
        for (Picture { pixels, frame, part }, place) in pictures.iter().zip(places) {
            let (memory, at) = (self.pictures.memory(), begin + place.start);
            let copy = self.stream.upload(pixels.clone(), memory, at)?;
            self.keep(&room, copy, flights);
            sources.push(Source { bytes: whole.part(place).ok_or(MISFIT)?, frame: *frame, part: *part });
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

/// Whether a kernel can make that of it.
pub(super) fn fits(picture: &Picture, tensor: &Tensor) -> bool {
    fused::check(&picture.frame, picture.pixels.len(), &picture.part, tensor).is_ok()
}
