/* STAND-IN: the kernels of kernels/cuda, compiled for the CPU and launched by their names. Test only.
 *
 * Blocks run one after the other, and so do the threads of a block, stage by stage: upwards, or downwards if `backward` is set, which
 * gives another result if one thread of a stage depends on another.
 */
#include <string.h>

static _Thread_local int backward;

/* Runs `body` for each thread of a block, as `thread`, the `number`-th. */
#define EACH(threads, body)                                                              \
    for (u32 all = threads.x * threads.y * threads.z, turn = 0; turn < all; turn++) {    \
        u32 number = backward ? all - 1 - turn : turn;                                   \
        Place thread = {number % threads.x, number / threads.x % threads.y,              \
                        number / threads.x / threads.y};                                 \
        (void)number, (void)thread;                                                      \
        body;                                                                            \
    }

#include "penstock.cu"

typedef void Kernel(const void *args, Place block, Place threads);

static const struct {
    const char *name;
    Kernel *kernel;
    u32 bytes; /* of its arguments */
    u32 threads; /* of a block; no more than it is compiled for */
} KERNELS[] = {
    {"penstock_prepare_rgb", penstock_prepare_rgb, sizeof(Prepare), TILE_X * TILE_Y},
    {"penstock_prepare_gray", penstock_prepare_gray, sizeof(Prepare), TILE_X * TILE_Y},
    {"penstock_prepare_nv12", penstock_prepare_nv12, sizeof(Prepare), TILE_X * TILE_Y},
    {"penstock_prepare_i420", penstock_prepare_i420, sizeof(Prepare), TILE_X * TILE_Y},
    {"penstock_convert_same", penstock_convert_same, sizeof(Convert), CONVERT_THREADS},
    {"penstock_convert_same_wide", penstock_convert_same_wide, sizeof(Convert), CONVERT_THREADS},
    {"penstock_convert_turned", penstock_convert_turned, sizeof(Convert), CONVERT_THREADS},
    {"penstock_convert_turned_wide", penstock_convert_turned_wide, sizeof(Convert), CONVERT_THREADS},
    {"penstock_tables", penstock_tables, sizeof(Tables), ROWS_THREADS},
    {"penstock_gather", penstock_gather, sizeof(Rows), ROWS_THREADS},
    {"penstock_scatter", penstock_scatter, sizeof(Rows), ROWS_THREADS},
};

/* The number of a kernel, or -1; and how many bytes of arguments it takes. */
int penstock_standin_find(const char *name, u32 *bytes) {
    for (u32 at = 0; at < sizeof KERNELS / sizeof *KERNELS; at++) {
        if (strcmp(KERNELS[at].name, name) == 0) {
            *bytes = KERNELS[at].bytes;
            return (int)at;
        }
    }
    return -1;
}

/* Runs a kernel to its end. Not 0: the block has more threads than the kernel allows. */
int penstock_standin_run(int kernel, const u32 *grid, const u32 *block, const void *args, int downwards) {
    Place threads = {block[0], block[1], block[2]};
    backward = downwards;
    if (threads.x * threads.y * threads.z > KERNELS[kernel].threads) {
        return 1;
    }
    u32 all = grid[0] * grid[1] * grid[2];
    for (u32 turn = 0; turn < all; turn++) {
        u32 number = downwards ? all - 1 - turn : turn;
        Place place = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
        KERNELS[kernel].kernel(args, place, threads);
    }
    return 0;
}
