//! Memory of the device, and memory of the host that the device reads and writes by itself.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::sys::{Address, RawIpc};
use super::{Context, Error};

/// CU_MEMHOSTALLOC_PORTABLE and _DEVICEMAP, and the same of cuMemHostRegister: for every context, and at an address of
/// the device. Never WRITECOMBINED, from which a CPU reads uncached: keys are hashed out of this memory, and images
/// resized.
const HOST: u32 = 1 | 2;
/// CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag there is.
const LAZY_PEERS: u32 = 1;

/// Memory of the device, from plain `cuMemAlloc`: the only kind that can be exported to a model server. Clones are the
/// same memory.
///
/// Getting and giving back waits for the device, so it is got once and kept.
#[derive(Debug, Clone)]
pub struct DeviceMemory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: Context,
    address: Address,
    bytes: usize,
    imported: bool,
}

/// What another process needs to map exported memory: 64 bytes, as they go to Triton's `cudasharedmemory` register
/// call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpcHandle(pub [u8; 64]);

/// A part of memory of the device.
#[derive(Debug, Clone)]
pub struct Span {
    memory: DeviceMemory,
    part: Range<usize>,
}

impl Context {
    /// Memory of the device. It holds what others left there.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceMemory, Error> {
        let api = self.enter()?;
        self.reap();
        let mut address = 0;
        // SAFETY: it writes one address.
        let code = unsafe { (api.memory_alloc)(&raw mut address, bytes) };
        self.check("getting memory of the device", "cuMemAlloc_v2", code)?;
        Ok(DeviceMemory(Arc::new(Inner { context: self.clone(), address, bytes, imported: false })))
    }

    /// Memory that another process exported, with so many bytes. Its contents are whatever that process makes of them,
    /// while it lives.
    pub fn open_ipc(&self, handle: &IpcHandle, bytes: usize) -> Result<DeviceMemory, Error> {
        const DOING: &str = "opening memory of another process";
        let api = self.enter()?;
        let (open, _) =
            api.ipc_open.zip(api.ipc_close).ok_or_else(|| missing(DOING, "cuIpcOpenMemHandle_v2"))?;
        let mut address = 0;
        // SAFETY: it writes one address, and looks at the handle's bytes only.
        let code = unsafe { open(&raw mut address, RawIpc(handle.0), LAZY_PEERS) };
        self.check(DOING, "cuIpcOpenMemHandle_v2", code)?;
        Ok(DeviceMemory(Arc::new(Inner { context: self.clone(), address, bytes, imported: true })))
    }
}

/// A function that this driver does not have: what it would say if it had it and did not do it.
fn missing(doing: &'static str, call: &'static str) -> Error {
    Error { doing, call, name: "nothing: this driver does not have it".to_owned(), code: 801 }
}

impl DeviceMemory {
    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// The device.
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    /// A part of it; `None`: it has none such.
    pub fn span(&self, part: Range<usize>) -> Option<Span> {
        let inside = part.start <= part.end && part.end <= self.0.bytes;
        inside.then(|| Span { memory: self.clone(), part })
    }

    /// All of it.
    pub fn whole(&self) -> Span {
        Span { memory: self.clone(), part: 0..self.0.bytes }
    }

    /// For another process, which has to let go of it before this memory goes.
    pub fn export(&self) -> Result<IpcHandle, Error> {
        const DOING: &str = "exporting memory of the device";
        let api = self.0.context.enter()?;
        let export = api.ipc_export.ok_or_else(|| missing(DOING, "cuIpcGetMemHandle"))?;
        let mut handle = RawIpc([0; 64]);
        // SAFETY: it writes one handle.
        let code = unsafe { export(&raw mut handle, self.0.address) };
        self.0.context.check(DOING, "cuIpcGetMemHandle", code)?;
        Ok(IpcHandle(handle.0))
    }

    /// The address of so many bytes from `at` on; `None`: there are not so many.
    pub(super) fn address(&self, at: usize, bytes: usize) -> Option<Address> {
        let inside = at.checked_add(bytes).is_some_and(|end| end <= self.0.bytes);
        inside.then(|| self.0.address + at as u64)
    }
}

impl Span {
    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.part.len()
    }

    /// What it is a part of.
    pub fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// A part of this part; `None`: it has none such.
    pub fn part(&self, part: Range<usize>) -> Option<Self> {
        let inside = part.start <= part.end && part.end <= self.bytes();
        let start = self.part.start;
        inside.then(|| Self { memory: self.memory.clone(), part: start + part.start..start + part.end })
    }

    /// Its first address.
    pub(super) fn address(&self) -> Address {
        self.memory.0.address + self.part.start as u64
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Of a lost device there is nothing to give back.
        let Ok(api) = self.context.enter() else { return };
        let code = match (self.imported, api.ipc_close) {
            // SAFETY: opened once, and closed once.
            (true, Some(close)) => unsafe { close(self.address) },
            (true, None) => return,
            // SAFETY: allocated once, and freed once; who uses it on the device keeps it.
            (false, _) => unsafe { (api.memory_free)(self.address) },
        };
        self.context.forget(code);
    }
}

/// Pinned memory of the host.
#[derive(Debug)]
pub(crate) struct Pinned {
    context: Context,
    base: NonNull<u8>,
}

// SAFETY: memory belongs to no thread, and nothing here follows the pointer.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// So many bytes, all zero.
    pub(crate) fn new(context: &Context, bytes: usize) -> Result<Self, Error> {
        const DOING: &str = "pinning memory";
        const CALL: &str = "cuMemHostAlloc";
        let api = context.enter()?;
        let mut base = std::ptr::null_mut::<c_void>();
        // SAFETY: it writes one address.
        let code = unsafe { (api.host_alloc)(&raw mut base, bytes, HOST) };
        context.check(DOING, CALL, code)?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| context.driver().error(DOING, CALL, 2))?;
        // SAFETY: it is new, nobody else's, and has so many bytes.
        unsafe { base.write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), base })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A lost device may still write to it, for all one knows: then it stays.
        if let Ok(api) = self.context.enter() {
            // SAFETY: allocated once, and freed once; whoever has a pointer keeps `self`.
            self.context.forget(unsafe { (api.host_free)(self.base.as_ptr().cast()) });
        }
    }
}

/// Memory of the host that the driver knows and has pinned.
#[derive(Debug)]
pub(crate) struct Registered {
    context: Context,
    base: NonNull<u8>,
}

// SAFETY: as for `Pinned`.
unsafe impl Send for Registered {}
// SAFETY: as for `Pinned`.
unsafe impl Sync for Registered {}

impl Registered {
    /// Registers memory that its owner keeps mapped until this was [given back](Registered::give_back).
    pub(crate) fn new(context: &Context, base: NonNull<u8>, bytes: usize) -> Result<Self, Error> {
        const DOING: &str = "registering shared memory";
        let api = context.enter()?;
        let both = api.host_register.zip(api.host_unregister);
        let (register, _) = both.ok_or_else(|| missing(DOING, "cuMemHostRegister_v2"))?;
        // SAFETY: the memory is mapped, all of it.
        let code = unsafe { register(base.as_ptr().cast(), bytes, HOST) };
        context.check(DOING, "cuMemHostRegister_v2", code)?;
        Ok(Self { context: context.clone(), base })
    }

    /// `false`: the driver did not let go of it, and it has to stay mapped.
    pub(crate) fn give_back(&self) -> bool {
        let Ok(api) = self.context.enter() else { return false };
        api.host_unregister.is_some_and(|unregister| {
            // SAFETY: registered once, and unregistered once.
            self.context.forget(unsafe { unregister(self.base.as_ptr().cast()) })
        })
    }
}
