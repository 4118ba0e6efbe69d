/* The rings of io_uring, after io_uring(7) and the kernel's header; the contracts stand in uring_ring.h. */
#define _GNU_SOURCE
#include "uring_ring.h"

#ifdef FLEXKV_HAVE_URING
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FEATURES_NEEDED (IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG)

/* Completions are gathered at the next system call instead of interrupting the thread for each; kernels before 5.19 lack that. */
#if defined(IORING_SETUP_COOP_TASKRUN) && defined(IORING_SETUP_TASKRUN_FLAG)
#define SETUP_FLAGS (IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG)
#define HOLDS_BACK (IORING_SQ_CQ_OVERFLOW | IORING_SQ_TASKRUN)
#else
#define SETUP_FLAGS IORING_SETUP_CLAMP
#define HOLDS_BACK IORING_SQ_CQ_OVERFLOW
#endif

static unsigned load_acquire(const unsigned *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
static void store_release(unsigned *at, unsigned value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }

static int setup(unsigned entries, struct io_uring_params *params) {
    const unsigned flags[] = {SETUP_FLAGS, IORING_SETUP_CLAMP};
    for (int i = 0; i < 2; i++) {
        memset(params, 0, sizeof *params);
        params->flags = flags[i];
        int fd = (int)syscall(SYS_io_uring_setup, entries, params);
        if (fd >= 0 || errno != EINVAL)
            return fd >= 0 ? fd : -errno;
    }
    return -EOPNOTSUPP;
}

static int map_rings(fk_ring *ring, const struct io_uring_params *params) {
    size_t sq_bytes = params->sq_off.array + params->sq_entries * sizeof(unsigned);
    size_t cq_bytes = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    ring->map_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    ring->sqes_bytes = params->sq_entries * sizeof(struct io_uring_sqe);
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    ring->map = mmap(NULL, ring->map_bytes, protection, flags, ring->fd, IORING_OFF_SQ_RING);
    if (ring->map == MAP_FAILED)
        return -errno;
    ring->sqes = mmap(NULL, ring->sqes_bytes, protection, flags, ring->fd, IORING_OFF_SQES);
    if (ring->sqes == MAP_FAILED) {
        int error = errno;
        munmap(ring->map, ring->map_bytes);
        return -error;
    }
    return 0;
}

static void set_pointers(fk_ring *ring, const struct io_uring_params *params) {
    char *map = ring->map;
    ring->entries = params->sq_entries;
    ring->mask = params->sq_entries - 1;
    ring->cq_mask = params->cq_entries - 1;
    ring->sq_head = (unsigned *)(map + params->sq_off.head);
    ring->sq_tail = (unsigned *)(map + params->sq_off.tail);
    ring->sq_flags = (unsigned *)(map + params->sq_off.flags);
    ring->cq_head = (unsigned *)(map + params->cq_off.head);
    ring->cq_tail = (unsigned *)(map + params->cq_off.tail);
    ring->cqes = (struct io_uring_cqe *)(map + params->cq_off.cqes);
    unsigned *order = (unsigned *)(map + params->sq_off.array);
    for (unsigned i = 0; i < ring->entries; i++)
        order[i] = i; /* entry i of the ring is always sqes[i] */
}

int fk_ring_open(fk_ring *ring, unsigned entries) {
    struct io_uring_params params;
    int fd = setup(entries, &params), error;
    ring->fd = -1;
    if (fd < 0)
        return fd;
    ring->fd = fd;
    error = (params.features & FEATURES_NEEDED) == FEATURES_NEEDED ? map_rings(ring, &params) : -EOPNOTSUPP;
    if (error) {
        close(fd);
        ring->fd = -1;
        return error;
    }
    set_pointers(ring, &params);
    return 0;
}

void fk_ring_close(fk_ring *ring) {
    if (ring->fd < 0)
        return;
    munmap(ring->sqes, ring->sqes_bytes);
    munmap(ring->map, ring->map_bytes);
    close(ring->fd);
    ring->fd = -1;
}

unsigned fk_ring_unsubmitted(const fk_ring *ring) { return *ring->sq_tail - load_acquire(ring->sq_head); }

struct io_uring_sqe *fk_ring_next(fk_ring *ring) {
    if (fk_ring_unsubmitted(ring) == ring->entries)
        return NULL;
    unsigned tail = *ring->sq_tail;
    struct io_uring_sqe *entry = &ring->sqes[tail & ring->mask];
    memset(entry, 0, sizeof *entry);
    store_release(ring->sq_tail, tail + 1); /* the kernel looks at it in fk_ring_enter() only: there is no polling thread */
    return entry;
}

int fk_ring_enter(fk_ring *ring, unsigned min_complete, int64_t timeout_ns) {
    struct __kernel_timespec time = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    struct io_uring_getevents_arg argument = {.ts = timeout_ns < 0 ? 0 : (uint64_t)(uintptr_t)&time};
    unsigned flags = IORING_ENTER_EXT_ARG | IORING_ENTER_GETEVENTS;
    long done = syscall(SYS_io_uring_enter, ring->fd, fk_ring_unsubmitted(ring), min_complete, flags, &argument, sizeof argument);
    return done < 0 ? -errno : 0;
}

struct io_uring_cqe *fk_ring_peek(const fk_ring *ring) {
    unsigned head = *ring->cq_head;
    return head == load_acquire(ring->cq_tail) ? NULL : &ring->cqes[head & ring->cq_mask];
}

void fk_ring_seen(fk_ring *ring) { store_release(ring->cq_head, *ring->cq_head + 1); }

int fk_ring_holds_back(const fk_ring *ring) { return (load_acquire(ring->sq_flags) & HOLDS_BACK) != 0; }

int fk_ring_register(fk_ring *ring, unsigned opcode, const void *argument, unsigned count) {
    return syscall(SYS_io_uring_register, ring->fd, opcode, argument, count) < 0 ? -errno : 0;
}

#endif
