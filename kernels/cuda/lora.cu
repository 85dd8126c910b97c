// Low-rank additions by each row's own adapter (Punica, arXiv 2310.18547). See kernels/lora.py.
//
// ELEMENT: type of rows, matrices and result; VEC: elements of a row that a thread moves at once;
// ROWS: rows of one block; RANKS: ranks of one block of `shrink`; OUTS: outputs of one thread of
// `expand`; THREADS: of a block.
//
// Rows that follow each other mostly have one adapter in a prefill, whose matrices a block then
// reads once for ROWS of them; where they differ it takes them one by one.
#include "common.cuh"

using E = ELEMENT;

constexpr int CHUNK = 8;  // ranks that `expand` takes at a time; stacked ranks are a multiple
constexpr int WARPS = THREADS / 32;

// inner[i][r] = x[i] . a[r] for N rows and RANKS ranks, by the whole block.
template <int N>
__device__ __forceinline__ void products(const E* x, long long x_stride, const E* a, float* inner,
                                         int width, int in, float (&parts)[WARPS][ROWS * RANKS]) {
  float sums[N][RANKS] = {};
#pragma unroll(N == 1 ? 4 : 1)
  for (int k = threadIdx.x * VEC; k < in; k += THREADS * VEC) {
    Pack<E, VEC> left[N];
#pragma unroll
    for (int i = 0; i < N; i++)
      left[i] = *reinterpret_cast<const Pack<E, VEC>*>(x + i * x_stride + k);
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
      const auto right =
          *reinterpret_cast<const Pack<E, VEC>*>(a + static_cast<long long>(r) * in + k);
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < VEC; j++) sums[i][r] += to_float(left[i].at[j]) * to_float(right.at[j]);
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
      float sum = sums[i][r];
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
      if (lane == 0) parts[warp][i * RANKS + r] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < N * RANKS) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[w][threadIdx.x];
    const int row = threadIdx.x / RANKS;
    inner[static_cast<long long>(row) * width + threadIdx.x % RANKS] = sum;
  }
  __syncthreads();  // the scratch is free again
}

// A block for each ROWS rows and RANKS ranks of a module.
extern "C" __global__ void __launch_bounds__(THREADS)
    shrink(const E* x, const E* a, const int* ranks, const int* slots, float* inner, int rows,
           int in, int modules, int most, long long x_stride, long long a_stride,
           long long ranks_stride) {
  __shared__ float parts[WARPS][ROWS * RANKS];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int width = modules * most;
  const int first = blockIdx.x * ROWS, column = blockIdx.y * RANKS;
  const int module = column / most;
  const int count = min(ROWS, rows - first);

  // Whole chunks, as `expand` reads them; beyond the adapter's rank A is zero.
  auto has = [&](int slot) {
    return slot >= 0 && column % most / CHUNK * CHUNK < ranks[slot * ranks_stride + module];
  };
  auto matrix = [&](int slot) {
    return a + slot * a_stride + static_cast<long long>(column) * in;
  };
  const E* source = x + first * x_stride;
  float* target = inner + static_cast<long long>(first) * width + column;

  const int slot = slots[first];
  bool same = count == ROWS;
  for (int i = 1; i < count; i++) same = same && slots[first + i] == slot;
  if (same) {
    if (has(slot)) products<ROWS>(source, x_stride, matrix(slot), target, width, in, parts);
    return;
  }
  for (int i = 0; i < count; i++) {
    const int own = slots[first + i];
    if (has(own))
      products<1>(source + i * x_stride, x_stride, matrix(own),
                  target + static_cast<long long>(i) * width, width, in, parts);
  }
}

// A thread for each ROWS rows and OUTS outputs, which are one module's.
extern "C" __global__ void __launch_bounds__(THREADS)
    expand(E* y, const float* inner, const E* b, const int* ranks, const int* slots,
           const int* starts, int rows, int outs, int modules, int most, long long y_stride,
           long long b_stride, long long ranks_stride) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int first = blockIdx.y * ROWS, out = (blockIdx.x * THREADS + threadIdx.x) * OUTS;
  if (out >= outs) return;
  int module = 0;
  while (out >= starts[module + 1]) module++;

  int slot[ROWS], rank[ROWS], highest = 0;
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    slot[i] = first + i < rows ? slots[first + i] : -1;
    rank[i] = slot[i] < 0 ? 0 : ranks[slot[i] * ranks_stride + module];
    highest = max(highest, rank[i]);
  }
  float sums[ROWS][OUTS] = {};
  const int width = modules * most;
  inner += static_cast<long long>(first) * width + module * most;
  b += static_cast<long long>(out) * most;
  for (int r = 0; r < highest; r += CHUNK) {
    float factors[OUTS][CHUNK] = {};
    int held = -1;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      if (r >= rank[i]) continue;
      if (slot[i] != held) {
        held = slot[i];
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
          const auto pack = *reinterpret_cast<const Pack<E, CHUNK>*>(b + held * b_stride +
                                                                     o * most + r);
#pragma unroll
          for (int j = 0; j < CHUNK; j++) factors[o][j] = to_float(pack.at[j]);
        }
      }
      const auto own = *reinterpret_cast<const Pack<float, CHUNK>*>(
          inner + static_cast<long long>(i) * width + r);
#pragma unroll
      for (int o = 0; o < OUTS; o++)
#pragma unroll
        for (int j = 0; j < CHUNK; j++) sums[i][o] += own.at[j] * factors[o][j];
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    if (rank[i] == 0) continue;
    auto* place = reinterpret_cast<Pack<E, OUTS>*>(y + (first + i) * y_stride + out);
    Pack<E, OUTS> values = *place;
#pragma unroll
    for (int o = 0; o < OUTS; o++)
      values.at[o] = from_float<E>(to_float(values.at[o]) + sums[i][o]);
    *place = values;
  }
}
