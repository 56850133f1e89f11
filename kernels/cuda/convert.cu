/* A tensor to another: datatype, order of dimensions, x * mul + add of each channel. */
#include "prepare_core.h"

#define CONVERT_THREADS 256
/* Elements of a thread where order stays; far enough apart that a warp's are neighbours. */
#define CONVERT_EACH 4

typedef struct {
    u64 from, to;
    u64 factors; /* float[2 * channels]: mul and add of each */
    u64 pixels;  /* of one row of the batch, in one channel */
    u64 rows;
    u32 channels;
    u32 from_dtype, to_dtype;
    u32 from_layout, to_layout;
    u32 plain; /* the numbers stay as they are */
} Convert;
SIZE_IS(Convert, 64);

DEV float changed(const Convert *job, float value, u32 channel) {
    if (job->plain) {
        return value;
    }
    const float *factors = (const float *)job->factors + 2 * channel;
    return sum(product(value, factors[0]), factors[1]);
}

/* Every element stays where it is. */
DEV void convert_same(const Convert *job, Place block, Place thread) {
    u64 all = job->rows * job->channels * job->pixels;
    u64 at = (u64)block.x * (CONVERT_THREADS * CONVERT_EACH) + thread.x;
    for (u32 each = 0; each < CONVERT_EACH; each++, at += CONVERT_THREADS) {
        if (at < all) {
            u32 channel = 0;
            if (!job->plain) {
                u64 number = job->to_layout == LAYOUT_PLANAR ? at / job->pixels : at;
                channel = (u32)(number % job->channels);
            }
            store(job->to, job->to_dtype, at, changed(job, load(job->from, job->from_dtype, at), channel));
        }
    }
}

/* A thread moves the channels of one pixel. */
DEV void convert_turned(const Convert *job, Place block, Place thread) {
    u64 number = (u64)block.x * CONVERT_THREADS + thread.x;
    if (number >= job->rows * job->pixels) {
        return;
    }
    u64 row = number / job->pixels;
    u64 at = number % job->pixels;
    u64 begin = row * job->pixels * job->channels;
    UNROLL(unroll 2)
    for (u32 channel = 0; channel < job->channels; channel++) {
        u64 planar = begin + channel * job->pixels + at;
        u64 interleaved = begin + at * job->channels + channel;
        u64 from = job->from_layout == LAYOUT_PLANAR ? planar : interleaved;
        u64 to = job->to_layout == LAYOUT_PLANAR ? planar : interleaved;
        store(job->to, job->to_dtype, to, changed(job, load(job->from, job->from_dtype, from), channel));
    }
}

#ifdef __CUDACC__
#define SIMPLE(name, type, body)                                                    \
    extern "C" __global__ void __launch_bounds__(256) name(const type job) {        \
        Place block = {blockIdx.x, blockIdx.y, blockIdx.z};                         \
        Place thread = {threadIdx.x, threadIdx.y, threadIdx.z};                     \
        body(&job, block, thread);                                                  \
    }
#else
#define SIMPLE(name, type, body)                                                    \
    static void name(const void *args, Place block, Place threads) {                \
        EACH(threads, body((const type *)args, block, thread))                      \
    }
#endif

SIMPLE(penstock_convert_same, Convert, convert_same)
SIMPLE(penstock_convert_turned, Convert, convert_turned)
