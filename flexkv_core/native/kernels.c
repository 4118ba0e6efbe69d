/* The choice of kernels, and the set that runs everywhere. */
#include "kernels.h"

#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the native extension needs a little-endian machine; build without it to use the Python twin"
#endif

const fk_kernels *fk_active = &fk_kernels_generic;

/* Slicing-by-8 (Kounavis and Berry 2008): table[k][b] is the state after byte b and k zero bytes. */
static uint32_t table[8][256];

static void fill_table(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t state = byte;
        for (int bit = 0; bit < 8; bit++)
            state = (state >> 1) ^ (0x82F63B78u & (0u - (state & 1)));
        table[0][byte] = state;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++)
            table[k][byte] = table[0][table[k - 1][byte] & 0xFF] ^ (table[k - 1][byte] >> 8);
}

static uint32_t generic_crc(uint32_t state, const uint8_t *data, size_t n) {
    for (; n >= 8; n -= 8, data += 8) {
        uint32_t low, high;
        memcpy(&low, data, 4);
        memcpy(&high, data + 4, 4);
        low ^= state;
        state = table[7][low & 0xFF] ^ table[6][(low >> 8) & 0xFF] ^ table[5][(low >> 16) & 0xFF] ^ table[4][low >> 24] ^
                table[3][high & 0xFF] ^ table[2][(high >> 8) & 0xFF] ^ table[1][(high >> 16) & 0xFF] ^ table[0][high >> 24];
    }
    for (; n; n--, data++)
        state = table[0][(state ^ *data) & 0xFF] ^ (state >> 8);
    return state;
}

static uint32_t generic_copy(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    (void)next;
    memcpy(to, from, n);
    return state;
}

/* The CRC is taken from the copy, in steps that stay in the first-level cache. */
static uint32_t generic_copy_crc(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    (void)next;
    while (n) {
        size_t step = n < 4096 ? n : 4096;
        memcpy(to, from, step);
        state = generic_crc(state, to, step);
        to += step, from += step, n -= step;
    }
    return state;
}

static void generic_fence(void) {}

const fk_kernels fk_kernels_generic = {
    "generic", generic_crc, generic_copy, generic_copy, generic_copy_crc, generic_copy_crc, generic_fence,
};

#if defined(__x86_64__)
static int runs_sse42(void) { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul"); }

static int runs_avx2(void) { return runs_sse42() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq"); }

static int runs_avx512(void) {
    return runs_avx2() && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

int fk_kernels_select(const char *name) {
    fill_table();
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (runs_avx512() && (!name || !strcmp(name, "avx512"))) {
        fk_active = &fk_kernels_avx512;
        return 1;
    }
    if (runs_avx2() && (!name || !strcmp(name, "avx2"))) {
        fk_active = &fk_kernels_avx2;
        return 1;
    }
    if (runs_sse42() && (!name || !strcmp(name, "sse42"))) {
        fk_active = &fk_kernels_sse42;
        return 1;
    }
#endif
    if (!name || !strcmp(name, "generic")) {
        fk_active = &fk_kernels_generic;
        return 1;
    }
    return 0;
}
