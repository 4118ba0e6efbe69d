/* Buffer arguments; the contracts stand in buffers.h. */
#include "buffers.h"

#include <string.h>

static const char *const wanted[] = {"bytes", "uint8", "uint32", "int64", "int32 or int64"};

static int is_kind(const Py_buffer *view, fk_kind kind) {
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=' || *format == '<')
        format++;
    if (kind == FK_BYTES)
        return 1;
    if (view->ndim != 1 || !*format || format[1])
        return 0;
    int is_signed = strchr("ilq", *format) != NULL, is_unsigned = strchr("BIL", *format) != NULL;
    switch (kind) {
    case FK_UINT8: return is_unsigned && view->itemsize == 1;
    case FK_UINT32: return is_unsigned && view->itemsize == 4;
    case FK_INT64: return is_signed && view->itemsize == 8;
    default: return is_signed && (view->itemsize == 4 || view->itemsize == 8);
    }
}

int fk_open(fk_buffer *buffer, PyObject *object, const char *name, fk_kind kind, int writable) {
    if (PyObject_GetBuffer(object, &buffer->view, PyBUF_FULL_RO) < 0)
        return 0;
    if (!is_kind(&buffer->view, kind) || !PyBuffer_IsContiguous(&buffer->view, 'C')) {
        PyErr_Format(PyExc_TypeError, "%s must be a contiguous 1-D buffer of %s", name, wanted[kind]);
        return 0;
    }
    if (writable && buffer->view.readonly) {
        PyErr_Format(PyExc_TypeError, "%s must be writable", name);
        return 0;
    }
    buffer->length = kind == FK_BYTES ? buffer->view.len : buffer->view.len / buffer->view.itemsize;
    return 1;
}

void fk_close(fk_buffer *buffer) {
    if (buffer->view.obj)
        PyBuffer_Release(&buffer->view);
}

int fk_expect_length(const char *name, Py_ssize_t length, Py_ssize_t expected) {
    if (length == expected)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s has length %zd, expected %zd", name, length, expected);
    return 0;
}

int64_t *fk_copy_ids(const fk_buffer *ids, const char *name, int64_t count) {
    size_t n = (size_t)ids->length;
    int64_t *copy = PyMem_RawMalloc((n ? n : 1) * sizeof *copy);
    if (!copy) {
        PyErr_NoMemory();
        return NULL;
    }
    if (ids->view.itemsize == 8)
        memcpy(copy, ids->view.buf, n * sizeof *copy);
    else
        for (size_t i = 0; i < n; i++)
            copy[i] = ((const int32_t *)ids->view.buf)[i];
    for (size_t i = 0; i < n; i++)
        if (copy[i] < 0 || copy[i] >= count) {
            PyErr_Format(PyExc_IndexError, "%s[%zu] is %lld, expected 0 <= id < %lld", name, i, (long long)copy[i],
                         (long long)count);
            PyMem_RawFree(copy);
            return NULL;
        }
    return copy;
}
