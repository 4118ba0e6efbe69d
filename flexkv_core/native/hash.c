/* Block keys: chained XXH3-128 over tokens, and tokens out of Python sequences. */
#include "buffers.h"
#include "functions.h"

#include <string.h>

#define XXH_INLINE_ALL
#include "xxhash.h"

#define KEY_BYTES 16
#define BATCH_TOKENS 1024

/* A loop for vectors of whatever width the processor has; without glibc there is no choice at run time. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDEST __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define WIDEST
#endif

/* Tokens as int32. Returns bits of which one of the upper 32 is set where a token did not fit. */
WIDEST static uint64_t narrow(int32_t *to, const int64_t *from, size_t n) {
    uint64_t wrong = 0;
    for (size_t i = 0; i < n; i++) {
        to[i] = (int32_t)from[i];
        wrong |= (uint64_t)from[i] + 0x80000000u;
    }
    return wrong;
}

static PyObject *refuse_token(const int64_t *tokens, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (tokens[i] != (int32_t)tokens[i])
            return PyErr_Format(PyExc_ValueError, "token %lld is out of int32's range", (long long)tokens[i]);
    return PyErr_Format(PyExc_ValueError, "a token was out of int32's range");
}

/* A key as two words in the order of its bytes: it stays in registers from one block to the next, which must wait for it. Written to memory
 * in one width and read in another it would wait for the store, too. */
typedef struct {
    uint64_t first, second;
} key_words;

static inline key_words read_key(const uint8_t *key) {
    key_words words;
    memcpy(&words.first, key, 8);
    memcpy(&words.second, key + 8, 8);
    return words;
}

static inline void write_key(uint8_t *key, key_words words) {
    memcpy(key, &words.first, 8);
    memcpy(key + 8, &words.second, 8);
}

static inline key_words hash_one(const uint8_t *message, size_t n) {
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits(message, n));
    return read_key(digest.digest);
}

/* keys[i] = hash(key before || tokens of block i). `message` has room for a key and one block; the key before stands in it, and the
 * last key stands in it after. */
static void chain(uint8_t *keys, uint8_t *message, const int32_t *tokens, size_t blocks, size_t block_tokens) {
    for (size_t i = 0; i < blocks; i++, keys += KEY_BYTES, tokens += block_tokens) {
        memcpy(message + KEY_BYTES, tokens, 4 * block_tokens);
        key_words key = hash_one(message, KEY_BYTES + 4 * block_tokens);
        write_key(message, key);
        write_key(keys, key);
    }
}

/* The same for the usual size of a block. The length is a constant here, so that XXH3 drops its choice by length, and the message is this
 * function's own and filled in the width that XXH3 reads, so that it need not be in memory at all: a quarter less time. */
static void chain_16(uint8_t *keys, uint8_t *message, const int32_t *tokens, size_t blocks) {
    uint8_t block[KEY_BYTES + 64];
    key_words key = read_key(message);
    for (size_t i = 0; i < blocks; i++, keys += KEY_BYTES, tokens += 16) {
        write_key(block, key);
        for (size_t at = 0; at < 64; at += 8) {
            uint64_t word;
            memcpy(&word, (const uint8_t *)tokens + at, 8);
            memcpy(block + KEY_BYTES + at, &word, 8);
        }
        key = hash_one(block, sizeof block);
        write_key(keys, key);
    }
    write_key(message, key);
}

static void hash_int32(uint8_t *keys, uint8_t *message, const int32_t *tokens, size_t blocks, size_t block_tokens) {
    if (block_tokens == 16)
        chain_16(keys, message, tokens, blocks);
    else
        chain(keys, message, tokens, blocks, block_tokens);
}

/* The same over int64 tokens, made int32 in batches that stay in the first-level cache; returns narrow's bits. `batch` has room for
 * batch_blocks blocks. */
static uint64_t hash_int64(uint8_t *keys, uint8_t *message, const int64_t *tokens, size_t blocks, size_t block_tokens, int32_t *batch,
                           size_t batch_blocks) {
    uint64_t wrong = 0;
    for (size_t at = 0; at < blocks; at += batch_blocks) {
        size_t count = blocks - at < batch_blocks ? blocks - at : batch_blocks;
        wrong |= narrow(batch, tokens + at * block_tokens, count * block_tokens);
        hash_int32(keys + KEY_BYTES * at, message, batch, count, block_tokens);
    }
    return wrong;
}

/* Keys of a checked call, or NULL with an error set. */
static PyObject *hash_tokens(const fk_buffer *parent, const fk_buffer *tokens, size_t block_tokens) {
    size_t blocks = (size_t)tokens->length / block_tokens;
    PyObject *keys = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(blocks * KEY_BYTES));
    if (!keys || !blocks)
        return keys;
    size_t message_bytes = KEY_BYTES + 4 * block_tokens, batch_blocks = 1 + BATCH_TOKENS / block_tokens;
    uint8_t *message = PyMem_RawMalloc(message_bytes + 4 * block_tokens * batch_blocks);
    if (!message) {
        Py_DECREF(keys);
        return PyErr_NoMemory();
    }
    memcpy(message, parent->view.buf, KEY_BYTES);
    uint8_t *to = (uint8_t *)PyBytes_AS_STRING(keys);
    uint64_t wrong = 0;
    FK_BEGIN_BULK(tokens->view.len)
    if (tokens->view.itemsize == 4)
        hash_int32(to, message, tokens->view.buf, blocks, block_tokens);
    else
        wrong = hash_int64(to, message, tokens->view.buf, blocks, block_tokens, (int32_t *)(message + message_bytes), batch_blocks);
    FK_END_BULK
    PyMem_RawFree(message);
    if (wrong >> 32) {
        Py_DECREF(keys);
        return refuse_token(tokens->view.buf, blocks * block_tokens);
    }
    return keys;
}

PyObject *fk_hash_blocks(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"parent", "tokens", "tokens_per_block", NULL};
    PyObject *parent_object, *tokens_object, *keys = NULL;
    Py_ssize_t block_tokens;
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOn", names, &parent_object, &tokens_object, &block_tokens))
        return NULL;
    fk_buffer parent = {0}, tokens = {0};
    if (fk_open(&parent, parent_object, "parent", FK_BYTES, 0) && fk_expect_length("parent", parent.length, KEY_BYTES)) {
        if (block_tokens < 1 || block_tokens > PY_SSIZE_T_MAX / 8)
            PyErr_Format(PyExc_ValueError, "tokens_per_block is %zd, expected at least 1", block_tokens);
        else if (fk_open(&tokens, tokens_object, "tokens", FK_IDS, 0))
            keys = hash_tokens(&parent, &tokens, (size_t)block_tokens);
    }
    fk_close(&parent), fk_close(&tokens);
    return keys;
}

static int store_token(int32_t *to, PyObject *token) {
    int overflow;
    long value = PyLong_AsLongAndOverflow(token, &overflow);
    if (value == -1 && PyErr_Occurred())
        return 0;
    if (overflow || value != (int32_t)value) {
        PyErr_Format(PyExc_ValueError, "token %R is out of int32's range", token);
        return 0;
    }
    *to = (int32_t)value;
    return 1;
}

/* tokens[start:stop] of a list or tuple. A token with an __index__ of its own may change the list meanwhile, so its size is read anew
 * each time and each token is held while it is asked. */
static PyObject *pack_items(PyObject *tokens, Py_ssize_t start, Py_ssize_t stop) {
    PyObject *packed = PyBytes_FromStringAndSize(NULL, 4 * (stop - start));
    if (!packed)
        return NULL;
    int32_t *to = (int32_t *)PyBytes_AS_STRING(packed);
    for (Py_ssize_t i = start; i < stop; i++) {
        if (i >= PySequence_Fast_GET_SIZE(tokens)) {
            PyErr_SetString(PyExc_ValueError, "tokens shrank while they were packed");
            goto fail;
        }
        PyObject *token = PySequence_Fast_GET_ITEM(tokens, i);
        Py_INCREF(token);
        int stored = store_token(to++, token);
        Py_DECREF(token);
        if (!stored)
            goto fail;
    }
    return packed;
fail:
    Py_DECREF(packed);
    return NULL;
}

static PyObject *pack_buffer(const fk_buffer *tokens, Py_ssize_t start, Py_ssize_t stop) {
    size_t count = (size_t)(stop - start);
    PyObject *packed = PyBytes_FromStringAndSize(NULL, 4 * (stop - start));
    if (!packed)
        return NULL;
    if (tokens->view.itemsize == 4) {
        memcpy(PyBytes_AS_STRING(packed), (const int32_t *)tokens->view.buf + start, 4 * count);
        return packed;
    }
    const int64_t *from = (const int64_t *)tokens->view.buf + start;
    if (!(narrow((int32_t *)PyBytes_AS_STRING(packed), from, count) >> 32))
        return packed;
    Py_DECREF(packed);
    return refuse_token(from, count);
}

/* Any other sequence: its slice, as a list. */
static PyObject *pack_slice(PyObject *tokens, Py_ssize_t start, Py_ssize_t stop) {
    PyObject *slice = PySequence_GetSlice(tokens, start, stop);
    PyObject *items = slice ? PySequence_Fast(slice, "tokens must be a sequence") : NULL;
    PyObject *packed = NULL;
    if (items && fk_expect_length("tokens[start:stop]", PySequence_Fast_GET_SIZE(items), stop - start))
        packed = pack_items(items, 0, stop - start);
    Py_XDECREF(items);
    Py_XDECREF(slice);
    return packed;
}

PyObject *fk_pack_tokens(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"tokens", "start", "stop", NULL};
    PyObject *tokens;
    Py_ssize_t start, stop;
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Onn", names, &tokens, &start, &stop))
        return NULL;
    Py_ssize_t length = PySequence_Size(tokens);
    if (length < 0)
        return NULL;
    if (start < 0 || start > stop || stop > length)
        return PyErr_Format(PyExc_ValueError, "range [%zd, %zd) does not lie in %zd tokens", start, stop, length);
    if (PyList_Check(tokens) || PyTuple_Check(tokens))
        return pack_items(tokens, start, stop);
    if (!PyObject_CheckBuffer(tokens))
        return pack_slice(tokens, start, stop);
    fk_buffer buffer = {0};
    PyObject *packed = fk_open(&buffer, tokens, "tokens", FK_IDS, 0) ? pack_buffer(&buffer, start, stop) : NULL;
    fk_close(&buffer);
    return packed;
}
