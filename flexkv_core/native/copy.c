/* Copies between paged blocks and slots, with and without checksums. The geometry stands in _native.pyi under gather. */
#include "buffers.h"
#include "functions.h"
#include "kernels.h"

#include <string.h>

#define KEY_BYTES 16

/* Transfers of at least this many bytes go past the caches: a cached store reads the line before it writes it (random 16 KiB pieces, 512
 * MiB: 4.6 against 9.7 GB/s; Xeon family 6 model 207, 2026). What is smaller fits the second level and may be read from there next. */
#define STREAM_BYTES_MIN (4u << 20)

/* Arguments as they were given. */
typedef struct {
    PyObject *segments, *strides, *blocks, *slots, *keys, *crcs, *ok;
    Py_ssize_t piece_bytes, block_count, slot_stride, slot_count, blocks_per_slot, shard_offset, image_stride;
    long long slot_base;
} arguments;

/* A checked transfer. Owns its ids, borrows the buffers. */
typedef struct {
    fk_buffer segments, strides, block_ids, slot_ids, keys, crcs, ok;
    int64_t *blocks, *slots; /* [slot_count * blocks_per_slot], [slot_count] */
    size_t slot_count, blocks_per_slot, segment_count, piece_bytes;
    size_t image_stride; /* from one device block's pieces in a slot to the next one's */
    size_t image_bytes;  /* of a slot, that are copied */
    int64_t slot_base, slot_stride;
    int is_stream;
} transfer;

static uint8_t *piece_at(const transfer *t, size_t block, size_t segment) {
    const int64_t *addrs = t->segments.view.buf, *strides = t->strides.view.buf;
    return (uint8_t *)(uintptr_t)(addrs[segment] + t->blocks[block] * strides[segment]);
}

static uint8_t *image_at(const transfer *t, size_t i) { return (uint8_t *)(uintptr_t)(t->slot_base + t->slots[i] * t->slot_stride); }

/* Where the paged piece after this one lies; the last one's is itself. */
static uint8_t *piece_after(const transfer *t, size_t block, size_t segment) {
    if (segment + 1 < t->segment_count)
        return piece_at(t, block, segment + 1);
    return piece_at(t, block + (block + 1 < t->slot_count * t->blocks_per_slot), 0);
}

static uint32_t key_state(const transfer *t, size_t i) {
    return fk_active->crc(~0u, (const uint8_t *)t->keys.view.buf + KEY_BYTES * i, KEY_BYTES);
}

static uint32_t gather_slot(const transfer *t, size_t i, fk_move move, uint32_t state) {
    uint8_t *image = image_at(t, i);
    for (size_t block = i * t->blocks_per_slot; block < (i + 1) * t->blocks_per_slot; block++, image += t->image_stride) {
        uint8_t *to = image;
        for (size_t s = 0; s < t->segment_count; s++, to += t->piece_bytes)
            state = move(to, piece_at(t, block, s), t->piece_bytes, state, piece_after(t, block, s));
    }
    return state;
}

static uint32_t scatter_slot(const transfer *t, size_t i, fk_move move, uint32_t state) {
    const uint8_t *image = image_at(t, i), *next_slot = image_at(t, i + (i + 1 < t->slot_count));
    for (size_t j = 0; j < t->blocks_per_slot; j++, image += t->image_stride) {
        const uint8_t *from = image, *next = j + 1 < t->blocks_per_slot ? image + t->image_stride : next_slot;
        for (size_t s = 0; s < t->segment_count; s++, from += t->piece_bytes)
            state = move(piece_at(t, i * t->blocks_per_slot + j, s), from, t->piece_bytes, state,
                         s + 1 < t->segment_count ? from + t->piece_bytes : next);
    }
    return state;
}

/* Zeros in the paged blocks of slot i: what is not what was stored may be NaN, which a masked attention does not keep out. */
static void clear_blocks(const transfer *t, size_t i) {
    for (size_t block = i * t->blocks_per_slot; block < (i + 1) * t->blocks_per_slot; block++)
        for (size_t s = 0; s < t->segment_count; s++)
            memset(piece_at(t, block, s), 0, t->piece_bytes);
}

static Py_ssize_t run_gather(const transfer *t) {
    fk_move move = t->is_stream ? fk_active->stream : fk_active->copy;
    for (size_t i = 0; i < t->slot_count; i++)
        gather_slot(t, i, move, 0);
    return 0;
}

static Py_ssize_t run_scatter(const transfer *t) {
    fk_move move = t->is_stream ? fk_active->stream : fk_active->copy;
    for (size_t i = 0; i < t->slot_count; i++)
        scatter_slot(t, i, move, 0);
    return 0;
}

static Py_ssize_t run_gather_crc(const transfer *t) {
    fk_move move = t->is_stream ? fk_active->stream_crc : fk_active->copy_crc;
    uint32_t *crcs = t->crcs.view.buf;
    for (size_t i = 0; i < t->slot_count; i++)
        crcs[i] = ~gather_slot(t, i, move, key_state(t, i));
    return 0;
}

/* The checksum is taken of the very bytes that are copied, each loaded once. */
static Py_ssize_t run_scatter_verify(const transfer *t) {
    fk_move move = t->is_stream ? fk_active->stream_crc : fk_active->copy_crc;
    const uint32_t *crcs = t->crcs.view.buf;
    uint8_t *ok = t->ok.view.buf;
    Py_ssize_t mismatches = 0;
    for (size_t i = 0; i < t->slot_count; i++) {
        ok[i] = ~scatter_slot(t, i, move, key_state(t, i)) == crcs[i];
        if (ok[i])
            continue;
        if (t->is_stream)
            fk_active->fence(); /* or what was streamed might come after the zeros */
        clear_blocks(t, i);
        mismatches++;
    }
    return mismatches;
}

/* Sizes that fit: sets the counts of a transfer whose buffers are open. */
static int check_sizes(transfer *t, const arguments *given) {
    Py_ssize_t blocks, pieces, image, row, extent, segments = t->segments.length;
    if (!fk_expect_length("block_strides", t->strides.length, segments))
        return 0;
    if (given->piece_bytes < 0)
        return PyErr_Format(PyExc_ValueError, "piece_bytes is %zd, expected not negative", given->piece_bytes), 0;
    if (given->blocks_per_slot < 1)
        return PyErr_Format(PyExc_ValueError, "blocks_per_slot is %zd, expected at least 1", given->blocks_per_slot), 0;
    if (__builtin_mul_overflow(t->slot_ids.length, given->blocks_per_slot, &blocks) ||
        __builtin_mul_overflow(given->blocks_per_slot, segments, &pieces) ||
        __builtin_mul_overflow(pieces, given->piece_bytes, &image) || __builtin_mul_overflow(segments, given->piece_bytes, &row) ||
        __builtin_mul_overflow(given->blocks_per_slot - 1, given->image_stride ? given->image_stride : row, &extent) ||
        __builtin_add_overflow(extent, row, &extent))
        return PyErr_SetString(PyExc_ValueError, "the sizes of the transfer overflow"), 0;
    if (!fk_expect_length("blocks", t->block_ids.length, blocks))
        return 0;
    if (given->image_stride && given->image_stride < row)
        return PyErr_Format(PyExc_ValueError, "image_stride is %zd, expected 0 or at least the %zd bytes of a block's pieces",
                            given->image_stride, row),
               0;
    if (given->shard_offset < 0 || given->shard_offset > given->slot_stride || extent > given->slot_stride - given->shard_offset)
        return PyErr_Format(PyExc_ValueError, "an image of %zd bytes at shard_offset %zd does not lie in a slot of %zd bytes", extent,
                            given->shard_offset, given->slot_stride),
               0;
    t->slot_count = (size_t)t->slot_ids.length;
    t->blocks_per_slot = (size_t)given->blocks_per_slot;
    t->segment_count = (size_t)segments;
    t->piece_bytes = (size_t)given->piece_bytes;
    t->image_bytes = (size_t)image;
    t->image_stride = (size_t)(given->image_stride ? given->image_stride : row);
    t->slot_base = given->slot_base + given->shard_offset;
    t->slot_stride = given->slot_stride;
    return 1;
}

static int open_checksums(transfer *t, const arguments *given, int is_output) {
    Py_ssize_t n = t->slot_ids.length;
    const char *name = is_output ? "crc_out" : "crc_expected";
    return fk_open(&t->keys, given->keys, "keys", FK_BYTES, 0) && fk_expect_length("keys", t->keys.length, KEY_BYTES * n) &&
           fk_open(&t->crcs, given->crcs, name, FK_UINT32, is_output) && fk_expect_length(name, t->crcs.length, n) &&
           (!given->ok || (fk_open(&t->ok, given->ok, "ok_out", FK_UINT8, 1) && fk_expect_length("ok_out", t->ok.length, n)));
}

/* Checks everything before anything is copied. Returns 0 with an error set. */
static int prepare(transfer *t, const arguments *given) {
    if (!fk_open(&t->segments, given->segments, "segment_addrs", FK_INT64, 0) ||
        !fk_open(&t->strides, given->strides, "block_strides", FK_INT64, 0) ||
        !fk_open(&t->block_ids, given->blocks, "blocks", FK_IDS, 0) || !fk_open(&t->slot_ids, given->slots, "slots", FK_IDS, 0) ||
        !check_sizes(t, given))
        return 0;
    if (given->keys && !open_checksums(t, given, !given->ok))
        return 0;
    t->blocks = fk_copy_ids(&t->block_ids, "blocks", given->block_count);
    t->slots = t->blocks ? fk_copy_ids(&t->slot_ids, "slots", given->slot_count) : NULL;
    return t->slots != NULL;
}

static void release(transfer *t) {
    PyMem_RawFree(t->blocks);
    PyMem_RawFree(t->slots);
    fk_close(&t->segments), fk_close(&t->strides), fk_close(&t->block_ids), fk_close(&t->slot_ids);
    fk_close(&t->keys), fk_close(&t->crcs), fk_close(&t->ok);
}

/* Checks, runs without the GIL, releases. Returns what `run` returns, or -1 with an error set. */
static Py_ssize_t execute(const arguments *given, Py_ssize_t (*run)(const transfer *)) {
    transfer t = {0};
    Py_ssize_t result = -1;
    if (prepare(&t, given)) {
        size_t bytes = t.slot_count * t.image_bytes;
        t.is_stream = bytes >= STREAM_BYTES_MIN;
        result = 0;
        FK_BEGIN_BULK(bytes)
        if (t.slot_count && (t.image_bytes || given->keys))
            result = run(&t);
        if (t.is_stream)
            fk_active->fence();
        FK_END_BULK
    }
    release(&t);
    return result;
}

#define GEOMETRY "segment_addrs", "block_strides", "piece_bytes", "blocks", "block_count", "slot_base", "slot_stride", "slots", "slot_count"
#define GEOMETRY_AT(a) \
    &(a).segments, &(a).strides, &(a).piece_bytes, &(a).blocks, &(a).block_count, &(a).slot_base, &(a).slot_stride, &(a).slots, \
        &(a).slot_count
#define SHAPE_AT(a) &(a).blocks_per_slot, &(a).shard_offset

static PyObject *copy_only(PyObject *args, PyObject *kwargs, Py_ssize_t (*run)(const transfer *)) {
    static char *names[] = {GEOMETRY, "blocks_per_slot", "shard_offset", "image_stride", NULL};
    arguments given = {.blocks_per_slot = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOnOnLnOn|nnn", names, GEOMETRY_AT(given), SHAPE_AT(given),
                                     &given.image_stride))
        return NULL;
    if (execute(&given, run) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *fk_gather(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    return copy_only(args, kwargs, run_gather);
}

PyObject *fk_scatter(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    return copy_only(args, kwargs, run_scatter);
}

PyObject *fk_gather_crc(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {GEOMETRY, "keys", "crc_out", "blocks_per_slot", "shard_offset", NULL};
    arguments given = {.blocks_per_slot = 1};
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOnOnLnOnOO|nn", names, GEOMETRY_AT(given), &given.keys, &given.crcs,
                                     SHAPE_AT(given)))
        return NULL;
    if (execute(&given, run_gather_crc) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *fk_scatter_verify(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {GEOMETRY, "keys", "crc_expected", "ok_out", "blocks_per_slot", "shard_offset", NULL};
    arguments given = {.blocks_per_slot = 1};
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOnOnLnOnOOO|nn", names, GEOMETRY_AT(given), &given.keys, &given.crcs, &given.ok,
                                     SHAPE_AT(given)))
        return NULL;
    Py_ssize_t mismatches = execute(&given, run_scatter_verify);
    return mismatches < 0 ? NULL : PyLong_FromSsize_t(mismatches);
}
