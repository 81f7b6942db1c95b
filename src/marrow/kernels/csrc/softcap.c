/* cap * tanh(x / cap), and its gradient. The reference is kernels/activations/softcap.py. In fp32. */
#include "lanes.h"

#define BLOCK 4096
#define AHEAD 2048 /* elements to prefetch: as many bytes as a page of memory in bf16 */

INLINE void forward(const void *x, void *y, long size, float cap, int threads, int type) {
    float inverse = 1.0f / cap;
    int is_streamed = streamed(y, size / BLOCK, BLOCK, type);
#pragma omp parallel num_threads(threads) if (size > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long block = 0; block < size; block += BLOCK) {
            long end = block + BLOCK < size ? block + BLOCK : size;
            for (long at = block; at < end; at += 2 * LANES) {
                pair some = load_pair(x, at, end - at, type);
                some.low = cap * tanh_of(some.low * inverse, type);
                some.high = cap * tanh_of(some.high * inverse, type);
                store_pair(y, at, end - at, some, type, is_streamed);
                prefetch_pair(x, at + AHEAD, type);
            }
        }
        finish_stores();
    }
}

/* sech^2(u) = 4 e / (1 + e)^2 with e = e^(-2 |u|). */
INLINE lanes slope_of(lanes u) {
    lanes small = exp_of(-2.0f * larger(u, -u)), once = reciprocal_of(1.0f + small);
    return 4.0f * small * once * once;
}

INLINE void backward(const void *dy, const void *x, void *dx, long size, float cap, int threads, int type) {
    float inverse = 1.0f / cap;
    int is_streamed = streamed(dx, size / BLOCK, BLOCK, type);
#pragma omp parallel num_threads(threads) if (size > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long block = 0; block < size; block += BLOCK) {
            long end = block + BLOCK < size ? block + BLOCK : size;
            for (long at = block; at < end; at += 2 * LANES) {
                pair u = load_pair(x, at, end - at, type), some = load_pair(dy, at, end - at, type);
                some.low *= slope_of(u.low * inverse);
                some.high *= slope_of(u.high * inverse);
                store_pair(dx, at, end - at, some, type, is_streamed);
                prefetch_pair(x, at + AHEAD, type);
                prefetch_pair(dy, at + AHEAD, type);
            }
        }
        finish_stores();
    }
}

void softcap_forward(const void *x, void *y, long size, float cap, int threads, int type) {
    if (type == BF16) forward(x, y, size, cap, threads, BF16);
    else forward(x, y, size, cap, threads, F32);
}

void softcap_backward(const void *dy, const void *x, void *dx, long size, float cap, int threads, int type) {
    if (type == BF16) backward(dy, x, dx, size, cap, threads, BF16);
    else backward(dy, x, dx, size, cap, threads, F32);
}
