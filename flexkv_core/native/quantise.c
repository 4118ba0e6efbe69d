/* bfloat16 pieces to float8_e4m3fn with a scale a piece, and back. What is computed stands in flexkv_core/quantised.py, the geometry in
 * _native.pyi under quantise. The loops are written so that compilers vectorise them: no branch, no call, no table. */
#include "buffers.h"
#include "functions.h"
#include "kernels.h"

#include <string.h>

#define INFINITY_BITS 0x7f80u      /* of bfloat16; what is above is NaN */
#define LARGEST_BITS 0x43e00000    /* 448, the largest float8_e4m3fn */
#define LEAST_NORMAL_BITS 0x3c800000 /* 2^-6 */
#define EXPONENT_BITS 0x7f800000
#define SUBNORMALS_MAX 8           /* magnitudes below it have no leading one */

typedef struct {
    /* Returns the bits of the largest magnitude of n bfloat16 values. */
    uint32_t (*largest)(const uint16_t *values, size_t n);
    void (*quantise)(uint8_t *to, const uint16_t *values, size_t n, float scale);
    void (*dequantise)(uint16_t *to, const uint8_t *from, size_t n, float scale);
} loops;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* `below` where value < bound, `other` elsewhere: by masks, because a compiler may put what only one side of a condition needs into a branch,
 * and float operations in a branch keep it from vectorising. */
static inline int32_t choose(int32_t value, int32_t bound, int32_t below, int32_t other) {
    int32_t mask = -(value < bound);
    return (below & mask) | (other & ~mask);
}

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t largest_of(const uint16_t *values, size_t n) {
    int16_t largest = 0; /* signed: SSE2 has no maximum of unsigned ones */
    for (size_t i = 0; i < n; i++) {
        int16_t magnitude = (int16_t)(values[i] & 0x7fff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

INLINE void quantise_all(uint8_t *restrict to, const uint16_t *restrict values, size_t n, float scale) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = bits_of(float_of((uint32_t)values[i] << 16) / scale);
        int32_t magnitude = (int32_t)(bits & 0x7fffffff);
        magnitude = magnitude < LARGEST_BITS ? magnitude : LARGEST_BITS;
        /* From a power of two on, the steps of an 8-bit float are an eighth of it, as are those of a float from 2^20 times as much on: so
         * adding that rounds to the nearest, ties to even, and counts the steps. Below 2^-6 they stay those of 2^-6. */
        int32_t power = magnitude & EXPONENT_BITS;
        power = power > LEAST_NORMAL_BITS ? power : LEAST_NORMAL_BITS;
        int32_t coarse = power + (20 << 23);
        int32_t steps = (int32_t)bits_of(float_of((uint32_t)magnitude) + float_of((uint32_t)coarse)) - coarse;
        int32_t rounded = ((power - LEAST_NORMAL_BITS) >> 20) + steps;
        to[i] = (uint8_t)((uint32_t)rounded | (bits >> 24 & 0x80));
    }
}

INLINE void dequantise_all(uint16_t *restrict to, const uint8_t *restrict from, size_t n, float scale) {
    for (size_t i = 0; i < n; i++) {
        int32_t magnitude = from[i] & 0x7f;
        int32_t normal = (magnitude << 20) + (120 << 23);
        int32_t subnormal = (int32_t)bits_of((float)magnitude * 0x1p-9f);
        float value = float_of((uint32_t)choose(magnitude, SUBNORMALS_MAX, subnormal, normal)) * scale;
        uint32_t bits = bits_of(value) | (uint32_t)(from[i] & 0x80) << 24;
        to[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

#define LOOPS(name, attribute) \
    attribute static uint32_t largest_##name(const uint16_t *values, size_t n) { return largest_of(values, n); } \
    attribute static void quantise_##name(uint8_t *to, const uint16_t *values, size_t n, float scale) { \
        quantise_all(to, values, n, scale); \
    } \
    attribute static void dequantise_##name(uint16_t *to, const uint8_t *from, size_t n, float scale) { \
        dequantise_all(to, from, n, scale); \
    } \
    static const loops loops_##name = {largest_##name, quantise_##name, dequantise_##name};

LOOPS(generic, )
#if defined(__x86_64__)
LOOPS(avx2, __attribute__((target("avx2"))))
LOOPS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

/* By the instructions that were chosen for the other loops. */
static const loops *chosen(void) {
#if defined(__x86_64__)
    if (fk_active == &fk_kernels_avx512)
        return &loops_avx512;
    if (fk_active != &fk_kernels_generic && __builtin_cpu_supports("avx2"))
        return &loops_avx2;
#endif
    return &loops_generic;
}

typedef struct {
    PyObject *segments, *strides, *blocks, *images;
    Py_ssize_t piece_bytes, block_count, scales_offset, image_bytes, first_segment;
} arguments;

typedef struct {
    fk_buffer segments, strides, block_ids, images;
    int64_t *blocks;
    size_t segment_count, values; /* of a piece */
    size_t scales_offset, image_bytes, first_segment;
} work;

static uint16_t *piece_at(const work *w, size_t i, size_t segment) {
    const int64_t *addrs = w->segments.view.buf, *strides = w->strides.view.buf;
    return (uint16_t *)(uintptr_t)(addrs[segment] + w->blocks[i] * strides[segment]);
}

static uint8_t *image_at(const work *w, size_t i) { return (uint8_t *)(uintptr_t)((const int64_t *)w->images.view.buf)[i]; }

static void quantise_block(const work *w, size_t i, const loops *use) {
    uint8_t *image = image_at(w, i), *to = image, *scales = image + w->scales_offset;
    for (size_t s = 0; s < w->segment_count; s++, to += w->values, scales += sizeof(float)) {
        const uint16_t *piece = piece_at(w, i, s);
        uint32_t largest = use->largest(piece, w->values);
        float scale = largest ? float_of(largest << 16) / 448.0f : 1.0f;
        memcpy(scales, &scale, sizeof scale);
        if (largest < INFINITY_BITS)
            use->quantise(to, piece, w->values, scale);
        else
            memset(to, 0, w->values); /* nobody will read it */
    }
    memset(to, 0, (size_t)(image + w->scales_offset - to));
    memset(scales, 0, (size_t)(image + w->image_bytes - scales));
}

static void dequantise_block(const work *w, size_t i, const loops *use) {
    const uint8_t *image = image_at(w, i), *from = image + w->first_segment * w->values;
    const uint8_t *scales = image + w->scales_offset + w->first_segment * sizeof(float);
    for (size_t s = 0; s < w->segment_count; s++, from += w->values, scales += sizeof(float)) {
        float scale;
        memcpy(&scale, scales, sizeof scale);
        use->dequantise(piece_at(w, i, s), from, w->values, scale);
    }
}

static int check_sizes(work *w, const arguments *given) {
    Py_ssize_t segments = w->segments.length, values = given->piece_bytes / 2, pieces, scales;
    if (!fk_expect_length("block_strides", w->strides.length, segments) ||
        !fk_expect_length("images", w->images.length, w->block_ids.length))
        return 0;
    if (given->piece_bytes < 0 || given->piece_bytes % 2)
        return PyErr_Format(PyExc_ValueError, "piece_bytes is %zd, expected whole bfloat16 values", given->piece_bytes), 0;
    if (given->first_segment < 0 || __builtin_add_overflow(given->first_segment, segments, &pieces) ||
        __builtin_mul_overflow(pieces, (Py_ssize_t)sizeof(float), &scales) || __builtin_mul_overflow(pieces, values, &pieces) ||
        pieces > given->scales_offset || given->image_bytes < given->scales_offset || scales > given->image_bytes - given->scales_offset)
        return PyErr_Format(PyExc_ValueError,
                            "%zd pieces of %zd bytes from %zd on do not fit an image of %zd bytes with scales at %zd", segments, values,
                            given->first_segment, given->image_bytes, given->scales_offset),
               0;
    w->segment_count = (size_t)segments;
    w->values = (size_t)values;
    w->scales_offset = (size_t)given->scales_offset;
    w->image_bytes = (size_t)given->image_bytes;
    w->first_segment = (size_t)given->first_segment;
    return 1;
}

/* Checks everything before a byte is written, runs without the GIL. */
static PyObject *execute(PyObject *args, PyObject *kwargs, void (*run)(const work *, size_t, const loops *), int has_first) {
    char *names[] = {"segment_addrs", "block_strides", "piece_bytes", "blocks",        "block_count",
                     "images",        "scales_offset", "image_bytes", "first_segment", NULL};
    arguments given = {0};
    work w = {0};
    int is_ready;
    if (!has_first)
        names[8] = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, has_first ? "OOnOnOnn|n" : "OOnOnOnn", names, &given.segments, &given.strides,
                                     &given.piece_bytes, &given.blocks, &given.block_count, &given.images, &given.scales_offset,
                                     &given.image_bytes, &given.first_segment))
        return NULL;
    is_ready = fk_open(&w.segments, given.segments, "segment_addrs", FK_INT64, 0) &&
               fk_open(&w.strides, given.strides, "block_strides", FK_INT64, 0) &&
               fk_open(&w.block_ids, given.blocks, "blocks", FK_IDS, 0) && fk_open(&w.images, given.images, "images", FK_INT64, 0) &&
               check_sizes(&w, &given) && (w.blocks = fk_copy_ids(&w.block_ids, "blocks", given.block_count)) != NULL;
    if (is_ready) {
        size_t count = (size_t)w.block_ids.length;
        const loops *use = chosen();
        FK_BEGIN_BULK(count * w.segment_count * w.values * 2)
        for (size_t i = 0; i < count; i++)
            run(&w, i, use);
        FK_END_BULK
    }
    PyMem_RawFree(w.blocks);
    fk_close(&w.segments), fk_close(&w.strides), fk_close(&w.block_ids), fk_close(&w.images);
    if (!is_ready)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *fk_quantise(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    return execute(args, kwargs, quantise_block, 0);
}

PyObject *fk_dequantise(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    return execute(args, kwargs, dequantise_block, 1);
}
