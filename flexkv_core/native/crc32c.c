/* CRC32C of buffers and of slots. */
#include "buffers.h"
#include "functions.h"
#include "kernels.h"
#include "threads.h"

#include <stdatomic.h>

#define KEY_BYTES 16

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
    const uint8_t *keys;
    uint32_t *out;
    size_t n;
    atomic_size_t next; /* the first slot that nobody has taken */
} crc_work;

static void crc_slots(void *argument) {
    crc_work *work = argument;
    const slot_range *range = work->range;
    size_t i;
    while ((i = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed)) < work->n) {
        const uint8_t *image = (const uint8_t *)(uintptr_t)(range->base + work->slots[i] * range->slot_bytes + range->offset);
        uint32_t state = fk_active->crc(~0u, work->keys + KEY_BYTES * i, KEY_BYTES);
        work->out[i] = ~fk_active->crc(state, image, (size_t)range->length);
    }
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
        crc_work work = {&range, ids, keys.view.buf, out.view.buf, (size_t)slots.length, 0};
        FK_BEGIN_BULK(slots.length * range.length)
        fk_share(crc_slots, &work, threads < slots.length ? threads : (long)slots.length);
        FK_END_BULK
        result = Py_NewRef(Py_None);
    }
    PyMem_RawFree(ids);
    fk_close(&slots), fk_close(&keys), fk_close(&out);
    return result;
}
