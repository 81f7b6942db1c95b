/* Residual add and RMS normalisation. The reference is kernels/norms/add_rms_norm.py. Sums in fp32. */
#include <math.h>

#include "lanes.h"

/* The sum as it is in memory, so that backward sees the same. */
INLINE lanes rounded(lanes x, int type) { return type == BF16 ? widen(narrow(x)) : x; }

INLINE pair sum_pair(const void *x, const void *y, long at, long count, int type) {
    pair a = load_pair(x, at, count, type), b = load_pair(y, at, count, type);
    return (pair){rounded(a.low + b.low, type), rounded(a.high + b.high, type)};
}

INLINE void forward(const void *residual, const void *x, const void *weight, void *y, void *total,
                    float *scales, long rows, long columns, float eps, int threads, int type) {
    int is_streamed = streamed(y, rows, columns, type);
#pragma omp parallel num_threads(threads) if (rows * columns > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long row = 0; row < rows; row++) {
            const void *old = elements(residual, row * columns, type);
            const void *new = elements(x, row * columns, type);
            void *sum = (void *)elements(total, row * columns, type);
            void *to = (void *)elements(y, row * columns, type);
            pair squares = {{0}, {0}};
            for (long at = 0; at < columns; at += 2 * LANES) {
                pair some = sum_pair(old, new, at, columns - at, type);
                squares.low += some.low * some.low;
                squares.high += some.high * some.high;
            }
            float scale = scales[row] = 1.0f / sqrtf(sum_of(squares.low + squares.high) / columns + eps);
            for (long at = 0; at < columns; at += 2 * LANES) { /* from the nearest cache */
                long count = columns - at;
                pair some = sum_pair(old, new, at, count, type), w = load_pair(weight, at, count, type);
                pair result = {some.low * scale * w.low, some.high * scale * w.high};
                store_pair(sum, at, count, some, type, is_streamed);
                store_pair(to, at, count, result, type, is_streamed);
                prefetch_pair(old, at + columns, type); /* the next row */
                prefetch_pair(new, at + columns, type);
            }
        }
        finish_stores();
    }
}

/* dx = dtotal + scale (g - n mean(g n)) with n = total scale and g = dy weight; dweight = sum over rows of
 * dy n, of each part of `height` rows to a row of `partial`: the same sums whatever the threads. */
INLINE void backward(const void *dy, const void *dtotal, const void *total, const void *weight,
                     const float *scales, void *dx, float *partial, long rows, long columns, long height,
                     int threads, int type) {
    int is_streamed = streamed(dx, rows, columns, type);
#pragma omp parallel num_threads(threads) if (rows * columns > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long part = 0; part < (rows + height - 1) / height; part++) {
            float *dweight = partial + part * columns;
            memset(dweight, 0, columns * sizeof *dweight);
            for (long row = part * height; row < rows && row < (part + 1) * height; row++) {
                const void *grad = elements(dy, row * columns, type);
                const void *passed = elements(dtotal, row * columns, type);
                const void *from = elements(total, row * columns, type);
                void *to = (void *)elements(dx, row * columns, type);
                float scale = scales[row];
                pair dots = {{0}, {0}};
                for (long at = 0; at < columns; at += 2 * LANES) {
                    long count = columns - at;
                    pair d = load_pair(grad, at, count, type), n = load_pair(from, at, count, type);
                    pair w = load_pair(weight, at, count, type), sum = load_pair(dweight, at, count, F32);
                    d.low *= n.low * scale;
                    d.high *= n.high * scale;
                    dots.low += d.low * w.low;
                    dots.high += d.high * w.high;
                    sum.low += d.low;
                    sum.high += d.high;
                    store_pair(dweight, at, count, sum, F32, 0);
                    prefetch_pair(passed, at, type);
                }
                float mean = sum_of(dots.low + dots.high) / columns * scale;
                for (long at = 0; at < columns; at += 2 * LANES) {
                    long count = columns - at;
                    pair d = load_pair(grad, at, count, type), n = load_pair(from, at, count, type);
                    pair w = load_pair(weight, at, count, type), some = load_pair(passed, at, count, type);
                    some.low += (d.low * w.low - n.low * mean) * scale;
                    some.high += (d.high * w.high - n.high * mean) * scale;
                    store_pair(to, at, count, some, type, is_streamed);
                    prefetch_pair(grad, at + columns, type); /* the next row */
                    prefetch_pair(from, at + columns, type);
                }
            }
        }
        finish_stores();
    }
}

void add_rms_norm_forward(const void *residual, const void *x, const void *weight, void *y, void *total,
                          float *scales, long rows, long columns, float eps, int threads, int type) {
    if (type == BF16) forward(residual, x, weight, y, total, scales, rows, columns, eps, threads, BF16);
    else forward(residual, x, weight, y, total, scales, rows, columns, eps, threads, F32);
}

void add_rms_norm_backward(const void *dy, const void *dtotal, const void *total, const void *weight,
                           const float *scales, void *dx, float *partial, long rows, long columns,
                           long height, int threads, int type) {
    if (type == BF16)
        backward(dy, dtotal, total, weight, scales, dx, partial, rows, columns, height, threads, BF16);
    else backward(dy, dtotal, total, weight, scales, dx, partial, rows, columns, height, threads, F32);
}
