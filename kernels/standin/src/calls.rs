//! The functions of `libcuda.so.1` that Penstock calls, and three of the STAND-IN's own.
//!
//! Addresses of the device and handles are numbers here. What a caller passes to be written to is written; an address
//! of his that is none ends the process, as with a real driver.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use crate::kernels;
use crate::memory::{Block, Export, copy, fill, staged};
use crate::script::{Script, VARIABLE};
use crate::stream::{Event, Stream};
use crate::world::{CURRENT, Said, World, call, code, inside, lose, settle, world};

const NAME: &[u8] = b"STAND-IN (host CPU, no GPU)\0";
/// The context of device n is this and n.
const CONTEXT: usize = 0x57A0_0100_0000;

/// Writes what a caller asked for.
pub(crate) fn put<T>(to: *mut T, value: T) -> Said {
    if to.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: not null, and the caller of a C function answers for the rest.
    unsafe { to.write(value) };
    Ok(())
}

/// Reads a text of the caller's.
fn text<'a>(from: *const c_char) -> Option<&'a CStr> {
    // SAFETY: not null, and the caller of a C function answers for its end.
    (!from.is_null()).then(|| unsafe { CStr::from_ptr(from) })
}

/// Tells the stand-in what to do: see `script.rs`. 0, or 1 if it makes no sense.
#[unsafe(no_mangle)]
extern "C" fn penstock_standin_script(words: *const c_char) -> c_int {
    let words = text(words).and_then(|words| words.to_str().ok());
    let added = words.and_then(|words| world(|world| world.script.add(words)));
    c_int::from(added.is_none())
}

/// Copies the log of all calls, one in a line, and forgets it. Returns its bytes, of which as many were copied as there
/// was room for.
#[unsafe(no_mangle)]
extern "C" fn penstock_standin_log(to: *mut u8, room: usize) -> usize {
    let log = world(|world| std::mem::take(&mut world.log)).join("\n");
    copy(to as usize, log.as_ptr() as usize, log.len().min(room));
    log.len()
}

/// How much is left: allocations, pinned blocks, registered ranges, streams, events, modules, retained contexts, and
/// nvJPEG's handles and states together.
#[unsafe(no_mangle)]
extern "C" fn penstock_standin_left() -> usize {
    world(|world| {
        let memory = world.device.len() + world.pinned.len() + world.registered.len();
        memory
            + world.streams.len()
            + world.events.len()
            + world.modules.len()
            + world.retained
            + world.jpegs.left()
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> c_int {
    call("cuInit", format_args!("flags={flags}"), |world| {
        if let Ok(words) = std::env::var(VARIABLE)
            && !world.initialised
        {
            world.script.add(&words).ok_or(code::INVALID_VALUE)?;
        }
        world.initialised = true;
        if let Some((code, _)) = world.script.fault("cuInit") {
            return Err(code);
        }
        if world.script.devices == 0 { Err(code::NO_DEVICE) } else { Ok(()) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    call("cuDriverGetVersion", format_args!(""), |world| put(version, world.script.version))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    call("cuDeviceGetCount", format_args!(""), |world| put(count, world.script.devices))
}

fn device(script: &Script, number: c_int) -> Said {
    if (0..script.devices).contains(&number) { Ok(()) } else { Err(code::INVALID_DEVICE) }
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(to: *mut c_int, number: c_int) -> c_int {
    call("cuDeviceGet", format_args!("number={number}"), |world| {
        device(&world.script, number)?;
        put(to, number)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, room: c_int, number: c_int) -> c_int {
    call("cuDeviceGetName", format_args!("number={number}"), |world| {
        device(&world.script, number)?;
        let bytes = NAME.len().min(usize::try_from(room).unwrap_or_default());
        copy(name as usize, NAME.as_ptr() as usize, bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, number: c_int) -> c_int {
    call("cuDeviceGetAttribute", format_args!("attribute={attribute}"), |world| {
        device(&world.script, number)?;
        let (major, minor) = world.script.capability;
        match attribute {
            75 => put(value, major),
            76 => put(value, minor),
            _ => Err(code::INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, number: c_int) -> c_int {
    call("cuDeviceTotalMem_v2", format_args!("number={number}"), |world| {
        device(&world.script, number)?;
        put(bytes, world.script.memory)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, number: c_int) -> c_int {
    call("cuDevicePrimaryCtxRetain", format_args!("number={number}"), |world| {
        device(&world.script, number)?;
        world.retained += 1;
        put(context, CONTEXT + number.unsigned_abs() as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(number: c_int) -> c_int {
    call("cuDevicePrimaryCtxRelease_v2", format_args!("number={number}"), |world| {
        world.retained = world.retained.checked_sub(1).ok_or(code::INVALID_CONTEXT)?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: usize) -> c_int {
    call("cuCtxSetCurrent", format_args!(""), |world| {
        let known = context == 0 || (world.retained > 0 && context >= CONTEXT);
        CURRENT.set(context);
        if known { Ok(()) } else { Err(code::INVALID_CONTEXT) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> c_int {
    let said = inside("cuCtxSynchronize", format_args!(""), |_| Ok(()));
    if said == 0 { settled("cuCtxSynchronize") } else { said }
}

/// Waits for everything, and says what has become of it.
fn settled(name: &str) -> c_int {
    settle();
    call(name, format_args!("(settled)"), |_| Ok(()))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: *mut usize, flags: c_uint) -> c_int {
    inside("cuStreamCreate", format_args!("flags={flags}"), |world| {
        let handle = world.handle();
        world.streams.insert(handle, Arc::new(Stream::new().ok_or(code::OUT_OF_MEMORY)?));
        put(stream, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: usize) -> c_int {
    let mut gone = None;
    let said = inside("cuStreamDestroy_v2", format_args!(""), |world| {
        gone = Some(world.streams.remove(&stream).ok_or(code::INVALID_HANDLE)?);
        Ok(())
    });
    // With nothing locked: what it still has to do may want the lock.
    drop(gone);
    said
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: usize) -> c_int {
    let mut mark = None;
    let said = inside("cuStreamSynchronize", format_args!(""), |world| {
        mark = Some(world.stream(stream)?.mark());
        Ok(())
    });
    let Some(mark) = mark else { return said };
    mark.wait(1);
    call("cuStreamSynchronize", format_args!("(done)"), |_| Ok(()))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, flags: c_uint) -> c_int {
    inside("cuStreamWaitEvent", format_args!("flags={flags}"), |world| {
        let (stream, event) = (world.stream(stream)?, world.event(event)?);
        let recorded = event.recorded();
        stream.push(std::time::Duration::ZERO, move || event.wait(recorded));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: *mut usize, flags: c_uint) -> c_int {
    inside("cuEventCreate", format_args!("flags={flags}"), |world| {
        let handle = world.handle();
        world.events.insert(handle, Arc::new(Event::default()));
        put(event, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: usize) -> c_int {
    inside("cuEventDestroy_v2", format_args!(""), |world| {
        world.events.remove(&event).map(drop).ok_or(code::INVALID_HANDLE)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: usize, stream: usize) -> c_int {
    inside("cuEventRecord", format_args!(""), |world| {
        let (stream, event) = (world.stream(stream)?, world.event(event)?);
        event.record(&stream);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: usize) -> c_int {
    inside("cuEventQuery", format_args!(""), |world| {
        if world.event(event)?.is_reached() { Ok(()) } else { Err(code::NOT_READY) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: usize) -> c_int {
    let mut found = None;
    let said = inside("cuEventSynchronize", format_args!(""), |world| {
        found = Some(world.event(event)?);
        Ok(())
    });
    let Some(event) = found else { return said };
    event.wait(event.recorded());
    call("cuEventSynchronize", format_args!("(done)"), |_| Ok(()))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, from: usize, to: usize) -> c_int {
    inside("cuEventElapsedTime", format_args!(""), |world| {
        let (from, to) = (world.event(from)?, world.event(to)?);
        if !from.is_reached() || !to.is_reached() {
            return Err(code::NOT_READY);
        }
        put(milliseconds, (to.at().saturating_sub(from.at())).as_secs_f32() * 1000.0)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    inside("cuMemGetInfo_v2", format_args!(""), |world| {
        put(free, world.script.memory.saturating_sub(world.used()))?;
        put(total, world.script.memory)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(to: *mut u64, bytes: usize) -> c_int {
    inside("cuMemAlloc_v2", format_args!("bytes={bytes}"), |world| {
        if bytes == 0 {
            return Err(code::INVALID_VALUE);
        }
        if world.used().saturating_add(bytes) > world.script.memory {
            return Err(code::OUT_OF_MEMORY);
        }
        let block = Block::device(bytes).ok_or(code::OUT_OF_MEMORY)?;
        let at = block.at;
        world.device.insert(at, block);
        put(to, at as u64)
    })
}

/// Takes memory of the device back, which was imported or was not.
fn free(world: &mut World, at: u64, imported: bool) -> Said {
    let known = world.device.get(&(at as usize)).is_some_and(|block| block.imported == imported);
    if !known {
        return Err(code::INVALID_VALUE);
    }
    world.device.remove(&(at as usize));
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(at: u64) -> c_int {
    // A real driver waits for what is on its way, which may use this memory.
    settle();
    inside("cuMemFree_v2", format_args!(""), |world| free(world, at, false))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(to: *mut *mut c_void, bytes: usize, flags: c_uint) -> c_int {
    inside("cuMemHostAlloc", format_args!("bytes={bytes} flags={flags}"), |world| {
        let block = Block::host(bytes).filter(|_| bytes > 0).ok_or(code::OUT_OF_MEMORY)?;
        let at = block.at;
        world.pinned.insert(at, block);
        put(to, at as *mut c_void)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(at: *mut c_void) -> c_int {
    settle();
    inside("cuMemFreeHost", format_args!(""), |world| {
        world.pinned.remove(&(at as usize)).map(drop).ok_or(code::INVALID_VALUE)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostRegister_v2(at: *mut c_void, bytes: usize, flags: c_uint) -> c_int {
    inside("cuMemHostRegister_v2", format_args!("bytes={bytes} flags={flags}"), |world| {
        let (start, end) = (at as usize, at as usize + bytes);
        let overlaps = world.registered.iter().any(|(other, length)| *other < end && start < other + length);
        if overlaps {
            return Err(code::REGISTERED);
        }
        world.registered.insert(start, bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostUnregister(at: *mut c_void) -> c_int {
    settle();
    inside("cuMemHostUnregister", format_args!(""), |world| {
        world.registered.remove(&(at as usize)).map(drop).ok_or(code::NOT_REGISTERED)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: usize) -> c_int {
    inside("cuMemcpyHtoDAsync_v2", format_args!("bytes={bytes}"), |world| {
        let (to, from) = (to as usize, from as usize);
        world.on_device(to, bytes)?;
        let (stream, delay) = (world.stream(stream)?, world.script.delay);
        if world.script.stalls("cuMemcpyHtoDAsync_v2") {
            stream.push(delay, || {
                loop {
                    std::thread::park();
                }
            });
        }
        if world.is_locked(from, bytes) {
            stream.push(delay, move || copy(to, from, bytes));
        } else {
            let bytes = staged(from, bytes);
            stream.push(delay, move || copy(to, bytes.as_ptr() as usize, bytes.len()));
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: usize) -> c_int {
    let to = to as usize;
    let mut wait = None;
    let said = inside("cuMemcpyDtoHAsync_v2", format_args!("bytes={bytes}"), |world| {
        let from = from as usize;
        world.on_device(from, bytes)?;
        let (stream, delay) = (world.stream(stream)?, world.script.delay);
        let garble = world.script.garble && bytes > 0;
        stream.push(delay, move || {
            copy(to, from, bytes);
            if garble {
                fill(to, !staged(from, 1)[0], 1);
            }
        });
        if !world.is_locked(to, bytes) {
            wait = Some(stream.mark());
        }
        Ok(())
    });
    // Pageable memory is written before the call returns.
    wait.into_iter().for_each(|mark| mark.wait(1));
    said
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> c_int {
    inside("cuMemcpyDtoDAsync_v2", format_args!("bytes={bytes}"), |world| {
        let (to, from) = (to as usize, from as usize);
        world.on_device(to, bytes)?;
        world.on_device(from, bytes)?;
        let delay = world.script.delay;
        world.stream(stream)?.push(delay, move || copy(to, from, bytes));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: u64, byte: u8, bytes: usize, stream: usize) -> c_int {
    inside("cuMemsetD8Async", format_args!("bytes={bytes}"), |world| {
        let to = to as usize;
        world.on_device(to, bytes)?;
        let delay = world.script.delay;
        world.stream(stream)?.push(delay, move || fill(to, byte, bytes));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(module: *mut usize, image: *const c_void) -> c_int {
    inside("cuModuleLoadData", format_args!(""), |world| {
        if image.is_null() {
            return Err(code::INVALID_VALUE);
        }
        // A cubin is an ELF file, PTX is text that begins with a comment. What they say is not looked at.
        let head = staged(image as usize, 4);
        if head != *b"\x7fELF" && !head.starts_with(b"//") {
            return Err(code::INVALID_IMAGE);
        }
        let kind = if head.starts_with(b"//") { "PTX" } else { "cubin" };
        world.log.push(format!("(a {kind}: the stand-in has its own kernels)"));
        let handle = world.handle();
        world.modules.push(handle);
        put(module, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: usize) -> c_int {
    inside("cuModuleUnload", format_args!(""), |world| {
        let at = world.modules.iter().position(|known| *known == module).ok_or(code::INVALID_HANDLE)?;
        world.modules.swap_remove(at);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) -> c_int {
    let name = text(name).unwrap_or_default();
    inside("cuModuleGetFunction", format_args!("{name:?}"), |world| {
        if !world.modules.contains(&module) {
            return Err(code::INVALID_HANDLE);
        }
        let kernel = kernels::find(name).ok_or(code::NOT_FOUND)?;
        let handle = world.handle();
        world.functions.insert(handle, kernel);
        put(function, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: usize,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    _shared: c_uint,
    stream: usize,
    params: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> c_int {
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    inside("cuLaunchKernel", format_args!("grid={grid:?} block={block:?}"), |world| {
        let kernel = *world.functions.get(&function).ok_or(code::INVALID_HANDLE)?;
        let fits = grid.iter().chain(&block).all(|side| *side > 0)
            && grid_x <= i32::MAX as u32
            && grid_y <= 65_535
            && grid_z <= 65_535
            && block.iter().product::<u32>() <= 1024;
        if !fits || params.is_null() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: all of our kernels take one argument, to which the caller points.
        let argument = unsafe { params.read() };
        let bytes = staged(argument as usize, kernel.bytes);
        let args: Vec<u64> = bytes
            .chunks(8)
            .map(|chunk| chunk.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte)))
            .collect();
        let (backward, delay) = (world.script.backward, world.script.delay);
        world.stream(stream)?.push(delay, move || {
            if !kernels::run(kernel, grid, block, &args, backward) {
                lose(code::LAUNCH_FAILED);
            }
        });
        Ok(())
    })
}

/// What `cuIpcGetMemHandle` writes.
#[repr(C)]
struct Handle([u8; 64]);

#[unsafe(no_mangle)]
extern "C" fn cuIpcGetMemHandle(to: *mut Handle, at: u64) -> c_int {
    inside("cuIpcGetMemHandle", format_args!(""), |world| {
        let block = world.device.get(&(at as usize)).ok_or(code::INVALID_VALUE)?;
        put(to, Handle(block.export().ok_or(code::INVALID_VALUE)?))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenMemHandle_v2(to: *mut u64, handle: Handle, flags: c_uint) -> c_int {
    inside("cuIpcOpenMemHandle_v2", format_args!("flags={flags}"), |world| {
        let export = Export::read(&handle.0).ok_or(code::INVALID_VALUE)?;
        if export.process == std::process::id() {
            return Err(code::INVALID_CONTEXT);
        }
        let block = Block::import(export).ok_or(code::INVALID_VALUE)?;
        let at = block.at;
        world.device.insert(at, block);
        put(to, at as u64)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcCloseMemHandle(at: u64) -> c_int {
    settle();
    inside("cuIpcCloseMemHandle", format_args!(""), |world| free(world, at, true))
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(said: c_int, name: *mut *const c_char) -> c_int {
    let text: &CStr = match said {
        0 => c"CUDA_SUCCESS",
        code::INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        code::OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        code::NOT_INITIALISED => c"CUDA_ERROR_NOT_INITIALIZED",
        code::NO_DEVICE => c"CUDA_ERROR_NO_DEVICE",
        code::INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        code::ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        code::REGISTERED => c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        code::NOT_REGISTERED => c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        code::LAUNCH_FAILED => c"CUDA_ERROR_LAUNCH_FAILED",
        _ => return code::INVALID_VALUE,
    };
    match put(name, text.as_ptr()) {
        Ok(()) => 0,
        Err(code) => code,
    }
}
