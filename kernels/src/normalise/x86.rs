//! Vectors of x86-64: eight pixels at a time.
//!
//! Each function returns how many pixels it has written; fewer than eight are left for the tables. Addresses come from arrays
//! whose length the type says, so nothing is read or written beside them.

use std::arch::x86_64::*;

use super::{Channels, Dtype, Normaliser};

/// Pixels of a step.
const STEP: usize = 8;

const U8: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;
const F32: u8 = 3;

/// Whether this CPU has what the functions below need.
pub(super) fn present() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
}

/// To planes.
pub(super) fn planar(
    normaliser: &Normaliser,
    from: &[u8],
    channels: usize,
    to: &mut [&mut [u8]; 3],
) -> usize {
    if !present() {
        return 0;
    }
    // SAFETY: the CPU has AVX2 and F16C, as was just seen (the answer is kept, so that asking costs a load).
    unsafe {
        match normaliser.dtype {
            Dtype::U8 => planes::<U8, 8>(normaliser, from, channels, to),
            Dtype::F16 => planes::<F16, 16>(normaliser, from, channels, to),
            Dtype::Bf16 => planes::<BF16, 16>(normaliser, from, channels, to),
            Dtype::F32 => planes::<F32, 32>(normaliser, from, channels, to),
        }
    }
}

/// Channels beside each other, from RGB.
pub(super) fn interleaved(normaliser: &Normaliser, from: &[u8], to: &mut [u8]) -> usize {
    if !present() {
        return 0;
    }
    // SAFETY: as above.
    unsafe {
        match normaliser.dtype {
            Dtype::U8 => pixels::<U8, 8>(normaliser, from, to),
            Dtype::F16 => pixels::<F16, 16>(normaliser, from, to),
            Dtype::Bf16 => pixels::<BF16, 16>(normaliser, from, to),
            Dtype::F32 => pixels::<F32, 32>(normaliser, from, to),
        }
    }
}

/// `BYTES` is what eight elements take.
#[target_feature(enable = "avx2,f16c")]
fn planes<const DTYPE: u8, const BYTES: usize>(
    normaliser: &Normaliser,
    from: &[u8],
    channels: usize,
    to: &mut [&mut [u8]; 3],
) -> usize {
    let mul = normaliser.mul.map(|mul| _mm256_set1_ps(mul));
    let add = normaliser.add.map(|add| _mm256_set1_ps(add));
    let [first, second, third] = to;
    let (first, second, third) = (
        first.as_chunks_mut::<BYTES>().0,
        second.as_chunks_mut::<BYTES>().0,
        third.as_chunks_mut::<BYTES>().0,
    );
    let count = normaliser.channels.count();
    if channels == 1 {
        let steps = from.as_chunks::<STEP>().0;
        for (to, channel) in [first, second, third].into_iter().zip(0..count) {
            for (to, gray) in to.iter_mut().zip(steps) {
                let values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load8(gray)));
                store::<DTYPE, BYTES>(affine(values, mul[channel], add[channel]), to);
            }
        }
        return steps.len() * STEP;
    }
    let swap = normaliser.channels == Channels::Bgr;
    let masks: [__m256i; 3] =
        std::array::from_fn(|channel| plane_mask(if swap { 2 - channel } else { channel }));
    let steps = from.as_chunks::<{ 3 * STEP }>().0;
    let planes = first.iter_mut().zip(second).zip(third);
    for (rgb, ((first, second), third)) in steps.iter().zip(planes) {
        // Four pixels in each half: bytes 0 to 11 of the first sixteen, and 4 to 15 of the last.
        let (low, high) = halves(rgb);
        let both = _mm256_set_m128i(high, low);
        for (channel, to) in [first, second, third].into_iter().enumerate() {
            let values = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(both, masks[channel]));
            store::<DTYPE, BYTES>(affine(values, mul[channel], add[channel]), to);
        }
    }
    steps.len() * STEP
}

#[target_feature(enable = "avx2,f16c")]
fn pixels<const DTYPE: u8, const BYTES: usize>(normaliser: &Normaliser, from: &[u8], to: &mut [u8]) -> usize {
    let swap = normaliser.channels == Channels::Bgr;
    // Of each third of the 24 elements: which byte of the pixels each comes from, and its factors.
    let source = |element: usize| {
        let channel = element % 3;
        element - channel + if swap { 2 - channel } else { channel }
    };
    let part = |part: usize, values: &[f32; 3]| {
        let values: [f32; 8] = std::array::from_fn(|lane| values[(part * 8 + lane) % 3]);
        load_ps(&values)
    };
    let mask = |part: usize, start: usize| {
        let bytes: [u8; 16] =
            std::array::from_fn(|lane| if lane < 8 { (source(part * 8 + lane) - start) as u8 } else { 0x80 });
        load16(&bytes)
    };
    let masks = [mask(0, 0), mask(1, 6), mask(2, 8)];
    let mul: [__m256; 3] = [part(0, &normaliser.mul), part(1, &normaliser.mul), part(2, &normaliser.mul)];
    let add: [__m256; 3] = [part(0, &normaliser.add), part(1, &normaliser.add), part(2, &normaliser.add)];
    let steps = from.as_chunks::<{ 3 * STEP }>().0;
    let thirds = to.as_chunks_mut::<BYTES>().0.as_chunks_mut::<3>().0;
    for (rgb, to) in steps.iter().zip(thirds) {
        let (low, high) = halves(rgb);
        let sources = [low, middle(rgb), high];
        for (part, to) in to.iter_mut().enumerate() {
            let bytes = _mm_shuffle_epi8(sources[part], masks[part]);
            let values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
            store::<DTYPE, BYTES>(affine(values, mul[part], add[part]), to);
        }
    }
    steps.len() * STEP
}

/// The product is rounded before the sum, as tables do it.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn affine(values: __m256, mul: __m256, add: __m256) -> __m256 {
    _mm256_add_ps(_mm256_mul_ps(values, mul), add)
}

/// Lane `i` of the result is the channel `source` of pixel `i`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn plane_mask(source: usize) -> __m256i {
    let bytes: [u8; 32] = std::array::from_fn(|at| {
        let (lane, byte) = (at / 4, at % 4);
        let start = if lane < 4 { 0 } else { 4 };
        if byte == 0 { (start + 3 * (lane % 4) + source) as u8 } else { 0x80 }
    });
    // SAFETY: 32 bytes are read from an array of 32.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn store<const DTYPE: u8, const BYTES: usize>(values: __m256, to: &mut [u8; BYTES]) {
    let to = to.as_mut_ptr();
    match DTYPE {
        U8 => {
            // With NaN as the first operand, the second is the result: 0.
            let kept = _mm256_min_ps(_mm256_max_ps(values, _mm256_setzero_ps()), _mm256_set1_ps(255.0));
            let words = low_halves(_mm256_cvtps_epi32(kept));
            let bytes = _mm_packus_epi16(words, words);
            // SAFETY: `BYTES` is 8 for this datatype, and 8 bytes are written.
            unsafe { _mm_storel_epi64(to.cast(), bytes) }
        }
        F16 => {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
            // SAFETY: `BYTES` is 16 for this datatype, and 16 bytes are written.
            unsafe { _mm_storeu_si128(to.cast(), halves) }
        }
        BF16 => {
            let bits = _mm256_castps_si256(values);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
            let chosen = _mm256_blendv_epi8(rounded, quiet, nan);
            let words = low_halves(_mm256_srli_epi32::<16>(chosen));
            // SAFETY: as for half precision.
            unsafe { _mm_storeu_si128(to.cast(), words) }
        }
        // SAFETY: `BYTES` is 32 for this datatype, and 32 bytes are written.
        _ => unsafe { _mm256_storeu_ps(to.cast(), values) },
    }
}

/// Eight numbers below 65,536 as words.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn low_halves(values: __m256i) -> __m128i {
    _mm_packus_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256::<1>(values))
}

/// The first and the last sixteen bytes of eight pixels.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves(rgb: &[u8; 24]) -> (__m128i, __m128i) {
    // SAFETY: 16 bytes from offset 0 and 16 from offset 8 are inside 24.
    unsafe { (_mm_loadu_si128(rgb.as_ptr().cast()), _mm_loadu_si128(rgb.as_ptr().add(8).cast())) }
}

/// Sixteen bytes from the seventh.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn middle(rgb: &[u8; 24]) -> __m128i {
    // SAFETY: 16 bytes from offset 6 are inside 24.
    unsafe { _mm_loadu_si128(rgb.as_ptr().add(6).cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 bytes are read from an array of 16.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load8(bytes: &[u8; 8]) -> __m128i {
    // SAFETY: 8 bytes are read from an array of 8.
    unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_ps(values: &[f32; 8]) -> __m256 {
    // SAFETY: 8 values are read from an array of 8.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}
