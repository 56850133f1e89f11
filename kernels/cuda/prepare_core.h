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
 * are, and `weights` has `window` weights, of which so many count. */
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
    u32 unused;
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

/* One pixel of the source; `format` is known when this is compiled. */
DEV Rgb pixel(const Image *image, u32 format, u32 x, u32 y) {
    const u8 *first = (const u8 *)image->planes[0] + (u64)y * image->strides[0];
    Rgb rgb;
    if (format == FORMAT_RGB) {
        first += 3 * x;
        rgb.red = first[0];
        rgb.green = first[1];
        rgb.blue = first[2];
        return rgb;
    }
    if (format == FORMAT_GRAY) {
        rgb.red = rgb.green = rgb.blue = first[x];
        return rgb;
    }
    u64 at = (u64)(y / 2) * image->strides[1];
    i32 u, v;
    if (format == FORMAT_NV12) {
        const u8 *pair = (const u8 *)image->planes[1] + at + x / 2 * 2;
        u = pair[0];
        v = pair[1];
    } else {
        u = ((const u8 *)image->planes[1])[at + x / 2];
        v = ((const u8 *)image->planes[2])[at + x / 2];
    }
    return of_yuv(image->factors, first[x], u - 128, v - 128);
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

/* One column of the source, between its rows. */
DEV Rgb column(const Image *image, u32 format, const u32 *bounds, const i16 *weights, u32 x, u32 to) {
    Axis down = image->down;
    u32 first = bounds[down.bounds + 2 * to];
    u32 count = bounds[down.bounds + 2 * to + 1];
    const i16 *weight = weights + down.weights + (u64)to * down.window;
    Sums sums = half_of(down.precision);
    /* Two reads on their way at once; more cost registers, of which frames of video have none left. */
    UNROLL(unroll 2)
    for (u32 at = 0; at < count; at++) {
        weigh(&sums, weight[at], pixel(image, format, x, first + at));
    }
    return rounded(sums, down.precision);
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
