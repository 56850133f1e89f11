//! f32 to the other datatypes, in integers: the same on every machine, and what a CPU's own instructions give.

use super::Dtype;

/// The bits of `value` as an element of `dtype`.
pub(super) fn bits(dtype: Dtype, value: f32) -> u32 {
    match dtype {
        // `as` takes what is outside of 0 to 255 to the next of the two, and NaN to 0.
        Dtype::U8 => u32::from(value.round_ties_even() as u8),
        Dtype::F16 => u32::from(f16_bits(value)),
        Dtype::Bf16 => u32::from(bf16_bits(value)),
        Dtype::F32 => value.to_bits(),
    }
}

/// Half precision, rounded to nearest, ties to even; what is too large is infinite. NaN stays NaN, quiet, with its upper bits.
pub fn f16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | ((magnitude >> 13) & 0x1ff) as u16;
    }
    if magnitude >= 0x4780_0000 {
        // 65,536 and more.
        return sign | 0x7c00;
    }
    if magnitude < 0x3880_0000 {
        // Below the smallest normal: adding 0.5 puts the bits of the result where they belong, and rounds them.
        let shifted = f32::from_bits(magnitude) + 0.5;
        return sign | (shifted.to_bits() - 0.5f32.to_bits()) as u16;
    }
    let odd = (magnitude >> 13) & 1;
    // The exponent's bias goes from 127 to 15; a carry out of the fraction goes into the exponent, as it should.
    sign | ((magnitude - (112 << 23) + 0xfff + odd) >> 13) as u16
}

/// The upper half of an f32, rounded to nearest, ties to even. NaN stays NaN, quiet.
pub fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// What a half is worth; exact.
pub fn f32_of_f16(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let (exponent, fraction) = (u32::from(bits >> 10) & 0x1f, u32::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => (fraction as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        31 => 0x7f80_0000 | fraction << 13,
        _ => (exponent + 112) << 23 | fraction << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// What a bf16 is worth; exact.
pub fn f32_of_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
