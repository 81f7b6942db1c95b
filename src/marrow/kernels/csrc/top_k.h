/* What exact and filtered search share: scores of rows, and the best k of each query.
 *
 * A score is a sum in fp32 in one fixed order, however many queries, rows or threads there are: lane i adds
 * the products of columns i, i + 16, ...; the sixteen lanes are added by a tree.
 */
#ifndef TOP_K_H
#define TOP_K_H

#include <math.h>
#include <stdlib.h>

#include "lanes.h"

enum { GROUP = 4 };

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes_i32){__VA_ARGS__})
#endif

/* Lane i: a_i + a_{i+2} and b's beside it, within each 4 lanes. */
INLINE lanes add_pairs(lanes a, lanes b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}

INLINE lanes add_pairs_of_pairs(lanes a, lanes b) {
    return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

INLINE lanes add_quarters(lanes a, lanes b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

/* Lane i: the sum of the lanes of x[i]. */
INLINE lanes sums_of(const lanes x[LANES]) {
    lanes fours[4];
    for (int i = 0; i < 4; i++)
        fours[i] = add_pairs_of_pairs(add_pairs(x[4 * i], x[4 * i + 1]), add_pairs(x[4 * i + 2], x[4 * i + 3]));
    return add_quarters(add_quarters(fours[0], fours[1]), add_quarters(fours[2], fours[3]));
}

/* A bit for each lane in which a >= b. */
INLINE uint32_t at_least(lanes a, lanes b) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#else
    uint32_t bits = 0;
    lanes_i32 is = (lanes_i32)(a >= b);
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)(is[i] & 1) << i;
    return bits;
#endif
}

/* Add the products of GROUP rows with `count` queries (constant: 1 or GROUP) into sums[query][row].
 * Queries are padded with zeros to whole sixteens. */
INLINE void add_products(const void *const rows[GROUP], const float *const queries[], int count, long columns,
                         int type, lanes *sums) {
    long at = 0;
    for (; at + LANES <= columns; at += LANES)
        for (int r = 0; r < GROUP; r++) {
            lanes values = load(rows[r], at, type);
            for (int q = 0; q < count; q++) sums[q * GROUP + r] += values * load(queries[q], at, F32);
        }
    if (at < columns)
        for (int r = 0; r < GROUP; r++) {
            lanes values = load_part(rows[r], at, columns - at, type);
            for (int q = 0; q < count; q++) sums[q * GROUP + r] += values * load(queries[q], at, F32);
        }
}

/* A result. The worst of a query's k is at the root of a heap; row -1 stands for none. */
typedef struct {
    float score;
    int64_t row;
} found;

INLINE int is_worse(found a, found b) { return a.score < b.score || (a.score == b.score && a.row > b.row); }

/* Take a result if it is better than the worst of a heap. */
static void offer(found *heap, long k, float score, int64_t row) {
    found mine = {score, row};
    if (!is_worse(heap[0], mine)) return; /* nor NaN */
    long at = 0;
    for (;;) {
        long child = 2 * at + 1;
        if (child >= k) break;
        if (child + 1 < k && is_worse(heap[child + 1], heap[child])) child++;
        if (!is_worse(heap[child], mine)) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = mine;
}

static int best_first(const void *a, const void *b) {
    return is_worse(*(const found *)a, *(const found *)b) ? 1 : -1;
}

/* Merge the heaps [parts, queries, k] into sorted scores and indices [queries, k]; -1 where there is none. */
static void merge(found *heaps, int parts, long num_queries, long k, float *scores, int64_t *indices) {
    for (long q = 0; q < num_queries; q++) {
        found *heap = heaps + q * k;
        for (int part = 1; part < parts; part++)
            for (long i = 0; i < k; i++) {
                found one = heaps[(part * num_queries + q) * k + i];
                offer(heap, k, one.score, one.row);
            }
        qsort(heap, k, sizeof *heap, best_first);
        for (long i = 0; i < k; i++) {
            scores[q * k + i] = heap[i].score;
            indices[q * k + i] = heap[i].row;
        }
    }
}

static found *empty_heaps(long count) {
    found *heaps = malloc((size_t)count * sizeof *heaps);
    for (long i = 0; heaps && i < count; i++) heaps[i] = (found){-__builtin_inff(), -1};
    return heaps;
}

/* PERF: one query takes 0.94 times as long with what is a little ahead fetched early; no more in fp32. */
INLINE void fetch_ahead(const void *row, long bytes) {
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)row + at + 1536);
}

INLINE const void *row_at(const void *vectors, int64_t row, long columns, int type) {
    return (const char *)vectors + row * columns * (type == BF16 ? 2 : 4);
}

#endif
