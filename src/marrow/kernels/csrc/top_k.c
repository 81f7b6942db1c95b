/* The best k inner products of each query. The reference is kernels/search/top_k.py. */
#include "top_k.h"

enum { BLOCK_ROWS = 128, BLOCK_QUERIES = 16, APART = 256 };

/* What a thread works on: rows first to last of the list (all rows where it is NULL). */
typedef struct {
    const float *queries; /* [num_queries, padded columns] */
    const void *vectors;
    const int64_t *list;
    found *heaps;     /* [num_queries, k] */
    float *worst;     /* [num_queries rounded up to GROUP, GROUP]: the worst score of each, four times */
    long num_queries, columns, padded, k, first, last;
} task;

INLINE int64_t row_of(const task *t, long at) {
    at = at < t->last ? at : t->last - 1;
    return t->list ? t->list[at] : at;
}

/* One query, bound by memory: rows from four places at once, each place read in order.
 * PERF: neighbouring rows side by side take 1.1 (fp32) to 1.6 times (bf16) as long: prefetchers lose track.
 * PERF: 200k x 384 in fp32 takes 1.05 times as long as it takes to read those bytes from eight places and do
 * nothing else (1.12 times in large pages); places wider apart and reads fetched early change less than 2 %.
 * faiss's flat index takes 1.16 to 1.26 times that long where memory is quiet: 1.5 times its speed is beyond
 * the memory there. */
INLINE void search_one(const task *t, int type) {
    for (long block = t->first; block < t->last; block += GROUP * APART)
        for (long at = block; at < block + APART; at += GROUP) {
            lanes sums[LANES] = {{0}};
            for (int i = 0; i < GROUP; i++) {
                const void *rows[GROUP];
                for (int r = 0; r < GROUP; r++) {
                    rows[r] = row_at(t->vectors, row_of(t, at + i + r * APART), t->columns, type);
                    if (type == BF16) fetch_ahead(rows[r], 2 * t->columns);
                }
                add_products(rows, &t->queries, 1, t->columns, type, sums + i * GROUP);
            }
            lanes scores = sums_of(sums);
            for (uint32_t hits = at_least(scores, all(t->heaps[0].score)); hits; hits &= hits - 1) {
                int lane = __builtin_ctz(hits);
                long row = at + lane / GROUP + lane % GROUP * APART;
                if (row < t->last) offer(t->heaps, t->k, scores[lane], row_of(t, row));
            }
        }
}

static void take(const task *t, uint32_t hits, const float *scores, long query, long at) {
    for (; hits; hits &= hits - 1) {
        int lane = __builtin_ctz(hits);
        long q = query + lane / GROUP, row = at + lane % GROUP;
        if (q >= t->num_queries || row >= t->last) continue;
        found *heap = t->heaps + q * t->k;
        offer(heap, t->k, scores[lane], row_of(t, row));
        for (int i = 0; i < GROUP; i++) t->worst[q * GROUP + i] = heap[0].score;
    }
}

/* Many queries: blocks of rows stay in the second cache, blocks of queries in the first. */
INLINE void search_many(const task *t, int type) {
    for (long block = t->first; block < t->last; block += BLOCK_ROWS) {
        long end = block + BLOCK_ROWS < t->last ? block + BLOCK_ROWS : t->last;
        for (long some = 0; some < t->num_queries; some += BLOCK_QUERIES) {
            long until = some + BLOCK_QUERIES < t->num_queries ? some + BLOCK_QUERIES : t->num_queries;
            for (long at = block; at < end; at += GROUP) {
                const void *rows[GROUP];
                for (int r = 0; r < GROUP; r++) rows[r] = row_at(t->vectors, row_of(t, at + r), t->columns, type);
                for (long query = some; query < until; query += GROUP) {
                    const float *queries[GROUP];
                    for (int q = 0; q < GROUP; q++) {
                        long inside = query + q < t->num_queries ? query + q : t->num_queries - 1;
                        queries[q] = t->queries + inside * t->padded;
                    }
                    lanes sums[LANES] = {{0}};
                    add_products(rows, queries, GROUP, t->columns, type, sums);
                    lanes scores = sums_of(sums);
                    uint32_t hits = at_least(scores, load(t->worst, query * GROUP, F32));
                    if (__builtin_expect(hits != 0, 0)) {
                        float each[LANES];
                        store(each, 0, scores, F32);
                        take(t, hits, each, query, at);
                    }
                }
            }
        }
    }
}

/* queries: fp32 [num_queries, padded], padded with zeros to whole sixteens. list: num_rows rows to
 * look at, rising, or NULL for all. Results are sorted, best first, equal scores by row; -1 and -inf behind. */
void top_k(const float *queries, const void *vectors, const int64_t *list, float *scores, int64_t *indices,
           long num_queries, long num_rows, long columns, long k, int threads, int type) {
    long padded = (columns + LANES - 1) / LANES * LANES, room = (num_queries + GROUP - 1) / GROUP * GROUP * GROUP;
    found *heaps = empty_heaps(threads * num_queries * k);
    float *worst = malloc(threads * room * sizeof *worst);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        for (long i = 0; i < room; i++) worst[part * room + i] = -__builtin_inff();
        task mine = {.queries = queries,
                     .vectors = vectors,
                     .list = list,
                     .heaps = heaps + part * num_queries * k,
                     .worst = worst + part * room,
                     .num_queries = num_queries,
                     .columns = columns,
                     .padded = padded,
                     .k = k,
                     .first = num_rows * part / threads,
                     .last = num_rows * (part + 1) / threads};
        if (mine.first == mine.last) continue;
        if (num_queries == 1 && type == BF16) search_one(&mine, BF16);
        else if (num_queries == 1) search_one(&mine, F32);
        else if (type == BF16) search_many(&mine, BF16);
        else search_many(&mine, F32);
    }
    merge(heaps, threads, num_queries, k, scores, indices);
    free(worst);
    free(heaps);
}
