/* Operations over a ring: the queue before it, short transfers, deadlines, cancellation. No Python. The contract is that of IoEngine in
 * flexkv_core/io/base.py. */
#ifndef FLEXKV_URING_QUEUE_H
#define FLEXKV_URING_QUEUE_H

#include "uring_ring.h"

#ifdef FLEXKV_HAVE_URING

enum { FK_READ, FK_WRITE, FK_SYNC, FK_IO_KINDS };

/* As in IO_OP. */
typedef struct {
    int64_t tag, offset;
    uint64_t address;
    int32_t file, reserved;
} fk_io_op;

typedef struct {
    int64_t tag;
    int32_t result;
} fk_done;

typedef struct {
    int64_t tag, offset, batch, deadline_ns; /* FK_NEVER: none */
    uint64_t address;
    uint32_t length, moved;
    int32_t file;
    int32_t stop; /* 0, or the errno for which the operation was asked to stop */
    uint32_t generation;
    uint8_t kind, stalls;
} fk_work;

typedef struct {
    uint64_t start, end;
} fk_piece;

typedef struct {
    fk_ring ring;
    unsigned depth, active_count;
    fk_work *active;     /* [depth]; free entries have batch 0 */
    unsigned *free_list; /* [depth], the first depth - active_count are free */
    fk_work *queue;      /* circular, what has not started: `queued` entries from `first` on */
    size_t queue_room, first, queued;
    fk_done *done;
    size_t done_room, done_count; /* room for all that is pending, so that a completion never needs memory */
    int64_t batches, next_deadline_ns;
    fk_piece *pieces; /* registered memory, ascending */
    size_t piece_count;
    int32_t *files;
    size_t file_count;
    int has_registered_files;
    int event_fd; /* -1: nobody asked */
    int32_t *injected; /* for tests: what the next completions shall say instead; see fk_io_inject() */
    size_t injected_count, injected_next;
} fk_io;

#define FK_NEVER INT64_MAX

int64_t fk_now_ns(void);

/* 0 or a negative errno; takes over nothing. */
int fk_io_open(fk_io *io, const int32_t *files, size_t file_count, unsigned depth);
/* Waits for what is under way. */
void fk_io_close(fk_io *io);

/* Registers memory, ascending and each piece at most 1 GiB; once. 0 or a negative errno. */
int fk_io_register(fk_io *io, const fk_piece *pieces, size_t count);
int fk_io_event_fd(fk_io *io); /* or a negative errno */
void fk_io_clear_event(const fk_io *io);

static inline size_t fk_io_pending(const fk_io *io) { return io->queued + io->active_count + io->done_count; }

/* Takes checked operations; the batch's number, or -ENOMEM with nothing taken. Calls fk_io_pump() itself, never the kernel. */
int64_t fk_io_add(fk_io *io, int kind, const fk_io_op *ops, size_t count, uint32_t length, int64_t deadline_ns);

/* All that can be done without the kernel: completions taken in, late operations stopped, the ring filled. */
void fk_io_pump(fk_io *io);
void fk_io_cancel(fk_io *io, int64_t batch);

/* Pumps until `min_count` operations (or all) are done, or until end_ns. 0, or a negative errno: -EINTR means a signal, call again. */
int fk_io_wait(fk_io *io, size_t min_count, int64_t end_ns);

/* The next completions report results[i] instead of what the kernel said: a negative errno, or at most that many bytes. INT32_MAX: the
 * truth. Takes over `results` (PyMem_RawMalloc). */
void fk_io_inject(fk_io *io, int32_t *results, size_t count);

#endif
#endif
