/* AdamW over many tensors. The reference is kernels/optimisers/adamw.py. Computed in fp32. */
#include "lanes.h"

#define BLOCK 4096
#define AHEAD 1024 /* elements to prefetch: a page of memory in fp32 */

typedef struct {
    float keep, pace, unbias, weight1, weight2, eps, scale;
} Factors;

INLINE lanes root_of(lanes x) {
#ifdef __AVX512F__
    return (lanes)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

/* One step of 16 parameters, whose new moments go to *m and *v. */
INLINE lanes step(lanes p, lanes g, lanes *m, lanes *v, Factors by) {
    g *= by.scale;
    *m += by.weight1 * (g - *m);
    *v += by.weight2 * (g * g - *v);
    return p * by.keep - by.pace * *m / (root_of(*v * by.unbias) + by.eps);
}

INLINE void block(void *param, const void *grad, float *mean, float *square, void *copy, long at, long end,
                  Factors by, int type, int grad_type, int copy_type) {
    for (; at < end; at += 2 * LANES) {
        long count = end - at;
        pair p = load_pair(param, at, count, type), g = load_pair(grad, at, count, grad_type);
        pair m = load_pair(mean, at, count, F32), v = load_pair(square, at, count, F32);
        p.low = step(p.low, g.low, &m.low, &v.low, by);
        p.high = step(p.high, g.high, &m.high, &v.high, by);
        store_pair(mean, at, count, m, F32, 0); /* not streamed: their lines have been read anyway */
        store_pair(square, at, count, v, F32, 0);
        store_pair(param, at, count, p, type, 0);
        if (copy) store_pair(copy, at, count, p, copy_type, 0);
        prefetch_pair(param, at + AHEAD, type);
        prefetch_pair(grad, at + AHEAD, grad_type);
        prefetch_pair(mean, at + AHEAD, F32);
        prefetch_pair(square, at + AHEAD, F32);
    }
}

/* Everything but the types that are common is rare: flags that are not constant, for one compiled body. */
static void any_block(void *param, const void *grad, float *mean, float *square, void *copy, long at,
                      long end, Factors by, int type, int grad_type, int copy_type) {
    if (type == F32 && grad_type == F32 && !copy)
        block(param, grad, mean, square, 0, at, end, by, F32, F32, F32);
    else if (type == F32 && grad_type == BF16 && (!copy || copy_type == BF16))
        block(param, grad, mean, square, copy, at, end, by, F32, BF16, BF16);
    else if (type == BF16 && grad_type == BF16 && !copy)
        block(param, grad, mean, square, 0, at, end, by, BF16, BF16, F32);
    else block(param, grad, mean, square, copy, at, end, by, type, grad_type, copy_type);
}

/* `pointers`: params, grads, means, squares, then copies, `count` each. `types`: of params, grads, copies.
 * Blocks of all tensors are dealt out to the threads in turn. */
void adamw(void **pointers, const int *types, const long *sizes, long count, int has_copies, float keep,
           float pace, float unbias, float weight1, float weight2, float eps, float scale, int threads) {
    Factors by = {keep, pace, unbias, weight1, weight2, eps, scale};
    long total = 0;
    for (long i = 0; i < count; i++) total += sizes[i];
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (total > 1 << 14)
    for (int part = 0; part < threads; part++) {
        long number = 0;
        for (long i = 0; i < count; i++) {
            void *copy = has_copies ? pointers[4 * count + i] : 0;
            int copy_type = has_copies ? types[2 * count + i] : F32;
            for (long at = 0; at < sizes[i]; at += BLOCK, number++) {
                if (number % threads != part) continue;
                long end = at + BLOCK < sizes[i] ? at + BLOCK : sizes[i];
                any_block(pointers[i], pointers[count + i], pointers[2 * count + i], pointers[3 * count + i],
                          copy, at, end, by, types[i], types[count + i], copy_type);
            }
        }
    }
}
