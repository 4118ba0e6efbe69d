/* CRC32C and copies with SSE4.2 and PCLMULQDQ: kernels_avx512.c with 16-byte words. See there for the algorithm. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("sse4.2,pclmul")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum move { NONE, CACHED, STREAM };

/* How far ahead of the loads lines are prefetched. */
#define AHEAD_BYTES 2048

INLINE __m128i load(const uint8_t *from) { return _mm_loadu_si128((const __m128i *)from); }

INLINE __m128i fold(__m128i x, __m128i powers, __m128i data) {
    return _mm_xor_si128(data, _mm_xor_si128(_mm_clmulepi64_si128(x, powers, 0x00), _mm_clmulepi64_si128(x, powers, 0x11)));
}

INLINE void put(uint8_t *to, __m128i data, enum move move) {
    if (move == CACHED)
        _mm_storeu_si128((__m128i *)to, data);
    if (move == STREAM)
        _mm_stream_si128((__m128i *)to, data);
}

/* Fewer than 16 bytes. */
INLINE uint32_t tail(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, enum move move, int crc) {
    uint8_t bytes[16];
    memcpy(bytes, from, n);
    if (move != NONE)
        memcpy(to, bytes, n);
    for (size_t at = 0; crc && at < n; at++)
        state = _mm_crc32_u8(state, bytes[at]);
    return state;
}

INLINE uint32_t reduce(__m128i x) {
    uint64_t state = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(x));
    return (uint32_t)_mm_crc32_u64(state, (uint64_t)_mm_extract_epi64(x, 1));
}

/* The main loop: whole 16-byte words, four at a time while there are. */
INLINE uint32_t words(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next, enum move move, int crc) {
    const __m128i by_16 = _mm_set_epi64x(0x14cd00bd6, 0xf20c0dfe), by_64 = _mm_set_epi64x(0x9e4addf8, 0x740eef02);
    __m128i x = load(from);
    size_t at = 16;
    put(to, x, move);
    if (crc)
        x = _mm_xor_si128(x, _mm_cvtsi32_si128((int)state));
    if (n >= 64) {
        __m128i x1 = load(from + 16), x2 = load(from + 32), x3 = load(from + 48);
        put(to + 16, x1, move), put(to + 32, x2, move), put(to + 48, x3, move);
        for (at = 64; n - at >= 64; at += 64) {
            const uint8_t *ahead = n - at > AHEAD_BYTES ? from + at + AHEAD_BYTES : next + (AHEAD_BYTES - (n - at));
            _mm_prefetch((const char *)ahead, _MM_HINT_T0);
            __m128i y0 = load(from + at), y1 = load(from + at + 16), y2 = load(from + at + 32), y3 = load(from + at + 48);
            put(to + at, y0, move), put(to + at + 16, y1, move), put(to + at + 32, y2, move), put(to + at + 48, y3, move);
            if (crc)
                x = fold(x, by_64, y0), x1 = fold(x1, by_64, y1), x2 = fold(x2, by_64, y2), x3 = fold(x3, by_64, y3);
        }
        if (crc)
            x = fold(fold(fold(x, by_16, x1), by_16, x2), by_16, x3);
    }
    for (; n - at >= 16; at += 16) {
        __m128i y = load(from + at);
        put(to + at, y, move);
        if (crc)
            x = fold(x, by_16, y);
    }
    return crc ? reduce(x) : state;
}

INLINE uint32_t run(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next, enum move move, int crc) {
    if (move == STREAM) {
        size_t head = (size_t)(-(uintptr_t)to & 15);
        head = head < n ? head : n;
        if (head)
            state = tail(to, from, head, state, CACHED, crc);
        to += head, from += head, n -= head;
    }
    size_t whole = n & ~(size_t)15;
    if (whole)
        state = words(to, from, whole, state, next, move, crc);
    if (n - whole)
        state = tail(to + whole, from + whole, n - whole, state, move, crc);
    return state;
}

TARGET static uint32_t crc_only(uint32_t state, const uint8_t *data, size_t n) {
    return run(NULL, data, n, state, data + n, NONE, 1);
}

TARGET static uint32_t copy(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    return run(to, from, n, state, next, CACHED, 0);
}

TARGET static uint32_t stream(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    return run(to, from, n, state, next, STREAM, 0);
}

TARGET static uint32_t copy_crc(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    return run(to, from, n, state, next, CACHED, 1);
}

TARGET static uint32_t stream_crc(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    return run(to, from, n, state, next, STREAM, 1);
}

static void fence(void) { _mm_sfence(); }

const fk_kernels fk_kernels_sse42 = {"sse42", crc_only, copy, stream, copy_crc, stream_crc, fence};
#endif
