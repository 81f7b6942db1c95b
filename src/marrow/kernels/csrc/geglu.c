/* gelu(gate) * up, and its gradient. The reference is kernels/activations/geglu.py. Computed in fp32. */
#include "lanes.h"

/* P(x) of gelu(x) = x P(x), and P'(x). */
INLINE lanes share_tanh(lanes x, lanes *slope) {
    const float steep = 1.5957691216f, cubic = 0.044715f; /* 2 sqrt(2 / pi) */
    lanes square = x * x, u = steep * x * (1.0f + cubic * square);
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
    *slope = 0.3989422804f * bell;
    return blend((lanes_i32)(x < 0), tail, 1.0f - tail);
}

INLINE lanes share_of(lanes x, lanes *slope, int is_tanh) {
    return is_tanh ? share_tanh(x, slope) : share_exact(x, slope);
}

/* A row is `size` gates, then `size` ups. */
INLINE void forward(const void *gate_up, void *y, long rows, long size, int is_tanh, int threads, int type) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size > 1 << 14)
    for (long row = 0; row < rows; row++) {
        const void *gates = elements(gate_up, row * 2 * size, type), *ups = elements(gates, size, type);
        void *to = (void *)elements(y, row * size, type);
        for (long at = 0; at < size; at += LANES) {
            lanes gate = load_some(gates, at, size - at, type), slope;
            lanes some = gate * share_of(gate, &slope, is_tanh) * load_some(ups, at, size - at, type);
            store_some(to, at, size - at, some, type);
        }
    }
}

/* dup = dy gate P, dgate = dy up (P + gate P'). */
INLINE void backward(const void *dy, const void *gate_up, void *dgate_up, long rows, long size, int is_tanh,
                     int threads, int type) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size > 1 << 14)
    for (long row = 0; row < rows; row++) {
        const void *gates = elements(gate_up, row * 2 * size, type), *ups = elements(gates, size, type);
        const void *grads = elements(dy, row * size, type);
        void *dgates = (void *)elements(dgate_up, row * 2 * size, type);
        void *dups = (void *)elements(dgates, size, type);
        for (long at = 0; at < size; at += LANES) {
            long count = size - at;
            lanes gate = load_some(gates, at, count, type), grad = load_some(grads, at, count, type), slope;
            lanes share = share_of(gate, &slope, is_tanh);
            lanes dgate = grad * load_some(ups, at, count, type) * (share + gate * slope);
            store_some(dgates, at, count, dgate, type);
            store_some(dups, at, count, grad * gate * share, type);
        }
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
