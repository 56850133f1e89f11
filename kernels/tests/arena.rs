//! What the arena promises those who write, read and hand over.
#![cfg(test)]

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use penstock_kernels::arena::{Arena, Kind, Misfit, Run, Sealed};
use proptest::prelude::*;

const SLOT: usize = 256;

/// An arena of which nothing may be left out at the end of a test.
struct Watched(Arena);

impl std::ops::Deref for Watched {
    type Target = Arena;
    fn deref(&self) -> &Arena {
        &self.0
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let left = self.0.occupancy();
            assert_eq!((left.in_use, left.runs, left.quarantined), (0, 0, 0), "a leak");
        }
    }
}

fn heap(bytes: usize) -> Watched {
    Watched(Arena::new(Kind::Heap, bytes, SLOT).unwrap())
}

/// A run of one input, its rows filled with these texts of 4 bytes.
fn filled(arena: &Arena, rows: &[&str]) -> Sealed {
    let run = arena.run(&[4], rows.len() as u32).unwrap();
    run.rows(0, rows.len() as u32).unwrap().write_all(0, rows.iter().map(|row| row.as_bytes())).unwrap();
    run.seal().unwrap()
}

#[test]
fn rows_that_another_has_are_refused_until_he_is_done() {
    let arena = heap(4096);
    let run = arena.run(&[4], 4).unwrap();
    let first = run.rows(0, 2).unwrap();
    let last = run.rows(3, 1).unwrap();
    for (from, count) in [(0, 1), (1, 1), (1, 2), (0, 4), (2, 2), (3, 1)] {
        assert!(run.rows(from, count).is_none(), "rows {from} and {count} from there");
    }
    assert!(run.rows(2, 1).is_some());
    drop(first);
    assert!(run.rows(0, 3).is_some());
    assert!(run.seal().is_none(), "somebody still writes");
    drop(last);
    let sealed = run.seal().unwrap();
    assert!(run.rows(0, 1).is_none(), "sealed");
    assert!(run.seal().is_none(), "one is enough");
    assert_eq!(sealed.input(0, 0..4).unwrap().len(), 16);
}

#[test]
fn what_there_is_not_is_refused() {
    let arena = heap(4096);
    assert!(arena.run(&[], 1).is_none());
    assert!(arena.run(&[4], 0).is_none());
    assert!(arena.run(&[usize::MAX, 1], 2).is_none());
    assert!(arena.run(&[usize::MAX], 1).is_none());
    let run = arena.run(&[4, 0], 2).unwrap();
    for (first, count) in [(0, 0), (0, 3), (2, 1), (u32::MAX, 2)] {
        assert!(run.rows(first, count).is_none());
    }
    let mut rows = run.rows(1, 1).unwrap();
    assert_eq!(rows.input(1).unwrap(), [0; 0]);
    assert!(rows.input(2).is_none());
    assert_eq!(rows.write(0, 2, b"abc"), Err(Misfit { input: 0, takes: 2, given: 3 }));
    assert_eq!(rows.write(0, 9, b"abc"), Err(Misfit { input: 0, takes: 0, given: 3 }));
    let told = rows.write_all(0, [&b"ab"[..], b"c"]).unwrap_err().to_string();
    assert_eq!(told, "3 bytes do not fit rows that take 4 bytes of input 0");
    drop(rows);
    let mut sealed = run.seal().unwrap();
    assert!(!sealed.move_rows(1, 0, 2) && !sealed.move_rows(0, 1, u32::MAX));
    assert!(sealed.input(0, 1..3).is_none() && sealed.region(2, 0..1).is_none());
}

#[test]
fn sizes_that_make_no_arena_are_told() {
    for (bytes, slot) in [(0, 4096), (4096, 0), (4096, 100), (4096, 32), (usize::MAX, 4096)] {
        let told = Arena::new(Kind::Heap, bytes, slot).unwrap_err().to_string();
        assert!(told.contains("power of two"), "{told}");
    }
    let told = Arena::new(Kind::Heap, isize::MAX as usize - 8191, 4096).unwrap_err().to_string();
    assert!(told.starts_with("the system has no"), "{told}");
    assert_eq!(Arena::new(Kind::Heap, 5000, 64).unwrap().bytes(), 8192);
}

#[test]
fn a_leavers_hole_is_closed_in_every_input() {
    let arena = heap(4096);
    let run = arena.run(&[2, 1], 5).unwrap();
    for (row, text) in (0..).zip(["aa", "bb", "cc", "dd", "ee"]) {
        let mut rows = run.rows(row, 1).unwrap();
        rows.write(0, 0, text.as_bytes()).unwrap();
        rows.write(1, 0, &text.as_bytes()[..1]).unwrap();
    }
    let mut sealed = run.seal().unwrap();
    // Rows 1 and 2 leave; the last two take their places, then the whole moves over itself.
    assert!(sealed.move_rows(3, 1, 2));
    assert_eq!(sealed.input(0, 0..3).unwrap(), b"aaddee");
    assert_eq!(sealed.input(1, 0..3).unwrap(), b"ade");
    assert!(sealed.move_rows(0, 1, 4));
    assert_eq!(sealed.input(0, 1..5).unwrap(), b"aaddeedd");
}

#[test]
fn bytes_of_a_run_are_the_run_itself_and_keep_it() {
    let arena = heap(4096);
    let sealed = filled(&arena, &["one ", "two ", "last"]);
    let there = sealed.input(0, 1..3).unwrap().as_ptr();
    let frozen = sealed.freeze();
    let bytes = frozen.bytes(0, 1..3).unwrap();
    assert_eq!((bytes.as_ptr(), &bytes[..]), (there, &b"two last"[..]));
    let part = bytes.slice(4..);
    drop((frozen, bytes));
    assert_eq!(arena.occupancy().runs, 1);
    assert_eq!(part, "last");
    drop(part);
    assert_eq!(arena.occupancy().runs, 0);
}

#[test]
fn a_full_arena_says_so_and_has_room_again() {
    let arena = heap(4096);
    let runs: Vec<Run> = std::iter::from_fn(|| arena.run(&[SLOT], 2)).collect();
    assert_eq!(runs.len(), 8);
    let full = arena.occupancy();
    assert_eq!((full.bytes, full.in_use, full.peak, full.runs, full.refused), (4096, 4096, 4096, 8, 1));
    drop(runs);
    assert!(arena.run(&[4096], 1).is_some());
    assert!(arena.run(&[4097], 1).is_none());
    assert_eq!(arena.occupancy().peak, 4096);
}

#[test]
fn inputs_begin_where_wide_registers_like_it() {
    let arena = heap(4096);
    let run = arena.run(&[3, 5, 7], 3).unwrap();
    let mut rows = run.rows(0, 3).unwrap();
    for input in 0..3 {
        assert_eq!(rows.input(input).unwrap().as_ptr() as usize % 64, 0);
    }
}

#[test]
fn what_a_server_never_returned_is_not_given_to_others() {
    let arena = heap(4096);
    let whole = filled(&arena, &["kept"; 1024]);
    drop(whole.hand_over());
    assert!(arena.run(&[1], 1).is_none(), "the server may still read it");
    let held = arena.occupancy();
    assert_eq!((held.in_use, held.quarantined, held.runs), (4096, 4096, 0));
    assert_eq!(arena.amnesty(), 4096);
    let lease = filled(&arena, &["back"; 1024]).hand_over();
    assert_eq!(lease.returned().bytes(0, 0..1).unwrap(), "back");
    assert_eq!(arena.occupancy().quarantined, 0);
    // Another server that went has nothing to do with it.
    drop(filled(&arena, &["hers"; 4]).hand_over_to(7));
    assert_eq!((arena.amnesty(), arena.occupancy().quarantined), (0, SLOT));
    assert_eq!(arena.amnesty_of(7), SLOT);
    // Lent before the server went, dropped after.
    let late = filled(&arena, &["late"; 4]).hand_over();
    arena.amnesty();
    drop(late);
}

#[test]
fn a_zeroing_arena_shows_nobody_what_another_left() {
    let arena = heap(4096);
    drop(filled(&arena, &["mine"; 1024]));
    let run = arena.run(&[4096], 1).unwrap();
    assert_eq!(run.rows(0, 1).unwrap().input(0).unwrap()[..4], *b"mine");
    drop(run);
    let run = arena.zeroing().run(&[4096], 1).unwrap();
    assert!(run.rows(0, 1).unwrap().input(0).unwrap().iter().all(|byte| *byte == 0));
}

/// Threads that claim, write, look again, and take and drop runs, all at once.
#[test]
fn writers_never_meet() {
    const ROWS: u32 = 32;
    let rounds = if cfg!(miri) { 20 } else { 4000 };
    let arena = heap(1 << 16);
    let run = arena.run(&[8, 3], ROWS).unwrap();
    let claimed = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 1..=6_u8 {
            let (run, arena, claimed) = (&run, &arena, &claimed);
            scope.spawn(move || {
                let mut seed = u32::from(thread);
                for _ in 0..rounds {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let (first, count) = (seed >> 8 & (ROWS - 1), 1 + (seed >> 16) % 5);
                    if let Some(mut rows) = run.rows(first, count) {
                        claimed.fetch_add(1, Relaxed);
                        (0..2).for_each(|input| rows.input(input).unwrap().fill(thread));
                        std::thread::yield_now();
                        assert!(
                            (0..2).all(|input| rows.input(input).unwrap().iter().all(|byte| *byte == thread))
                        );
                    }
                    let own = arena.run(&[(seed >> 4) as usize % 3000], 2);
                    if let Some(own) = own {
                        let mut rows = own.rows(0, 2).unwrap();
                        rows.input(0).unwrap().fill(thread);
                        std::thread::yield_now();
                        assert!(rows.input(0).unwrap().iter().all(|byte| *byte == thread));
                    }
                }
            });
        }
    });
    assert!(claimed.load(Relaxed) > 0);
    drop(run.seal().unwrap());
    assert_eq!(arena.occupancy().runs, 0, "what is left of the run keeps nothing");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: if cfg!(miri) { 4 } else { 256 }, ..ProptestConfig::default() })]

    #[test]
    fn rows_move_as_in_a_vector(
        moves in prop::collection::vec((0u32..12, 0u32..12, 0u32..12), 0..12),
        widths in prop::collection::vec(0usize..9, 1..4),
    ) {
        let arena = heap(4096);
        let run = arena.run(&widths, 10).unwrap();
        let mut model: Vec<u8> = (0..10).collect();
        for row in 0..10 {
            let mut rows = run.rows(row, 1).unwrap();
            (0..widths.len()).for_each(|input| rows.input(input).unwrap().fill(row as u8));
        }
        let mut sealed = run.seal().unwrap();
        for (from, to, count) in moves {
            let inside = from + count <= 10 && to + count <= 10;
            prop_assert_eq!(sealed.move_rows(from, to, count), inside);
            if inside {
                model.copy_within(from as usize..(from + count) as usize, to as usize);
            }
        }
        for (input, width) in widths.iter().enumerate() {
            let expected: Vec<u8> = model.iter().flat_map(|row| vec![*row; *width]).collect();
            prop_assert_eq!(sealed.input(input, 0..10).unwrap(), expected);
        }
    }
}

/// With a file in the place of the server, which maps the same memory.
#[cfg(not(miri))]
mod shared {
    use super::*;
    use penstock_kernels::arena::Access;
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;

    fn shared(name: &str) -> Watched {
        let kind = Kind::Shared { node: "test-of-the-arena", name, access: Access::Everyone };
        Watched(Arena::new(kind, 1 << 16, 4096).unwrap())
    }

    #[test]
    fn a_server_reads_inputs_and_writes_outputs_where_it_is_told() {
        let arena = shared("server");
        let key = arena.key().unwrap().to_owned();
        let path = Path::new("/dev/shm").join(&key[1..]);
        let server = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(server.metadata().unwrap().len(), arena.bytes() as u64);

        let inputs = filled(&arena, &["one ", "two ", "last"]);
        let outputs = arena.run(&[2], 3).unwrap().seal().unwrap();
        let (inputs, outputs) = (inputs.hand_over(), outputs.hand_over());
        let region = inputs.region(0, 0..3).unwrap();
        let mut read = vec![0; region.bytes as usize];
        server.read_exact_at(&mut read, region.offset).unwrap();
        assert_eq!(read, b"one two last");
        let region = outputs.region(0, 0..3).unwrap();
        server.write_all_at(b"123456", region.offset).unwrap();
        inputs.returned();
        let answer = outputs.returned().bytes(0, 1..2).unwrap();
        assert_eq!(answer, "34");

        // What is left of an answer keeps the memory, and the memory its name.
        let weak = arena.0.clone();
        drop(answer);
        drop(arena);
        assert!(path.exists());
        drop(weak);
        assert!(!path.exists());
    }

    #[test]
    fn the_heap_has_no_name() {
        assert_eq!(heap(4096).key(), None);
    }
}

/// A server that maps the arena, or that writes less than it said, sees nothing of whoever had the slots before.
#[test]
fn what_another_left_is_not_in_what_is_handed_over() {
    let arena = heap(4 * SLOT);
    let secret = arena.run(&[4 * SLOT], 1).unwrap();
    secret.rows(0, 1).unwrap().input(0).unwrap().fill(0x5e);
    drop(secret);
    // Inputs are written whole; what lies between them, and behind the last, belongs to no row.
    let run = arena.run(&[100, 50], 3).unwrap();
    let mut rows = run.rows(0, 3).unwrap();
    assert!(rows.input(0).unwrap().contains(&0x5e), "rows are the writer's to fill");
    rows.write(0, 0, &[1; 300]).unwrap();
    rows.write(1, 0, &[2; 150]).unwrap();
    drop((rows, run));
    let whole = arena.run(&[2 * SLOT], 1).unwrap();
    let bytes = whole.seal().unwrap();
    assert!(
        !bytes.input(0, 0..1).unwrap().contains(&0x5e),
        "300 and 20 and 150 bytes, and 42 of the last slot"
    );
    drop(bytes);
    // Outputs are a server's to write, and it may write less: they are zero first.
    let outputs = arena.zeroing().run(&[SLOT], 4).unwrap().seal().unwrap();
    assert!(outputs.input(0, 0..4).unwrap().iter().all(|byte| *byte == 0));
}
