//! Copies, one after the other, and how one learns that they are done.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::sys::Handle;
use super::{Context, DeviceMemory, Error};
use crate::arena::{RowsMut, Sealed};

/// CU_STREAM_NON_BLOCKING: it does not wait for what libraries do on the legacy stream.
const NON_BLOCKING: u32 = 1;
/// CU_EVENT_BLOCKING_SYNC and CU_EVENT_DISABLE_TIMING: who waits sleeps, and nothing is measured.
const QUIET: u32 = 1 | 2;
/// CU_EVENT_BLOCKING_SYNC.
const TIMED: u32 = 1;

/// What a device does one after the other. Clones are the same stream.
#[derive(Debug, Clone)]
pub struct Stream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: Context,
    handle: Handle,
}

// SAFETY: as for `Context`.
unsafe impl Send for Inner {}
// SAFETY: as for `Context`.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Ok(api) = self.context.enter() {
            // SAFETY: created once, and destroyed once; the driver finishes what is on its way.
            self.context.forget(unsafe { (api.stream_destroy)(self.handle) });
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(super) struct Event {
    context: Context,
    handle: Handle,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}
// SAFETY: as for `Context`.
unsafe impl Sync for Event {}

impl Event {
    fn new(context: &Context, flags: u32) -> Result<Self, Error> {
        let api = context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: it writes one handle.
        let code = unsafe { (api.event_create)(&raw mut handle, flags) };
        context.check("making an event", "cuEventCreate", code)?;
        Ok(Self { context: context.clone(), handle })
    }

    fn record(&self, stream: &Stream) -> Result<(), Error> {
        let api = self.context.enter()?;
        // SAFETY: both live.
        let code = unsafe { (api.event_record)(self.handle, stream.0.handle) };
        self.context.check("recording an event", "cuEventRecord", code)
    }

    /// Whether the device has come so far. Does not wait.
    pub(super) fn is_reached(&self) -> Result<bool, Error> {
        let api = self.context.enter()?;
        // SAFETY: it lives.
        match unsafe { (api.event_query)(self.handle) } {
            600 => Ok(false),
            code => self.context.check("asking for an event", "cuEventQuery", code).map(|()| true),
        }
    }

    fn wait(&self) -> Result<(), Error> {
        let api = self.context.enter()?;
        // SAFETY: it lives.
        let code = unsafe { (api.event_synchronise)(self.handle) };
        self.context.check("waiting for an event", "cuEventSynchronize", code)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(api) = self.context.enter() {
            // SAFETY: created once, and destroyed once.
            self.context.forget(unsafe { (api.event_destroy)(self.handle) });
        }
    }
}

/// A point in a stream with a time, or one for which another stream waits.
#[derive(Debug)]
pub struct Mark(Event);

impl Mark {
    /// Milliseconds of the device from `earlier` to here. Waits until it has come so far.
    pub fn milliseconds_since(&self, earlier: &Self) -> Result<f32, Error> {
        self.0.wait()?;
        let api = self.0.context.enter()?;
        let mut milliseconds = 0.0;
        // SAFETY: both live, and it writes one number.
        let code = unsafe { (api.event_elapsed)(&raw mut milliseconds, earlier.0.handle, self.0.handle) };
        self.0.context.check("measuring", "cuEventElapsedTime", code)?;
        Ok(milliseconds)
    }
}

/// Something that a device does, and all that it uses. Dropped before it is done, that stays with the context until it
/// is.
#[must_use = "what is on its way is asked for with `poll`, or waited for"]
#[derive(Debug)]
pub struct Pending<T: Send + 'static> {
    /// `None`: taken.
    flight: Option<(Event, T)>,
}

impl<T: Send + 'static> Pending<T> {
    /// What was used, once the device is done with it; `None`: not yet, or taken before. Does not wait. After an error
    /// it stays with the context: nothing says what the device does to it.
    pub fn poll(&mut self) -> Result<Option<T>, Error> {
        match &self.flight {
            Some((event, _)) if event.is_reached()? => Ok(self.flight.take().map(|(_, used)| used)),
            _ => Ok(None),
        }
    }

    /// Changes something of what is used that the device knows nothing of.
    pub(super) fn change(&mut self, with: impl FnOnce(&mut T)) {
        if let Some((_, used)) = &mut self.flight {
            with(used);
        }
    }

    /// Keeps something else for as long: what the memory in use belongs to, such as a run of an arena.
    pub fn keeping<U: Send + 'static>(mut self, also: U) -> Pending<(T, U)> {
        Pending { flight: self.flight.take().map(|(event, used)| (event, (used, also))) }
    }

    /// The same, waiting. Not for a thread that has anything else to do.
    pub fn wait(mut self) -> Result<T, Error> {
        match self.flight.take() {
            Some((event, used)) => match event.wait() {
                Ok(()) => Ok(used),
                Err(error) => {
                    self.flight = Some((event, used));
                    Err(error)
                }
            },
            // `poll` took it, and whoever has it knows that it is done.
            None => taken(),
        }
    }
}

/// Whoever waits for what `poll` gave him makes a mistake, and is told so.
fn taken<T>() -> Result<T, Error> {
    Err(Error {
        doing: "waiting for what was taken before",
        call: "none",
        name: "a fault of the caller's".to_owned(),
        code: -1,
    })
}

impl<T: Send + 'static> Drop for Pending<T> {
    fn drop(&mut self) {
        if let Some((event, used)) = self.flight.take() {
            let context = event.context.clone();
            context.keep(event, Box::new(used));
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for crate::arena::Sealed {}
    impl Sealed for crate::arena::RowsMut {}
}

/// Rows of the arena that nobody else reads or writes, for a copy to land in.
pub trait Landing: sealed::Sealed + Send + 'static {
    /// Where rows of an input are; `None`: there are none such.
    #[doc(hidden)]
    fn place(&mut self, input: usize, rows: Range<u32>) -> Option<*mut [u8]>;
}

impl Landing for Sealed {
    fn place(&mut self, input: usize, rows: Range<u32>) -> Option<*mut [u8]> {
        Self::place(self, input, rows)
    }
}

impl Landing for RowsMut {
    /// `rows` are counted from the first of the claim.
    fn place(&mut self, input: usize, rows: Range<u32>) -> Option<*mut [u8]> {
        Self::place(self, input, rows)
    }
}

fn outside(doing: &'static str, call: &'static str) -> Error {
    // CUDA_ERROR_INVALID_VALUE, which is what the driver would say if it looked.
    Error { doing, call, name: "bytes outside of the memory".to_owned(), code: 1 }
}

impl Context {
    /// A new stream.
    pub fn stream(&self) -> Result<Stream, Error> {
        let api = self.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: it writes one handle.
        let code = unsafe { (api.stream_create)(&raw mut handle, NON_BLOCKING) };
        self.check("making a stream", "cuStreamCreate", code)?;
        Ok(Stream(Arc::new(Inner { context: self.clone(), handle })))
    }
}

impl Stream {
    /// The device.
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    /// Copies bytes to the device, from `at` on. Memory of a pinned or a registered arena is read by the device itself,
    /// any other by the driver before this returns.
    pub fn upload(
        &self,
        from: Bytes,
        to: &DeviceMemory,
        at: usize,
    ) -> Result<Pending<(Bytes, DeviceMemory)>, Error> {
        const DOING: &str = "copying to the device";
        const CALL: &str = "cuMemcpyHtoDAsync_v2";
        let address = to.address(at, from.len()).ok_or_else(|| outside(DOING, CALL))?;
        let (source, bytes) = (from.as_ptr().cast::<c_void>(), from.len());
        self.start((from, to.clone()), |api, stream| {
            if bytes == 0 {
                return (DOING, CALL, 0);
            }
            // SAFETY: `Bytes` do not change and do not move, and both sides are kept until the event.
            (DOING, CALL, unsafe { (api.copy_to_device)(address, source, bytes, stream) })
        })
    }

    /// Copies bytes from the device, from `at` on, into rows of an input, which they fill.
    pub fn download<L: Landing>(
        &self,
        from: &DeviceMemory,
        at: usize,
        mut to: L,
        input: usize,
        rows: Range<u32>,
    ) -> Result<Pending<(L, DeviceMemory)>, Error> {
        const DOING: &str = "copying from the device";
        const CALL: &str = "cuMemcpyDtoHAsync_v2";
        let place = to.place(input, rows).ok_or_else(|| outside(DOING, CALL))?;
        let bytes = place.len();
        let address = from.address(at, bytes).ok_or_else(|| outside(DOING, CALL))?;
        self.start((to, from.clone()), |api, stream| {
            if bytes == 0 {
                return (DOING, CALL, 0);
            }
            // SAFETY: whoever has a `Landing` is alone with its bytes, and here that is the `Pending`.
            (DOING, CALL, unsafe { (api.copy_to_host)(place.cast(), address, bytes, stream) })
        })
    }

    /// Copies on the device.
    pub fn copy(
        &self,
        from: &DeviceMemory,
        part: Range<usize>,
        to: &DeviceMemory,
        at: usize,
    ) -> Result<Pending<(DeviceMemory, DeviceMemory)>, Error> {
        const DOING: &str = "copying on the device";
        const CALL: &str = "cuMemcpyDtoDAsync_v2";
        let source = from.address(part.start, part.len()).ok_or_else(|| outside(DOING, CALL))?;
        let target = to.address(at, part.len()).ok_or_else(|| outside(DOING, CALL))?;
        self.start((from.clone(), to.clone()), |api, stream| {
            // SAFETY: both were looked up, and are kept until the event.
            (DOING, CALL, unsafe { (api.copy_on_device)(target, source, part.len(), stream) })
        })
    }

    /// Fills memory of the device, which holds what others left in it.
    pub fn fill(
        &self,
        to: &DeviceMemory,
        part: Range<usize>,
        byte: u8,
    ) -> Result<Pending<DeviceMemory>, Error> {
        const DOING: &str = "filling memory of the device";
        const CALL: &str = "cuMemsetD8Async";
        let target = to.address(part.start, part.len()).ok_or_else(|| outside(DOING, CALL))?;
        self.start(to.clone(), |api, stream| {
            // SAFETY: it was looked up, and is kept until the event.
            (DOING, CALL, unsafe { (api.fill)(target, byte, part.len(), stream) })
        })
    }

    /// A point behind all that was started so far.
    pub fn mark(&self) -> Result<Mark, Error> {
        let event = Event::new(self.context(), TIMED)?;
        event.record(self)?;
        Ok(Mark(event))
    }

    /// What is started here from now on waits, on the device, for that point of another stream.
    pub fn after(&self, mark: &Mark) -> Result<(), Error> {
        let api = self.context().enter()?;
        // SAFETY: both live, and the driver remembers what was recorded by now.
        let code = unsafe { (api.stream_wait)(self.0.handle, mark.0.handle, 0) };
        self.context().check("waiting for another stream", "cuStreamWaitEvent", code)
    }

    /// Starts something that uses `used`. Whether or not the start is heard of, `used` goes nowhere before the device
    /// is done with it.
    pub(super) fn start<T: Send + 'static>(
        &self,
        used: T,
        start: impl FnOnce(&super::sys::Api, Handle) -> (&'static str, &'static str, i32),
    ) -> Result<Pending<T>, Error> {
        let context = self.context();
        context.reap();
        // First, since a copy that is on its way without an event could never be asked for.
        let event = Event::new(context, QUIET)?;
        let api = context.enter()?;
        let (doing, call, code) = start(api, self.0.handle);
        let said = context.check(doing, call, code);
        let recorded = event.record(self);
        if let Err(error) = said.and(recorded.clone()) {
            // Some of it may be on its way, which ends with the event, if there is one; otherwise nobody ever hears of
            // it.
            match recorded {
                Ok(()) => context.keep(event, Box::new(used)),
                Err(_) => std::mem::forget(used),
            }
            return Err(error);
        }
        Ok(Pending { flight: Some((event, used)) })
    }
}
