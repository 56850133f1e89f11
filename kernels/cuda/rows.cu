/* Rows of a batch by a list: gathered from where they lie, or scattered to where they belong; and the tables of launches. */
#include "convert.cu"

#define ROWS_THREADS 256
/* Units of a thread. */
#define ROWS_EACH 4

typedef struct {
    u64 from, to;
    u64 list; /* u32[rows] */
    u64 bytes; /* of a row */
    u64 from_stride, to_stride; /* bytes from a row to the next */
    u32 rows; /* of the list */
    u32 limit; /* rows that there are: of the source when gathering, of the target when scattering */
    u32 unit; /* bytes that are moved at once, 1, 4 or 16: addresses, strides and rows are multiples of it */
    u32 unused;
} Rows;
SIZE_IS(Rows, 64);

DEV void move_unit(u64 to, u64 from, u32 unit, u64 at) {
    if (unit == 16) {
        ((Wide *)to)[at] = ((const Wide *)from)[at];
    } else if (unit == 4) {
        ((u32 *)to)[at] = ((const u32 *)from)[at];
    } else {
        ((u8 *)to)[at] = ((const u8 *)from)[at];
    }
}

DEV void zero_unit(u64 to, u32 unit, u64 at) {
    if (unit == 16) {
        Wide zero = {{0, 0, 0, 0}};
        ((Wide *)to)[at] = zero;
    } else if (unit == 4) {
        ((u32 *)to)[at] = 0;
    } else {
        ((u8 *)to)[at] = 0;
    }
}

/* Row n of the result is row list[n] of the source, or zeros if there is no such row. */
DEV void rows_gather(const Rows *job, Place block, Place thread) {
    u32 row = ((const u32 *)job->list)[block.y];
    u64 from = job->from + row * job->from_stride;
    u64 to = job->to + block.y * job->to_stride;
    u64 at = (u64)block.x * (ROWS_THREADS * ROWS_EACH) + thread.x;
    for (u32 each = 0; each < ROWS_EACH; each++, at += ROWS_THREADS) {
        if (at < job->bytes / job->unit) {
            if (row < job->limit) {
                move_unit(to, from, job->unit, at);
            } else {
                zero_unit(to, job->unit, at);
            }
        }
    }
}

/* Row n of the source becomes row list[n] of the target; nowhere if there is no such row. */
DEV void rows_scatter(const Rows *job, Place block, Place thread) {
    u32 row = ((const u32 *)job->list)[block.y];
    if (row >= job->limit) {
        return;
    }
    u64 from = job->from + block.y * job->from_stride;
    u64 to = job->to + row * job->to_stride;
    u64 at = (u64)block.x * (ROWS_THREADS * ROWS_EACH) + thread.x;
    for (u32 each = 0; each < ROWS_EACH; each++, at += ROWS_THREADS) {
        if (at < job->bytes / job->unit) {
            move_unit(to, from, job->unit, at);
        }
    }
}

/* The tables of the launch behind it, out of pinned memory of the host: a copy would stand in line behind those that are on
 * their way on other streams, and the launch with it. */
typedef struct {
    u64 from, to;
    u64 wides; /* sixteen bytes each */
} Tables;
SIZE_IS(Tables, 24);

DEV void tables_fetch(const Tables *job, Place block, Place thread) {
    u64 at = (u64)block.x * ROWS_THREADS + thread.x;
    if (at < job->wides) {
        ((Wide *)job->to)[at] = ((const Wide *)job->from)[at];
    }
}

SIMPLE(penstock_tables, Tables, tables_fetch)
SIMPLE(penstock_gather, Rows, rows_gather)
SIMPLE(penstock_scatter, Rows, rows_scatter)
