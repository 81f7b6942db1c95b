/* silu(gate) * up, and its gradient. The reference is kernels/activations/swiglu.py. Computed in fp32. */
#include "lanes.h"

#define AHEAD 2048 /* elements to prefetch: as many bytes as a page of memory in bf16 */

/* A row is `size` gates, then `size` ups. */
INLINE void forward(const void *gate_up, void *y, long rows, long size, int threads, int type) {
    int is_streamed = streamed(y, rows, size, type);
#pragma omp parallel num_threads(threads) if (rows * size > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long row = 0; row < rows; row++) {
            const void *gates = elements(gate_up, row * 2 * size, type), *ups = elements(gates, size, type);
            void *to = (void *)elements(y, row * size, type);
            for (long at = 0; at < size; at += 2 * LANES) {
                pair gate = load_pair(gates, at, size - at, type), up = load_pair(ups, at, size - at, type);
                pair some = {gate.low * sigmoid_of(gate.low, type) * up.low,
                             gate.high * sigmoid_of(gate.high, type) * up.high};
                store_pair(to, at, size - at, some, type, is_streamed);
                prefetch_pair(gates, at + AHEAD, type);
                prefetch_pair(ups, at + AHEAD, type);
            }
        }
        finish_stores();
    }
}

/* With s = sigmoid(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s)). */
INLINE lanes gradients(lanes dy, lanes gate, lanes up, lanes *dup, int type) {
    lanes s = sigmoid_of(gate, type), grad = dy * s;
    *dup = grad * gate;
    return grad * up * (1.0f + gate * (1.0f - s));
}

INLINE void backward(const void *dy, const void *gate_up, void *dgate_up, long rows, long size, int threads,
                     int type) {
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
                dgate.low = gradients(grad.low, gate.low, up.low, &dup.low, type);
                dgate.high = gradients(grad.high, gate.high, up.high, &dup.high, type);
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

void swiglu_forward(const void *gate_up, void *y, long rows, long size, int threads, int type) {
    if (type == BF16) forward(gate_up, y, rows, size, threads, BF16);
    else forward(gate_up, y, rows, size, threads, F32);
}

void swiglu_backward(const void *dy, const void *gate_up, void *dgate_up, long rows, long size, int threads,
                     int type) {
    if (type == BF16) backward(dy, gate_up, dgate_up, rows, size, threads, BF16);
    else backward(dy, gate_up, dgate_up, rows, size, threads, F32);
}
