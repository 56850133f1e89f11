/* From pixels to elements: what the CPU path computes, bit for bit.
 *
 * Resampling is that of fast_image_resize: weights of 16 bits with so many bits of fraction, columns first, rounded to a byte in
 * between, then rows. Sums are of integers, so their order does not matter. Frames of video are what
 * proxy/prepare/src/decode/yuv.rs makes of them.
 */
#ifndef PENSTOCK_PREPARE_CORE_H
#define PENSTOCK_PREPARE_CORE_H

#include "number_core.h"

enum { FORMAT_RGB = 0, FORMAT_GRAY = 1, FORMAT_NV12 = 2, FORMAT_I420 = 3 };
enum { CHANNELS_RGB = 0, CHANNELS_BGR = 1, CHANNELS_GRAY = 2 };
enum { LAYOUT_PLANAR = 0, LAYOUT_INTERLEAVED = 1 };
/* How what is stored becomes upright: transposed first. */
enum { TURN_TRANSPOSED = 1, TURN_MIRRORED = 2, TURN_FLIPPED = 4 };

/* How one axis is resampled. For each pixel of the result `bounds` has the first pixel of the source and how many there
 * are, and `weights` has `window` weights, of which so many count and the others are 0. All begin at even indices. */
typedef struct {
    u32 bounds;
    u32 weights;
    u32 window;
    u32 precision;
} Axis;
SIZE_IS(Axis, 16);

/* Fixed-point factors from luma and chroma to red, green and blue. */
typedef struct {
    i32 black, luma, red, green_u, green_v, blue;
} Factors;
SIZE_IS(Factors, 24);

/* One source, and the part of the batch's tensor that is made of it. */
typedef struct {
    u64 planes[3];
    u64 tensor;
    u32 strides[2]; /* bytes from a row to the next: of the first plane, of the others */
    u32 left, top;  /* of the image in the tensor */
    u32 columns, rows; /* of the image in the tensor, as it is stored */
    u32 turn;
    u32 format;
    Axis across, down;
    Factors factors;
    u8 pad[4];
    u32 row; /* bytes of a row of the first plane */
} Image;
SIZE_IS(Image, 128);

typedef struct {
    u8 red, green, blue;
} Rgb;

typedef struct {
    i32 red, green, blue;
} Sums;

DEV u32 clip(i32 value) { return value < 0 ? 0 : value > 255 ? 255 : (u32)value; }

DEV u32 byte_of(i32 fixed) { return clip((fixed + (1 << 19)) >> 20); }

DEV Rgb of_yuv(Factors f, i32 y, i32 u, i32 v) {
    i32 luma = (y > f.black ? y - f.black : 0) * f.luma;
    Rgb rgb;
    rgb.red = (u8)byte_of(luma + f.red * v);
    rgb.green = (u8)byte_of(luma + (f.green_u * u + f.green_v * v));
    rgb.blue = (u8)byte_of(luma + f.blue * u);
    return rgb;
}

/* One pixel of a frame of video; `format` is known when this is compiled. */
DEV Rgb pixel(const Image *image, u32 format, u32 x, u32 y) {
    u64 first = image->planes[0] + (u64)y * image->strides[0];
    u64 at = (u64)(y / 2) * image->strides[1];
    i32 u, v;
    if (format == FORMAT_NV12) {
        u64 pair = image->planes[1] + at + x / 2 * 2;
        u = (i32)read8(pair);
        v = (i32)read8(pair + 1);
    } else {
        u = (i32)read8(image->planes[1] + at + x / 2);
        v = (i32)read8(image->planes[2] + at + x / 2);
    }
    return of_yuv(image->factors, (i32)read8(first + x), u - 128, v - 128);
}

/* Bytes of a pixel that lie side by side, each of which is resampled by itself; 0: a frame of video, whose colours come first. */
DEV u32 samples_of(u32 format) { return format == FORMAT_RGB ? 3 : format == FORMAT_GRAY ? 1 : 0; }

/* Four bytes of a row, from `at` on; those from `end` on are 0. `whole`: there are none, and the address is a multiple of four. */
DEV u32 four_of(u64 row, u32 at, u32 end, u32 whole) {
    if (whole) {
        return read32(row + at);
    }
    u32 four = 0;
    UNROLL(unroll)
    for (u32 n = 0; n < 4; n++) {
        four |= at + n < end ? read8(row + at + n) << 8 * n : 0;
    }
    return four;
}

DEV void weigh(Sums *sums, i32 weight, Rgb rgb) {
    sums->red += weight * rgb.red;
    sums->green += weight * rgb.green;
    sums->blue += weight * rgb.blue;
}

/* Half of the last place, so that shifting rounds. */
DEV Sums half_of(u32 precision) {
    Sums sums;
    sums.red = sums.green = sums.blue = 1 << (precision - 1);
    return sums;
}

DEV Rgb rounded(Sums sums, u32 precision) {
    Rgb rgb;
    rgb.red = (u8)clip(sums.red >> precision);
    rgb.green = (u8)clip(sums.green >> precision);
    rgb.blue = (u8)clip(sums.blue >> precision);
    return rgb;
}

/* Where the rows lie that make row `to` of the result, and what they count: pairs of weights, the last filled up with 0. */
typedef struct {
    u32 first, count;
    u64 weights;
} Window;

DEV Window window_of(const Axis *axis, u64 bounds, u64 weights, u32 to) {
    Window window;
    window.first = read32(bounds + 4 * (axis->bounds + 2 * to));
    window.count = read32(bounds + 4 * (axis->bounds + 2 * to + 1));
    window.weights = weights + 2 * (axis->weights + (u64)to * axis->window);
    return window;
}

/* One column of a frame of video, between its rows. */
DEV Rgb column(const Image *image, u32 format, u64 bounds, u64 weights, u32 x, u32 to) {
    Window window = window_of(&image->down, bounds, weights, to);
    Sums sums = half_of(image->down.precision);
    /* Two reads on their way at once; more cost registers, of which frames of video have none left. */
    UNROLL(unroll 2)
    for (u32 at = 0; at < window.count; at++) {
        weigh(&sums, read_i16(window.weights + 2 * at), pixel(image, format, x, window.first + at));
    }
    return rounded(sums, image->down.precision);
}

/* What two rows have of four columns, by their weights. */
DEV void weigh_rows(i32 sums[4], u32 weights, u32 upper, u32 lower) {
    u32 low = picked(upper, lower, 0x5140), high = picked(upper, lower, 0x7362);
    sums[0] = dot_low(weights, low, sums[0]);
    sums[1] = dot_high(weights, low, sums[1]);
    sums[2] = dot_low(weights, high, sums[2]);
    sums[3] = dot_high(weights, high, sums[3]);
}

DEV u32 rounded_four(const i32 sums[4], u32 precision) {
    return clipped(sums[0] >> precision, sums[1] >> precision, sums[2] >> precision, sums[3] >> precision);
}

/* Four bytes that lie side by side, each between the rows, two rows at a time. */
DEV u32 four_columns(const Image *image, u64 bounds, u64 weights, u32 to, u32 at, u32 whole) {
    Window window = window_of(&image->down, bounds, weights, to);
    u64 stride = image->strides[0];
    u64 row = image->planes[0] + window.first * stride;
    i32 half = 1 << (image->down.precision - 1);
    i32 sums[4] = {half, half, half, half};
    UNROLL(unroll 1)
    for (u32 pair = 0; pair < window.count; pair += 2, row += 2 * stride) {
        /* The last row of an odd number is its own partner, which counts nothing. */
        u64 next = pair + 1 < window.count ? row + stride : row;
        u32 upper = four_of(row, at, image->row, whole), lower = four_of(next, at, image->row, whole);
        weigh_rows(sums, read32(window.weights + 2 * pair), upper, lower);
    }
    return rounded_four(sums, image->down.precision);
}

/* The same for sixteen bytes, at a multiple of sixteen. */
DEV Wide sixteen_columns(const Image *image, u64 bounds, u64 weights, u32 to, u32 at) {
    Window window = window_of(&image->down, bounds, weights, to);
    u64 stride = image->strides[0];
    u64 row = image->planes[0] + window.first * stride + at;
    i32 half = 1 << (image->down.precision - 1);
    i32 sums[4][4] = {{half, half, half, half}, {half, half, half, half}, {half, half, half, half}, {half, half, half, half}};
    UNROLL(unroll 1)
    for (u32 pair = 0; pair < window.count; pair += 2, row += 2 * stride) {
        Wide upper = read_wide(row), lower = read_wide(pair + 1 < window.count ? row + stride : row);
        u32 both = read32(window.weights + 2 * pair);
        UNROLL(unroll)
        for (u32 n = 0; n < 4; n++) {
            weigh_rows(sums[n], both, upper.part[n], lower.part[n]);
        }
    }
    Wide result;
    UNROLL(unroll)
    for (u32 n = 0; n < 4; n++) {
        result.part[n] = rounded_four(sums[n], image->down.precision);
    }
    return result;
}

/* As ITU-R BT.601 weighs it, in 16 bits of fraction. */
DEV u32 luma_of(Rgb rgb) { return (rgb.red * 19595u + rgb.green * 38470u + rgb.blue * 7471u + 0x8000u) >> 16; }

/* Channel `channel` of the tensor. */
DEV u32 channel_of(Rgb rgb, u32 channels, u32 channel) {
    if (channels == CHANNELS_GRAY) {
        return luma_of(rgb);
    }
    if (channels == CHANNELS_BGR) {
        channel = 2 - channel;
    }
    return channel == 0 ? rgb.red : channel == 1 ? rgb.green : rgb.blue;
}

#endif
