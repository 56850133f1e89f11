//! All that the STAND-IN knows: what was allocated, which streams and events there are, what it was told, what was
//! called.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::kernels::Kernel;
use crate::memory::Block;
use crate::script::Script;
use crate::stream::{Event, Stream};

/// Error codes of the driver.
pub(crate) mod code {
    pub(crate) const INVALID_VALUE: i32 = 1;
    pub(crate) const OUT_OF_MEMORY: i32 = 2;
    pub(crate) const NOT_INITIALISED: i32 = 3;
    pub(crate) const NO_DEVICE: i32 = 100;
    pub(crate) const INVALID_DEVICE: i32 = 101;
    pub(crate) const INVALID_IMAGE: i32 = 200;
    pub(crate) const INVALID_CONTEXT: i32 = 201;
    pub(crate) const INVALID_HANDLE: i32 = 400;
    pub(crate) const NOT_FOUND: i32 = 500;
    pub(crate) const NOT_READY: i32 = 600;
    pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
    pub(crate) const REGISTERED: i32 = 712;
    pub(crate) const NOT_REGISTERED: i32 = 713;
    pub(crate) const LAUNCH_FAILED: i32 = 719;
}

/// What a call says.
pub(crate) type Said = Result<(), i32>;

/// Everything. Handles are numbers, none of which is given out twice.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) initialised: bool,
    pub(crate) script: Script,
    pub(crate) lost: Option<i32>,
    pub(crate) log: Vec<String>,
    last: usize,
    pub(crate) retained: usize,
    /// By address.
    pub(crate) device: BTreeMap<usize, Block>,
    pub(crate) pinned: BTreeMap<usize, Block>,
    /// Address and bytes of registered memory.
    pub(crate) registered: BTreeMap<usize, usize>,
    pub(crate) streams: BTreeMap<usize, Arc<Stream>>,
    pub(crate) events: BTreeMap<usize, Arc<Event>>,
    pub(crate) modules: Vec<usize>,
    pub(crate) functions: BTreeMap<usize, Kernel>,
    /// Of nvJPEG.
    pub(crate) jpegs: crate::nvjpeg::Handles,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);

thread_local! {
    /// The context of a thread.
    pub(crate) static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Locks everything.
pub(crate) fn world<T>(use_it: impl FnOnce(&mut World) -> T) -> T {
    let mut guard: MutexGuard<'_, Option<World>> = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    use_it(guard.get_or_insert_with(World::default))
}

/// A call of function `name`: it is written down, fails if it was told to, and is otherwise what `body` makes of it.
pub(crate) fn call(name: &str, told: std::fmt::Arguments<'_>, body: impl FnOnce(&mut World) -> Said) -> i32 {
    let said = world(|world| {
        world.log.push(format!("{name} {told}"));
        if let Some(code) = world.lost {
            return Err(code);
        }
        if !world.initialised && name != "cuInit" {
            return Err(code::NOT_INITIALISED);
        }
        if let Some((code, lost)) = world.script.fault(name) {
            if lost {
                world.lost = Some(code);
            }
            return Err(code);
        }
        body(world)
    });
    said.err().unwrap_or_default()
}

/// The same of a function that needs a current context.
pub(crate) fn inside(
    name: &str,
    told: std::fmt::Arguments<'_>,
    body: impl FnOnce(&mut World) -> Said,
) -> i32 {
    call(name, told, |world| if CURRENT.get() == 0 { Err(code::INVALID_CONTEXT) } else { body(world) })
}

impl World {
    /// A new handle.
    pub(crate) fn handle(&mut self) -> usize {
        self.last += 0x10;
        0x57A0_0000 + self.last
    }

    pub(crate) fn stream(&self, handle: usize) -> Result<Arc<Stream>, i32> {
        self.streams.get(&handle).cloned().ok_or(code::INVALID_HANDLE)
    }

    pub(crate) fn event(&self, handle: usize) -> Result<Arc<Event>, i32> {
        self.events.get(&handle).cloned().ok_or(code::INVALID_HANDLE)
    }

    /// Whether an allocation of the device has all of these bytes. A real driver says so when it is asked to copy; a
    /// kernel that goes astray loses the device.
    pub(crate) fn on_device(&self, at: usize, bytes: usize) -> Said {
        let block = self.device.range(..=at).next_back();
        let known = block.is_some_and(|(_, block)| block.contains(at, bytes));
        if known { Ok(()) } else { Err(code::INVALID_VALUE) }
    }

    /// Whether host memory is pinned or registered, all of it.
    pub(crate) fn is_locked(&self, at: usize, bytes: usize) -> bool {
        let pinned = self.pinned.range(..=at).next_back().is_some_and(|(_, block)| block.contains(at, bytes));
        let registered = self.registered.range(..=at).next_back();
        pinned || registered.is_some_and(|(start, length)| at + bytes <= start + length)
    }

    /// Events after all that is on its way.
    pub(crate) fn marks(&self) -> Vec<Arc<Event>> {
        self.streams.values().map(|stream| stream.mark()).collect()
    }

    pub(crate) fn used(&self) -> usize {
        self.device.values().filter(|block| !block.imported).map(|block| block.bytes).sum()
    }
}

/// Waits for all that is on its way, with nothing locked.
pub(crate) fn settle() {
    let marks = world(|world| world.marks());
    marks.iter().for_each(|mark| mark.wait(1));
}

/// Something went wrong on a stream.
pub(crate) fn lose(code: i32) {
    world(|world| world.lost.get_or_insert(code).to_owned());
}
