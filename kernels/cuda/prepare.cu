/* Crop, resize, turn, normalise, lay out and convert: a whole batch of sources of different sizes in one launch.
 *
 * A block makes TILE_X x TILE_Y pixels of one tensor (blockIdx.z says whose). What these need of the source is a rectangle, of
 * which the block resamples columns into a strip in shared memory, then rows out of it. A rectangle that is too wide for
 * the strip is worked off in several steps: how many depends on the tile alone, so all threads agree.
 */
#include "prepare_core.h"

#define TILE_X 32
#define TILE_Y 8
/* Bytes of a strip, of which four blocks fit where a multiprocessor has the least shared memory. */
#define STRIP 12288

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

/* The rows of a tile, one behind the other, as the source has them: three bytes a pixel, or one. Each begins at a multiple of
 * sixteen bytes of the source's row. Behind the last one lies what a word that ends there reads too much. */
typedef struct {
    Wide of[STRIP / 16 + 1];
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
    Window first = window_of(&image->across, job->bounds, job->weights, tile.left);
    Window last = window_of(&image->across, job->bounds, job->weights, tile.left + tile.columns - 1);
    tile.first = first.first;
    tile.end = last.first + last.count;
    /* Where a row begins and ends in the strip takes up to 30 bytes more. */
    tile.at_once = (STRIP / tile.rows - 30) / 3;
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

/* What one step has in the strip. */
typedef struct {
    u32 first, columns; /* of the source */
    u32 begin;          /* the byte of the source's row with which a row of the strip begins */
    u32 wides;          /* of a row of the strip, sixteen bytes each */
} Step;

DEV Step step_of(const Tile *tile, u32 samples, u32 number) {
    Step step;
    step.first = tile->first + number * tile->at_once;
    u32 rest = tile->end - step.first;
    step.columns = rest < tile->at_once ? rest : tile->at_once;
    step.begin = step.first * samples / 16 * 16;
    step.wides = ((step.first + step.columns) * samples - step.begin + 15) / 16;
    return step;
}

/* Stage 1 of a frame of video: columns of the source into the strip, as RGB. */
DEV void prepare_columns(const Prepare *job, u32 format, Place thread, const Image *image, const Step *step, const Tile *tile,
                         Strip *strip) {
    u8 *bytes = (u8 *)strip->of;
    UNROLL(unroll 1)
    for (u32 row = thread.y; row < tile->rows; row += TILE_Y) {
        UNROLL(unroll 1)
        for (u32 x = thread.x; x < step->columns; x += TILE_X) {
            Rgb rgb = column(image, format, job->bounds, job->weights, step->first + x, tile->top + row);
            u32 at = 16 * row * step->wides + 3 * (step->first + x) - step->begin;
            bytes[at] = rgb.red;
            bytes[at + 1] = rgb.green;
            bytes[at + 2] = rgb.blue;
        }
    }
}

/* The same of pixels whose bytes lie side by side: sixteen bytes at once. */
DEV void prepare_samples(const Prepare *job, Place thread, const Image *image, const Step *step, const Tile *tile,
                         Strip *strip) {
    /* Read once: what is written to the strip could be anywhere, for all a compiler knows. */
    Image source = *image;
    /* What rows begin at a multiple of, by its lowest bits that are 0. */
    u32 alignment = (u32)source.planes[0] | source.strides[0];
    UNROLL(unroll 1)
    for (u32 n = thread.y * TILE_X + thread.x; n < tile->rows * step->wides; n += TILE_X * TILE_Y) {
        u32 row = n / step->wides;
        u32 at = step->begin + 16 * (n - row * step->wides);
        u32 to = tile->top + row;
        if (alignment % 16 == 0 && at + 16 <= source.row) {
            strip->of[n] = sixteen_columns(&source, job->bounds, job->weights, to, at);
            continue;
        }
        u32 *words = strip->of[n].part;
        UNROLL(unroll 1)
        for (u32 end = at + 16; at < end; at += 4, words++) {
            *words = four_columns(&source, job->bounds, job->weights, to, at, alignment % 4 == 0 && at + 4 <= source.row);
        }
    }
}

DEV void prepare_strip(const Prepare *job, u32 format, Place block, Place thread, u32 number, const Tile *tile, Strip *strip) {
    const Image *image = image_of(job, block);
    u32 samples = samples_of(format);
    Step step = step_of(tile, samples == 0 ? 3 : samples, number);
    if (samples == 0) {
        prepare_columns(job, format, thread, image, &step, tile, strip);
    } else {
        prepare_samples(job, thread, image, &step, tile, strip);
    }
}

/* Two pixels of the strip that lie side by side from byte `at` on, by their weights; `weights` is 0 in its upper half for one. */
DEV void weigh_two(Sums *sums, u32 format, const Strip *strip, u32 at, u32 weights) {
    const u32 *words = (const u32 *)strip->of + at / 4;
    u32 first = shifted(words[0], words[1], at % 4);
    if (format == FORMAT_GRAY) {
        sums->red = dot_low(weights, first, sums->red);
        return;
    }
    /* Red, green, blue, red; green, blue. */
    u32 second = shifted(words[1], words[2], at % 4);
    u32 red_green = picked(first, second, 0x4130);
    sums->red = dot_low(weights, red_green, sums->red);
    sums->green = dot_high(weights, red_green, sums->green);
    sums->blue = dot_low(weights, picked(first, second, 0x5252), sums->blue);
}

/* Stage 2: what the strip has of the thread's pixel. */
DEV void prepare_rows(const Prepare *job, u32 format, Place block, u32 number, Thread *own, const Strip *strip) {
    if (!own->inside) {
        return;
    }
    const Image *image = image_of(job, block);
    u32 samples = format == FORMAT_GRAY ? 1 : 3;
    Step step = step_of(&own->tile, samples, number);
    Window window = window_of(&image->across, job->bounds, job->weights, own->x);
    u32 end = step.first + step.columns;
    u32 x = window.first > step.first ? window.first : step.first;
    end = window.first + window.count < end ? window.first + window.count : end;
    u32 at = 16 * (own->y - own->tile.top) * step.wides + x * samples - step.begin;
    u64 weights = window.weights + 2 * (x - window.first);
    /* Pairs begin with an even weight, and none reaches into the next step. */
    if (x < end && (x - window.first) % 2 != 0) {
        weigh_two(&own->sums, format, strip, at, (u16)read_i16(weights));
        x += 1, at += samples, weights += 2;
    }
    UNROLL(unroll 2)
    for (; x + 1 < end; x += 2, at += 2 * samples, weights += 4) {
        weigh_two(&own->sums, format, strip, at, read32(weights));
    }
    if (x < end) {
        weigh_two(&own->sums, format, strip, at, (u16)read_i16(weights));
    }
}

/* By comparison: an index that is not known when this is compiled would put the arguments on the stack. */
DEV float one_of(const float *three, u32 channel) {
    return channel == 0 ? three[0] : channel == 1 ? three[1] : three[2];
}

/* Stage 3: the pixel, or the margin, into the tensor. */
DEV void prepare_end(const Prepare *job, u32 format, Place block, Place thread, const Thread *own) {
    u32 x = block.x * TILE_X + thread.x;
    u32 y = block.y * TILE_Y + thread.y;
    if (x >= job->width || y >= job->height) {
        return;
    }
    const Image *image = image_of(job, block);
    Rgb rgb;
    if (own->inside) {
        rgb = rounded(own->sums, image->across.precision);
        if (format == FORMAT_GRAY) {
            rgb.green = rgb.blue = rgb.red;
        }
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
            prepare_strip(&job, format, block, thread, step, &own.tile, &strip);                \
            __syncthreads();                                                                    \
            prepare_rows(&job, format, block, step, &own, &strip);                              \
            __syncthreads();                                                                    \
        }                                                                                       \
        prepare_end(&job, format, block, thread, &own);                                         \
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
            EACH(threads, prepare_strip(job, format, block, thread, step, &own[number].tile, &strip)) \
            EACH(threads, prepare_rows(job, format, block, step, &own[number], &strip))       \
        }                                                                                       \
        EACH(threads, prepare_end(job, format, block, thread, &own[number]))                    \
    }
#endif

/* Each format is a kernel, so that none carries another's reads. */
PREPARE(penstock_prepare_rgb, FORMAT_RGB)
PREPARE(penstock_prepare_gray, FORMAT_GRAY)
PREPARE(penstock_prepare_nv12, FORMAT_NV12)
PREPARE(penstock_prepare_i420, FORMAT_I420)
