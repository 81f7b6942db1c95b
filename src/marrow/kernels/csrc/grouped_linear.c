/* y = x W[e]^T for rows sorted by expert e. The reference is kernels/matmul/grouped_linear.py. */
#include "linear.h"

#define FEW 2 /* rows of an expert for which lanes beat tiles */

static void multiply(const char *x, const char *weight, const int32_t *ends, char *y, uint16_t *work, long experts,
                     long rows, long outputs, long inputs, int tiles, int threads, int type) {
    long size = bytes_of(type);
#pragma omp parallel num_threads(threads)
    {
#if HAS_BF16_TILES
        if (tiles) {
            uint16_t *to = work;
            for (long e = 0; e < experts; e++) {
                long start = e ? ends[e - 1] : 0, count = ends[e] - start;
                if (count <= FEW) continue;
#pragma omp for schedule(static) nowait
                for (long row = 0; row < count; row += 16)
                    pack_tile((const uint16_t *)x + (start + row) * inputs, 0, least(16, count - row), inputs,
                              to + row / 16 * blocks_of(inputs) * TILE);
                to += tiles_of(count) * blocks_of(inputs) * TILE;
            }
#pragma omp barrier
            configure_tiles(64);
        }
        const uint16_t *packed = work;
#endif
        for (long e = 0; e < experts; e++) {
            long start = e ? ends[e - 1] : 0, count = ends[e] - start;
            matrix m = {weight + e * outputs * inputs * size, 0, outputs, inputs, type};
            char *to = y + start * outputs * size;
            if (count <= 0) continue;
#if HAS_BF16_TILES
            if (tiles && count > FEW) {
                for (long row = 0; row < count; row += rows_at_once(inputs)) {
                    long some = least(rows_at_once(inputs), count - row);
#pragma omp for schedule(static) nowait
                    for (long output = 0; output < outputs; output += PANELS)
                        by_tiles(&m, output, packed, some, to + row * outputs * 2, BF16, BF16);
                    packed += tiles_of(some) * blocks_of(inputs) * TILE;
                }
                continue;
            }
#endif
#pragma omp for schedule(static) nowait
            for (long output = 0; output < outputs; output += LANE_OUTPUTS)
                if (type == BF16) by_lanes(&m, output, x + start * inputs * 2, count, to, BF16, BF16);
                else by_lanes(&m, output, x + start * inputs * 4, count, to, F32, F32);
        }
#if HAS_BF16_TILES
        if (tiles) _tile_release();
#endif
    }
    long rest = experts ? ends[experts - 1] : 0;
    memset(y + rest * outputs * size, 0, (rows - rest) * outputs * size);
}

/* x [rows, inputs], weight [experts, outputs, inputs] and y [rows, outputs] of `type`; ends [experts]. work: for
 * tiles, room for (rows / 16 + experts) tiles of 16 rows of inputs in whole blocks of 32. */
void grouped_linear(const char *x, const char *weight, const int32_t *ends, char *y, uint16_t *work, long experts,
                    long rows, long outputs, long inputs, int tiles, int threads, int type) {
    tiles = tiles && type == BF16 && has_tiles();
    multiply(x, weight, ends, y, work, experts, rows, outputs, inputs, tiles, threads, type);
}

/* Whether AMX can be used here. */
void grouped_linear_tiles(int *found) { *found = HAS_BF16_TILES && has_tiles(); }
