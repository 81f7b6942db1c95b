/* What a loss over rows of logits needs: a row's log-sum-exp and its gradient, in fp32.
 *
 * With y = (x - most) scale and rest = log(sum(e^y)), a row's log-sum-exp is most scale + rest, and
 * p = e^(y - rest): the two are kept apart, for their sum loses what is small beside large logits. Every
 * gradient here has the form p (a + b log p) + c, and `d` more at the row's target. A row is read from memory
 * once: the later passes find it in the cache.
 */
#ifndef SOFTMAX_ROWS_H
#define SOFTMAX_ROWS_H

#include <math.h>

#include "lanes.h"

enum { IGNORE = -100 }; /* the target of a row that has none */

INLINE const void *row_of(const void *start, long row, long columns, int type) {
    return (const char *)start + row * columns * (type == BF16 ? 2 : 4);
}

INLINE float element(const void *x, long at, int type) {
    return type == BF16 ? bf16_to_float(((const uint16_t *)x)[at]) : ((const float *)x)[at];
}

INLINE void set_element(void *x, long at, float value, int type) { store_part(x, at, 1, all(value), type); }

/* Lanes at or beyond `count` become `other`. */
INLINE lanes only(lanes x, long count, float other) {
    const lanes_i32 number = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return blend((lanes_i32)(number < (int32_t)count), x, all(other));
}

/* e^x for x up to 88, in fewer steps than exp_of(): nothing to look for above, and one instruction scales. */
INLINE lanes exp_below(lanes x) {
#ifdef __AVX512F__
    lanes y = (lanes)_mm512_max_ps((__m512)all(-110.0f), (__m512)x); /* a NaN stays one: it is the second */
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    lanes n = (lanes)_mm512_roundscale_ps((__m512)(y * 1.44269504f), nearest);
    lanes r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    lanes p = all(1.38145395e-3f); /* a minimax fit */
    p = p * r + 8.36874545e-3f;
    p = p * r + 4.16683890e-2f;
    p = p * r + 1.66665211e-1f;
    p = p * r + 4.99999940e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (lanes)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return exp_of(x);
#endif
}

INLINE lanes larger_of(lanes a, lanes b) { /* b where one is NaN, as larger() */
#ifdef __AVX512F__
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return larger(a, b);
#endif
}

INLINE float row_max(const void *x, long columns, int type) {
    const float none = -__builtin_inff();
    lanes most[4] = {all(none), all(none), all(none), all(none)};
    long at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES)
        for (int i = 0; i < 4; i++) most[i] = larger_of(most[i], load(x, at + i * LANES, type));
    for (; at + LANES <= columns; at += LANES) most[0] = larger_of(most[0], load(x, at, type));
    if (at < columns)
        most[1] = larger_of(most[1], only(load_part(x, at, columns - at, type), columns - at, none));
    return largest_of(larger_of(larger_of(most[0], most[1]), larger_of(most[2], most[3])));
}

INLINE float row_sum(const void *x, long columns, int type) {
    lanes sums[2] = {{0}};
    long at = 0;
    for (; at + LANES <= columns; at += LANES) sums[(at / LANES) & 1] += load(x, at, type);
    if (at < columns) sums[0] += load_part(x, at, columns - at, type);
    return sum_of(sums[0] + sums[1]);
}

typedef struct {
    float most, rest, expected;
} row_sums;

/* `expected`, where it is wanted, becomes sum(p y). scale > 0. */
INLINE row_sums sum_row(const void *x, long columns, float scale, int is_expected, int type) {
    float most = row_max(x, columns, type);
    if (most == -__builtin_inff()) most = 0; /* nothing but -inf: the sum is 0 */
    lanes sums[4] = {{0}}, products[4] = {{0}};
    long at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES)
        for (int i = 0; i < 4; i++) {
            lanes y = (load(x, at + i * LANES, type) - most) * scale, e = exp_below(y);
            sums[i] += e;
            if (is_expected) products[i] += blend((lanes_i32)(e > 0.0f), e * y, all(0));
        }
    for (; at < columns; at += LANES) {
        long count = columns - at;
        lanes some = count >= LANES ? load(x, at, type) : load_part(x, at, count, type);
        lanes y = (some - most) * scale, e = exp_below(y);
        if (count < LANES) e = only(e, count, 0);
        sums[0] += e;
        if (is_expected) products[0] += blend((lanes_i32)(e > 0.0f), e * y, all(0));
    }
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    float product = sum_of((products[0] + products[1]) + (products[2] + products[3]));
    return (row_sums){most, logf(sum), product / sum};
}

INLINE lanes gradient_of(lanes x, float scale, row_sums row, float a, float b, float c) {
    lanes log_p = (x - row.most) * scale - row.rest, p = exp_below(log_p);
    if (b == 0) return p * a + c;
    return p * a + blend((lanes_i32)(p > 0.0f), p * log_p, all(0)) * b + c;
}

/* `out` may be `x`. A target below 0 is none. */
INLINE void row_gradient(const void *x, void *out, long columns, float scale, row_sums row, float a, float b,
                         float c, long target, float d, int type) {
    float there = target < 0 ? 0 : gradient_of(all(element(x, target, type)), scale, row, a, b, c)[0] + d;
    long at = 0;
    if (b == 0) /* a loop of its own */
        for (; at + 2 * LANES <= columns; at += 2 * LANES)
            for (int i = 0; i < 2; i++) {
                lanes some = load(x, at + i * LANES, type);
                store(out, at + i * LANES, gradient_of(some, scale, row, a, 0, c), type);
            }
    for (; at + LANES <= columns; at += LANES)
        store(out, at, gradient_of(load(x, at, type), scale, row, a, b, c), type);
    if (at < columns) {
        lanes some = load_part(x, at, columns - at, type);
        store_part(out, at, columns - at, gradient_of(some, scale, row, a, b, c), type);
    }
    if (target >= 0) set_element(out, target, there, type);
}

#endif
