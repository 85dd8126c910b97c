// Attention of many queries a sequence over paged keys and values, with tensor cores by mma.sync
// and copies by cp.async (FlashAttention-2, arXiv 2307.08691; compute capability 8.0 on).
//
// T: type of q and out (__half, __nv_bfloat16); KV: of the pages; HEAD_DIM: a multiple of 16; KEYS:
// of a tile; SOFTCAP: 1 if scores are capped. `ahead`, if not null: so many first sequences and their
// rows are left alone.
#include "mma.cuh"
#include "prefill.cuh"

// Rows of shared memory are 16 bytes longer than their data, so that eight rows' chunks of 16
// bytes, which ldmatrix reads at once, lie in different banks.
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * 16;
constexpr int ROW = HEAD_DIM + 8;         // elements
constexpr int CHUNKS = HEAD_DIM / 8;      // of 16 bytes, of a row of Ts
constexpr bool NARROW = sizeof(KV) == 1;  // the pages are float8: widened in shared memory
constexpr int CACHE_CHUNKS = HEAD_DIM * sizeof(KV) / 16;
// Queries stay in registers if there is room, else in shared memory.
constexpr bool Q_IN_REGISTERS = HEAD_DIM <= 128;

__device__ __forceinline__ void load_matrices(FragmentA& m, const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m.x0), "=r"(m.x1), "=r"(m.x2), "=r"(m.x3)
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(FragmentA& m, const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m.x0), "=r"(m.x1), "=r"(m.x2), "=r"(m.x3)
               : "r"(shared_address(row))
               : "memory");
}

// Shared memory, in this order; prefill.py counts its bytes.
struct Shared {
  T k[KEYS * ROW];  // k and v also take the queries on their way to registers
  T v[KEYS * ROW];
  long long rows[2][KEYS];  // where in the pages a key's row begins, -1: not to be read
};
static_assert(!Q_IN_REGISTERS || ROWS <= 2 * KEYS);

extern "C" __global__ void __launch_bounds__(THREADS)
    prefill_mma(const T* q, const KV* k_pages, const KV* v_pages, const int* query_starts,
                const int* seq_lens, const int* block_table, T* out, const int* ahead,
                const Step step) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  unsigned char* const behind = memory + sizeof(Shared);
  KV* const narrow_k = reinterpret_cast<KV*>(behind);  // if NARROW
  KV* const narrow_v = narrow_k + KEYS * HEAD_DIM;
  T* const q_shared = Q_IN_REGISTERS ? shared.k
                      : NARROW       ? reinterpret_cast<T*>(narrow_v + KEYS * HEAD_DIM)
                                     : reinterpret_cast<T*>(behind);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_previous_kernel();
  const int first_sequence = ahead == nullptr ? 0 : *ahead;
  query_starts += first_sequence;
  seq_lens += first_sequence;
  block_table += static_cast<long long>(first_sequence) * step.table_stride;
  Step own = step;
  own.sequences -= first_sequence;
  // Later tiles of a sequence have more keys, so they start first.
  const Tile tile = find_tile(query_starts, seq_lens, own, gridDim.x - 1 - blockIdx.x);
  if (tile.queries == 0) return;
  const int first_head = blockIdx.y * step.share;
  const int kv_head = first_head / (step.heads / step.kv_heads);
  const int rows = tile.queries * step.share;
  const int* blocks = block_table + static_cast<long long>(tile.sequence) * step.table_stride;

  const auto row_of = [&](int row, long long token_stride) {  // in q or out
    const int query = row / step.share;
    return (tile.first_token + query) * token_stride +
           (first_head + row - query * step.share) * HEAD_DIM;
  };
  const auto place_keys = [&](int first_key, int buffer) {
    if (threadIdx.x < KEYS) {
      const int key = first_key + threadIdx.x;
      long long at = -1;
      if (key >= tile.low && key < tile.high) {
        const int block = key / step.block_size;
        at = ((static_cast<long long>(blocks[block]) * step.kv_heads + kv_head) * step.block_size +
              key - block * step.block_size) *
             HEAD_DIM;
      }
      shared.rows[buffer][threadIdx.x] = at;
    }
  };
  // Start to copy a tile of keys or values, and, once it is there, make Ts of it.
  const auto fetch = [&](const KV* pages, T* to, KV* narrow, int buffer) {
    for (int i = threadIdx.x; i < KEYS * CACHE_CHUNKS; i += THREADS) {
      const int row = i / CACHE_CHUNKS, column = i % CACHE_CHUNKS * (16 / sizeof(KV));
      const long long at = shared.rows[buffer][row];
      const bool valid = at >= 0;
      void* target = NARROW ? static_cast<void*>(narrow + row * HEAD_DIM + column)
                            : static_cast<void*>(to + row * ROW + column);
      copy_async(shared_address(target), pages + (valid ? at : 0) + column, valid);
    }
    commit_copies();
  };
  const auto land = [&](T* to, const KV* narrow) {
    wait_for_copies<0>();
    __syncthreads();
    if constexpr (NARROW) {
      for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * 8;
        unsigned wide[4];
        unpack<T>(*reinterpret_cast<const Pack<KV, 8>*>(narrow + row * HEAD_DIM + column), wide);
        *reinterpret_cast<uint4*>(to + row * ROW + column) =
            make_uint4(wide[0], wide[1], wide[2], wide[3]);
      }
      __syncthreads();
    }
  };
  const int first_tile = tile.low / KEYS;
  int key_tile = (tile.high - 1) / KEYS;  // from the last tile of keys to the first
  const bool any = tile.high > 0;

  // Queries.
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, column = i % CHUNKS * 8;
    const bool valid = row < rows;
    const T* from = q + (valid ? row_of(row, step.q_stride) + column : 0);
    copy_async(shared_address(q_shared + row * ROW + column), from, valid);
  }
  commit_copies();
  if (any) place_keys(key_tile * KEYS, 0);
  wait_for_copies<0>();
  __syncthreads();
  const T* const q_fragment =
      q_shared + (warp * 16 + lane % 16) * ROW + lane / 16 * 8;
  FragmentA q_registers[Q_IN_REGISTERS ? HEAD_DIM / 16 : 1];
  if constexpr (Q_IN_REGISTERS) {
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; d++) load_matrices(q_registers[d], q_fragment + d * 16);
    __syncthreads();
  }

  // A thread has columns 2 * (lane % 4) and the next of each 8 x 8 block, in two rows.
  const int row0 = warp * 16 + lane / 4;
  const int position[2] = {tile.first_position + row0 / step.share,
                           tile.first_position + (row0 + 8) / step.share};
  float accumulator[HEAD_DIM / 8][4] = {};
  float row_max[2] = {-CUDART_INF_F, -CUDART_INF_F};
  float row_sum[2] = {};  // of this thread's columns
  const float exponent = (SOFTCAP ? 1.0f : step.scale) * LOG2E;
  const bool works = any && warp * 16 < rows;

  if (any) fetch(k_pages, shared.k, narrow_k, 0);
  int buffer = 0;
  for (; any && key_tile >= first_tile; key_tile--, buffer ^= 1) {
    const int first_key = key_tile * KEYS;
    land(shared.k, narrow_k);
    fetch(v_pages, shared.v, narrow_v, buffer);
    if (key_tile > first_tile) place_keys(first_key - KEYS, buffer ^ 1);

    float score[KEYS / 8][4] = {};
    if (works) {
      const T* const fragment =
          shared.k + (lane % 8 + lane / 16 * 8) * ROW + lane / 8 % 2 * 8;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 16; d++) {
        FragmentA a;
        if constexpr (Q_IN_REGISTERS) a = q_registers[d];
        else load_matrices(a, q_fragment + d * 16);
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
          FragmentA b;
          load_matrices(b, fragment + n * 16 * ROW + d * 16);
          mma<T>(score[2 * n], a, b.x0, b.x1);
          mma<T>(score[2 * n + 1], a, b.x2, b.x3);
        }
      }
    }
    land(shared.v, narrow_v);  // and all warps are done with k
    if (key_tile > first_tile) fetch(k_pages, shared.k, narrow_k, buffer ^ 1);
    if (!works) continue;

    if constexpr (SOFTCAP) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          score[n][i] = soft_cap(score[n][i] * step.scale, step.softcap);
    }
    const int last_position = tile.first_position + tile.queries - 1;
    if (first_key + KEYS > tile.first_position + 1 || first_key <= last_position - step.window) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int upper = position[i / 2] - first_key;  // the last visible column
        const int column = 2 * (lane % 4) + i % 2;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
          if (n * 8 + column > upper || n * 8 + column <= upper - step.window)
            score[n][i] = -CUDART_INF_F;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = row_max[half];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
        top = fmaxf(top, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float safe = top == -CUDART_INF_F ? 0.0f : top;
      const float correction = exp2_fast((row_max[half] - safe) * exponent);
      row_max[half] = top;
      row_sum[half] *= correction;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; n++) {
        accumulator[n][2 * half] *= correction;
        accumulator[n][2 * half + 1] *= correction;
      }
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
          score[n][i] = exp2_fast(fmaf(score[n][i], exponent, -safe * exponent));
          row_sum[half] += score[n][i];
        }
    }
    const T* const fragment = shared.v + lane % 16 * ROW + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      const FragmentA a = {
          pair<T>(score[2 * k][0], score[2 * k][1]),
          pair<T>(score[2 * k][2], score[2 * k][3]),
          pair<T>(score[2 * k + 1][0], score[2 * k + 1][1]),
          pair<T>(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 16; d++) {
        FragmentA b;
        load_matrices_transposed(b, fragment + k * 16 * ROW + d * 16);
        mma<T>(accumulator[2 * d], a, b.x0, b.x1);
        mma<T>(accumulator[2 * d + 1], a, b.x2, b.x3);
      }
    }
  }
  let_next_kernel_start();

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row0 + 8 * half;
    float sum = row_sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float factor = sum > 0.0f ? step.out_scale / sum : 0.0f;
    if (row < rows) {
      T* const target = out + row_of(row, step.heads * HEAD_DIM) + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; n++)
        *reinterpret_cast<unsigned*>(target + n * 8) = pair<T>(
            accumulator[n][2 * half] * factor, accumulator[n][2 * half + 1] * factor);
    }
  }
}
