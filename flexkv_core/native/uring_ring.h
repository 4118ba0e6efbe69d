/* The kernel's side of io_uring: two rings in shared memory and three system calls, without liburing. No Python, no policy. */
#ifndef FLEXKV_URING_RING_H
#define FLEXKV_URING_RING_H

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#if defined(IORING_ENTER_EXT_ARG) /* headers of Linux 5.11 and later */
#define FLEXKV_HAVE_URING 1
#endif
#endif
#endif

#ifdef FLEXKV_HAVE_URING
#include <stddef.h>
#include <stdint.h>

typedef struct {
    int fd; /* -1: closed */
    unsigned entries, mask, cq_mask;
    unsigned *sq_head, *sq_tail, *sq_flags, *cq_head, *cq_tail;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *map;
    size_t map_bytes, sqes_bytes;
} fk_ring;

/* A ring of at least `entries` submissions. 0, or a negative errno: -ENOSYS, -EPERM or -EACCES where this host refuses io_uring,
 * -EOPNOTSUPP where its kernel is older than 5.11. */
int fk_ring_open(fk_ring *ring, unsigned entries);
void fk_ring_close(fk_ring *ring); /* nothing may be under way */

/* An empty entry of the submission ring, or NULL while it is full. It counts from now on: fill it before the next call. */
struct io_uring_sqe *fk_ring_next(fk_ring *ring);
unsigned fk_ring_unsubmitted(const fk_ring *ring);

/* Hands over what is in the submission ring and waits for `min_complete` completions, or for timeout_ns (negative: for ever).
 * 0, or a negative errno; -ETIME, -EINTR, -EAGAIN and -EBUSY are no failures: look at the completions and call again. */
int fk_ring_enter(fk_ring *ring, unsigned min_complete, int64_t timeout_ns);

/* The oldest completion, or NULL; fk_ring_seen() gives its place back. */
struct io_uring_cqe *fk_ring_peek(const fk_ring *ring);
void fk_ring_seen(fk_ring *ring);
/* Whether completions wait in the kernel until the next fk_ring_enter(). */
int fk_ring_holds_back(const fk_ring *ring);

int fk_ring_register(fk_ring *ring, unsigned opcode, const void *argument, unsigned count); /* 0 or a negative errno */

#endif
#endif
