/* CRC32C and copies with SSE4.2 and PCLMULQDQ: kernels_avx512.c in words of 16 bytes. See there for the algorithm and the names. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("sse4.2,pclmul")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum move { NONE, CACHED, STREAM };
enum crc { WITHOUT, OF_COPY };

#define LANE_BYTES 4096
#define LANE_AHEAD_BYTES 2048
#define AHEAD_BYTES 4096

#define BY_16 _mm_set_epi64x(0x14cd00bd6, 0xf20c0dfe)
#define BY_64 _mm_set_epi64x(0x9e4addf8, 0x740eef02)
#define BY_LANE _mm_set_epi64x(0x18714ea86, 0xc2a5b65e)

/* A piece under way. */
typedef struct {
    uint8_t *to;
    const uint8_t *from;
    const uint8_t *next; /* where the bytes to be read after this piece begin */
    size_t n;
    __m128i x;    /* CRC of what was read, folded onto the 16 bytes before the next ones */
    __m128i seed; /* the state to begin with, where nothing was read yet; else zero */
} piece;

/* Four neighbouring words. */
typedef struct {
    __m128i word[4];
} line;

INLINE __m128i load(const uint8_t *at) { return _mm_loadu_si128((const __m128i *)at); }

INLINE void prefetch(const uint8_t *at) { _mm_prefetch((const char *)at, _MM_HINT_T1); }

INLINE __m128i fold(__m128i x, __m128i powers, __m128i data) {
    return _mm_xor_si128(data, _mm_xor_si128(_mm_clmulepi64_si128(x, powers, 0x00), _mm_clmulepi64_si128(x, powers, 0x11)));
}

/* Copies 16 bytes; returns those to be folded in. */
INLINE __m128i word(const piece *p, size_t at, enum move move) {
    __m128i data = load(p->from + at);
    if (move == CACHED)
        _mm_storeu_si128((__m128i *)(p->to + at), data);
    if (move == STREAM)
        _mm_stream_si128((__m128i *)(p->to + at), data);
    return data;
}

INLINE line words_of_line(const piece *p, size_t at, enum move move) {
    return (line){{word(p, at, move), word(p, at + 16, move), word(p, at + 32, move), word(p, at + 48, move)}};
}

INLINE line fold_line(line x, line data) {
    return (line){{fold(x.word[0], BY_64, data.word[0]), fold(x.word[1], BY_64, data.word[1]), fold(x.word[2], BY_64, data.word[2]),
                   fold(x.word[3], BY_64, data.word[3])}};
}

INLINE __m128i join_line(line x) { return fold(fold(fold(x.word[0], BY_16, x.word[1]), BY_16, x.word[2]), BY_16, x.word[3]); }

INLINE void advance(piece *p, size_t n) { p->to += n, p->from += n, p->n -= n; }

INLINE void folded(piece *p, __m128i x) { p->x = x, p->seed = _mm_setzero_si128(); }

/* Folds what was read so far onto the next 16 bytes. */
INLINE __m128i resume(const piece *p, __m128i data) { return fold(p->x, BY_16, _mm_xor_si128(data, p->seed)); }

/* Two lanes of LANE_BYTES. */
INLINE void lanes(piece *p, enum move move, enum crc crc) {
    const uint8_t *next = p->n > 2 * LANE_BYTES ? p->from + 2 * LANE_BYTES : p->next;
    prefetch(next), prefetch(next + LANE_BYTES);
    line a = {{_mm_setzero_si128()}}, b = a;
    for (size_t at = 0; at < LANE_BYTES; at += 64) {
        size_t then = at + LANE_AHEAD_BYTES;
        const uint8_t *ahead = then < LANE_BYTES ? p->from + then : next + (then - LANE_BYTES);
        prefetch(ahead), prefetch(ahead + LANE_BYTES);
        line c = words_of_line(p, at, move), d = words_of_line(p, at + LANE_BYTES, move);
        if (crc != WITHOUT && at == 0)
            c.word[0] = resume(p, c.word[0]), a = c, b = d;
        else if (crc != WITHOUT)
            a = fold_line(a, c), b = fold_line(b, d);
    }
    if (crc != WITHOUT)
        folded(p, fold(join_line(a), BY_LANE, join_line(b)));
    advance(p, 2 * LANE_BYTES);
}

/* Lines of 64 bytes, as far as they go; at least one. */
INLINE void lines(piece *p, enum move move, enum crc crc) {
    line x = {{_mm_setzero_si128()}};
    size_t at = 0;
    for (; p->n - at >= 64; at += 64) {
        size_t left = p->n - at;
        prefetch(left > AHEAD_BYTES ? p->from + at + AHEAD_BYTES : p->next + (AHEAD_BYTES - left));
        line y = words_of_line(p, at, move);
        if (crc != WITHOUT && at == 0)
            y.word[0] = resume(p, y.word[0]), x = y;
        else if (crc != WITHOUT)
            x = fold_line(x, y);
    }
    if (crc != WITHOUT)
        folded(p, join_line(x));
    advance(p, at);
}

INLINE uint32_t reduce(__m128i x) {
    uint64_t state = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(x));
    return (uint32_t)_mm_crc32_u64(state, (uint64_t)_mm_extract_epi64(x, 1));
}

/* All whole words of 16 bytes. */
INLINE uint32_t words(piece *p, uint32_t state, enum move move, enum crc crc) {
    if (p->n < 16)
        return state;
    p->x = _mm_setzero_si128();
    p->seed = _mm_cvtsi32_si128((int)state);
    while (p->n >= 2 * LANE_BYTES)
        lanes(p, move, crc);
    if (p->n >= 64)
        lines(p, move, crc);
    for (; p->n >= 16; advance(p, 16)) {
        __m128i data = word(p, 0, move);
        if (crc != WITHOUT)
            folded(p, resume(p, data));
    }
    return crc != WITHOUT ? reduce(p->x) : state;
}

/* The first n < 16 bytes. */
INLINE uint32_t bytes(piece *p, size_t n, uint32_t state, enum move move, enum crc crc) {
    if (move != NONE)
        memcpy(p->to, p->from, n);
    const uint8_t *read = move != NONE ? p->to : p->from; /* of the very bytes that were stored */
    for (size_t at = 0; crc != WITHOUT && at < n; at++)
        state = _mm_crc32_u8(state, read[at]);
    advance(p, n);
    return state;
}

INLINE uint32_t run(piece p, uint32_t state, enum move move, enum crc crc) {
    size_t head = (size_t)(-(uintptr_t)p.to & 15);
    if (move == STREAM && head) /* streaming stores need an aligned target */
        state = bytes(&p, head < p.n ? head : p.n, state, CACHED, crc);
    state = words(&p, state, move, crc);
    return p.n ? bytes(&p, p.n, state, move, crc) : state;
}

#include "kernels_entries.h"

const fk_kernels fk_kernels_sse42 = {"sse42", crc_only, copy, stream, copy_crc, stream_crc, fence};
#endif
