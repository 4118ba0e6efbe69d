/* The class Uring: I/O of whole batches through io_uring. Its contract stands in _native.pyi. */
#include "buffers.h"
#include "functions.h"
#include "uring_queue.h"

#ifndef FLEXKV_HAVE_URING
int flexkv_add_uring(PyObject *module) {
    (void)module;
    return 0;
}
#else
#include <errno.h>
#include <string.h>

#define DEPTH_MAX 4096
/* So few operations are handed over without dropping the GIL: at 6-16 us each of 256 KiB that is less than what another thread, once it
 * has the GIL, keeps it for (5 ms). */
#define KEEP_GIL_OPS_MAX 4

typedef struct {
    PyObject_HEAD
    fk_io io;
    int is_open, is_busy;
} Uring;

static PyObject *raise_errno(int error) {
    errno = -error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* The engine for the duration of a call that may drop the GIL; false with an error set where it can't be had. */
static int enter(Uring *self) {
    if (!self->is_open)
        PyErr_SetString(PyExc_ValueError, "the ring was closed");
    else if (self->is_busy)
        PyErr_SetString(PyExc_RuntimeError, "the ring is in use by another thread");
    else
        return self->is_busy = 1;
    return 0;
}

static void leave(Uring *self) { self->is_busy = 0; }

static int64_t end_of(double seconds) {
    if (seconds < 0 || seconds > 1e9)
        return FK_NEVER;
    return fk_now_ns() + (int64_t)(seconds * 1e9);
}

static PyObject *uring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"files", "depth", NULL};
    PyObject *given;
    unsigned depth;
    fk_buffer files = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OI:Uring", names, &given, &depth))
        return NULL;
    if (depth < 1 || depth > DEPTH_MAX)
        return PyErr_Format(PyExc_ValueError, "depth is %u, expected 1 <= depth <= %d", depth, DEPTH_MAX);
    Uring *self = NULL;
    if (fk_open(&files, given, "files", FK_IDS, 0)) {
        if (files.view.itemsize != 4)
            PyErr_SetString(PyExc_TypeError, "files must be a buffer of int32");
        else
            self = (Uring *)type->tp_alloc(type, 0);
    }
    if (self) {
        int error = fk_io_open(&self->io, files.view.buf, (size_t)files.length, depth);
        self->is_open = !error;
        if (error) {
            raise_errno(error);
            Py_CLEAR(self);
        }
    }
    fk_close(&files);
    return (PyObject *)self;
}

static void close_engine(Uring *self) {
    if (!self->is_open)
        return;
    self->is_open = 0;
    Py_BEGIN_ALLOW_THREADS
    fk_io_close(&self->io);
    Py_END_ALLOW_THREADS
}

static void uring_dealloc(Uring *self) {
    PyTypeObject *type = Py_TYPE(self);
    close_engine(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *uring_close(Uring *self, PyObject *unused) {
    (void)unused;
    if (self->is_open) {
        if (!enter(self))
            return NULL;
        close_engine(self);
        leave(self);
    }
    Py_RETURN_NONE;
}

static PyObject *uring_register_buffers(Uring *self, PyObject *given) {
    fk_buffer pieces = {0};
    int error = 0;
    if (!fk_open(&pieces, given, "pieces", FK_INT64, 0) || !enter(self)) {
        fk_close(&pieces);
        return NULL;
    }
    if (pieces.length % 2 || self->io.pieces)
        error = -EINVAL;
    Py_BEGIN_ALLOW_THREADS /* seconds, where memory has not been touched before */
    if (!error)
        error = fk_io_register(&self->io, pieces.view.buf, (size_t)pieces.length / 2);
    Py_END_ALLOW_THREADS
    leave(self);
    fk_close(&pieces);
    if (error)
        return raise_errno(error);
    Py_RETURN_NONE;
}

/* What the Python side does not check for this engine: see check_ops() in flexkv_core/io/base.py. */
static int check_ops(const Uring *self, const fk_buffer *buffer, int kind, long long length) {
    const fk_io_op *ops = buffer->view.buf;
    size_t count = (size_t)buffer->length / sizeof *ops;
    if (buffer->length % (Py_ssize_t)sizeof *ops)
        return PyErr_Format(PyExc_ValueError, "ops has %zd bytes, expected a multiple of %zu", buffer->length, sizeof *ops), 0;
    if (kind < 0 || kind >= FK_IO_KINDS)
        return PyErr_Format(PyExc_ValueError, "kind is %d, expected 0 <= kind < %d", kind, FK_IO_KINDS), 0;
    if (kind != FK_SYNC && (length < 1 || length > INT32_MAX - 4095))
        return PyErr_Format(PyExc_ValueError, "length is %lld, expected 0 < length <= %d", length, INT32_MAX - 4095), 0;
    for (size_t i = 0; i < count; i++) {
        if (ops[i].file < 0 || (size_t)ops[i].file >= self->io.file_count)
            return PyErr_Format(PyExc_ValueError, "ops[%zu].file is %d, expected 0 <= file < %zu", i, (int)ops[i].file,
                                self->io.file_count),
                   0;
        if (ops[i].offset < 0)
            return PyErr_Format(PyExc_ValueError, "ops[%zu].offset is %lld, expected not negative", i, (long long)ops[i].offset), 0;
    }
    return 1;
}

/* Hands over what was added. The kernel's refusal is no error here: the entries stay in the ring for the next call. */
static void hand_over(Uring *self) {
    unsigned count = fk_ring_unsubmitted(&self->io.ring);
    if (count && count <= KEEP_GIL_OPS_MAX)
        fk_io_wait(&self->io, 0, INT64_MIN);
    else if (count) {
        Py_BEGIN_ALLOW_THREADS
        fk_io_wait(&self->io, 0, INT64_MIN);
        Py_END_ALLOW_THREADS
    }
}

static PyObject *uring_submit(Uring *self, PyObject *args) {
    int kind;
    PyObject *given;
    long long length;
    double deadline_s;
    fk_buffer ops = {0};
    int64_t batch = 0;
    if (!PyArg_ParseTuple(args, "iOLd:submit", &kind, &given, &length, &deadline_s) || !enter(self))
        return NULL;
    if (fk_open(&ops, given, "ops", FK_BYTES, 0) && check_ops(self, &ops, kind, length)) {
        uint32_t bytes = kind == FK_SYNC ? 0 : (uint32_t)length;
        batch = fk_io_add(&self->io, kind, ops.view.buf, (size_t)ops.length / sizeof(fk_io_op), bytes, end_of(deadline_s));
        if (batch < 0)
            PyErr_NoMemory();
        else
            hand_over(self);
    }
    leave(self);
    fk_close(&ops);
    return batch > 0 ? PyLong_FromLongLong(batch) : NULL;
}

/* The completions as (tags int64, results int32), and forgotten. */
static PyObject *take_done(fk_io *io) {
    Py_ssize_t count = (Py_ssize_t)io->done_count;
    PyObject *tags = PyBytes_FromStringAndSize(NULL, count * 8), *results = PyBytes_FromStringAndSize(NULL, count * 4);
    if (!tags || !results) {
        Py_XDECREF(tags);
        Py_XDECREF(results);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        memcpy(PyBytes_AS_STRING(tags) + 8 * i, &io->done[i].tag, 8);
        memcpy(PyBytes_AS_STRING(results) + 4 * i, &io->done[i].result, 4);
    }
    io->done_count = 0;
    return Py_BuildValue("NN", tags, results);
}

static PyObject *uring_wait(Uring *self, PyObject *args) {
    Py_ssize_t min_count;
    double timeout_s;
    if (!PyArg_ParseTuple(args, "nd:wait", &min_count, &timeout_s) || !enter(self))
        return NULL;
    fk_io *io = &self->io;
    size_t target = min_count > 0 ? (size_t)min_count : 0;
    int64_t end_ns = end_of(timeout_s);
    int error = 0;
    fk_io_clear_event(io);
    fk_io_pump(io);
    size_t pending = fk_io_pending(io);
    int is_done = io->done_count >= (target < pending ? target : pending);
    if (is_done && fk_ring_unsubmitted(&io->ring) <= KEEP_GIL_OPS_MAX)
        error = fk_io_wait(io, 0, INT64_MIN); /* nothing to sleep for: keep the GIL */
    else
        do {
            Py_BEGIN_ALLOW_THREADS
            error = fk_io_wait(io, target, end_ns);
            Py_END_ALLOW_THREADS
        } while (error == -EINTR && !PyErr_CheckSignals());
    PyObject *done = NULL;
    if (!PyErr_Occurred())
        done = error && error != -EINTR ? raise_errno(error) : take_done(io);
    leave(self);
    return done;
}

static PyObject *uring_cancel(Uring *self, PyObject *args) {
    long long batch;
    if (!PyArg_ParseTuple(args, "L:cancel", &batch) || !enter(self))
        return NULL;
    if (batch > 0) {
        fk_io_cancel(&self->io, batch);
        hand_over(self);
    }
    leave(self);
    Py_RETURN_NONE;
}

static PyObject *uring_fileno(Uring *self, PyObject *unused) {
    (void)unused;
    if (!enter(self))
        return NULL;
    int fd = fk_io_event_fd(&self->io);
    leave(self);
    return fd < 0 ? raise_errno(fd) : PyLong_FromLong(fd);
}

static PyObject *uring_inject(Uring *self, PyObject *given) {
    fk_buffer results = {0};
    int32_t *copy = NULL;
    if (!fk_open(&results, given, "results", FK_IDS, 0) || !enter(self)) {
        fk_close(&results);
        return NULL;
    }
    if (results.view.itemsize != 4)
        PyErr_SetString(PyExc_TypeError, "results must be a buffer of int32");
    else if (!(copy = PyMem_RawMalloc((size_t)results.view.len + 4)))
        PyErr_NoMemory();
    else {
        memcpy(copy, results.view.buf, (size_t)results.view.len);
        fk_io_inject(&self->io, copy, (size_t)results.length);
    }
    leave(self);
    fk_close(&results);
    if (!copy)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *uring_pending(Uring *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(self->is_open ? fk_io_pending(&self->io) : 0);
}

static PyMethodDef methods[] = {
    {"register_buffers", (PyCFunction)uring_register_buffers, METH_O, NULL},
    {"submit", (PyCFunction)uring_submit, METH_VARARGS, NULL},
    {"wait", (PyCFunction)uring_wait, METH_VARARGS, NULL},
    {"cancel", (PyCFunction)uring_cancel, METH_VARARGS, NULL},
    {"fileno", (PyCFunction)uring_fileno, METH_NOARGS, NULL},
    {"inject", (PyCFunction)uring_inject, METH_O, NULL},
    {"close", (PyCFunction)uring_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {{"pending", (getter)uring_pending, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot slots[] = {
    {Py_tp_new, uring_new}, {Py_tp_dealloc, uring_dealloc}, {Py_tp_methods, methods}, {Py_tp_getset, attributes}, {0, NULL},
};

static PyType_Spec spec = {"flexkv_core.native._native.Uring", sizeof(Uring), 0, Py_TPFLAGS_DEFAULT, slots};

int flexkv_add_uring(PyObject *module) {
    PyObject *type = PyType_FromSpec(&spec);
    if (!type)
        return -1;
    if (PyModule_AddObject(module, "Uring", type) == 0)
        return 0;
    Py_DECREF(type);
    return -1;
}

#endif
