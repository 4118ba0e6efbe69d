/* CRC32C and copies with AVX-512 and VPCLMULQDQ.
 *
 * CRC by folding (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009): a 128-bit lane moved D bits
 * ahead is its low half times x^(D+32) plus its high half times x^(D-32), mod P. Constants are those powers mod P, reflected and shifted
 * left by one; the tests derive them again. The last 16 bytes go through the processor's own crc32 instruction, which saves the
 * Barrett reduction.
 *
 * Every loop does the same with what it is given: it copies `from` to `to` unless move is NONE, and takes the CRC of what it reads
 * (OF_COPY). Both choices are constants where the loops are inlined.
 */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,vpclmulqdq,pclmul,sse4.2,bmi2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum move { NONE, CACHED, STREAM };
enum crc { WITHOUT, OF_COPY };

/* Long pieces are copied as two pages side by side: two streams of loads keep more of the memory's banks busy than one. */
#define LANE_BYTES 4096
/* How far ahead of the loads lines are prefetched, in each of the two lanes and in the one stream that copies what is shorter. */
#define LANE_AHEAD_BYTES 2048
#define AHEAD_BYTES 4096
/* Measured on 16 KiB pieces at random places, past the caches, as ratio to a contiguous memcpy (Xeon family 6 model 207, 2 cores,
 * 2026): one stream .87, two lanes .91, lanes and prefetch into the second level .97. The second level tracks 48 misses, the first 16. */

/* The powers of one folding distance, for all lanes of a register. */
#define POWERS(high, low) _mm512_set4_epi64(high, low, high, low)
#define BY_64 POWERS(0x9e4addf8, 0x740eef02)
#define BY_128 POWERS(0xd3b6092, 0x6992cea2)
#define BY_256 POWERS(0xb9e02b86, 0xdcb17aa4)
#define BY_LANE POWERS(0x18714ea86, 0xc2a5b65e)

/* A piece under way. */
typedef struct {
    uint8_t *to;
    const uint8_t *from;
    const uint8_t *next; /* where the bytes to be read after this piece begin */
    size_t n;
    __m512i x;    /* CRC of what was read, folded onto the 64 bytes before the next ones */
    __m512i seed; /* the state to begin with, where nothing was read yet; else zero */
} piece;

INLINE __m512i load(const uint8_t *at) { return _mm512_loadu_si512(at); }

INLINE void prefetch(const uint8_t *at) { _mm_prefetch((const char *)at, _MM_HINT_T1); }

INLINE __m512i fold(__m512i x, __m512i powers, __m512i data) {
    __m512i low = _mm512_clmulepi64_epi128(x, powers, 0x00);
    __m512i high = _mm512_clmulepi64_epi128(x, powers, 0x11);
    return _mm512_ternarylogic_epi64(low, high, data, 0x96); /* three-way xor */
}

/* Copies 64 bytes; returns those to be folded in. */
INLINE __m512i word(const piece *p, size_t at, enum move move) {
    __m512i data = load(p->from + at);
    if (move == CACHED)
        _mm512_storeu_si512(p->to + at, data);
    if (move == STREAM)
        _mm512_stream_si512((__m512i *)(p->to + at), data);
    return data;
}

INLINE void advance(piece *p, size_t n) { p->to += n, p->from += n, p->n -= n; }

INLINE void folded(piece *p, __m512i x) { p->x = x, p->seed = _mm512_setzero_si512(); }

/* Folds what was read so far onto the next 64 bytes. */
INLINE __m512i resume(const piece *p, __m512i data) { return fold(p->x, BY_64, _mm512_xor_si512(data, p->seed)); }

/* Two lanes of LANE_BYTES. */
INLINE void lanes(piece *p, enum move move, enum crc crc) {
    const uint8_t *next = p->n > 2 * LANE_BYTES ? p->from + 2 * LANE_BYTES : p->next;
    prefetch(next), prefetch(next + LANE_BYTES); /* translating an address takes as long as a miss: begin a whole step early */
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, b0 = a0, b1 = a0;
    for (size_t at = 0; at < LANE_BYTES; at += 128) {
        size_t then = at + LANE_AHEAD_BYTES;
        const uint8_t *ahead = then < LANE_BYTES ? p->from + then : next + (then - LANE_BYTES);
        prefetch(ahead), prefetch(ahead + 64);
        prefetch(ahead + LANE_BYTES), prefetch(ahead + LANE_BYTES + 64);
        __m512i c0 = word(p, at, move), c1 = word(p, at + 64, move);
        __m512i d0 = word(p, at + LANE_BYTES, move), d1 = word(p, at + LANE_BYTES + 64, move);
        if (crc != WITHOUT && at == 0)
            a0 = resume(p, c0), a1 = c1, b0 = d0, b1 = d1;
        else if (crc != WITHOUT)
            a0 = fold(a0, BY_128, c0), a1 = fold(a1, BY_128, c1), b0 = fold(b0, BY_128, d0), b1 = fold(b1, BY_128, d1);
    }
    if (crc != WITHOUT)
        folded(p, fold(fold(a0, BY_64, a1), BY_LANE, fold(b0, BY_64, b1)));
    advance(p, 2 * LANE_BYTES);
}

/* Four words of 64 bytes at a time, as far as they go; at least once. */
INLINE void quads(piece *p, enum move move, enum crc crc) {
    __m512i x0 = _mm512_setzero_si512(), x1 = x0, x2 = x0, x3 = x0;
    size_t at = 0;
    for (; p->n - at >= 256; at += 256) {
        size_t left = p->n - at;
        const uint8_t *ahead = left > AHEAD_BYTES ? p->from + at + AHEAD_BYTES : p->next + (AHEAD_BYTES - left);
        prefetch(ahead), prefetch(ahead + 64), prefetch(ahead + 128), prefetch(ahead + 192);
        __m512i y0 = word(p, at, move), y1 = word(p, at + 64, move);
        __m512i y2 = word(p, at + 128, move), y3 = word(p, at + 192, move);
        if (crc != WITHOUT && at == 0)
            x0 = resume(p, y0), x1 = y1, x2 = y2, x3 = y3;
        else if (crc != WITHOUT)
            x0 = fold(x0, BY_256, y0), x1 = fold(x1, BY_256, y1), x2 = fold(x2, BY_256, y2), x3 = fold(x3, BY_256, y3);
    }
    if (crc != WITHOUT)
        folded(p, fold(fold(fold(x0, BY_64, x1), BY_64, x2), BY_64, x3));
    advance(p, at);
}

INLINE uint32_t reduce(__m512i x) {
    /* Lanes 0, 1, 2 move ahead by 384, 256, 128 bits onto lane 3. */
    const __m512i powers = _mm512_set_epi64(0, 0, 0x14cd00bd6, 0xf20c0dfe, 0xba4fc28e, 0x1384aa63a, 0x1d82c63da, 0x1c291d04);
    __m512i moved = _mm512_xor_si512(_mm512_clmulepi64_epi128(x, powers, 0x00), _mm512_clmulepi64_epi128(x, powers, 0x11));
    __m128i sum = _mm_xor_si128(
        _mm_xor_si128(_mm512_extracti32x4_epi32(moved, 0), _mm512_extracti32x4_epi32(moved, 1)),
        _mm_xor_si128(_mm512_extracti32x4_epi32(moved, 2), _mm512_extracti32x4_epi32(x, 3)));
    uint64_t state = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(sum));
    return (uint32_t)_mm_crc32_u64(state, (uint64_t)_mm_extract_epi64(sum, 1));
}

/* All whole words of 64 bytes. */
INLINE uint32_t words(piece *p, uint32_t state, enum move move, enum crc crc) {
    if (p->n < 64)
        return state;
    p->x = _mm512_setzero_si512();
    p->seed = _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state));
    while (p->n >= 2 * LANE_BYTES)
        lanes(p, move, crc);
    if (p->n >= 256)
        quads(p, move, crc);
    for (; p->n >= 64; advance(p, 64)) {
        __m512i data = word(p, 0, move);
        if (crc != WITHOUT)
            folded(p, resume(p, data));
    }
    return crc != WITHOUT ? reduce(p->x) : state;
}

/* The first n < 64 bytes. */
INLINE uint32_t bytes(piece *p, size_t n, uint32_t state, enum move move, enum crc crc) {
    __mmask64 mask = _bzhi_u64(~0ull, (unsigned)n);
    if (move != NONE)
        _mm512_mask_storeu_epi8(p->to, mask, _mm512_maskz_loadu_epi8(mask, p->from));
    const uint8_t *read = move != NONE ? p->to : p->from; /* of the very bytes that were stored */
    size_t at = 0;
    for (; crc != WITHOUT && n - at >= 8; at += 8) {
        uint64_t eight;
        memcpy(&eight, read + at, 8);
        state = (uint32_t)_mm_crc32_u64(state, eight);
    }
    for (; crc != WITHOUT && at < n; at++)
        state = _mm_crc32_u8(state, read[at]);
    advance(p, n);
    return state;
}

INLINE uint32_t run(piece p, uint32_t state, enum move move, enum crc crc) {
    size_t head = (size_t)(-(uintptr_t)p.to & 63);
    if (move == STREAM && head) /* streaming stores need an aligned target */
        state = bytes(&p, head < p.n ? head : p.n, state, CACHED, crc);
    state = words(&p, state, move, crc);
    return p.n ? bytes(&p, p.n, state, move, crc) : state;
}

#include "kernels_entries.h"

const fk_kernels fk_kernels_avx512 = {"avx512", crc_only, copy, stream, copy_crc, stream_crc, fence};
#endif
