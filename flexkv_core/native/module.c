/* The module _native: its table of functions and the choice of kernels. What each function does stands in _native.pyi. */
#include "functions.h"
#include "kernels.h"

static PyObject *select_instructions(PyObject *self, PyObject *name) {
    const char *wanted = name == Py_None ? NULL : PyUnicode_AsUTF8(name);
    if (!wanted && name != Py_None)
        return NULL;
    if (!fk_kernels_select(wanted))
        return PyErr_Format(PyExc_ValueError, "this machine can't run the instructions %R", name);
    if (PyModule_AddStringConstant(self, "INSTRUCTIONS", fk_active->name) < 0)
        return NULL;
    Py_RETURN_NONE;
}

#define KEYWORDS(function) ((PyCFunction)(void (*)(void))(function)), METH_VARARGS | METH_KEYWORDS, NULL

static PyMethodDef methods[] = {
    {"hash_blocks", KEYWORDS(fk_hash_blocks)},
    {"pack_tokens", KEYWORDS(fk_pack_tokens)},
    {"crc32c", KEYWORDS(fk_crc32c)},
    {"crc32c_slots", KEYWORDS(fk_crc32c_slots)},
    {"gather", KEYWORDS(fk_gather)},
    {"scatter", KEYWORDS(fk_scatter)},
    {"gather_crc", KEYWORDS(fk_gather_crc)},
    {"scatter_verify", KEYWORDS(fk_scatter_verify)},
    {"quantise", KEYWORDS(fk_quantise)},
    {"dequantise", KEYWORDS(fk_dequantise)},
    {"ask_match", fk_ask_match, METH_VARARGS, NULL},
    {"answer_match", fk_answer_match, METH_VARARGS, NULL},
    {"select_instructions", select_instructions, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    if (!module)
        return NULL;
    PyObject *chosen = select_instructions(module, Py_None);
    if (!chosen || flexkv_add_index(module) < 0 || flexkv_add_uring(module) < 0) {
        Py_XDECREF(chosen);
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(chosen);
    return module;
}
