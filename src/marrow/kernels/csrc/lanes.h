/* Sixteen fp32 numbers at a time, in GCC's vector extensions: any CPU, one register with AVX-512.
 *
 * Operators compute in fp32 and keep fp32 or bf16 in memory: load() and store() take the type as a flag that
 * is constant where they are inlined. A row's rest of fewer than 16 goes through load_part() and store_part().
 */
#ifndef LANES_H
#define LANES_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define LANES 16
#define STREAMED_BYTES (32L << 20)
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(64)));
typedef int32_t lanes_i32 __attribute__((vector_size(64)));
typedef uint32_t lanes_u32 __attribute__((vector_size(64)));
typedef uint16_t lanes_u16 __attribute__((vector_size(32)));

enum { F32 = 0, BF16 = 1 }; /* of memory */

/* Where element `at` of a tensor lies. */
INLINE const void *elements(const void *start, long at, int type) {
    return (const char *)start + at * (type == BF16 ? 2 : 4);
}

INLINE lanes all(float x) { return (lanes){0} + x; }

INLINE float bf16_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE lanes widen(lanes_u16 half) {
#ifdef __AVX512F__ /* PERF: GCC 12 makes five instructions of the conversion below, for this one */
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#else
    lanes_u32 bits = __builtin_convertvector(half, lanes_u32) << 16;
    return (lanes)bits;
#endif
}

/* To bf16, ties to even; a NaN stays one. */
INLINE lanes_u16 narrow(lanes x) {
#ifdef __AVX512BF16__
    return (lanes_u16)_mm512_cvtneps_pbh((__m512)x);
#else
    lanes_u32 bits = (lanes_u32)x;
    lanes_u32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    lanes_u32 is_nan = (lanes_u32)(x != x);
    return __builtin_convertvector((rounded & ~is_nan) | ((bits >> 16 | 0x40) & is_nan), lanes_u16);
#endif
}

INLINE lanes load(const void *from, long at, int type) {
    if (type == BF16) {
        lanes_u16 half;
        memcpy(&half, (const uint16_t *)from + at, sizeof half);
        return widen(half);
    }
    lanes x;
    memcpy(&x, (const float *)from + at, sizeof x);
    return x;
}

INLINE void store(void *to, long at, lanes x, int type) {
    if (type == BF16) {
        lanes_u16 half = narrow(x);
        memcpy((uint16_t *)to + at, &half, sizeof half);
    } else {
        memcpy((float *)to + at, &x, sizeof x);
    }
}

/* The first `count` < 16 of 16; the others are 0. */
INLINE lanes load_part(const void *from, long at, long count, int type) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __mmask16 some = (__mmask16)((1u << count) - 1);
    if (type == BF16) return widen((lanes_u16)_mm256_maskz_loadu_epi16(some, (const uint16_t *)from + at));
    return (lanes)_mm512_maskz_loadu_ps(some, (const float *)from + at);
#else
    if (type == BF16) {
        uint16_t half[LANES] = {0};
        memcpy(half, (const uint16_t *)from + at, count * 2);
        return load(half, 0, BF16);
    }
    float x[LANES] = {0};
    memcpy(x, (const float *)from + at, count * 4);
    return load(x, 0, F32);
#endif
}

INLINE void store_part(void *to, long at, long count, lanes x, int type) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __mmask16 some = (__mmask16)((1u << count) - 1);
    if (type == BF16) _mm256_mask_storeu_epi16((uint16_t *)to + at, some, (__m256i)narrow(x));
    else _mm512_mask_storeu_ps((float *)to + at, some, (__m512)x);
#else
    if (type == BF16) {
        uint16_t half[LANES];
        store(half, 0, x, BF16);
        memcpy((uint16_t *)to + at, half, count * 2);
    } else {
        memcpy((float *)to + at, &x, count * 4);
    }
#endif
}

/* Sixteen, or the `count` that are left of a row: for loops that count down to its end. */
INLINE lanes load_some(const void *from, long at, long count, int type) {
    return count >= LANES ? load(from, at, type) : load_part(from, at, count, type);
}

INLINE void store_some(void *to, long at, long count, lanes x, int type) {
    if (count >= LANES) store(to, at, x, type);
    else store_part(to, at, count, x, type);
}

/* Thirty-two at a time: a cache line of bf16, and two chains for the processor to overlap. */
typedef struct {
    lanes low, high;
} pair;

INLINE pair load_pair(const void *from, long at, long count, int type) {
    if (count >= 2 * LANES) return (pair){load(from, at, type), load(from, at + LANES, type)};
    if (count <= LANES) return (pair){load_some(from, at, count, type), all(0)};
    return (pair){load(from, at, type), load_part(from, at + LANES, count - LANES, type)};
}

/* `is_streamed`: whole lines go past the caches to memory; see streamed(). */
INLINE void store_pair(void *to, long at, long count, pair x, int type, int is_streamed) {
    if (count < 2 * LANES) {
        store_some(to, at, count, x.low, type);
        if (count > LANES) store_part(to, at + LANES, count - LANES, x.high, type);
        return;
    }
#ifdef __AVX512F__
    if (type == BF16) {
#ifdef __AVX512BF16__
        __m512i line = (__m512i)_mm512_cvtne2ps_pbh((__m512)x.high, (__m512)x.low);
#else
        __m512i line = _mm512_castsi256_si512((__m256i)narrow(x.low));
        line = _mm512_inserti64x4(line, (__m256i)narrow(x.high), 1);
#endif
        if (is_streamed) _mm512_stream_si512((void *)((uint16_t *)to + at), line);
        else _mm512_storeu_si512((uint16_t *)to + at, line);
        return;
    }
    if (is_streamed) {
        _mm512_stream_ps((float *)to + at, (__m512)x.low);
        _mm512_stream_ps((float *)to + at + LANES, (__m512)x.high);
        return;
    }
#endif
    store(to, at, x.low, type);
    store(to, at + LANES, x.high, type);
}

/* Whether rows of a result are streamed: more bytes than caches hold, which nobody would find there later,
 * and rows of whole lines. It saves reading each line before it is overwritten.
 * PERF: one core, bf16: SwiGLU 4096 x 11008 takes 0.80x of the time, backward with it 0.72x, add_rms_norm of
 * 8192 x 4096 0.79x. Where the result fits a cache, it and the operator that reads it next take 1.6x. */
INLINE int streamed(const void *to, long rows, long columns, int type) {
    long row_bytes = columns * (type == BF16 ? 2 : 4);
    return rows * row_bytes >= STREAMED_BYTES && row_bytes % 64 == 0 && (uintptr_t)to % 64 == 0;
}

/* Streamed stores are in memory before other threads go on. */
INLINE void finish_stores(void) {
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

/* Ask for the lines of a pair; harmless behind the end of a tensor. Streamed stores leave the processor's own
 * prefetching idle: without this they would be slower than plain ones. */
INLINE void prefetch_pair(const void *from, long at, int type) {
    __builtin_prefetch(elements(from, at, type));
    if (type != BF16) __builtin_prefetch(elements(from, at + LANES, type));
}

INLINE lanes blend(lanes_i32 mask, lanes yes, lanes no) {
    return (lanes)(((lanes_i32)yes & mask) | ((lanes_i32)no & ~mask));
}

INLINE lanes larger(lanes a, lanes b) { return blend((lanes_i32)(a > b), a, b); }

INLINE float sum_of(lanes x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x); /* PERF: one by one, rms_norm of rows of 192 takes 1.1x */
#else
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
#endif
}

INLINE float largest_of(lanes x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* e^x to 1 ulp or so: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 in r, times 2^n.
 * 0 below -87.34 (no subnormal results), infinite above 88.72, NaN for NaN. */
INLINE lanes exp_of(lanes x) {
    const float least = -87.33655f;
#ifdef __AVX512F__
    lanes clipped = (lanes)_mm512_min_ps((__m512)all(89.5f), (__m512)x); /* NaN: the second */
    clipped = (lanes)_mm512_max_ps((__m512)all(-89.5f), (__m512)clipped);
    lanes n = (lanes)_mm512_roundscale_ps((__m512)(clipped * 1.44269504f), 0);
#else
    const float most = 88.72284f;
    lanes clipped = blend((lanes_i32)(x > most), all(most), x);
    clipped = blend((lanes_i32)(x < least), all(least), clipped);
    lanes n = clipped * 1.44269504f + 12582912.0f - 12582912.0f; /* 1.5 x 2^23: adding it rounds */
#endif
    lanes r = clipped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    lanes p = all(1.38145406e-3f);
    p = p * r + 8.36874545e-3f;
    p = p * r + 4.16683890e-2f;
    p = p * r + 1.66665211e-1f;
    p = p * r + 0.499999940f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#ifdef __AVX512F__
    __mmask16 lives = _mm512_cmp_ps_mask((__m512)x, (__m512)all(least), _CMP_NLT_UQ);
    return (lanes)_mm512_maskz_scalef_ps(lives, (__m512)p, (__m512)n);
#else
    lanes_i32 power = __builtin_convertvector(n, lanes_i32);
    /* in two halves, for 2^128 has no float of its own */
    lanes_i32 half = power >> 1;
    lanes result = p * (lanes)((half + 127) << 23) * (lanes)((power - half + 127) << 23);
    result = blend((lanes_i32)(x < least), all(0), result);
    return blend((lanes_i32)(x > most), all(__builtin_inff()), result);
#endif
}

/* 1 / x to 1 ulp or so; x normal and below 2^126, or infinite or NaN. */
INLINE lanes reciprocal_of(lanes x) {
#ifdef __AVX512F__
    lanes y = (lanes)_mm512_rcp14_ps((__m512)x); /* to 2^-14; Newton's step squares the error */
    lanes better = y + y * (1.0f - x * y);
    __mmask16 special = _mm512_cmp_ps_mask((__m512)y, (__m512)all(0), _CMP_EQ_OQ);
    return (lanes)_mm512_mask_mov_ps((__m512)better, special, (__m512)y);
#else
    return 1.0f / x;
#endif
}

/* 1 / (1 + e^-x), to 3 ulp of fp32 or, for results in bf16, to 2^-13. */
INLINE lanes sigmoid_of(lanes x, int type) {
#ifdef __AVX512DQ__
    if (type == BF16) { /* PERF: half the instructions; in cache SwiGLU takes 0.48x of the time */
        __m512 t = (__m512)(x * -1.44269504f); /* 2^t = 2^floor(t) 2^f, 0 <= f < 1, also for infinite t */
        lanes f = (lanes)_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
        lanes p = all(1.35341669e-2f);
        p = p * f + 5.20114638e-2f;
        p = p * f + 2.41442755e-1f;
        p = p * f + 6.93003833e-1f;
        p = p * f + 1.0f;
        return (lanes)_mm512_rcp14_ps((__m512)(1.0f + (lanes)_mm512_scalef_ps((__m512)p, t)));
    }
#endif
    return reciprocal_of(1.0f + exp_of(-x));
}

/* tanh, to 3 ulp of fp32 or, for results in bf16, to 2^-12: a polynomial near 0, where the rest cancels. */
INLINE lanes tanh_of(lanes x, int type) {
    lanes square = x * x;
    lanes p = all(-5.90586476e-3f);
    p = p * square + 2.08053812e-2f;
    p = p * square - 5.37866838e-2f;
    p = p * square + 1.33319587e-1f;
    p = p * square - 3.33332986e-1f;
    lanes near = x + x * square * p;
    lanes far = 2.0f * sigmoid_of(2.0f * x, type) - 1.0f;
    return blend((lanes_i32)(square < 0.36f), near, far);
}

#endif
