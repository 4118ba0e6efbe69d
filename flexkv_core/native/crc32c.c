/* CRC32C of buffers and of slots. */
#include "buffers.h"
#include "functions.h"
#include "kernels.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdlib.h>

#define KEY_BYTES 16
#define CRC_UNIT_BYTES ((size_t)1 << 20) /* what threads share: a tenth of a millisecond */

PyObject *fk_crc32c(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"data", "crc", NULL};
    PyObject *object;
    long long crc = 0;
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|L", names, &object, &crc))
        return NULL;
    if (crc < 0 || crc > 0xFFFFFFFFll)
        return PyErr_Format(PyExc_ValueError, "crc is %lld, expected an unsigned 32-bit value", crc);
    fk_buffer data = {0};
    PyObject *result = NULL;
    if (fk_open(&data, object, "data", FK_BYTES, 0)) {
        uint32_t state = ~(uint32_t)crc;
        FK_BEGIN_BULK(data.length)
        state = fk_active->crc(state, data.view.buf, (size_t)data.length);
        FK_END_BULK
        result = PyLong_FromUnsignedLong(~state & 0xFFFFFFFFul);
    }
    fk_close(&data);
    return result;
}

typedef struct {
    long long base;
    Py_ssize_t slot_bytes, offset, length;
} slot_range;

typedef struct {
    const slot_range *range;
    const int64_t *slots;
    size_t units_a_slot;
    uint32_t *states; /* a unit each */
    size_t n;         /* units */
    atomic_size_t next; /* the first unit that nobody has taken */
} crc_work;

static size_t unit_length(const slot_range *range, size_t units, size_t unit) {
    return unit + 1 < units ? CRC_UNIT_BYTES : (size_t)range->length - (units - 1) * CRC_UNIT_BYTES;
}

static void crc_units(void *argument) {
    crc_work *work = argument;
    const slot_range *range = work->range;
    size_t i;
    while ((i = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed)) < work->n) {
        size_t slot = i / work->units_a_slot, unit = i % work->units_a_slot;
        const uint8_t *image = (const uint8_t *)(uintptr_t)(range->base + work->slots[slot] * range->slot_bytes + range->offset);
        work->states[i] = fk_active->crc(0, image + unit * CRC_UNIT_BYTES, unit_length(range, work->units_a_slot, unit));
    }
}

/* The product of two polynomials over GF(2) modulo CRC32C's, bit-reversed as the register is: bit 31 is x^0. */
static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (; a; a <<= 1) {
        if (a & 0x80000000u)
            product ^= b;
        b = b & 1 ? b >> 1 ^ 0x82F63B78u : b >> 1;
    }
    return product;
}

/* x^(8 * bytes): what a state is multiplied by when so many bytes follow. */
static uint32_t power(size_t bytes) {
    uint32_t result = 0x80000000u, square = 0x00800000u; /* x^0 and x^8 */
    for (; bytes; bytes >>= 1) {
        if (bytes & 1)
            result = multiply(result, square);
        square = multiply(square, square);
    }
    return result;
}

/* Each slot's checksum from the states of its units, which began at 0: the register is linear in what it begins with and in the bytes. */
static void join_units(const crc_work *work, const uint8_t *keys, uint32_t *out) {
    size_t units = work->units_a_slot;
    uint32_t whole = power(CRC_UNIT_BYTES), last = power(unit_length(work->range, units, units - 1));
    for (size_t slot = 0; slot < work->n / units; slot++) {
        uint32_t state = fk_active->crc(~0u, keys + KEY_BYTES * slot, KEY_BYTES);
        for (size_t unit = 0; unit < units; unit++)
            state = multiply(state, unit + 1 < units ? whole : last) ^ work->states[slot * units + unit];
        out[slot] = ~state;
    }
}

/* On one thread slots stay whole: a pass over a slot begins with its key's state, and nothing is left to join. */
static void crc_slots(const slot_range *range, const int64_t *slots, size_t n, const uint8_t *keys, uint32_t *out) {
    for (size_t i = 0; i < n; i++) {
        const uint8_t *image = (const uint8_t *)(uintptr_t)(range->base + slots[i] * range->slot_bytes + range->offset);
        uint32_t state = fk_active->crc(~0u, keys + KEY_BYTES * i, KEY_BYTES);
        out[i] = ~fk_active->crc(state, image, (size_t)range->length);
    }
}

/* False without memory. */
static int crc_slots_shared(const slot_range *range, const int64_t *slots, size_t n, const uint8_t *keys, uint32_t *out, long threads) {
    size_t units = range->length ? ((size_t)range->length + CRC_UNIT_BYTES - 1) / CRC_UNIT_BYTES : 1;
    crc_work work = {range, slots, units, NULL, n * units, 0};
    work.states = malloc(work.n * sizeof *work.states);
    if (!work.states)
        return 0;
    fk_share(crc_units, &work, (size_t)threads < work.n ? threads : (long)work.n);
    join_units(&work, keys, out);
    free(work.states);
    return 1;
}

PyObject *fk_crc32c_slots(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"base_addr", "slot_bytes", "offset", "length", "slots", "keys", "out", "threads", NULL};
    slot_range range;
    long threads = 1;
    PyObject *slots_object, *keys_object, *out_object;
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LnnnOOO|l", names, &range.base, &range.slot_bytes, &range.offset, &range.length,
                                     &slots_object, &keys_object, &out_object, &threads))
        return NULL;
    if (threads < 1 || threads > FK_THREADS_MAX)
        return PyErr_Format(PyExc_ValueError, "threads is %ld, expected 1 to %d", threads, FK_THREADS_MAX);
    if (range.slot_bytes < 0 || range.offset < 0 || range.length < 0 || range.length > range.slot_bytes - range.offset)
        return PyErr_Format(PyExc_ValueError, "offset %zd and length %zd do not lie in a slot of %zd bytes", range.offset,
                            range.length, range.slot_bytes);
    fk_buffer slots = {0}, keys = {0}, out = {0};
    PyObject *result = NULL;
    int64_t *ids = NULL;
    if (fk_open(&slots, slots_object, "slots", FK_IDS, 0) && fk_open(&keys, keys_object, "keys", FK_BYTES, 0) &&
        fk_open(&out, out_object, "out", FK_UINT32, 1) && fk_expect_length("keys", keys.length, KEY_BYTES * slots.length) &&
        fk_expect_length("out", out.length, slots.length) && (ids = fk_copy_ids(&slots, "slots", INT64_MAX))) {
        size_t n = (size_t)slots.length;
        FK_BEGIN_BULK(slots.length * range.length)
        if (threads == 1 || n == 0 || !crc_slots_shared(&range, ids, n, keys.view.buf, out.view.buf, threads))
            crc_slots(&range, ids, n, keys.view.buf, out.view.buf);
        FK_END_BULK
        result = Py_NewRef(Py_None);
    }
    PyMem_RawFree(ids);
    fk_close(&slots), fk_close(&keys), fk_close(&out);
    return result;
}
