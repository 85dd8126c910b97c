// Norms of rows that are held in registers while their statistics are taken, in float.
//
// INPUT: element type of what is normed, or of the residual stream; DELTA: of what is added to it;
// WEIGHT: of weights, bias and result. A thread holds ITEMS packs of VEC elements of a row.
#include "block_sum.cuh"
#include "common.cuh"

using X = INPUT;
using D = DELTA;
using W = WEIGHT;

// Calls f(item, column) for each pack that this thread holds of a row of n elements.
template <typename F>
__device__ __forceinline__ void each_pack(int thread, int threads, int n, F f) {
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int column = (item * threads + thread) * VEC;
    if (column < n) f(item, column);
  }
}

template <typename T>
__device__ __forceinline__ void load(float (&to)[VEC], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, VEC>*>(from);
#pragma unroll
  for (int j = 0; j < VEC; j++) to[j] = to_float(pack.at[j]);
}

template <typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[VEC]) {
  Pack<T, VEC> pack;
#pragma unroll
  for (int j = 0; j < VEC; j++) pack.at[j] = from_float<T>(from[j]);
  *reinterpret_cast<Pack<T, VEC>*>(to) = pack;
}

__device__ __forceinline__ float sum_of_squares(const float (&row)[ITEMS][VEC], int thread,
                                                int threads, int n) {
  float sum = 0.0f;
  each_pack(thread, threads, n, [&](int item, int) {
#pragma unroll
    for (int j = 0; j < VEC; j++) sum += row[item][j] * row[item][j];
  });
  return sum;
}

__device__ __forceinline__ void scale_and_store(W* y, const float (&row)[ITEMS][VEC],
                                                const W* weight, float scale, int thread,
                                                int threads, int n) {
  each_pack(thread, threads, n, [&](int item, int column) {
    float factor[VEC], result[VEC];
    load(factor, weight + column);
#pragma unroll
    for (int j = 0; j < VEC; j++) result[j] = row[item][j] * scale * factor[j];
    store(y + column, result);
  });
}

// y = x / rms(x) * weight; a block a row.
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm(const X* x, const W* weight, W* y, int n, long long x_stride, float eps) {
  __shared__ float scratch[32];
  wait_for_previous_kernel();
  let_next_kernel_start();
  x += blockIdx.x * x_stride;
  float row[ITEMS][VEC];
  each_pack(threadIdx.x, blockDim.x, n, [&](int item, int column) { load(row[item], x + column); });
  const float sum = block_sum(sum_of_squares(row, threadIdx.x, blockDim.x, n), scratch);
  scale_and_store(y + static_cast<long long>(blockIdx.x) * n, row, weight, rsqrtf(sum / n + eps),
                  threadIdx.x, blockDim.x, n);
}

// total = x + delta, or x + delta / rms(delta) * delta_weight; y = total / rms(total) * weight.
extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const X* x, const D* delta, const W* delta_weight, const W* weight, X* total, W* y,
                 int n, long long x_stride, long long delta_stride, float eps) {
  __shared__ float scratch[2][32];
  wait_for_previous_kernel();
  let_next_kernel_start();
  x += blockIdx.x * x_stride;
  delta += blockIdx.x * delta_stride;
  total += static_cast<long long>(blockIdx.x) * n;
  float row[ITEMS][VEC];
  each_pack(threadIdx.x, blockDim.x, n,
            [&](int item, int column) { load(row[item], delta + column); });
  float scale = 1.0f;
  if (delta_weight != nullptr)
    scale = rsqrtf(block_sum(sum_of_squares(row, threadIdx.x, blockDim.x, n), scratch[0]) / n + eps);
  each_pack(threadIdx.x, blockDim.x, n, [&](int item, int column) {
    float base[VEC], factor[VEC];
    load(base, x + column);
    if (delta_weight != nullptr) load(factor, delta_weight + column);
#pragma unroll
    for (int j = 0; j < VEC; j++) {
      const float added = delta_weight != nullptr ? row[item][j] * scale * factor[j] : row[item][j];
      row[item][j] = to_float(from_float<X>(base[j] + added));
    }
    store(total + column, row[item]);
  });
  const float sum = block_sum(sum_of_squares(row, threadIdx.x, blockDim.x, n), scratch[1]);
  scale_and_store(y + static_cast<long long>(blockIdx.x) * n, row, weight, rsqrtf(sum / n + eps),
                  threadIdx.x, blockDim.x, n);
}

// y = (x - mean) / deviation * weight + bias; a block a row.
extern "C" __global__ void __launch_bounds__(1024)
    layer_norm(const X* x, const W* weight, const W* bias, W* y, int n, long long x_stride,
               float eps) {
  __shared__ float scratch[2][32];
  wait_for_previous_kernel();
  let_next_kernel_start();
  x += blockIdx.x * x_stride;
  y += static_cast<long long>(blockIdx.x) * n;
  float row[ITEMS][VEC], sum = 0.0f;
  each_pack(threadIdx.x, blockDim.x, n, [&](int item, int column) {
    load(row[item], x + column);
#pragma unroll
    for (int j = 0; j < VEC; j++) sum += row[item][j];
  });
  const float mean = block_sum(sum, scratch[0]) / n;
  each_pack(threadIdx.x, blockDim.x, n, [&](int item, int) {
#pragma unroll
    for (int j = 0; j < VEC; j++) row[item][j] -= mean;
  });
  const float squares = block_sum(sum_of_squares(row, threadIdx.x, blockDim.x, n), scratch[1]);
  const float scale = rsqrtf(squares / n + eps);
  each_pack(threadIdx.x, blockDim.x, n, [&](int item, int column) {
    float factor[VEC], shift[VEC], result[VEC];
    load(factor, weight + column);
    load(shift, bias + column);
#pragma unroll
    for (int j = 0; j < VEC; j++) result[j] = row[item][j] * scale * factor[j] + shift[j];
    store(y + column, result);
  });
}

// rms_norm of short rows, a warp each: a token's heads of q, then those of k, each with a weight.
extern "C" __global__ void __launch_bounds__(128)
    head_norms(const X* q, const X* k, const W* q_weight, const W* k_weight, W* q_out, W* k_out,
               int tokens, int q_heads, int k_heads, int n, long long q_stride,
               long long q_head_stride, long long k_stride, long long k_head_stride, float eps) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, heads = q_heads + k_heads;
  const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const long long token = i / heads;
  if (token >= tokens) return;
  const int head = i % heads, k_head = head - q_heads;
  const bool is_q = k_head < 0;
  const X* x = is_q ? q + token * q_stride + head * q_head_stride
                    : k + token * k_stride + k_head * k_head_stride;
  W* y = is_q ? q_out + (token * q_heads + head) * n : k_out + (token * k_heads + k_head) * n;
  float row[ITEMS][VEC];
  each_pack(lane, 32, n, [&](int item, int column) { load(row[item], x + column); });
  const float sum = warp_sum(sum_of_squares(row, lane, 32, n));
  scale_and_store(y, row, is_q ? q_weight : k_weight, rsqrtf(sum / n + eps), lane, 32, n);
}
