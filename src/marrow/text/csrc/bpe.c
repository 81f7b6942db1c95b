/* Byte-level byte-pair encoding: texts to token ids, the same ids as the Hugging Face library's.
 *
 * One walk over the UTF-8 bytes. The pattern of text/pattern.py is a scanner written by hand; a word of
 * up to 31 bytes is looked up in a direct-mapped cache of 64-byte lines (word and ids in one line), and
 * only what is not there is merged: by trying all pairs for short words, by a heap of (rank, place) for
 * long ones, so that a word of n bytes costs O(n log n). Classes of characters beyond ASCII come from
 * the caller, who asks the library for them.
 *
 * `struct tables` is read by any number of threads, a `struct worker` (the cache) belongs to one call
 * at a time. Memory is the caller's but for both of these and what a long word needs while it is merged.
 * Source: Sennrich et al. 2016; the lowest rank first, the leftmost of equals, as in `tokenizers`. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OTHER, LETTER, NUMBER, BLANK, LINE_END, FOREIGN, INVALID };
enum { KEY_BYTES = 32, MAX_KEY = 31, SLOT_IDS = 7, SHORT_WORD = 48 };
#define NONE UINT32_MAX

struct merge { uint64_t pair; uint32_t rank, id; };

struct tables {
    uint64_t merge_mask;
    struct merge *merges;       /* open addressing; pair == UINT64_MAX is empty */
    uint32_t *id_of_rank;
    uint32_t id_of_byte[256];
    int64_t max_digits;         /* numbers fall into groups of at most so many */
    const uint16_t *pages;      /* of one call: code point >> 8 -> page; NULL: texts are ASCII */
    const uint8_t *classes;     /* of one call: page * 256 + low byte -> class */
};

struct slot { uint64_t key[4]; uint32_t count, ids[SLOT_IDS]; };

struct worker { uint64_t mask; struct slot *slots; };

static const uint8_t ascii_class[256] = {
    ['\t'] = BLANK, ['\n'] = LINE_END, ['\v'] = BLANK, ['\f'] = BLANK, ['\r'] = LINE_END, [' '] = BLANK,
    ['0' ... '9'] = NUMBER, ['A' ... 'Z'] = LETTER, ['a' ... 'z'] = LETTER, [128 ... 255] = FOREIGN,
};

static inline uint64_t hash_pair(uint64_t pair) {
    pair *= 0x9E3779B97F4A7C15u;
    return pair ^ (pair >> 32);
}

static inline const struct merge *find(const struct tables *t, uint32_t left, uint32_t right) {
    uint64_t pair = (uint64_t)left << 32 | right;
    for (uint64_t at = hash_pair(pair) & t->merge_mask;; at = (at + 1) & t->merge_mask) {
        if (t->merges[at].pair == pair) return &t->merges[at];
        if (t->merges[at].pair == UINT64_MAX) return NULL;
    }
}

static inline uint32_t rank_of(const struct tables *t, uint32_t left, uint32_t right) {
    const struct merge *merge = find(t, left, right);
    return merge ? merge->rank : NONE;
}

void bpe_tables_free(struct tables *t) {
    if (!t) return;
    free(t->merges);
    free(t->id_of_rank);
    free(t);
}

/* left, right, made: ids of each merge, in the order of their rank. */
struct tables *bpe_tables_new(const uint32_t *left, const uint32_t *right, const uint32_t *made,
                              int64_t count, const uint32_t *id_of_byte, int64_t max_digits) {
    uint64_t size = 16;
    while (size < 2 * (uint64_t)count) size *= 2;
    struct tables *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->merges = malloc(size * sizeof *t->merges);
    t->id_of_rank = malloc((count + 1) * sizeof *t->id_of_rank);
    if (!t->merges || !t->id_of_rank) {
        bpe_tables_free(t);
        return NULL;
    }
    memset(t->merges, 0xff, size * sizeof *t->merges);
    t->merge_mask = size - 1;
    t->max_digits = max_digits;
    memcpy(t->id_of_byte, id_of_byte, sizeof t->id_of_byte);
    for (int64_t rank = 0; rank < count; rank++) {
        uint64_t pair = (uint64_t)left[rank] << 32 | right[rank], at = hash_pair(pair) & t->merge_mask;
        while (t->merges[at].pair != UINT64_MAX && t->merges[at].pair != pair) at = (at + 1) & t->merge_mask;
        t->merges[at] = (struct merge){pair, rank, made[rank]}; /* of equal pairs the last, as in a map */
        t->id_of_rank[rank] = made[rank];
    }
    return t;
}

struct worker *bpe_worker_new(int64_t slots) { /* a power of two */
    struct worker *w = malloc(sizeof *w);
    if (!w) return NULL;
    w->mask = slots - 1;
    w->slots = aligned_alloc(64, slots * sizeof *w->slots);
    if (!w->slots) {
        free(w);
        return NULL;
    }
    memset(w->slots, 0, slots * sizeof *w->slots);
    return w;
}

void bpe_worker_free(struct worker *w) {
    if (!w) return;
    free(w->slots);
    free(w);
}

/* --- cutting words ------------------------------------------------------------------------------- */

/* Return the class of the character at p and its length; INVALID for what is no UTF-8. */
static int foreign_class(const struct tables *t, const uint8_t *p, const uint8_t *end, int *length) {
    uint32_t c = p[0];
    int n = c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
    *length = 1;
    if (!n || end - p < n || !t->pages) return INVALID;
    c &= 0x7F >> n;
    for (int i = 1; i < n; i++) {
        if ((p[i] & 0xC0) != 0x80) return INVALID;
        c = c << 6 | (p[i] & 0x3F);
    }
    if ((n == 3 && (c < 0x800 || (c >= 0xD800 && c < 0xE000))) || (n == 4 && (c < 0x10000 || c > 0x10FFFF)))
        return INVALID;
    *length = n;
    return t->classes[t->pages[c >> 8] * 256 + (c & 255)];
}

static inline int class_at(const struct tables *t, const uint8_t *p, const uint8_t *end, int *length) {
    if (p >= end) {
        *length = 0;
        return -1;
    }
    int class = ascii_class[*p];
    *length = 1;
    return class == FOREIGN ? foreign_class(t, p, end, length) : class;
}

/* Skip characters of one class; stop at what is no UTF-8, which the next word meets. */
static inline const uint8_t *skip(const struct tables *t, const uint8_t *p, const uint8_t *end, int wanted) {
    int length;
    for (;;) {
        while (p < end && ascii_class[*p] == wanted) p++;
        if (p >= end || *p < 128 || foreign_class(t, p, end, &length) != wanted) return p;
        p += length;
    }
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d): return its end, or NULL. The long s folds to s. */
static const uint8_t *contraction(const uint8_t *p, const uint8_t *end) {
    if (end - p < 2) return NULL;
    uint8_t a = p[1] | 32, b = end - p > 2 ? p[2] | 32 : 0;
    if (p[1] == 0xC5 && end - p > 2 && p[2] == 0xBF) return p + 3;
    if (p[1] >= 128) return NULL;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
    if (((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l')) return p + 3;
    return NULL;
}

/* Return the end of the word that begins at p < end; NULL at what is no UTF-8. */
static const uint8_t *word_end(const struct tables *t, const uint8_t *p, const uint8_t *end) {
    int length, next_length;
    int class = class_at(t, p, end, &length);
    if (class == LETTER) return skip(t, p + length, end, LETTER);
    if (class == INVALID) return NULL;
    if (*p == '\'') {
        const uint8_t *found = contraction(p, end);
        if (found) return found;
    }
    if (class == NUMBER) {
        p += length;
        for (int64_t i = 1; i < t->max_digits && class_at(t, p, end, &length) == NUMBER; i++) p += length;
        return p;
    }
    const uint8_t *next = p + length;
    int next_class = class_at(t, next, end, &next_length);
    if (class != LINE_END && next_class == LETTER) return skip(t, next + next_length, end, LETTER);
    if (class == OTHER || (*p == ' ' && next_class == OTHER)) {
        p = skip(t, next, end, OTHER);
        while (p < end && ascii_class[*p] == LINE_END) p++;
        return p;
    }
    /* A run of blanks: up to its last line end, else all but the last if something stands behind. */
    const uint8_t *last = p, *after_line_end = NULL, *q = p;
    do {
        if (class == LINE_END) after_line_end = q + length;
        last = q;
        q += length;
        class = class_at(t, q, end, &length);
    } while (class == BLANK || class == LINE_END);
    if (after_line_end) return after_line_end;
    return q == end || last == p ? q : last;
}

/* --- merging a word ------------------------------------------------------------------------------ */

static int64_t merge_short(const struct tables *t, const uint8_t *word, int64_t n, uint32_t *ids) {
    uint32_t ranks[SHORT_WORD];
    for (int64_t i = 0; i < n; i++) ids[i] = t->id_of_byte[word[i]];
    for (int64_t i = 0; i + 1 < n; i++) ranks[i] = rank_of(t, ids[i], ids[i + 1]);
    while (n > 1) {
        int64_t best = 0;
        for (int64_t i = 1; i + 1 < n; i++)
            if (ranks[i] < ranks[best]) best = i;
        if (ranks[best] == NONE) break;
        ids[best] = t->id_of_rank[ranks[best]];
        n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
        memmove(ranks + best, ranks + best + 1, (n - best - 1) * sizeof *ranks);
        if (best + 1 < n) ranks[best] = rank_of(t, ids[best], ids[best + 1]);
        if (best > 0) ranks[best - 1] = rank_of(t, ids[best - 1], ids[best]);
    }
    return n;
}

struct heap { uint64_t *items; int64_t count; };

static void sift_down(struct heap *h, int64_t at) {
    uint64_t item = h->items[at];
    for (int64_t child; (child = 2 * at + 1) < h->count; at = child) {
        if (child + 1 < h->count && h->items[child + 1] < h->items[child]) child++;
        if (h->items[child] >= item) break;
        h->items[at] = h->items[child];
    }
    h->items[at] = item;
}

static void push(struct heap *h, uint64_t item) {
    int64_t at = h->count++;
    for (int64_t parent; at && h->items[parent = (at - 1) / 2] > item; at = parent) h->items[at] = h->items[parent];
    h->items[at] = item;
}

/* The heap begins with a pair for each neighbour; a merge takes one item away and adds at most two, so
 * 2 n items are enough. A pair that is no more is dropped when it comes up. */
static int64_t merge_long(const struct tables *t, const uint8_t *word, int64_t n, uint32_t *ids) {
    if (n > INT32_MAX) return -1;
    int32_t *next = malloc(n * sizeof *next), *previous = malloc(n * sizeof *previous);
    struct heap heap = {malloc(2 * n * sizeof *heap.items), 0};
    int64_t count = -1;
    if (!next || !previous || !heap.items) goto done;
    for (int64_t i = 0; i < n; i++) {
        ids[i] = t->id_of_byte[word[i]];
        next[i] = i + 1 < n ? i + 1 : -1;
        previous[i] = i - 1;
    }
    for (int64_t i = 0; i + 1 < n; i++) {
        uint32_t rank = rank_of(t, ids[i], ids[i + 1]);
        if (rank != NONE) heap.items[heap.count++] = (uint64_t)rank << 32 | i;
    }
    for (int64_t i = heap.count / 2; i-- > 0;) sift_down(&heap, i);
    while (heap.count) {
        uint32_t rank = heap.items[0] >> 32, at = (uint32_t)heap.items[0];
        heap.items[0] = heap.items[--heap.count];
        if (heap.count) sift_down(&heap, 0);
        int32_t right = next[at];
        if (ids[at] == NONE || right < 0 || rank_of(t, ids[at], ids[right]) != rank) continue;
        ids[at] = t->id_of_rank[rank];
        ids[right] = NONE;
        next[at] = next[right];
        if (next[at] >= 0) {
            previous[next[at]] = at;
            uint32_t new_rank = rank_of(t, ids[at], ids[next[at]]);
            if (new_rank != NONE) push(&heap, (uint64_t)new_rank << 32 | at);
        }
        if (previous[at] >= 0) {
            uint32_t new_rank = rank_of(t, ids[previous[at]], ids[at]);
            if (new_rank != NONE) push(&heap, (uint64_t)new_rank << 32 | previous[at]);
        }
    }
    count = 0;
    for (int64_t i = 0; i >= 0; i = next[i]) ids[count++] = ids[i];
done:
    free(next);
    free(previous);
    free(heap.items);
    return count;
}

/* --- the cache ----------------------------------------------------------------------------------- */

static inline void make_key(uint64_t key[4], const uint8_t *word, int64_t n, const uint8_t *limit) {
    static const uint64_t masks[9] = {0, 0xff, 0xffff, 0xffffff, 0xffffffff, 0xffffffffff,
                                      0xffffffffffff, 0xffffffffffffff, UINT64_MAX};
    if (limit - word >= KEY_BYTES) {
        memcpy(key, word, KEY_BYTES);
        for (int i = 0; i < 4; i++) {
            int64_t left = n - 8 * i;
            key[i] &= masks[left < 0 ? 0 : left > 8 ? 8 : left];
        }
    } else {
        memset(key, 0, KEY_BYTES);
        memcpy(key, word, n);
    }
    key[3] |= (uint64_t)n << 56;
}

static inline uint64_t hash_key(const uint64_t key[4]) {
    uint64_t hash = (key[0] ^ (key[1] << 29 | key[1] >> 35)) * 0x9E3779B97F4A7C15u;
    hash = (hash ^ hash >> 32 ^ key[2]) * 0xC2B2AE3D27D4EB4Fu;
    hash = (hash ^ hash >> 29 ^ key[3]) * 0x165667B19E3779F9u;
    return hash ^ hash >> 32;
}

static inline int64_t encode_word(const struct tables *t, struct worker *w, const uint8_t *word, int64_t n,
                                  const uint8_t *limit, uint32_t *ids) {
    if (n == 1) {
        ids[0] = t->id_of_byte[*word];
        return 1;
    }
    if (n > MAX_KEY) return n <= SHORT_WORD ? merge_short(t, word, n, ids) : merge_long(t, word, n, ids);
    uint64_t key[4];
    make_key(key, word, n, limit);
    struct slot *slot = &w->slots[hash_key(key) & w->mask];
    if (!memcmp(slot->key, key, KEY_BYTES)) {
        /* The caller's array has room for a whole line behind each word. */
        memcpy(ids, slot->ids, sizeof slot->ids);
        return slot->count;
    }
    int64_t count = merge_short(t, word, n, ids);
    if (count <= SLOT_IDS) {
        memcpy(slot->key, key, KEY_BYTES);
        memcpy(slot->ids, ids, count * sizeof *ids);
        slot->count = count;
    }
    return count;
}

/* Encode `count` texts that lie in `text` from offsets[i] to offsets[i + 1].
 *
 * bos, eos: ids put around each text, negative for none. ids: room for all bytes, twice `count` and 8.
 * ends: where in `ids` each text ends. pages, classes: of all characters; NULL without. They are of this
 * call, for a word must not be cut with other classes than the next. Returns how many ids there are; -1 without memory; -2 - i where
 * byte i of `text` is no UTF-8 or, without classes, not ASCII. */
int64_t bpe_encode(const struct tables *shared, struct worker *w, const uint16_t *pages, const uint8_t *classes,
                   const uint8_t *text, const int64_t *offsets, int64_t count, int64_t bos, int64_t eos,
                   uint32_t *ids, int64_t *ends) {
    struct tables own = *shared, *t = &own;
    own.pages = pages;
    own.classes = classes;
    const uint8_t *limit = text + offsets[count];
    int64_t made = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *p = text + offsets[i], *end = text + offsets[i + 1];
        if (bos >= 0) ids[made++] = bos;
        while (p < end) {
            const uint8_t *q = word_end(t, p, end);
            if (!q) return -2 - (p - text);
            int64_t n = encode_word(t, w, p, q - p, limit, ids + made);
            if (n < 0) return -1;
            made += n;
            p = q;
        }
        if (eos >= 0) ids[made++] = eos;
        ends[i] = made;
    }
    return made;
}
