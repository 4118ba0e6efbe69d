/* Operations over a ring; the contracts stand in uring_queue.h. */
#define _GNU_SOURCE
#include "uring_queue.h"

#ifdef FLEXKV_HAVE_URING
#define PY_SSIZE_T_CLEAN
#include <Python.h> /* PyMem_Raw*: no GIL is needed for them */

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096u
#define STALLS_MAX 8 /* attempts without progress until an operation fails, as in threads.py */
#define CANCELLATION (1ull << 63) /* user_data of a request to stop another one; its own outcome does not matter */

int64_t fk_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void *allocate(size_t count, size_t bytes) { return PyMem_RawCalloc(count ? count : 1, bytes); }

int fk_io_open(fk_io *io, const int32_t *files, size_t file_count, unsigned depth) {
    memset(io, 0, sizeof *io);
    io->event_fd = -1;
    int error = fk_ring_open(&io->ring, depth);
    if (error)
        return error;
    io->depth = depth;
    io->next_deadline_ns = FK_NEVER;
    io->active = allocate(depth, sizeof *io->active);
    io->free_list = allocate(depth, sizeof *io->free_list);
    io->files = allocate(file_count, sizeof *io->files);
    if (!io->active || !io->free_list || !io->files) {
        fk_io_close(io);
        return -ENOMEM;
    }
    for (unsigned i = 0; i < depth; i++)
        io->free_list[i] = depth - 1 - i;
    memcpy(io->files, files, file_count * sizeof *files);
    io->file_count = file_count;
    io->has_registered_files = file_count && !fk_ring_register(&io->ring, IORING_REGISTER_FILES, io->files, (unsigned)file_count);
    return 0;
}

void fk_io_close(fk_io *io) {
    if (io->ring.fd >= 0) {
        io->queued = 0;
        while (io->active_count) {
            int error = fk_io_wait(io, fk_io_pending(io), FK_NEVER);
            if (error && error != -EINTR)
                break;
        }
        fk_ring_close(&io->ring);
    }
    if (io->event_fd >= 0)
        close(io->event_fd);
    io->event_fd = -1;
    void *memory[] = {io->active, io->free_list, io->queue, io->done, io->pieces, io->files, io->injected};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        PyMem_RawFree(memory[i]);
    io->active = NULL, io->free_list = NULL, io->queue = NULL, io->done = NULL, io->pieces = NULL, io->files = NULL;
    io->injected = NULL, io->injected_count = 0, io->done_count = 0, io->active_count = 0;
}

int fk_io_register(fk_io *io, const fk_piece *pieces, size_t count) {
    struct iovec *vectors = allocate(count, sizeof *vectors);
    io->pieces = allocate(count, sizeof *pieces);
    int error = vectors && io->pieces ? 0 : -ENOMEM;
    for (size_t i = 0; i < count && !error; i++)
        vectors[i] = (struct iovec){(void *)(uintptr_t)pieces[i].start, pieces[i].end - pieces[i].start};
    if (!error)
        error = fk_ring_register(&io->ring, IORING_REGISTER_BUFFERS, vectors, (unsigned)count);
    PyMem_RawFree(vectors);
    if (error)
        return error;
    memcpy(io->pieces, pieces, count * sizeof *pieces);
    io->piece_count = count;
    return 0;
}

static void signal_event(const fk_io *io) {
    uint64_t one = 1;
    if (io->event_fd >= 0 && write(io->event_fd, &one, sizeof one) < 0) {
        /* full: it is readable, which is all that is wanted */
    }
}

void fk_io_clear_event(const fk_io *io) {
    uint64_t count;
    if (io->event_fd >= 0 && read(io->event_fd, &count, sizeof count) < 0) {
        /* nothing finished since the last time */
    }
}

int fk_io_event_fd(fk_io *io) {
    if (io->event_fd >= 0)
        return io->event_fd;
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    int error = fk_ring_register(&io->ring, IORING_REGISTER_EVENTFD, &fd, 1);
    if (error) {
        close(fd);
        return error;
    }
    io->event_fd = fd;
    signal_event(io); /* for what finished before anybody asked */
    return fd;
}

static int grow_queue(fk_io *io, size_t room) {
    fk_work *larger = PyMem_RawMalloc(room * sizeof *larger);
    if (!larger)
        return 0;
    for (size_t i = 0; i < io->queued; i++)
        larger[i] = io->queue[(io->first + i) % io->queue_room];
    PyMem_RawFree(io->queue);
    io->queue = larger;
    io->queue_room = room;
    io->first = 0;
    return 1;
}

/* Room for `pending` operations in the queue (to which what is under way may return) and among the completions. */
static int reserve(fk_io *io, size_t pending) {
    size_t room = pending < 256 ? 256 : pending + pending / 2;
    if (io->queue_room < pending && !grow_queue(io, room))
        return 0;
    if (io->done_room < pending) {
        fk_done *done = PyMem_RawRealloc(io->done, room * sizeof *done);
        if (!done)
            return 0;
        io->done = done;
        io->done_room = room;
    }
    return 1;
}

static void push_back(fk_io *io, const fk_work *work) { io->queue[(io->first + io->queued++) % io->queue_room] = *work; }

static void push_front(fk_io *io, const fk_work *work) {
    io->first = (io->first + io->queue_room - 1) % io->queue_room;
    io->queue[io->first] = *work;
    io->queued++;
}

static void complete(fk_io *io, const fk_work *work, int32_t result) { io->done[io->done_count++] = (fk_done){work->tag, result}; }

int64_t fk_io_add(fk_io *io, int kind, const fk_io_op *ops, size_t count, uint32_t length, int64_t deadline_ns) {
    if (!reserve(io, fk_io_pending(io) + count))
        return -ENOMEM;
    fk_work work = {.batch = ++io->batches, .deadline_ns = deadline_ns, .length = length, .kind = (uint8_t)kind};
    for (size_t i = 0; i < count; i++) {
        work.tag = ops[i].tag, work.offset = ops[i].offset, work.address = ops[i].address, work.file = ops[i].file;
        push_back(io, &work);
    }
    if (count && deadline_ns < io->next_deadline_ns)
        io->next_deadline_ns = deadline_ns;
    fk_io_pump(io);
    return work.batch;
}

/* The registered piece that holds [start, start + bytes), or -1. */
static int piece_of(const fk_io *io, uint64_t start, uint64_t bytes) {
    size_t low = 0, high = io->piece_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (io->pieces[middle].end <= start)
            low = middle + 1;
        else
            high = middle;
    }
    return low < io->piece_count && io->pieces[low].start <= start && start + bytes <= io->pieces[low].end ? (int)low : -1;
}

static void fill_entry(const fk_io *io, const fk_work *work, struct io_uring_sqe *entry) {
    entry->fd = io->has_registered_files ? work->file : io->files[work->file];
    entry->flags = io->has_registered_files ? IOSQE_FIXED_FILE : 0;
    if (work->kind == FK_SYNC) {
        entry->opcode = IORING_OP_FSYNC;
        entry->fsync_flags = IORING_FSYNC_DATASYNC;
        return;
    }
    entry->addr = work->address + work->moved;
    entry->len = work->length - work->moved;
    entry->off = (uint64_t)work->offset + work->moved;
    int piece = piece_of(io, entry->addr, entry->len);
    if (piece >= 0)
        entry->buf_index = (uint16_t)piece;
    if (work->kind == FK_READ)
        entry->opcode = piece >= 0 ? IORING_OP_READ_FIXED : IORING_OP_READ;
    else
        entry->opcode = piece >= 0 ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE;
}

static void start_queued(fk_io *io) {
    struct io_uring_sqe *entry;
    while (io->queued && io->active_count < io->depth && (entry = fk_ring_next(&io->ring))) {
        unsigned slot = io->free_list[io->depth - ++io->active_count];
        uint32_t generation = io->active[slot].generation + 1;
        io->active[slot] = io->queue[io->first];
        io->active[slot].generation = generation;
        io->first = (io->first + 1) % io->queue_room;
        io->queued--;
        fill_entry(io, &io->active[slot], entry);
        entry->user_data = (uint64_t)(generation & 0x7fffffff) << 32 | slot;
    }
}

/* What the kernel said of an operation that has left the ring: it is done, or goes back to the head of the queue. */
static void settle(fk_io *io, fk_work *work, int32_t result) {
    int32_t eof = work->kind == FK_READ ? -ENODATA : -EIO;
    int is_interrupted = result == -EINTR || result == -EAGAIN;
    if (result < 0 && work->stop && (is_interrupted || result == -ECANCELED)) {
        complete(io, work, -work->stop);
        return;
    }
    if (result < 0 && !is_interrupted) {
        complete(io, work, result);
        return;
    }
    uint32_t moved = work->moved + (is_interrupted ? 0 : (uint32_t)result);
    if (!is_interrupted && (work->kind == FK_SYNC || moved >= work->length)) {
        complete(io, work, work->kind == FK_SYNC ? 0 : (int32_t)work->length);
        return;
    }
    /* O_DIRECT takes whole pages only, so what was moved of the last page is moved again. */
    uint32_t whole = moved / PAGE_BYTES * PAGE_BYTES;
    work->stalls = whole > work->moved ? 0 : work->stalls + 1;
    work->moved = whole;
    if (work->stop)
        complete(io, work, -work->stop);
    else if (!is_interrupted && result == 0)
        complete(io, work, eof);
    else if (work->stalls >= STALLS_MAX)
        complete(io, work, is_interrupted ? -EIO : eof);
    else
        push_front(io, work);
}

static int32_t injected_result(fk_io *io, int32_t result) {
    if (io->injected_next >= io->injected_count)
        return result;
    int32_t instead = io->injected[io->injected_next++];
    return instead < result ? instead : result;
}

static void take_completions(fk_io *io) {
    struct io_uring_cqe *completion;
    while ((completion = fk_ring_peek(&io->ring))) {
        uint64_t data = completion->user_data;
        int32_t result = completion->res;
        fk_ring_seen(&io->ring);
        if (data & CANCELLATION)
            continue;
        unsigned slot = (uint32_t)data;
        io->free_list[io->depth - io->active_count--] = slot;
        fk_work work = io->active[slot];
        io->active[slot].batch = 0; /* free */
        settle(io, &work, injected_result(io, result));
    }
}

/* Asks the kernel to stop what is under way. It may say no, and does where a disk is already at work; where its ring is full, it is not
 * asked. The operation completes in any case. */
static void ask_to_stop(fk_io *io, unsigned slot, int error) {
    io->active[slot].stop = error;
    struct io_uring_sqe *entry = fk_ring_next(&io->ring);
    if (!entry)
        return;
    entry->opcode = IORING_OP_ASYNC_CANCEL;
    entry->fd = -1;
    entry->addr = (uint64_t)(io->active[slot].generation & 0x7fffffff) << 32 | slot;
    entry->user_data = CANCELLATION;
}

/* Stops what belongs to `batch` or is late at `now_ns`. */
static void stop_some(fk_io *io, int64_t batch, int64_t now_ns, int error) {
    size_t queued = io->queued;
    io->next_deadline_ns = FK_NEVER;
    for (io->queued = 0; queued; queued--) { /* what stays moves to the end, so that order is kept */
        fk_work work = io->queue[io->first];
        io->first = (io->first + 1) % io->queue_room;
        if (work.batch == batch || work.deadline_ns <= now_ns) {
            complete(io, &work, -error);
            continue;
        }
        io->queue[(io->first + queued - 1 + io->queued++) % io->queue_room] = work;
        if (work.deadline_ns < io->next_deadline_ns)
            io->next_deadline_ns = work.deadline_ns;
    }
    for (unsigned slot = 0; slot < io->depth; slot++) {
        const fk_work *work = &io->active[slot];
        if (!work->batch || work->stop)
            continue;
        if (work->batch == batch || work->deadline_ns <= now_ns)
            ask_to_stop(io, slot, error);
        else if (work->deadline_ns < io->next_deadline_ns)
            io->next_deadline_ns = work->deadline_ns;
    }
}

void fk_io_pump(fk_io *io) {
    take_completions(io);
    if (io->next_deadline_ns != FK_NEVER && fk_now_ns() >= io->next_deadline_ns)
        stop_some(io, 0, fk_now_ns(), ETIMEDOUT);
    start_queued(io);
}

void fk_io_cancel(fk_io *io, int64_t batch) {
    take_completions(io);
    stop_some(io, batch, INT64_MIN, ECANCELED);
    signal_event(io);
}

/* How many completions to sleep for: all that are wanted; but one while something is queued, so that it starts at once. (To wait for
 * more before refilling spared no processor time: a thread that sleeps here is woken for each completion in any case.) */
static unsigned sleep_count(const fk_io *io, size_t min_count) {
    size_t wanted = io->queued ? 1 : min_count - io->done_count;
    return (unsigned)(wanted < io->active_count ? wanted : io->active_count);
}

int fk_io_wait(fk_io *io, size_t min_count, int64_t end_ns) {
    for (;;) {
        fk_io_pump(io);
        size_t pending = fk_io_pending(io), target = min_count < pending ? min_count : pending;
        int64_t now = fk_now_ns(), until = end_ns < io->next_deadline_ns ? end_ns : io->next_deadline_ns;
        int is_over = io->done_count >= target || now >= end_ns;
        if (is_over && !fk_ring_unsubmitted(&io->ring) && !fk_ring_holds_back(&io->ring))
            return 0;
        int64_t timeout = until == FK_NEVER ? -1 : until > now ? until - now : 0;
        int error = fk_ring_enter(&io->ring, is_over ? 0 : sleep_count(io, target), timeout);
        if (error == -EAGAIN || error == -EBUSY) /* short of memory, or of room for completions: not before some are taken */
            nanosleep(&(struct timespec){0, 1000000}, NULL);
        else if (error && error != -ETIME)
            return error;
        if (is_over) {
            fk_io_pump(io);
            return 0;
        }
    }
}

void fk_io_inject(fk_io *io, int32_t *results, size_t count) {
    PyMem_RawFree(io->injected);
    io->injected = results;
    io->injected_count = count;
    io->injected_next = 0;
}

#endif
