/* Elements of tensors: what kernels/src/normalise/convert.rs computes, bit for bit. */
#ifndef PENSTOCK_NUMBER_CORE_H
#define PENSTOCK_NUMBER_CORE_H

#include "shim.h"

enum { DTYPE_U8 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2, DTYPE_F32 = 3 };

DEV u32 size_of(u32 dtype) { return dtype == DTYPE_U8 ? 1 : dtype == DTYPE_F32 ? 4 : 2; }

/* To the nearest integer, ties to even, within 0 and 255; NaN is 0. */
DEV u32 u8_of(float value) {
    if (!(value > 0.0f)) {
        return 0;
    }
    if (value >= 255.0f) {
        return 255;
    }
    /* 2^23: a sum has no bits left for a fraction, and is rounded to nearest, ties to even. */
    return bits_of(sum(value, 8388608.0f)) & 0xff;
}

/* Half precision, to nearest, ties to even; NaN keeps its upper bits and is quiet. */
DEV u32 f16_of(float value) {
    u32 bits = bits_of(value);
    u32 sign = (bits >> 16) & 0x8000;
    u32 magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return sign | 0x7e00 | ((magnitude >> 13) & 0x1ff);
    }
#ifdef __CUDACC__
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
#else
    if (magnitude >= 0x47800000) {
        return sign | 0x7c00;
    }
    if (magnitude < 0x38800000) {
        /* Below the smallest normal: adding 0.5 puts the bits of the result where they belong, and rounds them. */
        return sign | (bits_of(sum(float_of(magnitude), 0.5f)) - bits_of(0.5f));
    }
    u32 odd = (magnitude >> 13) & 1;
    return sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13);
#endif
}

/* The upper half, to nearest, ties to even; NaN keeps its upper bits and is quiet. */
DEV u32 bf16_of(float value) {
    u32 bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return (bits >> 16) | 0x40;
    }
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* Exact. */
DEV float of_f16(u32 bits) {
    u32 sign = (bits & 0x8000) << 16;
    u32 exponent = (bits >> 10) & 0x1f;
    u32 fraction = bits & 0x3ff;
    u32 magnitude;
    if (exponent == 0) {
        magnitude = bits_of(product((float)fraction, float_of(0x33800000)));
    } else if (exponent == 31) {
        magnitude = 0x7f800000 | fraction << 13;
    } else {
        magnitude = (exponent + 112) << 23 | fraction << 13;
    }
    return float_of(sign | magnitude);
}

/* Eight elements that are moved at once. */
typedef struct {
    float of[8];
} Eight;

/* Element `at` and the seven behind it. The first lies at a multiple of eight elements, up to 16 bytes. */
DEV Eight load_eight(u64 from, u32 dtype, u64 at) {
    Eight eight;
    if (dtype == DTYPE_U8) {
        u64 bytes = read64(from + at);
        UNROLL(unroll)
        for (u32 n = 0; n < 8; n++) {
            eight.of[n] = (float)(u32)(bytes >> 8 * n & 0xff);
        }
    } else if (dtype == DTYPE_F32) {
        UNROLL(unroll)
        for (u32 half = 0; half < 2; half++) {
            Wide wide = read_wide(from + 4 * at + 16 * half);
            UNROLL(unroll)
            for (u32 n = 0; n < 4; n++) {
                eight.of[4 * half + n] = float_of(wide.part[n]);
            }
        }
    } else {
        Wide wide = read_wide(from + 2 * at);
        UNROLL(unroll)
        for (u32 n = 0; n < 8; n++) {
            u32 bits = wide.part[n / 2] >> 16 * (n % 2) & 0xffff;
            eight.of[n] = dtype == DTYPE_F16 ? of_f16(bits) : float_of(bits << 16);
        }
    }
    return eight;
}

DEV void store_eight(u64 to, u32 dtype, u64 at, const Eight *eight) {
    if (dtype == DTYPE_U8) {
        u64 bytes = 0;
        UNROLL(unroll)
        for (u32 n = 0; n < 8; n++) {
            bytes |= (u64)u8_of(eight->of[n]) << 8 * n;
        }
        *(u64 *)(to + at) = bytes;
    } else if (dtype == DTYPE_F32) {
        UNROLL(unroll)
        for (u32 half = 0; half < 2; half++) {
            Wide wide;
            UNROLL(unroll)
            for (u32 n = 0; n < 4; n++) {
                wide.part[n] = bits_of(eight->of[4 * half + n]);
            }
            *(Wide *)(to + 4 * at + 16 * half) = wide;
        }
    } else {
        Wide wide;
        UNROLL(unroll)
        for (u32 n = 0; n < 4; n++) {
            float low = eight->of[2 * n], high = eight->of[2 * n + 1];
            wide.part[n] = dtype == DTYPE_F16 ? f16_of(low) | f16_of(high) << 16 : bf16_of(low) | bf16_of(high) << 16;
        }
        *(Wide *)(to + 2 * at) = wide;
    }
}

DEV float load(u64 from, u32 dtype, u64 at) {
    switch (dtype) {
    case DTYPE_U8:
        return (float)((const u8 *)from)[at];
    case DTYPE_F16:
        return of_f16(((const u16 *)from)[at]);
    case DTYPE_BF16:
        return float_of((u32)((const u16 *)from)[at] << 16);
    default:
        return ((const float *)from)[at];
    }
}

DEV void store(u64 to, u32 dtype, u64 at, float value) {
    switch (dtype) {
    case DTYPE_U8:
        ((u8 *)to)[at] = (u8)u8_of(value);
        break;
    case DTYPE_F16:
        ((u16 *)to)[at] = (u16)f16_of(value);
        break;
    case DTYPE_BF16:
        ((u16 *)to)[at] = (u16)bf16_of(value);
        break;
    default:
        ((float *)to)[at] = value;
    }
}

#endif
