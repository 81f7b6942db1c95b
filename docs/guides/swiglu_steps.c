/* SwiGLU in bf16, from one number at a time to the limit of memory: the C of the guide the-memory-wall.md. */
#include <math.h>

#include "../../src/marrow/kernels/csrc/lanes.h"

#define AHEAD 2048

/* The compiler may not make vectors of this loop. */
__attribute__((optimize("no-tree-vectorize"))) void scalar(const uint16_t *gate_up, uint16_t *y, long rows,
                                                           long size) {
    for (long row = 0; row < rows; row++)
        for (long at = 0; at < size; at++) {
            float gate = bf16_to_float(gate_up[row * 2 * size + at]);
            float up = bf16_to_float(gate_up[row * 2 * size + size + at]);
            store_part(y, row * size + at, 1, all(gate / (1 + expf(-gate)) * up), BF16);
        }
}

INLINE void step(const void *gate_up, void *y, long rows, long size, int is_short, int is_ahead,
                 int is_streamed) {
    int type = is_short ? BF16 : F32; /* how exact the sigmoid is */
    for (long row = 0; row < rows; row++) {
        const void *gates = elements(gate_up, row * 2 * size, BF16), *ups = elements(gates, size, BF16);
        void *to = (void *)elements(y, row * size, BF16);
        for (long at = 0; at < size; at += 2 * LANES) {
            pair gate = load_pair(gates, at, size - at, BF16), up = load_pair(ups, at, size - at, BF16);
            pair some = {gate.low * sigmoid_of(gate.low, type) * up.low,
                         gate.high * sigmoid_of(gate.high, type) * up.high};
            store_pair(to, at, size - at, some, BF16, is_streamed);
            if (is_ahead) prefetch_pair(gates, at + AHEAD, BF16);
            if (is_ahead) prefetch_pair(ups, at + AHEAD, BF16);
        }
    }
    finish_stores();
}

void vectors(const void *gate_up, void *y, long rows, long size) { step(gate_up, y, rows, size, 0, 0, 0); }
void shorter(const void *gate_up, void *y, long rows, long size) { step(gate_up, y, rows, size, 1, 0, 0); }
void ahead(const void *gate_up, void *y, long rows, long size) { step(gate_up, y, rows, size, 1, 1, 0); }
void streaming(const void *gate_up, void *y, long rows, long size) {
    step(gate_up, y, rows, size, 1, 1, size % 32 == 0 && (uintptr_t)y % 64 == 0);
}
