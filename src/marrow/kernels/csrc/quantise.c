/* Numbers in few bits: one step for a block of numbers, chosen from the block itself. The reference is
 * kernels/matmul/quantise.py. A block is read twice; it stays in cache between. */
#include <math.h>

#include "amx.h"

enum { INT8 = 0, FP8 = 1, INT4 = 2, INT4_FROM_ZERO = 3 }; /* the last: with a zero of its own */

typedef struct {
    float step, inverse, zero; /* inverse: of int8 and fp8 alone */
    int is_bad;
} choice;

/* The nearest fp16, as fp32. */
INLINE float to_half(float x) {
    if (!(x >= 0x1p-14f)) return (x + 0.5f) - 0.5f; /* subnormal: 0.5 has the same unit in the last place */
    if (x >= 65520.0f) return INFINITY;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFFu;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE choice choose(float low, float high, float bad, int format) {
    choice c = {0, 0, 0, bad != bad};
    float amax = high > -low ? high : -low;
    if (format == INT8 || format == FP8) {
        float most = format == INT8 ? 127.0f : 448.0f;
        c.step = amax / most;
        c.inverse = amax > 0 ? most / amax : 0.0f;
    } else if (format == INT4) {
        c.step = to_half(amax / 7.0f);
        c.zero = 8;
    } else {
        c.step = to_half((high - low) / 15.0f);
        c.zero = c.step > 0 ? rintf(-low / c.step) : 0.0f;
        c.zero = c.zero > 15 ? 15 : c.zero;
    }
    if (c.is_bad) c.step = NAN, c.zero = 0;
    return c;
}

/* The bits of the nearest e4m3 number, ties to even; |x| <= 448. */
INLINE lanes_u32 to_fp8(lanes x) {
    lanes_u32 bits = (lanes_u32)x & 0x7FFFFFFF, sign = ((lanes_u32)x >> 24) & 0x80;
    lanes_u32 normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3);
    lanes shifted = (lanes)bits + 16384.0f; /* its unit in the last place is the smallest e4m3 number */
    lanes_u32 tiny = (lanes_u32)shifted - 0x46800000;
    lanes_u32 is_tiny = (lanes_u32)((lanes)bits < 0x1p-6f);
    return (tiny & is_tiny) | (normal & ~is_tiny) | sign;
}

INLINE lanes from_fp8(lanes_u32 bits) {
    lanes size = (lanes)((bits & 0x7F) << 20) * 0x1p120f;
    lanes_u32 is_nan = (lanes_u32)((bits & 0x7F) == 0x7F);
    return (lanes)((lanes_u32)size | (bits & 0x80) << 24 | (is_nan & 0x7FC00000));
}

INLINE lanes limit(lanes x, float low, float high) {
    x = blend((lanes_i32)(x < low), all(low), x);
    return blend((lanes_i32)(x > high), all(high), x);
}

/* The numbers that are stored, less their zero; `bits` as they are stored. */
INLINE lanes code(lanes x, choice c, int format, lanes_u32 *bits) {
    if (c.is_bad) x = all(0);
    if (format == FP8) {
        *bits = to_fp8(limit(x * c.inverse, -448, 448));
        return from_fp8(*bits);
    }
    lanes_i32 whole;
    if (format == INT8) {
        whole = round_off(x * c.inverse);
        *bits = (lanes_u32)whole;
    } else {
        lanes ratio = c.step > 0 ? limit(x / c.step, -32, 32) : all(0);
        whole = round_off(limit(to_float(round_off(ratio)), -c.zero, 15 - c.zero));
        *bits = (lanes_u32)(whole + (int32_t)c.zero);
    }
    return to_float(whole);
}

/* The largest of 16, by halves; NaN is passed over. */
INLINE float top_of(lanes x) {
    x = larger(__builtin_shuffle(x, (lanes_i32){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}), x);
    x = larger(__builtin_shuffle(x, (lanes_i32){4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3}), x);
    x = larger(__builtin_shuffle(x, (lanes_i32){2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1}), x);
    x = larger(__builtin_shuffle(x, (lanes_i32){1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0}), x);
    return x[0];
}

INLINE void put_bytes(uint8_t *to, lanes_u32 bits, long count) {
    few_bytes few = __builtin_convertvector(bits & 255, few_bytes);
    if (count >= LANES) memcpy(to, &few, LANES);
    else memcpy(to, &few, count);
}

INLINE void one_block(const char *x, uint8_t *q, float *step, uint8_t *zero, char *y, long rows, long columns,
                      long stride, int format, int type) {
    long size = type == BF16 ? 2 : 4;
    lanes low = {0}, high = {0}, odd = {0};
    for (long row = 0; row < rows; row++)
        for (long at = 0; at < columns; at += LANES) {
            const char *from = x + row * stride * size;
            lanes some = columns - at >= LANES ? load(from, at, type) : load_part(from, at, columns - at, type);
            high = larger(some, high);
            low = blend((lanes_i32)(some < low), some, low);
            odd += some - some; /* NaN for infinity and NaN */
        }
    float bad = top_of(blend((lanes_i32)(odd != odd), all(1), all(0))) > 0 ? NAN : 0;
    choice c = choose(-top_of(-low), top_of(high), bad, format);
    if (step) *step = c.step, *zero = c.zero;
    for (long row = 0; row < rows; row++)
        for (long at = 0; at < columns; at += LANES) {
            const char *from = x + row * stride * size;
            int is_whole = columns - at >= LANES;
            lanes some = is_whole ? load(from, at, type) : load_part(from, at, columns - at, type);
            lanes_u32 bits;
            lanes number = code(some, c, format, &bits);
            if (q) put_bytes(q + row * stride + at, bits, columns - at);
            if (!y) continue;
            if (is_whole) store(y + row * stride * size, at, number * c.step, type);
            else store_part(y + row * stride * size, at, columns - at, number * c.step, type);
        }
}

INLINE void blocks(const char *x, uint8_t *q, float *steps, uint8_t *zeros, char *y, long rows, long columns,
                   long block_rows, long block_columns, int format, int threads, int type) {
    long down = (rows + block_rows - 1) / block_rows, along = (columns + block_columns - 1) / block_columns;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long block = 0; block < down * along; block++) {
        long row = block / along * block_rows, column = block % along * block_columns;
        long at = row * columns + column;
        long high = rows - row < block_rows ? rows - row : block_rows;
        long wide = columns - column < block_columns ? columns - column : block_columns;
        long size = type == BF16 ? 2 : 4;
        one_block(x + at * size, q ? q + at : 0, steps ? steps + block : 0, zeros ? zeros + block : 0,
                  y ? y + at * size : 0, high, wide, columns, format, type);
    }
}

/* x [rows, columns] fp32 or bf16. q: bytes, or NULL. steps, zeros: one a block, or NULL both. y: what q stands for,
 * of x's type, or NULL. */
void quantise(const char *x, uint8_t *q, float *steps, uint8_t *zeros, char *y, long rows, long columns,
              long block_rows, long block_columns, int format, int threads, int type) {
#define CASE(FORMAT)                                                                                             \
    case FORMAT:                                                                                                 \
        if (type == BF16)                                                                                        \
            blocks(x, q, steps, zeros, y, rows, columns, block_rows, block_columns, FORMAT, threads, BF16);      \
        else blocks(x, q, steps, zeros, y, rows, columns, block_rows, block_columns, FORMAT, threads, F32);      \
        break;
    switch (format) {
        CASE(INT8)
        CASE(FP8)
        CASE(INT4)
        CASE(INT4_FROM_ZERO)
    }
}

/* y = (q - zero) step, of `type`; q as `quantise` stores it. */
void dequantise(const uint8_t *q, const float *steps, const uint8_t *zeros, void *y, long rows, long columns,
                long block_rows, long block_columns, int format, int threads, int type) {
    long along = (columns + block_columns - 1) / block_columns;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++)
        for (long block = 0; block < along; block++) {
            long index = row / block_rows * along + block, start = block * block_columns;
            long end = start + block_columns < columns ? start + block_columns : columns;
            for (long at = start; at < end; at += LANES) {
                long count = end - at < LANES ? end - at : LANES;
                few_bytes few = {0};
                if (count == LANES) memcpy(&few, q + row * columns + at, LANES);
                else memcpy(&few, q + row * columns + at, count);
                lanes number;
                if (format == FP8) number = from_fp8((lanes_u32)widen_bytes(few));
                else if (format == INT8) number = to_float(widen_signed((few_signed)few));
                else number = to_float(widen_bytes(few)) - zeros[index];
                number *= steps[index];
                if (count == LANES) store(y, row * columns + at, number, type);
                else store_part(y, row * columns + at, count, number, type);
            }
        }
}
