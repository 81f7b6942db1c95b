/* Rotation of heads by their token's angles. The reference is kernels/activations/rope.py. In fp32. */
#include "lanes.h"

/* Channel i of a head and channel i + size are a pair. `sign` -1 rotates back. Steps in elements. */
INLINE void rotate(const void *x, const void *cos, const void *sin, void *y, long tokens, long heads,
                   long size, long token_step, long head_step, float sign, int threads, int type,
                   int angle_type) {
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * heads * size > 1 << 14)
    for (long token = 0; token < tokens; token++) {
        const void *c = elements(cos, token * size, angle_type), *s = elements(sin, token * size, angle_type);
        for (long head = 0; head < heads; head++) {
            const void *first = elements(x, token * token_step + head * head_step, type);
            const void *second = elements(first, size, type);
            void *to_first = (void *)elements(y, (token * heads + head) * 2 * size, type);
            void *to_second = (void *)elements(to_first, size, type);
            long at = 0;
            for (; at + LANES <= size; at += LANES) {
                lanes a = load(first, at, type), b = load(second, at, type);
                lanes cosine = load(c, at, angle_type), sine = load(s, at, angle_type) * sign;
                store(to_first, at, a * cosine - b * sine, type);
                store(to_second, at, b * cosine + a * sine, type);
            }
            if (at < size) {
                long count = size - at;
                lanes a = load_part(first, at, count, type), b = load_part(second, at, count, type);
                lanes cosine = load_part(c, at, count, angle_type);
                lanes sine = load_part(s, at, count, angle_type) * sign;
                store_part(to_first, at, count, a * cosine - b * sine, type);
                store_part(to_second, at, count, b * cosine + a * sine, type);
            }
        }
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
