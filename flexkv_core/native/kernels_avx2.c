/* CRC32C and copies with AVX2 and VPCLMULQDQ: kernels_avx512.c in words of 32 bytes. See there for the algorithm and the names. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,vpclmulqdq,pclmul,sse4.2")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum move { NONE, CACHED, STREAM };
enum crc { WITHOUT, OF_COPY };

#define LANE_BYTES 4096
#define BURST_BYTES 256 /* of one lane, before the other's turn */
#define AHEAD_BYTES 256
#define AHEAD_CRC_BYTES 4096
/* Measured on 16 KiB pieces at random places, past the caches, as ratios of gather and scatter to a contiguous memcpy (EPYC family 25
 * model 1, 2 cores, 2026). Copies: words of 16 bytes, two lanes that take turns line by line .84 and .87, words of 32 bytes .89 and .92,
 * in bursts prefetched one burst ahead 1.02 and 1.05; four lanes .35, which is more lines half written than the processor holds back.
 * With checksums: words of 16 bytes .63 and .65, two lanes in bursts .80 and .90, one lane prefetched a page ahead .85 and .96: folding
 * fills the window of instructions under way, so that loads must find their lines near. */

/* The powers of one folding distance, for both lanes of a register. */
#define POWERS(high, low) _mm256_set_epi64x(high, low, high, low)
#define BY_16 _mm_set_epi64x(0x14cd00bd6, 0xf20c0dfe)
#define BY_32 POWERS(0xba4fc28e, 0x1384aa63a)
#define BY_64 POWERS(0x9e4addf8, 0x740eef02)

/* A piece under way. */
typedef struct {
    uint8_t *to;
    const uint8_t *from;
    const uint8_t *next; /* where the bytes to be read after this piece begin */
    size_t n;
    __m256i x;    /* CRC of what was read, folded onto the 32 bytes before the next ones */
    __m256i seed; /* the state to begin with, where nothing was read yet; else zero */
} piece;

/* Two neighbouring words. */
typedef struct {
    __m256i word[2];
} line;

INLINE __m256i load(const uint8_t *at) { return _mm256_loadu_si256((const __m256i *)at); }

INLINE void prefetch(const uint8_t *at, enum crc crc) {
    if (crc == WITHOUT)
        _mm_prefetch((const char *)at, _MM_HINT_T0);
    else
        _mm_prefetch((const char *)at, _MM_HINT_NTA);
}

INLINE __m256i fold(__m256i x, __m256i powers, __m256i data) {
    return _mm256_xor_si256(
        data, _mm256_xor_si256(_mm256_clmulepi64_epi128(x, powers, 0x00), _mm256_clmulepi64_epi128(x, powers, 0x11)));
}

/* Copies 32 bytes; returns those to be folded in. */
INLINE __m256i word(const piece *p, size_t at, enum move move) {
    __m256i data = load(p->from + at);
    if (move == CACHED)
        _mm256_storeu_si256((__m256i *)(p->to + at), data);
    if (move == STREAM)
        _mm256_stream_si256((__m256i *)(p->to + at), data);
    return data;
}

INLINE line words_of_line(const piece *p, size_t at, enum move move) { return (line){{word(p, at, move), word(p, at + 32, move)}}; }

INLINE line fold_line(line x, line data) {
    return (line){{fold(x.word[0], BY_64, data.word[0]), fold(x.word[1], BY_64, data.word[1])}};
}

INLINE __m256i join_line(line x) { return fold(x.word[0], BY_32, x.word[1]); }

INLINE void advance(piece *p, size_t n) { p->to += n, p->from += n, p->n -= n; }

INLINE void folded(piece *p, __m256i x) { p->x = x, p->seed = _mm256_setzero_si256(); }

/* Folds what was read so far onto the next 32 bytes. */
INLINE __m256i resume(const piece *p, __m256i data) { return fold(p->x, BY_32, _mm256_xor_si256(data, p->seed)); }

/* Copies a line; returns x, the CRC of the line before it, folded onto it. */
INLINE line step(piece *p, size_t at, line x, enum move move, enum crc crc) {
    line y = words_of_line(p, at, move);
    if (crc == WITHOUT)
        return x;
    if (at == 0)
        y.word[0] = _mm256_xor_si256(y.word[0], p->seed);
    return fold_line(x, y);
}

/* What was read so far, as if it were the line before the next one. */
INLINE line before(const piece *p) { return (line){{_mm256_setzero_si256(), p->x}}; }

/* One lane of LANE_BYTES with a CRC; without, two side by side. */
INLINE void lanes(piece *p, enum move move, enum crc crc) {
    const size_t all = crc == WITHOUT ? 2 * LANE_BYTES : LANE_BYTES, far = crc == WITHOUT ? AHEAD_BYTES : AHEAD_CRC_BYTES;
    const uint8_t *next = p->n > all ? p->from + all : p->next;
    for (size_t lane = 0; lane < all; lane += LANE_BYTES)
        prefetch(next + lane, crc); /* translating an address takes as long as a miss: begin early */
    line x = before(p);
    for (size_t at = 0; at < LANE_BYTES; at += BURST_BYTES) {
        const uint8_t *ahead = at + far < LANE_BYTES ? p->from + at + far : next + (at + far - LANE_BYTES);
#pragma GCC unroll 4
        for (size_t i = 0; i < BURST_BYTES; i += 64)
            for (size_t lane = 0; lane < all; lane += LANE_BYTES)
                prefetch(ahead + lane + i, crc);
        for (size_t lane = 0; lane < all; lane += LANE_BYTES)
#pragma GCC unroll 4
            for (size_t i = 0; i < BURST_BYTES; i += 64)
                x = step(p, lane + at + i, x, move, crc);
    }
    if (crc != WITHOUT)
        folded(p, join_line(x));
    advance(p, all);
}

/* Lines of 64 bytes, as far as they go; at least one. */
INLINE void lines(piece *p, enum move move, enum crc crc) {
    line x = before(p);
    size_t at = 0;
    for (; p->n - at >= 64; at += 64) {
        size_t left = p->n - at;
        prefetch(left > AHEAD_CRC_BYTES ? p->from + at + AHEAD_CRC_BYTES : p->next + (AHEAD_CRC_BYTES - left), crc);
        x = step(p, at, x, move, crc);
    }
    if (crc != WITHOUT)
        folded(p, join_line(x));
    advance(p, at);
}

INLINE uint32_t reduce(__m256i x) {
    __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
    __m128i sum = _mm_xor_si128(
        high, _mm_xor_si128(_mm_clmulepi64_si128(low, BY_16, 0x00), _mm_clmulepi64_si128(low, BY_16, 0x11)));
    uint64_t state = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(sum));
    return (uint32_t)_mm_crc32_u64(state, (uint64_t)_mm_extract_epi64(sum, 1));
}

/* All whole words of 32 bytes. */
INLINE uint32_t words(piece *p, uint32_t state, enum move move, enum crc crc) {
    if (p->n < 32)
        return state;
    p->x = _mm256_setzero_si256();
    p->seed = _mm256_zextsi128_si256(_mm_cvtsi32_si128((int)state));
    while (p->n >= (crc == WITHOUT ? 2 : 1) * LANE_BYTES)
        lanes(p, move, crc);
    if (p->n >= 64)
        lines(p, move, crc);
    if (p->n >= 32) {
        __m256i data = word(p, 0, move);
        if (crc != WITHOUT)
            folded(p, resume(p, data));
        advance(p, 32);
    }
    return crc != WITHOUT ? reduce(p->x) : state;
}

/* The first n < 64 bytes. */
INLINE uint32_t bytes(piece *p, size_t n, uint32_t state, enum move move, enum crc crc) {
    if (move != NONE)
        memcpy(p->to, p->from, n);
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
    if (move == STREAM && head) /* streaming stores fill whole lines, or memory is written twice */
        state = bytes(&p, head < p.n ? head : p.n, state, CACHED, crc);
    state = words(&p, state, move, crc);
    return p.n ? bytes(&p, p.n, state, move, crc) : state;
}

#include "kernels_entries.h"

const fk_kernels fk_kernels_avx2 = {"avx2", crc_only, copy, stream, copy_crc, stream_crc, fence};
#endif
