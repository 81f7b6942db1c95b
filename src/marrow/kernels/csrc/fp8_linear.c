/* y = x W^T with fp8 (e4m3) weights and a scale for each block of 128 x 128. The reference is
 * kernels/matmul/fp8_linear.py. A few rows, as fp32, meet weights that become fp32, and sums are scaled; more rows, of
 * bf16, meet scaled weights that become bf16, in AMX tiles. A weight is never NaN. */
#include "linear.h"

#define BLOCK 128
#define MOST 8  /* rows at once */
#define AHEAD 8 /* outputs, into the second cache */

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

/* x [rows, inputs] and y [rows, outputs], bf16, by AMX. work: rows in tiles, see `linear_tiles`. */
void fp8_linear_tiles(const uint16_t *x, const char *weight, const float *scales, char *y, uint16_t *work, long rows,
                      long outputs, long inputs, int threads) {
    linear_tiles(x, &(matrix){weight, scales, outputs, inputs, FP8}, y, work, rows, threads, FP8);
}
