/* One piece of work on several threads, none of which needs the interpreter. */
#ifndef FLEXKV_THREADS_H
#define FLEXKV_THREADS_H

#define FK_THREADS_MAX 64

/* Calls work(argument) on the calling thread and at the same time on up to `threads` - 1 others (at most FK_THREADS_MAX - 1); returns when
 * all have returned. The work must share itself out, and a call that finds nothing left must return at once: how many others come, and
 * when, is not promised. They stay and sleep until the next call, because to make them anew took 150 µs for 7 (H200's machine,
 * 2026-11-27), as long as the checksums of 8 MiB. Any thread may call; while one call runs, others get no helpers. */
void fk_share(void (*work)(void *), void *argument, long threads);

#endif
