/* RMS normalisation of rows. The reference is kernels/norms/rms_norm.py. Sums and products in fp32. */
#include <math.h>
#include <stdlib.h>

#include "lanes.h"

INLINE float square_sum(const void *x, long columns, int type) {
    lanes sums[4] = {{0}};
    long at = 0;
    for (; at + 4 * LANES <= columns; at += 4 * LANES)
        for (int i = 0; i < 4; i++) {
            lanes some = load(x, at + i * LANES, type);
            sums[i] += some * some;
        }
    for (; at + LANES <= columns; at += LANES) {
        lanes some = load(x, at, type);
        sums[0] += some * some;
    }
    if (at < columns) {
        lanes some = load_part(x, at, columns - at, type);
        sums[1] += some * some;
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

INLINE const void *row_of(const void *start, long row, long columns, int type) {
    return (const char *)start + row * columns * (type == BF16 ? 2 : 4);
}

INLINE void forward(const void *x, const void *weight, void *y, float *scales, long rows, long columns,
                    float eps, int threads, int type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const void *from = row_of(x, row, columns, type);
        void *to = (void *)row_of(y, row, columns, type);
        float scale = scales[row] = 1.0f / sqrtf(square_sum(from, columns, type) / columns + eps);
        long at = 0;
        for (; at + LANES <= columns; at += LANES)
            store(to, at, load(from, at, type) * scale * load(weight, at, type), type);
        if (at < columns) {
            long count = columns - at;
            lanes some = load_part(from, at, count, type) * scale * load_part(weight, at, count, type);
            store_part(to, at, count, some, type);
        }
    }
}

/* dx = scale (g - n mean(g n)) with n = x scale and g = dy weight; dweight = sum over rows of dy n.
 * `partial` [threads, columns], zeroed: each thread sums its own rows. */
INLINE void backward(const void *dy, const void *x, const void *weight, const float *scales, void *dx,
                     float *partial, long rows, long columns, int threads, int type) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        float *dweight = partial + part * columns;
        for (long row = rows * part / threads; row < rows * (part + 1) / threads; row++) {
            const void *grad = row_of(dy, row, columns, type), *from = row_of(x, row, columns, type);
            void *to = (void *)row_of(dx, row, columns, type);
            float scale = scales[row];
            lanes dots[2] = {{0}};
            for (long at = 0; at < columns; at += LANES) {
                long count = columns - at;
                int whole = count >= LANES;
                lanes g = whole ? load(grad, at, type) : load_part(grad, at, count, type);
                lanes n = (whole ? load(from, at, type) : load_part(from, at, count, type)) * scale;
                lanes w = whole ? load(weight, at, type) : load_part(weight, at, count, type);
                lanes sum = g * n;
                dots[(at / LANES) & 1] += sum * w;
                sum += whole ? load(dweight, at, F32) : load_part(dweight, at, count, F32);
                if (whole) store(dweight, at, sum, F32);
                else store_part(dweight, at, count, sum, F32);
            }
            float mean = sum_of(dots[0] + dots[1]) / columns;
            for (long at = 0; at < columns; at += LANES) {
                long count = columns - at;
                int whole = count >= LANES;
                lanes g = whole ? load(grad, at, type) : load_part(grad, at, count, type);
                lanes n = (whole ? load(from, at, type) : load_part(from, at, count, type)) * scale;
                lanes w = whole ? load(weight, at, type) : load_part(weight, at, count, type);
                lanes result = (g * w - n * mean) * scale;
                if (whole) store(to, at, result, type);
                else store_part(to, at, count, result, type);
            }
        }
    }
}

void rms_norm_forward(const void *x, const void *weight, void *y, float *scales, long rows, long columns,
                      float eps, int threads, int type) {
    if (type == BF16) forward(x, weight, y, scales, rows, columns, eps, threads, BF16);
    else forward(x, weight, y, scales, rows, columns, eps, threads, F32);
}

void rms_norm_backward(const void *dy, const void *x, const void *weight, const float *scales, void *dx,
                       float *partial, long rows, long columns, int threads, int type) {
    if (type == BF16) backward(dy, x, weight, scales, dx, partial, rows, columns, threads, BF16);
    else backward(dy, x, weight, scales, dx, partial, rows, columns, threads, F32);
}
