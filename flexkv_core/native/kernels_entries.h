/* What a set of instructions offers, made of its `run`: the end of each kernels_*.c, which defines TARGET, piece and run before. It stands here
 * once, and is compiled for each set. */
TARGET static uint32_t crc_only(uint32_t state, const uint8_t *data, size_t n) {
    return run((piece){.from = data, .next = data + n, .n = n}, state, NONE, OF_COPY);
}

TARGET static uint32_t copy(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    return run((piece){.to = to, .from = from, .next = next, .n = n}, state, CACHED, WITHOUT);
}

TARGET static uint32_t stream(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    return run((piece){.to = to, .from = from, .next = next, .n = n}, state, STREAM, WITHOUT);
}

TARGET static uint32_t copy_crc(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    return run((piece){.to = to, .from = from, .next = next, .n = n}, state, CACHED, OF_COPY);
}

TARGET static uint32_t stream_crc(uint8_t *to, const uint8_t *from, size_t n, uint32_t state, const uint8_t *next) {
    return run((piece){.to = to, .from = from, .next = next, .n = n}, state, STREAM, OF_COPY);
}

static void fence(void) { _mm_sfence(); }
