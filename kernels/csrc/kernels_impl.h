/* The kernels' bodies, compiled once per instruction set (see simd.h) into the table TABLE.
 *
 * The result for one row of the activations is the same bits whatever rows share its batch: each
 * dot product is accumulated in one vector, front to back, by the same final sum, however many
 * rows a tile has; attention walks keys in tiles whose borders are absolute positions. */
#include "kernels.h"
#include "simd.h"

/* Query or activation rows per tile, times 4 weight rows: as many accumulators as there are
 * registers for. */
#if LANES == 16 || defined(__aarch64__)
#define MAX_ROWS 6
#else
#define MAX_ROWS 3
#endif
/* Floats in a cache line. */
#define LINE 16

/* out[m][n] = x[m] . w[n] + bias[n] for `rows` x `columns`, both constants once inlined. Each turn
 * of the loop also fetches `lines` (0 to 4) cache lines from `fetch` on: the weights that come
 * next, so that memory works while the products do. */
INLINE void dot_tile(const float *x, long x_stride, const float *w, long w_stride, long depth,
                     const float *bias, float *out, long out_stride, const int rows,
                     const int columns, const float *fetch, long lines)
{
    vec acc[MAX_ROWS][4];
    long i = 0;
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int n = 0; n < columns; n++)
            acc[m][n] = (vec){0};
    for (; i + LANES <= depth; i += LANES) {
        vec weight[4];
#pragma GCC unroll 8
        for (int n = 0; n < columns; n++)
            weight[n] = load(w + n * w_stride + i);
        if (lines > 0) { /* by cases: a loop here costs a third of the products' time */
            __builtin_prefetch(fetch);
            if (lines > 1)
                __builtin_prefetch(fetch + LINE);
            if (lines > 2) {
                __builtin_prefetch(fetch + 2 * LINE);
                __builtin_prefetch(fetch + 3 * LINE);
            }
            fetch += lines * LINE;
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            vec row = load(x + m * x_stride + i);
#pragma GCC unroll 8
            for (int n = 0; n < columns; n++)
                acc[m][n] += row * weight[n];
        }
    }
    if (i < depth) {
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            vec row = load_part(x + m * x_stride + i, depth - i);
#pragma GCC unroll 8
            for (int n = 0; n < columns; n++)
                acc[m][n] += row * load_part(w + n * w_stride + i, depth - i);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        if (columns == 1) {
            out[m * out_stride] = sum(acc[m][0]) + (bias ? bias[0] : 0.0f);
        } else {
#pragma GCC unroll 8
            for (int n = 0; n + 3 < columns; n += 4) {
                vec4 four = sum_each(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3]);
                if (bias) {
                    vec4 more;
                    memcpy(&more, bias + n, sizeof more);
                    four += more;
                }
                memcpy(out + m * out_stride + n, &four, sizeof four);
            }
        }
    }
}

#define TILE(ROWS, COLUMNS)                                                                       \
    dot_tile(x, x_stride, w, w_stride, depth, bias, out, out_stride, ROWS, COLUMNS, fetch, lines)

/* One to MAX_ROWS rows against 1 or 4 weight rows. */
KERNEL void dot_rows(const float *x, long x_stride, const float *w, long w_stride, long depth,
                     const float *bias, float *out, long out_stride, long rows, long columns,
                     const float *fetch, long lines)
{
    switch (rows * 8 + columns) {
    case 1 * 8 + 1: TILE(1, 1); break;
    case 1 * 8 + 4: TILE(1, 4); break;
    case 2 * 8 + 1: TILE(2, 1); break;
    case 2 * 8 + 4: TILE(2, 4); break;
    case 3 * 8 + 1: TILE(3, 1); break;
    case 3 * 8 + 4: TILE(3, 4); break;
#if MAX_ROWS > 3
    case 4 * 8 + 1: TILE(4, 1); break;
    case 4 * 8 + 4: TILE(4, 4); break;
    case 5 * 8 + 1: TILE(5, 1); break;
    case 5 * 8 + 4: TILE(5, 4); break;
    case 6 * 8 + 1: TILE(6, 1); break;
    case 6 * 8 + 4: TILE(6, 4); break;
#endif
    }
}

INLINE long tile_rows(long left)
{
    return left < MAX_ROWS ? left : MAX_ROWS;
}

/* Weights stream from memory; each block of them visits all rows. */
KERNEL void linear(const linear_args *a, long begin, long end)
{
    const float *bias = a->bias;
    for (long n = begin, step; n < end; n += step) {
        step = end - n >= 4 ? 4 : 1;
        /* The next block is step * in floats; each of the tiles below turns in / LANES times. */
        long tiles = (a->rows + MAX_ROWS - 1) / MAX_ROWS;
        long lines = (step * LANES + tiles * LINE - 1) / (tiles * LINE);
        if (a->rows == 1)
            lines = 0; /* the loop is a mere stream, which the hardware foresees better */
        const float *fetch = a->weight + (n + step) * a->in;
        for (long m = 0, rows; m < a->rows; m += rows) {
            rows = tile_rows(a->rows - m);
            dot_rows(a->x + m * a->x_stride, a->x_stride, a->weight + n * a->in, a->in, a->in,
                     bias ? bias + n : NULL, a->y + m * a->out + n, a->out, rows, step,
                     fetch, lines);
            fetch += a->in / LANES * lines * LINE;
        }
    }
}

/* --- products by quantized weights --- */

INLINE vec float8_value(ivec code)
{
    /* Exponent and mantissa as a float's, whose bias is 120 more. A subnormal m * 2^-9 comes out as
     * 2^-7 + m * 2^-10. (As a float's subnormal it would be a slow one.) */
    ivec magnitude = code & 0x7f;
    vec value = (vec)((magnitude << 20) + (120 << 23));
    value = choose(magnitude < 8, value + value - 0x1p-6f, value);
    return (vec)((ivec)value | (code & 0x80) << 24);
}

/* Two vectors of a row's codes, as numbers: of CODES codes from p on, the ones that meet x from
 * `lane` on and from CODES / 2 + lane on. */
INLINE void decode(const code_kind kind, const uint8_t *p, int lane, vec *one, vec *two)
{
    if (kind == INT4) {
        ivec pair = load_bytes(p + lane);
        *one = to_floats((pair << 28) >> 28);
        *two = to_floats(pair >> 4);
    } else {
        ivec first = load_bytes(p + lane), second = load_bytes(p + CODES / 2 + lane);
        *one = kind == INT8 ? to_floats(first) : float8_value(first);
        *two = kind == INT8 ? to_floats(second) : float8_value(second);
    }
}

/* `rows` rows from x on by `columns` weight rows from n on; constants once inlined, as is kind. */
INLINE void quantized_tile(const quantized_args *a, const float *x, long n, float *out,
                           const int rows, const int columns, const code_kind kind)
{
    const uint8_t *w = a->values + n * a->row_bytes;
    vec acc[MAX_ROWS][4];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++)
            acc[m][c] = (vec){0};
    for (long g = 0; g < a->groups; g++) {
        long end = (g + 1) * a->group < a->in ? (g + 1) * a->group : a->in;
        vec scale[4], shift[4];
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) {
            long at = (n + c) * a->groups + g;
            scale[c] = splat(a->scales[at]);
            shift[c] = splat(a->zeros ? -a->scales[at] * (float)a->zeros[at] : 0.0f);
        }
        for (long i = g * a->group; i < end; i += CODES) {
            const uint8_t *p = w + (kind == INT4 ? i / 2 : i);
            for (int lane = 0; lane < CODES / 2; lane += LANES) {
#pragma GCC unroll 8
                for (int c = 0; c < columns; c++) {
                    vec one, two;
                    decode(kind, p + c * a->row_bytes, lane, &one, &two);
                    one = one * scale[c] + shift[c];
                    two = two * scale[c] + shift[c];
#pragma GCC unroll 8
                    for (int m = 0; m < rows; m++) {
                        const float *row = x + m * a->x_stride + i + lane;
                        acc[m][c] += load(row) * one;
                        acc[m][c] += load(row + CODES / 2) * two;
                    }
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
        if (columns == 1) {
            out[m * a->out] = sum(acc[m][0]) + (a->bias ? a->bias[n] : 0.0f);
        } else {
            vec4 four = sum_each(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
            if (a->bias) {
                vec4 more;
                memcpy(&more, a->bias + n, sizeof more);
                four += more;
            }
            memcpy(out + m * a->out, &four, sizeof four);
        }
}

#define QUANTIZED_TILE(ROWS)                                                                      \
    case ROWS:                                                                                    \
        if (columns == 4)                                                                         \
            quantized_tile(a, x, n, out, ROWS, 4, kind);                                          \
        else                                                                                      \
            quantized_tile(a, x, n, out, ROWS, 1, kind);                                          \
        break;

INLINE void quantized_rows(const quantized_args *a, const float *x, long n, float *out, long rows,
                           long columns, const code_kind kind)
{
    switch (rows) {
        QUANTIZED_TILE(1)
        QUANTIZED_TILE(2)
        QUANTIZED_TILE(3)
#if MAX_ROWS > 3
        QUANTIZED_TILE(4)
        QUANTIZED_TILE(5)
        QUANTIZED_TILE(6)
#endif
    }
}

KERNEL void int4_rows(const quantized_args *a, const float *x, long n, float *out, long rows,
                      long columns)
{
    quantized_rows(a, x, n, out, rows, columns, INT4);
}

KERNEL void int8_rows(const quantized_args *a, const float *x, long n, float *out, long rows,
                      long columns)
{
    quantized_rows(a, x, n, out, rows, columns, INT8);
}

KERNEL void float8_rows(const quantized_args *a, const float *x, long n, float *out, long rows,
                        long columns)
{
    quantized_rows(a, x, n, out, rows, columns, FLOAT8);
}

KERNEL void linear_quantized(const quantized_args *a, long begin, long end)
{
    for (long n = begin, step; n < end; n += step) {
        step = end - n >= 4 ? 4 : 1;
        for (long m = 0, rows; m < a->rows; m += rows) {
            const float *x = a->x + m * a->x_stride;
            float *out = a->y + m * a->out + n;
            rows = tile_rows(a->rows - m);
            if (a->kind == INT4)
                int4_rows(a, x, n, out, rows, step);
            else if (a->kind == INT8)
                int8_rows(a, x, n, out, rows, step);
            else
                float8_rows(a, x, n, out, rows, step);
        }
    }
}

INLINE const float *row_in(const rows_args *a, long row)
{
    return a->x + row / a->middle * a->outer_stride + row % a->middle * a->middle_stride;
}

KERNEL void rms_norm(const rows_args *a, long begin, long end)
{
    for (long row = begin; row < end; row++) {
        const float *x = row_in(a, row);
        float *y = a->y + row * a->width;
        vec squares = {0};
        long i = 0;
        for (; i + LANES <= a->width; i += LANES)
            squares += load(x + i) * load(x + i);
        if (i < a->width) {
            vec rest = load_part(x + i, a->width - i);
            squares += rest * rest;
        }
        float scale = 1.0f / sqrtf(sum(squares) / (float)a->width + a->eps);
        for (i = 0; i < a->width; i++)
            y[i] = x[i] * scale * a->weight[i];
    }
}

/* y = f(x) for each element of a range of rows. */
#define ELEMENTWISE(NAME, F)                                                                      \
    KERNEL void NAME(const rows_args *a, long begin, long end)                                    \
    {                                                                                             \
        for (long row = begin; row < end; row++) {                                                \
            const float *x = row_in(a, row);                                                      \
            float *y = a->y + row * a->width;                                                     \
            long i = 0;                                                                           \
            for (; i + LANES <= a->width; i += LANES)                                             \
                store(y + i, F(load(x + i), a->cap));                                             \
            if (i < a->width) {                                                                   \
                long left = a->width - i;                                                         \
                store_part(y + i, F(load_part(x + i, left), a->cap), left);                       \
            }                                                                                     \
        }                                                                                         \
    }

INLINE vec silu_of(vec x, float unused)
{
    (void)unused;
    return x / (exponential(-x) + 1.0f);
}

/* 0.5 x (1 + tanh(u)) is x sigmoid(2u). */
INLINE vec gelu_of(vec x, float unused)
{
    (void)unused;
    vec twice = x * 1.5957691216f * (x * x * 0.044715f + 1.0f);
    return x / (exponential(-twice) + 1.0f);
}

INLINE vec softcap_of(vec x, float cap)
{
    return cap - 2.0f * cap / (exponential(x * (2.0f / cap)) + 1.0f);
}

ELEMENTWISE(silu, silu_of)
ELEMENTWISE(gelu_tanh, gelu_of)
ELEMENTWISE(softcap, softcap_of)

KERNEL void rope(const rope_args *a, long begin, long end)
{
    long half = a->rotary_dim / 2;
    for (long token = begin; token < end; token++) {
        const float *cosine = a->table + a->positions[token] * a->rotary_dim;
        const float *sine = cosine + half;
        for (long head = 0; head < a->heads; head++) {
            const float *x = a->x + token * a->token_stride + head * a->head_stride;
            float *y = a->y + (token * a->heads + head) * a->head_dim;
            for (long i = 0; i < half; i++) {
                y[i] = x[i] * cosine[i] - x[half + i] * sine[i];
                y[half + i] = x[half + i] * cosine[i] + x[i] * sine[i];
            }
            for (long i = a->rotary_dim; i < a->head_dim; i++)
                y[i] = x[i];
        }
    }
}

/* Keys whose scores are held at once. A tile begins at a multiple of this, whoever asks. */
#define KEYS 64

/* mixed[r] += sum over keys of weights[r][key] * values[key], for `rows` x (`vectors` * LANES). */
INLINE void mix_tile(const float *weights, const float *const *values, long begin, long end,
                     float *mixed, long stride, long column, const int rows, const int vectors)
{
    vec acc[MAX_ROWS][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < vectors; c++)
            acc[r][c] = load(mixed + r * stride + column + c * LANES);
    for (long key = begin; key < end; key++) {
        const float *value = values[key] + column;
        vec part[4];
#pragma GCC unroll 8
        for (int c = 0; c < vectors; c++)
            part[c] = load(value + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float weight = weights[r * KEYS + key];
#pragma GCC unroll 8
            for (int c = 0; c < vectors; c++)
                acc[r][c] += weight * part[c];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < vectors; c++)
            store(mixed + r * stride + column + c * LANES, acc[r][c]);
}

#define MIX(ROWS)                                                                                 \
    for (; column + 4 * LANES <= stride; column += 4 * LANES)                                     \
        mix_tile(weights, values, begin, end, mixed, stride, column, ROWS, 4);                    \
    for (; column + LANES <= stride; column += LANES)                                             \
        mix_tile(weights, values, begin, end, mixed, stride, column, ROWS, 1);

KERNEL void mix_rows(const float *weights, const float *const *values, long begin, long end,
                     float *mixed, long stride, long rows)
{
    long column = 0;
    switch (rows) {
    case 1: MIX(1); break;
    case 2: MIX(2); break;
    case 3: MIX(3); break;
#if MAX_ROWS > 3
    case 4: MIX(4); break;
    case 5: MIX(5); break;
    case 6: MIX(6); break;
#endif
    }
    for (long r = 0; column < stride && r < rows; r++)
        for (long key = begin; key < end; key++)
            for (long c = column; c < stride; c++)
                mixed[r * stride + c] += weights[r * KEYS + key] * values[key][c];
}

/* One row's scores become weights relative to the highest score so far; returns what that
 * highest's change makes of the sums before (Milakov & Gimelshein, arXiv 1805.02867). */
INLINE float soften(float *scores, float *best, float *total)
{
    vec part[KEYS / LANES], top, weight_sum = {0};
    for (int i = 0; i < KEYS / LANES; i++) {
        part[i] = load(scores + i * LANES);
        top = i == 0 ? part[0] : choose(part[i] > top, part[i], top);
    }
    float before = *best, now = highest(top);
    if (!(now > before))
        now = before;
    if (now == -INFINITY) { /* nothing visible yet */
        memset(scores, 0, KEYS * sizeof(float));
        return 1.0f;
    }
    for (int i = 0; i < KEYS / LANES; i++) {
        vec weight = exponential(part[i] - now);
        weight_sum += weight;
        store(scores + i * LANES, weight);
    }
    float change = now == before ? 1.0f : exponential(splat(before - now))[0];
    *best = now;
    *total = *total * change + sum(weight_sum);
    return change;
}

/* Floats of scratch a tile of `count` queries needs. */
KERNEL long attention_scratch(const attention_args *a, long count)
{
    long rows = count * (a->heads / a->kv_heads);
    return rows * (2 * a->head_dim + KEYS + 2);
}

KERNEL void attention(const attention_args *a, const attention_tile *tile, float *scratch)
{
    long group = a->heads / a->kv_heads, rows = tile->count * group, depth = a->head_dim;
    float *queries = scratch, *mixed = queries + rows * depth, *scores = mixed + rows * depth;
    float *best = scores + rows * KEYS, *total = best + rows;
    const int32_t *blocks = a->block_table + tile->sequence * a->table_stride;
    long head_page = tile->kv_head * a->block_size * depth;
    long high = tile->position + tile->count; /* keys [low, high) are seen by some query */
    long low = a->window && tile->position >= a->window ? tile->position - a->window + 1 : 0;

    for (long r = 0; r < rows; r++) {
        const float *q = a->q + (tile->first + r / group) * a->q_stride
                         + (tile->kv_head * group + r % group) * depth;
        for (long i = 0; i < depth; i++)
            queries[r * depth + i] = q[i] * a->scale;
        best[r] = -INFINITY;
        total[r] = 0.0f;
    }
    memset(mixed, 0, (size_t)(rows * depth) * sizeof(float));

    for (long base = low / KEYS * KEYS; base < high; base += KEYS) {
        const float *values[KEYS];
        long begin = low > base ? low - base : 0;
        long end = high - base < KEYS ? high - base : KEYS;
        for (long key = begin, run; key < end; key += run) {
            long offset = (base + key) % a->block_size;
            long at = blocks[(base + key) / a->block_size] * a->page_stride + head_page
                      + offset * depth;
            run = a->block_size - offset < end - key ? a->block_size - offset : end - key;
            for (long i = 0; i < run; i++)
                values[key + i] = a->values + at + i * depth;
            for (long r = 0, some; r < rows; r += some) {
                some = tile_rows(rows - r);
                for (long i = 0, step; i < run; i += step) {
                    step = run - i >= 4 ? 4 : 1;
                    dot_rows(queries + r * depth, depth, a->keys + at + i * depth, depth, depth,
                             NULL, scores + r * KEYS + key + i, KEYS, some, step, NULL, 0);
                }
            }
        }
        for (long r = 0; r < rows; r++) {
            float *row = scores + r * KEYS;
            long position = tile->position + r / group;
            long first = a->window && position >= a->window ? position - a->window + 1 : 0;
            long from = first > base + begin ? first - base : begin;
            long to = position + 1 < base + end ? position + 1 - base : end;
            if (a->softcap != 0.0f)
                for (long i = begin / LANES * LANES; i < end; i += LANES)
                    store(row + i, softcap_of(load(row + i), a->softcap));
            for (long i = 0; i < KEYS; i++)
                if (i < from || i >= to)
                    row[i] = -INFINITY;
            float change = soften(row, &best[r], &total[r]);
            if (change != 1.0f)
                for (long i = 0; i < depth; i++)
                    mixed[r * depth + i] *= change;
        }
        for (long r = 0, some; r < rows; r += some) {
            some = tile_rows(rows - r);
            mix_rows(scores + r * KEYS, values, begin, end, mixed + r * depth, depth, some);
        }
    }
    for (long r = 0; r < rows; r++) {
        float *y = a->out + ((tile->first + r / group) * a->heads
                             + tile->kv_head * group + r % group) * depth;
        for (long i = 0; i < depth; i++)
            y[i] = mixed[r * depth + i] / total[r];
    }
}

const kernel_table TABLE = {
    .name = TABLE_NAME,
    .rows_per_tile = MAX_ROWS,
    .linear = linear,
    .linear_quantized = linear_quantized,
    .rms_norm = rms_norm,
    .silu = silu,
    .gelu_tanh = gelu_tanh,
    .softcap = softcap,
    .rope = rope,
    .attention = attention,
    .attention_scratch = attention_scratch,
};
