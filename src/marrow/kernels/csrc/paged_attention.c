/* Attention over keys and values kept in blocks. The reference is kernels/attention/paged_attention.py.
 *
 * A task is a sequence's queries, or 128 of them, against its keys, or a split of those. Where a kv head has 8
 * queries at most (decoding) a task takes all heads, chunk of keys by chunk, so that memory is read as it lies:
 * once, whatever the group. Splits depend on the sequences alone, never on the number of threads.
 */
#include "attention.h"

#define TILES 8 /* of 16 queries, in a task of one kv head */
#define P_ROWS (LANES * (2 * LANES + 1))
#define ALIGNED(size) (((size) + 63) / 64 * 64)

enum { SAME = 0, INT8 = 1, E4M3 = 2 }; /* of the cache */

typedef struct {
    const char *q, *keys, *values;
    const float *key_scales, *value_scales;
    const int32_t *blocks, *starts, *ends;
    char *o;
    long sequences, list, block, heads, kv_heads, size, window, split;
    float scale, softcap;
    int threads, tiles;
    const uint8_t *tables; /* of the bytes of a code's magnitude in bf16: 128 low ones, 128 high ones */
} call;

typedef struct {
    long sequence, first_row, rows, head, heads; /* rows of queries x group, of each of some kv heads */
    long first_key, end_key;
    float *partial; /* where the sequence is split, else null */
} task;

typedef struct {
    char *panels; /* of queries: a tile each */
    float *o, *most, *sum;
    int32_t *low, *high;
    float *scores, *key_scales, *value_scales;
    uint16_t *p;
    char *panel, *key_rows, *value_rows;
} room;

INLINE int bytes_of(int type) { return type == BF16 ? 2 : 4; }

INLINE lanes load_code(const char *from, int kv) {
    typedef uint8_t sixteen __attribute__((vector_size(16), unused));
    typedef int8_t signed_sixteen __attribute__((vector_size(16), unused));
    if (kv == INT8) {
#ifdef __AVX512F__
        return (lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#endif
        signed_sixteen x;
        memcpy(&x, from, 16);
        return to_float(__builtin_convertvector(x, lanes_i32));
    }
#ifdef __AVX2__
    lanes_u16 code = (lanes_u16)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from));
#else
    sixteen x;
    memcpy(&x, from, 16);
    lanes_u16 code = __builtin_convertvector(x, lanes_u16);
#endif
    lanes_u16 half = (code & 0x7F) << 7 | (code & 0x80) << 8; /* an fp16 that is 256 times too small */
#ifdef __AVX512F__
    return (lanes)_mm512_cvtph_ps((__m256i)half) * 256.0f;
#else
    return load_half((const uint16_t *)&half) * 256.0f;
#endif
}

#ifdef __AVX512VBMI__
#define HAS_BYTE_TABLES 1

static void fill_tables(uint8_t tables[256], int kv) {
    for (int code = 0; code < 128; code++) {
        float x = kv == INT8 ? code : code < 8 ? code / 512.0f : ldexpf(8 + code % 8, code / 8 - 10);
        if (kv == E4M3 && code == 127) x = __builtin_nanf("");
        uint32_t bits;
        memcpy(&bits, &x, 4);
        tables[code] = bits >> 16, tables[128 + code] = bits >> 24;
    }
}

typedef struct {
    __m512i low, high;
} halves;

/* The low and the high bytes of 64 codes in bf16. PERF: through fp32 decoding in cache takes 1.8x
 * (int8) and 3.0x (e4m3). */
INLINE halves look_up(__m512i codes, const uint8_t *tables, int kv) {
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512i size = kv == INT8 ? _mm512_abs_epi8(codes) : codes; /* the tables take seven bits of it */
    __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(tables), size, _mm512_load_si512(tables + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(tables + 128), size, _mm512_load_si512(tables + 192));
    high = _mm512_ternarylogic_epi64(high, codes, sign, 0xF8); /* high | codes & sign */
    if (kv == INT8) high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(size), _mm512_set1_epi8((char)0xC3)); /* -128 */
    return (halves){low, high};
}

INLINE void widen_codes(char *to, const char *from, const uint8_t *tables, int kv) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); /* undone by the two halves of unpacking */
    halves x = look_up(_mm512_permutexvar_epi64(order, _mm512_loadu_si512(from)), tables, kv);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi8(x.low, x.high));
    _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi8(x.low, x.high));
}

/* panel_of_values in bf16 from `count` rows of codes, at rows[i / 16] + i % 16 * stride. size: a multiple of 64. */
INLINE void panel_of_codes(char *panel, const char *const rows[4], long stride, long count, long size,
                           const uint8_t *tables, stream *next, int kv) {
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (long row = 0; row < KEYS; row += 2) {
        const char *even = rows[row / LANES] + row % LANES * stride;
        char *to = panel + row / 32 * (size / 16) * 1024 + row % 32 / 2 * 64;
        for (long at = 0; at < size; at += 64, to += 4096) {
            __m512i a = row < count ? _mm512_loadu_si512(even + at) : _mm512_setzero_si512();
            __m512i b = row + 1 < count ? _mm512_loadu_si512(even + stride + at) : _mm512_setzero_si512();
            halves x = look_up(_mm512_permutexvar_epi32(order, a), tables, kv);
            halves y = look_up(_mm512_permutexvar_epi32(order, b), tables, kv);
            __m512i x_low = _mm512_unpacklo_epi8(x.low, x.high), x_high = _mm512_unpackhi_epi8(x.low, x.high);
            __m512i y_low = _mm512_unpacklo_epi8(y.low, y.high), y_high = _mm512_unpackhi_epi8(y.low, y.high);
            _mm512_store_si512(to, _mm512_unpacklo_epi16(x_low, y_low));
            _mm512_store_si512(to + 1024, _mm512_unpackhi_epi16(x_low, y_low));
            _mm512_store_si512(to + 2048, _mm512_unpacklo_epi16(x_high, y_high));
            _mm512_store_si512(to + 3072, _mm512_unpackhi_epi16(x_high, y_high));
        }
        ask(next, 4);
    }
}
#else
#define HAS_BYTE_TABLES 0
#endif

/* Copy a token's row, widened to the type of the queries. */
INLINE void copy_row(char *to, const char *from, long size, const uint8_t *tables, int type, int kv) {
    if (kv == SAME) {
        memcpy(to, from, size * bytes_of(type));
        return;
    }
    long at = 0;
#if HAS_BYTE_TABLES
    for (; type == BF16 && at + 4 * LANES <= size; at += 4 * LANES) widen_codes(to + 2 * at, from + at, tables, kv);
#endif
    for (; at + 2 * LANES <= size; at += 2 * LANES) { /* two at once: GCC keeps them from waiting for each other */
        lanes low = load_code(from + at, kv), high = load_code(from + at + LANES, kv);
        store(to, at, low, type);
        store(to, at + LANES, high, type);
    }
    for (; at + LANES <= size; at += LANES) store(to, at, load_code(from + at, kv), type);
    if (at < size) {
        char rest[LANES] = {0};
        memcpy(rest, from + at, size - at);
        store_part(to, at, size - at, load_code(rest, kv), type);
    }
}

/* Where a token's row of a head lies in a cache, in numbers. */
INLINE long place_of(const call *c, const int32_t *blocks, long key, long head) {
    return ((blocks[key / c->block] * c->block + key % c->block) * c->kv_heads + head) * c->size;
}

/* Let `rows` point at 64 rows of a head, copied if need be; return the bytes from row to row. */
INLINE long find_rows(const call *c, const char *cache, const int32_t *blocks, long first, long count, long head,
                      int is_copied, long padded, char *copies, const char *rows[4], int type, int kv) {
    int bytes = kv == SAME ? bytes_of(type) : 1;
    if (is_copied) {
        long stride = padded * bytes_of(type);
        for (long i = 0; i < count; i++)
            copy_row(copies + i * stride, cache + place_of(c, blocks, first + i, head) * bytes, c->size, c->tables, type,
                     kv);
        for (int i = 0; i < 4; i++) rows[i] = copies + i * LANES * stride;
        return stride;
    }
    for (int i = 0; i < 4; i++) {
        long key = i * LANES < count ? first + i * LANES : first;
        rows[i] = cache + place_of(c, blocks, key, head) * bytes;
    }
    return c->kv_heads * c->size * bytes;
}

/* How a task lays its queries in tiles: 16 rows of one head, or all rows of a few heads beside each other, so that
 * few queries fill the lanes too. A panel then holds zeros in the lanes of the other heads. */
typedef struct {
    long tiles, heads, rows; /* at most, of a tile */
} layout;

INLINE layout layout_of(const task *t) {
    if (t->heads == 1) return (layout){(t->rows + LANES - 1) / LANES, 1, LANES};
    long heads = LANES / t->rows;
    return (layout){(t->heads + heads - 1) / heads, heads, t->rows};
}

/* Lay out the queries of a task, and what each sees. */
INLINE void begin(const call *c, const task *t, const layout *l, room *r, long padded, int type) {
    long start = c->starts[t->sequence], count = c->starts[t->sequence + 1] - start;
    long group = c->heads / c->kv_heads, length = c->ends[t->sequence];
    for (long tile = 0; tile < l->tiles; tile++) {
        for (int lane = 0; lane < LANES; lane++) {
            long row = l->heads > 1 ? lane % l->rows : tile * LANES + lane;
            if (row >= t->rows) row = t->rows - 1; /* nobody's lane: sees what a neighbour sees */
            long last = length - count + (t->first_row + row) / group;
            r->high[tile * LANES + lane] = last;
            r->low[tile * LANES + lane] = c->window && last >= c->window ? last - c->window + 1 : 0;
            r->most[tile * LANES + lane] = NEVER;
            r->sum[tile * LANES + lane] = 0;
        }
        memset(r->o + tile * LANES * padded, 0, LANES * padded * 4);
        for (long i = 0; i < l->heads; i++) {
            long head = tile * l->heads + i, first = l->heads > 1 ? 0 : tile * LANES;
            const char *from[LANES] = {0};
            if (l->heads > 1 && head >= t->heads) break;
            for (long row = first; row < t->rows && row < first + l->rows; row++) {
                long query = start + (t->first_row + row) / group;
                long number = t->head + (l->heads > 1 ? head : 0);
                long place = query * c->heads + number * group + (t->first_row + row) % group;
                from[i * l->rows + row - first] = c->q + place * c->size * bytes_of(type);
            }
            panel_of_queries(r->panels + head * LANES * padded * bytes_of(type), from, c->size, padded, type);
        }
    }
}

/* Whether no query of a tile sees any of some keys. */
INLINE int is_outside(const int32_t low[LANES], const int32_t high[LANES], long first, long end) {
    int most = -1, least = INT32_MAX;
    for (int i = 0; i < LANES; i++) {
        most = high[i] > most ? high[i] : most;
        least = low[i] < least ? low[i] : least;
    }
    return most < first || least >= end;
}

INLINE lanes spread(lanes x, lanes_i32 owners) {
#ifdef __AVX512F__
    return (lanes)_mm512_permutexvar_ps((__m512i)owners, (__m512)x);
#else
    lanes y;
    for (int lane = 0; lane < LANES; lane++) y[lane] = x[owners[lane]];
    return y;
#endif
}

/* Spread the scales of a chunk's keys over the lanes of the heads they belong to. Those of keys that nobody sees may
 * be anything, and would outlive their p of 0. */
INLINE void spread_scales(const call *c, const task *t, const layout *l, room *r, const int32_t *blocks, long tile,
                          long first, long hidden, long count) {
    long heads = l->heads == 1 ? 1 : t->heads - tile * l->heads < l->heads ? t->heads - tile * l->heads : l->heads;
    lanes_i32 owners; /* of the lanes */
    for (int lane = 0; lane < LANES; lane++) owners[lane] = l->heads == 1 ? 0 : lane / l->rows % LANES;
    memset(r->value_scales, 0, KEYS * LANES * 4);
    for (long key = hidden; key < count; key++) {
        long place = (blocks[(first + key) / c->block] * c->block + (first + key) % c->block) * c->kv_heads + t->head;
        if (l->heads > 1) place += tile * l->heads;
        store(r->key_scales, key * LANES, spread(load_some(c->key_scales, place, heads, F32), owners), F32);
        store(r->value_scales, key * LANES, spread(load_some(c->value_scales, place, heads, F32), owners), F32);
    }
}

INLINE void compute(const call *c, const task *t, room *r, long padded, int type, int kv) {
    const int32_t *blocks = c->blocks + t->sequence * c->list;
    layout l = layout_of(t);
    int is_copied = kv != SAME || c->block % LANES != 0;
    /* Rows at a power of two fall on few places of the nearest cache: not to be read over and over. */
    int are_keys_copied = is_copied || (type == BF16 && c->size != padded) || (l.heads == 1 && l.tiles > 2);
    float scale = c->softcap != 0 ? c->scale / c->softcap : c->scale * unit_of(type);
    int32_t places[LANES];
    /* Rows of p, 16 for each head of a tile and 12 of zeros before: a head's left factor is a window of 16 rows that
     * has its own where its lanes are. */
    for (int lane = 0; lane < LANES; lane++)
        places[lane] = l.heads > 1 ? LANES + lane / l.rows * 2 * LANES + lane % l.rows : lane;
    if (type == BF16) memset(r->p, 0, P_ROWS * KEYS * 2);
    begin(c, t, &l, r, padded, type);
    stream memory = {c->keys, c->values, 0, c->block * c->kv_heads * c->size * (kv == SAME ? bytes_of(type) : 1), 0, 0};
    stream *next = t->heads > 1 ? &memory : 0;
    for (long first = t->first_key; first < t->end_key; first += KEYS) {
        long left = t->end_key - first, count = left < KEYS ? left : KEYS;
        long hidden = r->low[0] > first ? r->low[0] - first : 0; /* keys before the first query's window */
        int has_panel = 0;
        long key_stride = 0;
        const char *keys[4] = {0}, *values[4];
        /* The chunk after this one, whole blocks of it. */
        long some = (first + KEYS) / c->block, end = first + 2 * KEYS < t->end_key ? first + 2 * KEYS : t->end_key;
        memory.blocks = blocks + some, memory.at = 0, memory.number = (end + c->block - 1) / c->block - some;
        for (long tile = 0; tile < l.tiles; tile++) {
            const int32_t *low = r->low + tile * LANES, *high = r->high + tile * LANES;
            if (is_outside(low, high, first, first + count)) continue;
            float *o = r->o + tile * LANES * padded;
            long heads = l.heads == 1 ? 1 : t->heads - tile * l.heads;
            heads = heads < l.heads ? heads : l.heads;
            for (long i = 0; i < heads; i++) {
                long head = tile * l.heads + i;
                if (!keys[0] || l.heads > 1)
                    key_stride = find_rows(c, c->keys, blocks, first, count, t->head + (l.heads > 1 ? head : 0),
                                           are_keys_copied, padded, r->key_rows, keys, type, kv);
                product_keys(r->scores, keys, key_stride, r->panels + head * LANES * padded * bytes_of(type),
                             type == BF16 ? padded : c->size, i > 0, c->tiles, next, type);
            }
            if (kv != SAME && (!has_panel || l.heads > 1))
                spread_scales(c, t, &l, r, blocks, tile, first, hidden, count);
            sight seen = sight_of(low, high, first, count);
            softmax_step(r->scores, o, r->most + tile * LANES, r->sum + tile * LANES, padded, LANES, scale,
                         c->softcap * unit_of(type), &seen, kv == SAME ? 0 : r->key_scales, kv == SAME ? 0 : r->value_scales,
                         next, type);
            if (type == BF16) turn_to_bf16(r->p, r->scores, places);
            for (long i = 0; i < heads; i++) {
                int is_new = !has_panel || l.heads > 1;
#if HAS_BYTE_TABLES
                if (is_new && kv != SAME && type == BF16 && c->block % LANES == 0 && c->size % 64 == 0) {
                    long stride = find_rows(c, c->values, blocks, first, count,
                                            t->head + (l.heads > 1 ? tile * l.heads + i : 0), 0, padded, 0, values, type,
                                            kv);
                    panel_of_codes(r->panel, values, stride, count, c->size, c->tables, next, kv);
                    if (hidden) clear_rows(r->panel, hidden < KEYS ? (1ul << hidden) - 1 : ~0ul, padded, type);
                    is_new = 0, has_panel = 1;
                }
#endif
                if (is_new) {
                    long stride = find_rows(c, c->values, blocks, first, count,
                                            t->head + (l.heads > 1 ? tile * l.heads + i : 0), is_copied, padded,
                                            r->value_rows, values, type, kv);
                    panel_of_values(r->panel, values, stride, count, c->size, padded, next, type);
                    if (hidden) clear_rows(r->panel, hidden < KEYS ? (1ul << hidden) - 1 : ~0ul, padded, type);
                    has_panel = 1;
                }
                long lane = i * l.rows, some = t->rows < l.rows ? t->rows : l.rows;
                if (type == F32)
                    product_values(o + lane * padded, r->scores + lane, LANES, 1, r->panel, padded, some, 0, next, F32);
                else if (c->tiles)
                    product_values(o, r->p + (places[lane] - lane) * KEYS, 2 * KEYS, 0, r->panel, padded, LANES, 1, next,
                                   BF16);
                else
                    product_values(o + lane * padded, r->p + places[lane] * KEYS, 2 * KEYS, 0, r->panel, padded, some, 0,
                                   next, BF16);
            }
        }
    }
}

INLINE void store_row(char *to, const float *o, float factor, long size, int type) {
    for (long at = 0; at < size; at += LANES)
        store_some(to, at, size - at, load_some(o, at, size - at, F32) * factor, type);
}

/* Write what a task found: rows of o, or its largest score, its sum and its rows where others have a share. */
INLINE void finish(const call *c, const task *t, const room *r, long padded, int type) {
    long group = c->heads / c->kv_heads;
    layout l = layout_of(t);
    for (long head = 0; head < t->heads; head++)
        for (long row = 0; row < t->rows; row++) {
            long number = l.heads > 1 ? head / l.heads * LANES + head % l.heads * l.rows + row : row;
            const float *o = r->o + number * padded;
            if (t->partial) {
                float *to = t->partial + (head * t->rows + row) * (c->size + 2);
                to[0] = r->most[number];
                to[1] = r->sum[number];
                memcpy(to + 2, o, c->size * 4);
                continue;
            }
            long query = c->starts[t->sequence] + (t->first_row + row) / group;
            long place = query * c->heads + (t->head + head) * group + (t->first_row + row) % group;
            float sum = r->sum[number];
            store_row(c->o + place * c->size * bytes_of(type), o, sum == 0 ? 0 : 1 / sum, c->size, type);
        }
}

/* Whether two tasks are splits of the same. */
INLINE int is_same(const task *a, const task *b) { return a->sequence == b->sequence && a->head == b->head; }

/* Add up the splits of a sequence. */
INLINE void merge(const call *c, const task *first, long splits, float *sums, int type) {
    long group = c->heads / c->kv_heads, rows = first->heads * first->rows, stride = rows * (c->size + 2);
    for (long row = 0; row < rows; row++) {
        const float *parts = first->partial + row * (c->size + 2);
        float most = NEVER, sum = 0;
        for (long i = 0; i < splits; i++) most = parts[i * stride] > most ? parts[i * stride] : most;
        memset(sums, 0, c->size * 4);
        for (long i = 0; i < splits; i++) {
            const float *part = parts + i * stride;
            float share = type == BF16 ? exp2f(part[0] - most) : expf(part[0] - most);
            sum += share * part[1];
            for (long at = 0; at < c->size; at++) sums[at] += share * part[2 + at];
        }
        long query = c->starts[first->sequence] + row % first->rows / group;
        long place = query * c->heads + (first->head + row / first->rows) * group + row % first->rows % group;
        store_row(c->o + place * c->size * bytes_of(type), sums, sum == 0 ? 0 : 1 / sum, c->size, type);
    }
}

static void *take(char **from, long bytes) {
    char *found = *from;
    *from += ALIGNED(bytes);
    return found;
}

/* Divide the call: fill `tasks` and return their number; only count where `tasks` is null. */
static long divide(const call *c, task *tasks, float *partials, long *floats) {
    long number = 0, group = c->heads / c->kv_heads;
    *floats = 0;
    for (long sequence = 0; sequence < c->sequences; sequence++) {
        long rows = (c->starts[sequence + 1] - c->starts[sequence]) * group, length = c->ends[sequence];
        if (rows <= 0) continue;
        int is_short = rows <= LANES;
        /* A window hides the beginning from all queries alike. */
        long hidden = c->window ? length - rows / group - c->window + 1 : 0;
        long first_key = hidden > 0 ? hidden / KEYS * KEYS : 0;
        long splits = is_short && length - first_key > c->split ? (length - first_key + c->split - 1) / c->split : 1;
        long heads = 2 * rows <= LANES ? c->kv_heads : 1, most = is_short ? LANES : TILES * LANES;
        for (long head = 0; head < c->kv_heads; head += heads)
            for (long row = 0; row < rows; row += most)
                for (long split = 0; split < splits; split++, number++) {
                    long some = rows - row < most ? rows - row : most;
                    long from = first_key + split * c->split, to = from + c->split;
                    float *partial = splits > 1 && partials ? partials + *floats : 0;
                    if (splits > 1) *floats += heads * some * (c->size + 2);
                    if (splits == 1 || to > length) to = length;
                    if (tasks) tasks[number] = (task){sequence, row, some, head, heads, from, to, partial};
                }
    }
    return number;
}

INLINE void forward(const call *c, int type, int kv) {
    long floats, padded = (c->size + 31) / 32 * 32, number = divide(c, 0, 0, &floats);
    long tiles = c->kv_heads > TILES ? c->kv_heads : TILES, bytes = bytes_of(type);
    float *partials = floats ? aligned_alloc(64, ALIGNED(4 * floats)) : 0;
    task *tasks = malloc((number + 1) * sizeof(task));
    divide(c, tasks, partials, &floats);
#if HAS_BYTE_TABLES
    _Alignas(64) uint8_t tables[256];
    call with_tables = *c;
    if (kv != SAME) fill_tables(tables, kv);
    with_tables.tables = tables;
    c = &with_tables;
#endif
#pragma omp parallel num_threads(c->threads)
    {
        long sizes[] = {tiles * LANES * padded * bytes, tiles * LANES * padded * 4, KEYS * padded * 4};
        char *all_room = aligned_alloc(64, ALIGNED(sizes[0]) + ALIGNED(sizes[1]) + 3 * ALIGNED(sizes[2]) +
                                               4 * ALIGNED(tiles * 64) + 3 * KEYS * LANES * 4 + P_ROWS * KEYS * 2);
        char *next = all_room;
        room r = {.panels = take(&next, sizes[0]), .o = take(&next, sizes[1])};
        r.most = take(&next, tiles * 64), r.sum = take(&next, tiles * 64);
        r.low = take(&next, tiles * 64), r.high = take(&next, tiles * 64);
        r.scores = take(&next, KEYS * LANES * 4), r.p = take(&next, P_ROWS * KEYS * 2);
        r.key_scales = take(&next, KEYS * LANES * 4), r.value_scales = take(&next, KEYS * LANES * 4);
        r.panel = take(&next, sizes[2]), r.key_rows = take(&next, sizes[2]), r.value_rows = take(&next, sizes[2]);
        memset(r.key_rows, 0, sizes[2]);
        memset(r.key_scales, 0, KEYS * LANES * 4);
#if HAS_BF16_TILES
        if (c->tiles) configure_tiles(64);
#endif
#pragma omp for schedule(dynamic)
        for (long i = 0; i < number; i++) {
            compute(c, &tasks[i], &r, padded, type, kv);
            finish(c, &tasks[i], &r, padded, type);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < number; i++) {
            long splits = 1;
            if (!tasks[i].partial || (i && is_same(&tasks[i - 1], &tasks[i]))) continue;
            while (i + splits < number && is_same(&tasks[i], &tasks[i + splits])) splits++;
            merge(c, &tasks[i], splits, r.scores, type);
        }
#if HAS_BF16_TILES
        if (c->tiles) _tile_release();
#endif
        free(all_room);
    }
    free(tasks);
    free(partials);
}

/* Whether every query has a sequence, every key a place in a list and every block one in the cache. */
static int are_lists_sound(const call *c, long queries, long cached) {
    if (c->starts[0] != 0 || c->starts[c->sequences] != queries) return 0;
    for (long sequence = 0; sequence < c->sequences; sequence++) {
        const int32_t *blocks = c->blocks + sequence * c->list;
        long end = c->ends[sequence];
        if (c->starts[sequence + 1] < c->starts[sequence] || end < 0 || end > c->list * c->block) return 0;
        for (long i = 0; i * c->block < end; i++)
            if (blocks[i] < 0 || blocks[i] >= cached) return 0;
    }
    return 1;
}

/* kv: 0 keys and values of the queries' type, 1 int8, 2 e4m3. split: keys, a multiple of 64. queries, cached: how
 * many rows of q and blocks of the cache there are. is_sound: written; where 0, nothing else is. */
void paged_attention_forward(const void *q, const void *keys, const void *values, const float *key_scales,
                             const float *value_scales, const int32_t *blocks, const int32_t *starts,
                             const int32_t *ends, void *o, int *is_sound, long queries, long cached, long sequences,
                             long list, long block, long heads, long kv_heads, long size, long window, long split,
                             float scale, float softcap, int threads, int type, int kv) {
    call c = {q, keys, values, key_scales, value_scales, blocks, starts, ends, o, sequences, list, block, heads,
              kv_heads, size, window, split, scale, softcap, threads, type == BF16 && HAS_BF16_TILES && has_tiles(), 0};
    if (!(*is_sound = are_lists_sound(&c, queries, cached))) return;
    if (type == BF16 && kv == SAME) forward(&c, BF16, SAME);
    else if (type == BF16) forward(&c, BF16, kv);
    else if (kv == SAME) forward(&c, F32, SAME);
    else forward(&c, F32, kv);
}
