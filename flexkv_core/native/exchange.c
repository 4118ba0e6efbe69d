/* A lookup between a client and its server, one call on each side: Python that other processes have pushed out of the caches
 * takes 200 us for it. Frames: flexkv_core/serve/wire.py. */
#define _GNU_SOURCE
#include "buffers.h"
#include "functions.h"
#include "index_arguments.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

typedef struct __attribute__((packed)) {
    uint32_t payload_bytes;
    uint16_t kind, reserved;
    uint64_t number;
} header;

typedef struct __attribute__((packed)) {
    header head;
    uint32_t keys_bytes, start_block;
    uint8_t purpose;
} question;

typedef struct __attribute__((packed)) {
    header head;
    uint64_t blocks;
} answer;

/* ---- the client -------------------------------------------------------------------------------------------------------------- */

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* 1: something has come, or the other side is gone; 0: not by then, -1: errno says why. */
static int wait_until(int fd, double deadline) {
    struct pollfd wanted = {fd, POLLIN, 0};
    for (;;) {
        double left = deadline - now_s();
        left = left > 0 ? left : 0;
        struct timespec timeout = {(time_t)left, (long)(1e9 * (left - (double)(time_t)left))};
        int ready = ppoll(&wanted, 1, &timeout, NULL);
        if (ready >= 0 || errno != EINTR)
            return ready;
    }
}

/* The blocks that were found, -1: something else came, or nothing in time, -2: errno says why. Needs no GIL. */
static int64_t ask(int fd, const question *asked, double deadline) {
    ssize_t sent = send(fd, asked, sizeof *asked, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent != sizeof *asked) {
        errno = sent < 0 ? errno : EPROTO; /* so short a frame is sent whole or not at all */
        return -2;
    }
    int ready = wait_until(fd, deadline);
    if (ready <= 0)
        return ready - 1;
    answer said;
    if (recv(fd, &said, sizeof said, MSG_DONTWAIT | MSG_PEEK) != sizeof said || said.head.kind != asked->head.kind ||
        said.head.reserved || said.head.number != asked->head.number || said.head.payload_bytes != sizeof said.blocks ||
        said.blocks > INT64_MAX)
        return -1;
    return recv(fd, &said, sizeof said, MSG_DONTWAIT) == sizeof said ? (int64_t)said.blocks : -1;
}

PyObject *fk_ask_match(PyObject *self, PyObject *args) {
    (void)self;
    int fd, kind;
    Py_buffer memory, keys;
    unsigned long long number;
    double timeout_s;
    if (!PyArg_ParseTuple(args, "iw*y*iKd", &fd, &memory, &keys, &kind, &number, &timeout_s))
        return NULL;
    PyObject *result = NULL;
    if (keys.len > memory.len || keys.len > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of keys do not go into %zd", keys.len, memory.len);
    } else {
        question asked = {{sizeof asked - sizeof asked.head, (uint16_t)kind, 0, number}, (uint32_t)keys.len, 0, 0};
        int64_t found;
        Py_BEGIN_ALLOW_THREADS;
        double deadline = now_s() + timeout_s;
        memcpy(memory.buf, keys.buf, (size_t)keys.len);
        found = ask(fd, &asked, deadline);
        Py_END_ALLOW_THREADS;
        result = found == -2 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLongLong(found);
    }
    PyBuffer_Release(&keys);
    PyBuffer_Release(&memory);
    return result;
}

/* ---- the server -------------------------------------------------------------------------------------------------------------- */

PyObject *fk_answer_match(PyObject *self, PyObject *args) {
    (void)self;
    int fd, kind;
    PyObject *index;
    Py_buffer memory;
    if (!PyArg_ParseTuple(args, "Oiiy*", &index, &fd, &kind, &memory))
        return NULL;
    const fk_tree *tree = fk_index_tree(index);
    struct __attribute__((packed)) {
        question first;
        uint8_t more;
    } come;
    int answered = 0;
    if (tree && recv(fd, &come, sizeof come, MSG_DONTWAIT | MSG_PEEK) == sizeof come.first && come.first.head.kind == kind &&
        !come.first.head.reserved && come.first.head.payload_bytes == sizeof come.first - sizeof come.first.head &&
        come.first.keys_bytes <= (size_t)memory.len && come.first.keys_bytes % FK_KEY_BYTES == 0) {
        fk_match found = fk_tree_match(tree, memory.buf, come.first.keys_bytes / FK_KEY_BYTES, 0, NULL, 0, 0);
        answer said = {come.first.head, (uint64_t)found.blocks};
        said.head.payload_bytes = sizeof said.blocks;
        if (send(fd, &said, sizeof said, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof said) {
            recv(fd, &come.first, sizeof come.first, MSG_DONTWAIT);
            answered = 1;
        }
    }
    PyBuffer_Release(&memory);
    return tree ? PyBool_FromLong(answered) : NULL;
}
