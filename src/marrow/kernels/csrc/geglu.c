/* gelu(gate) * up, and its gradient. The reference is kernels/activations/geglu.py. Computed in fp32. */
#include "lanes.h"

#define AHEAD 2048 /* elements to prefetch: as many bytes as a page of memory in bf16 */

/* P(x) of gelu(x) = x P(x), and P'(x) where `slope` is no null pointer. */
INLINE lanes share_tanh(lanes x, lanes *slope, int type) {
    const float steep = 1.5957691216f, cubic = 0.044715f; /* 2 sqrt(2 / pi) */
    lanes square = x * x, u = steep * x * (1.0f + cubic * square);
    if (!slope) return sigmoid_of(u, type);
    lanes small = exp_of(-larger(u, -u)); /* both sides of the sigmoid without cancellation */
    lanes once = reciprocal_of(1.0f + small), other = small * once;
    *slope = other * once * (steep + 3.0f * steep * cubic * square);
    return blend((lanes_i32)(u > 0), once, other);
}

/* The normal distribution: P(-a) = e^(-a^2 / 2) Q(t), t = 1 / (1 + 0.31 a), a >= 0; Q, a polynomial without
 * constant term, fitted to a relative error of 2e-7 up to a = 14. */
INLINE lanes share_exact(lanes x, lanes *slope) {
    lanes a = blend((lanes_i32)(x < 0), -x, x);
    lanes bell = exp_of(-0.5f * a * a), t = reciprocal_of(1.0f + 0.31f * a);
    lanes p = all(3.58418562e-2f);
    p = p * t - 1.41605094e-1f;
    p = p * t + 1.55068636e-1f;
    p = p * t - 1.49040436e-2f;
    p = p * t + 1.10110447e-1f;
    p = p * t + 1.07771009e-1f;
    p = p * t + 1.24060355e-1f;
    p = p * t + 1.23656906e-1f;
    lanes tail = p * t * bell;
    if (slope) *slope = 0.3989422804f * bell;
    return blend((lanes_i32)(x < 0), tail, 1.0f - tail);
}

INLINE lanes share_of(lanes x, lanes *slope, int is_tanh, int type) {
    return is_tanh ? share_tanh(x, slope, type) : share_exact(x, slope);
}

/* A row is `size` gates, then `size` ups. */
INLINE void forward(const void *gate_up, void *y, long rows, long size, int is_tanh, int threads, int type) {
    int is_streamed = streamed(y, rows, size, type);
#pragma omp parallel num_threads(threads) if (rows * size > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long row = 0; row < rows; row++) {
            const void *gates = elements(gate_up, row * 2 * size, type), *ups = elements(gates, size, type);
            void *to = (void *)elements(y, row * size, type);
            for (long at = 0; at < size; at += 2 * LANES) {
                pair gate = load_pair(gates, at, size - at, type), some = load_pair(ups, at, size - at, type);
                some.low *= gate.low * share_of(gate.low, 0, is_tanh, type);
                some.high *= gate.high * share_of(gate.high, 0, is_tanh, type);
                store_pair(to, at, size - at, some, type, is_streamed);
                prefetch_pair(gates, at + AHEAD, type);
                prefetch_pair(ups, at + AHEAD, type);
            }
        }
        finish_stores();
    }
}

/* dup = dy gate P, dgate = dy up (P + gate P'). */
INLINE lanes gradients(lanes dy, lanes gate, lanes up, lanes *dup, int is_tanh, int type) {
    lanes slope, share = share_of(gate, &slope, is_tanh, type);
    *dup = dy * gate * share;
    return dy * up * (share + gate * slope);
}

INLINE void backward(const void *dy, const void *gate_up, void *dgate_up, long rows, long size, int is_tanh,
                     int threads, int type) {
    int is_streamed = streamed(dgate_up, rows, size, type);
#pragma omp parallel num_threads(threads) if (rows * size > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long row = 0; row < rows; row++) {
            const void *gates = elements(gate_up, row * 2 * size, type), *ups = elements(gates, size, type);
            const void *grads = elements(dy, row * size, type);
            void *dgates = (void *)elements(dgate_up, row * 2 * size, type);
            void *dups = (void *)elements(dgates, size, type);
            for (long at = 0; at < size; at += 2 * LANES) {
                long count = size - at;
                pair gate = load_pair(gates, at, count, type), up = load_pair(ups, at, count, type);
                pair grad = load_pair(grads, at, count, type), dgate, dup;
                dgate.low = gradients(grad.low, gate.low, up.low, &dup.low, is_tanh, type);
                dgate.high = gradients(grad.high, gate.high, up.high, &dup.high, is_tanh, type);
                store_pair(dgates, at, count, dgate, type, is_streamed);
                store_pair(dups, at, count, dup, type, is_streamed);
                prefetch_pair(gates, at + AHEAD, type);
                prefetch_pair(ups, at + AHEAD, type);
                prefetch_pair(grads, at + AHEAD, type);
            }
        }
        finish_stores();
    }
}

void geglu_forward(const void *gate_up, void *y, long rows, long size, int is_tanh, int threads, int type) {
    if (is_tanh && type == BF16) forward(gate_up, y, rows, size, 1, threads, BF16);
    else if (is_tanh) forward(gate_up, y, rows, size, 1, threads, F32);
    else if (type == BF16) forward(gate_up, y, rows, size, 0, threads, BF16);
    else forward(gate_up, y, rows, size, 0, threads, F32);
}

void geglu_backward(const void *dy, const void *gate_up, void *dgate_up, long rows, long size, int is_tanh,
                    int threads, int type) {
    if (is_tanh && type == BF16) backward(dy, gate_up, dgate_up, rows, size, 1, threads, BF16);
    else if (is_tanh) backward(dy, gate_up, dgate_up, rows, size, 1, threads, F32);
    else if (type == BF16) backward(dy, gate_up, dgate_up, rows, size, 0, threads, BF16);
    else backward(dy, gate_up, dgate_up, rows, size, 0, threads, F32);
}
