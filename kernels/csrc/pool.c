/* Threads that wait for jobs: awake for a moment after each job, asleep otherwise.
 *
 * Why not OpenMP: its threads spin for milliseconds after every parallel region, which takes the
 * cores away from the Python threads of the same actor, its environment variables are read before
 * we can set them (Ray sets OMP_NUM_THREADS=1), and a region waits for every thread to turn up.
 * Here the caller takes tasks like every other thread and waits only for tasks that were begun,
 * so a helper whose core is busy elsewhere delays nobody. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

/* How long a thread looks for the next job before it sleeps: some 50 us, about what Python takes
 * between two kernels of one step. An idle shard's threads are asleep. */
#define SPINS_BEFORE_SLEEP 1000
#define SPINS_BEFORE_YIELD 200

static struct {
    pthread_mutex_t busy; /* held by the caller whose job the pool runs */
    pthread_mutex_t lock; /* guards going to sleep */
    pthread_cond_t wake;
    atomic_ulong epoch; /* odd while a job is open to helpers */
    atomic_int sleepers;
    atomic_int active; /* helpers that may be inside the job */
    atomic_int helpers; /* wanted */
    int started;
    atomic_long next;
    long tasks;
    int invited; /* helpers with a lower index take part in this job */
    pool_task task;
    void *context;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(int thread)
{
    long task;
    while ((task = atomic_fetch_add(&pool.next, 1)) < pool.tasks)
        pool.task(pool.context, task, thread);
}

static int is_news(unsigned long epoch, unsigned long seen)
{
    return (epoch & 1) && epoch != seen;
}

static unsigned long await_job(unsigned long seen)
{
    unsigned long epoch;
    for (int spin = 0; spin < SPINS_BEFORE_SLEEP; spin++) {
        if (is_news(epoch = atomic_load(&pool.epoch), seen))
            return epoch;
        relax();
    }
    pthread_mutex_lock(&pool.lock);
    /* Counted before the epoch is read, as the caller opens a job before it reads the count: one
     * of the two sees the other. */
    atomic_fetch_add(&pool.sleepers, 1);
    while (!is_news(epoch = atomic_load(&pool.epoch), seen))
        pthread_cond_wait(&pool.wake, &pool.lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.lock);
    return epoch;
}

static void *help(void *argument)
{
    int index = (int)(long)argument;
    unsigned long seen = 0;
    for (;;) {
        seen = await_job(seen);
        /* Once counted, the job that is open stays open until we have left it. */
        atomic_fetch_add(&pool.active, 1);
        if (atomic_load(&pool.epoch) == seen && index < pool.invited)
            work(index + 1);
        atomic_fetch_sub(&pool.active, 1);
    }
    return NULL;
}

/* A forked child has none of its parent's threads. */
static void forget_threads(void)
{
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.epoch, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.active, 0);
    pool.started = 0;
}

static void start_helpers(int helpers)
{
    static int fork_is_watched = 0;
    if (!fork_is_watched)
        fork_is_watched = pthread_atfork(NULL, NULL, forget_threads) == 0;
    while (pool.started < helpers) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(long)pool.started) != 0)
            return; /* the job is shared by those there are */
        pthread_detach(thread);
        pool.started++;
    }
}

void pool_run(pool_task task, void *context, long tasks, int threads)
{
    int helpers = atomic_load(&pool.helpers);
    if (helpers > threads - 1)
        helpers = threads - 1;
    if (helpers <= 0 || tasks < 2 || pthread_mutex_trylock(&pool.busy) != 0) {
        for (long i = 0; i < tasks; i++)
            task(context, i, 0);
        return;
    }
    if (pool.started < helpers)
        start_helpers(helpers);
    pool.task = task;
    pool.context = context;
    pool.tasks = tasks;
    pool.invited = helpers;
    atomic_store(&pool.next, 0);
    atomic_fetch_add(&pool.epoch, 1);
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    work(0);
    atomic_fetch_add(&pool.epoch, 1);
    for (int spin = 0; atomic_load(&pool.active) > 0; spin++) {
        if (spin < SPINS_BEFORE_YIELD)
            relax();
        else
            sched_yield();
    }
    pthread_mutex_unlock(&pool.busy);
}

void pool_set_threads(int threads)
{
    atomic_store(&pool.helpers, threads - 1);
}

int pool_threads(void)
{
    return atomic_load(&pool.helpers) + 1;
}
