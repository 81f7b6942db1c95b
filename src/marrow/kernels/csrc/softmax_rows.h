/* What a loss over rows of logits needs: a row's log-sum-exp and its gradient, in fp32.
 *
 * With y = x scale and p = e^(y - lse), every gradient here has the form p (a + b y) + c, and `d` more at the
 * row's target. A row is read from memory once: the later passes find it in the cache.
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

INLINE float row_max(const void *x, long columns, int type) {
    const float none = -__builtin_inff();
    lanes most[4] = {all(none), all(none), all(none), all(none)};
    long at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES)
        for (int i = 0; i < 4; i++) most[i] = larger(most[i], load(x, at + i * LANES, type));
    for (; at + LANES <= columns; at += LANES) most[0] = larger(most[0], load(x, at, type));
    if (at < columns)
        most[1] = larger(most[1], only(load_part(x, at, columns - at, type), columns - at, none));
    return largest_of(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

INLINE float row_sum(const void *x, long columns, int type) {
    lanes sums[2] = {{0}};
    long at = 0;
    for (; at + LANES <= columns; at += LANES) sums[(at / LANES) & 1] += load(x, at, type);
    if (at < columns) sums[0] += load_part(x, at, columns - at, type);
    return sum_of(sums[0] + sums[1]);
}

/* log(sum(e^y)); `expected`, unless it is NULL, becomes sum(p y). scale > 0. */
INLINE float row_lse(const void *x, long columns, float scale, float *expected, int type) {
    float shift = row_max(x, columns, type) * scale;
    if (shift == -__builtin_inff()) shift = 0; /* nothing but -inf: the sum is 0 */
    lanes sums[4] = {{0}}, products[4] = {{0}};
    long at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES)
        for (int i = 0; i < 4; i++) {
            lanes y = load(x, at + i * LANES, type) * scale, e = exp_of(y - shift);
            sums[i] += e;
            if (expected) products[i] += blend((lanes_i32)(e > 0.0f), e * y, all(0));
        }
    for (; at < columns; at += LANES) {
        long count = columns - at;
        lanes some = count >= LANES ? load(x, at, type) : load_part(x, at, count, type);
        lanes y = some * scale, e = exp_of(y - shift);
        if (count < LANES) e = only(e, count, 0);
        sums[0] += e;
        if (expected) products[0] += blend((lanes_i32)(e > 0.0f), e * y, all(0));
    }
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (expected) *expected = sum_of((products[0] + products[1]) + (products[2] + products[3])) / sum;
    return logf(sum) + shift;
}

INLINE lanes gradient_of(lanes x, float scale, float lse, float a, float b, float c) {
    lanes y = x * scale, p = exp_of(y - lse);
    if (b == 0) return p * a + c;
    return p * a + blend((lanes_i32)(p > 0.0f), p * y, all(0)) * b + c;
}

/* `out` may be `x`. A target below 0 is none. */
INLINE void row_gradient(const void *x, void *out, long columns, float scale, float lse, float a, float b,
                         float c, long target, float d, int type) {
    float there = target < 0 ? 0 : gradient_of(all(element(x, target, type)), scale, lse, a, b, c)[0] + d;
    long at = 0;
    if (b == 0) /* a loop of its own */
        for (; at + 2 * LANES <= columns; at += 2 * LANES)
            for (int i = 0; i < 2; i++) {
                lanes some = load(x, at + i * LANES, type);
                store(out, at + i * LANES, gradient_of(some, scale, lse, a, 0, c), type);
            }
    for (; at + LANES <= columns; at += LANES)
        store(out, at, gradient_of(load(x, at, type), scale, lse, a, b, c), type);
    if (at < columns) {
        lanes some = load_part(x, at, columns - at, type);
        store_part(out, at, columns - at, gradient_of(some, scale, lse, a, b, c), type);
    }
    if (target >= 0) set_element(out, target, there, type);
}

#endif
