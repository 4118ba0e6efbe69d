/* The part of RunIndex that several tiers need: moving blocks between them, and the warm start. */
#include "index_arguments.h"

PyObject *fk_index_leaves(PyObject *self, PyObject *run) {
    int32_t id;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    return three(fk_tree_leaf(TREE(self), id, 0), fk_tree_leaf(TREE(self), id, 1), fk_tree_leaf(TREE(self), id, 2));
}

PyObject *fk_index_holds(PyObject *self, PyObject *run) {
    int32_t id;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    long tiers = 0;
    for (int tier = 0; tier < FK_TIERS; tier++)
        tiers |= (long)(fk_tree_run(TREE(self), id)->slots[tier] != NULL) << tier;
    return PyLong_FromLong(tiers);
}

PyObject *fk_index_child(PyObject *self, PyObject *run) {
    int32_t id;
    if (!as_run(TREE(self), run, &id))
        return NULL;
    const fk_run *r = fk_tree_run(TREE(self), id);
    return PyLong_FromLong(r->children == 1 ? r->first_child : -1);
}

static PyObject *segment_of(const fk_tree *tree, int32_t id, int tier, size_t at, size_t count) {
    static const uint8_t root[FK_KEY_BYTES];
    const fk_run *run = fk_tree_run(tree, id);
    const uint8_t *keys = run->keys + FK_KEY_BYTES * at;
    const uint8_t *before = at ? keys - FK_KEY_BYTES : run->parent >= 0 ? fk_tree_run(tree, run->parent)->tail : root;
    PyObject *slots = run->slots[tier] ? as_bytes(run->slots[tier] + at, count * sizeof(int32_t)) : as_bytes(NULL, count * sizeof(int32_t));
    if (slots && !run->slots[tier])
        memset(PyBytes_AS_STRING(slots), 0xff, count * sizeof(int32_t));
    return slots ? Py_BuildValue("(y#y#N)", before, (Py_ssize_t)FK_KEY_BYTES, keys, (Py_ssize_t)(FK_KEY_BYTES * count), slots) : NULL;
}

PyObject *fk_index_segment(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int32_t id;
    int tier;
    int64_t at, count;
    if (!expect_arguments("segment", given, 4) || !as_run(TREE(self), args[0], &id) || !as_tier(args[1], &tier) ||
        !as_integer(args[2], &at) || !as_integer(args[3], &count))
        return NULL;
    int32_t length = fk_tree_run(TREE(self), id)->length;
    if (at < 0 || count < 1 || at > length || count > length - at)
        return PyErr_Format(PyExc_ValueError, "%lld blocks at %lld are not in a run of %d", (long long)count, (long long)at, length);
    return segment_of(TREE(self), id, tier, (size_t)at, (size_t)count);
}

PyObject *fk_index_missing(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int32_t id;
    int have, lack;
    int64_t at, limit;
    if (!expect_arguments("missing", given, 5) || !as_run(TREE(self), args[0], &id) || !as_tier(args[1], &have) ||
        !as_tier(args[2], &lack) || !as_integer(args[3], &at) || !as_integer(args[4], &limit))
        return NULL;
    int32_t length = fk_tree_run(TREE(self), id)->length;
    if (at < 0 || at > length || limit < 1)
        return PyErr_Format(PyExc_ValueError, "cannot look for %lld blocks from %lld in a run of %d", (long long)limit, (long long)at, length);
    int64_t count = fk_tree_missing(TREE(self), id, have, lack, &at, limit);
    return Py_BuildValue("(LL)", (long long)at, (long long)count);
}

PyObject *fk_index_locate(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int tier;
    Py_buffer slots;
    if (!expect_arguments("locate", given, 2) || !as_tier(args[0], &tier) || !open_slots(&slots, args[1], 0))
        return NULL;
    fk_vector found = {0};
    int status = fk_tree_locate(TREE(self), tier, slots.buf, slots.len / (int64_t)sizeof(int32_t), &found);
    PyObject *places = status == FK_DONE ? as_bytes(found.used ? found.data : "", found.used) : PyErr_NoMemory();
    free(found.data);
    PyBuffer_Release(&slots);
    return places;
}

PyObject *fk_index_fill(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int32_t id;
    int tier;
    int64_t skip;
    if (!expect_arguments("fill", given, 4) || !as_run(TREE(self), args[0], &id) || !as_integer(args[1], &skip) ||
        !as_tier(args[2], &tier))
        return NULL;
    if (skip < 0)
        return PyErr_Format(PyExc_ValueError, "cannot skip %lld blocks", (long long)skip);
    Py_buffer slots;
    if (!open_slots(&slots, args[3], 1))
        return NULL;
    fk_vector gained = {0};
    int status = fk_tree_fill(TREE(self), id, skip, tier, slots.buf, slots.len / (int64_t)sizeof(int32_t), &gained);
    PyObject *list = NULL;
    if (status == FK_DONE)
        list = as_list(gained.data, gained.used / sizeof(int32_t));
    else if (status == FK_TOO_FEW)
        PyErr_Format(PyExc_ValueError, "there are not so many blocks above run %d", id);
    else
        PyErr_NoMemory();
    free(gained.data);
    PyBuffer_Release(&slots);
    return list;
}

/* ---- the warm start ---------------------------------------------------------------------------------------------------------- */

static PyObject *load_blocks(fk_tree *tree, int tier, const fk_blocks *blocks) {
    fk_vector dropped = {0}, ids = {0}, newest = {0};
    int status;
    /* Some tenths of a second for a million blocks. The caller's lock keeps others away from the tree. */
    Py_BEGIN_ALLOW_THREADS
    status = fk_tree_load(tree, tier, blocks, &dropped, &ids, &newest);
    Py_END_ALLOW_THREADS
    PyObject *result = NULL;
    if (status == FK_DONE)
        result = Py_BuildValue("(NNN)", as_bytes(dropped.used ? dropped.data : "", dropped.used),
                               as_bytes(ids.used ? ids.data : "", ids.used), as_bytes(newest.used ? newest.data : "", newest.used));
    else
        PyErr_NoMemory();
    free(dropped.data);
    free(ids.data);
    free(newest.data);
    return result;
}

static int open_ages(Py_buffer *view, PyObject *object) {
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return 0;
    if (view->itemsize == sizeof(int64_t) && view->format && (!strcmp(view->format, "l") || !strcmp(view->format, "q")))
        return 1;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_TypeError, "ages must be int64");
    return 0;
}

static PyObject *load_views(fk_tree *tree, int tier, const Py_buffer *slots, const Py_buffer *keys, const Py_buffer *parents,
                            const Py_buffer *ages) {
    Py_ssize_t count = slots->len / (Py_ssize_t)sizeof(int32_t);
    if (tree->run_count || count >= INT32_MAX - 4 || keys->len != FK_KEY_BYTES * count || parents->len != keys->len ||
        ages->len != count * (Py_ssize_t)sizeof(int64_t))
        return PyErr_Format(PyExc_ValueError, "cannot load %zd slots, %zd bytes of keys, %zd of parents, %zd ages", count, keys->len,
                            parents->len, ages->len / (Py_ssize_t)sizeof(int64_t));
    fk_blocks blocks = {slots->buf, keys->buf, parents->buf, ages->buf, (int32_t)count};
    return load_blocks(tree, tier, &blocks);
}

PyObject *fk_index_load(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    int tier;
    if (!expect_arguments("load", given, 5) || !as_tier(args[0], &tier))
        return NULL;
    Py_buffer slots = {0}, keys = {0}, parents = {0}, ages = {0};
    PyObject *result = NULL;
    if (open_slots(&slots, args[1], 0) && PyObject_GetBuffer(args[2], &keys, PyBUF_SIMPLE) == 0 &&
        PyObject_GetBuffer(args[3], &parents, PyBUF_SIMPLE) == 0 && open_ages(&ages, args[4]))
        result = load_views(TREE(self), tier, &slots, &keys, &parents, &ages);
    Py_buffer *views[4] = {&slots, &keys, &parents, &ages};
    for (int i = 0; i < 4; i++)
        if (views[i]->obj)
            PyBuffer_Release(views[i]);
    return result;
}
