/* Inner loops over bytes: CRC32C, copy, and both in one pass; one set a generation of processors.
 *
 * A CRC "state" is the register of the algorithm, before the final inversion: crc = ~state. So state carries over from one piece to
 * the next, and from a block's key to its image.
 */
#ifndef FLEXKV_KERNELS_H
#define FLEXKV_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* Copies n bytes; returns the state after them, or the given state where the kernel computes no CRC. `next` is where the piece after
 * this one begins (any address, never dereferenced, only prefetched): paged pieces are short, and the hardware's prefetchers start
 * anew at each of them. */
typedef uint32_t (*fk_move)(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next);

typedef struct {
    const char *name;
    uint32_t (*crc)(uint32_t state, const uint8_t *data, size_t n);
    fk_move copy;       /* through the caches */
    fk_move stream;     /* past the caches; call fence() before the bytes are handed to another thread or device */
    fk_move copy_crc;   /* CRC of the very bytes that are stored: each is loaded once */
    fk_move stream_crc;
    void (*fence)(void);
} fk_kernels;

extern const fk_kernels fk_kernels_generic;
#if defined(__x86_64__)
extern const fk_kernels fk_kernels_sse42;  /* SSE4.2 and PCLMULQDQ: every server since 2010 */
extern const fk_kernels fk_kernels_avx2;   /* AVX2 and VPCLMULQDQ: Zen 3, Alder Lake and later */
extern const fk_kernels fk_kernels_avx512; /* AVX-512 and VPCLMULQDQ: Ice Lake, Zen 4 and later */
#endif

/* The best set that this processor runs, chosen by fk_kernels_select(NULL). */
extern const fk_kernels *fk_active;

/* Chooses a set by name, or the best for NULL. Returns 0 where the name is unknown or the processor can't run it. */
int fk_kernels_select(const char *name);

#endif
