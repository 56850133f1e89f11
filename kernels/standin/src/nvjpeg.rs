//! STAND-IN of nvJPEG: those of its functions that Penstock calls, with `jpeg-decoder` behind them, on this CPU.
//!
//! It keeps the rules that would go unnoticed here and hurt on a GPU: a thread has a context; a state serves one decode
//! at a time, and is ended when that is done; pixels come later, on the stream, and only where memory of the device is.
//! What the file says is decided at once, as by the library. Statuses are the library's own; that the device is lost is
//! its 6.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use jpeg_decoder::{Decoder, PixelFormat};

use crate::calls::put;
use crate::memory::{copy, staged};
use crate::stream::{Event, pause};
use crate::world::{CURRENT, Said, World, world};

/// Statuses of the library.
mod status {
    pub(super) const INVALID_PARAMETER: i32 = 2;
    pub(super) const BAD_JPEG: i32 = 3;
    pub(super) const NOT_SUPPORTED: i32 = 4;
    pub(super) const EXECUTION_FAILED: i32 = 6;
    pub(super) const ARCH_MISMATCH: i32 = 7;
}
/// Flags that are known: all up to NVJPEG_FLAGS_UPSAMPLING_WITH_INTERPOLATION.
const FLAGS: c_uint = 63;

/// Threads that decode now.
static UNPACKING: AtomicUsize = AtomicUsize::new(0);

/// What it gave out.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    libraries: Vec<usize>,
    /// States, and the last decode of each.
    states: BTreeMap<usize, Arc<Event>>,
}

impl Handles {
    pub(crate) fn left(&self) -> usize {
        self.libraries.len() + self.states.len()
    }
}

/// `nvjpegImage_t`.
#[repr(C)]
struct Image {
    channel: [usize; 4],
    pitch: [usize; 4],
}

fn call(name: &str, told: std::fmt::Arguments<'_>, body: impl FnOnce(&mut World) -> Said) -> c_int {
    let said = world(|world| {
        world.log.push(format!("{name} {told}"));
        if world.lost.is_some() {
            return Err(status::EXECUTION_FAILED);
        }
        if let Some((code, lost)) = world.script.fault(name) {
            if lost {
                world.lost = Some(code);
            }
            return Err(if lost { status::EXECUTION_FAILED } else { code });
        }
        body(world)
    });
    said.err().unwrap_or_default()
}

/// The same of a function that needs a current context.
fn inside(name: &str, told: std::fmt::Arguments<'_>, body: impl FnOnce(&mut World) -> Said) -> c_int {
    call(name, told, |world| if CURRENT.get() == 0 { Err(status::EXECUTION_FAILED) } else { body(world) })
}

#[unsafe(no_mangle)]
extern "C" fn nvjpegGetProperty(property: c_int, value: *mut c_int) -> c_int {
    call("nvjpegGetProperty", format_args!("{property}"), |world| {
        let number = usize::try_from(property).ok().and_then(|at| world.script.nvjpeg.get(at).copied());
        put(value, number.ok_or(status::INVALID_PARAMETER)?)
    })
}

fn create(world: &mut World, handle: *mut usize) -> Said {
    let new = world.handle();
    world.jpegs.libraries.push(new);
    put(handle, new)
}

#[unsafe(no_mangle)]
extern "C" fn nvjpegCreateSimple(handle: *mut usize) -> c_int {
    inside("nvjpegCreateSimple", format_args!(""), |world| create(world, handle))
}

#[unsafe(no_mangle)]
extern "C" fn nvjpegCreateEx(
    backend: c_int,
    device: *const c_void,
    pinned: *const c_void,
    flags: c_uint,
    handle: *mut usize,
) -> c_int {
    inside("nvjpegCreateEx", format_args!("backend={backend} flags={flags}"), |world| {
        // Before 12.1 the last flag is not known.
        let old = world.script.nvjpeg < [12, 1, 0];
        let known = if old { FLAGS >> 1 } else { FLAGS };
        if flags & !known != 0 || !device.is_null() || !pinned.is_null() {
            return Err(status::INVALID_PARAMETER);
        }
        create(world, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvjpegDestroy(handle: usize) -> c_int {
    inside("nvjpegDestroy", format_args!(""), |world| {
        let at = world.jpegs.libraries.iter().position(|known| *known == handle);
        world.jpegs.libraries.swap_remove(at.ok_or(status::INVALID_PARAMETER)?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvjpegJpegStateCreate(handle: usize, state: *mut usize) -> c_int {
    inside("nvjpegJpegStateCreate", format_args!(""), |world| {
        if !world.jpegs.libraries.contains(&handle) {
            return Err(status::INVALID_PARAMETER);
        }
        let new = world.handle();
        world.jpegs.states.insert(new, Arc::default());
        put(state, new)
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvjpegJpegStateDestroy(state: usize) -> c_int {
    inside("nvjpegJpegStateDestroy", format_args!(""), |world| {
        let known = world.jpegs.states.remove(&state).ok_or(status::INVALID_PARAMETER)?;
        if known.is_reached() { Ok(()) } else { Err(status::EXECUTION_FAILED) }
    })
}

/// What the decoder says of a file that it does not read.
fn told(error: &jpeg_decoder::Error) -> c_int {
    match error {
        jpeg_decoder::Error::Unsupported(_) => status::NOT_SUPPORTED,
        _ => status::BAD_JPEG,
    }
}

/// Columns, rows and components.
fn head(file: &[u8]) -> Result<(c_int, c_int, c_int), c_int> {
    let mut decoder = Decoder::new(file);
    decoder.read_info().map_err(|error| told(&error))?;
    let info = decoder.info().ok_or(status::BAD_JPEG)?;
    let components = match info.pixel_format {
        PixelFormat::L8 | PixelFormat::L16 => 1,
        PixelFormat::RGB24 => 3,
        PixelFormat::CMYK32 => 4,
    };
    Ok((info.width.into(), info.height.into(), components))
}

#[unsafe(no_mangle)]
extern "C" fn nvjpegGetImageInfo(
    handle: usize,
    data: *const u8,
    length: usize,
    components: *mut c_int,
    sampling: *mut c_int,
    widths: *mut [c_int; 4],
    heights: *mut [c_int; 4],
) -> c_int {
    let file = staged(data as usize, length);
    call("nvjpegGetImageInfo", format_args!("bytes={length}"), |world| {
        if !world.jpegs.libraries.contains(&handle) {
            return Err(status::INVALID_PARAMETER);
        }
        let (width, height, count) = head(&file)?;
        let sides = |side| std::array::from_fn(|at| if at < count as usize { side } else { 0 });
        put(components, count)?;
        // NVJPEG_CSS_444, whatever it is, or NVJPEG_CSS_GRAY.
        put(sampling, if count == 1 { 6 } else { 0 })?;
        put(widths, sides(width))?;
        put(heights, sides(height))
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvjpegDecode(
    handle: usize,
    state: usize,
    data: *const u8,
    length: usize,
    format: c_int,
    image: *const Image,
    stream: usize,
) -> c_int {
    let file = staged(data as usize, length);
    let others = UNPACKING.fetch_add(1, SeqCst);
    pause(world(|world| world.script.unpacked));
    // With nothing locked, as others call meanwhile.
    let mut decoder = Decoder::new(&file[..]);
    let decoded = decoder.decode();
    let size = head(&file);
    UNPACKING.fetch_sub(1, SeqCst);
    inside("nvjpegDecode", format_args!("bytes={length} format={format}"), |world| {
        if others >= world.script.unpackers {
            return Err(status::ARCH_MISMATCH);
        }
        let known = world.jpegs.libraries.contains(&handle) && !image.is_null();
        let last = world.jpegs.states.get(&state).filter(|_| known).ok_or(status::INVALID_PARAMETER)?;
        if !last.is_reached() {
            return Err(status::INVALID_PARAMETER);
        }
        let mut pixels = decoded.as_ref().map_err(told)?.clone();
        let (width, height, components) = size?;
        // NVJPEG_OUTPUT_Y of gray, NVJPEG_OUTPUT_RGBI of colour; others are not asked for.
        let row = match (format, components) {
            (2, 1) => width as usize,
            (5, 3) => 3 * width as usize,
            _ => return Err(status::NOT_SUPPORTED),
        };
        // SAFETY: not null, and the caller of a C function answers for the rest.
        let Image { channel: [to, ..], pitch: [pitch, ..] } = unsafe { image.read() };
        let rows = height as usize;
        if pitch < row || world.on_device(to, pitch * (rows - 1) + row).is_err() {
            return Err(status::EXECUTION_FAILED);
        }
        let shade = world.script.shade;
        pixels.iter_mut().for_each(|pixel| *pixel = pixel.saturating_add(shade));
        let (stream, delay) =
            (world.stream(stream).map_err(|_| status::INVALID_PARAMETER)?, world.script.delay);
        if world.script.stalls("nvjpegDecode") {
            stream.push(delay, || {
                loop {
                    std::thread::park();
                }
            });
        }
        stream.push(delay, move || {
            for (at, pixels) in pixels.chunks_exact(row).enumerate() {
                copy(to + at * pitch, pixels.as_ptr() as usize, row);
            }
        });
        let done = stream.mark();
        world.jpegs.states.insert(state, done);
        Ok(())
    })
}
