/* The Python module `_native`: checks arrays, gives up the GIL, shares the work among threads.
 *
 * Outputs are allocated by the caller (native.py's users), so no NumPy headers are needed: arrays
 * come in by the buffer protocol. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"

static const kernel_table *kernels;

/* --- arrays ------------------------------------------------------------------------------- */

#define MAX_ARRAYS 8

/* The buffers one call holds; released together. */
typedef struct {
    Py_buffer view[MAX_ARRAYS];
    int count;
} arrays;

static void release(arrays *held)
{
    while (held->count > 0)
        PyBuffer_Release(&held->view[--held->count]);
}

static bool has_format(const char *format, char wanted)
{
    if (*format == '@' || *format == '=' || *format == '<')
        format++;
    if (format[0] == '\0' || format[1] != '\0')
        return false;
    return wanted == 'q' ? format[0] == 'q' || (sizeof(long) == 8 && format[0] == 'l')
                         : format[0] == wanted;
}

/* Takes an array of `ndim` axes and items of `format` ('f' float32, 'i' int32, 'q' int64, 'b' int8,
 * 'B' uint8) whose
 * last axis is contiguous (with `whole`, all of it). NULL with an exception set if it is not so. */
static Py_buffer *take(arrays *held, PyObject *object, const char *name, int ndim, char format,
                       bool whole, bool writable)
{
    Py_buffer *view = &held->view[held->count];
    int flags = PyBUF_FORMAT | (whole ? PyBUF_C_CONTIGUOUS : PyBUF_STRIDED);
    if (PyObject_GetBuffer(object, view, flags | (writable ? PyBUF_WRITABLE : 0)) != 0)
        return NULL;
    held->count++;
    if (view->ndim != ndim || !has_format(view->format, format)) {
        PyErr_Format(PyExc_TypeError, "%s must have %d axes of type '%c', not %d of '%s'", name,
                     ndim, format, view->ndim, view->format);
        return NULL;
    }
    if (view->shape[ndim - 1] > 1 && view->strides[ndim - 1] != view->itemsize) {
        PyErr_Format(PyExc_ValueError, "%s must be contiguous in its last axis", name);
        return NULL;
    }
    for (int axis = 0; axis < ndim; axis++)
        if (view->strides[axis] % view->itemsize != 0) {
            PyErr_Format(PyExc_ValueError, "%s must have strides of whole items", name);
            return NULL;
        }
    return view;
}

static long size_of(const Py_buffer *view, int axis)
{
    return view->shape[axis];
}

static long stride_of(const Py_buffer *view, int axis)
{
    return view->strides[axis] / view->itemsize;
}

static bool expect(bool holds, const char *what)
{
    if (!holds)
        PyErr_SetString(PyExc_ValueError, what);
    return holds;
}

static PyObject *finish(arrays *held, bool fine)
{
    release(held);
    if (!fine)
        return NULL;
    Py_RETURN_NONE;
}

static bool arguments(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given != wanted)
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, given);
    return given == wanted;
}

/* --- sharing work ------------------------------------------------------------------------- */

/* Work of about this many multiply-adds or elements is worth another thread, and the GIL: giving
 * it up for less costs more, since another Python thread may then hold it for 5 ms. */
#define WORTH_SHARING 60000

/* A range cut into chunks, each a task. */
typedef struct {
    void (*run)(const void *args, long begin, long end);
    const void *args;
    long total, chunk;
} range_job;

static void run_chunk(void *context, long task, int thread)
{
    const range_job *job = context;
    long begin = task * job->chunk, end = begin + job->chunk;
    (void)thread;
    job->run(job->args, begin, end < job->total ? end : job->total);
}

/* Runs args over [0, total), `cost` units of work in all, in chunks of a multiple of `grain` and
 * `most` at most. */
static void share(void (*run)(const void *, long, long), const void *args, long total, double cost,
                  long grain, long most)
{
    if (total <= 0)
        return;
    if (cost < WORTH_SHARING) {
        run(args, 0, total);
        return;
    }
    long pieces = 4L * pool_threads();
    long chunk = (total / pieces + grain - 1) / grain * grain;
    chunk = chunk < most ? chunk : most;
    range_job job = {run, args, total, chunk < grain ? grain : chunk};
    PyThreadState *state = PyEval_SaveThread();
    pool_run(run_chunk, &job, (total + job.chunk - 1) / job.chunk, pool_threads());
    PyEval_RestoreThread(state);
}

/* --- linear ------------------------------------------------------------------------------- */

/* Weights a task reads: enough to hide a task's start, few enough to fit a core's L2 cache. */
#define TASK_FLOATS 65536

static void linear_chunk(const void *args, long begin, long end)
{
    kernels->linear(args, begin, end);
}

static PyObject *linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    arrays held = {.count = 0};
    Py_buffer *x, *weight, *bias = NULL, *y;
    (void)module;
    if (!arguments(nargs, 4))
        return NULL;
    bool fine = (x = take(&held, args[0], "x", 2, 'f', false, false))
                && (weight = take(&held, args[1], "weight", 2, 'f', true, false))
                && (args[2] == Py_None || (bias = take(&held, args[2], "bias", 1, 'f', true, false)))
                && (y = take(&held, args[3], "y", 2, 'f', true, true));
    if (!fine)
        return finish(&held, false);
    linear_args job = {.x = x->buf, .weight = weight->buf, .bias = bias ? bias->buf : NULL,
                       .y = y->buf, .rows = size_of(x, 0), .in = size_of(x, 1),
                       .out = size_of(weight, 0), .x_stride = stride_of(x, 0)};
    fine = expect(size_of(weight, 1) == job.in, "x and weight differ in their last axis")
           && expect(!bias || size_of(bias, 0) == job.out, "bias is not as long as weight")
           && expect(size_of(y, 0) == job.rows && size_of(y, 1) == job.out, "y has another shape");
    if (fine && job.rows > 0) {
        long most = TASK_FLOATS / (job.in > 0 ? job.in : 1) / 8 * 8;
        share(linear_chunk, &job, job.out, (double)job.rows * job.in * job.out, 8,
              most < 8 ? 8 : most);
    }
    return finish(&held, fine);
}

static void linear_quantized_chunk(const void *args, long begin, long end)
{
    kernels->linear_quantized(args, begin, end);
}

/* Rows of x with the inputs of each CODES parted, the even ones first. */
static void part_inputs(const float *x, long x_stride, long rows, long in, float *parted)
{
    for (long m = 0; m < rows; m++)
        for (long i = 0; i < in; i += CODES)
            for (long j = 0; j < CODES / 2; j++) {
                parted[m * in + i + j] = x[m * x_stride + i + 2 * j];
                parted[m * in + i + CODES / 2 + j] = x[m * x_stride + i + 2 * j + 1];
            }
}

static int kind_of(PyObject *name)
{
    static const char *const names[] = {[INT4] = "int4", [INT8] = "int8", [FLOAT8] = "float8"};
    const char *given = PyUnicode_AsUTF8(name);
    for (int kind = INT4; given && kind <= FLOAT8; kind++)
        if (strcmp(given, names[kind]) == 0)
            return kind;
    if (given)
        PyErr_Format(PyExc_ValueError, "there are no codes of kind %s", given);
    return -1;
}

static PyObject *linear_quantized(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    arrays held = {.count = 0};
    Py_buffer *x, *values, *scales, *zeros = NULL, *bias = NULL, *y;
    (void)module;
    if (!arguments(nargs, 8))
        return NULL;
    int kind = kind_of(args[0]);
    long group = PyLong_AsLong(args[5]);
    if (PyErr_Occurred())
        return NULL;
    bool fine = (x = take(&held, args[1], "x", 2, 'f', false, false))
                && (values = take(&held, args[2], "values", 2, kind == INT8 ? 'b' : 'B', true, false))
                && (scales = take(&held, args[3], "scales", 2, 'f', true, false))
                && (args[4] == Py_None || (zeros = take(&held, args[4], "zeros", 2, 'b', true, false)))
                && (args[6] == Py_None || (bias = take(&held, args[6], "bias", 1, 'f', true, false)))
                && (y = take(&held, args[7], "y", 2, 'f', true, true));
    if (!fine)
        return finish(&held, false);
    quantized_args job = {
        .x = x->buf, .values = values->buf, .scales = scales->buf, .bias = bias ? bias->buf : NULL,
        .zeros = zeros ? zeros->buf : NULL, .y = y->buf, .rows = size_of(x, 0),
        .in = size_of(x, 1), .out = size_of(values, 0), .x_stride = stride_of(x, 0),
        .group = group, .groups = size_of(scales, 1), .row_bytes = size_of(values, 1),
        .kind = kind};
    fine = expect(job.row_bytes * (kind == INT4 ? 2 : 1) == job.in, "x and values differ in columns")
           && expect(job.in % CODES == 0, "columns must be a multiple of 32")
           && expect(group > 0 && (job.groups - 1) * group < job.in && job.groups * group >= job.in
                         && (job.groups == 1 || group % CODES == 0),
                     "groups must be multiples of 32 columns, as many as scales has")
           && expect(size_of(scales, 0) == job.out, "scales must have a row for each of values")
           && expect(!zeros || memcmp(zeros->shape, scales->shape, 2 * sizeof(Py_ssize_t)) == 0,
                     "zeros and scales differ in shape")
           && expect(!bias || size_of(bias, 0) == job.out, "bias is not as long as values")
           && expect(size_of(y, 0) == job.rows && size_of(y, 1) == job.out, "y has another shape");
    float *parted = NULL;
    if (fine && kind == INT4) {
        parted = PyMem_RawMalloc((size_t)(job.rows * job.in) * sizeof *parted);
        if (!parted) {
            PyErr_NoMemory();
            fine = false;
        } else {
            part_inputs(job.x, job.x_stride, job.rows, job.in, parted);
            job.x = parted;
            job.x_stride = job.in;
        }
    }
    if (fine && job.rows > 0) {
        long most = 4 * TASK_FLOATS / (job.in > 0 ? job.in : 1) / 8 * 8;
        share(linear_quantized_chunk, &job, job.out, (double)job.rows * job.in * job.out, 8,
              most < 8 ? 8 : most);
    }
    PyMem_RawFree(parted);
    return finish(&held, fine);
}

/* --- kernels over rows -------------------------------------------------------------------- */

/* Sees an array of 1 to 3 axes as rows. */
static bool take_rows(arrays *held, PyObject *x_object, PyObject *y_object, rows_args *job)
{
    Py_buffer *view = &held->view[held->count];
    if (PyObject_GetBuffer(x_object, view, PyBUF_STRIDED) != 0)
        return false;
    int ndim = view->ndim;
    PyBuffer_Release(view);
    if (!expect(ndim >= 1 && ndim <= 3, "x must have one to three axes"))
        return false;
    Py_buffer *x = take(held, x_object, "x", ndim, 'f', false, false);
    Py_buffer *y = x ? take(held, y_object, "y", ndim, 'f', true, true) : NULL;
    if (!y)
        return false;
    for (int axis = 0; axis < ndim; axis++)
        if (!expect(size_of(x, axis) == size_of(y, axis), "y has another shape"))
            return false;
    job->x = x->buf;
    job->y = y->buf;
    job->width = size_of(x, ndim - 1);
    job->middle = ndim > 2 ? size_of(x, 1) : 1;
    job->outer = ndim > 1 ? size_of(x, 0) : 1;
    job->middle_stride = ndim > 2 ? stride_of(x, 1) : 0;
    job->outer_stride = ndim > 1 ? stride_of(x, 0) : 0;
    return true;
}

/* An element of a norm costs about as much as 4 multiply-adds of a product, of an exponential 10:
 * memory traffic included. */
static void share_rows(void (*run)(const void *, long, long), const rows_args *job, int cost)
{
    long rows = job->outer * job->middle;
    share(run, job, rows, (double)rows * job->width * cost, 1, rows);
}

static void rms_norm_chunk(const void *args, long begin, long end)
{
    kernels->rms_norm(args, begin, end);
}

static PyObject *rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    arrays held = {.count = 0};
    rows_args job = {0};
    Py_buffer *weight;
    (void)module;
    if (!arguments(nargs, 4))
        return NULL;
    job.eps = (float)PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred())
        return NULL;
    bool fine = take_rows(&held, args[0], args[3], &job)
                && (weight = take(&held, args[1], "weight", 1, 'f', true, false))
                && expect(size_of(weight, 0) == job.width, "weight is not as long as x's rows");
    if (fine) {
        job.weight = weight->buf;
        share_rows(rms_norm_chunk, &job, 4);
    }
    return finish(&held, fine);
}

static PyObject *elementwise(PyObject *x, PyObject *y, float cap,
                             void (*run)(const void *, long, long))
{
    arrays held = {.count = 0};
    rows_args job = {.cap = cap};
    bool fine = take_rows(&held, x, y, &job);
    if (fine)
        share_rows(run, &job, 10);
    return finish(&held, fine);
}

static void silu_chunk(const void *args, long begin, long end)
{
    kernels->silu(args, begin, end);
}

static PyObject *silu(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    return arguments(nargs, 2) ? elementwise(args[0], args[1], 0.0f, silu_chunk) : NULL;
}

static void gelu_tanh_chunk(const void *args, long begin, long end)
{
    kernels->gelu_tanh(args, begin, end);
}

static PyObject *gelu_tanh(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    return arguments(nargs, 2) ? elementwise(args[0], args[1], 0.0f, gelu_tanh_chunk) : NULL;
}

static void softcap_chunk(const void *args, long begin, long end)
{
    kernels->softcap(args, begin, end);
}

static PyObject *softcap(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (!arguments(nargs, 3))
        return NULL;
    double cap = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred())
        return NULL;
    return elementwise(args[0], args[2], (float)cap, softcap_chunk);
}

/* --- rope --------------------------------------------------------------------------------- */

static void rope_chunk(const void *args, long begin, long end)
{
    kernels->rope(args, begin, end);
}

static PyObject *rope(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    arrays held = {.count = 0};
    Py_buffer *x, *table, *positions, *y;
    (void)module;
    if (!arguments(nargs, 4))
        return NULL;
    bool fine = (x = take(&held, args[0], "x", 3, 'f', false, false))
                && (table = take(&held, args[1], "table", 2, 'f', true, false))
                && (positions = take(&held, args[2], "positions", 1, 'i', true, false))
                && (y = take(&held, args[3], "y", 3, 'f', true, true));
    if (!fine)
        return finish(&held, false);
    rope_args job = {.x = x->buf, .table = table->buf, .y = y->buf, .positions = positions->buf,
                     .tokens = size_of(x, 0), .heads = size_of(x, 1), .head_dim = size_of(x, 2),
                     .rotary_dim = size_of(table, 1), .token_stride = stride_of(x, 0),
                     .head_stride = stride_of(x, 1)};
    fine = expect(size_of(y, 0) == job.tokens && size_of(y, 1) == job.heads
                      && size_of(y, 2) == job.head_dim, "y has another shape")
           && expect(size_of(positions, 0) == job.tokens, "positions is not as long as x")
           && expect(job.rotary_dim <= job.head_dim && job.rotary_dim % 2 == 0,
                     "the table's rows must be even and no longer than head_dim");
    for (long t = 0; fine && t < job.tokens; t++)
        fine = expect(job.positions[t] >= 0 && job.positions[t] < size_of(table, 0),
                      "a position lies outside the table");
    if (fine)
        share(rope_chunk, &job, job.tokens, 4.0 * job.tokens * job.heads * job.head_dim, 1,
              job.tokens);
    return finish(&held, fine);
}

/* --- attention ---------------------------------------------------------------------------- */

static PyObject *append_kv(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    arrays held = {.count = 0};
    Py_buffer *from[2], *to[2], *slot_view;
    (void)module;
    if (!arguments(nargs, 5))
        return NULL;
    bool fine = (from[0] = take(&held, args[0], "k", 3, 'f', false, false))
                && (from[1] = take(&held, args[1], "v", 3, 'f', false, false))
                && (to[0] = take(&held, args[2], "k_pages", 4, 'f', true, true))
                && (to[1] = take(&held, args[3], "v_pages", 4, 'f', true, true))
                && (slot_view = take(&held, args[4], "slots", 1, 'q', true, false));
    if (!fine)
        return finish(&held, false);
    const int64_t *slots = slot_view->buf;
    long tokens = size_of(slot_view, 0), heads = size_of(to[0], 1), block = size_of(to[0], 2);
    long depth = size_of(to[0], 3), room = size_of(to[0], 0) * block;
    for (int i = 0; fine && i < 2; i++)
        fine = expect(size_of(from[i], 0) == tokens && size_of(from[i], 1) == heads
                          && size_of(from[i], 2) == depth, "k or v does not fit slots and pages");
    fine = fine && expect(memcmp(to[0]->shape, to[1]->shape, 4 * sizeof(Py_ssize_t)) == 0,
                          "k_pages and v_pages differ in shape");
    for (long t = 0; fine && t < tokens; t++)
        fine = expect(slots[t] >= -1 && slots[t] < room, "a slot lies outside the pages");
    for (int i = 0; fine && i < 2; i++)
        for (long t = 0; t < tokens; t++)
            for (long head = 0; slots[t] >= 0 && head < heads; head++) {
                long row = (slots[t] / block * heads + head) * block + slots[t] % block;
                memcpy((float *)to[i]->buf + row * depth,
                       (const float *)from[i]->buf + t * stride_of(from[i], 0)
                           + head * stride_of(from[i], 1),
                       (size_t)depth * sizeof(float));
            }
    return finish(&held, fine);
}

typedef struct {
    const attention_args *args;
    const attention_tile *tiles;
    float *scratch;
    long scratch_size;
} attention_job;

static void attention_task(void *context, long task, int thread)
{
    const attention_job *job = context;
    kernels->attention(job->args, &job->tiles[task], job->scratch + thread * job->scratch_size);
}

/* Cuts the queries into tiles, checking what they say; -1 with an exception set if it is wrong.
 * With tiles NULL it only counts them. `work` counts multiply-adds. */
static long cut_tiles(const attention_args *a, const int32_t *starts, const int32_t *lengths,
                      long sequences, long table_width, long per_tile, attention_tile *tiles,
                      double *work)
{
    long count = 0;
    for (long s = 0; s < sequences; s++) {
        long queries = starts[s + 1] - starts[s], length = lengths[s];
        if (!expect(queries >= 0 && length >= queries && length <= table_width * a->block_size,
                    "query_starts, seq_lens and block_table do not fit each other"))
            return -1;
        for (long first = 0; first < queries; first += per_tile)
            for (long head = 0; head < a->kv_heads; head++, count++) {
                long some = queries - first < per_tile ? queries - first : per_tile;
                long position = length - queries + first;
                if (tiles) {
                    tiles[count] = (attention_tile){.sequence = s, .kv_head = head,
                                                    .first = starts[s] + first, .count = some,
                                                    .position = position};
                    long seen = a->window && a->window < position ? a->window : position + some;
                    *work += 2.0 * some * seen * a->head_dim * (a->heads / a->kv_heads);
                }
            }
    }
    return count;
}

static PyObject *paged_attention(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    arrays held = {.count = 0};
    Py_buffer *q, *k, *v, *starts, *lengths, *table, *out;
    (void)module;
    if (!arguments(nargs, 10))
        return NULL;
    double scale = PyFloat_AsDouble(args[7]), cap = PyFloat_AsDouble(args[9]);
    long window = PyLong_AsLong(args[8]);
    if (PyErr_Occurred())
        return NULL;
    bool fine = (q = take(&held, args[0], "q", 3, 'f', false, false))
                && (k = take(&held, args[1], "k_pages", 4, 'f', true, false))
                && (v = take(&held, args[2], "v_pages", 4, 'f', true, false))
                && (starts = take(&held, args[3], "query_starts", 1, 'i', true, false))
                && (lengths = take(&held, args[4], "seq_lens", 1, 'i', true, false))
                && (table = take(&held, args[5], "block_table", 2, 'i', false, false))
                && (out = take(&held, args[6], "out", 3, 'f', true, true));
    if (!fine)
        return finish(&held, false);
    attention_args job = {
        .q = q->buf, .keys = k->buf, .values = v->buf, .out = out->buf, .block_table = table->buf,
        .q_stride = stride_of(q, 0), .table_stride = stride_of(table, 0), .heads = size_of(q, 1),
        .kv_heads = size_of(k, 1), .head_dim = size_of(q, 2), .block_size = size_of(k, 2),
        .page_stride = stride_of(k, 0), .scale = (float)scale, .softcap = (float)cap,
        .window = window};
    long sequences = size_of(lengths, 0), width = size_of(table, 1), blocks = size_of(k, 0);
    fine = expect(memcmp(k->shape, v->shape, 4 * sizeof(Py_ssize_t)) == 0,
                  "k_pages and v_pages differ in shape")
           && expect(memcmp(q->shape, out->shape, 3 * sizeof(Py_ssize_t)) == 0,
                     "out has another shape than q")
           && expect(size_of(q, 1) <= 1 || stride_of(q, 1) == job.head_dim,
                     "q's heads must be contiguous")
           && expect(size_of(k, 3) == job.head_dim && job.head_dim > 0 && job.kv_heads > 0
                         && job.block_size > 0 && job.heads % job.kv_heads == 0 && window >= 0,
                     "q does not fit the pages")
           && expect(size_of(starts, 0) == sequences + 1 && size_of(table, 0) == sequences,
                     "query_starts, seq_lens and block_table differ in their sequences");
    const int32_t *start = starts->buf, *length = lengths->buf;
    fine = fine && expect(start[0] == 0 && start[sequences] == size_of(q, 0),
                          "query_starts must run from 0 to the number of queries");
    long group = fine ? job.heads / job.kv_heads : 1;
    long per_tile = 4 * kernels->rows_per_tile / group;
    per_tile = per_tile < 1 ? 1 : per_tile;
    double work = 0;
    long count = fine ? cut_tiles(&job, start, length, sequences, width, per_tile, NULL, &work) : -1;
    fine = count >= 0;
    for (long s = 0; fine && s < sequences; s++) {
        const int32_t *row = job.block_table + s * job.table_stride;
        for (long i = 0; fine && i * job.block_size < length[s]; i++)
            fine = expect(row[i] >= 0 && row[i] < blocks, "a block lies outside the pages");
    }
    if (fine && count > 0) {
        int threads = pool_threads();
        long size = kernels->attention_scratch(&job, per_tile);
        size = (size + 31) / 16 * 16; /* a cache line apart */
        attention_tile *tiles = PyMem_RawMalloc((size_t)count * sizeof *tiles);
        float *scratch = PyMem_RawMalloc((size_t)threads * (size_t)size * sizeof *scratch);
        if (tiles && scratch) {
            cut_tiles(&job, start, length, sequences, width, per_tile, tiles, &work);
            attention_job all = {&job, tiles, scratch, size};
            if (work < WORTH_SHARING) {
                pool_run(attention_task, &all, count, 1);
            } else {
                Py_BEGIN_ALLOW_THREADS
                pool_run(attention_task, &all, count, threads);
                Py_END_ALLOW_THREADS
            }
        } else {
            PyErr_NoMemory();
            fine = false;
        }
        PyMem_RawFree(tiles);
        PyMem_RawFree(scratch);
    }
    return finish(&held, fine);
}

/* --- the module --------------------------------------------------------------------------- */

static PyObject *set_num_threads(PyObject *module, PyObject *threads)
{
    long count = PyLong_AsLong(threads);
    (void)module;
    if (PyErr_Occurred())
        return NULL;
    if (!expect(count >= 1, "the number of threads must be at least 1"))
        return NULL;
    pool_set_threads(count < POOL_MAX_THREADS ? (int)count : POOL_MAX_THREADS);
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    return PyLong_FromLong(pool_threads());
}

/* The tables this machine can run, the best first. */
static int usable(const kernel_table **tables)
{
    int count = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("fma"))
        tables[count++] = &kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        tables[count++] = &kernels_avx2;
#endif
    tables[count++] = &kernels_baseline;
    return count;
}

static PyObject *instruction_sets(PyObject *module, PyObject *none)
{
    const kernel_table *tables[3];
    int count = usable(tables);
    PyObject *names = PyTuple_New(count);
    (void)module, (void)none;
    for (int i = 0; names && i < count; i++) {
        PyObject *name = PyUnicode_FromString(tables[i]->name);
        if (!name) {
            Py_DECREF(names);
            return NULL;
        }
        PyTuple_SetItem(names, i, name);
    }
    return names;
}

static PyObject *instruction_set(PyObject *module, PyObject *none)
{
    (void)module, (void)none;
    return PyUnicode_FromString(kernels->name);
}

static PyObject *use_instruction_set(PyObject *module, PyObject *wanted)
{
    const kernel_table *tables[3];
    int count = usable(tables);
    const char *name = PyUnicode_AsUTF8(wanted);
    (void)module;
    if (!name)
        return NULL;
    for (int i = 0; i < count; i++)
        if (strcmp(tables[i]->name, name) == 0) {
            kernels = tables[i];
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "this machine has no %s", name);
    return NULL;
}

#define FAST(NAME) {#NAME, (PyCFunction)(void (*)(void))NAME, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST(linear),
    FAST(linear_quantized),
    FAST(rms_norm),
    FAST(silu),
    FAST(gelu_tanh),
    FAST(softcap),
    FAST(rope),
    FAST(append_kv),
    FAST(paged_attention),
    {"set_num_threads", set_num_threads, METH_O, NULL},
    {"get_num_threads", get_num_threads, METH_NOARGS, NULL},
    {"instruction_sets", instruction_sets, METH_NOARGS, NULL},
    {"instruction_set", instruction_set, METH_NOARGS, NULL},
    {"use_instruction_set", use_instruction_set, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "Kernels for the CPU; see native.py.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    const kernel_table *tables[3];
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    usable(tables);
    kernels = tables[0];
    return PyModule_Create(&definition);
}
