/* Crop, resize, turn, normalise, lay out and convert: a whole batch of sources of different sizes in one launch.
 *
 * A block makes TILE_X x TILE_Y pixels of one tensor (blockIdx.z says whose). What these need of the source is a rectangle, of
 * which the block resamples columns into a strip in shared memory, then rows out of it. A rectangle that is too wide for
 * the strip is worked off in several steps: how many depends on the tile alone, so all threads agree.
 */
#include "prepare_core.h"

#define TILE_X 32
#define TILE_Y 8
/* Pixels of a strip: 12 KiB, of which four blocks fit where a multiprocessor has the least shared memory. */
#define STRIP 4096

typedef struct {
    u64 images;  /* Image[], one for each tensor of the batch */
    u64 bounds;  /* u32[] */
    u64 weights; /* i16[] */
    u32 width, height;
    u32 channels, layout, dtype;
    float mul[3], add[3];
    u32 unused;
} Prepare;
SIZE_IS(Prepare, 72);

typedef struct {
    u8 red[STRIP], green[STRIP], blue[STRIP];
} Strip;

/* What the tile needs of the image, as it is stored. */
typedef struct {
    u32 left, top, columns, rows; /* of the image in the tensor; none: the tile is all margin */
    u32 first, end;               /* columns of the source */
    u32 at_once;                  /* of them, so many fit into the strip */
} Tile;

/* What a thread keeps from stage to stage. */
typedef struct {
    Tile tile;
    Sums sums;
    u32 x, y; /* its pixel, as it is stored */
    u32 inside;
} Thread;

/* The part of begin..begin+length that is inside of at..at+size, from `at` on. */
DEV u32 overlap(u32 begin, u32 length, u32 at, u32 size, u32 *start) {
    u32 from = begin > at ? begin : at;
    u32 to = begin + length < at + size ? begin + length : at + size;
    *start = from - at;
    return to > from ? to - from : 0;
}

DEV Tile tile_of(const Prepare *job, const Image *image, Place block) {
    u32 transposed = image->turn & TURN_TRANSPOSED;
    u32 columns = transposed ? image->rows : image->columns;
    u32 rows = transposed ? image->columns : image->rows;
    u32 left, top;
    u32 across = overlap(block.x * TILE_X, TILE_X, image->left, columns, &left);
    u32 down = overlap(block.y * TILE_Y, TILE_Y, image->top, rows, &top);
    if (image->turn & TURN_MIRRORED) {
        left = columns - left - across;
    }
    if (image->turn & TURN_FLIPPED) {
        top = rows - top - down;
    }
    Tile tile;
    tile.left = transposed ? top : left;
    tile.top = transposed ? left : top;
    tile.columns = transposed ? down : across;
    tile.rows = transposed ? across : down;
    tile.first = tile.end = tile.at_once = 0;
    if (across == 0 || down == 0) {
        tile.columns = tile.rows = 0;
        return tile;
    }
    const u32 *bounds = (const u32 *)job->bounds + image->across.bounds;
    u32 last = tile.left + tile.columns - 1;
    tile.first = bounds[2 * tile.left];
    tile.end = bounds[2 * last] + bounds[2 * last + 1];
    tile.at_once = STRIP / tile.rows;
    return tile;
}

DEV const Image *image_of(const Prepare *job, Place block) { return (const Image *)job->images + block.z; }

DEV u32 prepare_begin(const Prepare *job, Place block, Place thread, Thread *own) {
    const Image *image = image_of(job, block);
    own->tile = tile_of(job, image, block);
    own->sums = half_of(image->across.precision);
    u32 transposed = image->turn & TURN_TRANSPOSED;
    u32 columns = transposed ? image->rows : image->columns;
    u32 rows = transposed ? image->columns : image->rows;
    /* Left of the image or above it this is a very large number. */
    u32 x = block.x * TILE_X + thread.x - image->left;
    u32 y = block.y * TILE_Y + thread.y - image->top;
    own->inside = x < columns && y < rows;
    if (image->turn & TURN_MIRRORED) {
        x = columns - 1 - x;
    }
    if (image->turn & TURN_FLIPPED) {
        y = rows - 1 - y;
    }
    own->x = transposed ? y : x;
    own->y = transposed ? x : y;
    u32 wide = own->tile.end - own->tile.first;
    return own->tile.at_once == 0 ? 0 : (wide + own->tile.at_once - 1) / own->tile.at_once;
}

/* Columns of one step. */
DEV u32 step_of(const Tile *tile, u32 step, u32 *first) {
    *first = tile->first + step * tile->at_once;
    u32 rest = tile->end - *first;
    return rest < tile->at_once ? rest : tile->at_once;
}

/* Stage 1: columns of the source into the strip. */
DEV void prepare_columns(const Prepare *job, u32 format, Place block, Place thread, u32 step, const Thread *own,
                         Strip *strip) {
    const Image *image = image_of(job, block);
    u32 first;
    u32 columns = step_of(&own->tile, step, &first);
    UNROLL(unroll 1)
    for (u32 at = thread.y * TILE_X + thread.x; at < columns * own->tile.rows; at += TILE_X * TILE_Y) {
        u32 x = first + at % columns;
        u32 to = own->tile.top + at / columns;
        Rgb rgb = column(image, format, (const u32 *)job->bounds, (const i16 *)job->weights, x, to);
        strip->red[at] = rgb.red;
        strip->green[at] = rgb.green;
        strip->blue[at] = rgb.blue;
    }
}

/* Stage 2: what the strip has of the thread's pixel. */
DEV void prepare_rows(const Prepare *job, Place block, u32 step, Thread *own, const Strip *strip) {
    if (!own->inside) {
        return;
    }
    Axis across = image_of(job, block)->across;
    u32 first;
    u32 columns = step_of(&own->tile, step, &first);
    const u32 *bounds = (const u32 *)job->bounds + across.bounds + 2 * own->x;
    const i16 *weights = (const i16 *)job->weights + across.weights + (u64)own->x * across.window;
    u32 begin = bounds[0] > first ? bounds[0] : first;
    u32 end = bounds[0] + bounds[1] < first + columns ? bounds[0] + bounds[1] : first + columns;
    u32 line = (own->y - own->tile.top) * columns;
    UNROLL(unroll 2)
    for (u32 x = begin; x < end; x++) {
        Rgb rgb;
        rgb.red = strip->red[line + x - first];
        rgb.green = strip->green[line + x - first];
        rgb.blue = strip->blue[line + x - first];
        weigh(&own->sums, weights[x - bounds[0]], rgb);
    }
}

/* By comparison: an index that is not known when this is compiled would put the arguments on the stack. */
DEV float one_of(const float *three, u32 channel) {
    return channel == 0 ? three[0] : channel == 1 ? three[1] : three[2];
}

/* Stage 3: the pixel, or the margin, into the tensor. */
DEV void prepare_end(const Prepare *job, Place block, Place thread, const Thread *own) {
    u32 x = block.x * TILE_X + thread.x;
    u32 y = block.y * TILE_Y + thread.y;
    if (x >= job->width || y >= job->height) {
        return;
    }
    const Image *image = image_of(job, block);
    Rgb rgb;
    if (own->inside) {
        rgb = rounded(own->sums, image->across.precision);
    } else {
        rgb.red = image->pad[0];
        rgb.green = image->pad[1];
        rgb.blue = image->pad[2];
    }
    u32 count = job->channels == CHANNELS_GRAY ? 1 : 3;
    u64 plane = (u64)job->width * job->height;
    u64 at = (u64)y * job->width + x;
    UNROLL(unroll 1)
    for (u32 channel = 0; channel < count; channel++) {
        float value = (float)channel_of(rgb, job->channels, channel);
        value = sum(product(value, one_of(job->mul, channel)), one_of(job->add, channel));
        u64 element = job->layout == LAYOUT_PLANAR ? channel * plane + at : at * count + channel;
        store(image->tensor, job->dtype, element, value);
    }
}

#ifdef __CUDACC__
#define PREPARE(name, format)                                                                   \
    extern "C" __global__ void __launch_bounds__(TILE_X * TILE_Y, 4) name(const Prepare job) {     \
        __shared__ Strip strip;                                                                 \
        Place block = {blockIdx.x, blockIdx.y, blockIdx.z};                                     \
        Place thread = {threadIdx.x, threadIdx.y, threadIdx.z};                                 \
        Thread own;                                                                             \
        u32 steps = prepare_begin(&job, block, thread, &own);                                   \
        for (u32 step = 0; step < steps; step++) {                                              \
            prepare_columns(&job, format, block, thread, step, &own, &strip);                   \
            __syncthreads();                                                                    \
            prepare_rows(&job, block, step, &own, &strip);                                      \
            __syncthreads();                                                                    \
        }                                                                                       \
        prepare_end(&job, block, thread, &own);                                                 \
    }
#else
#define PREPARE(name, format)                                                                   \
    static void name(const void *args, Place block, Place threads) {                            \
        static _Thread_local Strip strip;                                                       \
        static _Thread_local Thread own[TILE_X * TILE_Y];                                       \
        const Prepare *job = (const Prepare *)args;                                             \
        u32 steps = 0;                                                                          \
        EACH(threads, steps = prepare_begin(job, block, thread, &own[number]))                  \
        for (u32 step = 0; step < steps; step++) {                                              \
            EACH(threads, prepare_columns(job, format, block, thread, step, &own[number], &strip)) \
            EACH(threads, prepare_rows(job, block, step, &own[number], &strip))                 \
        }                                                                                       \
        EACH(threads, prepare_end(job, block, thread, &own[number]))                            \
    }
#endif

/* Each format is a kernel, so that none carries another's reads. */
PREPARE(penstock_prepare_rgb, FORMAT_RGB)
PREPARE(penstock_prepare_gray, FORMAT_GRAY)
PREPARE(penstock_prepare_nv12, FORMAT_NV12)
PREPARE(penstock_prepare_i420, FORMAT_I420)
