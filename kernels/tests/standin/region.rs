//! Arenas in memory of the device: who has which part of it, and until when.

use bytes::Bytes;
use penstock_kernels::arena::{Arena, DeviceArena, DeviceRun, Kind};
use penstock_kernels::cuda::{Context, Stream};

use crate::driver::StandIn;

const SLOT: usize = 4096;
const SERVER: u64 = 7;

fn read(context: &Context, stream: &Stream, arena: &DeviceArena, run: &DeviceRun) -> Vec<u8> {
    let bytes = run.whole().len();
    let landing = Arena::new(Kind::Pinned { context }, bytes, SLOT).unwrap();
    let landing = landing.run(&[bytes], 1).unwrap().seal().unwrap();
    let (landed, _) =
        stream.download(arena.memory(), run.whole().start, landing, 0, 0..1).unwrap().wait().unwrap();
    landed.input(0, 0..1).unwrap().to_vec()
}

#[test]
fn what_a_server_never_gave_back_is_nobodys_until_it_is_another() {
    let standin = StandIn::new("");
    let arena = DeviceArena::new(&standin.context(), 4 * SLOT, SLOT).unwrap();
    let run = arena.run(&[100, 200], 3).unwrap();
    let lease = run.hand_over_to(SERVER);
    // Inputs begin at multiples of 64, their rows lie one after the other.
    let (first, second) = (lease.region(0, 0..3).unwrap(), lease.region(1, 1..3).unwrap());
    assert_eq!((first.offset, first.bytes, second.offset, second.bytes), (0, 300, 320 + 200, 400));
    drop(lease);
    assert_eq!((arena.occupancy().quarantined, arena.occupancy().in_use), (SLOT, SLOT));
    assert!(arena.run(&[4 * SLOT], 1).is_none());
    assert_eq!(arena.amnesty_of(SERVER + 1), 0);
    assert_eq!(arena.amnesty_of(SERVER), SLOT);
    let whole = arena.run(&[4 * SLOT], 1).unwrap().hand_over_to(SERVER).returned();
    drop(whole);
    assert_eq!((arena.occupancy().runs, arena.occupancy().in_use), (0, 0));
}

#[test]
fn a_run_that_a_copy_still_fills_is_given_to_nobody() {
    let standin = StandIn::new("delay=30ms");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let arena = DeviceArena::new(&context, SLOT, SLOT).unwrap();
    let run = arena.run(&[SLOT], 1).unwrap();
    let copy = stream.upload(Bytes::from(vec![1; SLOT]), arena.memory(), 0).unwrap().keeping(run.clone());
    // Nobody waits for it any more, as when all clients of a batch have left.
    drop((run, copy));
    assert!(arena.run(&[SLOT], 1).is_none(), "its memory was another's while a copy was on its way there");
    context.wait().unwrap();
    assert!(arena.run(&[SLOT], 1).is_some());
}

#[test]
fn what_another_left_is_gone_when_a_run_was_zeroed() {
    let standin = StandIn::new("");
    let context = standin.context();
    let stream = context.stream().unwrap();
    let arena = DeviceArena::new(&context, 2 * SLOT, SLOT).unwrap();
    let secret = arena.run(&[2 * SLOT], 1).unwrap();
    stream.upload(Bytes::from(vec![0x5e; 2 * SLOT]), arena.memory(), 0).unwrap().wait().unwrap();
    drop(secret);
    let next = arena.run(&[100, 100], 2).unwrap();
    assert!(read(&context, &stream, &arena, &next).contains(&0x5e), "device memory keeps what was there");
    stream.fill(arena.memory(), next.whole(), 0).unwrap().keeping(next.clone()).wait().unwrap();
    assert!(read(&context, &stream, &arena, &next).iter().all(|byte| *byte == 0));
    // A neighbour's slots were not touched.
    let neighbour = arena.run(&[SLOT], 1).unwrap();
    assert!(read(&context, &stream, &arena, &neighbour).iter().all(|byte| *byte == 0x5e));
}

#[test]
fn all_of_it_goes_back_to_the_driver() {
    let standin = StandIn::new("memory=20000");
    let context = standin.context();
    let error = DeviceArena::new(&context, 1 << 20, SLOT).unwrap_err().to_string();
    assert!(error.starts_with("the GPU gives no arena of 1048576 bytes of its memory"), "{error}");
    let arena = DeviceArena::new(&context, 2 * SLOT, SLOT).unwrap();
    assert_eq!(arena.memory().bytes(), 2 * SLOT);
    arena.memory().export().unwrap();
    let run = arena.run(&[10], 1).unwrap();
    let span = run.span(0, 0..1).unwrap();
    assert!(span.part(0..10).is_some() && span.part(0..11).is_none());
    drop((arena, run, span));
    drop(context);
    assert_eq!(standin.left(), 0);
}
