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
