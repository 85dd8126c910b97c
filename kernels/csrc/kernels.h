/* The kernels, one table of them per instruction set. All arrays are float32 with a contiguous
 * last axis; a stride counts elements. Callers have checked shapes; nothing here allocates Python
 * objects or needs the GIL. */
#ifndef TENSORRAY_KERNELS_H
#define TENSORRAY_KERNELS_H

#include <stdint.h>

/* y[m][n] = x[m] . weight[n] + bias[n], for weight rows from `begin` to `end`. */
typedef struct {
    const float *x, *weight, *bias; /* bias may be NULL */
    float *y;
    long rows, in, out;
    long x_stride;
} linear_args;

/* What the codes of a quantized weight are; see kernels/quantized.py for their order in memory. */
typedef enum { INT4, INT8, FLOAT8 } code_kind;

/* Codes that are read at once: a group has a multiple of these, as has a row. */
#define CODES 32

/* As linear, with weight = (code - zero) * scale; each row has a scale for every `group` codes. */
typedef struct {
    const float *x; /* [rows, in]; with INT4, of each CODES inputs first the even, then the odd */
    const uint8_t *values;
    const float *scales, *bias; /* bias may be NULL */
    const int8_t *zeros;        /* may be NULL */
    float *y;
    long rows, in, out;
    long x_stride;
    long group, groups; /* columns of a group; groups of a row */
    long row_bytes;     /* of values */
    code_kind kind;
} quantized_args;

/* Rows of three axes [outer, middle, width]; the output is contiguous. */
typedef struct {
    const float *x;
    float *y;
    long outer, middle, width;
    long outer_stride, middle_stride;
    const float *weight; /* norm only */
    float eps;           /* norm only */
    float cap;           /* softcap only */
} rows_args;

typedef struct {
    const float *x, *table;
    float *y;
    const int32_t *positions;
    long tokens, heads, head_dim, rotary_dim;
    long token_stride, head_stride;
} rope_args;

typedef struct {
    const float *q, *keys, *values;
    float *out;
    const int32_t *block_table;
    long q_stride; /* from a token to the next */
    long table_stride;
    long heads, kv_heads, head_dim, block_size;
    long page_stride; /* from a block to the next */
    float scale, softcap; /* softcap 0: none */
    long window;          /* 0: all */
} attention_args;

/* One unit of attention work: queries [first, first + count) of a sequence, one KV head. */
typedef struct {
    long sequence, kv_head;
    long first, count; /* packed rows */
    long position;     /* of the first */
} attention_tile;

typedef struct {
    const char *name;
    long rows_per_tile; /* rows of activations or queries that share registers */
    void (*linear)(const linear_args *, long begin, long end);
    void (*linear_quantized)(const quantized_args *, long begin, long end);
    void (*rms_norm)(const rows_args *, long begin, long end);
    void (*silu)(const rows_args *, long begin, long end);
    void (*gelu_tanh)(const rows_args *, long begin, long end);
    void (*softcap)(const rows_args *, long begin, long end);
    void (*rope)(const rope_args *, long begin, long end);
    void (*attention)(const attention_args *, const attention_tile *, float *scratch);
    long (*attention_scratch)(const attention_args *, long max_count);
} kernel_table;

extern const kernel_table kernels_baseline;
#if defined(__x86_64__)
extern const kernel_table kernels_avx2, kernels_avx512;
#endif

#endif
