//! The kernels on a device: what is checked before one is launched, and what it keeps while it runs.
//!
//! A kernel believes what it is told. So everything that it takes an address or an index from is made here: sources and
//! tensors are spans of memory that are held against what they have to contain, and tables are computed and uploaded by
//! the launch itself.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use super::args;
use super::images::{IMAGES, fitting};
use super::memory::Pinned;
use super::sys::{Api, Handle};
use super::{Context, DeviceMemory, Error, Kind, Pending, Span, Stream};
use crate::fused::{Axis, Format, Frame, Misfit, Part, Tensor, check};
use crate::normalise::{Channels, Dtype, Layout};

/// Pixels of a tensor that a block makes (TILE_X, TILE_Y of prepare.cu).
const TILE: [u32; 2] = [32, 8];
/// Threads of the other kernels' blocks, and elements of such a thread.
const THREADS: u32 = 256;
const EACH: u64 = 4;
/// What tensors begin at a multiple of, for kernels to move sixteen bytes at once.
const WIDE: u64 = 16;
/// Rows or images of one launch: the most blocks there may be in the second and third direction.
const MOST: usize = 65_535;
/// What addresses of tables are multiples of.
const ALIGN: usize = 256;

/// The kernels, loaded. Clones are the same.
#[derive(Debug, Clone)]
pub struct Kernels(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: Context,
    module: Handle,
    /// By format.
    prepare: [Handle; 4],
    /// By whether layouts differ, and whether eight elements are moved at once.
    convert: [[Handle; 2]; 2],
    tables: Handle,
    gather: Handle,
    scatter: Handle,
    machine: bool,
    /// Tables that no launch uses now.
    idle: Arc<Mutex<Vec<Tables>>>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Inner {}
// SAFETY: as for `Context`.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Ok(api) = self.context.enter() {
            // SAFETY: loaded once, and unloaded once; launches keep `self`.
            self.context.forget(unsafe { (api.module_unload)(self.module) });
        }
    }
}

/// Room for the tables of a launch: written here, read there.
#[derive(Debug)]
struct Tables {
    host: Pinned,
    device: DeviceMemory,
}

/// Tables in use, which are free again when this goes.
#[derive(Debug)]
struct Borrowed {
    tables: Option<Tables>,
    /// Bytes of them that are used.
    bytes: usize,
    idle: Arc<Mutex<Vec<Tables>>>,
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if let Some(tables) = self.tables.take() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(tables);
        }
    }
}

/// A launch, and what it uses.
#[derive(Debug)]
pub struct Launched {
    _kernels: Kernels,
    tables: Option<Borrowed>,
    uses: Vec<DeviceMemory>,
}

/// An image in memory of the device, and what becomes of it.
#[derive(Debug, Clone)]
pub struct Source {
    /// Where its bytes are.
    pub bytes: Span,
    /// How they lie there.
    pub frame: Frame,
    /// What is taken of them.
    pub part: Part,
}

/// Why a kernel was not launched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Order {
    /// What was asked for does not fit.
    #[error("image {at} of {of}: {misfit}")]
    Misfit {
        /// Which.
        at: usize,
        /// Of how many.
        of: usize,
        /// Why.
        misfit: Misfit,
    },
    /// One launch makes images of one format.
    #[error("the images of a launch have one format, and these have several: launch once for each")]
    Formats,
    /// Kernels, stream and memory belong together.
    #[error("the kernels were loaded for another device than that of the stream or of the memory")]
    Device,
    /// There is nothing to do, or too much.
    #[error("a launch has 1 to {MOST} rows, not {0}")]
    Count(usize),
    /// A span is too short, or not where its elements may lie.
    #[error("{what} needs {needed} bytes at a multiple of {align}, and has {found} at {address:#x}")]
    Span {
        /// Which.
        what: &'static str,
        /// Bytes.
        needed: usize,
        /// Bytes.
        found: usize,
        /// Of an element.
        align: usize,
        /// Where it is.
        address: u64,
    },
    /// The driver did not do it.
    #[error(transparent)]
    Driver(#[from] Error),
}

/// A tensor to another.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversion {
    /// Rows of the batch.
    pub rows: usize,
    /// Channels of a row.
    pub channels: usize,
    /// Elements of a channel.
    pub pixels: usize,
    /// What it is.
    pub from: (Dtype, Layout),
    /// What it becomes.
    pub to: (Dtype, Layout),
    /// Of each channel: factor and summand. `None`: numbers stay as they are.
    pub factors: Option<Vec<[f32; 2]>>,
}

/// Rows of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// How many there are.
    pub count: usize,
    /// Bytes of one.
    pub bytes: usize,
    /// Bytes from one to the next.
    pub stride: usize,
}

impl Rows {
    fn needed(&self) -> Option<usize> {
        if self.count == 0 || self.stride < self.bytes {
            return None;
        }
        (self.count - 1).checked_mul(self.stride)?.checked_add(self.bytes)
    }
}

fn dtype(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::U8 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
        Dtype::F32 => 3,
    }
}

fn layout(layout: Layout) -> u32 {
    match layout {
        Layout::Planar => 0,
        Layout::Interleaved => 1,
    }
}

/// What is written into a launch's tables, piece by piece.
#[derive(Debug, Default)]
struct Sheet(Vec<u8>);

impl Sheet {
    /// Adds words; returns where they begin.
    fn add<const N: usize>(&mut self, words: impl IntoIterator<Item = [u8; N]>) -> usize {
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
        let at = self.0.len();
        self.0.extend(words.into_iter().flatten());
        at
    }
}

impl Kernels {
    /// Loads the kernels that fit the device.
    pub fn load(context: &Context) -> Result<Self, Error> {
        const DOING: &str = "loading the kernels";
        let mut last = context.driver().error(DOING, "cuModuleLoadData", 209);
        for image in fitting(IMAGES, context.device().capability) {
            let api = context.enter()?;
            let mut module = std::ptr::null_mut();
            // SAFETY: an ELF file, which says itself how long it is, or text that ends.
            let code = unsafe { (api.module_load)(&raw mut module, image.bytes.as_ptr().cast()) };
            match context.check(DOING, "cuModuleLoadData", code) {
                Ok(()) => return Self::found(context, module, image.machine),
                // The next may fit: text, where a driver knows a device but not our machine code.
                Err(error) if error.kind() == Kind::NoImage => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    fn found(context: &Context, module: Handle, machine: bool) -> Result<Self, Error> {
        let none = std::ptr::null_mut();
        let mut inner = Inner {
            context: context.clone(),
            module,
            prepare: [none; 4],
            convert: [[none; 2]; 2],
            tables: none,
            gather: none,
            scatter: none,
            machine,
            idle: Arc::default(),
        };
        let find = |name: &'static std::ffi::CStr| {
            let mut function = std::ptr::null_mut();
            let api = context.enter()?;
            // SAFETY: the module is loaded, and the name ends.
            let code = unsafe { (api.module_function)(&raw mut function, module, name.as_ptr()) };
            context.check("finding a kernel", "cuModuleGetFunction", code).map(|()| function)
        };
        inner.prepare = [
            find(c"penstock_prepare_rgb")?,
            find(c"penstock_prepare_gray")?,
            find(c"penstock_prepare_nv12")?,
            find(c"penstock_prepare_i420")?,
        ];
        inner.convert = [
            [find(c"penstock_convert_same")?, find(c"penstock_convert_same_wide")?],
            [find(c"penstock_convert_turned")?, find(c"penstock_convert_turned_wide")?],
        ];
        inner.tables = find(c"penstock_tables")?;
        inner.gather = find(c"penstock_gather")?;
        inner.scatter = find(c"penstock_scatter")?;
        Ok(Self(Arc::new(inner)))
    }

    /// Whether they are machine code for this device; otherwise the driver compiled them from PTX.
    pub fn are_machine_code(&self) -> bool {
        self.0.machine
    }

    /// A batch: image `n` becomes the `n`-th tensor of `to`, one after the other. All have one format, and any size.
    pub fn prepare(
        &self,
        stream: &Stream,
        sources: &[Source],
        tensor: &Tensor,
        to: &Span,
    ) -> Result<Pending<Launched>, Order> {
        let count = sources.len();
        let Some(format) = sources.first().map(|source| source.frame.format) else {
            return Err(Order::Count(0));
        };
        if count > MOST {
            return Err(Order::Count(count));
        }
        if sources.iter().any(|source| source.frame.format != format) {
            return Err(Order::Formats);
        }
        fits("the batch", to, tensor.bytes().saturating_mul(count), tensor.dtype.size())?;
        let (mut bounds, mut weights) = (Vec::new(), Vec::new());
        let mut images = Vec::with_capacity(count);
        // A batch is often of one camera, whose weights are all the same.
        let mut known: Vec<(Frame, Part, [args::Axis; 2])> = Vec::new();
        for (at, source) in sources.iter().enumerate() {
            let Source { bytes, frame, part } = source;
            let misfit = |misfit| Order::Misfit { at, of: count, misfit };
            check(frame, bytes.bytes(), part, tensor).map_err(misfit)?;
            let same = |(frame, part, _): &&(Frame, Part, _)| {
                (frame.width, frame.height) == (source.frame.width, source.frame.height)
                    && (part.area, part.size) == (source.part.area, source.part.size)
                    && (part.filter, part.antialias) == (source.part.filter, source.part.antialias)
            };
            let [across, down] = match known.iter().find(same) {
                Some((_, _, axes)) => *axes,
                None => {
                    let axes = part.axes(frame).map(|axis| append(&axis, &mut bounds, &mut weights));
                    known.push((*frame, *part, axes));
                    axes
                }
            };
            let turn = part.turn;
            images.push(args::Image {
                planes: frame.planes.map(|plane| bytes.address() + plane as u64),
                tensor: to.address() + (at * tensor.bytes()) as u64,
                strides: frame.strides,
                at: [part.at.0, part.at.1],
                size: [part.size.0, part.size.1],
                turn: u32::from(turn.transposed)
                    | u32::from(turn.mirrored) << 1
                    | u32::from(turn.flipped) << 2,
                format: 0,
                across,
                down,
                factors: frame.factors(),
                pad: [part.pad[0], part.pad[1], part.pad[2], 0],
                row: frame.row(),
            });
        }
        // Tables are addressed with 32 bits, which a batch of thousands of large images, all different, would not fit.
        if bounds.len().max(weights.len()) > i32::MAX as usize {
            return Err(Order::Count(count));
        }
        let mut sheet = Sheet::default();
        let images = sheet.add(images.iter().map(words));
        let bounds = sheet.add(bounds.iter().map(|[first, count]: &[u32; 2]| {
            let ([a, b, c, d], [e, f, g, h]) = (first.to_le_bytes(), count.to_le_bytes());
            [a, b, c, d, e, f, g, h]
        }));
        let weights = sheet.add(weights.iter().map(|weight: &i16| weight.to_le_bytes()));
        let (tables, at) = self.table(&sheet)?;
        let job = args::Prepare {
            images: at + images as u64,
            bounds: at + bounds as u64,
            weights: at + weights as u64,
            width: tensor.width,
            height: tensor.height,
            channels: match tensor.channels {
                Channels::Rgb => 0,
                Channels::Bgr => 1,
                Channels::Gray => 2,
            },
            layout: layout(tensor.layout),
            dtype: dtype(tensor.dtype),
            mul: tensor.mul,
            add: tensor.add,
            unused: 0,
        };
        let function = self.0.prepare[match format {
            Format::Rgb => 0,
            Format::Gray => 1,
            Format::Nv12 => 2,
            Format::I420 => 3,
        }];
        let grid = [tensor.width.div_ceil(TILE[0]), tensor.height.div_ceil(TILE[1]), count as u32];
        let spans = sources.iter().map(|source| &source.bytes).chain([to]);
        let used = self.uses(Some(tables), spans);
        self.launch(stream, function, grid, [TILE[0], TILE[1], 1], &job, used)
    }

    /// A tensor to another, of the same elements.
    pub fn convert(
        &self,
        stream: &Stream,
        conversion: &Conversion,
        from: &Span,
        to: &Span,
    ) -> Result<Pending<Launched>, Order> {
        let Conversion { rows, channels, pixels, .. } = *conversion;
        let elements =
            rows.checked_mul(channels).and_then(|all| all.checked_mul(pixels)).unwrap_or(usize::MAX);
        let bytes = |dtype: Dtype| elements.saturating_mul(dtype.size());
        if elements == 0 || u32::try_from(channels).is_err() {
            return Err(Order::Count(elements));
        }
        fits("the source", from, bytes(conversion.from.0), conversion.from.0.size())?;
        fits("the target", to, bytes(conversion.to.0), conversion.to.0.size())?;
        let mut tables = None;
        let mut factors = 0;
        if let Some(of) = &conversion.factors {
            if of.len() != channels {
                return Err(Order::Count(of.len()));
            }
            let mut sheet = Sheet::default();
            sheet.add(of.iter().flatten().map(|factor| factor.to_le_bytes()));
            let (table, at) = self.table(&sheet)?;
            tables = Some(table);
            factors = at;
        }
        // One channel lies the same way in both layouts, and so do channels of one pixel.
        let same = conversion.from.1 == conversion.to.1 || channels == 1 || pixels == 1;
        let job = args::Convert {
            from: from.address(),
            to: to.address(),
            factors,
            pixels: pixels as u64,
            rows: rows as u64,
            channels: channels as u32,
            from_dtype: dtype(conversion.from.0),
            to_dtype: dtype(conversion.to.0),
            from_layout: layout(conversion.from.1),
            to_layout: layout(conversion.to.1),
            plain: u32::from(conversion.factors.is_none()),
        };
        // Eight at once, where both sides can be read and written so.
        let wide = [from, to].iter().all(|span| span.address().is_multiple_of(WIDE))
            && (same || channels == 3 && pixels.is_multiple_of(8));
        let threads = if same { elements } else { rows * pixels } as u64;
        let each = if wide {
            8
        } else if same {
            EACH
        } else {
            1
        };
        let blocks = threads.div_ceil(u64::from(THREADS) * each);
        let blocks = u32::try_from(blocks).ok().filter(|blocks| i32::try_from(*blocks).is_ok());
        let grid = [blocks.ok_or(Order::Count(elements))?, 1, 1];
        let used = self.uses(tables, [from, to]);
        let function = self.0.convert[usize::from(!same)][usize::from(wide)];
        self.launch(stream, function, grid, [THREADS, 1, 1], &job, used)
    }

    /// Row `n` of the target becomes row `list[n]` of the source; zeros, where there is none such. The target has no
    /// more rows than the list.
    pub fn gather(
        &self,
        stream: &Stream,
        list: &[u32],
        from: (&Span, Rows),
        to: (&Span, Rows),
    ) -> Result<Pending<Launched>, Order> {
        let limit = from.1.count;
        self.rows(stream, self.0.gather, list, from, (to.0, Rows { count: list.len(), ..to.1 }), limit)
    }

    /// Row `n` of the source goes to row `list[n]` of the target; nowhere, where there is none such. Of two that go to
    /// one row, one wins.
    pub fn scatter(
        &self,
        stream: &Stream,
        list: &[u32],
        from: (&Span, Rows),
        to: (&Span, Rows),
    ) -> Result<Pending<Launched>, Order> {
        let limit = to.1.count;
        self.rows(stream, self.0.scatter, list, (from.0, Rows { count: list.len(), ..from.1 }), to, limit)
    }

    fn rows(
        &self,
        stream: &Stream,
        function: Handle,
        list: &[u32],
        from: (&Span, Rows),
        to: (&Span, Rows),
        limit: usize,
    ) -> Result<Pending<Launched>, Order> {
        let limit = u32::try_from(limit).map_err(|_| Order::Count(limit))?;
        if list.is_empty() || list.len() > MOST || from.1.bytes != to.1.bytes || from.1.bytes == 0 {
            return Err(Order::Count(list.len()));
        }
        let needed = |rows: Rows| rows.needed().unwrap_or(usize::MAX);
        fits("the source", from.0, needed(from.1), 1)?;
        fits("the target", to.0, needed(to.1), 1)?;
        let numbers = [from.0.address(), to.0.address()].map(|address| address as usize);
        let all = numbers.iter().chain([&from.1.stride, &to.1.stride, &from.1.bytes]);
        let unit = [16, 4].into_iter().find(|unit| all.clone().all(|number| number % unit == 0)).unwrap_or(1);
        let mut sheet = Sheet::default();
        sheet.add(list.iter().map(|row| row.to_le_bytes()));
        let (tables, at) = self.table(&sheet)?;
        let job = args::Rows {
            from: from.0.address(),
            to: to.0.address(),
            list: at,
            bytes: from.1.bytes as u64,
            from_stride: from.1.stride as u64,
            to_stride: to.1.stride as u64,
            rows: list.len() as u32,
            limit,
            unit: unit as u32,
            unused: 0,
        };
        let blocks = ((from.1.bytes / unit) as u64).div_ceil(u64::from(THREADS) * EACH);
        let blocks = u32::try_from(blocks).map_err(|_| Order::Count(list.len()))?;
        let used = self.uses(Some(tables), [from.0, to.0]);
        self.launch(stream, function, [blocks, list.len() as u32, 1], [THREADS, 1, 1], &job, used)
    }

    fn uses<'a>(&self, tables: Option<Borrowed>, spans: impl IntoIterator<Item = &'a Span>) -> Launched {
        let memory = spans.into_iter().map(|span| span.memory().clone()).collect();
        Launched { _kernels: self.clone(), tables, uses: memory }
    }

    /// Tables for a launch, written here and still to be uploaded by it; and the address that they will have.
    fn table(&self, sheet: &Sheet) -> Result<(Borrowed, u64), Error> {
        let needed = sheet.0.len();
        let idle = {
            let mut idle = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner);
            let at = idle.iter().position(|tables| tables.device.bytes() >= needed);
            at.map(|at| idle.swap_remove(at))
        };
        let tables = match idle {
            Some(tables) => tables,
            None => {
                // Some room, so that the next launch finds it large enough.
                let bytes = needed.next_power_of_two().max(1 << 16);
                let context = &self.0.context;
                Tables { host: Pinned::new(context, bytes)?, device: context.alloc(bytes)? }
            }
        };
        let (host, address) = (tables.host.base(), tables.device.whole().address());
        // SAFETY: no launch uses these tables, and there is room for the sheet.
        unsafe { host.copy_from_nonoverlapping(std::ptr::NonNull::from(sheet.0.as_slice()).cast(), needed) };
        let borrowed = Borrowed { tables: Some(tables), bytes: needed, idle: Arc::clone(&self.0.idle) };
        Ok((borrowed, address))
    }

    fn launch<T: Copy>(
        &self,
        stream: &Stream,
        function: Handle,
        grid: [u32; 3],
        block: [u32; 3],
        job: &T,
        used: Launched,
    ) -> Result<Pending<Launched>, Order> {
        let context = &self.0.context;
        if stream.context() != context || used.uses.iter().any(|memory| memory.context() != context) {
            return Err(Order::Device);
        }
        // Fetched by a kernel, since a copy would wait for those of other streams.
        let tables = used.tables.as_ref().and_then(|borrowed| {
            let Tables { host, device } = borrowed.tables.as_ref()?;
            let (from, to) = (host.base().as_ptr() as u64, device.whole().address());
            Some(args::Tables { from, to, wides: borrowed.bytes.div_ceil(16) as u64 })
        });
        let fetch = self.0.tables;
        let started = stream.start(used, |api, stream| {
            if let Some(tables) = tables {
                let blocks = tables.wides.div_ceil(u64::from(THREADS)) as u32;
                // SAFETY: pinned memory, which a device reads at the host's address, and memory of the device; both are as
                // long, in sixteens, and both are kept.
                let code = unsafe { start(api, stream, fetch, [blocks, 1, 1], [THREADS, 1, 1], &tables) };
                if code != 0 {
                    return ("fetching a kernel's tables", "cuLaunchKernel", code);
                }
            }
            // SAFETY: what the arguments point to was checked, and is kept.
            let code = unsafe { start(api, stream, function, grid, block, job) };
            ("launching a kernel", "cuLaunchKernel", code)
        });
        Ok(started?)
    }
}

/// Launches a kernel, whose arguments the driver copies.
///
/// # Safety
///
/// The kernel takes a `T`, and what that points to stays until it has run.
unsafe fn start<T: Copy>(
    api: &Api,
    stream: Handle,
    function: Handle,
    grid: [u32; 3],
    block: [u32; 3],
    job: &T,
) -> i32 {
    let none = std::ptr::null_mut();
    let mut job = *job;
    let mut params = [(&raw mut job).cast::<c_void>()];
    let ([across, down, deep], [x, y, z]) = (grid, block);
    // SAFETY: the caller's.
    unsafe { (api.launch)(function, across, down, deep, x, y, z, 0, stream, params.as_mut_ptr(), none) }
}

/// Adds an axis to the tables of a launch.
fn append(axis: &Axis, bounds: &mut Vec<[u32; 2]>, weights: &mut Vec<i16>) -> args::Axis {
    // Kernels read weights two at a time.
    let window = axis.window.next_multiple_of(2);
    let at = args::Axis {
        bounds: 2 * bounds.len() as u32,
        weights: weights.len() as u32,
        window: window as u32,
        precision: axis.precision,
    };
    bounds.extend(&axis.bounds);
    for own in axis.weights.chunks_exact(axis.window) {
        weights.extend(own);
        weights.extend(std::iter::repeat_n(0, window - axis.window));
    }
    at
}

fn words(image: &args::Image) -> [u8; 128] {
    // SAFETY: integers without gaps between them, as many bytes as that.
    unsafe { std::mem::transmute::<args::Image, [u8; 128]>(*image) }
}

fn fits(what: &'static str, span: &Span, needed: usize, align: usize) -> Result<(), Order> {
    let (found, address) = (span.bytes(), span.address());
    if found >= needed && address.is_multiple_of(align as u64) {
        return Ok(());
    }
    Err(Order::Span { what, needed, found, align, address })
}
