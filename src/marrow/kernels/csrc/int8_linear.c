/* y = x W^T with 8-bit weights, one scale an output, and 8-bit activations, one scale a row. The reference is
 * kernels/matmul/int8_linear.py. Sums are exact integers in 32 bits (up to 2^16 inputs).
 *
 * Weights stay as they are: int8 [outputs, inputs]. For one or a few rows, lanes run along the inputs. For
 * more, 16 outputs are a tile as they lie in memory, and x is put into dwords of 4 inputs by 16 rows: the
 * tile product is then y^T.
 */
#include "linear.h"

/* Outputs ahead, into the second cache: rows are often 4096 bytes, and each begins a new page to a prefetcher.
 * PERF: 4 rows of x against 11008 x 4096 weights take 0.70 of the time that one output ahead takes where the
 * third cache holds the weights, 0.86 where memory does. */
#define NEXT_LANES 8
#define NEXT_TILES 16
#define FEW 4 /* rows for which VNNI beats tiles */

typedef struct {
    const int8_t *weight;   /* [outputs, inputs] */
    const float *scales;    /* [outputs] */
    int8_t *x;              /* [rows, inputs], or tiles, see `place` */
    float *x_scales;        /* [rows] */
    int32_t *x_sums;        /* [rows] */
    void *y;                /* [rows, outputs] */
    long rows, outputs, inputs;
    int type;
} problem;

/* Where 4 inputs of a row go: dwords of 16 rows follow each other. */
INLINE int8_t *place(const problem *p, long row, long at) {
    return p->x + row / 16 * 16 * p->inputs + at * 16 + row % 16 * 4;
}

/* One row to 8-bit integers, the nearest of amax/127 steps. A row that is not finite becomes NaN by its
 * scale. */
INLINE void quantise(const problem *p, const void *x, long row, int tiles, int type) {
    const void *from = (const char *)x + row * p->inputs * (type == BF16 ? 2 : 4);
    long whole = p->inputs / LANES * LANES, rest = p->inputs - whole;
    lanes most = {0}, odd = {0};
    for (long at = 0; at < p->inputs; at += LANES) {
        lanes some = at < whole ? load(from, at, type) : load_part(from, at, rest, type);
        most = larger((lanes)((lanes_i32)some & 0x7FFFFFFF), most);
        odd += some - some; /* NaN for infinity and NaN */
    }
    float amax = largest_of(most), bad = sum_of(odd), inverse = amax > 0 ? 127.0f / amax : 0.0f;
    lanes_i32 sum = {0};
    for (long at = 0; at < p->inputs; at += LANES) {
        lanes some = at < whole ? load(from, at, type) : load_part(from, at, rest, type);
        lanes_i32 rounded = round_off(some * inverse);
        if (bad != bad) rounded = (lanes_i32){0};
        sum += rounded;
        few_signed few = __builtin_convertvector(rounded, few_signed);
        if (tiles)
            for (int i = 0; i < 4; i++) memcpy(place(p, row, at + 4 * i), (char *)&few + 4 * i, 4);
        else memcpy(p->x + row * p->inputs + at, &few, at < whole ? LANES : rest);
    }
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    p->x_scales[row] = amax / 127.0f + bad;
    p->x_sums[row] = total;
}

INLINE void put(const problem *p, long row, long output, float value) {
    long at = row * p->outputs + output;
    if (p->type == BF16) {
        lanes_u16 half = narrow(all(value));
        ((uint16_t *)p->y)[at] = half[0];
    } else {
        ((float *)p->y)[at] = value;
    }
}

/* `outputs` (a constant) outputs from `first` on of `count` (another) rows. VNNI multiplies unsigned by signed
 * bytes: weights become unsigned by adding 128, and 128 times the sum of x is taken away. */
INLINE void few_rows(const problem *p, long first, const int outputs, long row, const int count) {
    const int8_t *weight = p->weight + first * p->inputs, *x = p->x + row * p->inputs;
    int32_t exact[4][FEW] = {{0}};
    long whole = 0;
#ifdef __AVX512VNNI__
    lanes_i32 sums[4][FEW] = {{{0}}};
    for (; whole + 64 <= p->inputs; whole += 64) {
#pragma GCC unroll 4
        for (int i = 0; i < outputs; i++) {
            __builtin_prefetch(weight + (i + NEXT_LANES) * p->inputs + whole, 0, 2);
            bytes some = load_bytes(weight + i * p->inputs + whole) ^ 128;
#pragma GCC unroll 4
            for (int j = 0; j < count; j++)
                sums[i][j] = (lanes_i32)_mm512_dpbusd_epi32((__m512i)sums[i][j], (__m512i)some,
                                                            (__m512i)load_bytes(x + j * p->inputs + whole));
        }
    }
    for (int i = 0; i < outputs; i++)
        for (int j = 0; j < count; j++)
            exact[i][j] = _mm512_reduce_add_epi32((__m512i)sums[i][j]) - 128 * p->x_sums[row + j];
#else
    for (int j = 0; j < count; j++)
        for (int i = 0; i < outputs; i++) exact[i][j] = -128 * p->x_sums[row + j];
#endif
    for (int i = 0; i < outputs; i++)
        for (int j = 0; j < count; j++) {
            const int8_t *a = weight + i * p->inputs, *b = x + j * p->inputs;
            int32_t sum = exact[i][j];
            for (long k = whole; k < p->inputs; k++) sum += (a[k] + 128) * b[k];
            put(p, row + j, first + i, (float)sum * (p->scales[first + i] * p->x_scales[row + j]));
        }
}

static void exact_lanes(const problem *p, long first, int outputs) {
    for (long row = 0; row < p->rows;) {
        long left = p->rows - row;
        if (outputs == 4) {
            if (left >= 4) few_rows(p, first, 4, row, 4);
            else if (left == 3) few_rows(p, first, 4, row, 3);
            else if (left == 2) few_rows(p, first, 4, row, 2);
            else few_rows(p, first, 4, row, 1);
            row += 4;
        } else {
            for (int i = 0; i < outputs; i++) few_rows(p, first + i, 1, row, 1);
            row++;
        }
    }
}

#if HAS_AMX
/* 16 outputs of up to four tiles of rows. */
INLINE void four_tiles(const problem *p, long output, long row, const int tiles) {
    const int8_t *weight = p->weight + output * p->inputs;
    _tile_zero(0);
    if (tiles > 1) _tile_zero(1);
    if (tiles > 2) _tile_zero(2);
    if (tiles > 3) _tile_zero(3);
    for (long at = 0; at < p->inputs; at += 64) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) __builtin_prefetch(weight + (i + NEXT_TILES) * p->inputs + at, 0, 2);
        _tile_loadd(4, weight + at, p->inputs);
        _tile_loadd(6, place(p, row, at), 64);
        _tile_dpbssd(0, 4, 6);
        if (tiles > 1) {
            _tile_loadd(7, place(p, row + 16, at), 64);
            _tile_dpbssd(1, 4, 7);
        }
        if (tiles > 2) {
            _tile_loadd(6, place(p, row + 32, at), 64);
            _tile_dpbssd(2, 4, 6);
        }
        if (tiles > 3) {
            _tile_loadd(7, place(p, row + 48, at), 64);
            _tile_dpbssd(3, 4, 7);
        }
    }
    lanes_i32 exact[4][16]; /* [tile, output] of 16 rows, then [tile, row] of 16 outputs */
    _tile_stored(0, exact[0], 64);
    if (tiles > 1) _tile_stored(1, exact[1], 64);
    if (tiles > 2) _tile_stored(2, exact[2], 64);
    if (tiles > 3) _tile_stored(3, exact[3], 64);
    lanes scale;
    memcpy(&scale, p->scales + output, sizeof scale);
    for (int tile = 0; tile < tiles; tile++) {
        transpose(exact[tile]);
        for (int i = 0; i < 16 && row + 16 * tile + i < p->rows; i++) {
            long to = row + 16 * tile + i;
            lanes y = to_float(exact[tile][i]) * (scale * p->x_scales[to]);
            store(p->y, to * p->outputs + output, y, p->type);
        }
    }
}

static void exact_tiles(const problem *p, long output) {
    for (long row = 0; row < p->rows; row += 64) {
        long left = (p->rows - row + 15) / 16;
        if (left >= 4) four_tiles(p, output, row, 4);
        else if (left == 3) four_tiles(p, output, row, 3);
        else if (left == 2) four_tiles(p, output, row, 2);
        else four_tiles(p, output, row, 1);
    }
}
#endif

/* x [rows, inputs] fp32 or bf16, y [rows, outputs] alike. work: room for padded rows x inputs bytes, then twice
 * padded rows of 4 bytes. tiles: whether AMX may be used. */
void int8_linear(const void *x, const int8_t *weight, const float *scales, void *y, int8_t *work, long rows,
                 long outputs, long inputs, int tiles, int threads, int type) {
    long padded = (rows + 15) / 16 * 16;
    float *x_scales = (float *)(work + padded * inputs);
    problem p = {weight, scales, work, x_scales, (int32_t *)(x_scales + padded), y, rows, outputs, inputs, type};
    tiles = tiles && rows > FEW && inputs % 64 == 0 && outputs % 16 == 0 && has_tiles();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) {
            if (type == BF16) quantise(&p, x, row, tiles, BF16);
            else quantise(&p, x, row, tiles, F32);
        }
#if HAS_AMX
        if (tiles) {
            configure_tiles(64);
#pragma omp for schedule(static)
            for (long output = 0; output < outputs; output += 16) exact_tiles(&p, output);
            _tile_release();
        } else
#endif
        {
#pragma omp for schedule(static)
            for (long output = 0; output < outputs; output += 4)
                exact_lanes(&p, output, outputs - output < 4 ? outputs - output : 4);
        }
    }
}

/* Rows as they are (W8A16). x [rows, inputs] and y [rows, outputs], fp32 or bf16, by lanes. */
void int8_linear_lanes(const char *x, const char *weight, const float *scales, char *y, long rows, long outputs,
                       long inputs, int threads, int type) {
    matrix m = {weight, scales, outputs, inputs, INT8};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long output = 0; output < outputs; output += LANE_OUTPUTS)
        if (type == BF16) by_lanes(&m, output, x, rows, y, BF16, INT8);
        else by_lanes(&m, output, x, rows, y, F32, INT8);
}

/* Rows as they are, bf16, by AMX. work: rows in tiles, see `linear_tiles`. */
void int8_linear_tiles(const uint16_t *x, const char *weight, const float *scales, char *y, uint16_t *work, long rows,
                       long outputs, long inputs, int threads) {
    linear_tiles(x, &(matrix){weight, scales, outputs, inputs, INT8}, y, work, rows, threads, INT8);
}
