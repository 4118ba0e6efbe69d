/* The threads of threads.h. They end with the process; a forked child starts without any. */
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <signal.h>

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    void (*work)(void *);
    void *argument;
    long made;    /* threads */
    long wanted;  /* of them, that shall still come to the work */
    long running; /* of them, at the work */
    int busy;     /* a call has helpers */
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, NULL, 0, 0, 0, 0};

static void forget_threads(void) {
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.made = pool.wanted = pool.running = pool.busy = 0;
}

/* When the extension is loaded: a fork that began before the handler was known would not call it, and the child would count on its
   parent's threads. */
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

static void *serve(void *unused) {
    (void)unused;
    pthread_mutex_lock(&pool.mutex);
    for (;;) {
        while (pool.wanted == 0)
            pthread_cond_wait(&pool.wake, &pool.mutex);
        pool.wanted--;
        pool.running++;
        void (*work)(void *) = pool.work;
        void *argument = pool.argument;
        pthread_mutex_unlock(&pool.mutex);
        work(argument);
        pthread_mutex_lock(&pool.mutex);
        if (--pool.running == 0)
            pthread_cond_signal(&pool.done);
    }
    return NULL;
}

/* With the mutex held. They take no signals: Python's handlers belong to the process's own threads. */
static void make_threads(long count) {
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all);
    if (pool.made >= count || pthread_sigmask(SIG_SETMASK, &all, &before))
        return;
    while (pool.made < count && pthread_create(&thread, NULL, serve, NULL) == 0) {
        pthread_detach(thread);
        pool.made++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int call_helpers(void (*work)(void *), void *argument, long count) {
    pthread_mutex_lock(&pool.mutex);
    int called = !pool.busy;
    if (called) {
        make_threads(count);
        pool.busy = 1;
        pool.work = work;
        pool.argument = argument;
        pool.wanted = count < pool.made ? count : pool.made;
        for (long i = 0; i < pool.wanted; i++)
            pthread_cond_signal(&pool.wake);
    }
    pthread_mutex_unlock(&pool.mutex);
    return called;
}

void fk_share(void (*work)(void *), void *argument, long threads) {
    if (threads > FK_THREADS_MAX)
        threads = FK_THREADS_MAX;
    int called = threads > 1 && call_helpers(work, argument, threads - 1);
    work(argument);
    if (!called)
        return;
    pthread_mutex_lock(&pool.mutex);
    pool.wanted = 0; /* who has not come yet need not */
    while (pool.running)
        pthread_cond_wait(&pool.done, &pool.mutex);
    pool.busy = 0;
    pthread_mutex_unlock(&pool.mutex);
}
