/* y = x W^T with 4-bit weights and 8-bit activations. The reference is kernels/matmul/int4_linear.py, which
 * draws the layout. Integer sums are exact; scales and what they multiply are fp32.
 *
 * Weights come in panels of 16 outputs: a vector of 64 bytes holds 8 inputs of each, in dwords. A row of x is
 * first rounded to 8 bits, group by group, its bytes in the order in which the dwords want them.
 */
#include <math.h>

#include "amx.h"

#define PANEL 16
#define BLOCK 32      /* inputs whose order is mixed; a group has one or more whole blocks */
#define TILE_ROWS 128 /* rows of x that share an unpacked group; their sums stay in L1 */
/* PERF: with weights that no cache holds, 16 KiB ahead and into the second cache takes 0.88 of the time that
 * 4 KiB ahead into the first takes; it is within 15 % of reading the same bytes and doing nothing. */
#define AHEAD 16384
#define FEW 6         /* rows for which VNNI beats tiles */

typedef struct {
    const uint8_t *weight; /* [panels, inputs / 8, 64] */
    const uint16_t *scales; /* fp16 [panels, groups, 16] */
    const uint8_t *zeros;   /* [panels, groups, 16] */
    int8_t *x;              /* 8-bit rows, see `quantise` */
    float *x_scales;        /* [groups, padded rows] */
    float *x_sums;          /* [groups, padded rows]: of the 8-bit numbers */
    void *y;
    long rows, outputs, inputs, group;
    int type;
} problem;

INLINE long padded(long rows) { return (rows + 15) / 16 * 16; }

/* Where a row's bytes of a group begin: rows follow each other for VNNI; for tiles, 16 rows of 64 bytes do. */
INLINE int8_t *place(const problem *p, long row, long at, int tiles) {
    if (!tiles) return p->x + row * p->inputs + at;
    long k = p->group < 64 ? p->group : 64;
    return p->x + (row / 16 * (p->inputs / k) + at / k) * 16 * k + row % 16 * k + at % k;
}

/* 8-bit integers of one row: group by group, to the nearest of amax/127 steps. A row that is not finite becomes
 * NaN by its scale. */
INLINE void quantise(const problem *p, const void *x, long row, int tiles, int type) {
    const void *from = (const char *)x + row * p->inputs * (type == BF16 ? 2 : 4);
    long stride = padded(p->rows);
    for (long start = 0, g = 0; start < p->inputs; start += p->group, g++) {
        lanes most = {0}, odd = {0};
        for (long at = start; at < start + p->group; at += LANES) {
            lanes some = load(from, at, type);
            lanes size = (lanes)((lanes_i32)some & 0x7FFFFFFF);
            most = larger(size, most);
            odd += some - some; /* NaN for infinity and NaN */
        }
        float amax = largest_of(most), bad = sum_of(odd);
        float inverse = amax > 0 ? 127.0f / amax : 0.0f;
        int32_t total = 0;
        for (long at = start; at < start + p->group; at += BLOCK) {
            int8_t *to = place(p, row, at, tiles);
            int8_t natural[BLOCK];
            lanes_i32 sum = {0};
            for (int half = 0; half < 2; half++) {
                lanes_i32 rounded = round_off(load(from, at + half * LANES, type) * inverse);
                if (bad != bad) rounded = (lanes_i32){0};
                sum += rounded;
                few_signed few = __builtin_convertvector(rounded, few_signed);
                memcpy(natural + half * LANES, &few, sizeof few);
            }
            for (int i = 0; i < LANES; i++) total += sum[i];
            for (int i = 0; i < BLOCK; i++) to[i] = natural[i % 4 * 8 + i / 16 * 4 + i / 4 % 4];
        }
        p->x_scales[g * stride + row] = amax / 127.0f + bad;
        p->x_sums[g * stride + row] = (float)total;
    }
}

INLINE void store_row(const problem *p, long row, long panel, lanes sum) {
    long at = row * p->outputs + panel * PANEL, count = p->outputs - panel * PANEL;
    if (count >= PANEL) store(p->y, at, sum, p->type);
    else store_part(p->y, at, count, sum, p->type);
}

/* One panel and `count` rows (a constant) from `first` on. */
INLINE void few_rows(const problem *p, long panel, long first, const int count) {
    long groups = p->inputs / p->group, stride = padded(p->rows);
    const uint8_t *weight = p->weight + panel * p->inputs * (PANEL / 2);
    const int8_t *x = p->x + first * p->inputs;
    lanes sums[FEW] = {{0}};
    for (long g = 0; g < groups; g++) {
        lanes_i32 low[FEW] = {{0}}, high[FEW] = {{0}};
        for (long block = 0; block < p->group; block += BLOCK) {
#pragma GCC unroll 4
            for (int vector = 0; vector < 4; vector++) {
                __builtin_prefetch(weight + AHEAD, 0, 2);
                bytes packed = load_bytes(weight);
                bytes even = packed & 15, odd = (bytes)((lanes_u32)packed >> 4) & 15;
#pragma GCC unroll 8
                for (int row = 0; row < count; row++) {
                    const int8_t *four = x + row * p->inputs + 4 * vector;
                    low[row] = dot_bytes(low[row], even, dword_at(four));
                    high[row] = dot_bytes(high[row], odd, dword_at(four + 16));
                }
                weight += 64;
            }
            x += BLOCK;
        }
        long at = (panel * groups + g) * PANEL;
        __builtin_prefetch(p->scales + at + 512, 0, 3); /* PERF: 0.96 of the time; 64 bytes serve two groups */
        __builtin_prefetch(p->zeros + at + 512, 0, 3);
        lanes scale = load_half(p->scales + at), zero = load_small(p->zeros + at);
#pragma GCC unroll 8
        for (int row = 0; row < count; row++) {
            long place = g * stride + first + row;
            lanes exact = to_float(low[row] + high[row]) - zero * p->x_sums[place];
            sums[row] += exact * (scale * p->x_scales[place]);
        }
    }
    for (int row = 0; row < count; row++) store_row(p, first + row, panel, sums[row]);
}

static void by_lanes(const problem *p, long panel) {
    long row = 0;
    for (; row + FEW <= p->rows; row += FEW) few_rows(p, panel, row, FEW);
    switch (p->rows - row) {
    case 1: few_rows(p, panel, row, 1); break;
    case 2: few_rows(p, panel, row, 2); break;
    case 3: few_rows(p, panel, row, 3); break;
    case 4: few_rows(p, panel, row, 4); break;
    case 5: few_rows(p, panel, row, 5); break;
    }
}

#if HAS_AMX
/* Add a group's products of one tile of 16 rows, scaled. */
INLINE void add_scaled(lanes *sums, const lanes_i32 *exact, lanes scale, lanes zero, const float *x_scales,
                       const float *x_sums) {
#pragma GCC unroll 4
    for (int row = 0; row < 16; row++)
        sums[row] += (to_float(exact[row]) - zero * x_sums[row]) * (scale * x_scales[row]);
}

static void by_tiles(const problem *p, long panel, long first, long count) {
    long groups = p->inputs / p->group, stride = padded(p->rows), k = p->group < 64 ? p->group : 64;
    const uint8_t *weight = p->weight + panel * p->inputs * (PANEL / 2);
    lanes sums[TILE_ROWS] = {{0}};
    lanes_i32 exact[2][16];
    uint8_t unpacked[1024 * 16] __attribute__((aligned(64))); /* up to 1024 inputs a group */
    for (long g = 0; g < groups; g++) {
        for (long at = 0; at < p->group * PANEL; at += BLOCK * PANEL)
#pragma GCC unroll 4
            for (int vector = 0; vector < 4; vector++) {
                __builtin_prefetch(weight + AHEAD, 0, 2);
                bytes packed = load_bytes(weight);
                store_bytes(unpacked + at + 64 * vector, packed & 15);
                store_bytes(unpacked + at + 64 * vector + 256, (bytes)((lanes_u32)packed >> 4) & 15);
                weight += 64;
            }
        lanes scale = load_half(p->scales + (panel * groups + g) * PANEL);
        lanes zero = load_small(p->zeros + (panel * groups + g) * PANEL);
        const float *x_scales = p->x_scales + g * stride + first, *x_sums = p->x_sums + g * stride + first;
        long row = 0;
        for (; row + 16 < count; row += 32) {
            _tile_zero(0);
            _tile_zero(1);
            for (long at = 0; at < p->group; at += k) {
                _tile_loadd(6, unpacked + at * PANEL, 64);
                _tile_loadd(4, place(p, first + row, g * p->group + at, 1), k);
                _tile_dpbsud(0, 4, 6);
                _tile_loadd(5, place(p, first + row + 16, g * p->group + at, 1), k);
                _tile_dpbsud(1, 5, 6);
            }
            _tile_stored(0, exact[0], 64);
            _tile_stored(1, exact[1], 64);
            add_scaled(sums + row, exact[0], scale, zero, x_scales + row, x_sums + row);
            add_scaled(sums + row + 16, exact[1], scale, zero, x_scales + row + 16, x_sums + row + 16);
        }
        if (row < count) {
            _tile_zero(0);
            for (long at = 0; at < p->group; at += k) {
                _tile_loadd(6, unpacked + at * PANEL, 64);
                _tile_loadd(4, place(p, first + row, g * p->group + at, 1), k);
                _tile_dpbsud(0, 4, 6);
            }
            _tile_stored(0, exact[0], 64);
            add_scaled(sums + row, exact[0], scale, zero, x_scales + row, x_sums + row);
        }
    }
    for (long row = 0; row < count; row++) store_row(p, first + row, panel, sums[row]);
}
#endif

/* x [rows, inputs] fp32 or bf16, y [rows, outputs] alike. work: room for padded rows x inputs bytes, then
 * 2 x groups x padded rows floats. tiles: whether AMX may be used. */
void int4_linear(const void *x, const uint8_t *weight, const uint16_t *scales, const uint8_t *zeros, void *y,
                 int8_t *work, long rows, long outputs, long inputs, long group, int tiles, int threads,
                 int type) {
    long groups = inputs / group, panels = (outputs + PANEL - 1) / PANEL;
    float *x_scales = (float *)(work + padded(rows) * inputs);
    problem p = {weight, scales,  zeros,  work,  x_scales, x_scales + groups * padded(rows), y, rows,
                 outputs, inputs, group, type};
    tiles = tiles && rows > FEW && group <= 1024 && (group % 64 == 0 || group == 32) && has_tiles();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            if (type == BF16) quantise(&p, x, row, tiles, BF16);
            else quantise(&p, x, row, tiles, F32);
        }
#if HAS_AMX
        if (tiles) {
            configure_tiles(group < 64 ? group : 64);
            for (long first = 0; first < rows; first += TILE_ROWS) {
                long count = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
#pragma omp for schedule(static) nowait
                for (long panel = 0; panel < panels; panel++) by_tiles(&p, panel, first, count);
            }
            _tile_release();
        } else
#endif
        {
#pragma omp for schedule(static)
            for (long panel = 0; panel < panels; panel++) by_lanes(&p, panel);
        }
    }
}
