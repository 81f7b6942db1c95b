/* y = x W^T for a few rows of fp32 and fp8 (e4m3) weights with a scale for each block of 128 x 128. The reference
 * is kernels/matmul/fp8_linear.py. Weights become fp32, sums are fp32; a weight is never NaN. */
#include "amx.h"

#define BLOCK 128
#define MOST 8  /* rows at once */
#define AHEAD 8 /* outputs, into the second cache */

INLINE lanes load_fp8(const int8_t *from) {
    typedef int8_t sixteen __attribute__((vector_size(16)));
    sixteen some;
    memcpy(&some, from, sizeof some);
    /* Sign and magnitude go to their places; the exponents' offsets differ by 120. */
    lanes_i32 bits = (__builtin_convertvector(some, lanes_i32) << 20) & (int32_t)0x87F00000;
    return (lanes)bits * 0x1p120f;
}

/* One output and `count` (a constant) rows. */
INLINE void one_output(const float *x, const int8_t *weight, const float *scales, char *y, long output,
                       long outputs, long inputs, const int count, int type) {
    lanes sums[MOST] = {{0}};
    const float *scale = scales + output / BLOCK * ((inputs + BLOCK - 1) / BLOCK);
    for (long start = 0; start < inputs; start += BLOCK) {
        long end = start + BLOCK < inputs ? start + BLOCK : inputs, at = start;
        lanes parts[MOST] = {{0}};
        for (; at + LANES <= end; at += LANES) {
            if (at % 64 == 0) __builtin_prefetch(weight + AHEAD * inputs + at, 0, 2);
            lanes some = load_fp8(weight + at);
#pragma GCC unroll 8
            for (int row = 0; row < count; row++) parts[row] += some * load(x + row * inputs, at, F32);
        }
        if (at < end) {
            int8_t few[LANES] = {0};
            memcpy(few, weight + at, end - at);
            lanes some = load_fp8(few);
            for (int row = 0; row < count; row++)
                parts[row] += some * load_part(x + row * inputs, at, end - at, F32);
        }
#pragma GCC unroll 8
        for (int row = 0; row < count; row++) sums[row] += parts[row] * scale[start / BLOCK];
    }
    for (int row = 0; row < count; row++) {
        lanes sum = all(sum_of(sums[row]));
        store_part(y, row * outputs + output, 1, sum, type);
    }
}

/* x [rows, inputs] fp32, what 8-bit rows stand for; y [rows, outputs] of `type`. */
void fp8_linear(const float *x, const int8_t *weight, const float *scales, char *y, long rows, long outputs,
                long inputs, int threads, int type) {
    for (long first = 0; first < rows; first += MOST) {
        const float *from = x + first * inputs;
        char *to = y + first * outputs * (type == BF16 ? 2 : 4);
        long count = rows - first;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long output = 0; output < outputs; output++) {
            const int8_t *w = weight + output * inputs;
#define CASE(N)                                                                                                  \
    case N: one_output(from, w, scales, to, output, outputs, inputs, N, type); break;
            switch (count < MOST ? count : MOST) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
            }
        }
    }
}
