/* silu(gate) * up, and its gradient. The reference is kernels/activations/swiglu.py. Computed in fp32. */
#include "lanes.h"

/* A row is `size` gates, then `size` ups. */
INLINE void forward(const void *gate_up, void *y, long rows, long size, int threads, int type) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size > 1 << 14)
    for (long row = 0; row < rows; row++) {
        const void *gates = elements(gate_up, row * 2 * size, type), *ups = elements(gates, size, type);
        void *to = (void *)elements(y, row * size, type);
        long at = 0;
        for (; at + LANES <= size; at += LANES) {
            lanes gate = load(gates, at, type);
            store(to, at, gate * sigmoid_of(gate) * load(ups, at, type), type);
        }
        if (at < size) {
            lanes gate = load_part(gates, at, size - at, type);
            lanes some = gate * sigmoid_of(gate) * load_part(ups, at, size - at, type);
            store_part(to, at, size - at, some, type);
        }
    }
}

/* With s = sigmoid_of(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s)). */
INLINE void gradients(lanes dy, lanes gate, lanes up, lanes *dgate, lanes *dup) {
    lanes s = sigmoid_of(gate), grad = dy * s;
    *dup = grad * gate;
    *dgate = grad * up * (1.0f + gate * (1.0f - s));
}

INLINE void backward(const void *dy, const void *gate_up, void *dgate_up, long rows, long size, int threads,
                     int type) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size > 1 << 14)
    for (long row = 0; row < rows; row++) {
        const void *gates = elements(gate_up, row * 2 * size, type), *ups = elements(gates, size, type);
        const void *grads = elements(dy, row * size, type);
        void *dgates = (void *)elements(dgate_up, row * 2 * size, type);
        void *dups = (void *)elements(dgates, size, type);
        lanes dgate, dup;
        long at = 0;
        for (; at + LANES <= size; at += LANES) {
            gradients(load(grads, at, type), load(gates, at, type), load(ups, at, type), &dgate, &dup);
            store(dgates, at, dgate, type);
            store(dups, at, dup, type);
        }
        if (at < size) {
            long count = size - at;
            gradients(load_part(grads, at, count, type), load_part(gates, at, count, type),
                      load_part(ups, at, count, type), &dgate, &dup);
            store_part(dgates, at, count, dgate, type);
            store_part(dups, at, count, dup, type);
        }
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
