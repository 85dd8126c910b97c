// Attention over paged keys and values, plainly: any dtype, any head size, any number of queries a
// sequence. For float32, where exactness matters more than speed, and for what no faster kernel
// takes. A warp takes one head of one query; its lanes take a key each for scores, a dim each for
// values (online softmax, arXiv 1805.02867).
//
// DTYPE: type of q and out; KV_DTYPE: of the pages; HEAD_DIM; BLOCK_SIZE; WARPS of a block; SOFTCAP: 0 or 1.
#include "common.cuh"

using T = DTYPE;
using KV = KV_DTYPE;

constexpr int DIMS = (HEAD_DIM + 31) / 32;  // of each lane
constexpr float NONE = -3e38f;  // a score below all

// The last sequence that begins at `row` or before: its queries are not used up by then.
__device__ int sequence_of(const int* query_starts, int sequences, int row) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (query_starts[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}

// Grid: heads, rows by WARPS. Arguments as decode_attention's; scale multiplies q.k, cap is 0 or
// positive.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    simple_attention(const T* q, const KV* k_pages, const KV* v_pages, const int* query_starts,
                     const int* seq_lens, const int* block_table, T* out, int rows, int sequences,
                     int q_stride, int kv_heads, int table_width, int window, float scale,
                     float cap, float value_scale) {
  __shared__ float queries[WARPS][HEAD_DIM];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = blockIdx.y * WARPS + warp;
  const int heads = gridDim.x, head = blockIdx.x;
  if (row >= rows) return;
  T* own_out = out + (static_cast<long long>(row) * heads + head) * HEAD_DIM;
  const int sequence = sequence_of(query_starts, sequences, row);
  const int begin = query_starts[sequence], end = query_starts[sequence + 1];
  const int position = seq_lens[sequence] - end + row;
  if (row < begin || row >= end || position < 0) {
    for (int d = lane; d < HEAD_DIM; d += 32) own_out[d] = from_float<T>(0.0f);
    return;
  }
  const T* own_q = q + static_cast<long long>(row) * q_stride + head * HEAD_DIM;
  for (int d = lane; d < HEAD_DIM; d += 32) queries[warp][d] = to_float(own_q[d]);
  __syncwarp();

  const int* blocks = block_table + static_cast<long long>(sequence) * table_width;
  const int kv_head = head / (heads / kv_heads);
  const auto offset_of = [&](int at) {
    const long long block = blocks[at / BLOCK_SIZE];
    return ((block * kv_heads + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE) * HEAD_DIM;
  };
  float peak = NONE, sum = 0.0f, total[DIMS] = {};
  for (int first = window > 0 ? max(0, position - window + 1) : 0; first <= position; first += 32) {
    const int own = first + lane;
    long long offset = 0;
    float score = NONE;
    if (own <= position) {
      offset = offset_of(own);
      score = 0.0f;
      for (int d = 0; d < HEAD_DIM; d++) score += queries[warp][d] * to_float(k_pages[offset + d]);
      score *= scale;
#if SOFTCAP
      score = cap * tanhf(score / cap);
#endif
    }
    float highest = score;
#pragma unroll
    for (int reach = 16; reach > 0; reach /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, reach));
    highest = fmaxf(highest, peak);
    const float factor = expf(peak - highest);
    peak = highest;
    const float weight = own <= position ? expf(score - peak) : 0.0f;
    sum = sum * factor + weight;
#pragma unroll
    for (int j = 0; j < DIMS; j++) total[j] *= factor;
    for (int i = 0; i < min(32, position - first + 1); i++) {
      const float other = __shfl_sync(0xffffffff, weight, i);
      const long long from = __shfl_sync(0xffffffff, offset, i);
#pragma unroll
      for (int j = 0; j < DIMS; j++) {
        const int d = lane + 32 * j;
        if (d < HEAD_DIM) total[j] += other * to_float(v_pages[from + d]);
      }
    }
  }
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) sum += __shfl_xor_sync(0xffffffff, sum, reach);
#pragma unroll
  for (int j = 0; j < DIMS; j++) {
    const int d = lane + 32 * j;
    if (d < HEAD_DIM) own_out[d] = from_float<T>(total[j] * value_scale / sum);
  }
}
