//! What every failure leads to: a sentence, nothing lost, and nothing given away that the device may still touch.

use bytes::Bytes;
use penstock_kernels::arena::{Access, Arena, Kind as Memory};
use penstock_kernels::cuda::{Absent, IpcHandle, Kernels, Kind, Order, Rows};

use crate::driver::StandIn;

const KB: usize = 1024;

fn filled(arena: &Arena, bytes: usize) -> Bytes {
    arena.run(&[bytes], 1).unwrap().seal().unwrap().freeze().bytes(0, 0..1).unwrap()
}

#[test]
fn a_driver_without_a_device_is_none() {
    for script in ["devices=0", "fail=cuInit:100"] {
        let absent = StandIn::new(script).driver().unwrap_err();
        assert_eq!(absent, Absent::Device, "{script}");
        assert!(
            absent.to_string().ends_with("this container is given no device; preprocessing stays on the CPU")
        );
    }
    // Such as after an update of the driver, until the machine starts anew.
    let absent = StandIn::new("fail=cuInit:803").driver().unwrap_err();
    assert!(absent.to_string().starts_with("no GPU is used: starting the driver: cuInit said"), "{absent}");
    let absent = StandIn::new("fail=cuDeviceGetCount:999").driver().unwrap_err();
    assert!(matches!(absent, Absent::Start(_)));
}

#[test]
fn there_are_as_many_devices_as_the_driver_says() {
    let standin = StandIn::new("devices=2; capability=8.9; memory=4096");
    let driver = standin.driver().unwrap();
    let devices = driver.devices().unwrap();
    assert_eq!(devices.len(), 2);
    assert_eq!((devices[1].number, devices[1].capability, devices[1].memory), (1, (8, 9), 4096));
    assert!(devices[1].name.starts_with("STAND-IN"));
    assert_eq!(driver.version().unwrap(), (12, 8));
    assert!(driver.context(2).is_err() && driver.context(u32::MAX).is_err());
    assert_eq!(driver.context(1).unwrap().device(), &devices[1]);
}

#[test]
fn memory_that_the_device_has_not_may_be_there_later() {
    let standin = StandIn::new("memory=10000");
    let context = standin.context();
    let first = context.alloc(8000).unwrap();
    let error = context.alloc(8000).unwrap_err();
    assert_eq!((error.kind(), error.may_pass()), (Kind::OutOfMemory, true));
    assert_eq!(
        error.to_string(),
        "getting memory of the device: cuMemAlloc_v2 said CUDA_ERROR_OUT_OF_MEMORY (2); the device has no memory left: another process may have it, or ask for less"
    );
    assert_eq!(context.memory().unwrap(), (2000, 10_000));
    drop(first);
    assert!(context.alloc(8000).is_ok());
    assert!(!context.is_lost());
}

#[test]
fn an_arena_that_cannot_be_pinned_is_told_and_leaves_nothing() {
    let standin = StandIn::new("fail=cuMemHostAlloc:2; fail=cuMemHostRegister_v2:800");
    let context = standin.context();
    let told = Arena::new(Memory::Pinned { context: &context }, 64 * KB, 4096).unwrap_err().to_string();
    assert!(
        told.starts_with("the GPU's driver pins no arena of 65536 bytes; an arena of another kind works"),
        "{told}"
    );
    assert!(told.ends_with("raise `memlock` and the memory limit"), "{told}");
    let kind = Memory::Registered {
        context: &context,
        node: "test-refused",
        name: "r",
        access: Access::Group(None),
    };
    let error = Arena::new(kind, 64 * KB, 4096).unwrap_err();
    assert!(error.to_string().contains("registering shared memory: cuMemHostRegister_v2 said"), "{error}");
    let prefix = format!("penstock-test-refused-{}", std::process::id());
    let left = std::fs::read_dir("/dev/shm").unwrap().flatten();
    assert_eq!(left.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).count(), 0);
    // The next attempt works.
    assert!(Arena::new(kind, 64 * KB, 4096).is_ok());
}

#[test]
fn pages_that_the_driver_does_not_let_go_of_stay_mapped() {
    let standin = StandIn::new("fail=cuMemHostUnregister:1");
    let context = standin.context();
    let kind =
        Memory::Registered { context: &context, node: "test-kept", name: "k", access: Access::Group(None) };
    let arena = Arena::new(kind, 64 * KB, 4096).unwrap();
    let name = arena.key().unwrap().to_owned();
    let bytes = filled(&arena, 4 * KB);
    let address = bytes.as_ptr() as usize;
    drop((arena, bytes));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped =
        maps.lines().filter_map(|line| line.split(' ').next()?.split_once('-')).any(|(begin, end)| {
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            (number(begin)..number(end)).contains(&address)
        });
    assert!(mapped, "unmapped under the device");
    assert!(!std::fs::exists(format!("/dev/shm{name}")).unwrap());
}

#[test]
fn a_lost_device_says_so_at_every_call_and_gives_nothing_back() {
    let standin = StandIn::new("delay=20ms");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let arena = Arena::new(Memory::Pinned { context: &context }, 64 * KB, 4096).unwrap();
    let memory = context.alloc(64 * KB).unwrap();
    let mut waiting = stream.upload(filled(&arena, 16 * KB), &memory, 0).unwrap();
    drop(stream.upload(filled(&arena, 16 * KB), &memory, 0).unwrap());
    standin.script("lose=cuEventQuery:700");
    let error = waiting.poll().unwrap_err();
    assert_eq!((error.kind(), error.may_pass()), (Kind::DeviceLost, false));
    assert!(error.to_string().contains("goes on without it"), "{error}");
    assert!(context.is_lost());
    assert_eq!(waiting.wait().unwrap_err().kind(), Kind::DeviceLost);
    assert_eq!(context.alloc(1).unwrap_err().kind(), Kind::DeviceLost);
    assert_eq!(context.stream().unwrap_err().kind(), Kind::DeviceLost);
    assert!(Kernels::load(&context).is_err());
    let told = context.memory().unwrap_err().to_string();
    assert!(told.starts_with("using a device that was lost before"), "{told}");
    // Both slots stay out, whatever is asked: the device may still read them.
    context.reap();
    assert_eq!(arena.occupancy().in_use, 32 * KB);
    // The rest of the arena works on, without the GPU.
    let run = arena.run(&[32 * KB], 1).unwrap();
    run.rows(0, 1).unwrap().input(0).unwrap().fill(1);
    assert!(stream.upload(run.seal().unwrap().freeze().bytes(0, 0..1).unwrap(), &memory, 0).is_err());
    // No call reaches a driver that lost its device, but for the names of errors.
    standin.log();
    drop((stream, memory));
    assert!(standin.log().iter().all(|line| line.starts_with("cuGetErrorName")));
}

#[test]
fn a_copy_that_does_not_start_gives_its_slot_back() {
    let standin = StandIn::new("");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let arena = Arena::new(Memory::Pinned { context: &context }, 64 * KB, 4096).unwrap();
    let memory = context.alloc(64 * KB).unwrap();
    for fault in ["fail=cuMemcpyHtoDAsync_v2:1", "fail=cuEventCreate:2"] {
        standin.script(fault);
        assert!(stream.upload(filled(&arena, 64 * KB), &memory, 0).is_err(), "{fault}");
        context.wait().unwrap();
        assert_eq!(arena.occupancy().in_use, 0, "{fault}");
        assert!(stream.upload(filled(&arena, 64 * KB), &memory, 0).unwrap().wait().is_ok());
    }
}

/// The copy is on its way, and nothing will ever say that it came: its slot is never given to another.
#[test]
fn a_copy_without_an_end_keeps_its_slot() {
    let standin = StandIn::new("fail=cuEventRecord:1");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let arena = Arena::new(Memory::Pinned { context: &context }, 64 * KB, 4096).unwrap();
    let memory = context.alloc(64 * KB).unwrap();
    assert!(stream.upload(filled(&arena, 64 * KB), &memory, 0).is_err());
    context.wait().unwrap();
    assert_eq!(arena.occupancy().in_use, 64 * KB);
}

#[test]
fn a_launch_that_fails_is_no_end_of_launches() {
    let standin = StandIn::new("");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let kernels = Kernels::load(&context).unwrap();
    let memory = context.alloc(4 * KB).unwrap();
    let rows = Rows { count: 1, bytes: KB, stride: KB };
    let (from, to) = (memory.span(0..KB).unwrap(), memory.span(KB..2 * KB).unwrap());
    let launch = || kernels.gather(&stream, &[0], (&from, rows), (&to, rows));
    // Its tables are fetched by a launch of their own.
    for (fault, doing) in [
        ("fail=cuLaunchKernel:701", "fetching a kernel's tables"),
        ("fail=cuLaunchKernel:701@2", "launching a kernel"),
    ] {
        standin.script(fault);
        let Order::Driver(error) = launch().unwrap_err() else { panic!("{fault}: not the driver's") };
        assert_eq!(error.doing, doing);
        launch().unwrap().wait().unwrap();
    }
    // Another launch needs tables of its own, and there are none to be had; later there are.
    let kept: Vec<_> = (0..4).map(|_| launch().unwrap()).collect();
    standin.script("fail=cuMemHostAlloc:2");
    let Order::Driver(error) = launch().unwrap_err() else { panic!("not the driver's") };
    assert_eq!(error.kind(), Kind::OutOfMemory);
    launch().unwrap().wait().unwrap();
    drop(kept);
    standin.script("lose=cuLaunchKernel:719@2");
    let Order::Driver(error) = launch().unwrap_err() else { panic!("not the driver's") };
    assert_eq!((error.kind(), error.doing), (Kind::DeviceLost, "launching a kernel"));
}

#[test]
fn where_machine_code_is_refused_the_driver_compiles_text() {
    let standin = StandIn::new("fail=cuModuleLoadData:209");
    let kernels = Kernels::load(&standin.context()).unwrap();
    assert!(!kernels.are_machine_code());
    let loads: Vec<_> = standin.log().into_iter().filter(|line| line.starts_with("(a ")).collect();
    assert_eq!(loads, ["(a PTX: the stand-in has its own kernels)"]);
    // A device that is older than all of ours has none to try.
    let old = StandIn::new("capability=7.0");
    let error = Kernels::load(&old.context()).unwrap_err();
    assert_eq!(error.kind(), Kind::NoImage);
    assert!(error.to_string().ends_with("a newer driver may help"), "{error}");
    // And one that is newer has the text.
    let new = StandIn::new("capability=13.0");
    assert!(!Kernels::load(&new.context()).unwrap().are_machine_code());
    // Another trouble is not about the image, and is not hidden by the next attempt.
    let full = StandIn::new("fail=cuModuleLoadData:2");
    assert_eq!(Kernels::load(&full.context()).unwrap_err().kind(), Kind::OutOfMemory);
    let missing = StandIn::new("fail=cuModuleGetFunction:500@3");
    assert_eq!(Kernels::load(&missing.context()).unwrap_err().kind(), Kind::Other);
    assert_eq!(missing.log().iter().filter(|line| line.starts_with("cuModuleUnload")).count(), 1);
}

#[test]
fn ipc_that_is_refused_says_what_a_pod_needs() {
    let standin = StandIn::new("fail=cuIpcGetMemHandle:801");
    let context = standin.context();
    let memory = context.alloc(4 * KB).unwrap();
    let error = memory.export().unwrap_err();
    assert_eq!(error.kind(), Kind::Refused);
    assert!(
        error.to_string().contains("a DRA claim of both containers and `shareProcessNamespace`"),
        "{error}"
    );
    let handle = memory.export().unwrap();
    // One's own export, and what never was one.
    assert_eq!(context.open_ipc(&handle, 4 * KB).unwrap_err().kind(), Kind::Refused);
    assert_eq!(context.open_ipc(&IpcHandle([7; 64]), 4 * KB).unwrap_err().kind(), Kind::Refused);
    assert!(!context.is_lost());
}
