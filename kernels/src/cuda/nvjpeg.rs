//! JPEGs decoded on a device, by NVIDIA's nvJPEG, where that library is there.
//!
//! In: a file in host memory, and a place on the device that is as large as its pixels. Out: the pixels, RGB or gray,
//! without gaps or with, once the [`Pending`] is done. Can go wrong: there is no such library, or another one under its
//! name ([`NoJpegs`], in one sentence); it does not take the file, or does not work ([`JpegError`], which says which of
//! the two it is: a file goes to the CPU, a library that does not work is left alone).
//!
//! The library is opened when it is asked for. No function is called that was not found first, and its version is held
//! against those whose interface this is. It uses the device's primary context, which is ours too, and our stream.
//!
//! # What is promised of memory
//!
//! The library writes as many pixels as the file says, so its own reading of the file's head is held against the place
//! before it decodes. A decode keeps the file, the place and the library's state until the device is done. A state
//! serves one decode at a time, and one whose decode failed is not used again.

use std::ffi::{c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::sys::Handle;
use super::{Context, DeviceMemory, Error, Pending, Span, Stream};
use crate::fused::{Format, Frame};

/// What it is called, the usual first; each needs a driver at least as new.
const LIBRARIES: [&str; 3] = ["libnvjpeg.so.12", "libnvjpeg.so.13", "libnvjpeg.so.11"];
/// Major versions whose interface this is.
const VERSIONS: std::ops::RangeInclusive<c_int> = 11..=13;
/// NVJPEG_MAX_COMPONENT.
const COMPONENTS: usize = 4;
/// NVJPEG_BACKEND_DEFAULT: the library chooses.
const BACKEND: c_int = 0;
/// NVJPEG_FLAGS_BITSTREAM_STRICT: what breaks the rules of JPEG is refused, and goes to the CPU, whose word counts.
const STRICT: c_uint = 4;
/// NVJPEG_FLAGS_UPSAMPLING_WITH_INTERPOLATION: colours as libjpeg has them. Versions before 12.1 do not know it.
const SMOOTH: c_uint = 32;
/// NVJPEG_OUTPUT_Y, and _RGBI.
const LUMA: c_int = 2;
const RGB: c_int = 5;
/// Decodes at once. Each has memory of the library's for the largest picture it has seen, of the device and pinned.
const STATES: usize = 8;
/// Pixels of the largest pictures that all states have seen: what they have memory for. Two photographs of 12 megapixels at
/// once, or eight of 3.
const ROOM: u64 = 25_000_000;
/// A state that has seen a larger picture is ended after it, and its memory given back.
const KEPT: u64 = 4_000_000;
const DECODING: &str = "decoding a JPEG on the GPU";

/// Why there is no nvJPEG that could be used. Each is a sentence for an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoJpegs {
    /// No library of that name.
    #[error("nvJPEG is not used: {} cannot be opened ({reason}); JPEGs are decoded on the CPU", named(.paths))]
    Library {
        /// What was looked for.
        paths: Vec<PathBuf>,
        /// What the system said of the first.
        reason: String,
    },
    /// A function is missing.
    #[error(
        "nvJPEG is not used: {path:?} is another library: it has no {function}; JPEGs are decoded on the CPU"
    )]
    Function {
        /// The library.
        path: PathBuf,
        /// The function.
        function: &'static str,
    },
    /// It is too old, or too new.
    #[error(
        "nvJPEG is not used: {path:?} has version {version}, and versions 11 to 13 are known; JPEGs are decoded on the CPU"
    )]
    Version {
        /// The library.
        path: PathBuf,
        /// Its major version.
        version: i32,
    },
    /// It does not start.
    #[error("nvJPEG is not used: {path:?}: {error}; JPEGs are decoded on the CPU")]
    Start {
        /// The library.
        path: PathBuf,
        /// What it said.
        error: JpegError,
    },
}

fn named(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| format!("{path:?}")).collect::<Vec<_>>().join(" or ")
}

/// What an error says of what is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JpegKind {
    /// This file is not for it. The CPU may take it, or knows what is wrong with it.
    File,
    /// It may be this file, and it may be the library: what it says of a file that is known to be good tells which.
    Doubtful,
    /// All of its states are in use; later there will be one.
    Busy,
    /// It has no memory now.
    Passing,
    /// It does not work here, whatever the file.
    Broken,
    /// The driver said no.
    Driver,
}

/// A picture that was not decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JpegError {
    /// The library said no.
    #[error("{doing}: {call} said {} ({status}); {}", name(*.status), advice(*.status))]
    Said {
        /// What was wanted.
        doing: &'static str,
        /// Its function.
        call: &'static str,
        /// Its word.
        status: i32,
    },
    /// It reads other pixels in the file than there is room for.
    #[error(
        "decoding a JPEG on the GPU: it has {found:?} as its columns, rows and components, and not {expected:?}"
    )]
    Other {
        /// As the library reads it.
        found: (i32, i32, i32),
        /// As whoever asked has read it.
        expected: (u32, u32, u32),
    },
    /// Colours are stored in a way that it does not know.
    #[error("decoding a JPEG on the GPU: nvJPEG does not know how its colours are sampled")]
    Sampling,
    /// There is not so much room.
    #[error("decoding a JPEG on the GPU: its place is too small, or for pixels of another form")]
    Place,
    /// No state is free, or there is no room for so large a picture besides those that are being decoded.
    #[error("decoding a JPEG on the GPU: as many others are being decoded as there is room for")]
    Busy,
    /// Of the driver.
    #[error(transparent)]
    Driver(#[from] Error),
}

impl JpegError {
    /// What is to be done.
    pub fn kind(&self) -> JpegKind {
        match self {
            Self::Said { status: 3 | 4 | 9 | 10, .. } | Self::Other { .. } | Self::Sampling | Self::Place => {
                JpegKind::File
            }
            Self::Said { status: 5, .. } => JpegKind::Passing,
            Self::Said { status: 1 | 7, .. } => JpegKind::Broken,
            // 2, 6 and 8, which the library has been seen to say of single files (DALI's issues 3159, 3160 and 6026), and
            // whatever a later version may say.
            Self::Said { .. } => JpegKind::Doubtful,
            Self::Busy => JpegKind::Busy,
            Self::Driver(_) => JpegKind::Driver,
        }
    }
}

fn name(status: i32) -> &'static str {
    match status {
        1 => "NVJPEG_STATUS_NOT_INITIALIZED",
        2 => "NVJPEG_STATUS_INVALID_PARAMETER",
        3 => "NVJPEG_STATUS_BAD_JPEG",
        4 => "NVJPEG_STATUS_JPEG_NOT_SUPPORTED",
        5 => "NVJPEG_STATUS_ALLOCATOR_FAILURE",
        6 => "NVJPEG_STATUS_EXECUTION_FAILED",
        7 => "NVJPEG_STATUS_ARCH_MISMATCH",
        8 => "NVJPEG_STATUS_INTERNAL_ERROR",
        9 => "NVJPEG_STATUS_IMPLEMENTATION_NOT_SUPPORTED",
        10 => "NVJPEG_STATUS_INCOMPLETE_BITSTREAM",
        _ => "a status that is not known",
    }
}

fn advice(status: i32) -> &'static str {
    match status {
        3 | 10 => {
            "the file is damaged, or the library is stricter than the CPU's decoder, which has the last word"
        }
        4 | 9 => "the library does not take this form of JPEG, and the CPU does",
        5 => "the device or the host has no memory left: another process may have it",
        6 => {
            "the device or its driver failed, or is older than the library (`nvidia-smi` says which CUDA it has), or the file is one that the library fails at"
        }
        7 => "the library is not for this device: a newer one may be",
        _ => "the file is one that the library fails at, or the fault is ours",
    }
}

/// `nvjpegImage_t`.
#[repr(C)]
struct Image {
    channel: [*mut u8; COMPONENTS],
    pitch: [usize; COMPONENTS],
}

type Create = unsafe extern "C" fn(c_int, *const c_void, *const c_void, c_uint, *mut Handle) -> c_int;
type Info =
    unsafe extern "C" fn(Handle, *const u8, usize, *mut c_int, *mut c_int, *mut c_int, *mut c_int) -> c_int;
type Decode = unsafe extern "C" fn(Handle, Handle, *const u8, usize, c_int, *mut Image, Handle) -> c_int;

/// Its functions, each looked up before anything is called.
struct Api {
    property: unsafe extern "C" fn(c_int, *mut c_int) -> c_int,
    /// Optional: without it there are no flags.
    create: Option<Create>,
    create_simple: unsafe extern "C" fn(*mut Handle) -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    state_create: unsafe extern "C" fn(Handle, *mut Handle) -> c_int,
    state_destroy: unsafe extern "C" fn(Handle) -> c_int,
    info: Info,
    decode: Decode,
}

impl Api {
    /// An error is the name of a function that is required and missing.
    ///
    /// # Safety
    ///
    /// What `find` gives for a name is nvJPEG's function of this name, and stays where it is.
    unsafe fn new(find: &dyn Fn(&str) -> Option<*mut c_void>) -> Result<Self, &'static str> {
        let need = |name: &'static str| find(name).ok_or(name);
        // SAFETY: of functions of these names these are the types (nvjpeg.h, 11 to 13); the caller vouches for the rest.
        unsafe {
            Ok(Self {
                property: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int, *mut c_int) -> c_int>(
                    need("nvjpegGetProperty")?,
                ),
                create: find("nvjpegCreateEx").map(|found| std::mem::transmute::<*mut c_void, Create>(found)),
                create_simple: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut Handle) -> c_int>(
                    need("nvjpegCreateSimple")?,
                ),
                destroy: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Handle) -> c_int>(need(
                    "nvjpegDestroy",
                )?),
                state_create: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(Handle, *mut Handle) -> c_int,
                >(need("nvjpegJpegStateCreate")?),
                state_destroy: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Handle) -> c_int>(
                    need("nvjpegJpegStateDestroy")?,
                ),
                info: std::mem::transmute::<*mut c_void, Info>(need("nvjpegGetImageInfo")?),
                decode: std::mem::transmute::<*mut c_void, Decode>(need("nvjpegDecode")?),
            })
        }
    }
}

/// The library in use on a device. Clones are the same.
#[derive(Clone)]
pub struct Jpegs(Arc<Inner>);

struct Inner {
    context: Context,
    api: Api,
    handle: Handle,
    version: (u32, u32, u32),
    /// It refuses what breaks the rules of JPEG.
    is_strict: bool,
    states: Mutex<States>,
}

/// The library's states, and what they have memory for.
#[derive(Debug, Default)]
struct States {
    /// Those that no decode uses now.
    idle: Vec<State>,
    all: usize,
    /// Of the largest pictures that each of all has seen, together.
    pixels: u64,
}

/// What becomes of a picture that wants a state.
#[derive(Debug)]
enum Found {
    /// This one has it; the others are to be ended first.
    State(State, Vec<State>),
    /// One is to be made, and counts already; the others are to be ended first.
    New(Vec<State>),
    Busy,
}

impl States {
    /// A state for so many pixels, which count from now on.
    fn find(&mut self, pixels: u64) -> Found {
        // The smallest that has memory for it, or else the largest of the others.
        let fits = |state: &State| state.seen >= pixels;
        self.idle.sort_unstable_by_key(|state| state.seen);
        let at = self.idle.iter().position(fits).or(self.idle.len().checked_sub(1));
        let own = at.map(|at| self.idle.remove(at));
        if own.is_none() && self.all >= STATES {
            return Found::Busy;
        }
        let more = pixels.saturating_sub(own.as_ref().map_or(0, |state| state.seen));
        let idle: u64 = self.idle.iter().map(|state| state.seen).sum();
        let alone = self.all == self.idle.len() + usize::from(own.is_some());
        if self.pixels - idle + more > ROOM && !alone {
            self.idle.extend(own);
            return Found::Busy;
        }
        let mut ended = Vec::new();
        while self.pixels + more > ROOM
            && let Some(state) = self.idle.pop()
        {
            self.pixels -= state.seen;
            self.all -= 1;
            ended.push(state);
        }
        self.pixels += more;
        match own {
            Some(State { handle, seen }) => Found::State(State { handle, seen: seen + more }, ended),
            None => {
                self.all += 1;
                Found::New(ended)
            }
        }
    }

    /// One that is ended, or was not made.
    fn less(&mut self, seen: u64) {
        self.pixels -= seen;
        self.all -= 1;
    }
}

// SAFETY: nvJPEG says that its handle may be used by several threads at once.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// `nvjpegJpegState_t`: whoever has it is the only one.
#[derive(Debug)]
struct State {
    handle: Handle,
    /// Pixels of the largest picture that it has seen, which it has memory for.
    seen: u64,
}

// SAFETY: it belongs to no thread, and no two use it at once.
unsafe impl Send for State {}

impl std::fmt::Debug for Jpegs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Jpegs").field(&self.0.version).finish()
    }
}

/// A decode, and what it uses.
#[derive(Debug)]
pub struct Decoding {
    _file: Bytes,
    place: DeviceMemory,
    state: Option<State>,
    jpegs: Jpegs,
    failed: bool,
}

impl Drop for Decoding {
    fn drop(&mut self) {
        let Some(state) = self.state.take() else { return };
        if self.failed || state.seen > KEPT {
            self.jpegs.0.states().less(state.seen);
            self.jpegs.0.end(state);
        } else {
            self.jpegs.0.states().idle.push(state);
        }
    }
}

impl Inner {
    fn states(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a lost device nothing is given back.
    fn end(&self, state: State) {
        if self.context.enter().is_ok() {
            // SAFETY: made once, ended once, and no decode uses it.
            unsafe { (self.api.state_destroy)(state.handle) };
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let idle = std::mem::take(&mut self.states().idle);
        idle.into_iter().for_each(|state| self.end(state));
        if self.context.enter().is_ok() {
            // SAFETY: made once, ended once; decodes keep `self`.
            unsafe { (self.api.destroy)(self.handle) };
        }
    }
}

fn said(doing: &'static str, call: &'static str, status: c_int) -> Result<(), JpegError> {
    if status == 0 { Ok(()) } else { Err(JpegError::Said { doing, call, status }) }
}

impl Jpegs {
    /// Opens the library at this path, or the one that the machine has, for a device. Never panics, whatever is missing.
    pub fn open(context: &Context, path: Option<&Path>) -> Result<Self, NoJpegs> {
        let paths = path.map_or_else(|| LIBRARIES.map(PathBuf::from).into(), |path| vec![path.to_owned()]);
        let (mut missing, mut unfit) = (None, None);
        for path in &paths {
            // SAFETY: the library runs code of its own when it is opened, and is what the operator installed as nvJPEG.
            let library = match unsafe { libloading::Library::new(path) } {
                Ok(library) => library,
                Err(error) => {
                    missing.get_or_insert_with(|| super::driver::reason(&error));
                    continue;
                }
            };
            let find = |name: &str| {
                // SAFETY: the address of a function, taken for no more than an address.
                let symbol = unsafe { library.get::<*mut c_void>(name.as_bytes()) }.ok()?;
                // SAFETY: a symbol is where the function is.
                Some(unsafe { symbol.try_as_raw_ptr()? }).filter(|found| !found.is_null())
            };
            let found = Self::found(context, path, &find);
            // It may have begun threads and taken memory, so it is never closed.
            std::mem::forget(library);
            match found {
                Ok(jpegs) => return Ok(jpegs),
                Err(error) => {
                    unfit.get_or_insert(error);
                }
            }
        }
        // One that is there and does not work says more than one that is not there.
        Err(unfit.unwrap_or_else(|| NoJpegs::Library { paths, reason: missing.unwrap_or_default() }))
    }

    /// The same with any way to find a function; what it finds stays.
    fn found(
        context: &Context,
        path: &Path,
        find: &dyn Fn(&str) -> Option<*mut c_void>,
    ) -> Result<Self, NoJpegs> {
        const DOING: &str = "starting nvJPEG";
        // SAFETY: `find` looks into a library that has nvJPEG's functions under their names.
        let api = unsafe { Api::new(find) };
        let api = api.map_err(|function| NoJpegs::Function { path: path.into(), function })?;
        let start = |error| NoJpegs::Start { path: path.into(), error };
        let mut version = [0; 3];
        for (property, value) in (0..).zip(&mut version) {
            // SAFETY: it writes one number.
            let status = unsafe { (api.property)(property, value) };
            said("asking for nvJPEG's version", "nvjpegGetProperty", status).map_err(start)?;
        }
        if !VERSIONS.contains(&version[0]) {
            return Err(NoJpegs::Version { path: path.into(), version: version[0] });
        }
        context.enter().map_err(|error| start(error.into()))?;
        let mut handle = std::ptr::null_mut();
        let (mut begun, mut is_strict) = (Err(JpegError::Busy), false);
        // A library that does not know a flag calls it a wrong parameter.
        for flags in [STRICT | SMOOTH, STRICT, 0] {
            is_strict = flags & STRICT != 0 && api.create.is_some();
            begun = match api.create {
                // SAFETY: it writes one handle; without allocators of ours it uses CUDA's.
                Some(create) => said(DOING, "nvjpegCreateEx", unsafe {
                    create(BACKEND, std::ptr::null(), std::ptr::null(), flags, &raw mut handle)
                }),
                // SAFETY: it writes one handle.
                None => said(DOING, "nvjpegCreateSimple", unsafe { (api.create_simple)(&raw mut handle) }),
            };
            if !matches!(begun, Err(JpegError::Said { status: 2 | 9, .. })) {
                break;
            }
        }
        begun.map_err(start)?;
        let version = version.map(c_int::unsigned_abs);
        let states = Mutex::default();
        let version = (version[0], version[1], version[2]);
        Ok(Self(Arc::new(Inner { context: context.clone(), api, handle, version, is_strict, states })))
    }

    /// Its version.
    pub fn version(&self) -> (u32, u32, u32) {
        self.0.version
    }

    /// Whether it was told to refuse what breaks the rules of JPEG; an old one cannot be.
    pub fn is_strict(&self) -> bool {
        self.0.is_strict
    }

    /// How many of the library's states there are, and the pixels of the largest pictures that each has seen, together: it has
    /// memory for as many, of the device and pinned.
    pub fn room(&self) -> (usize, u64) {
        let states = self.0.states();
        (states.all, states.pixels)
    }

    /// Decodes a file to pixels that lie so in `place`. What it takes besides time on the device may be CPU time of this
    /// thread: the library unpacks some files there.
    pub fn decode(
        &self,
        stream: &Stream,
        file: Bytes,
        frame: &Frame,
        place: &Span,
    ) -> Result<Pending<Decoding>, JpegError> {
        let inner = &self.0;
        let (components, output) = match frame.format {
            Format::Rgb => (3, RGB),
            Format::Gray => (1, LUMA),
            Format::Nv12 | Format::I420 => return Err(JpegError::Place),
        };
        let fits = frame.bytes().is_some_and(|bytes| bytes <= place.bytes()) && frame.planes[0] == 0;
        if !fits || stream.context() != &inner.context || place.memory().context() != &inner.context {
            return Err(JpegError::Place);
        }
        inner.context.enter()?;
        self.look(&file, (frame.width, frame.height, components))?;
        let state = self.state(u64::from(frame.width) * u64::from(frame.height))?;
        let handle = state.handle;
        let mut image = Image { channel: [std::ptr::null_mut(); COMPONENTS], pitch: [0; COMPONENTS] };
        image.channel[0] = place.address() as *mut u8;
        image.pitch[0] = frame.strides[0] as usize;
        let (bytes, length) = (file.as_ptr(), file.len());
        let memory = place.memory().clone();
        let used =
            Decoding { _file: file, place: memory, state: Some(state), jpegs: self.clone(), failed: false };
        let mut status = 0;
        let mut pending = stream.start(used, |_, stream| {
            // SAFETY: the file is as long as that, and the place as large as the library itself says that the picture
            // is; both, and the state, are kept until the event.
            status = unsafe {
                (inner.api.decode)(inner.handle, handle, bytes, length, output, &raw mut image, stream)
            };
            (DECODING, "nvjpegDecode", 0)
        })?;
        if let Err(error) = said(DECODING, "nvjpegDecode", status) {
            // Some of it may be on its way, which the context waits for.
            pending.change(|decoding| decoding.failed = true);
            return Err(error);
        }
        Ok(pending)
    }

    /// Whether the library reads in the file what we have read in it.
    fn look(&self, file: &Bytes, expected: (u32, u32, u32)) -> Result<(), JpegError> {
        let (mut components, mut sampling) = (0, 0);
        let (mut widths, mut heights) = ([0; COMPONENTS], [0; COMPONENTS]);
        // SAFETY: the file is as long as that, and the library writes two numbers and four in each table.
        let status = unsafe {
            (self.0.api.info)(
                self.0.handle,
                file.as_ptr(),
                file.len(),
                &raw mut components,
                &raw mut sampling,
                widths.as_mut_ptr(),
                heights.as_mut_ptr(),
            )
        };
        said("reading a JPEG's head for the GPU", "nvjpegGetImageInfo", status)?;
        let found = (widths[0], heights[0], components);
        let same = |found: c_int, expected: u32| u32::try_from(found) == Ok(expected);
        if !(same(found.0, expected.0) && same(found.1, expected.1) && same(found.2, expected.2)) {
            return Err(JpegError::Other { found, expected });
        }
        // NVJPEG_CSS_UNKNOWN.
        if sampling < 0 { Err(JpegError::Sampling) } else { Ok(()) }
    }

    fn state(&self, pixels: u64) -> Result<State, JpegError> {
        let found = self.0.states().find(pixels);
        let (own, ended) = match found {
            Found::State(state, ended) => (Some(state), ended),
            Found::New(ended) => (None, ended),
            Found::Busy => return Err(JpegError::Busy),
        };
        ended.into_iter().for_each(|state| self.0.end(state));
        if let Some(state) = own {
            return Ok(state);
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: it writes one handle.
        let status = unsafe { (self.0.api.state_create)(self.0.handle, &raw mut handle) };
        let made = said("making room for a JPEG on the GPU", "nvjpegJpegStateCreate", status);
        made.inspect_err(|_| self.0.states().less(pixels))?;
        Ok(State { handle, seen: pixels })
    }
}

impl Decoding {
    /// Where the pixels are.
    pub fn place(&self) -> &DeviceMemory {
        &self.place
    }
}

#[cfg(test)]
mod tests {
    use super::super::Driver;
    use super::*;

    fn library() -> (PathBuf, &'static libloading::Library) {
        let path = std::env::current_exe().unwrap().with_file_name(penstock_standin_driver::FILE);
        // SAFETY: the stand-in, which does nothing when it is opened.
        let library = unsafe { libloading::Library::new(&path) }.unwrap();
        (path, Box::leak(Box::new(library)))
    }

    fn found(without: Option<&str>) -> Result<Jpegs, NoJpegs> {
        let (path, library) = library();
        let context = Driver::open(&path).unwrap().context(0).unwrap();
        let find = |name: &str| {
            // SAFETY: an address.
            let symbol = unsafe { library.get::<*mut c_void>(name.as_bytes()) }.ok()?;
            // SAFETY: an address.
            Some(unsafe { symbol.try_as_raw_ptr()? }).filter(|_| Some(name) != without)
        };
        Jpegs::found(&context, &path, &find)
    }

    #[test]
    fn any_function_may_be_missing_and_none_is_a_panic() {
        for name in [
            "nvjpegGetProperty",
            "nvjpegCreateSimple",
            "nvjpegDestroy",
            "nvjpegJpegStateCreate",
            "nvjpegJpegStateDestroy",
            "nvjpegGetImageInfo",
            "nvjpegDecode",
        ] {
            let error = found(Some(name)).unwrap_err();
            assert!(matches!(error, NoJpegs::Function { function, .. } if function == name), "{error}");
            assert!(error.to_string().ends_with("JPEGs are decoded on the CPU"), "{error}");
        }
        assert!(found(Some("nvjpegCreateEx")).is_ok(), "without flags it works too");
        assert_eq!(found(None).unwrap().version(), (12, 3, 5));
    }

    #[test]
    fn a_machine_without_it_says_so_in_one_line() {
        let (path, _) = library();
        let context = Driver::open(&path).unwrap().context(0).unwrap();
        let told =
            Jpegs::open(&context, Some(Path::new("/nowhere/libnvjpeg.so.12"))).unwrap_err().to_string();
        assert!(
            told.starts_with("nvJPEG is not used: \"/nowhere/libnvjpeg.so.12\" cannot be opened"),
            "{told}"
        );
        assert!(told.ends_with("JPEGs are decoded on the CPU") && !told.contains('\n'), "{told}");
        let error = Jpegs::open(&context, Some(Path::new("libc.so.6"))).unwrap_err();
        assert!(matches!(error, NoJpegs::Function { function: "nvjpegGetProperty", .. }), "{error}");
    }

    #[test]
    fn every_status_says_what_to_do() {
        let kind = |status| JpegError::Said { doing: "", call: "", status }.kind();
        for (kinds, statuses) in [
            (JpegKind::File, &[3, 4, 9, 10][..]),
            (JpegKind::Passing, &[5]),
            (JpegKind::Broken, &[1, 7]),
            (JpegKind::Doubtful, &[2, 6, 8, 11, -1]),
        ] {
            statuses.iter().for_each(|status| assert_eq!(kind(*status), kinds, "{status}"));
        }
        let told = JpegError::Said { doing: DECODING, call: "nvjpegDecode", status: 5 }.to_string();
        assert_eq!(
            told,
            "decoding a JPEG on the GPU: nvjpegDecode said NVJPEG_STATUS_ALLOCATOR_FAILURE (5); the device or the host has no memory left: another process may have it"
        );
    }

    #[test]
    fn states_have_room_for_so_many_pixels_and_no_more() {
        const MI: u64 = 1_000_000;
        let mut states = States::default();
        let take = |states: &mut States, pixels| match states.find(pixels) {
            Found::State(state, ended) => Some((state, ended.len(), "known")),
            Found::New(ended) => {
                Some((State { handle: std::ptr::null_mut(), seen: pixels }, ended.len(), "new"))
            }
            Found::Busy => None,
        };
        let large: Vec<_> = (0..2).map(|_| take(&mut states, 12 * MI).unwrap().0).collect();
        assert!(take(&mut states, 2 * MI).is_none(), "two of 12 megapixels have all of the room but one");
        let small = take(&mut states, MI).unwrap().0;
        for state in large {
            states.less(state.seen);
        }
        states.idle.push(small);
        assert_eq!((states.all, states.pixels), (1, MI));
        // The smallest that has been as large is taken again, and grows if there is none.
        let (state, ended, which) = take(&mut states, 3 * MI).unwrap();
        assert_eq!((state.seen, ended, which, states.pixels), (3 * MI, 0, "known", 3 * MI));
        let mut busy: Vec<_> = (0..7).map(|_| take(&mut states, 3 * MI).unwrap().0).collect();
        assert!(take(&mut states, 1).is_none(), "there are eight");
        assert_eq!((states.all, states.pixels), (8, 24 * MI));
        states.idle.append(&mut busy);
        // What rests makes room for what is larger.
        let (own, ended, _) = take(&mut states, 16 * MI).unwrap();
        assert_eq!((own.seen, ended), (16 * MI, 4));
        assert_eq!((states.all, states.pixels), (4, 16 * MI + 3 * 3 * MI));
        drop(states);
        let mut states = States::default();
        assert!(take(&mut states, 100 * MI).is_some(), "one that is alone is asked of the library");
    }
}
