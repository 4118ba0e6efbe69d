/* Arguments that speak the buffer protocol, checked; and the choice whether a call drops the GIL. */
#ifndef FLEXKV_BUFFERS_H
#define FLEXKV_BUFFERS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

typedef enum { FK_BYTES, FK_UINT8, FK_UINT32, FK_INT64, FK_IDS /* int32 or int64 */ } fk_kind;

/* A borrowed view of a C-contiguous buffer; zero-initialise, and fk_close() in any case. */
typedef struct {
    Py_buffer view;
    Py_ssize_t length; /* elements; bytes for FK_BYTES */
} fk_buffer;

/* Opens `object` as a buffer of this kind. Returns 0 and sets TypeError where it is none (or read-only while writable is asked for). */
int fk_open(fk_buffer *buffer, PyObject *object, const char *name, fk_kind kind, int writable);
void fk_close(fk_buffer *buffer);

/* Returns 0 and sets ValueError unless length == expected. */
int fk_expect_length(const char *name, Py_ssize_t length, Py_ssize_t expected);

/* A private int64 copy (PyMem_RawMalloc) of ids, all checked to lie in [0, count); NULL with IndexError or MemoryError set. Private,
 * because the checks must hold for what is used after the GIL is dropped. */
int64_t *fk_copy_ids(const fk_buffer *ids, const char *name, int64_t count);

/* Work below this many bytes keeps the GIL: handing it over costs more than the work, and a busy thread that takes it may keep it for
 * the 5 ms of sys.getswitchinterval(). */
#define FK_GIL_BYTES_MIN (64 * 1024)
#define FK_BEGIN_BULK(bytes) { PyThreadState *fk_saved = (size_t)(bytes) >= FK_GIL_BYTES_MIN ? PyEval_SaveThread() : NULL;
#define FK_END_BULK if (fk_saved) PyEval_RestoreThread(fk_saved); }

#endif
