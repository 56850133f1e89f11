//! What decoding holds in memory stays within the limit also where no header says how much it will be.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::alloc::System;
use std::cell::Cell;

use penstock_kernels::allocated::{self, Counting};
use penstock_prepare::{Declaration, Limits, Pipeline, PrepareError, Preset, Scratch};

#[global_allocator]
static ALLOCATOR: Counting<System> = Counting(System);

/// Bits as VP8L packs them: the lowest first.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    used: usize,
}

impl Bits {
    fn put(&mut self, value: u32, width: usize) {
        for bit in 0..width {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            *self.bytes.last_mut().unwrap() |= ((value >> bit & 1) as u8) << (self.used % 8);
            self.used += 1;
        }
    }

    /// A simple code of a single symbol of eight bits, which then takes no bits.
    fn single(&mut self, symbol: u32) {
        self.put(0b101, 3);
        self.put(symbol, 8);
    }

    /// A code of eleven symbols, 1 to 10 bits long, for which a decoder has a table of 1,024 entries: 107 bits.
    fn costly(&mut self) {
        // In this order the lengths of codes for lengths are stored; the lengths 1 to 10 get codes of 3 or 4 bits.
        const ORDER: [u32; 19] = [17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        self.put(0, 1);
        self.put(15, 4);
        for length in ORDER {
            self.put(
                if (1..=6).contains(&length) {
                    3
                } else if (7..=10).contains(&length) {
                    4
                } else {
                    0
                },
                3,
            );
        }
        // Eleven lengths follow.
        self.put(1, 1);
        self.put(1, 3);
        self.put(9, 4);
        for length in (1..=10).chain([10]) {
            let (code, width) = if length <= 6 { (length - 1, 3) } else { (12 + length - 7, 4) };
            // Codes are stored from their highest bit.
            self.put(u32::reverse_bits(code) >> (32 - width), width as usize);
        }
    }
}

/// A lossless WebP of 64 x 64 pixels, one tile, that brings so many groups of prefix codes and names the last of them.
fn groups_of_codes(groups: u32) -> Vec<u8> {
    let mut bits = Bits::default();
    bits.put(0x2f, 8);
    bits.put(63, 14);
    bits.put(63, 14);
    bits.put(0, 4);
    // No transform, no cache of colours; an image of entropy, of tiles of 512 pixels.
    bits.put(0, 1);
    bits.put(0, 1);
    bits.put(1, 1);
    bits.put(7, 3);
    // That image: no cache, and its only pixel has the number of the last group in red and green.
    bits.put(0, 1);
    for symbol in [(groups - 1) & 255, (groups - 1) >> 8, 0, 0, 0] {
        bits.single(symbol);
    }
    for _ in 0..groups * 5 {
        bits.costly();
    }
    let mut body = bits.bytes;
    body.extend([0; 4096]);
    let mut file = b"RIFF____WEBPVP8L".to_vec();
    file.extend((body.len() as u32).to_le_bytes());
    file.extend(body);
    let riff = file.len() as u32 - 8;
    file[4..8].copy_from_slice(&riff.to_le_bytes());
    file
}

#[test]
fn a_lossless_webp_with_more_tables_than_pixels_is_stopped() {
    let declaration = Declaration { preset: Some(Preset::Imagenet), ..Declaration::default() };
    let pipeline = Pipeline::new(&declaration).unwrap();
    let mut tensor = vec![0; pipeline.bytes()];
    let mut run = |file: &[u8], memory: u64| {
        let limits = Limits { memory, ..Limits::default() };
        let before = allocated::bytes();
        let most = Cell::new(0);
        let watch = || {
            most.set(most.get().max(allocated::bytes() - before));
            false
        };
        (pipeline.run(file, &mut tensor, &mut Scratch::default(), &limits, &watch), most.get())
    };

    // It is an image, and few tables do no harm.
    let (made, _) = run(&groups_of_codes(16), 64 << 20);
    assert_eq!(made, Ok(()));

    // 65,536 groups are 4.4 MB of a file, and 1.3 GiB of tables.
    let file = groups_of_codes(65_536);
    assert!(file.len() < 5 << 20, "{}", file.len());
    let (made, most) = run(&file, 64 << 20);
    let Err(error) = made else { panic!("it was decoded") };
    assert!(matches!(error, PrepareError::Memory { limit: 0x400_0000, .. }), "{error}");
    assert!(error.is_clients());
    assert!(most < 96 << 20, "{most} bytes at once");
}
