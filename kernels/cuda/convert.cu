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
    u64 factors = job->factors + 8 * channel;
    return sum(product(value, float_of(read32(factors))), float_of(read32(factors + 4)));
}

/* The channel of an element, and how many of the same channel come from it on. */
DEV u32 channel_at(const Convert *job, u64 at, u64 *left) {
    u64 number = at;
    *left = 1;
    if (job->to_layout == LAYOUT_PLANAR) {
        number = at / job->pixels;
        *left = job->pixels - (at - number * job->pixels);
    }
    return (u32)(number % job->channels);
}

DEV void convert_one(const Convert *job, u64 at) {
    u64 left;
    u32 channel = job->plain ? 0 : channel_at(job, at, &left);
    store(job->to, job->to_dtype, at, changed(job, load(job->from, job->from_dtype, at), channel));
}

/* Every element stays where it is. */
DEV void convert_same(const Convert *job, Place block, Place thread) {
    u64 all = job->rows * job->channels * job->pixels;
    u64 at = (u64)block.x * (CONVERT_THREADS * CONVERT_EACH) + thread.x;
    for (u32 each = 0; each < CONVERT_EACH; each++, at += CONVERT_THREADS) {
        if (at < all) {
            convert_one(job, at);
        }
    }
}

/* The same, where both tensors begin at a multiple of 16 bytes: a thread moves eight elements at once. */
DEV void convert_same_wide(const Convert *job, Place block, Place thread) {
    u64 all = job->rows * job->channels * job->pixels;
    u64 at = 8 * ((u64)block.x * CONVERT_THREADS + thread.x);
    if (at + 8 > all) {
        UNROLL(unroll 1)
        for (; at < all; at++) {
            convert_one(job, at);
        }
        return;
    }
    Eight eight = load_eight(job->from, job->from_dtype, at);
    if (!job->plain) {
        u64 behind;
        u32 channel = channel_at(job, at, &behind);
        /* More than eight of the same channel are as good as eight. */
        u32 most = job->to_layout != LAYOUT_PLANAR ? 1 : job->pixels < 8 ? (u32)job->pixels : 8;
        u32 left = behind < 8 ? (u32)behind : 8;
        UNROLL(unroll)
        for (u32 n = 0; n < 8; n++) {
            if (left == 0) {
                channel = channel + 1 == job->channels ? 0 : channel + 1;
                left = most;
            }
            left--;
            eight.of[n] = changed(job, eight.of[n], channel);
        }
    }
    store_eight(job->to, job->to_dtype, at, &eight);
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

/* The same of three channels, where rows have a multiple of eight pixels and both tensors begin at a multiple of 16 bytes: a thread
 * moves eight pixels at once. */
DEV void convert_turned_wide(const Convert *job, Place block, Place thread) {
    u64 number = 8 * ((u64)block.x * CONVERT_THREADS + thread.x);
    if (number >= job->rows * job->pixels) {
        return;
    }
    u64 row = number / job->pixels;
    u64 at = number - row * job->pixels;
    u64 begin = 3 * row * job->pixels;
    /* From one channel's eight to the next, as either tensor has them. */
    u32 planar = job->from_layout == LAYOUT_PLANAR;
    u64 from = planar ? begin + at : begin + 3 * at, from_next = planar ? job->pixels : 8;
    u64 to = planar ? begin + 3 * at : begin + at, to_next = planar ? 8 : job->pixels;
    Eight in[3], out[3];
    UNROLL(unroll)
    for (u32 n = 0; n < 3; n++) {
        in[n] = load_eight(job->from, job->from_dtype, from + n * from_next);
    }
    UNROLL(unroll)
    for (u32 channel = 0; channel < 3; channel++) {
        UNROLL(unroll)
        for (u32 pixel = 0; pixel < 8; pixel++) {
            u32 n = 3 * pixel + channel;
            if (planar) {
                out[n / 8].of[n % 8] = changed(job, in[channel].of[pixel], channel);
            } else {
                out[channel].of[pixel] = changed(job, in[n / 8].of[n % 8], channel);
            }
        }
    }
    UNROLL(unroll)
    for (u32 n = 0; n < 3; n++) {
        store_eight(job->to, job->to_dtype, to + n * to_next, &out[n]);
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
SIMPLE(penstock_convert_same_wide, Convert, convert_same_wide)
SIMPLE(penstock_convert_turned, Convert, convert_turned)
SIMPLE(penstock_convert_turned_wide, Convert, convert_turned_wide)
