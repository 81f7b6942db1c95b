/* What may be drawn from a row of logits. What is meant by all of it: kernels/sampling/sample.py.
 *
 * Nothing is sorted. What top-k, top-p and min-p keep is always the head of the order (value downwards, index
 * upwards), that is, what is above a threshold and the first few that equal it. So one or two passes of vectors
 * find a bound below which nothing can be kept, another collects what is above it, and only that (some tens
 * or thousands of values) goes through the exact selection, by a histogram of the bits of its values.
 */
#ifndef DRAWS_H
#define DRAWS_H

#include "softmax_rows.h"

enum { BINS_LOG2 = 10, BINS = 1 << BINS_LOG2, BLOCK = 1024 };
enum { TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, FACTORS };
enum { TOP_K, SEED, POSITION, DRAWN, KEYS };

static const float NONE = -__builtin_inff();

typedef struct { /* of one thread; each array has room for a row and 16 more */
    float *own, *values, *masses, *work, *work_masses;
    int32_t *places, *counts;
} scratch;

typedef struct {
    float value; /* what is above it is kept, and the first `ties` that equal it */
    long ties;
    double mass; /* of what is kept */
} threshold;

typedef struct {
    float most;
    int is_nan;
} scanned;

static uint64_t mix(uint64_t value) { /* SplitMix64 */
    value += 0x9E3779B97F4A7C15;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
}

static double uniform(uint64_t seed, uint64_t position) {
    return (mix(mix(seed) ^ (position * 0x9E3779B97F4A7C15)) >> 11) * 0x1p-53;
}

/* Sixteen values of a row; -inf beyond its end, and no -0. */
INLINE lanes values_at(const void *x, long at, long columns, int type) {
    long count = columns - at;
    if (count >= LANES) return load(x, at, type) + 0.0f;
    return only(load_part(x, at, count, type) + 0.0f, count, NONE);
}

INLINE uint32_t key_of(float x) { /* in the order of the values */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

INLINE float value_of(uint32_t key) {
    uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* The largest value, whether there is a NaN, and the largest of each group (every 16th of 16 `per_group`). */
INLINE scanned scan(const void *x, long columns, long per_group, float *maxima, int type) {
    lanes most = all(NONE);
    lanes_i32 nans = {0};
    for (long at = 0, group = 0; at < columns; group++) {
        lanes best = all(NONE);
        for (long i = 0; i < per_group && at < columns; i++, at += LANES) {
            lanes some = values_at(x, at, columns, type);
            nans |= (lanes_i32)(some != some);
            best = larger_of(some, best);
        }
        if (maxima) store(maxima, group * LANES, best, F32);
        most = larger_of(best, most);
    }
    int is_nan = 0;
    for (int i = 0; i < LANES; i++) is_nan |= nans[i];
    return (scanned){largest_of(most), is_nan != 0};
}

/* Copy what is at least `least`, in order. Returns how many. */
INLINE long gather(const void *x, long columns, float least, float *values, int32_t *places, int type) {
    long count = 0;
    lanes_i32 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (long at = 0; at < columns; at += LANES) {
        lanes some = values_at(x, at, columns, type);
        long inside = columns - at;
#ifdef __AVX512F__
        __mmask16 kept = _mm512_cmp_ps_mask((__m512)some, (__m512)all(least), _CMP_GE_OQ);
        if (inside < LANES) kept &= (1u << inside) - 1;
        if (kept) {
            _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(kept, (__m512)some));
            __m512i index = _mm512_add_epi32((__m512i)place, _mm512_set1_epi32((int)at));
            _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(kept, index));
            count += __builtin_popcount(kept);
        }
#else
        for (int i = 0; i < LANES && i < inside; i++) {
            values[count] = some[i];
            places[count] = (int32_t)at + place[i];
            count += some[i] >= least;
        }
#endif
    }
    return count;
}

/* masses = e^((value - most) / T), up to the next 16; returns their sum. */
static double weigh(const float *values, float *masses, long count, float most, float inverse) {
    double total = 0;
    for (long start = 0; start < count; start += BLOCK) {
        lanes sum = {0};
        for (long at = start; at < count && at < start + BLOCK; at += LANES) {
            lanes e = exp_below((load(values, at, F32) - most) * inverse);
            if (count - at < LANES) e = only(e, count - at, 0);
            store(masses, at, e, F32);
            sum += e;
        }
        total += sum_of(sum);
    }
    return total;
}

/* The head of the order that holds `wanted` values, or, with masses, the least that holds `mass`.
 * `values` may be `work`. Not for a count of 0, `wanted` of 0 or more than there are. */
static threshold select_head(const float *values, const float *masses, long count, long wanted, double mass,
                             float *work, float *work_masses) {
    static _Thread_local int32_t counts[BINS];
    static _Thread_local double sums[BINS];
    uint32_t high = 0, low = UINT32_MAX;
    for (long i = 0; i < count; i++) {
        uint32_t key = key_of(values[i]);
        high = key > high ? key : high;
        low = key < low ? key : low;
    }
    double above = 0; /* the mass, and the number, of what is above the bins */
    long num_above = 0;
    for (;;) {
        int bits = high == low ? 0 : 32 - __builtin_clz(high - low);
        int shift = bits > BINS_LOG2 ? bits - BINS_LOG2 : 0, last = (int)((high - low) >> shift), bin = 0;
        memset(counts, 0, (last + 1) * sizeof *counts);
        if (masses) memset(sums, 0, (last + 1) * sizeof *sums);
        for (long i = 0; i < count; i++) {
            uint32_t at = (high - key_of(values[i])) >> shift;
            counts[at]++;
            if (masses) sums[at] += masses[i];
        }
        for (; bin < last; bin++) {
            if (masses ? above + sums[bin] >= mass : num_above + counts[bin] >= wanted) break;
            above += masses ? sums[bin] : 0;
            num_above += counts[bin];
        }
        uint32_t top = high - ((uint32_t)bin << shift);
        if (shift == 0) { /* all in the bin are equal */
            threshold found = {value_of(top), wanted - num_above, above};
            if (masses) {
                double each = sums[bin] / counts[bin], ties = counts[bin];
                if (each > 0) ties = ceil((mass - above) / each);
                found.ties = ties < 1 ? 1 : ties > counts[bin] ? counts[bin] : (long)ties;
                found.mass = above + found.ties * each;
            }
            return found;
        }
        long kept = 0;
        for (long i = 0; i < count; i++)
            if ((high - key_of(values[i])) >> shift == (uint32_t)bin) {
                if (masses) work_masses[kept] = masses[i];
                work[kept++] = values[i];
            }
        values = work, count = kept;
        if (masses) masses = work_masses;
        uint32_t bottom = top - ((1u << shift) - 1);
        high = top, low = bottom > low && bottom <= top ? bottom : low;
    }
}

/* Leave what the threshold keeps, in place and in order. */
static long keep(float *values, float *masses, int32_t *places, long count, threshold limit) {
    long kept = 0, ties = limit.ties;
    for (long i = 0; i < count; i++) {
        float value = values[i];
        int is_kept = value > limit.value;
        if (value == limit.value) is_kept = ties-- > 0;
        values[kept] = value, masses[kept] = masses[i], places[kept] = places[i];
        kept += is_kept;
    }
    return kept;
}

/* A bound that at least `wanted` values of the row reach; -inf where looking for one is not worth it. */
INLINE float bound_of(const void *x, long columns, long wanted, scratch *own, scanned *found, int type) {
    long vectors = (columns + LANES - 1) / LANES, per_group = columns / (8 * wanted);
    if (per_group < 2) {
        *found = scan(x, columns, vectors, 0, type);
        return NONE;
    }
    if (per_group > 64) per_group = 64;
    *found = scan(x, columns, per_group, own->work, type);
    long groups = (vectors + per_group - 1) / per_group * LANES;
    if (found->is_nan) return NONE;
    return select_head(own->work, 0, groups, wanted, 0, own->work, 0).value;
}

/* The first place where the running sum of masses is above u times their sum. */
static long invert(const float *masses, long count, double u) {
    double total = 0, sum = 0;
    for (long i = 0; i < count; i++) total += masses[i];
    long last = 0;
    for (long i = 0; i < count; i++) {
        sum += masses[i];
        if (masses[i] > 0) last = i;
        if (sum > u * total) return i;
    }
    return last; /* a sum that was rounded down */
}

/* The same over a whole row; sums of blocks are kept, and one block is computed again. */
INLINE long invert_row(const void *x, long columns, float most, float inverse, double u, scratch *own,
                       double *total, int type) {
    double *sums = (double *)own->values;
    long blocks = (columns + BLOCK - 1) / BLOCK, block = 0;
    *total = 0;
    for (long i = 0; i < blocks; i++) {
        lanes sum[2] = {{0}};
        long end = i * BLOCK + BLOCK < columns ? i * BLOCK + BLOCK : columns;
        for (long at = i * BLOCK; at < end; at += LANES)
            sum[(at / LANES) & 1] += exp_below((values_at(x, at, columns, type) - most) * inverse);
        *total += sums[i] = sum_of(sum[0] + sum[1]);
    }
    double before = 0;
    for (long i = 0, sought = 1; i < blocks && sought; i++) {
        if (sums[i] > 0) block = i;
        if (before + sums[i] > u * *total) sought = 0;
        else before += sums[i];
    }
    float masses[BLOCK];
    long start = block * BLOCK, count = start + BLOCK < columns ? BLOCK : columns - start, last = 0;
    for (long at = 0; at < count; at += LANES) {
        lanes e = exp_below((values_at(x, start + at, columns, type) - most) * inverse);
        memcpy(masses + at, &e, sizeof e);
    }
    for (long i = 0; i < count; i++) {
        before += masses[i];
        if (masses[i] > 0) last = i;
        if (before > u * *total) return start + i;
    }
    return start + last;
}

INLINE int is_penalised(const float *factors, long count) {
    return count && (factors[REPETITION] != 1 || factors[PRESENCE] != 0 || factors[FREQUENCY] != 0);
}

/* Take from the row what the tokens of its history cost; returns the row to draw from, fp32. */
INLINE const void *penalise(const void *x, long columns, const float *factors, const int64_t *history,
                            long count, long drawn, scratch *own, int type) {
    for (long at = 0; at < columns; at += LANES) store(own->own, at, values_at(x, at, columns, type), F32);
    enum { SEEN = 1 << 30 };
    for (long i = 0; i < count; i++)
        if (history[i] >= 0 && history[i] < columns)
            own->counts[history[i]] = (own->counts[history[i]] | SEEN) + (i >= count - drawn);
    for (long i = 0; i < count; i++) {
        if (history[i] < 0 || history[i] >= columns || !own->counts[history[i]]) continue;
        int times = own->counts[history[i]] & ~SEEN;
        float *value = own->own + history[i];
        *value = *value > 0 ? *value / factors[REPETITION] : *value * factors[REPETITION];
        *value -= times * factors[FREQUENCY] + (times > 0) * factors[PRESENCE];
        own->counts[history[i]] = 0;
    }
    return own->own;
}

INLINE scanned scan_row(const void *x, long columns, int type) {
    return scan(x, columns, (columns + LANES - 1) / LANES, 0, type);
}

INLINE int is_drawable(scanned found) { return !found.is_nan && found.most > NONE && found.most < -NONE; }

INLINE int is_filtered(long columns, const float *factors, const int64_t *keys) {
    return !(factors[TEMPERATURE] > 0) || (keys[TOP_K] > 0 && keys[TOP_K] < columns) || factors[TOP_P] < 1 ||
           factors[MIN_P] > 0;
}

/* 1 / temperature, but no infinity. */
INLINE float inverse_of(float temperature) { return 1 / temperature < 1e30f ? 1 / temperature : 1e30f; }

/* Collect what may be drawn from `x`, the row with its penalties: places in order, and masses, in `own`.
 * Returns how many, 0 for a row that cannot be drawn from. */
INLINE long collect(const void *x, long columns, const float *factors, const int64_t *keys, scratch *own,
                    int type) {
    float temperature = factors[TEMPERATURE], top_p = factors[TOP_P], min_p = factors[MIN_P], least = NONE;
    int is_greedy = !(temperature > 0);
    long top_k = keys[TOP_K] > 0 && keys[TOP_K] < columns ? keys[TOP_K] : columns;
    scanned found;
    if (!is_greedy && top_k < columns) least = bound_of(x, columns, top_k, own, &found, type);
    else found = scan_row(x, columns, type);
    if (!is_drawable(found)) return 0;
    float most = found.most;
    if (is_greedy) {
        for (long at = 0;; at += LANES) {
            lanes_i32 same = (lanes_i32)(values_at(x, at, columns, type) == most);
            for (int i = 0; i < LANES; i++)
                if (same[i]) {
                    own->places[0] = (int32_t)at + i, own->masses[0] = 1;
                    return 1;
                }
        }
    }
    float inverse = inverse_of(temperature);
    double cut = min_p > 0 ? most + (double)temperature * log(min_p) : (double)NONE, mass = 0;
    if (top_k == columns && top_p < 1) {
        /* what has less than its share of the rest of the mass is beyond top-p */
        invert_row(x, columns, most, inverse, 0, own, &mass, type);
        double share = (1.0 - top_p) * mass / columns;
        least = top_p > 0 ? (float)(most + temperature * (log(share) - 1e-3)) : most;
    } else if (top_k == columns) {
        least = (float)cut; /* rounded, so look again below */
        if (least > cut) least = nextafterf(least, NONE);
    }
    long count = gather(x, columns, least, own->values, own->places, type);
    double gathered = weigh(own->values, own->masses, count, most, inverse);
    if (top_k < count) {
        threshold limit = select_head(own->values, 0, count, top_k, 0, own->work, 0);
        count = keep(own->values, own->masses, own->places, count, limit);
        gathered = 0;
        for (long i = 0; i < count; i++) gathered += own->masses[i];
    }
    if (top_p < 1) {
        double wanted = top_p * (top_k < columns ? gathered : mass);
        threshold limit = select_head(own->values, own->masses, count, 0, wanted, own->work, own->work_masses);
        count = keep(own->values, own->masses, own->places, count, limit);
    }
    if (min_p > 0) {
        long left = 0;
        for (long i = 0; i < count; i++) {
            int is_kept = own->values[i] >= cut || own->values[i] == most;
            own->values[left] = own->values[i], own->masses[left] = own->masses[i];
            own->places[left] = own->places[i];
            left += is_kept;
        }
        count = left;
    }
    return count;
}

/* Returns the token, -1 for a row that cannot be drawn from, and among how many it was drawn. */
INLINE long draw(const void *x, long columns, const float *factors, const int64_t *keys, scratch *own,
                 long *kept, int type) {
    double u = uniform((uint64_t)keys[SEED], (uint64_t)keys[POSITION]), mass;
    if (is_filtered(columns, factors, keys)) {
        *kept = collect(x, columns, factors, keys, own, type);
        return *kept ? own->places[invert(own->masses, *kept, u)] : -1;
    }
    scanned found = scan_row(x, columns, type);
    *kept = is_drawable(found) ? columns : 0;
    if (!*kept) return -1;
    return invert_row(x, columns, found.most, inverse_of(factors[TEMPERATURE]), u, own, &mass, type);
}

/* `memory` [threads, 6, stride], `counts` [threads, columns] of zeros where there is a history. */
static scratch scratch_of(float *memory, int32_t *counts, long thread, long columns, long stride) {
    float *from = memory + thread * 6 * stride;
    return (scratch){from, from + stride, from + 2 * stride, from + 3 * stride, from + 4 * stride,
                     (int32_t *)(from + 5 * stride), counts + thread * columns};
}

#endif
