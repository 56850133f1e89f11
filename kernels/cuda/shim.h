/* What a kernel source may use, in both worlds.
 *
 * The sources in this folder are the common part of CUDA C++ and C11. NVRTC compiles them for GPUs; any C compiler compiles
 * them for the CPU, where tests and the STAND-IN driver run them. So:
 *
 *   - NAME_core.h has pure functions for one element: no include, nothing of libm, + - * / and conversions only;
 *   - NAME.cu has a struct of arguments, and for each kernel what one thread does. Where threads of a block share memory, a
 *     kernel is a list of stages with a barrier between each two. On a GPU the barrier is __syncthreads(); on a CPU a
 *     stage is run for every thread of the block before the next begins. A barrier that only some threads reach cannot be
 *     written down at all, and no fibres are needed to run one;
 *   - a product is rounded before it is added to anything (product, sum): both worlds give the same bits.
 */
#ifndef PENSTOCK_SHIM_H
#define PENSTOCK_SHIM_H

typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef unsigned long long u64;

/* Where a block is in the grid, or a thread in its block. */
typedef struct {
    u32 x, y, z;
} Place;

/* Sixteen bytes that are moved at once. */
#ifdef __CUDACC__
typedef struct __align__(16) {
    u32 part[4];
} Wide;
#else
typedef struct {
    _Alignas(16) u32 part[4];
} Wide;
#endif

#ifdef __CUDACC__
#define DEV static __device__ __forceinline__
#else
#define DEV static inline __attribute__((unused))
#endif

/* How often a loop's body stands in the machine code; no loop of ours is worth more than a handful of registers. */
#ifdef __CUDACC__
#define UNROLL(times) _Pragma(#times)
#else
#define UNROLL(times)
#endif

/* The arguments of a kernel have the same layout here and in kernels/src/cuda/args.rs. */
#ifdef __CUDACC__
#define SIZE_IS(type, bytes) static_assert(sizeof(type) == bytes, #type)
#else
#define SIZE_IS(type, bytes) _Static_assert(sizeof(type) == bytes, #type)
#endif

DEV u32 bits_of(float value) {
#ifdef __CUDACC__
    return __float_as_uint(value);
#else
    union {
        float value;
        u32 bits;
    } both;
    both.value = value;
    return both.bits;
#endif
}

DEV float float_of(u32 bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    union {
        float value;
        u32 bits;
    } both;
    both.bits = bits;
    return both.value;
#endif
}

/* Reads of memory that nobody writes while a kernel runs: a GPU may keep them in its read-only cache, and begin them early. */
#ifdef __CUDACC__
DEV u32 read8(u64 address) { return __ldg((const u8 *)address); }
DEV i32 read_i16(u64 address) { return __ldg((const i16 *)address); }
DEV u32 read32(u64 address) { return __ldg((const u32 *)address); }
DEV u64 read64(u64 address) { return __ldg((const u64 *)address); }
DEV Wide read_wide(u64 address) {
    uint4 four = __ldg((const uint4 *)address);
    Wide wide = {{four.x, four.y, four.z, four.w}};
    return wide;
}
#else
DEV u32 read8(u64 address) { return *(const u8 *)address; }
DEV i32 read_i16(u64 address) { return *(const i16 *)address; }
DEV u32 read32(u64 address) { return *(const u32 *)address; }
DEV u64 read64(u64 address) { return *(const u64 *)address; }
DEV Wide read_wide(u64 address) { return *(const Wide *)address; }
#endif

/* Bytes of two words, by their numbers: 0 to 3 are those of `low`, the lowest first, 4 to 7 those of `high`. The lowest four bits
 * of `which` say the lowest byte. */
DEV u32 picked(u32 low, u32 high, u32 which) {
#ifdef __CUDACC__
    return __byte_perm(low, high, which);
#else
    u64 both = (u64)high << 32 | low;
    u32 result = 0;
    for (u32 n = 0; n < 4; n++) {
        result |= (u32)(both >> 8 * (which >> 4 * n & 7) & 0xff) << 8 * n;
    }
    return result;
#endif
}

/* The word that begins `bytes` (0 to 3) bytes behind where `low` begins. */
DEV u32 shifted(u32 low, u32 high, u32 bytes) {
#ifdef __CUDACC__
    return __funnelshift_r(low, high, 8 * bytes);
#else
    return (u32)(((u64)high << 32 | low) >> 8 * bytes);
#endif
}

/* `add` and two products: of the two signed halves of `weights` and the two low bytes of `bytes`, or the two high ones. */
DEV i32 dot_low(u32 weights, u32 bytes, i32 add) {
#ifdef __CUDACC__
    i32 result;
    asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(weights), "r"(bytes), "r"(add));
    return result;
#else
    return add + (i16)(weights & 0xffff) * (i32)(bytes & 0xff) + (i16)(weights >> 16) * (i32)(bytes >> 8 & 0xff);
#endif
}

DEV i32 dot_high(u32 weights, u32 bytes, i32 add) {
#ifdef __CUDACC__
    i32 result;
    asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(weights), "r"(bytes), "r"(add));
    return result;
#else
    return dot_low(weights, bytes >> 16, add);
#endif
}

/* Four numbers as bytes, the first the lowest; what is below 0 or above 255 becomes that. */
DEV u32 clipped(i32 first, i32 second, i32 third, i32 fourth) {
#ifdef __CUDACC__
    u32 upper, result;
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(upper) : "r"(fourth), "r"(third), "r"(0));
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(second), "r"(first), "r"(upper));
    return result;
#else
    i32 all[4] = {first, second, third, fourth};
    u32 result = 0;
    for (u32 n = 0; n < 4; n++) {
        result |= (u32)(all[n] < 0 ? 0 : all[n] > 255 ? 255 : all[n]) << 8 * n;
    }
    return result;
#endif
}

/* Rounded, and never fused with what comes after. */
DEV float product(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

DEV float sum(float a, float b) {
#ifdef __CUDACC__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

#endif
