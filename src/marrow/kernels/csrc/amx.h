/* Products of 8-bit integers summed in 32 bits: AMX tiles where the CPU has them and the kernel lends them,
 * VNNI lanes next, plain C anywhere. All three give the same integers, for no sum of 4 products overflows.
 *
 * A tile product is C [16 x 16] += A [16 x 64 bytes] B [16 x 64 bytes], B in dwords of 4 consecutive k:
 * row r of B holds k = 4r .. 4r+3 of 16 columns.
 */
#ifndef AMX_H
#define AMX_H

#include "lanes.h"

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

typedef uint8_t bytes __attribute__((vector_size(64)));
typedef int8_t signed_bytes __attribute__((vector_size(64)));

INLINE bytes load_bytes(const void *from) {
    bytes x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store_bytes(void *to, bytes x) { memcpy(to, &x, sizeof x); }

/* sums + the dot products of 16 dwords of unsigned bytes with 4 signed bytes, the same for all lanes. */
INLINE lanes_i32 dot_bytes(lanes_i32 sums, bytes left, int32_t right) {
#ifdef __AVX512VNNI__
    return (lanes_i32)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)left, _mm512_set1_epi32(right));
#else
    int8_t four[4];
    memcpy(four, &right, 4);
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) sums[lane] += left[4 * lane + i] * four[i];
    return sums;
#endif
}

INLINE int32_t dword_at(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return four;
}

/* To the nearest integer, ties to even; |x| below 2^22. The barrier keeps a product from being fused with the sum
 * that rounds: what is rounded is the product in fp32, as in any other program. */
INLINE lanes_i32 round_off(lanes x) {
#ifdef __AVX512F__
    return (lanes_i32)_mm512_cvtps_epi32((__m512)x);
#else
    __asm__("" : "+m"(x));
    return (lanes_i32)(x + 12582912.0f) - 0x4B400000; /* 1.5 x 2^23 */
#endif
}

INLINE lanes to_float(lanes_i32 x) { return __builtin_convertvector(x, lanes); }

/* fp16 to fp32, exact; no infinities. */
INLINE lanes load_half(const uint16_t *from) {
    lanes_u16 half;
    memcpy(&half, from, sizeof half);
    lanes_u32 bits = __builtin_convertvector(half, lanes_u32);
    lanes size = (lanes)((bits & 0x7FFF) << 13) * 0x1p112f; /* the exponents' offsets differ by 112 */
    return (lanes)((lanes_u32)size | (bits & 0x8000) << 16);
}

typedef uint8_t few_bytes __attribute__((vector_size(16)));
typedef int8_t few_signed __attribute__((vector_size(16)));

/* In two steps where there is no instruction: GCC takes the lanes one by one to make them four times as wide. */
INLINE lanes_i32 widen_bytes(few_bytes x) {
#ifdef __AVX512F__
    return (lanes_i32)_mm512_cvtepu8_epi32((__m128i)x);
#else
    return (lanes_i32)__builtin_convertvector(__builtin_convertvector(x, lanes_u16), lanes_u32);
#endif
}

INLINE lanes_i32 widen_signed(few_signed x) {
#ifdef __AVX512F__
    return (lanes_i32)_mm512_cvtepi8_epi32((__m128i)x);
#else
    typedef int16_t lanes_i16 __attribute__((vector_size(32)));
    return __builtin_convertvector(__builtin_convertvector(x, lanes_i16), lanes_i32);
#endif
}

INLINE few_bytes load_few(const void *from) {
    few_bytes x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE lanes load_small(const uint8_t *from) { return to_float(widen_bytes(load_few(from))); }

/* Rows whose number lacks `half` (a constant) give their other half to those that have it, and take theirs. */
INLINE void exchange(lanes_i32 *rows, const int half) {
    lanes_i32 upper, lower;
    for (int j = 0; j < LANES; j++) upper[j] = j & half ? 16 + (j ^ half) : j;
    for (int j = 0; j < LANES; j++) lower[j] = j & half ? 16 + j : j ^ half;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (i & half) continue;
        lanes_i32 a = rows[i], b = rows[i + half];
        rows[i] = __builtin_shuffle(a, b, upper);
        rows[i + half] = __builtin_shuffle(a, b, lower);
    }
}

INLINE void transpose(lanes_i32 *rows) {
    exchange(rows, 8);
    exchange(rows, 4);
    exchange(rows, 2);
    exchange(rows, 1);
}

#if HAS_AMX
/* Linux lends the tiles on demand, once a process; 0 where it does not. */
__attribute__((unused)) static int has_tiles(void) {
    static int known; /* 0 not asked, 1 no, 2 yes: two threads that ask get the same answer */
    if (!known) known = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0 ? 2 : 1;
    return known == 2;
}

/* All eight tiles alike: 16 rows of 64 bytes; tiles 4 to 7 hold A, of `k` bytes a row, and B, of k/4 rows. */
__attribute__((unused)) static void configure_tiles(int k) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } configuration __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        configuration.row_bytes[tile] = tile == 4 || tile == 5 ? k : 64;
        configuration.rows[tile] = tile == 6 || tile == 7 ? k / 4 : 16;
    }
    _tile_loadconfig(&configuration);
}
#else
__attribute__((unused)) static int has_tiles(void) { return 0; }
#endif

#endif
