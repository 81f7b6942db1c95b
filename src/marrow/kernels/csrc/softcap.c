/* cap * tanh(x / cap), and its gradient. The reference is kernels/activations/softcap.py. In fp32. */
#include "lanes.h"

#define BLOCK 4096

INLINE void forward(const void *x, void *y, long size, float cap, int threads, int type) {
    float inverse = 1.0f / cap;
#pragma omp parallel for num_threads(threads) schedule(static) if (size > 1 << 14)
    for (long block = 0; block < size; block += BLOCK) {
        long end = block + BLOCK < size ? block + BLOCK : size;
        for (long at = block; at < end; at += LANES)
            store_some(y, at, end - at, cap * tanh_of(load_some(x, at, end - at, type) * inverse), type);
    }
}

/* sech^2(u) = 4 e / (1 + e)^2 with e = e^(-2 |u|). */
INLINE void backward(const void *dy, const void *x, void *dx, long size, float cap, int threads, int type) {
    float inverse = 1.0f / cap;
#pragma omp parallel for num_threads(threads) schedule(static) if (size > 1 << 14)
    for (long block = 0; block < size; block += BLOCK) {
        long end = block + BLOCK < size ? block + BLOCK : size;
        for (long at = block; at < end; at += LANES) {
            lanes u = load_some(x, at, end - at, type) * inverse;
            lanes small = exp_of(-2.0f * larger(u, -u)), once = reciprocal_of(1.0f + small);
            lanes some = load_some(dy, at, end - at, type) * 4.0f * small * once * once;
            store_some(dx, at, end - at, some, type);
        }
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
