/* RunIndex: the Python face of run_tree.c. Contracts and oracle: PyRunIndex in flexkv_core/cache/radix_tree.py. */
#include "index_arguments.h"

/* ---- finding ----------------------------------------------------------------------------------------------------------------- */

static PyObject *index_match(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t start;
    int tier, through;
    if (!expect_arguments("match", count, 5) || !as_integer(args[1], &start) || !as_tier(args[3], &tier) ||
        (through = PyObject_IsTrue(args[4])) < 0)
        return NULL;
    Py_buffer keys, out = {0};
    if (PyObject_GetBuffer(args[0], &keys, PyBUF_SIMPLE) < 0)
        return NULL;
    if (args[2] != Py_None && !open_slots(&out, args[2], 1)) {
        PyBuffer_Release(&keys);
        return NULL;
    }
    int64_t total = keys.len / FK_KEY_BYTES;
    PyObject *result = NULL;
    if (start < 0 || (out.obj && out.len / (int64_t)sizeof(int32_t) < total - start)) {
        PyErr_Format(PyExc_ValueError, "no room for the slots of blocks %lld to %lld", (long long)start, (long long)total);
    } else {
        fk_match found = fk_tree_match(TREE(self), keys.buf, total, start, out.buf, tier, through);
        result = three(found.blocks, found.run, found.at);
    }
    if (out.obj)
        PyBuffer_Release(&out);
    PyBuffer_Release(&keys);
    return result;
}

static PyObject *index_find(PyObject *self, PyObject *head) {
    if (!PyBytes_Check(head) || PyBytes_GET_SIZE(head) != FK_KEY_BYTES)
        return PyErr_Format(PyExc_TypeError, "a head must be %d bytes", FK_KEY_BYTES);
    return PyLong_FromLong(fk_tree_find(TREE(self), (const uint8_t *)PyBytes_AS_STRING(head)));
}

static PyObject *index_path(PyObject *self, PyObject *run) {
    int32_t id, depth = 0;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    for (int32_t step = id; step >= 0; step = fk_tree_run(TREE(self), step)->parent)
        depth++;
    PyObject *path = PyList_New(depth);
    for (; path && depth > 0; id = fk_tree_run(TREE(self), id)->parent) {
        PyObject *step = PyLong_FromLong(id);
        if (!step) {
            Py_DECREF(path);
            return NULL;
        }
        PyList_SET_ITEM(path, --depth, step);
    }
    return path;
}

static PyObject *index_info(PyObject *self, PyObject *run) {
    int32_t id;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    const fk_run *r = fk_tree_run(TREE(self), id);
    return Py_BuildValue("(iiOOii)", r->parent, r->length, r->writing ? Py_True : Py_False, r->detached ? Py_True : Py_False,
                         r->pins, r->children);
}

static PyObject *index_evictable(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int32_t id;
    int tier;
    if (!expect_arguments("evictable", count, 2) || !as_run(TREE(self), args[0], &id) || !as_tier(args[1], &tier))
        return NULL;
    return PyBool_FromLong(fk_tree_evictable(TREE(self), id, tier));
}

static PyObject *index_runs(PyObject *self, PyObject *unused) {
    (void)unused;
    const fk_tree *tree = TREE(self);
    PyObject *list = PyList_New(0);
    for (int32_t id = 0; list && id < tree->chunk_count * FK_CHUNK_RUNS; id++) {
        if (!fk_tree_run(tree, id)->used)
            continue;
        PyObject *item = PyLong_FromLong(id);
        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *index_keys(PyObject *self, PyObject *run) {
    int32_t id;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    const fk_run *r = fk_tree_run(TREE(self), id);
    return as_bytes(r->keys, (size_t)r->length * FK_KEY_BYTES);
}

static PyObject *index_slots(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int32_t id;
    int tier;
    if (!expect_arguments("slots", count, 2) || !as_run(TREE(self), args[0], &id) || !as_tier(args[1], &tier))
        return NULL;
    const fk_run *r = fk_tree_run(TREE(self), id);
    if (!r->slots[tier])
        Py_RETURN_NONE;
    return as_bytes(r->slots[tier], (size_t)r->length * sizeof(int32_t));
}

/* ---- growing and shaping ----------------------------------------------------------------------------------------------------- */

static PyObject *insert_views(fk_tree *tree, int32_t parent, const Py_buffer *keys, int tier, const Py_buffer *slots) {
    Py_ssize_t length = keys->len / FK_KEY_BYTES, given = slots->len / (Py_ssize_t)sizeof(int32_t);
    if (keys->len == 0 || keys->len % FK_KEY_BYTES || given != length || length > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "%zd bytes of keys do not go with %zd slots", keys->len, given);
    if (fk_tree_find(tree, keys->buf) >= 0)
        return PyErr_Format(PyExc_ValueError, "a run with this head is in the tree already");
    int32_t id;
    if (fk_tree_insert(tree, parent, keys->buf, (int32_t)length, tier, slots->buf, &id) != FK_DONE)
        return PyErr_NoMemory();
    return PyLong_FromLong(id);
}

static PyObject *index_insert(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int64_t above;
    int32_t parent = -1;
    int tier;
    if (!expect_arguments("insert", count, 4) || !as_integer(args[0], &above) ||
        (above >= 0 && !as_run(TREE(self), args[0], &parent)) || !as_tier(args[2], &tier))
        return NULL;
    Py_buffer keys, slots;
    if (PyObject_GetBuffer(args[1], &keys, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *result = NULL;
    if (open_slots(&slots, args[3], 0)) {
        result = insert_views(TREE(self), parent, &keys, tier, &slots);
        PyBuffer_Release(&slots);
    }
    PyBuffer_Release(&keys);
    return result;
}

static PyObject *index_split(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int32_t id, head;
    int64_t at;
    if (!expect_arguments("split", count, 2) || !as_run(TREE(self), args[0], &id) || !as_integer(args[1], &at))
        return NULL;
    const fk_run *run = fk_tree_run(TREE(self), id);
    if (at <= 0 || at >= run->length || run->detached)
        return PyErr_Format(PyExc_ValueError, "cannot split %d blocks at %lld", run->length, (long long)at);
    if (fk_tree_split(TREE(self), id, (int32_t)at, &head) != FK_DONE)
        return PyErr_NoMemory();
    return PyLong_FromLong(head);
}

static PyObject *index_merge(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int32_t id, absorbed;
    int64_t blocks_max;
    if (!expect_arguments("merge", count, 2) || !as_run(TREE(self), args[0], &id) || !as_integer(args[1], &blocks_max))
        return NULL;
    if (fk_tree_merge(TREE(self), id, blocks_max, &absorbed) != FK_DONE)
        return PyErr_NoMemory();
    return PyLong_FromLong(absorbed);
}

static PyObject *index_set_slots(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int32_t id;
    int tier;
    int64_t at;
    if (!expect_arguments("set_slots", count, 4) || !as_run(TREE(self), args[0], &id) || !as_tier(args[1], &tier) ||
        !as_integer(args[2], &at))
        return NULL;
    Py_buffer slots;
    if (!open_slots(&slots, args[3], 0))
        return NULL;
    int64_t given = slots.len / (int64_t)sizeof(int32_t);
    int32_t length = fk_tree_run(TREE(self), id)->length;
    int status = FK_DONE;
    if (at < 0 || at > length || given > length - at)
        PyErr_Format(PyExc_ValueError, "%lld slots at %lld do not fit a run of %d blocks", (long long)given, (long long)at, length);
    else if ((status = fk_tree_set_slots(TREE(self), id, tier, (int32_t)at, slots.buf, (int32_t)given)) != FK_DONE)
        PyErr_NoMemory();
    PyBuffer_Release(&slots);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *index_publish(PyObject *self, PyObject *run) {
    int32_t id;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    fk_tree_run(TREE(self), id)->writing = 0;
    Py_RETURN_NONE;
}

/* ---- keeping and letting go -------------------------------------------------------------------------------------------------- */

static PyObject *index_pin(PyObject *self, PyObject *run) {
    int32_t id;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    fk_tree_pin(TREE(self), id);
    Py_RETURN_NONE;
}

static PyObject *index_release(PyObject *self, PyObject *run) {
    int32_t id, above;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    if (fk_tree_run(TREE(self), id)->pins <= 0)
        return PyErr_Format(PyExc_ValueError, "run %d is not pinned", id);
    if (fk_tree_release(TREE(self), id, &above) != FK_DONE)
        return PyErr_NoMemory();
    return PyLong_FromLong(above);
}

/* The ids of a list or tuple of runs; NULL with an error set. The first must exist. */
static int32_t *open_runs(fk_tree *tree, PyObject *runs, Py_ssize_t *count) {
    *count = PySequence_Fast_GET_SIZE(runs);
    int32_t first, *ids = PyMem_Malloc((size_t)*count * sizeof *ids + 1);
    if (!ids)
        return (int32_t *)PyErr_NoMemory();
    int64_t value;
    int valid = *count == 0 || as_run(tree, PySequence_Fast_GET_ITEM(runs, 0), &first);
    for (Py_ssize_t i = 0; valid && i < *count; i++)
        if ((valid = as_integer(PySequence_Fast_GET_ITEM(runs, i), &value)))
            ids[i] = value < 0 || value > INT32_MAX ? -1 : (int32_t)value;
    if (valid)
        return ids;
    PyMem_Free(ids);
    return NULL;
}

static PyObject *evict_runs(fk_tree *tree, const int32_t *ids, Py_ssize_t count, int tier, int64_t want) {
    fk_eviction result;
    fk_vector gone = {0};
    PyObject *tuple = NULL;
    if (fk_tree_evict(tree, ids, count, tier, want, &result, &gone) == FK_DONE)
        tuple = Py_BuildValue("(LnONi)", (long long)result.freed, (Py_ssize_t)result.done, result.blocked ? Py_True : Py_False,
                              as_list(gone.data, gone.used / sizeof(int32_t)), result.above);
    else
        PyErr_NoMemory();
    free(gone.data);
    return tuple;
}

static PyObject *index_evict(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int tier;
    int64_t want;
    if (!expect_arguments("evict", given, 3) || !as_tier(args[1], &tier) || !as_integer(args[2], &want))
        return NULL;
    if (want < 1)
        return PyErr_Format(PyExc_ValueError, "cannot evict %lld slots", (long long)want);
    PyObject *runs = PySequence_Fast(args[0], "runs must be a sequence");
    if (!runs)
        return NULL;
    Py_ssize_t count;
    int32_t *ids = open_runs(TREE(self), runs, &count);
    PyObject *tuple = ids ? evict_runs(TREE(self), ids, count, tier, want) : NULL;
    PyMem_Free(ids);
    Py_DECREF(runs);
    return tuple;
}

static PyObject *index_detach(PyObject *self, PyObject *run) {
    int32_t id;
    fk_vector left = {0};
    if (!as_run(TREE(self), run, &id))
        return NULL;
    if (fk_tree_detach(TREE(self), id, &left) != FK_DONE) {
        free(left.data);
        return PyErr_NoMemory();
    }
    PyObject *list = as_list(left.data, left.used / sizeof(int32_t));
    free(left.data);
    return list;
}

static PyObject *index_detach_all(PyObject *self, PyObject *unused) {
    (void)unused;
    fk_vector left = {0};
    int status = FK_DONE;
    for (int32_t id = TREE(self)->first_root, next; id >= 0 && status == FK_DONE; id = next) {
        next = fk_tree_run(TREE(self), id)->next;
        status = fk_tree_detach(TREE(self), id, &left);
        left.used = 0;
    }
    free(left.data);
    if (status != FK_DONE)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* The content of a vector, which is empty then. A large one gives its memory back: the next eviction needs far less. */
static PyObject *drain(fk_vector *vector) {
    PyObject *content = as_bytes(vector->data, vector->used);
    if (!content)
        return NULL;
    vector->used = 0;
    if (vector->capacity > 64 * 1024) {
        free(vector->data);
        *vector = (fk_vector){0};
    }
    return content;
}

static PyObject *index_drain(PyObject *self, PyObject *tier) {
    int number;
    return as_tier(tier, &number) ? drain(&TREE(self)->freed[number]) : NULL;
}

static PyObject *index_drain_removed(PyObject *self, PyObject *tier) {
    int number;
    return as_tier(tier, &number) ? drain(&TREE(self)->removed[number]) : NULL;
}

static PyObject *index_memory_bytes(PyObject *self, PyObject *unused) {
    (void)unused;
    return PyLong_FromSize_t(fk_tree_memory(TREE(self)));
}

/* ---- the type ---------------------------------------------------------------------------------------------------------------- */

static PyObject *index_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"track_removed", NULL};
    int track_removed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|p", names, &track_removed))
        return NULL;
    PyObject *self = type->tp_alloc(type, 0);
    if (self && fk_tree_init(TREE(self), track_removed) != FK_DONE) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return self;
}

static void index_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    fk_tree_destroy(TREE(self));
    type->tp_free(self);
    Py_DECREF(type);
}

static Py_ssize_t index_length(PyObject *self) {
    return (Py_ssize_t)TREE(self)->run_count;
}

static PyObject *index_blocks(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(TREE(self)->blocks);
}

#define FAST(function) ((PyCFunction)(void (*)(void))(function)), METH_FASTCALL, NULL

static PyMethodDef index_methods[] = {
    {"match", FAST(index_match)},
    {"find", index_find, METH_O, NULL},
    {"path", index_path, METH_O, NULL},
    {"info", index_info, METH_O, NULL},
    {"evictable", FAST(index_evictable)},
    {"leaves", fk_index_leaves, METH_O, NULL},
    {"holds", fk_index_holds, METH_O, NULL},
    {"child", fk_index_child, METH_O, NULL},
    {"runs", index_runs, METH_NOARGS, NULL},
    {"keys", index_keys, METH_O, NULL},
    {"slots", FAST(index_slots)},
    {"segment", FAST(fk_index_segment)},
    {"missing", FAST(fk_index_missing)},
    {"locate", FAST(fk_index_locate)},
    {"insert", FAST(index_insert)},
    {"split", FAST(index_split)},
    {"merge", FAST(index_merge)},
    {"set_slots", FAST(index_set_slots)},
    {"fill", FAST(fk_index_fill)},
    {"load", FAST(fk_index_load)},
    {"publish", index_publish, METH_O, NULL},
    {"pin", index_pin, METH_O, NULL},
    {"release", index_release, METH_O, NULL},
    {"evict", FAST(index_evict)},
    {"detach", index_detach, METH_O, NULL},
    {"detach_all", index_detach_all, METH_NOARGS, NULL},
    {"drain", index_drain, METH_O, NULL},
    {"drain_removed", index_drain_removed, METH_O, NULL},
    {"memory_bytes", index_memory_bytes, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef index_getset[] = {
    {"blocks", index_blocks, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot index_type_slots[] = {
    {Py_tp_new, index_new},       {Py_tp_dealloc, index_dealloc}, {Py_tp_methods, index_methods},
    {Py_tp_getset, index_getset}, {Py_sq_length, index_length},   {0, NULL},
};

static PyType_Spec index_spec = {
    .name = "flexkv_core.native._native.RunIndex",
    .basicsize = sizeof(IndexObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = index_type_slots,
};

static PyObject *index_type; /* for as long as the process lives, as the module */

const fk_tree *fk_index_tree(PyObject *index) {
    if (PyObject_TypeCheck(index, (PyTypeObject *)index_type))
        return TREE(index);
    PyErr_SetString(PyExc_TypeError, "a RunIndex is needed");
    return NULL;
}

int flexkv_add_index(PyObject *module) {
    index_type = PyType_FromSpec(&index_spec);
    return index_type ? PyModule_AddObjectRef(module, "RunIndex", index_type) : -1;
}
