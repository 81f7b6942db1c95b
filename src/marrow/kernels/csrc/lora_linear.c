/* y = (base + s (x A^T) B^T) gain, each row with its own adapter. The reference is kernels/matmul/lora_linear.py.
 *
 * Rows are put in the order of their adapters, without being moved: `order` says which they are. An adapter's A
 * meets up to ROWS of its rows at a time. B, of few columns, is turned in registers, 16 outputs at a time: by
 * AMX its product with all rows of the adapter, else lanes of outputs, scaled and added to base.
 */
#include "linear.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define ROWS 32
#define FEW 2 /* rows of an adapter for which lanes beat tiles */
#define EXPANDED 128 /* rows whose pages of base and y are held while all outputs pass by */
#define MOST_RANK 512

typedef struct {
    const char *base, *x, *a, *b; /* [rows, outputs], [rows, inputs], [count, rank, inputs], [count, outputs, rank] */
    const float *scales, *gains;  /* [count]; [count, outputs], or NULL */
    const int32_t *order;         /* rows, sorted by adapter */
    char *y, *low;                /* [rows, outputs]; x A^T [rows, rank] */
    char *sorted;                 /* low in that order, and for tiles in whole blocks of 32 */
    long outputs, inputs, rank;
} problem;

/* x A^T of up to ROWS rows of an adapter. some: room for ROWS rows of fp32, in whole blocks of 32 inputs. */
INLINE void shrink(const problem *p, long adapter, long first, long rows, char *some, int tiles, int type) {
    long size = bytes_of(type);
    matrix m = {p->a + adapter * p->rank * p->inputs * size, 0, p->rank, p->inputs, type};
    char *to = p->sorted + first * p->rank * size;
#if HAS_BF16_TILES
    if (type == BF16 && tiles && rows > FEW) {
        for (long row = 0; row < rows; row += 16)
            pack_tile((const uint16_t *)p->x, p->order + first + row, least(16, rows - row), p->inputs,
                      (uint16_t *)some + row * blocks_of(p->inputs) * PAIRS);
        for (long r = 0; r < p->rank; r += PANELS) by_tiles(&m, r, (uint16_t *)some, rows, to, BF16, BF16);
        return;
    }
#endif
    for (long row = 0; row < rows; row++)
        memcpy(some + row * p->inputs * size, p->x + p->order[first + row] * p->inputs * size, p->inputs * size);
    for (long r = 0; r < p->rank; r += LANE_OUTPUTS) by_lanes(&m, r, some, rows, to, type, type);
}

/* (base + scale sum) gain for 16 outputs, or what is left, of a row. */
INLINE void finish(const problem *p, long adapter, long row, long output, lanes sum, int type) {
    long at = row * p->outputs + output, left = p->outputs - output;
    lanes y = load_some(p->base, at, left, type) + sum * p->scales[adapter];
    if (p->gains) y *= load_some(p->gains, adapter * p->outputs + output, left, F32);
    store_some(p->y, at, left, y, type);
}

/* 16 outputs from `output` on, or what is left, of an adapter's rows; by lanes. */
INLINE void expand(const problem *p, long adapter, long output, long first, long rows, int type) {
    lanes_i32 up[MOST_RANK]; /* the bits of 16 outputs each */
    long left = least(LANES, p->outputs - output), begin = (adapter * p->outputs + output) * p->rank;
    for (long r = 0; r < p->rank; r += LANES) {
        for (long i = 0; i < LANES; i++)
            up[r + i] = (lanes_i32)(i < left ? load_some(p->b, begin + i * p->rank + r, p->rank - r, type) : all(0));
        transpose(up + r);
    }
    for (long row = first; row < first + rows; row++) {
        const char *low = p->sorted + row * p->rank * bytes_of(type);
        lanes sum = all(0);
        for (long r = 0; r < p->rank; r++)
            sum += (lanes)up[r] * (type == BF16 ? bf16_to_float(((const uint16_t *)low)[r]) : ((const float *)low)[r]);
        finish(p, adapter, p->order[row], output, sum, type);
    }
}

#if HAS_BF16_TILES
/* The same for PANELS outputs, by tiles. low: [rows, whole blocks of 32] in the order of adapters, 0 behind the rank. */
static void expand_by_tiles(const problem *p, const uint16_t *low, long adapter, long output, long first, long rows) {
    uint16_t up[2][MOST_RANK / PAIRS][TILE] __attribute__((aligned(64)));
    lanes sums[2][16];
    long blocks = blocks_of(p->rank), panels = tiles_of(least(PANELS, p->outputs - output));
    for (long panel = 0; panel < panels; panel++) {
        long at = output + 16 * panel;
        pack_tile((const uint16_t *)p->b + (adapter * p->outputs + at) * p->rank, 0, least(16, p->outputs - at),
                  p->rank, up[panel][0]);
    }
    for (long row = 0; row < rows; row += 16) {
        const uint16_t *from = low + (first + row) * blocks * PAIRS;
        _tile_zero(0);
        _tile_zero(1);
        for (long block = 0; block < blocks; block++) {
            _tile_loadd(4, from + block * PAIRS, blocks * PAIRS * 2);
            _tile_loadd(6, up[0][block], 64);
            _tile_dpbf16ps(0, 4, 6);
            if (panels == 1) continue;
            _tile_loadd(7, up[1][block], 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        for (long i = 0; i < least(16, rows - row); i++) {
            long own = p->order[first + row + i];
            finish(p, adapter, own, output, sums[0][i], BF16);
            if (panels > 1) finish(p, adapter, own, output + 16, sums[1][i], BF16);
        }
    }
}
#endif

/* The next thread's memory, in whole blocks of 32 inputs. */
INLINE char *own_part(char *work, long inputs) {
#ifdef _OPENMP
    return work + omp_get_thread_num() * ROWS * blocks_of(inputs) * PAIRS * 4;
#else
    return work;
#endif
}

/* Rows in the order of their adapters, those without one last. ends: where each adapter's end. */
static void sort_rows(const int32_t *adapters, long rows, long count, int32_t *order, int32_t *ends) {
    memset(ends, 0, count * sizeof *ends);
    if (!adapters) ends[0] = rows;
    else
        for (long row = 0; row < rows; row++)
            if (adapters[row] >= 0) ends[adapters[row]]++;
    int32_t start = 0;
    for (long e = 0; e < count; e++) {
        int32_t some = ends[e];
        ends[e] = start; /* it grows to the end below */
        start += some;
    }
    for (long row = 0; row < rows; row++) {
        long adapter = adapters ? adapters[row] : 0;
        order[adapter < 0 ? start++ : ends[adapter]++] = row;
    }
}

/* All of `type`; numbers: room for rows + count integers. work: for each thread ROWS rows of fp32, in whole blocks of
 * 32 inputs; sorted: rows of low, then, for tiles, rows + 16 of it in whole blocks of 32. rank: up to MOST_RANK. */
void lora_linear(const char *base, const char *x, const char *a, const char *b, const float *scales,
                 const int32_t *adapters, const float *gains, char *y, char *low, int32_t *numbers, char *work,
                 char *sorted, long rows, long count, long outputs, long inputs, long rank, int tiles, int threads,
                 int type) {
    int32_t *ends = numbers + rows;
    problem p = {base, x, a, b, scales, gains, numbers, y, low, sorted, outputs, inputs, rank};
    long size = bytes_of(type), blocks = blocks_of(rank);
    uint16_t *whole = (uint16_t *)(sorted + rows * rank * size);
    sort_rows(adapters, rows, count, numbers, ends);
    long last = ends[count - 1];
    tiles = tiles && HAS_BF16_TILES && type == BF16 && has_tiles();
#pragma omp parallel num_threads(threads)
    {
        char *some = own_part(work, inputs);
#if HAS_BF16_TILES
        if (tiles) configure_tiles(64);
#endif
        for (long e = 0; e < count; e++) {
            long start = e ? ends[e - 1] : 0, end = ends[e];
            if (start == end) continue;
#pragma omp for schedule(static) nowait
            for (long row = start; row < end; row += ROWS)
                if (type == BF16) shrink(&p, e, row, least(ROWS, end - row), some, tiles, BF16);
                else shrink(&p, e, row, least(ROWS, end - row), some, 0, F32);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            long own = numbers[row];
            if (row >= last) {
                memset(low + own * rank * size, 0, rank * size);
                memcpy(y + own * outputs * size, base + own * outputs * size, outputs * size);
                continue;
            }
            memcpy(low + own * rank * size, sorted + row * rank * size, rank * size);
            if (!tiles) continue;
            memset(whole + row * blocks * PAIRS, 0, blocks * PAIRS * 2);
            memcpy(whole + row * blocks * PAIRS, sorted + row * rank * 2, rank * 2);
        }
        for (long e = 0; e < count; e++) {
            long start = e ? ends[e - 1] : 0, end = ends[e];
            for (long row = start; row < end; row += EXPANDED) {
                long some_rows = least(EXPANDED, end - row);
#pragma omp for schedule(static) nowait
                for (long output = 0; output < outputs; output += PANELS) {
#if HAS_BF16_TILES
                    if (tiles) {
                        expand_by_tiles(&p, whole, e, output, row, some_rows);
                        continue;
                    }
#endif
                    for (long at = output; at < least(outputs, output + PANELS); at += LANES)
                        if (type == BF16) expand(&p, e, at, row, some_rows, BF16);
                        else expand(&p, e, at, row, some_rows, F32);
                }
            }
        }
#if HAS_BF16_TILES
        if (tiles) _tile_release();
#endif
    }
}
