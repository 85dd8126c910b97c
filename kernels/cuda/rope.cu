// Rotary embedding, and the append of keys and values to the paged cache, in one pass over q, k, v.
//
// DTYPE: element type of q, k, v; KV_DTYPE: of the pages; HEAD_DIM; ROTARY: dims that rotate (0: none);
// VEC: elements a thread moves at once, a divisor of HEAD_DIM and ROTARY / 2; LANES: threads that
// share a head, a power of two up to 32; NORM: 1 to RMS-normalise each head of q and k first.
#include "common.cuh"

using T = DTYPE;
using KV = KV_DTYPE;

constexpr int HALF = ROTARY / 2;
constexpr int PAIRS = HALF / VEC;              // chunks of the first rotary half
constexpr int TAIL = (HEAD_DIM - ROTARY) / VEC;  // chunks that do not rotate
constexpr int PAIRS_EACH = (PAIRS + LANES - 1) / LANES;
constexpr int TAIL_EACH = (TAIL + LANES - 1) / LANES;
constexpr int CHUNKS = 2 * PAIRS_EACH + TAIL_EACH;  // that a thread holds

using In = Pack<T, VEC>;

// A thread's c-th chunk begins at this element of its head; HEAD_DIM or more: it has none.
__device__ __forceinline__ int begin_of(int c, int lane) {
  if (c < 2 * PAIRS_EACH) {
    const int pair = (c >> 1) * LANES + lane;
    return pair < PAIRS ? pair * VEC + (c & 1) * HALF : HEAD_DIM;
  }
  return ROTARY + ((c - 2 * PAIRS_EACH) * LANES + lane) * VEC;
}

__device__ __forceinline__ void normalise(float (&x)[CHUNKS][VEC], const T* weight, float eps,
                                          int lane) {
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int j = 0; j < VEC; j++) squares += x[c][j] * x[c][j];
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2)
    squares += __shfl_xor_sync(0xffffffff, squares, offset);
  const float factor = rsqrtf(squares / HEAD_DIM + eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int begin = begin_of(c, lane);
    if (begin >= HEAD_DIM) continue;
    const In w = *reinterpret_cast<const In*>(weight + begin);
#pragma unroll
    for (int j = 0; j < VEC; j++) x[c][j] *= factor * to_float(w.at[j]);
  }
}

__device__ __forceinline__ void rotate(float (&x)[CHUNKS][VEC], const float* cosines, int lane) {
#pragma unroll
  for (int c = 0; c < 2 * PAIRS_EACH; c += 2) {
    const int begin = begin_of(c, lane);
    if (begin >= HEAD_DIM) continue;
    const auto cos = *reinterpret_cast<const Pack<float, VEC>*>(cosines + begin);
    const auto sin = *reinterpret_cast<const Pack<float, VEC>*>(cosines + HALF + begin);
#pragma unroll
    for (int j = 0; j < VEC; j++) {
      const float first = x[c][j], second = x[c + 1][j];
      x[c][j] = first * cos.at[j] - second * sin.at[j];
      x[c + 1][j] = second * cos.at[j] + first * sin.at[j];
    }
  }
}

template <typename OUT>
__device__ __forceinline__ void store(const float (&x)[CHUNKS][VEC], OUT* target, float factor,
                                      int lane) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int begin = begin_of(c, lane);
    if (begin >= HEAD_DIM) continue;
    Pack<OUT, VEC> result;
#pragma unroll
    for (int j = 0; j < VEC; j++) result.at[j] = from_float<OUT>(x[c][j] * factor);
    *reinterpret_cast<Pack<OUT, VEC>*>(target + begin) = result;
  }
}

// Rows of q, k, v are `*_stride` elements apart, their heads HEAD_DIM. Each of `groups` = tokens *
// (heads + kv_heads + (v ? kv_heads : 0)) groups of LANES threads takes one head of one token.
// Without slots, token t's slot is t. `inverse_scale` multiplies what is stored in the pages.
extern "C" __global__ void rope_append(const T* q, const T* k, const T* v, const float* table,
                                       const int* positions, const T* q_weight, const T* k_weight,
                                       T* q_out, KV* k_pages, KV* v_pages, const long long* slots,
                                       int groups, int heads, int kv_heads, int q_stride,
                                       int k_stride, int v_stride, int block_size,
                                       float inverse_scale, float eps) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x % LANES;
  const int group = (blockIdx.x * blockDim.x + threadIdx.x) / LANES;
  // Threads past the end stay for the warp's shuffles.
  const bool inside = group < groups;
  const int per_token = heads + kv_heads + (v != nullptr ? kv_heads : 0);
  const int token = inside ? group / per_token : 0;
  const int head = inside ? group % per_token : 0;
  const bool is_q = head < heads, is_k = !is_q && head < heads + kv_heads;
  const T* source;
  if (is_q) source = q + static_cast<long long>(token) * q_stride + head * HEAD_DIM;
  else if (is_k) source = k + static_cast<long long>(token) * k_stride + (head - heads) * HEAD_DIM;
  else source = v + static_cast<long long>(token) * v_stride + (head - heads - kv_heads) * HEAD_DIM;

  float x[CHUNKS][VEC];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int begin = begin_of(c, lane);
    In values;
    if (begin < HEAD_DIM) values = *reinterpret_cast<const In*>(source + begin);
#pragma unroll
    for (int j = 0; j < VEC; j++) x[c][j] = begin < HEAD_DIM ? to_float(values.at[j]) : 0.0f;
  }
#if NORM
  {
    float kept[CHUNKS][VEC];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int j = 0; j < VEC; j++) kept[c][j] = x[c][j];
    normalise(x, is_q ? q_weight : k_weight, eps, lane);  // every thread: it shuffles
    if (!is_q && !is_k) {
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int j = 0; j < VEC; j++) x[c][j] = kept[c][j];
    }
  }
#endif
#if ROTARY
  if (is_q || is_k)
    rotate(x, table + static_cast<long long>(positions[token]) * ROTARY, lane);
#endif
  if (!inside) return;
  if (is_q) {
    store(x, q_out + (static_cast<long long>(token) * heads + head) * HEAD_DIM, 1.0f, lane);
    return;
  }
  const long long slot = slots != nullptr ? slots[token] : token;
  if (slot < 0) return;
  const int kv_head = (head - heads) % kv_heads;
  const long long row = (slot / block_size * kv_heads + kv_head) * block_size + slot % block_size;
  store(x, (is_k ? k_pages : v_pages) + row * HEAD_DIM, inverse_scale, lane);
}
