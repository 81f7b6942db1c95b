/* y = x W^T for a few rows of fp32 and fp8 (e4m3) weights with a scale for each block of 128 x 128. The reference
 * is kernels/matmul/fp8_linear.py. Weights become fp32, sums are fp32; a weight is never NaN. */
#include "amx.h"

#define BLOCK 128
#define MOST 8  /* rows at once */
#define AHEAD 8 /* outputs, into the second cache */

INLINE lanes load_fp8(const int8_t *from) {
    /* Sign and magnitude go to their places; the exponents' offsets differ by 120. */
    lanes_i32 bits = (widen_signed((few_signed)load_few(from)) << 20) & (int32_t)0x87F00000;
    return (lanes)bits * 0x1p120f;
}

/* `outputs` outputs and `count` rows, both constants; the outputs lie in one block. Two outputs keep the units of
 * multiplication busy where one waits for its own sum. */
INLINE void some_outputs(const float *x, const int8_t *weight, const float *scale, char *y, long first,
                         const int outputs, long all_outputs, long inputs, const int count, int type) {
    lanes sums[2][MOST] = {{{0}}};
    for (long start = 0; start < inputs; start += BLOCK) {
        long end = start + BLOCK < inputs ? start + BLOCK : inputs, at = start;
        lanes parts[2][MOST] = {{{0}}};
        for (; at + LANES <= end; at += LANES)
#pragma GCC unroll 2
            for (int i = 0; i < outputs; i++) {
                __builtin_prefetch(weight + (i + AHEAD) * inputs + at, 0, 2);
                lanes some = load_fp8(weight + i * inputs + at);
#pragma GCC unroll 8
                for (int row = 0; row < count; row++) parts[i][row] += some * load(x + row * inputs, at, F32);
            }
        if (at < end)
            for (int i = 0; i < outputs; i++) {
                int8_t few[LANES] = {0};
                memcpy(few, weight + i * inputs + at, end - at);
                lanes some = load_fp8(few);
                for (int row = 0; row < count; row++)
                    parts[i][row] += some * load_part(x + row * inputs, at, end - at, F32);
            }
#pragma GCC unroll 2
        for (int i = 0; i < outputs; i++)
#pragma GCC unroll 8
            for (int row = 0; row < count; row++) sums[i][row] += parts[i][row] * scale[start / BLOCK];
    }
    for (int i = 0; i < outputs; i++)
        for (int row = 0; row < count; row++)
            store_part(y, row * all_outputs + first + i, 1, all(sum_of(sums[i][row])), type);
}

/* x [rows, inputs] fp32, what 8-bit rows stand for; y [rows, outputs] of `type`. */
void fp8_linear(const float *x, const int8_t *weight, const float *scales, char *y, long rows, long outputs,
                long inputs, int threads, int type) {
    for (long first = 0; first < rows; first += MOST) {
        const float *from = x + first * inputs;
        char *to = y + first * outputs * (type == BF16 ? 2 : 4);
        long count = rows - first < MOST ? rows - first : MOST;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long output = 0; output < outputs; output += 2) {
            const int8_t *w = weight + output * inputs;
            const float *scale = scales + output / BLOCK * ((inputs + BLOCK - 1) / BLOCK);
            int is_pair = output + 1 < outputs;
#define CASE(N)                                                                                                  \
    case N:                                                                                                      \
        if (is_pair) some_outputs(from, w, scale, to, output, 2, outputs, inputs, N, type);                      \
        else some_outputs(from, w, scale, to, output, 1, outputs, inputs, N, type);                              \
        break;
            switch (count) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
            }
        }
    }
}
