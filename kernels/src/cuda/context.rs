//! A device in use, and what is on its way there.

use std::any::Any;
use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::stream::Event;
use super::sys::{Api, Code, Handle};
use super::{Device, Driver, Error, Kind};

/// A device that this process uses. Clones are the same one.
#[derive(Clone)]
pub struct Context(Arc<Inner>);

struct Inner {
    driver: Driver,
    device: Device,
    handle: Handle,
    /// The code that said that the device is lost; 0: it is not.
    lost: AtomicI32,
    /// What nobody waits for any more, and the device may still use.
    aloft: Mutex<Vec<Flight>>,
}

/// Something on its way, and all that it uses.
struct Flight {
    event: Event,
    _keeps: Box<dyn Any + Send>,
}

// SAFETY: the driver's functions may be called from any thread, and the handle is no more than a name.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Context").field(&self.0.device).finish()
    }
}

impl PartialEq for Context {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Context {}

impl Driver {
    /// Begins to use a device. Its primary context is taken, which libraries in the same process use too.
    pub fn context(&self, number: u32) -> Result<Context, Error> {
        let number = c_int::try_from(number).unwrap_or(c_int::MAX);
        let device = self.device(number)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: it writes one handle.
        let code = unsafe { (self.api().context_retain)(&raw mut handle, number) };
        self.check("beginning to use a device", "cuDevicePrimaryCtxRetain", code)?;
        let (lost, aloft) = (AtomicI32::new(0), Mutex::default());
        Ok(Context(Arc::new(Inner { driver: self.clone(), device, handle, lost, aloft })))
    }
}

impl Context {
    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The driver.
    pub fn driver(&self) -> &Driver {
        &self.0.driver
    }

    /// Whether the device is lost to this process.
    pub fn is_lost(&self) -> bool {
        self.0.lost.load(Relaxed) != 0
    }

    /// Bytes of the device's memory that are free, and all of them.
    pub fn memory(&self) -> Result<(u64, u64), Error> {
        let api = self.enter()?;
        let (mut free, mut all) = (0, 0);
        // SAFETY: it writes two numbers.
        let code = unsafe { (api.memory_info)(&raw mut free, &raw mut all) };
        self.check("asking for free memory", "cuMemGetInfo_v2", code)?;
        Ok((free as u64, all as u64))
    }

    /// Waits for all streams. Not for a thread that has anything else to do.
    pub fn wait(&self) -> Result<(), Error> {
        let api = self.enter()?;
        // SAFETY: the context is this thread's.
        let code = unsafe { (api.context_synchronise)() };
        self.check("waiting for the device", "cuCtxSynchronize", code)?;
        self.reap();
        Ok(())
    }

    /// Lets go of what the device is done with and nobody waits for. Returns how much is still on its way. Starting
    /// anything does it too, so that who keeps working need not.
    pub fn reap(&self) -> usize {
        let mut landed = Vec::new();
        let left = {
            let mut aloft = self.aloft();
            landed.extend(aloft.extract_if(.., |flight| matches!(flight.event.is_reached(), Ok(true))));
            aloft.len()
        };
        // What they kept may come back here when it goes, so the lock is free by now.
        drop(landed);
        left
    }

    fn aloft(&self) -> MutexGuard<'_, Vec<Flight>> {
        self.0.aloft.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps something until the device has reached `event`; for ever, if it never does.
    pub(super) fn keep(&self, event: Event, keeps: Box<dyn Any + Send>) {
        self.aloft().push(Flight { event, _keeps: keeps });
        self.reap();
    }

    /// Makes the device this thread's. To be called before any other function of the driver, since a thread of a pool
    /// may have had another.
    pub(super) fn enter(&self) -> Result<&Api, Error> {
        const CALL: &str = "cuCtxSetCurrent";
        let lost = self.0.lost.load(Relaxed);
        if lost != 0 {
            return Err(self.0.driver.error("using a device that was lost before", CALL, lost));
        }
        let api = self.0.driver.api();
        // SAFETY: the context is retained for as long as `self` lives.
        let code = unsafe { (api.context_set)(self.0.handle) };
        self.check("turning to a device", CALL, code)?;
        Ok(api)
    }

    /// What a call of the driver said.
    pub(super) fn check(&self, doing: &'static str, call: &'static str, code: Code) -> Result<(), Error> {
        let said = self.0.driver.check(doing, call, code);
        if let Err(error) = &said
            && error.kind() == Kind::DeviceLost
        {
            self.0.lost.store(error.code, Relaxed);
        }
        said
    }

    /// The same of a call at the end of something's life, where there is nobody to tell.
    pub(super) fn forget(&self, code: Code) -> bool {
        self.check("giving back", "a call", code).is_ok()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What is aloft has a context, so there is none when nobody has one.
        // SAFETY: taken once, and given back once.
        unsafe { (self.driver.api().context_release)(self.device.number as c_int) };
    }
}
