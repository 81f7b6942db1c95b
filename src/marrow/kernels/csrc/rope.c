/* Rotation of heads by their token's angles. The reference is kernels/activations/rope.py. In fp32. */
#include "lanes.h"

/* Channel i of a head and channel i + size are a pair. `sign` -1 rotates back. Steps in elements. */
INLINE void rotate(const void *x, const void *cos, const void *sin, void *y, long tokens, long heads,
                   long size, long token_step, long head_step, float sign, int threads, int type,
                   int angle_type) {
    int is_streamed = streamed(y, 2 * tokens * heads, size, type); /* half heads are the rows */
#pragma omp parallel num_threads(threads) if (tokens * heads * size > 1 << 14)
    {
#pragma omp for schedule(static) nowait
        for (long token = 0; token < tokens; token++) {
            const void *c = elements(cos, token * size, angle_type);
            const void *s = elements(sin, token * size, angle_type);
            for (long head = 0; head < heads; head++) {
                const void *first = elements(x, token * token_step + head * head_step, type);
                const void *second = elements(first, size, type);
                void *to_first = (void *)elements(y, (token * heads + head) * 2 * size, type);
                void *to_second = (void *)elements(to_first, size, type);
                for (long at = 0; at < size; at += 2 * LANES) {
                    long count = size - at;
                    pair a = load_pair(first, at, count, type), b = load_pair(second, at, count, type);
                    pair p = load_pair(c, at, count, angle_type), q = load_pair(s, at, count, angle_type);
                    q = (pair){q.low * sign, q.high * sign};
                    pair one = {a.low * p.low - b.low * q.low, a.high * p.high - b.high * q.high};
                    pair other = {b.low * p.low + a.low * q.low, b.high * p.high + a.high * q.high};
                    store_pair(to_first, at, count, one, type, is_streamed);
                    store_pair(to_second, at, count, other, type, is_streamed);
                    prefetch_pair(first, at + token_step, type); /* the next token */
                    prefetch_pair(second, at + token_step, type);
                }
            }
        }
        finish_stores();
    }
}

void rope(const void *x, const void *cos, const void *sin, void *y, long tokens, long heads, long size,
          long token_step, long head_step, float sign, int threads, int type, int angle_type) {
    if (type == F32)
        rotate(x, cos, sin, y, tokens, heads, size, token_step, head_step, sign, threads, F32, F32);
    else if (angle_type == F32)
        rotate(x, cos, sin, y, tokens, heads, size, token_step, head_step, sign, threads, BF16, F32);
    else
        rotate(x, cos, sin, y, tokens, heads, size, token_step, head_step, sign, threads, BF16, BF16);
}
