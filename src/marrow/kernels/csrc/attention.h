/* Steps of attention: a tile of 16 queries against a chunk of 64 keys, with the softmax carried along.
 *
 * Scores lie with queries in the lanes, a row of 16 for each key: the largest and the sum of a query's scores
 * need no sum across lanes, a key's scale is one number a row, and keys are read where they lie, in any order.
 *
 *     scores [64 keys][16 queries]  =  keys [64][D]  times  queries [D][16]         product_keys
 *     o [16 queries][D]            +=  p [16][64 keys]  times  values [64][D]       product_values
 *
 * In bf16 the right factor is a panel: dwords of two consecutive k, 16 columns wide, as AMX and dot products of
 * pairs want it. AMX where the CPU has it and the kernel lends it, AVX512_BF16 next, plain C anywhere; fp32 by
 * lanes. Sums in fp32.
 */
#ifndef ATTENTION_H
#define ATTENTION_H

#include <math.h>
#include <stdlib.h>

#include "amx.h"

#define KEYS 64 /* of a chunk */
#define NEVER -1e30f /* the largest score where there is none: finite, so that differences are numbers */
#define LOG2E 1.44269504f
#define LN2 0.69314718f

#if HAS_AMX && defined(__AMX_BF16__)
#define HAS_BF16_TILES 1
#else
#define HAS_BF16_TILES 0
#endif

/* Scores are in units of `unit_of`: to the base 2 in bf16, a product less for each; natural in fp32, where rounding
 * a score that another product made larger costs p up to 2 ulp. */
INLINE float unit_of(int type) { return type == BF16 ? LOG2E : 1; }

/* e to the x units, for x <= 0: to 2 ulp in bf16, to 1 in fp32, where a bias would add up; 0 below -126 or -87. */
INLINE lanes power_of(lanes x, int type) {
#ifdef __AVX512F__
    lanes n = (lanes)_mm512_roundscale_ps((__m512)(x * (LOG2E / unit_of(type))), 0);
    lanes r = x * (LOG2E / unit_of(type)) - n;
    lanes p;
    if (type == BF16) {
        p = all(1.327647152e-3f);
        p = p * r + 9.675541331e-3f;
        p = p * r + 5.550713275e-2f;
        p = p * r + 2.402211972e-1f;
        p = p * r + 6.931469671e-1f;
        p = p * r + 1.000000072f;
    } else {
        p = all(1.534582083e-4f);
        p = p * r + 1.339993120e-3f;
        p = p * r + 9.618488894e-3f;
        p = p * r + 5.550328777e-2f;
        p = p * r + 2.402264689e-1f;
        p = p * r + 6.931472057e-1f;
        p = p * r + 1.0f;
    }
    return (lanes)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return exp_of(type == BF16 ? x * LN2 : x);
#endif
}

/* Turn 16 x 16 dwords. */
INLINE void turn(lanes_u32 x[LANES]) {
#define LOW_DWORDS(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH_DWORDS(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN_FOURS(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD_FOURS(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
    lanes_u32 y[LANES];
    for (int i = 0; i < LANES; i += 2) {
        y[i] = LOW_DWORDS(x[i], x[i + 1]);
        y[i + 1] = HIGH_DWORDS(x[i], x[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = LOW_PAIRS(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = HIGH_PAIRS(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < LANES; i += 8)
        for (int j = 0; j < 4; j++) {
            y[i + j] = EVEN_FOURS(x[i + j], x[i + j + 4]);
            y[i + j + 4] = ODD_FOURS(x[i + j], x[i + j + 4]);
        }
    for (int j = 0; j < 8; j++) {
        x[j] = EVEN_FOURS(y[j], y[j + 8]);
        x[j + 8] = ODD_FOURS(y[j], y[j + 8]);
    }
}

/* Two rows of bf16 as dwords of (a, b). */
INLINE lanes_u32 pair_up(lanes_u16 a, lanes_u16 b) {
    return __builtin_convertvector(a, lanes_u32) | __builtin_convertvector(b, lanes_u32) << 16;
}

/* Two rows of numbers in bf16, as dwords of (a, b). */
INLINE lanes_u32 narrow_pair(lanes a, lanes b) {
#ifdef __AVX512BF16__
    typedef uint16_t lanes_u16x2 __attribute__((vector_size(64)));
    lanes_u16x2 both = (lanes_u16x2)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    return (lanes_u32)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                              25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    return pair_up(narrow(a), narrow(b));
#endif
}

/* sums + the dot products of a pair with 16 pairs, in bf16. */
INLINE lanes dot_pairs(lanes sums, uint32_t left, lanes_u32 right) {
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
#else
    float low = bf16_to_float(left & 0xFFFF), high = bf16_to_float(left >> 16);
    sums += low * (lanes)(right << 16);
    return sums + high * (lanes)(right & 0xFFFF0000u);
#endif
}

INLINE uint32_t dword_of(const void *from, long at) {
    uint32_t x;
    memcpy(&x, (const char *)from + 4 * at, 4);
    return x;
}

INLINE lanes_u32 load_dwords(const void *from) {
    lanes_u32 x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE lanes_u16 load_u16(const void *from) {
    lanes_u16 x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* Memory that will be read next, in pieces of `bytes`, the same in keys and values: asked for little by little, so
 * that it comes while something is computed. */
typedef struct {
    const char *keys, *values; /* of the cache */
    const int32_t *blocks;     /* left to ask for, one piece each */
    long bytes, at, number;
} stream;

INLINE void ask(stream *s, int lines) {
    if (!s || s->number <= 0) return;
    const char *keys = s->keys + *s->blocks * s->bytes + s->at, *values = s->values + *s->blocks * s->bytes + s->at;
    for (int i = 0; i < lines; i++) {
        __builtin_prefetch(keys + 64 * i, 0, 2);
        __builtin_prefetch(values + 64 * i, 0, 2);
    }
    s->at += 64 * lines;
    if (s->at >= s->bytes) s->at = 0, s->number--, s->blocks++;
}

/* scores [64][16] = left [64][size] times panel [size][16]; 16 rows of the left factor at each of four places,
 * `stride` bytes from row to row. size: a multiple of 32 in bf16. adds: to what the scores are. */
INLINE void product_keys(float *scores, const char *const left[4], long stride, const void *panel, int size,
                         int adds, int tiles, stream *next, int type) {
#if HAS_BF16_TILES
    if (type == BF16 && tiles) {
        if (adds) {
            _tile_loadd(0, scores, 64);
            _tile_loadd(1, scores + 256, 64);
            _tile_loadd(2, scores + 512, 64);
            _tile_loadd(3, scores + 768, 64);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int k = 0; k < size / 32; k++) {
            _tile_loadd(4, (const char *)panel + 1024 * k, 64);
            _tile_loadd(5, left[0] + 64 * k, stride);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, left[1] + 64 * k, stride);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(5, left[2] + 64 * k, stride);
            _tile_dpbf16ps(2, 5, 4);
            _tile_loadd(6, left[3] + 64 * k, stride);
            _tile_dpbf16ps(3, 6, 4);
            ask(next, 16);
        }
        _tile_stored(0, scores, 64);
        _tile_stored(1, scores + 256, 64);
        _tile_stored(2, scores + 512, 64);
        _tile_stored(3, scores + 768, 64);
        return;
    }
#endif
    for (int row = 0; row < KEYS; row += 8) {
        const char *from = left[row / LANES] + (row % LANES) * stride;
        lanes sums[8] = {{0}};
        if (adds)
            for (int i = 0; i < 8; i++) sums[i] = load(scores, (row + i) * LANES, F32);
        if (type == BF16)
            for (int k = 0; k < size / 2; k++) {
                lanes_u32 right = load_dwords((const char *)panel + 64 * k);
                for (int i = 0; i < 8; i++) sums[i] = dot_pairs(sums[i], dword_of(from + i * stride, k), right);
            }
        else
            for (int k = 0; k < size; k++) {
                lanes right = load(panel, LANES * k, F32);
                for (int i = 0; i < 8; i++) sums[i] += ((const float *)(from + i * stride))[k] * right;
            }
        for (int i = 0; i < 8; i++) store(scores, (row + i) * LANES, sums[i], F32);
    }
}

/* `count` rows of product_values, without tiles. The 64 products are summed first, then added: rounding errors of
 * long sums grow with the number of steps at their full size. */
INLINE void add_rows(float *o, const void *left, long stride, long across, const void *panel, int size, int row,
                     int count, int type) {
    for (int at = 0; at < size; at += 2 * LANES) {
        lanes sums[4][2] = {{{0}}};
        if (type == BF16)
            for (int k = 0; k < KEYS / 2; k++) {
                const char *from = (const char *)panel + (k / 16 * (size / 16) + at / 16) * 1024 + k % 16 * 64;
                lanes_u32 right[2] = {load_dwords(from), load_dwords(from + 1024)};
                for (int i = 0; i < count; i++) {
                    uint32_t pair = dword_of((const char *)left + (row + i) * stride, k);
                    for (int j = 0; j < 2; j++) sums[i][j] = dot_pairs(sums[i][j], pair, right[j]);
                }
            }
        else
            for (int k = 0; k < KEYS; k++) {
                lanes right[2] = {load(panel, k * size + at, F32), load(panel, k * size + at + LANES, F32)};
                for (int i = 0; i < count; i++) {
                    float one = ((const float *)left)[k * stride + (row + i) * across];
                    for (int j = 0; j < 2; j++) sums[i][j] += one * right[j];
                }
            }
        for (int i = 0; i < count; i++)
            for (int j = 0; j < 2; j++) {
                float *to = o + (row + i) * size + at + LANES * j;
                store(to, 0, load(to, 0, F32) + sums[i][j], F32);
            }
    }
}

/* o [16][size] += left [16][64] times panel [64][size].
 * bf16: left row by row, `stride` bytes a row; the panel in units of [32 of 64][16 of size], k first.
 * fp32: left with `stride` numbers from k to k, `across` from row to row; the panel [64][size].
 * rows: that count exactly, but all 16 with tiles. o: `size` floats a row. */
INLINE void product_values(float *o, const void *left, long stride, long across, const void *panel, int size,
                           int rows, int tiles, stream *next, int type) {
#if HAS_BF16_TILES
    if (type == BF16 && tiles) {
        int units = size / 16, unit = 0;
        const char *lower = (const char *)panel + 1024 * units; /* the other 32 of 64 */
        _tile_loadd(4, left, stride);
        _tile_loadd(5, (const char *)left + 64, stride);
        for (; unit + 4 <= units; unit += 4) {
            float *to = o + 16 * unit;
            _tile_loadd(0, to, 4 * size);
            _tile_loadd(6, (const char *)panel + 1024 * unit, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(1, to + 16, 4 * size);
            _tile_loadd(7, (const char *)panel + 1024 * (unit + 1), 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(2, to + 32, 4 * size);
            _tile_loadd(6, (const char *)panel + 1024 * (unit + 2), 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(3, to + 48, 4 * size);
            _tile_loadd(7, (const char *)panel + 1024 * (unit + 3), 64);
            _tile_dpbf16ps(3, 4, 7);
            _tile_loadd(6, lower + 1024 * unit, 64);
            _tile_dpbf16ps(0, 5, 6);
            _tile_loadd(7, lower + 1024 * (unit + 1), 64);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(6, lower + 1024 * (unit + 2), 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, lower + 1024 * (unit + 3), 64);
            _tile_dpbf16ps(3, 5, 7);
            _tile_stored(0, to, 4 * size);
            _tile_stored(1, to + 16, 4 * size);
            _tile_stored(2, to + 32, 4 * size);
            _tile_stored(3, to + 48, 4 * size);
            ask(next, 16);
        }
        for (; unit < units; unit += 2) {
            float *to = o + 16 * unit;
            _tile_loadd(0, to, 4 * size);
            _tile_loadd(6, (const char *)panel + 1024 * unit, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(1, to + 16, 4 * size);
            _tile_loadd(7, (const char *)panel + 1024 * (unit + 1), 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(6, lower + 1024 * unit, 64);
            _tile_dpbf16ps(0, 5, 6);
            _tile_loadd(7, lower + 1024 * (unit + 1), 64);
            _tile_dpbf16ps(1, 5, 7);
            _tile_stored(0, to, 4 * size);
            _tile_stored(1, to + 16, 4 * size);
        }
        return;
    }
#endif
    int row = 0;
    for (; row + 4 <= rows; row += 4) add_rows(o, left, stride, across, panel, size, row, 4, type);
    for (; row < rows; row++) add_rows(o, left, stride, across, panel, size, row, 1, type);
}

/* The right factor of product_keys: 16 rows of `size` numbers, padded with zeros to `padded`, with k going down.
 * A row that is null is zeros. */
INLINE void panel_of_queries(void *panel, const char *const from[LANES], int size, int padded, int type) {
    for (int at = 0; at < padded; at += type == BF16 ? 32 : 16) {
        lanes_u32 some[LANES];
        for (int row = 0; row < LANES; row++) {
            uint32_t dwords[LANES] = {0};
            int bytes = type == BF16 ? 2 : 4, count = size - at;
            int most = type == BF16 ? 32 : 16;
            if (from[row] && count >= most) memcpy(dwords, from[row] + at * bytes, 64);
            else if (from[row] && count > 0) memcpy(dwords, from[row] + at * bytes, count * bytes);
            some[row] = load_dwords(dwords);
        }
        turn(some);
        memcpy((char *)panel + at / (type == BF16 ? 32 : 16) * 1024, some, 1024);
    }
}

/* Numbers of 16-bit elements, last first: (b, a) sixteen times, down to 0. */
#define PAIRS_OF(b, a)                                                                                              \
    b, a, b - 1, a - 1, b - 2, a - 2, b - 3, a - 3, b - 4, a - 4, b - 5, a - 5, b - 6, a - 6, b - 7, a - 7, b - 8,  \
        a - 8, b - 9, a - 9, b - 10, a - 10, b - 11, a - 11, b - 12, a - 12, b - 13, a - 13, b - 14, a - 14, b - 15, \
        a - 15

/* The right factor of product_values: `count` rows of 64, the others zeros; `size` numbers a row, zeros to
 * `padded`. Rows at from(i) = rows[i / 16] + i % 16 * stride. */
INLINE void panel_of_values(void *panel, const char *const rows[4], long stride, int count, int size, int padded,
                            stream *next, int type) {
    if (type == F32) {
        float *to = panel;
        for (int row = 0; row < KEYS; row++, to += padded) {
            if (row < count) memcpy(to, rows[row / LANES] + row % LANES * stride, 4 * size);
            int filled = row < count ? size : 0;
            memset(to + filled, 0, 4 * (padded - filled));
        }
        return;
    }
#ifdef __AVX512BW__
    if (count == KEYS && size == padded) {
        const __m512i low = _mm512_set_epi16(PAIRS_OF(47, 15)), high = _mm512_set_epi16(PAIRS_OF(63, 31));
        for (int row = 0; row < KEYS; row += 2) {
            const char *even = rows[row / LANES] + row % LANES * stride, *odd = even + stride;
            char *to = (char *)panel + row / 32 * (padded / 16) * 1024 + row % 32 / 2 * 64;
            const char *later = row + 8 < KEYS ? rows[(row + 8) / LANES] + (row + 8) % LANES * stride : even;
            for (int at = 0; at < padded; at += 32, to += 2048) {
                __builtin_prefetch(later + 2 * at);
                __builtin_prefetch(later + stride + 2 * at);
                __m512i a = _mm512_loadu_si512(even + 2 * at), b = _mm512_loadu_si512(odd + 2 * at);
                _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
                _mm512_store_si512(to + 1024, _mm512_permutex2var_epi16(a, high, b));
            }
            ask(next, 4);
        }
        return;
    }
#endif
    for (int row = 0; row < KEYS; row += 2) {
        const char *even = rows[row / LANES] + row % LANES * stride, *odd = even + stride;
        char *to = (char *)panel + row / 32 * (padded / 16) * 1024 + row % 32 / 2 * 64;
        for (int at = 0; at < padded; at += LANES, to += 1024) {
            lanes_u16 a = {0}, b = {0};
            long left = size - at;
            if (left >= LANES) {
                if (row < count) a = load_u16(even + 2 * at);
                if (row + 1 < count) b = load_u16(odd + 2 * at);
            } else if (left > 0) {
                if (row < count) memcpy(&a, even + 2 * at, 2 * left);
                if (row + 1 < count) memcpy(&b, odd + 2 * at, 2 * left);
            }
            lanes_u32 both = pair_up(a, b);
            memcpy(to, &both, 64);
        }
    }
}

/* Which of `count` <= 64 rows hold a number that is infinite or NaN, a bit each. Rows of whole 64 bytes. */
INLINE uint64_t wild_rows(const char *from, long stride, long count, int type) {
    const uint32_t exponent = type == BF16 ? 0x7F807F80u : 0x7F800000u, one = type == BF16 ? 0x00800080u : 0x00800000u;
    const uint32_t beyond = type == BF16 ? 0x80008000u : 0x80000000u; /* where an exponent of ones plus one ends */
    uint64_t found = 0;
    lanes_u32 any = {0}; /* nearly always there is none: one look at all rows first */
    for (long at = 0; at < count * stride; at += 64) any |= (load_dwords(from + at) & exponent) + one;
    any &= beyond;
    uint32_t some = 0;
    for (int i = 0; i < LANES; i++) some |= any[i];
    for (long row = 0; row < count && some; row++) {
        lanes_u32 most = {0};
        for (long at = 0; at < stride; at += 64) most |= (load_dwords(from + row * stride + at) & exponent) + one;
        most &= beyond;
        for (int i = 0; i < LANES; i++) found |= (uint64_t)(most[i] != 0) << row;
    }
    return found;
}

/* Make zeros of a row of panel_of_values. */
INLINE void clear_row(void *panel, int row, int padded, int type) {
    if (type == F32) memset((float *)panel + row * padded, 0, 4 * padded);
    else
        for (int at = 0; at < padded; at++)
            ((uint16_t *)panel)[(row / 32 * (padded / 16) + at / 16) * 512 + row % 32 / 2 * 32 + at % 16 * 2 + row % 2] = 0;
}

INLINE void clear_rows(void *panel, uint64_t rows, int padded, int type) {
    for (int row = 0; rows; row++, rows >>= 1)
        if (rows & 1) clear_row(panel, row, padded, type);
}

/* Lay p [64 keys][16 queries] out as the left factor of product_values in bf16: [16][64], a query's row where
 * `places` says, in rows. */
INLINE void turn_to_bf16(uint16_t *to, const float *p, const int32_t places[LANES]) {
    for (int half = 0; half < 2; half++) {
        lanes_u32 some[LANES];
        for (int i = 0; i < LANES; i++) {
            const float *from = p + (32 * half + 2 * i) * LANES;
            some[i] = narrow_pair(load(from, 0, F32), load(from, LANES, F32));
        }
        turn(some);
        for (int i = 0; i < LANES; i++) memcpy(to + places[i] * KEYS + 32 * half, &some[i], 64);
    }
}

/* What a query sees: keys from `low` to `high` of a chunk, a number a lane. */
typedef struct {
    lanes_i32 low, high;
    int is_partial; /* some query does not see the whole chunk */
} sight;

INLINE sight sight_of(const int32_t low[LANES], const int32_t high[LANES], int32_t first_key, int count) {
    sight s = {{0}, {0}, count < KEYS};
    for (int i = 0; i < LANES; i++) {
        int most = high[i] - first_key, least = low[i] - first_key;
        s.low[i] = least;
        s.high[i] = most < count - 1 ? most : count - 1;
        s.is_partial |= least > 0 || most < KEYS - 1;
    }
    return s;
}

/* x in the lanes that see a key, `other` in the others. */
INLINE lanes where_seen(const sight *seen, int key, lanes x, float other) {
    lanes_i32 at = (lanes_i32){0} + key;
#ifdef __AVX512F__ /* GCC 12 makes vectors of the masks below */
    __mmask16 after = _mm512_cmpge_epi32_mask((__m512i)at, (__m512i)seen->low);
    __mmask16 both = _mm512_mask_cmple_epi32_mask(after, (__m512i)at, (__m512i)seen->high);
    return (lanes)_mm512_mask_mov_ps((__m512)all(other), both, (__m512)x);
#else
    return blend((at >= seen->low) & (at <= seen->high), x, all(other));
#endif
}

/* Scores: scale, softcap, mask. `softcap` with their unit; `scale` with it, or over the cap. */
INLINE lanes score_of(const float *scores, int key, lanes scale, float softcap, const sight *seen) {
    lanes s = load(scores, key * LANES, F32) * scale;
    if (softcap != 0) s = tanh_of(s, F32) * softcap;
    return seen->is_partial ? where_seen(seen, key, s, -__builtin_inff()) : s;
}

/* One step: raw scores in, p and the carried softmax out, in place of the scores. o [16][padded] is scaled where a
 * largest score grows. Scales of a quantised cache: [64 keys][16 queries], or null. */
INLINE void softmax_step(float *scores, float *o, float *most, float *sum, int padded, int rows,
                         float scale, float softcap, const sight *seen, const float *key_scales,
                         const float *value_scales, stream *next, int type) {
    lanes before = load(most, 0, F32), tops[4] = {before, before, before, before};
    for (int key = 0; key < KEYS; key += 4) {
        ask(next, 4);
        for (int i = 0; i < 4; i++) {
            lanes own = key_scales ? scale * load(key_scales, (key + i) * LANES, F32) : all(scale);
            lanes s = score_of(scores, key + i, own, softcap, seen);
            store(scores, (key + i) * LANES, s, F32);
            tops[i] = larger(s, tops[i]);
        }
    }
    lanes top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
    int grows = 0;
    for (int i = 0; i < LANES; i++) grows |= top[i] > before[i];
    lanes total = load(sum, 0, F32);
    if (grows) {
        lanes shrink = power_of(before - top, type);
        total *= shrink;
        for (int row = 0; row < rows; row++)
            for (int at = 0; at < padded; at += LANES)
                store(o, row * padded + at, load(o, row * padded + at, F32) * shrink[row], F32);
        store(most, 0, top, F32);
    }
    lanes sums[4] = {{0}};
    for (int key = 0; key < KEYS; key += 4) {
        ask(next, 4);
        for (int i = 0; i < 4; i++) {
            lanes one = power_of(load(scores, (key + i) * LANES, F32) - top, type);
            sums[i] += one;
            if (value_scales) one *= load(value_scales, (key + i) * LANES, F32);
            store(scores, (key + i) * LANES, one, F32);
        }
    }
    store(sum, 0, total + ((sums[0] + sums[1]) + (sums[2] + sums[3])), F32);
}

#endif
