/* A small pool of threads that share one job at a time with the caller. */
#ifndef TENSORRAY_POOL_H
#define TENSORRAY_POOL_H

#define POOL_MAX_THREADS 256

/* `thread` is 0 for the caller, and below the job's `threads` for the others. */
typedef void (*pool_task)(void *context, long task, int thread);

/* Runs task(context, 0, .) .. task(context, tasks - 1, .), in any order, on the caller and the pool's
 * threads, `threads` in all at most, and returns when all are done. A caller that finds the pool busy with another caller's
 * job does all of its own job itself. */
void pool_run(pool_task task, void *context, long tasks, int threads);

/* How many threads run a job if it asks for no fewer, the caller included: 1 ..
 * POOL_MAX_THREADS. */
void pool_set_threads(int threads);
int pool_threads(void);

#endif
