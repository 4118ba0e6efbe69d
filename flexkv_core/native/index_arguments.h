/* RunIndex as an object, and its arguments. */
#ifndef FLEXKV_INDEX_ARGUMENTS_H
#define FLEXKV_INDEX_ARGUMENTS_H

#include "functions.h"
#include "run_tree.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    fk_tree tree;
} IndexObject;

#define TREE(self) (&((IndexObject *)(self))->tree)

static inline int expect_arguments(const char *name, Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected)
        return 1;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", name, expected, given);
    return 0;
}

static inline int as_integer(PyObject *object, int64_t *value) {
    *value = PyLong_AsLongLong(object);
    return !(*value == -1 && PyErr_Occurred());
}

/* An id of a run that exists; KeyError otherwise. */
static inline int as_run(fk_tree *tree, PyObject *object, int32_t *id) {
    int64_t value;
    if (!as_integer(object, &value))
        return 0;
    if (!fk_tree_has(tree, value)) {
        PyErr_SetObject(PyExc_KeyError, object);
        return 0;
    }
    *id = (int32_t)value;
    return 1;
}

static inline int as_tier(PyObject *object, int *tier) {
    int64_t value;
    if (!as_integer(object, &value))
        return 0;
    if (value < 0 || value >= FK_TIERS) {
        PyErr_SetObject(PyExc_IndexError, object);
        return 0;
    }
    *tier = (int)value;
    return 1;
}

/* A C-contiguous buffer of int32. */
static inline int open_slots(Py_buffer *view, PyObject *object, int writable) {
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) < 0)
        return 0;
    if (view->itemsize == sizeof(int32_t) && view->format && (!strcmp(view->format, "i") || !strcmp(view->format, "l")))
        return 1;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_TypeError, "slots must be int32");
    return 0;
}

static inline PyObject *as_bytes(const void *data, size_t bytes) {
    return PyBytes_FromStringAndSize(data, (Py_ssize_t)bytes);
}

static inline PyObject *as_list(const int32_t *ids, size_t count) {
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list && i < count; i++) {
        PyObject *id = PyLong_FromLong(ids[i]);
        if (!id) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SET_ITEM(list, (Py_ssize_t)i, id);
    }
    return list;
}

static inline PyObject *three(int64_t a, int64_t b, int64_t c) {
    PyObject *tuple = PyTuple_New(3);
    int64_t values[3] = {a, b, c};
    for (int i = 0; tuple && i < 3; i++) {
        PyObject *value = PyLong_FromLongLong(values[i]);
        if (!value) {
            Py_DECREF(tuple);
            return NULL;
        }
        PyTuple_SET_ITEM(tuple, i, value);
    }
    return tuple;
}

/* The tree of a RunIndex; NULL with TypeError set for anything else. */
const fk_tree *fk_index_tree(PyObject *index);

/* ---- in index_tiers.c -------------------------------------------------------------------------------------------------------- */

PyObject *fk_index_leaves(PyObject *self, PyObject *run);
PyObject *fk_index_holds(PyObject *self, PyObject *run);
PyObject *fk_index_child(PyObject *self, PyObject *run);
PyObject *fk_index_segment(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *fk_index_missing(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *fk_index_locate(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *fk_index_fill(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *fk_index_load(PyObject *self, PyObject *const *args, Py_ssize_t count);

#endif
