/* The best k inner products of each query, where int8 codes say which rows can be among them.
 *
 * A row v is scale (codes - 128) + rest, a query q is step (128 high + low) + rest, with digits of eight bits.
 * |q v - estimate| <= |q| error, with the row's error as quantise_vectors() of kernels/search/top_k_int8.py
 * proves it. A row whose estimate plus that is below the worst of k scores so far cannot be among the best;
 * every other row is scored from its own numbers, so the results are those of top_k.c to the bit.
 */
#include "top_k.h"

enum { BYTES = 64, APART = 256, WAITING = 8, TOP = 16319 /* 127 * 128 + 63 */ };

typedef struct {
    const float *numbers;  /* [padded to 16], as top_k.c has it */
    int8_t *high, *low;    /* [padded to 64] */
    lanes_i32 high_start, low_start; /* minus what the codes' 128 adds */
    float step, norm;      /* norm: not below the query's own */
} query;

/* A row that may be among the best of a query; it is scored when its numbers had time to arrive. */
typedef struct {
    long which;
    int64_t row;
    float bound;
} candidate;

typedef struct {
    const query *queries;
    const uint8_t *codes;
    const float *scales, *errors;
    const void *vectors;
    const int64_t *list;
    found *heaps;
    long num_queries, columns, bytes, k, first, last, rescored;
    candidate waiting[WAITING];
    int num_waiting;
} task;

/* Lane i: sum of 4 products of codes with digits. */
INLINE lanes_i32 add_bytes(lanes_i32 sum, const uint8_t *codes, const int8_t *digits) {
#ifdef __AVX512VNNI__
    return (lanes_i32)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(codes), _mm512_loadu_si512(digits));
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) sum[i] += codes[4 * i + j] * digits[4 * i + j];
    return sum;
#endif
}

/* Split a query into digits. One that is too small, too large or not finite gets an infinite norm: then every
 * row is scored. */
static void split(query *q, long columns, long bytes) {
    double most = 0, squares = 0;
    for (long i = 0; i < columns; i++) {
        double x = fabs((double)q->numbers[i]);
        most = x > most || x != x ? x : most;
        squares += x * x;
    }
    int is_plain = most > 1e-30 && most < 1e30;
    q->step = is_plain ? (float)(most / TOP) : 0;
    q->norm = is_plain ? (float)(sqrt(squares) * (1 + 1e-6)) : __builtin_inff();
    memset(q->high, 0, bytes);
    memset(q->low, 0, bytes);
    for (long i = 0; i < columns && is_plain; i++) {
        long whole = lrint(q->numbers[i] / (double)q->step);
        whole = whole > TOP ? TOP : whole < -TOP ? -TOP : whole;
        long high = (whole + 64) >> 7;
        q->high[i] = high;
        q->low[i] = whole - 128 * high;
    }
    int32_t high_start[LANES], low_start[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        high_start[lane] = low_start[lane] = 0;
        for (long at = 4 * lane; at < bytes; at += BYTES)
            for (int j = 0; j < 4; j++) {
                high_start[lane] -= 128 * q->high[at + j];
                low_start[lane] -= 128 * q->low[at + j];
            }
    }
    memcpy(&q->high_start, high_start, sizeof high_start);
    memcpy(&q->low_start, low_start, sizeof low_start);
}

/* sums[i * stride]: lanes whose sum is the product of row i's codes with the query's digits. */
INLINE void multiply(const uint8_t *const rows[GROUP], const query *q, long bytes, lanes *sums, int stride) {
    lanes_i32 high[GROUP], low[GROUP];
    for (int r = 0; r < GROUP; r++) high[r] = q->high_start, low[r] = q->low_start;
    for (long at = 0; at < bytes; at += BYTES)
        for (int r = 0; r < GROUP; r++) {
            high[r] = add_bytes(high[r], rows[r] + at, q->high + at);
            low[r] = add_bytes(low[r], rows[r] + at, q->low + at);
        }
    for (int r = 0; r < GROUP; r++) sums[r * stride] = __builtin_convertvector(high[r] * 128 + low[r], lanes);
}

INLINE int64_t row_of(const task *t, long at) {
    at = at < t->last ? at : t->last - 1;
    return t->list ? t->list[at] : at;
}

/* What no score of a row exceeds. `tiny` for what falls below the normal numbers. */
INLINE lanes bounds_of(lanes products, lanes scales, lanes errors, const query *q) {
    const float tiny = 0x1p-100f;
    return products * (scales * q->step) + (errors * q->norm + tiny);
}

static void rescore(task *t, int type) {
    for (int i = 0; i < t->num_waiting; i++) {
        const candidate *one = t->waiting + i;
        found *heap = t->heaps + one->which * t->k;
        if (one->bound < heap->score) continue;
        const void *row_start = row_at(t->vectors, one->row, t->columns, type), *rows[GROUP];
        for (int r = 0; r < GROUP; r++) rows[r] = row_start;
        lanes sums[LANES] = {{0}};
        const float *numbers = t->queries[one->which].numbers;
        if (type == BF16) add_products(rows, &numbers, 1, t->columns, BF16, sums);
        else add_products(rows, &numbers, 1, t->columns, F32, sums);
        offer(heap, t->k, sums_of(sums)[0], one->row);
        t->rescored++;
    }
    t->num_waiting = 0;
}

/* A bit for each lane that is not surely below: also for NaN. */
INLINE uint32_t not_below(lanes bounds, float worst) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)bounds, _mm512_set1_ps(worst), _CMP_NLT_UQ);
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)!(bounds[i] < worst) << i;
    return bits;
#endif
}

/* Lane GROUP r + i belongs to row at + i + r APART. */
static __attribute__((noinline)) void take(task *t, long which, uint32_t hits, lanes bounds, long at, int type) {
    const found *worst = t->heaps + which * t->k;
    for (; hits; hits &= hits - 1) {
        int lane = __builtin_ctz(hits);
        long row = at + lane % GROUP + lane / GROUP * APART;
        if (row >= t->last || bounds[lane] < worst->score) continue;
        candidate mine = {which, row_of(t, row), bounds[lane]};
        const char *start = row_at(t->vectors, mine.row, t->columns, type);
        for (long byte = 0; byte < t->columns * (type == BF16 ? 2 : 4); byte += 64) __builtin_prefetch(start + byte);
        t->waiting[t->num_waiting++] = mine;
        if (t->num_waiting == WAITING) rescore(t, type);
    }
}

/* Four times APART rows. is_plain: all of them, in order, so that nothing must be looked up.
 * PERF: one query of 200k x 384 takes 1.1 times as long as it takes to read codes, scales and errors and do
 * nothing else; in cache it takes half of its time. APART 64 to 4096, and fetching 768 to 4608 bytes ahead, change
 * less than 4 %; rows one behind the other take 1.2 times as long. */
INLINE void search_block(task *t, long block, int is_plain, int type) {
    for (long at = block; at < block + APART && at < t->last; at += GROUP) {
        const uint8_t *rows[GROUP][GROUP];
        float scales[LANES], errors[LANES];
        for (int r = 0; r < GROUP; r++)
            for (int i = 0; i < GROUP; i++) {
                long near = at + i + r * APART;
                int64_t row = is_plain ? near : row_of(t, near);
                rows[i][r] = t->codes + row * t->bytes;
                if (is_plain) continue;
                scales[r * GROUP + i] = t->scales[row];
                errors[r * GROUP + i] = t->errors[row];
            }
        for (int r = 0; r < GROUP && is_plain; r++) {
            memcpy(scales + r * GROUP, t->scales + at + r * APART, GROUP * sizeof *scales);
            memcpy(errors + r * GROUP, t->errors + at + r * APART, GROUP * sizeof *errors);
        }
        if (t->num_queries == 1)
            for (int i = 0; i < GROUP; i++)
                for (int r = 0; r < GROUP; r++) fetch_ahead(rows[i][r], t->bytes);
        for (long which = 0; which < t->num_queries; which++) {
            const query *q = t->queries + which;
            lanes sums[LANES];
            for (int i = 0; i < GROUP; i++) multiply(rows[i], q, t->bytes, sums + i, GROUP);
            lanes bounds = bounds_of(sums_of(sums), load(scales, 0, F32), load(errors, 0, F32), q);
            uint32_t hits = not_below(bounds, t->heaps[which * t->k].score);
            if (__builtin_expect(hits != 0, 0)) take(t, which, hits, bounds, at, type);
        }
    }
}

static void search(task *t, int type) {
    for (long block = t->first; block < t->last; block += GROUP * APART)
        if (!t->list && block + GROUP * APART <= t->last) search_block(t, block, 1, type);
        else search_block(t, block, 0, type);
    rescore(t, type);
}

/* queries: fp32 [num_queries, padded to 16], codes: [rows, bytes], bytes = columns padded to 64.
 * list: num_rows rows to look at, rising, or NULL for all. rescored: how many scores were computed. */
void top_k_int8(const float *queries, const uint8_t *codes, const float *scales, const float *errors,
                const void *vectors, const int64_t *list, float *best, int64_t *indices, int64_t *rescored,
                long num_queries, long num_rows, long columns, long k, int threads, int type) {
    long padded = (columns + LANES - 1) / LANES * LANES, bytes = (columns + BYTES - 1) / BYTES * BYTES;
    found *heaps = empty_heaps(threads * num_queries * k);
    query *split_queries = aligned_alloc(64, num_queries * sizeof *split_queries);
    int8_t *digits = malloc(num_queries * 2 * bytes);
    for (long i = 0; i < num_queries; i++) {
        query *q = split_queries + i;
        q->numbers = queries + i * padded;
        q->high = digits + 2 * i * bytes;
        q->low = q->high + bytes;
        split(q, columns, bytes);
    }
    long total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int part = 0; part < threads; part++) {
        task mine = {.queries = split_queries,
                     .codes = codes,
                     .scales = scales,
                     .errors = errors,
                     .vectors = vectors,
                     .list = list,
                     .heaps = heaps + part * num_queries * k,
                     .num_queries = num_queries,
                     .columns = columns,
                     .bytes = bytes,
                     .k = k,
                     .first = num_rows * part / threads,
                     .last = num_rows * (part + 1) / threads};
        search(&mine, type);
        total += mine.rescored;
    }
    *rescored = total;
    merge(heaps, threads, num_queries, k, best, indices);
    free(digits);
    free(split_queries);
    free(heaps);
}
