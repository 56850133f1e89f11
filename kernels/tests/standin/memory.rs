//! What is promised of memory while something is on its way.

use bytes::Bytes;
use penstock_kernels::arena::{Access, Arena, Kind};
use penstock_kernels::cuda::{Context, DeviceMemory, Driver, Kernels, Mark, Pending, Span, Stream};

use crate::driver::StandIn;

const KB: usize = 1024;

/// A run of one row with these bytes, to be read.
fn filled(arena: &Arena, byte: u8, bytes: usize) -> Bytes {
    let run = arena.run(&[bytes], 1).unwrap();
    run.rows(0, 1).unwrap().input(0).unwrap().fill(byte);
    run.seal().unwrap().freeze().bytes(0, 0..1).unwrap()
}

fn download(stream: &Stream, memory: &DeviceMemory) -> Vec<u8> {
    let arena = Arena::new(Kind::Heap, memory.bytes(), 4096).unwrap();
    let run = arena.run(&[memory.bytes()], 1).unwrap().seal().unwrap();
    let (run, _) = stream.download(memory, 0, run, 0, 0..1).unwrap().wait().unwrap();
    run.input(0, 0..1).unwrap().to_vec()
}

fn registered<'a>(context: &'a Context, name: &'a str) -> Kind<'a> {
    Kind::Registered { context, node: "test-of-the-stand-in", name, access: Access::Group(None) }
}

fn called(log: &[String], name: &str) -> usize {
    log.iter().filter(|line| line.split(' ').next() == Some(name)).count()
}

/// Trap 5 of research/gpu-datapath.md: all of it may be used from any thread, which a compiler can say.
#[test]
fn everything_may_go_to_another_thread() {
    fn any<T: Send + Sync>() {}
    any::<Driver>();
    any::<Context>();
    any::<Stream>();
    any::<Mark>();
    any::<DeviceMemory>();
    any::<Span>();
    any::<Kernels>();
    any::<Pending<Bytes>>();
}

/// Trap 1: memory that a CPU reads is not write-combined; and it begins clean.
#[test]
fn pinned_memory_is_portable_and_mapped_and_not_write_combined() {
    let standin = StandIn::new("");
    let context = standin.context();
    let arena = Arena::new(Kind::Pinned { context: &context }, 64 * KB, 4096).unwrap();
    assert_eq!(standin.log().last().map(String::as_str), Some("cuMemHostAlloc bytes=65536 flags=3"));
    assert_eq!(arena.key(), None);
    let run = arena.run(&[64 * KB], 1).unwrap();
    assert!(run.rows(0, 1).unwrap().input(0).unwrap().iter().all(|byte| *byte == 0));
    drop((arena, run));
    assert_eq!(called(&standin.log(), "cuMemFreeHost"), 1);
}

#[test]
fn shared_memory_is_registered_once_and_unregistered_before_it_goes() {
    let standin = StandIn::new("");
    let context = standin.context();
    let arena = Arena::new(registered(&context, "once"), 64 * KB, 4096).unwrap();
    let path = format!("/dev/shm{}", arena.key().unwrap());
    assert!(std::fs::exists(&path).unwrap());
    let bytes = filled(&arena, 7, 10 * KB);
    let memory = context.alloc(10 * KB).unwrap();
    context.stream().unwrap().upload(bytes, &memory, 0).unwrap().wait().unwrap();
    drop(arena);
    assert!(!std::fs::exists(&path).unwrap());
    let log = standin.log();
    assert_eq!((called(&log, "cuMemHostRegister_v2"), called(&log, "cuMemHostUnregister")), (1, 1));
    assert!(log.contains(&"cuMemHostRegister_v2 bytes=65536 flags=3".to_owned()));
}

/// Trap 2: what a model server is to open comes from plain `cuMemAlloc`, and nothing of ours asks for memory of a pool.
#[test]
fn memory_of_the_device_is_plain_and_can_be_exported() {
    let standin = StandIn::new("");
    let context = standin.context();
    standin.log();
    let memory = context.alloc(4 * KB).unwrap();
    assert_ne!(memory.export().unwrap().0, [0; 64]);
    let log = standin.log();
    assert_eq!((called(&log, "cuMemAlloc_v2"), called(&log, "cuIpcGetMemHandle")), (1, 1));
}

/// Trap 3: a copy out of registered memory reads later. Its slot is nobody else's until then, whoever drops what.
#[test]
fn a_slot_that_a_copy_still_reads_is_given_to_nobody() {
    for kind in ["pinned", "registered"] {
        let standin = StandIn::new("delay=60ms");
        let context = standin.context();
        let stream = context.stream().unwrap();
        let kind =
            if kind == "pinned" { Kind::Pinned { context: &context } } else { registered(&context, "reads") };
        let arena = Arena::new(kind, 64 * KB, 4096).unwrap();
        let memory = context.alloc(64 * KB).unwrap();
        drop(stream.upload(filled(&arena, 1, 64 * KB), &memory, 0).unwrap());
        assert_eq!(arena.occupancy().in_use, 64 * KB);
        assert!(arena.run(&[1], 1).is_none(), "the copy has not come yet");
        assert_eq!(context.reap(), 1);
        context.wait().unwrap();
        assert_eq!((context.reap(), arena.occupancy().in_use), (0, 0));
        // Now another may have it, and what was copied is what was there then.
        let other = filled(&arena, 2, 64 * KB);
        assert!(download(&stream, &memory).iter().all(|byte| *byte == 1));
        drop(other);
    }
}

/// Pageable memory is read before the call returns, so there is nothing to keep; it is kept all the same.
#[test]
fn plain_bytes_may_be_copied_too() {
    let standin = StandIn::new("delay=20ms");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let memory = context.alloc(300).unwrap();
    drop(stream.upload(Bytes::from(vec![9; 100]), &memory, 0).unwrap());
    drop(stream.upload(Bytes::from_static(&[8; 200]), &memory, 100).unwrap());
    let found = download(&stream, &memory);
    assert_eq!((&found[..100], &found[100..]), (&[9; 100][..], &[8; 200][..]));
    assert!(stream.upload(Bytes::new(), &memory, 300).unwrap().wait().is_ok());
}

/// Trap 4: asking does not wait, and no call that waits is made.
#[test]
fn asking_whether_it_is_done_does_not_wait() {
    let standin = StandIn::new("delay=200ms");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let arena = Arena::new(Kind::Pinned { context: &context }, 4 * KB, 4096).unwrap();
    let memory = context.alloc(4 * KB).unwrap();
    let mut pending = stream.upload(filled(&arena, 1, 4 * KB), &memory, 0).unwrap();
    standin.log();
    assert!(pending.poll().unwrap().is_none());
    let log = standin.log();
    assert!(log.iter().all(|line| !line.contains("Synchronize")), "{log:?}");
    let mut asked = 0;
    let (bytes, _) = loop {
        if let Some(done) = pending.poll().unwrap() {
            break done;
        }
        asked += 1;
        std::thread::yield_now();
    };
    assert!(asked > 0 && bytes.len() == 4 * KB);
    // Once it was taken, there is nothing to wait for.
    assert!(pending.poll().unwrap().is_none());
    assert!(pending.wait().unwrap_err().to_string().starts_with("waiting for what was taken before"));
}

#[test]
fn a_copy_lands_in_rows_that_stay_claimed_until_it_has() {
    let standin = StandIn::new("delay=60ms");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let arena = Arena::new(registered(&context, "lands"), 64 * KB, 4096).unwrap();
    let memory = context.alloc(4 * KB).unwrap();
    drop(stream.fill(&memory, 0..4 * KB, 5).unwrap());
    let run = arena.run(&[KB], 8).unwrap();
    let rows = run.rows(2, 4).unwrap();
    let mut landing = stream.download(&memory, 0, rows, 0, 0..4).unwrap();
    assert!(run.rows(2, 1).is_none() && run.rows(5, 1).is_none() && run.seal().is_none());
    // Others write beside it meanwhile.
    run.rows(0, 2).unwrap().input(0).unwrap().fill(1);
    run.rows(6, 2).unwrap().input(0).unwrap().fill(2);
    assert!(landing.poll().unwrap().is_none());
    drop(landing.wait().unwrap());
    let sealed = run.seal().unwrap();
    let wanted: Vec<u8> = [1, 1, 5, 5, 5, 5, 2, 2].into_iter().flat_map(|byte| [byte; KB]).collect();
    assert_eq!(sealed.input(0, 0..8).unwrap(), wanted);
    // What is not in the claim, or not in the memory, is refused.
    let again = arena.run(&[KB], 8).unwrap();
    assert!(stream.download(&memory, 0, again.rows(2, 4).unwrap(), 0, 0..5).is_err());
    assert!(stream.download(&memory, 0, again.rows(2, 4).unwrap(), 1, 0..1).is_err());
    assert!(stream.download(&memory, 1, again.rows(2, 4).unwrap(), 0, 0..4).is_err());
    assert!(stream.upload(Bytes::from(vec![0; 10]), &memory, 4 * KB - 9).is_err());
    assert!(stream.copy(&memory, 0..KB, &memory, usize::MAX).is_err());
    assert!(again.seal().is_some(), "a refused copy keeps no claim");
}

#[test]
fn a_stream_waits_for_another_where_it_was_told_to() {
    let standin = StandIn::new("delay=30ms");
    let context = standin.context();
    let (first, second) = (context.stream().unwrap(), context.stream().unwrap());
    let memory = context.alloc(KB).unwrap();
    first.fill(&memory, 0..KB, 1).unwrap().wait().unwrap();
    // Three delays on the first, one on the second: without the mark the copy would come first.
    (0..2).for_each(|_| drop(first.fill(&memory, 0..KB, 2).unwrap()));
    drop(first.fill(&memory, 0..KB, 3).unwrap());
    second.after(&first.mark().unwrap()).unwrap();
    assert_eq!(download(&second, &memory), vec![3; KB]);
}

#[test]
fn a_kernel_keeps_what_it_uses_and_its_tables_are_used_again() {
    use penstock_kernels::cuda::Rows;
    let standin = StandIn::new("delay=20ms");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let kernels = Kernels::load(&context).unwrap();
    let rows = Rows { count: 2, bytes: KB, stride: KB };
    let target = context.alloc(2 * KB).unwrap();
    standin.log();
    for byte in 1..=3 {
        let source = context.alloc(2 * KB).unwrap();
        drop(stream.fill(&source, 0..2 * KB, byte).unwrap());
        let launched = kernels.gather(&stream, &[1, 0], (&source.whole(), rows), (&target.whole(), rows));
        // Everything goes at once, and is freed when the device is done.
        drop((source, launched.unwrap()));
        context.wait().unwrap();
        assert_eq!(download(&stream, &target), vec![byte; 2 * KB]);
    }
    let log = standin.log();
    assert_eq!(called(&log, "cuMemHostAlloc"), 1, "tables are made once");
    assert_eq!(called(&log, "cuMemFree_v2"), 3);
    // Two launches at once have a table each.
    let source = context.alloc(2 * KB).unwrap();
    let launch =
        || kernels.gather(&stream, &[0, 1], (&source.whole(), rows), (&target.whole(), rows)).unwrap();
    drop((launch(), launch()));
    assert_eq!(called(&standin.log(), "cuMemHostAlloc"), 1);
    context.wait().unwrap();
}

#[test]
fn all_comes_back_to_the_driver() {
    let standin = StandIn::new("delay=5ms");
    {
        let context = standin.context();
        let stream = context.stream().unwrap();
        let kernels = Kernels::load(&context).unwrap();
        let arena = Arena::new(registered(&context, "back"), 64 * KB, 4096).unwrap();
        let pinned = Arena::new(Kind::Pinned { context: &context }, 64 * KB, 4096).unwrap();
        let memory = context.alloc(KB).unwrap();
        for arena in [&arena, &pinned] {
            drop(stream.upload(filled(arena, 1, KB), &memory, 0).unwrap());
        }
        assert!(standin.left() >= 7);
        drop((kernels, stream, memory, arena, pinned));
        context.wait().unwrap();
    }
    assert_eq!(standin.left(), 0);
}

#[test]
fn many_threads_use_one_device() {
    let standin = StandIn::new("delay=100us");
    let context = standin.context();
    let arena = Arena::new(Kind::Pinned { context: &context }, 256 * KB, 4096).unwrap();
    std::thread::scope(|scope| {
        for thread in 1..=4u8 {
            let (context, arena) = (&context, &arena);
            scope.spawn(move || {
                let stream = context.stream().unwrap();
                let memory = context.alloc(4 * KB).unwrap();
                for round in 0..50u8 {
                    let byte = thread.wrapping_mul(50).wrapping_add(round);
                    let Some(run) = arena.run(&[4 * KB], 1) else { continue };
                    run.rows(0, 1).unwrap().input(0).unwrap().fill(byte);
                    let bytes = run.seal().unwrap().freeze().bytes(0, 0..1).unwrap();
                    drop(stream.upload(bytes, &memory, 0).unwrap());
                    if round % 8 == 0 {
                        assert_eq!(download(&stream, &memory), vec![byte; 4 * KB]);
                    }
                }
            });
        }
    });
    context.wait().unwrap();
    assert_eq!(arena.occupancy().in_use, 0);
}
