/* Attention within documents, forward and backward. The reference is kernels/attention/attention.py.
 *
 * Rows of the work are queries times the heads that share a kv head, a query's heads beside each other, in tiles of
 * 16. Forward: a task is 256 of them against the keys they see, with the softmax carried along. Backward: a task is a
 * kv head of a row of the batch, 64 of them at a time against chunks of 64 keys; scores are computed anew from the
 * saved log-sum-exp, and dk and dv are summed in fp32 over all of them before they are rounded once.
 *
 * Documents meet in a tile and a chunk, where what one does not see of another has the factor 0. Rows that are not
 * finite would outlive it: they are taken out of the panels, and values and gradients are added one by one to those
 * that see them. To queries and keys that is spared: their scores are not finite, and so is all that sees them.
 */
#include "attention.h"

#define TILES 16    /* of a forward task */
#define TOGETHER 64 /* rows of a step of backward: the k of two of its products */
#define ALIGNED(size) (((size) + 63) / 64 * 64)

typedef struct {
    const char *q, *k, *v, *o, *grad;
    const float *lse;
    const int32_t *first;
    char *out, *dq, *dk, *dv;
    float *new_lse;
    long tokens, heads, kv_heads, size, padded, row_tokens, window;
    float scale, softcap;
    int threads, tiles;
} call;

INLINE long bytes_of(int type) { return type == BF16 ? 2 : 4; }

static void *take(char **from, long bytes) {
    char *found = *from;
    *from += ALIGNED(bytes);
    return found;
}

/* Where a row of the work is: its query's head in q, o and the like, in numbers. */
INLINE long place_of(const call *c, long first_query, long head, long row) {
    long group = c->heads / c->kv_heads;
    return ((first_query + row / group) * c->heads + head * group + row % group) * c->size;
}

/* What 16 rows see. Lanes that nobody has see what the last row sees. */
INLINE void look(const call *c, long first_query, long row, long rows, int32_t low[LANES], int32_t high[LANES]) {
    long group = c->heads / c->kv_heads;
    for (int lane = 0; lane < LANES; lane++) {
        long query = first_query + (row + lane < rows ? row + lane : rows - 1) / group;
        high[lane] = query;
        low[lane] = c->first[query];
        if (c->window && low[lane] < query - c->window + 1) low[lane] = query - c->window + 1;
    }
}

INLINE void find_rows(const call *c, const char *start, long first_query, long head, long row, long rows,
                      const char *from[LANES], int type) {
    for (int lane = 0; lane < LANES; lane++)
        from[lane] = row + lane < rows ? start + place_of(c, first_query, head, row + lane) * bytes_of(type) : 0;
}

/* Copy keys or values of a head, padded: they lie apart by a power of two, which falls on few places of the nearest
 * cache. */
INLINE void copy_rows(const call *c, char *to, const char *from, long first, long count, long head, int type) {
    long bytes = bytes_of(type), stride = c->padded * bytes;
    for (long i = 0; i < count; i++) {
        memcpy(to + i * stride, from + ((first + i) * c->kv_heads + head) * c->size * bytes, c->size * bytes);
        memset(to + i * stride + c->size * bytes, 0, (c->padded - c->size) * bytes);
    }
}

INLINE void four_tiles(const char *rows[4], const char *start, long stride) {
    for (int i = 0; i < 4; i++) rows[i] = start + i * LANES * stride;
}

INLINE void store_row(char *to, const float *from, float factor, long size, int type) {
    for (long at = 0; at < size; at += LANES)
        store_some(to, at, size - at, load_some(from, at, size - at, F32) * factor, type);
}

/* sums + factor x a row. */
INLINE void add_row(float *sums, float factor, const char *row, long size, int type) {
    for (long at = 0; at < size; at += LANES)
        store_some(sums, at, size - at, load_some(sums, at, size - at, F32) + factor * load_some(row, at, size - at, type),
                   F32);
}

/* sums [16][padded] += factors [64 keys][16] times the keys or values that are `wild`, where a lane sees them. */
INLINE void add_wild(const call *c, float *sums, const float *factors, const sight *seen, uint64_t wild, const char *from,
                     long first, long head, int type) {
    for (int key = 0; wild; key++, wild >>= 1)
        for (int lane = 0; lane < LANES && wild & 1; lane++)
            if (key >= seen->low[lane] && key <= seen->high[lane])
                add_row(sums + lane * c->padded, factors[key * LANES + lane],
                        from + ((first + key) * c->kv_heads + head) * c->size * bytes_of(type), c->size, type);
}

typedef struct {
    char *queries, *panel, *keys, *values;
    float *o, *most, *sum, *scores;
    int32_t *low, *high;
    uint16_t *p;
} room;

INLINE void forward_task(const call *c, const room *r, long first_query, long queries, long head, int type) {
    long group = c->heads / c->kv_heads, rows = queries * group, tiles = (rows + LANES - 1) / LANES;
    long bytes = bytes_of(type), stride = c->padded * bytes, begin = INT32_MAX;
    float scale = c->softcap != 0 ? c->scale / c->softcap : c->scale * unit_of(type);
    int32_t places[LANES];
    for (int lane = 0; lane < LANES; lane++) places[lane] = lane;
    for (long tile = 0; tile < tiles; tile++) {
        const char *from[LANES];
        find_rows(c, c->q, first_query, head, tile * LANES, rows, from, type);
        panel_of_queries(r->queries + tile * LANES * stride, from, c->size, c->padded, type);
        look(c, first_query, tile * LANES, rows, r->low + tile * LANES, r->high + tile * LANES);
        for (int lane = 0; lane < LANES; lane++) {
            r->most[tile * LANES + lane] = NEVER;
            r->sum[tile * LANES + lane] = 0;
            if (r->low[tile * LANES + lane] < begin) begin = r->low[tile * LANES + lane];
        }
    }
    int is_mixed = r->low[0] != r->low[rows - 1]; /* some do not see what others see */
    memset(r->o, 0, tiles * LANES * c->padded * 4);
    for (long first = begin; first < first_query + queries; first += KEYS) {
        long left = first_query + queries - first, count = left < KEYS ? left : KEYS;
        const char *keys[4], *values[4];
        copy_rows(c, r->keys, c->k, first, count, head, type);
        copy_rows(c, r->values, c->v, first, count, head, type);
        four_tiles(keys, r->keys, stride);
        four_tiles(values, r->values, stride);
        panel_of_values(r->panel, values, stride, count, c->padded, c->padded, 0, type);
        uint64_t wild = is_mixed ? wild_rows(r->values, stride, count, type) : 0;
        clear_rows(r->panel, wild, c->padded, type);
        for (long tile = 0; tile < tiles; tile++) {
            const int32_t *low = r->low + tile * LANES, *high = r->high + tile * LANES;
            if (high[LANES - 1] < first || low[0] >= first + count) continue; /* both only grow with the query */
            float *o = r->o + tile * LANES * c->padded;
            sight seen = sight_of(low, high, first, count);
            product_keys(r->scores, keys, stride, r->queries + tile * LANES * stride, c->padded, 0, c->tiles, 0, type);
            softmax_step(r->scores, o, r->most + tile * LANES, r->sum + tile * LANES, c->padded, LANES, scale,
                         c->softcap * unit_of(type), &seen, 0, 0, 0, type);
            if (type == BF16) {
                turn_to_bf16(r->p, r->scores, places);
                product_values(o, r->p, 2 * KEYS, 0, r->panel, c->padded, LANES, c->tiles, 0, BF16);
            } else {
                product_values(o, r->scores, LANES, 1, r->panel, c->padded, LANES, 0, 0, F32);
            }
            add_wild(c, o, r->scores, &seen, wild, c->v, first, head, type);
        }
    }
    for (long row = 0; row < rows; row++) {
        long place = place_of(c, first_query, head, row);
        store_row(c->out + place * bytes, r->o + row * c->padded, 1 / r->sum[row], c->size, type);
        long query = first_query + row / group;
        c->new_lse[(head * group + row % group) * c->tokens + query] =
            r->most[row] * (type == BF16 ? LN2 : 1) + logf(r->sum[row]);
    }
}

INLINE void forward(const call *c, int type) {
    long group = c->heads / c->kv_heads, bytes = bytes_of(type), stride = c->padded * bytes;
    long together = TILES * LANES / group > 0 ? TILES * LANES / group : 1; /* queries of a task */
    long parts = (c->row_tokens + together - 1) / together, rows = c->tokens / c->row_tokens;
    long tiles = (together * group + LANES - 1) / LANES;
#pragma omp parallel num_threads(c->threads)
    {
        long sizes[] = {tiles * LANES * stride, KEYS * stride, tiles * LANES * c->padded * 4, tiles * 64};
        char *all_room = aligned_alloc(64, sizes[0] + 3 * sizes[1] + sizes[2] + 4 * sizes[3] + KEYS * 64 + KEYS * 32);
        char *next = all_room;
        room r = {.queries = take(&next, sizes[0]), .panel = take(&next, sizes[1])};
        r.keys = take(&next, sizes[1]), r.values = take(&next, sizes[1]), r.o = take(&next, sizes[2]);
        r.most = take(&next, sizes[3]), r.sum = take(&next, sizes[3]);
        r.low = take(&next, sizes[3]), r.high = take(&next, sizes[3]);
        r.scores = take(&next, KEYS * 64), r.p = take(&next, KEYS * 32);
        memset(r.keys, 0, sizes[1]);
#if HAS_BF16_TILES
        if (c->tiles) configure_tiles(64);
#endif
#pragma omp for schedule(dynamic)
        for (long i = 0; i < rows * c->kv_heads * parts; i++) {
            /* The longest first. */
            long part = parts - 1 - i / (rows * c->kv_heads), row = i / c->kv_heads % rows, from = part * together;
            long count = c->row_tokens - from < together ? c->row_tokens - from : together;
            forward_task(c, &r, row * c->row_tokens + from, count, i % c->kv_heads, type);
        }
#if HAS_BF16_TILES
        if (c->tiles) _tile_release();
#endif
        free(all_room);
    }
}

typedef struct {
    char *keys, *values, *key_panels;     /* of all of a row */
    float *dk, *dv;                       /* [row_tokens, padded] */
    char *queries, *grads;                /* panels of four tiles, k going across */
    char *query_rows, *grad_rows;         /* panels of 64 rows, k going down */
    char *copies;                         /* 64 rows */
    float *dq, *delta, *shift, *scores, *dp;
    void *p, *ds;                         /* [64 keys][64 rows] */
    uint16_t *turned;
} backward_room;

/* p and ds of 16 rows against 64 keys, from raw scores and dp; both go to where 64 rows are collected, and ds stays in
 * place of dp besides. */
INLINE void go_back(float *scores, float *dp, const float *shift, const float *delta, char *p, char *ds, float scale,
                    float softcap, const sight *seen, int type) {
    lanes shifts = load(shift, 0, F32), deltas = load(delta, 0, F32);
    for (int key = 0; key < KEYS; key++) {
        lanes s = load(scores, key * LANES, F32) * scale, slope = all(1);
        if (softcap != 0) {
            s = tanh_of(s, F32);
            slope = 1 - s * s;
            s *= softcap;
        }
        lanes one = power_of(s - shifts, type), grad = one * (load(dp, key * LANES, F32) - deltas) * slope;
        if (seen->is_partial) { /* last: what is not seen may be NaN */
            one = where_seen(seen, key, one, 0);
            grad = where_seen(seen, key, grad, 0);
        }
        store(dp, key * LANES, grad, F32);
        store(p, key * TOGETHER, one, type);
        store(ds, key * TOGETHER, grad, type);
    }
}

/* sums [16 keys][padded] += factors [16 keys][64] times the rows of `from` that are `wild`, where they see a key. */
INLINE void add_wild_rows(const call *c, float *sums, const char *factors, const int32_t low[], const int32_t high[],
                          uint64_t wild, const char *from, long first_key, long first_token, long head, long row,
                          int type) {
    for (int i = 0; wild; i++, wild >>= 1)
        for (int key = 0; key < LANES && wild & 1; key++)
            if (first_key + key >= low[i] && first_key + key <= high[i]) {
                float factor = ((const float *)factors)[type == BF16 ? 0 : key * TOGETHER + i];
                if (type == BF16) factor = bf16_to_float(((const uint16_t *)factors)[key * TOGETHER + i]);
                add_row(sums + key * c->padded, factor, from + place_of(c, first_token, head, row + i) * bytes_of(type),
                        c->size, type);
            }
}

INLINE void backward_rows(const call *c, const backward_room *r, long first_token, long head, long row, long rows,
                          int is_mixed, int type) {
    long group = c->heads / c->kv_heads, bytes = bytes_of(type), stride = c->padded * bytes;
    long count = rows - row < TOGETHER ? rows - row : TOGETHER;
    float scale = c->softcap != 0 ? c->scale / c->softcap : c->scale * unit_of(type);
    int32_t low[TOGETHER], high[TOGETHER], places[LANES];
    for (int lane = 0; lane < LANES; lane++) places[lane] = lane;
    for (int tile = 0; tile < 4; tile++) {
        const char *from[LANES];
        look(c, first_token, row + tile * LANES, rows, low + tile * LANES, high + tile * LANES);
        find_rows(c, c->q, first_token, head, row + tile * LANES, rows, from, type);
        panel_of_queries(r->queries + tile * LANES * stride, from, c->size, c->padded, type);
        find_rows(c, c->grad, first_token, head, row + tile * LANES, rows, from, type);
        panel_of_queries(r->grads + tile * LANES * stride, from, c->size, c->padded, type);
    }
    const char *four[4];
    uint64_t wild[2] = {0};
    four_tiles(four, r->copies, stride);
    for (int which = 0; which < 2; which++) {
        const char *start = which ? c->grad : c->q;
        for (long i = 0; i < count; i++) {
            memcpy(r->copies + i * stride, start + place_of(c, first_token, head, row + i) * bytes, c->size * bytes);
            memset(r->copies + i * stride + c->size * bytes, 0, (c->padded - c->size) * bytes);
        }
        char *panel = which ? r->grad_rows : r->query_rows;
        panel_of_values(panel, four, stride, count, c->padded, c->padded, 0, type);
        if (is_mixed) wild[which] = wild_rows(r->copies, stride, count, type);
        clear_rows(panel, wild[which], c->padded, type);
    }
    for (long i = 0; i < TOGETHER; i++) {
        r->delta[i] = 0;
        r->shift[i] = -NEVER; /* nobody's row: its p is 0 */
        if (i >= count) continue;
        long place = place_of(c, first_token, head, row + i), query = first_token + (row + i) / group;
        r->shift[i] = c->lse[(head * group + (row + i) % group) * c->tokens + query] * unit_of(type);
        lanes sum = {0};
        for (long at = 0; at < c->size; at += LANES)
            sum += load_some(c->grad + place * bytes, at, c->size - at, type) *
                   load_some(c->o + place * bytes, at, c->size - at, type);
        r->delta[i] = sum_of(sum);
    }
    memset(r->dq, 0, TOGETHER * c->padded * 4);
    long last = high[TOGETHER - 1] - first_token, begin = (low[0] - first_token) / KEYS * KEYS;
    for (long first = begin; first <= last; first += KEYS) {
        long left = c->row_tokens - first, some = left < KEYS ? left : KEYS;
        const char *keys[4], *values[4];
        four_tiles(keys, r->keys + first * stride, stride);
        four_tiles(values, r->values + first * stride, stride);
        for (int tile = 0; tile < 4; tile++) {
            char *p = (char *)r->p + tile * LANES * bytes, *ds = (char *)r->ds + tile * LANES * bytes;
            float *dq = r->dq + tile * LANES * c->padded;
            sight seen = sight_of(low + tile * LANES, high + tile * LANES, first_token + first, some);
            product_keys(r->scores, keys, stride, r->queries + tile * LANES * stride, c->padded, 0, c->tiles, 0, type);
            product_keys(r->dp, values, stride, r->grads + tile * LANES * stride, c->padded, 0, c->tiles, 0, type);
            go_back(r->scores, r->dp, r->shift + tile * LANES, r->delta + tile * LANES, p, ds, scale,
                    c->softcap * unit_of(type), &seen, type);
            const char *panel = r->key_panels + first * stride;
            if (type == BF16) {
                turn_to_bf16(r->turned, r->dp, places);
                product_values(dq, r->turned, 2 * KEYS, 0, panel, c->padded, LANES, c->tiles, 0, BF16);
            } else {
                product_values(dq, r->dp, LANES, 1, panel, c->padded, LANES, 0, 0, F32);
            }
        }
        for (int tile = 0; tile < 4; tile++) {
            long at = tile * LANES, start = (first + at) * c->padded;
            const char *p = (char *)r->p + at * TOGETHER * bytes, *ds = (char *)r->ds + at * TOGETHER * bytes;
            long step = type == BF16 ? 2 * TOGETHER : 1;
            product_values(r->dv + start, p, step, TOGETHER, r->grad_rows, c->padded, LANES, c->tiles, 0, type);
            product_values(r->dk + start, ds, step, TOGETHER, r->query_rows, c->padded, LANES, c->tiles, 0, type);
            long key = first_token + first + at;
            add_wild_rows(c, r->dv + start, p, low, high, wild[1], c->grad, key, first_token, head, row, type);
        }
    }
    for (long i = 0; i < count; i++)
        store_row(c->dq + place_of(c, first_token, head, row + i) * bytes, r->dq + i * c->padded, c->scale, c->size, type);
}

INLINE void backward_task(const call *c, const backward_room *r, long first_token, long head, int type) {
    long bytes = bytes_of(type), stride = c->padded * bytes, rows = c->row_tokens * (c->heads / c->kv_heads);
    long whole = (c->row_tokens + KEYS - 1) / KEYS * KEYS;
    int is_mixed = c->window || c->first[first_token + c->row_tokens - 1] != c->first[first_token];
    copy_rows(c, r->keys, c->k, first_token, c->row_tokens, head, type);
    copy_rows(c, r->values, c->v, first_token, c->row_tokens, head, type);
    for (long first = 0; first < c->row_tokens; first += KEYS) {
        const char *keys[4];
        long left = c->row_tokens - first, count = left < KEYS ? left : KEYS;
        four_tiles(keys, r->keys + first * stride, stride);
        panel_of_values(r->key_panels + first * stride, keys, stride, count, c->padded, c->padded, 0, type);
        uint64_t wild = is_mixed ? wild_rows(keys[0], stride, count, type) : 0;
        clear_rows(r->key_panels + first * stride, wild, c->padded, type);
    }
    memset(r->dk, 0, whole * c->padded * 4);
    memset(r->dv, 0, whole * c->padded * 4);
    for (long row = 0; row < rows; row += TOGETHER)
        backward_rows(c, r, first_token, head, row, rows, is_mixed, type);
    for (long i = 0; i < c->row_tokens; i++) {
        long place = ((first_token + i) * c->kv_heads + head) * c->size * bytes;
        store_row(c->dk + place, r->dk + i * c->padded, c->scale, c->size, type);
        store_row(c->dv + place, r->dv + i * c->padded, 1, c->size, type);
    }
}

INLINE void backward(const call *c, int type) {
    long stride = c->padded * bytes_of(type), whole = (c->row_tokens + KEYS - 1) / KEYS * KEYS;
    long tasks = c->tokens / c->row_tokens * c->kv_heads;
#pragma omp parallel num_threads(c->threads)
    {
        long sizes[] = {whole * stride, whole * c->padded * 4, TOGETHER * stride, TOGETHER * c->padded * 4};
        char *all_room = aligned_alloc(64, 3 * sizes[0] + 2 * sizes[1] + 5 * sizes[2] + sizes[3] + 2 * TOGETHER * 4 +
                                               2 * KEYS * 64 + 2 * KEYS * TOGETHER * 4 + KEYS * 32);
        char *next = all_room;
        backward_room r = {.keys = take(&next, sizes[0]), .values = take(&next, sizes[0])};
        r.key_panels = take(&next, sizes[0]), r.dk = take(&next, sizes[1]), r.dv = take(&next, sizes[1]);
        r.queries = take(&next, sizes[2]), r.grads = take(&next, sizes[2]), r.query_rows = take(&next, sizes[2]);
        r.grad_rows = take(&next, sizes[2]), r.copies = take(&next, sizes[2]), r.dq = take(&next, sizes[3]);
        r.delta = take(&next, TOGETHER * 4), r.shift = take(&next, TOGETHER * 4);
        r.scores = take(&next, KEYS * 64), r.dp = take(&next, KEYS * 64);
        r.p = take(&next, KEYS * TOGETHER * 4), r.ds = take(&next, KEYS * TOGETHER * 4), r.turned = take(&next, KEYS * 32);
        memset(r.keys, 0, 2 * sizes[0]); /* what is behind a row's end is read, and masked */
        memset(r.copies, 0, sizes[2]);
#if HAS_BF16_TILES
        if (c->tiles) configure_tiles(64);
#endif
#pragma omp for schedule(dynamic)
        for (long i = 0; i < tasks; i++)
            backward_task(c, &r, i / c->kv_heads * c->row_tokens, i % c->kv_heads, type);
#if HAS_BF16_TILES
        if (c->tiles) _tile_release();
#endif
        free(all_room);
    }
}

void attention_forward(const void *q, const void *k, const void *v, const int32_t *first, void *o, float *lse,
                       long tokens, long heads, long kv_heads, long size, long row_tokens, long window, float scale,
                       float softcap, int threads, int type) {
    call c = {.q = q, .k = k, .v = v, .first = first, .out = o, .new_lse = lse, .tokens = tokens, .heads = heads};
    c.kv_heads = kv_heads, c.size = size, c.padded = (size + 31) / 32 * 32, c.row_tokens = row_tokens;
    c.window = window, c.scale = scale, c.softcap = softcap, c.threads = threads;
    c.tiles = type == BF16 && HAS_BF16_TILES && has_tiles();
    if (type == BF16) forward(&c, BF16);
    else forward(&c, F32);
}

void attention_backward(const void *grad, const void *q, const void *k, const void *v, const void *o, const float *lse,
                        const int32_t *first, void *dq, void *dk, void *dv, long tokens, long heads, long kv_heads,
                        long size, long row_tokens, long window, float scale, float softcap, int threads, int type) {
    call c = {.q = q, .k = k, .v = v, .o = o, .grad = grad, .lse = lse, .first = first, .dq = dq, .dk = dk, .dv = dv};
    c.tokens = tokens, c.heads = heads, c.kv_heads = kv_heads, c.size = size, c.padded = (size + 31) / 32 * 32;
    c.row_tokens = row_tokens, c.window = window, c.scale = scale, c.softcap = softcap, c.threads = threads;
    c.tiles = type == BF16 && HAS_BF16_TILES && has_tiles();
    if (type == BF16) backward(&c, BF16);
    else backward(&c, F32);
}
