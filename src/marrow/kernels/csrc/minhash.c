/* Texts to shingle hashes, sorted sets, MinHash signatures and intersections, without Python.
 *
 * The same bits as kernels/search/minhash.py, which states the rules and is the oracle. Texts are Arrow
 * string memory: bytes and offsets [N+1]. Bytes that are no UTF-8 separate words. Little-endian.
 */

#include <stdint.h>
#include <string.h>

enum { SEPARATOR = 0, LETTER = 1, ALONE = 2 };

static const uint64_t LENGTH = 0x9E3779B97F4A7C15u, WORD = 0xBF58476D1CE4E5B9u, NEXT = 0x94D049BB133111EBu;

static inline uint64_t finish(uint64_t x) {
    x ^= x >> 32;
    x *= WORD;
    return x ^ (x >> 29);
}

/* The hash of n bytes at p: eight at a time, the last ones padded with zeros. */
static inline uint64_t hash_bytes(const uint8_t *p, int64_t n, const uint8_t *end) {
    uint64_t h = (uint64_t)(n + 1) * LENGTH, chunk;
    if (n == 0) return h;
    for (; n > 8; n -= 8, p += 8) {
        memcpy(&chunk, p, 8);
        h = finish(h ^ chunk);
    }
    if (end - p >= 8) {
        memcpy(&chunk, p, 8);
        chunk &= ~(uint64_t)0 >> (64 - 8 * n);
    } else {
        chunk = 0;
        for (int64_t i = 0; i < n; i++) chunk |= (uint64_t)p[i] << (8 * i);
    }
    return finish(h ^ chunk);
}

/* The code point at p and its size; size 1 and U+FFFD for a byte that begins none. */
static inline uint32_t decode(const uint8_t *p, const uint8_t *end, int *size) {
    uint32_t a = p[0];
    *size = 1;
    if (a < 0xC2 || a > 0xF4) return a < 0x80 ? a : 0xFFFD;
    int n = a < 0xE0 ? 2 : a < 0xF0 ? 3 : 4;
    if (end - p < n) return 0xFFFD;
    uint32_t code = a & (0x7Fu >> n);
    for (int i = 1; i < n; i++) {
        if ((p[i] & 0xC0) != 0x80) return 0xFFFD;
        code = code << 6 | (p[i] & 0x3F);
    }
    if ((n == 3 && (code < 0x800 || (code >> 11) == 0x1B)) || (n == 4 && (code < 0x10000 || code > 0x10FFFF)))
        return 0xFFFD;
    *size = n;
    return code;
}

/* One bit for each of 64 bytes: is it an ASCII letter, digit or _? Returns 0 if one is not ASCII. */
static inline int ascii_letters(const uint8_t *p, uint64_t *letters) {
    uint8_t is_letter[64], high = 0;
    for (int i = 0; i < 64; i++) {
        uint8_t c = p[i], small = (uint8_t)((c | 0x20) - 'a'), digit = (uint8_t)(c - '0');
        is_letter[i] = (small < 26) | (digit < 10) | (c == '_');
        high |= c;
    }
    uint64_t bits = 0, eight;
    for (int i = 0; i < 8; i++) {
        memcpy(&eight, is_letter + 8 * i, 8);
        bits |= (eight * 0x0102040810204080u >> 56) << (8 * i);
    }
    *letters = bits;
    return high < 0x80;
}

/* The hashes of a text's words, in order; returns how many: at most one for two bytes, rounded up,
 * since a word of its own (ALONE) has two at least.
 * PERF: 64 bytes at once where all are ASCII: the edges of words are bits, not branches to guess. */
static int64_t words_of(const uint8_t *p, const uint8_t *end, const uint8_t *kinds, uint64_t *out) {
    int64_t count = 0;
    const uint8_t *word = 0;
    while (p < end) {
        uint8_t rest[64] = {0}; /* NUL separates */
        const uint8_t *block = p, *block_end = end - p < 64 ? end : p + 64;
        if (end - p < 64) block = memcpy(rest, p, end - p);
        uint64_t letters;
        if (ascii_letters(block, &letters)) {
            for (uint64_t edges = letters ^ (letters << 1 | (word != 0)); edges; edges &= edges - 1) {
                const uint8_t *edge = p + __builtin_ctzll(edges);
                if (word) out[count++] = hash_bytes(word, edge - word, end);
                word = word ? 0 : edge;
            }
            p = block_end;
            continue;
        }
        while (p < block_end) {
            int size = 1;
            uint8_t kind = *p < 0x80 ? kinds[*p] : kinds[decode(p, end, &size)];
            if (kind == LETTER) {
                if (!word) word = p;
            } else {
                if (word) out[count++] = hash_bytes(word, p - word, end);
                word = 0;
                if (kind == ALONE) out[count++] = hash_bytes(p, size, end);
            }
            p += size;
        }
    }
    if (word) out[count++] = hash_bytes(word, end - word, end);
    return count;
}

static inline void mix_words(uint64_t *words, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t h = 0;
        for (int64_t j = 0; j < width; j++) h = h * NEXT + words[i + j];
        words[i] = finish(h);
    }
}

/* A text's shingles of `width` words in order, one at least; in place over its words. */
static int64_t shingles_of(const uint8_t *p, const uint8_t *end, const uint8_t *kinds, int64_t width,
                           uint64_t *out) {
    int64_t words = words_of(p, end, kinds, out);
    if (words == 0) {
        out[0] = finish(hash_bytes(p, end - p, end));
        return 1;
    }
    if (width > words) width = words;
    int64_t count = words - width + 1;
    if (width == 5)
        mix_words(out, count, 5); /* a constant, for the compiler */
    else
        mix_words(out, count, width);
    return count;
}

/* Fill out [bytes / 2 + N] with the shingles of N texts; starts [N+1] says where each begins. */
void shingle_hashes(const uint8_t *bytes, const int64_t *offsets, int64_t num_texts, const uint8_t *kinds,
                    int64_t width, uint64_t *out, int64_t *starts) {
    starts[0] = 0;
    for (int64_t i = 0; i < num_texts; i++)
        starts[i + 1] = starts[i] + shingles_of(bytes + offsets[i], bytes + offsets[i + 1], kinds, width,
                                                out + starts[i]);
}

/* Sort n numbers by radix, through `other` [n] and back. */
static void sort(uint32_t *values, uint32_t *other, int64_t n) {
    if (n <= 48) {
        for (int64_t i = 1; i < n; i++) {
            uint32_t value = values[i];
            int64_t j = i;
            for (; j > 0 && values[j - 1] > value; j--) values[j] = values[j - 1];
            values[j] = value;
        }
        return;
    }
    int64_t places[4][256];
    memset(places, 0, sizeof places);
    for (int64_t i = 0; i < n; i++)
        for (int digit = 0; digit < 4; digit++) places[digit][values[i] >> (8 * digit) & 255]++;
    for (int digit = 0; digit < 4; digit++) {
        int64_t sum = 0;
        for (int value = 0; value < 256; value++) {
            int64_t count = places[digit][value];
            places[digit][value] = sum;
            sum += count;
        }
        for (int64_t i = 0; i < n; i++) other[places[digit][values[i] >> (8 * digit) & 255]++] = values[i];
        uint32_t *swap = values;
        values = other;
        other = swap;
    }
}

/* Fill out [bytes / 2 + 2 N] with each text's distinct shingles, the upper 32 bits, rising; a lone one
 * gives its lower bits too.
 * hashes [longest text's bytes / 2 + 1], other [the same]: room to work. */
void shingle_sets(const uint8_t *bytes, const int64_t *offsets, int64_t num_texts, const uint8_t *kinds,
                  int64_t width, uint64_t *hashes, uint32_t *other, uint32_t *out, int64_t *starts) {
    starts[0] = 0;
    for (int64_t i = 0; i < num_texts; i++) {
        uint32_t *set = out + starts[i];
        int64_t n = shingles_of(bytes + offsets[i], bytes + offsets[i + 1], kinds, width, hashes);
        for (int64_t j = 0; j < n; j++) set[j] = (uint32_t)(hashes[j] >> 32);
        sort(set, other, n);
        int64_t distinct = 1;
        for (int64_t j = 1; j < n; j++)
            if (set[j] != set[distinct - 1]) set[distinct++] = set[j];
        uint32_t low = (uint32_t)hashes[0];
        if (distinct == 1 && low != set[0]) {
            set[distinct++] = low < set[0] ? set[0] : low;
            set[0] = low < set[0] ? low : set[0];
        }
        starts[i + 1] = starts[i] + distinct;
    }
}

/* The least of multiply[k] * x + add[k] over each set: K hashes a set.
 * Four members a turn, so that the least values are loaded and stored once for four. */
void signatures(const uint32_t *restrict values, const int64_t *restrict starts, int64_t num_sets,
                const uint32_t *restrict multiply, const uint32_t *restrict add, int64_t num_hashes,
                uint32_t *restrict out) {
    for (int64_t i = 0; i < num_sets; i++) {
        uint32_t *restrict least = out + i * num_hashes;
        const uint32_t *set = values + starts[i];
        int64_t n = starts[i + 1] - starts[i];
        memset(least, 0xFF, sizeof(uint32_t) * num_hashes);
        for (int64_t j = 0; j < n; j += 4) {
            uint32_t a = set[j], b = set[j + 1 < n ? j + 1 : j], c = set[j + 2 < n ? j + 2 : j],
                     d = set[j + 3 < n ? j + 3 : j];
            for (int64_t k = 0; k < num_hashes; k++) {
                uint32_t m = multiply[k], p = m * a + add[k], q = m * b + add[k], r = m * c + add[k],
                         s = m * d + add[k];
                p = p < q ? p : q;
                r = r < s ? r : s;
                p = p < r ? p : r;
                least[k] = p < least[k] ? p : least[k];
            }
        }
    }
}

/* Which of M pairs of sets have at least this Jaccard similarity, exactly.
 * Sets that are far apart are left early: too many members of one that are not in the other. */
void are_near(const uint32_t *values, const int64_t *starts, const int64_t *one, const int64_t *other,
              int64_t num_pairs, double similarity, uint8_t *out) {
    for (int64_t i = 0; i < num_pairs; i++) {
        const uint32_t *a = values + starts[one[i]], *a_end = values + starts[one[i] + 1];
        const uint32_t *b = values + starts[other[i]], *b_end = values + starts[other[i] + 1];
        int64_t both = (a_end - a) + (b_end - b), steps = 0, shared = 0;
        int64_t allowed = (int64_t)(both * (1 - similarity) / (1 + similarity)) + 1;
        while (a < a_end && b < b_end && steps - shared <= allowed) {
            uint32_t x = *a, y = *b; /* no branch to guess: which is less is a coin toss */
            shared += x == y;
            steps++;
            a += x <= y;
            b += y <= x;
        }
        out[i] = steps - shared <= allowed && (double)shared / (double)(both - shared) >= similarity;
    }
}

/* How many members each of N sets shares with each of 64 query sets: out [N, 64].
 * members [M]: the queries' members, rising; owners [M]: a bit for each query that has it.
 * known [2^20]: whether any member begins with these 20 bits; most of what is looked up does not. */
void shared_counts(const uint32_t *values, const int64_t *starts, int64_t num_sets, const uint32_t *members,
                   const uint64_t *owners, int64_t num_members, const uint8_t *known, uint16_t *out) {
    for (int64_t i = 0; i < num_sets; i++, out += 64) {
        memset(out, 0, 64 * sizeof *out);
        for (int64_t j = starts[i]; j < starts[i + 1]; j++) {
            uint32_t value = values[j];
            if (!known[value >> 12]) continue;
            const uint32_t *low = members;
            for (int64_t n = num_members; n > 1; n -= n / 2) low = low[n / 2] <= value ? low + n / 2 : low;
            if (*low != value) continue;
            uint64_t owner = owners[low - members];
            for (int k = 0; k < 64; k++) out[k] += owner >> k & 1;
        }
    }
}
