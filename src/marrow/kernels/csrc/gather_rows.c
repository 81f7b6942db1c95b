/* Rows of mapped shards -> int64 arrays of a batch; and the keyed permutation that names the rows.

   The twins in numpy stand in gather_rows.py, function by function; they are the oracle. Nothing
   here allocates or takes a lock; all it keeps is which rows it has checked, a byte each, so that
   threads never change the same one. What a damaged file could say (a start beyond its row) is
   bounded before it is used as an index. */

#include <stdint.h>
#include <string.h>

#define IGNORED (-100)
#define CHUNK 256

/* One line of the table of shards: addresses of its columns, and the bytes of a token. */
typedef struct {
    const void *tokens;        /* uint16 or uint32 [rows, stored] */
    const int32_t *starts;     /* where documents begin, row after row */
    const int32_t *starts_of;  /* [rows + 1] */
    const int32_t *num_tokens; /* [rows] */
    const uint64_t *checks;    /* [rows], of each row (check_of), or 0: there is nothing to check */
    uint8_t *checked;          /* [rows], 1 once a row's check was computed and is right */
    int64_t token_bytes, num_starts;
} shard_t;

typedef struct {
    int64_t num_shards, stored; /* tokens of a row, T + 1 */
    const int64_t *first_row;   /* [num_shards + 1] */
    const shard_t *shards;
} table_t;

/* XXH64, from the specification of xxHash (Y. Collet): four lanes of 8 bytes. */
#define P1 UINT64_C(0x9E3779B185EBCA87)
#define P2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define P3 UINT64_C(0x165667B19E3779F9)
#define P4 UINT64_C(0x85EBCA77C2B2AE63)
#define P5 UINT64_C(0x27D4EB2F165667C5)

static inline uint64_t rotate(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

static inline uint64_t take_lane(uint64_t lane, uint64_t input) { return rotate(lane + input * P2, 31) * P1; }

static inline uint64_t read_64(const uint8_t *from) {
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

static uint64_t xxh64(const void *data, int64_t length, uint64_t seed) {
    const uint8_t *at = data, *const end = at + length;
    uint64_t hash = seed + P5;
    if (length >= 32) {
        uint64_t a = seed + P1 + P2, b = seed + P2, c = seed, d = seed - P1;
        for (; at + 32 <= end; at += 32) {
            a = take_lane(a, read_64(at));
            b = take_lane(b, read_64(at + 8));
            c = take_lane(c, read_64(at + 16));
            d = take_lane(d, read_64(at + 24));
        }
        hash = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
        const uint64_t lanes[4] = {a, b, c, d};
        for (int i = 0; i < 4; i++)
            hash = (hash ^ take_lane(0, lanes[i])) * P1 + P4;
    }
    hash += (uint64_t)length;
    for (; at + 8 <= end; at += 8)
        hash = rotate(hash ^ take_lane(0, read_64(at)), 27) * P1 + P4;
    if (at + 4 <= end) {
        uint32_t value;
        memcpy(&value, at, sizeof value);
        hash = rotate(hash ^ value * P1, 23) * P2 + P3;
        at += 4;
    }
    for (; at < end; at++)
        hash = rotate(hash ^ *at * P5, 11) * P1;
    hash = (hash ^ hash >> 33) * P2;
    hash = (hash ^ hash >> 29) * P3;
    return hash ^ hash >> 32;
}

/* A row's check: of its tokens, seeded with that of its starts, seeded with how many tokens it has. */
static uint64_t check_of(const shard_t *shard, int64_t place, int64_t stored) {
    const int64_t low = shard->starts_of[place], high = shard->starts_of[place + 1];
    const int64_t bytes = stored * shard->token_bytes;
    const uint64_t seed = xxh64(shard->starts + low, (high - low) * 4, (uint64_t)shard->num_tokens[place]);
    return xxh64((const char *)shard->tokens + place * bytes, bytes, seed);
}

/* checks[r] of the first `count` rows of a shard, whose offsets are in order. */
void check_rows(int64_t count, const shard_t *shard, int64_t stored, uint64_t *checks) {
    for (int64_t place = 0; place < count; place++)
        checks[place] = check_of(shard, place, stored);
}

static inline uint64_t mix(uint64_t value, uint64_t key) {
    value = (value ^ key) * UINT64_C(0xBF58476D1CE4E5B9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94D049BB133111EB);
    return value ^ (value >> 31);
}

/* One pass of the Feistel network over many values; a plain loop, so that it is vectorised. */
static void feistel(uint64_t *restrict values, int64_t count, int low_bits, int high_bits,
                    const uint64_t *restrict keys) {
    const uint64_t low_mask = (UINT64_C(1) << low_bits) - 1, high_mask = (UINT64_C(1) << high_bits) - 1;
    for (int64_t i = 0; i < count; i++) {
        uint64_t value = values[i];
        for (int round = 0; round < 8; round += 2) {
            value ^= (mix(value & low_mask, keys[round]) & high_mask) << low_bits;
            value ^= mix(value >> low_bits, keys[round + 1]) & low_mask;
        }
        values[i] = value;
    }
}

/* out[i] = where the permutation of [0, size) puts index[i]. */
void permute(int64_t count, const int64_t *index, uint64_t size, int low_bits, int high_bits,
             const uint64_t *keys, int64_t *out) {
    uint64_t values[CHUNK];
    int32_t place[CHUNK];
    for (int64_t done = 0; done < count; done += CHUNK) {
        int64_t moving = count - done < CHUNK ? count - done : CHUNK;
        for (int64_t i = 0; i < moving; i++) {
            values[i] = (uint64_t)index[done + i];
            place[i] = (int32_t)i;
        }
        while (moving) {
            feistel(values, moving, low_bits, high_bits, keys);
            int64_t outside = 0; /* of [0, size): walk on */
            for (int64_t i = 0; i < moving; i++) {
                out[done + place[i]] = (int64_t)values[i];
                values[outside] = values[i];
                place[outside] = place[i];
                outside += values[i] >= size;
            }
            moving = outside;
        }
    }
}

/* The shard of a row, by halving; rows come in no order, so there is nothing to remember. */
static inline int64_t shard_of(int64_t row, int64_t num_shards, const int64_t *first_row) {
    int64_t low = 0, length = num_shards;
    while (length > 1) {
        const int64_t half = length / 2;
        low += first_row[low + half] <= row ? half : 0;
        length -= half;
    }
    return low;
}

/* Where a row's tokens are, and what it takes to know its documents. No tokens: it cannot be read. */
typedef struct {
    const shard_t *shard;
    int64_t place;
    const char *tokens;
} row_t;

static inline row_t find_row(int64_t row, const table_t *table) {
    row_t found = {0, 0, 0};
    if (row < 0 || row >= table->first_row[table->num_shards])
        return found;
    const int64_t index = shard_of(row, table->num_shards, table->first_row);
    found.shard = table->shards + index;
    found.place = row - table->first_row[index];
    if (found.shard->tokens) {
        found.tokens = (const char *)found.shard->tokens + found.place * table->stored * found.shard->token_bytes;
        if (found.shard->checks)
            __builtin_prefetch(found.shard->checked + found.place);
    }
    return found;
}

static int check_row(row_t row, int64_t stored) {
    const shard_t *shard = row.shard;
    const int64_t low = shard->starts_of[row.place], high = shard->starts_of[row.place + 1];
    if (low < 0 || high < low || high > shard->num_starts)
        return 0;
    return shard->checked[row.place] = check_of(shard, row.place, stored) == shard->checks[row.place];
}

/* Tell whether a row can be read: its shard is open, and its bytes are those that were written. */
static inline int is_readable(row_t row, int64_t stored) {
    if (!row.tokens)
        return 0;
    return !row.shard->checks || row.shard->checked[row.place] || check_row(row, stored);
}

/* Widen a row; meanwhile ask for the lines of `next`, the row after it. A row is read from memory,
   each at a place of its own: without that the copy waits for its first lines.
   A row of T + 1 tokens begins where the last one ended, seven times of eight within a cache line,
   and a store of 64 bytes that crosses lines takes two: so its first tokens are stored one by one
   (a quarter less time). */
#define AHEAD 32 /* tokens, a cache line of uint16 */
#define LINE 64
#define OWNED 256 /* tokens: lines are asked for 2 kB before they are written, a tenth less time */
#define WIDEN(name, type)                                                                      \
    static void name(const type *restrict from, int64_t count, int64_t *restrict to,           \
                     const char *next) {                                                       \
        int64_t t = 0;                                                                         \
        for (; t < count && (uintptr_t)(to + t) % LINE; t++)                                   \
            to[t] = from[t];                                                                   \
        for (; t + AHEAD <= count; t += AHEAD) {                                               \
            __builtin_prefetch(next + t * (int64_t)sizeof(type));                              \
            if (sizeof(type) > 2)                                                              \
                __builtin_prefetch(next + t * (int64_t)sizeof(type) + LINE);                   \
            for (int64_t i = 0; i < AHEAD; i += LINE / 8)                                      \
                __builtin_prefetch(to + t + OWNED + i, 1);                                     \
            int64_t *aligned = __builtin_assume_aligned(to + t, LINE);                         \
            for (int64_t i = 0; i < AHEAD; i++)                                                \
                aligned[i] = from[t + i];                                                      \
        }                                                                                      \
        __builtin_prefetch(next + t * (int64_t)sizeof(type));                                  \
        __builtin_prefetch(next + count * (int64_t)sizeof(type));                              \
        for (; t < count; t++)                                                                 \
            to[t] = from[t];                                                                   \
    }
WIDEN(widen_16, uint16_t)
WIDEN(widen_32, uint32_t)

static inline void widen(row_t row, int64_t first, int64_t count, int64_t *to, row_t next) {
    if (row.shard->token_bytes == 2)
        widen_16((const uint16_t *)row.tokens + first, count, to, next.tokens);
    else
        widen_32((const uint32_t *)row.tokens + first, count, to, next.tokens);
}

/* out [count, stored] = the rows' tokens, padding included. Returns the rows done: the next one, if
   there is one, cannot be read. */
int64_t stack_rows(int64_t count, const int64_t *rows, const table_t *table, int64_t *out) {
    const int64_t stored = table->stored;
    row_t next = count ? find_row(rows[0], table) : (row_t){0, 0, 0};
    for (int64_t i = 0; i < count; i++) {
        const row_t row = next;
        if (!is_readable(row, stored))
            return i;
        if (i + 1 < count)
            next = find_row(rows[i + 1], table);
        widen(row, 0, stored, out + i * stored, next);
    }
    return count;
}

/* positions and documents of one row, and the targets that cross documents. Returns the last number. */
static int32_t number_documents(row_t row, int64_t context, int32_t document, int64_t *restrict targets,
                                int64_t *restrict positions, int32_t *restrict documents) {
    const int32_t *starts = row.shard->starts;
    const int32_t low = row.shard->starts_of[row.place], high = row.shard->starts_of[row.place + 1];
    int64_t start = 0;
    for (int32_t piece = low; piece == low || piece < high; piece++) {
        int64_t end = piece + 1 < high ? starts[piece + 1] : context;
        end = end > context ? context : end < start ? start : end;
        document++;
        for (int64_t t = start; t < end; t++)
            positions[t] = t - start;
        for (int64_t t = start; t < end; t++)
            documents[t] = document;
        if (piece + 1 < high && end > 0)
            targets[end - 1] = IGNORED; /* no document predicts the next one's first */
        start = end;
    }
    return document;
}

/* Lay rows end to end, each [context] = stored - 1, for batches of `each` rows one after the other;
   see loader/batch.py for what the arrays mean. num_targets[b]: targets that count in batch b.
   Returns the rows done, as stack_rows. */
int64_t lay_rows(int64_t count, const int64_t *rows, const table_t *table, int64_t each, int64_t *tokens,
                 int64_t *targets, int64_t *positions, int32_t *documents, int64_t *num_targets) {
    const int64_t context = table->stored - 1;
    int32_t document = -1;
    row_t next = count ? find_row(rows[0], table) : (row_t){0, 0, 0};
    for (int64_t i = 0; i < count; i++) {
        const row_t row = next;
        if (!is_readable(row, table->stored))
            return i;
        if (i + 1 < count) {
            next = find_row(rows[i + 1], table);
            if (next.tokens) {
                __builtin_prefetch(next.shard->num_tokens + next.place);
                __builtin_prefetch(next.shard->starts_of + next.place);
            }
        }
        if (i % each == 0) {
            document = -1;
            num_targets[i / each] = 0;
        }
        const int64_t at = i * context;
        widen(row, 0, context, tokens + at, next);
        widen(row, 1, context, targets + at, row); /* its lines are here now */
        const int64_t used = row.shard->num_tokens[row.place];
        for (int64_t t = used > 1 ? used - 1 : 0; t < context; t++)
            targets[at + t] = IGNORED;
        document = number_documents(row, context, document, targets + at, positions + at, documents + at);
        num_targets[i / each] += used - (row.shard->starts_of[row.place + 1] - row.shard->starts_of[row.place]);
    }
    return count;
}
