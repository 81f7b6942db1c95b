/* Layer normalisation of rows. The reference is kernels/norms/layer_norm.py. Sums and products in fp32. */
#include <math.h>

#include "lanes.h"

/* x - mean; 0 behind the end of a row. */
INLINE lanes centred(lanes x, float mean, long count) {
    x -= mean;
    if (count >= LANES) return x;
    for (long i = count > 0 ? count : 0; i < LANES; i++) x[i] = 0;
    return x;
}

INLINE void forward(const void *x, const void *weight, const void *bias, void *y, float *means, float *scales,
                    long rows, long columns, float eps, int threads, int type) {
    int is_streamed = streamed(y, rows, columns, type);
#pragma omp parallel num_threads(threads) if (rows * columns > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long row = 0; row < rows; row++) {
            const void *from = elements(x, row * columns, type);
            void *to = (void *)elements(y, row * columns, type);
            pair sums = {{0}, {0}}, squares = {{0}, {0}};
            for (long at = 0; at < columns; at += 2 * LANES) {
                pair some = load_pair(from, at, columns - at, type);
                sums.low += some.low;
                sums.high += some.high;
            }
            float mean = means[row] = sum_of(sums.low + sums.high) / columns;
            for (long at = 0; at < columns; at += 2 * LANES) {
                long count = columns - at;
                pair some = load_pair(from, at, count, type);
                lanes low = centred(some.low, mean, count), high = centred(some.high, mean, count - LANES);
                squares.low += low * low;
                squares.high += high * high;
            }
            float scale = scales[row] = 1.0f / sqrtf(sum_of(squares.low + squares.high) / columns + eps);
            for (long at = 0; at < columns; at += 2 * LANES) { /* from the nearest cache */
                long count = columns - at;
                pair some = load_pair(from, at, count, type), w = load_pair(weight, at, count, type);
                pair b = bias ? load_pair(bias, at, count, type) : (pair){{0}, {0}};
                some.low = (some.low - mean) * scale * w.low + b.low;
                some.high = (some.high - mean) * scale * w.high + b.high;
                store_pair(to, at, count, some, type, is_streamed);
                prefetch_pair(from, at + columns, type); /* the next row */
            }
        }
        finish_stores();
    }
}

/* dx = scale (g - mean(g) - n mean(g n)) with n = (x - mean) scale and g = dy weight. Sums of dy n and of dy,
 * over each part of `height` rows, to `partial`: the same whatever the threads. */
INLINE void backward(const void *dy, const void *x, const void *weight, const float *means,
                     const float *scales, void *dx, float *partial, long rows, long columns, long height,
                     int threads, int type) {
    int is_streamed = streamed(dx, rows, columns, type);
#pragma omp parallel num_threads(threads) if (rows * columns > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long part = 0; part < (rows + height - 1) / height; part++) {
            float *dweight = partial + part * 2 * columns, *dbias = dweight + columns;
            memset(dweight, 0, 2 * columns * sizeof *dweight);
            for (long row = part * height; row < rows && row < (part + 1) * height; row++) {
                const void *grad = elements(dy, row * columns, type);
                const void *from = elements(x, row * columns, type);
                void *to = (void *)elements(dx, row * columns, type);
                float mean = means[row], scale = scales[row];
                lanes sums = {0}, dots = {0};
                for (long at = 0; at < columns; at += LANES) {
                    long count = columns - at;
                    lanes d = load_some(grad, at, count, type);
                    lanes n = (load_some(from, at, count, type) - mean) * scale;
                    lanes g = d * load_some(weight, at, count, type); /* 0 behind the end, as d is */
                    sums += g;
                    dots += g * n;
                    store_some(dweight, at, count, d * n + load_some(dweight, at, count, F32), F32);
                    store_some(dbias, at, count, d + load_some(dbias, at, count, F32), F32);
                }
                float mean_grad = sum_of(sums) / columns, mean_dot = sum_of(dots) / columns * scale;
                for (long at = 0; at < columns; at += 2 * LANES) {
                    long count = columns - at;
                    pair d = load_pair(grad, at, count, type), n = load_pair(from, at, count, type);
                    pair w = load_pair(weight, at, count, type);
                    pair some = {(d.low * w.low - mean_grad - (n.low - mean) * mean_dot) * scale,
                                 (d.high * w.high - mean_grad - (n.high - mean) * mean_dot) * scale};
                    store_pair(to, at, count, some, type, is_streamed);
                    prefetch_pair(grad, at + columns, type); /* the next row */
                    prefetch_pair(from, at + columns, type);
                }
            }
        }
        finish_stores();
    }
}

void layer_norm_forward(const void *x, const void *weight, const void *bias, void *y, float *means,
                        float *scales, long rows, long columns, float eps, int threads, int type) {
    if (type == BF16) forward(x, weight, bias, y, means, scales, rows, columns, eps, threads, BF16);
    else forward(x, weight, bias, y, means, scales, rows, columns, eps, threads, F32);
}

void layer_norm_backward(const void *dy, const void *x, const void *weight, const float *means,
                         const float *scales, void *dx, float *partial, long rows, long columns, long height,
                         int threads, int type) {
    if (type == BF16)
        backward(dy, x, weight, means, scales, dx, partial, rows, columns, height, threads, BF16);
    else backward(dy, x, weight, means, scales, dx, partial, rows, columns, height, threads, F32);
}
