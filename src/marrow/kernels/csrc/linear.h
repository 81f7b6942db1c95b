/* y = x W^T for a group of rows, x and y in bf16 or fp32, W as it lies in memory: fp32, bf16, or 8 bits with scales.
 *
 * Many rows of bf16 go through AMX. 16 outputs by 32 inputs of W are a tile as they lie, or as unpack() makes
 * them; x is packed once, in pairs of inputs by 16 rows, so that W need not be. The tile product is then y^T.
 *
 *     W tile [16 outputs, 32 inputs]   x tile [16 pairs, 16 rows x 2]   sums [16 outputs, 16 rows], in fp32
 *
 * A few rows, and fp32, go through lanes that run along the inputs.
 */
#ifndef LINEAR_H
#define LINEAR_H

#include "amx.h"

#if HAS_AMX && defined(__AMX_BF16__)
#define HAS_BF16_TILES 1
#else
#define HAS_BF16_TILES 0
#endif

enum { INT8 = 2, FP8 = 3 }; /* of weights, besides F32 and BF16 */

#define SCALED 128     /* FP8: inputs, and outputs, that share a scale */
#define PANELS 32      /* outputs of two tiles */
#define PAIRS 32       /* inputs of a tile */
#define TILE 512       /* numbers of a tile */
#define CHUNK 16       /* tiles of inputs unpacked at once: with their sums, what the first cache holds */
#define TILE_ROWS 128  /* rows of x that share what is unpacked */
#define PLAIN_ROWS 32  /* rows of x for which bf16 is read where it lies */
#define LANE_OUTPUTS 4 /* outputs, and rows, of a block of lanes */
#define LANE_ROWS 4
#define LANE_AHEAD 8 /* outputs that are asked for ahead, into the second cache */

typedef struct {
    const char *weight;  /* [outputs, inputs] */
    const float *scales; /* INT8: [outputs]. FP8: one for SCALED outputs by SCALED inputs */
    long outputs, inputs;
    int format;
} matrix;

INLINE int bytes_of(int format) { return format == F32 ? 4 : format == BF16 ? 2 : 1; }

INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE long tiles_of(long rows) { return (rows + 15) / 16; }

INLINE long blocks_of(long inputs) { return (inputs + PAIRS - 1) / PAIRS; }

/* Rows whose tiles the second cache keeps while all outputs pass by. */
INLINE long rows_at_once(long inputs) {
    long some = (1 << 19) / inputs / TILE_ROWS * TILE_ROWS;
    return some > TILE_ROWS ? some : TILE_ROWS;
}

INLINE lanes load_fp8(const void *from) {
    /* Sign and magnitude go to their places; the exponents' offsets differ by 120. No NaN. */
    lanes_i32 bits = (widen_signed((few_signed)load_few(from)) << 20) & (int32_t)0x87F00000;
    return (lanes)bits * 0x1p120f;
}

/* Sixteen weights of an output, or the `count` that are left; the others are 0. INT8 without its scale. */
INLINE lanes load_weights(const char *row, long at, long count, int format) {
    if (format == F32 || format == BF16) return load_some(row, at, count, format);
    few_bytes few = {0};
    if (count >= LANES) few = load_few(row + at);
    else memcpy(&few, row + at, count);
    return format == FP8 ? load_fp8(&few) : to_float(widen_signed((few_signed)few));
}

/* `outputs` outputs and `rows` rows, both constants, of F32, BF16 or INT8 weights. */
INLINE void dot_rows(const matrix *m, long first, const int outputs, const char *x, const int rows, char *y,
                     int type, int format) {
    const char *weight = m->weight + first * m->inputs * bytes_of(format);
    long step = m->inputs * bytes_of(format), at = 0;
    lanes sums[LANE_OUTPUTS][LANE_ROWS] = {{{0}}};
#ifdef __AVX512BF16__
    if (type == BF16 && format == BF16)
        for (; at + 2 * LANES <= m->inputs; at += 2 * LANES)
#pragma GCC unroll 4
            for (int i = 0; i < outputs; i++) {
                __builtin_prefetch(weight + (i + LANE_AHEAD) * step + at * 2, 0, 2);
                bytes some = load_bytes(weight + i * step + at * 2);
#pragma GCC unroll 4
                for (int j = 0; j < rows; j++)
                    sums[i][j] = (lanes)_mm512_dpbf16_ps((__m512)sums[i][j], (__m512bh)some,
                                                         (__m512bh)load_bytes(x + (j * m->inputs + at) * 2));
            }
#endif
    for (; at + LANES <= m->inputs; at += LANES)
#pragma GCC unroll 4
        for (int i = 0; i < outputs; i++) {
            __builtin_prefetch(weight + (i + LANE_AHEAD) * step + at * bytes_of(format), 0, 2);
            lanes some = load_weights(weight + i * step, at, LANES, format);
#pragma GCC unroll 4
            for (int j = 0; j < rows; j++) sums[i][j] += some * load(x, j * m->inputs + at, type);
        }
    if (at < m->inputs)
        for (int i = 0; i < outputs; i++) {
            lanes some = load_weights(weight + i * step, at, m->inputs - at, format);
            for (int j = 0; j < rows; j++)
                sums[i][j] += some * load_part(x, j * m->inputs + at, m->inputs - at, type);
        }
    for (int i = 0; i < outputs; i++)
        for (int j = 0; j < rows; j++) {
            float sum = sum_of(sums[i][j]) * (format == INT8 ? m->scales[first + i] : 1.0f);
            store_part(y, j * m->outputs + first + i, 1, all(sum), type);
        }
}

/* LANE_OUTPUTS outputs from `first` on, or what is left, of all rows. */
INLINE void by_lanes(const matrix *m, long first, const char *x, long rows, char *y, int type, int format) {
    long outputs = least(LANE_OUTPUTS, m->outputs - first), size = bytes_of(type);
    for (long row = 0; row < rows; row += LANE_ROWS) {
        const char *from = x + row * m->inputs * size;
        char *to = y + row * m->outputs * size;
        long count = least(LANE_ROWS, rows - row);
        if (outputs < LANE_OUTPUTS) {
            for (long i = 0; i < outputs; i++)
                for (long j = 0; j < count; j++)
                    dot_rows(m, first + i, 1, from + j * m->inputs * size, 1, to + j * m->outputs * size, type, format);
        } else if (count == 4) dot_rows(m, first, LANE_OUTPUTS, from, 4, to, type, format);
        else if (count == 3) dot_rows(m, first, LANE_OUTPUTS, from, 3, to, type, format);
        else if (count == 2) dot_rows(m, first, LANE_OUTPUTS, from, 2, to, type, format);
        else dot_rows(m, first, LANE_OUTPUTS, from, 1, to, type, format);
    }
}

#if HAS_BF16_TILES
/* Up to 16 rows of bf16 to tiles of x, zeros where there are no rows or inputs. numbers: of the rows, or NULL for the
 * first ones. */
INLINE void pack_tile(const uint16_t *x, const int32_t *numbers, long rows, long inputs, uint16_t *to) {
    for (long at = 0; at < inputs; at += PAIRS, to += TILE) {
        lanes_i32 some[16];
        for (long row = 0; row < 16; row++) {
            const uint16_t *from = x + (numbers && row < rows ? numbers[row] : row) * inputs + at;
            if (row < rows && inputs - at >= PAIRS) some[row] = (lanes_i32)load_bytes(from);
            else some[row] = (lanes_i32){0};
            if (row < rows && inputs - at < PAIRS) memcpy(&some[row], from, 2 * (inputs - at));
        }
        transpose(some);
        memcpy(to, some, sizeof some);
    }
}

/* `blocks` tiles of inputs of an output from input `at` on, as bf16: INT8 without its scale, FP8 with it. */
INLINE void unpack(const matrix *m, long output, long at, long blocks, uint16_t (*to)[TILE], int format) {
    long step = m->inputs * bytes_of(format), ahead = PANELS * step;
    const char *row = m->weight + output * step;
    const float *scales = m->scales + output / SCALED * ((m->inputs + SCALED - 1) / SCALED);
    for (long block = 0; block < blocks; block++, at += PAIRS) {
        uint16_t *tile = to[block] + output % 16 * PAIRS;
        long left = m->inputs - at;
        __builtin_prefetch(row + ahead + at * bytes_of(format), 0, 2);
        pair some;
        if (format == BF16 && left >= PAIRS) {
            store_bytes(tile, load_bytes(row + at * 2));
            continue;
        }
        if (left >= PAIRS) {
            some.low = load_weights(row, at, LANES, format);
            some.high = load_weights(row, at + LANES, LANES, format);
        } else {
            some.low = load_weights(row, at, left, format);
            some.high = left > LANES ? load_weights(row, at + LANES, left - LANES, format) : all(0);
        }
        if (format == FP8) {
            some.low *= scales[at / SCALED];
            some.high *= scales[at / SCALED];
        }
        store_pair(tile, 0, PAIRS, some, BF16, 0);
    }
}

typedef struct {
    const char *at;            /* the first tile of weights */
    long row, tile, panel;     /* bytes from one output, tile of inputs and panel to the next */
    int is_ahead;              /* whether they come from memory: ask for the next panels */
} weights;

/* Add the products of `panels` by `tiles` tiles (constants) over `blocks` tiles of inputs to sums. */
INLINE void multiply_tiles(weights w, const uint16_t *x, long next, long blocks, lanes_i32 (*sums)[2][16],
                           int is_first, const int panels, const int tiles) {
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums[0][0], 64);
        if (panels > 1) _tile_loadd(1, sums[0][1], 64);
        if (tiles > 1) _tile_loadd(2, sums[1][0], 64);
        if (tiles > 1 && panels > 1) _tile_loadd(3, sums[1][1], 64);
    }
    for (long block = 0; block < blocks; block++) {
        const char *from = w.at + block * w.tile;
        if (w.is_ahead)
#pragma GCC unroll 32
            for (int i = 0; i < 16 * panels; i++) __builtin_prefetch(from + (i + 16 * panels) * w.row, 0, 2);
        _tile_loadd(4, from, w.row);
        _tile_loadd(6, x + block * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (panels > 1) {
            _tile_loadd(5, from + w.panel, w.row);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (tiles > 1) {
            _tile_loadd(7, x + next + block * TILE, 64);
            _tile_dpbf16ps(2, 4, 7);
            if (panels > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0][0], 64);
    if (panels > 1) _tile_stored(1, sums[0][1], 64);
    if (tiles > 1) _tile_stored(2, sums[1][0], 64);
    if (tiles > 1 && panels > 1) _tile_stored(3, sums[1][1], 64);
}

/* Sums of 16 outputs by up to 16 rows to y, whose first row is `row`. */
INLINE void store_tile(const matrix *m, long output, lanes_i32 *sums, long row, long rows, char *y, int type,
                       int format) {
    long left = m->outputs - output;
    transpose(sums); /* their bits */
    lanes scale = format == INT8 ? load_some(m->scales, output, left, F32) : all(1);
    for (long i = 0; i < rows; i++) {
        lanes sum = (lanes)sums[i];
        store_some(y, (row + i) * m->outputs + output, left, format == INT8 ? sum * scale : sum, type);
    }
}

/* PANELS outputs from `first` on, or what is left, of all rows. x: tiles of pack_tile(). */
INLINE void by_tiles(const matrix *m, long first, const uint16_t *x, long rows, char *y, int type, int format) {
    uint16_t unpacked[2][CHUNK][TILE] __attribute__((aligned(64)));
    lanes_i32 sums[TILE_ROWS / 16][2][16];
    long outputs = least(PANELS, m->outputs - first), panels = tiles_of(outputs), blocks = blocks_of(m->inputs);
    /* Read more than once, outputs that lie a page apart would share lines of the first cache: a copy is better. */
    int is_plain = format == BF16 && m->inputs % PAIRS == 0 && outputs % 16 == 0 && rows <= PLAIN_ROWS;
    const char *from = m->weight + first * m->inputs * bytes_of(format);
    for (long begin = 0; begin < rows; begin += TILE_ROWS) {
        long count = least(TILE_ROWS, rows - begin), chunk = is_plain ? blocks : CHUNK;
        for (long block = 0; block < blocks; block += chunk) {
            long some = least(chunk, blocks - block);
            weights w = {(char *)unpacked, 64, 2 * TILE, sizeof unpacked[0], 0};
            if (is_plain) w = (weights){from, m->inputs * 2, 64, m->inputs * 32, begin == 0};
            else
                for (long i = 0; i < outputs; i++)
                    unpack(m, first + i, block * PAIRS, some, unpacked[i / 16], format);
            for (long tile = 0; tile * 16 < count; tile += 2) {
                const uint16_t *packed = x + ((begin / 16 + tile) * blocks + block) * TILE;
                int is_pair = (tile + 1) * 16 < count;
                w.is_ahead = w.is_ahead && tile == 0;
                if (panels > 1 && is_pair) multiply_tiles(w, packed, blocks * TILE, some, sums + tile, !block, 2, 2);
                else if (panels > 1) multiply_tiles(w, packed, 0, some, sums + tile, !block, 2, 1);
                else if (is_pair) multiply_tiles(w, packed, blocks * TILE, some, sums + tile, !block, 1, 2);
                else multiply_tiles(w, packed, 0, some, sums + tile, !block, 1, 1);
            }
        }
        for (long tile = 0; tile * 16 < count; tile++)
            for (long panel = 0; panel < panels; panel++)
                store_tile(m, first + 16 * panel, sums[tile][panel], begin + 16 * tile,
                           least(16, count - 16 * tile), y, type, format);
    }
}
#endif

/* All of y = x W^T by tiles, in bf16. work: room for whole tiles, 16 rows by 32 inputs, of x. */
INLINE void linear_tiles(const uint16_t *x, const matrix *m, char *y, uint16_t *work, long rows, int threads,
                         int format) {
#if HAS_BF16_TILES
    if (!has_tiles()) return;
    long blocks = blocks_of(m->inputs);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row += 16)
            pack_tile(x + row * m->inputs, 0, least(16, rows - row), m->inputs, work + row * blocks * PAIRS);
        configure_tiles(64);
        for (long row = 0; row < rows; row += rows_at_once(m->inputs)) {
            long some = least(rows_at_once(m->inputs), rows - row);
            const uint16_t *packed = work + row * blocks * PAIRS;
            char *to = y + row * m->outputs * 2;
#pragma omp for schedule(static) nowait
            for (long output = 0; output < m->outputs; output += PANELS)
                if (format == FP8) by_tiles(m, output, packed, some, to, BF16, FP8); /* constants once more: what is */
                else by_tiles(m, output, packed, some, to, BF16, INT8); /* parallel is a function of its own */
        }
        _tile_release();
    }
#endif
}

#endif
