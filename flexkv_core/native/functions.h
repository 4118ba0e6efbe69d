/* The functions of the module, by the file that holds them. Contracts: _native.pyi. */
#ifndef FLEXKV_FUNCTIONS_H
#define FLEXKV_FUNCTIONS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* hash.c */
PyObject *fk_hash_blocks(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *fk_pack_tokens(PyObject *self, PyObject *args, PyObject *kwargs);
/* crc32c.c */
PyObject *fk_crc32c(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *fk_crc32c_slots(PyObject *self, PyObject *args, PyObject *kwargs);
/* copy.c */
PyObject *fk_gather(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *fk_scatter(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *fk_gather_crc(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *fk_scatter_verify(PyObject *self, PyObject *args, PyObject *kwargs);
/* quantise.c */
PyObject *fk_quantise(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *fk_dequantise(PyObject *self, PyObject *args, PyObject *kwargs);
/* exchange.c */
PyObject *fk_ask_match(PyObject *self, PyObject *args);
PyObject *fk_answer_match(PyObject *self, PyObject *args);
/* index.c: adds the class RunIndex; -1 with an error set where that fails */
int flexkv_add_index(PyObject *module);
/* uring.c: adds the class Uring where the headers know io_uring; -1 with an error set where that fails */
int flexkv_add_uring(PyObject *module);

#endif
