// Attention of many queries a sequence over paged keys and values, for Hopper: wgmma, TMA and warp
// specialisation (FlashAttention-3, arXiv 2407.08608).
//
// A block stays on its multiprocessor and takes tiles as they come. Four warps fetch: one finds the
// next tile and copies its queries, all copy its keys and values, page by page, to a ring in shared
// memory; with float8 pages one copies and three make of them what tensor cores take. Each of two
// warpgroups computes 64 of a tile's rows: while the tensor cores multiply, it takes the softmax of
// what they multiplied before.
//
// T: type of q and out, MMA_TYPE its name in PTX; KV: of the pages, T or float8; HEAD_DIM: 64, 128
// or 256; KEYS of a tile: 64 or 128; STAGES of the ring; SOFTCAP: 1 if scores are capped. `ahead`, if
// not null: so many first sequences and their rows are left alone.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "hopper.cuh"
#include "mma.cuh"
#include "prefill.cuh"

constexpr int CONSUMERS = 2;
constexpr int ROWS = 64 * CONSUMERS;
// Shared memory holds matrices as columns of 64 elements, 128 bytes a row, swizzled by TMA.
constexpr int COLUMN = 64;
constexpr int COLUMNS = HEAD_DIM / COLUMN;
constexpr bool NARROW = sizeof(KV) == 1;
constexpr int HELPERS = 3;  // warps that fetch, besides the first
// Of a thread. A block starts with 168 a thread; what the producers give up, the consumers get.
constexpr int PRODUCER_REGISTERS = 56;
constexpr int CONSUMER_REGISTERS = 168 + (168 - PRODUCER_REGISTERS) / CONSUMERS;
static_assert(CONSUMERS == 2 && CONSUMER_REGISTERS % 8 == 0);

// c += a b: a of 64 rows and 16 columns in registers, b of 16 rows and N columns in shared memory.
template <int N>
__device__ __forceinline__ void multiply_add(float* c, const unsigned* a, unsigned long long b) {
  if constexpr (N == 64) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" TYPES "{" LIST32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : FLOATS_32(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" TYPES "{" LIST64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : FLOATS_64(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// --- the kernel --------------------------------------------------------------------------------

using Matrix = T[COLUMNS][KEYS * COLUMN];

// Float8 rows as they lie in the pages, on their way to the ring.
struct Narrow {
  KV rows[NARROW ? KEYS * HEAD_DIM : 16];
  Barrier full, empty;
};

struct Shared {
  T q[COLUMNS][ROWS * COLUMN];
  Matrix k[STAGES], v[STAGES];
  alignas(128) Narrow narrow_k;
  alignas(128) Narrow narrow_v;
  Tile tile;       // what the consumers work on next,
  int first_head;  // and its first head; -1: nothing more
  Barrier tile_full, q_full, q_empty;
  Barrier k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// Where in a ring of stages a warp is.
struct Position {
  int stage = 0, parity = 0;
  template <int LENGTH = STAGES>
  __device__ __forceinline__ void advance() {
    if (++stage == LENGTH) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ int key_tiles(const Tile& tile) {
  return tile.high > 0 ? (tile.high - 1) / KEYS - tile.low / KEYS + 1 : 0;
}

// For each tile of keys, the last first: copy(whether a lane's box of `box_rows` rows of a page is
// needed, where in the pages its rows begin, rows of all needed boxes).
template <typename Copy>
__device__ __forceinline__ void for_pages(const Tile& tile, int first_head, const int* block_table,
                                          int box, int box_rows, const Step& step, Copy copy) {
  const int* blocks = block_table + static_cast<long long>(tile.sequence) * step.table_stride;
  const int kv_head = first_head / (step.heads / step.kv_heads);
  const int shift = __ffs(box_rows) - 1;  // it is a power of two
  const auto is_needed = [&](int key) {
    return box << shift < KEYS && key < tile.high && key + box_rows > tile.low;
  };
  const auto block_of = [&](int key) { return is_needed(key) ? blocks[key / step.block_size] : 0; };
  int first_key = (tile.high - 1) / KEYS * KEYS;
  int block = block_of(first_key + (box << shift));
  for (int count = key_tiles(tile); count > 0; count--, first_key -= KEYS) {
    const int key = first_key + (box << shift);
    const int row = (block * step.kv_heads + kv_head) * step.block_size + key % step.block_size;
    if (count > 1) block = block_of(key - KEYS);  // arrives while copy waits
    const int first_box = max(tile.low - first_key, 0) >> shift;
    const int last_box = (min(tile.high - first_key, KEYS) - 1) >> shift;
    copy(is_needed(key), row, (last_box - first_box + 1) << shift);
  }
}

// One of two warps' part (0 or 1) of copying all keys, or all values, of a tile to the ring.
__device__ __forceinline__ void copy_pages(const TensorMap& map, Matrix* ring, Barrier* full,
                                           Barrier* empty, int part, Position& at,
                                           const Tile& tile, int first_head,
                                           const int* block_table, int box_rows,
                                           const Step& step) {
  const int lane = threadIdx.x % 32;
  const int box = (2 * lane + part) / COLUMNS, column = (2 * lane + part) % COLUMNS;
  for_pages(tile, first_head, block_table, box, box_rows, step,
            [&](bool needed, int row, int rows) {
              wait(empty[at.stage], at.parity ^ 1);
              if (part == 0 && lane == 0)
                arrive_expecting(full[at.stage], rows * HEAD_DIM * int(sizeof(T)));
              if (needed)
                copy_box(&ring[at.stage][column][box * box_rows * COLUMN], map, full[at.stage],
                         column * COLUMN, row);
              at.advance();
            });
}

// The same of float8 pages, keys and values both, by one warp.
__device__ __forceinline__ void copy_narrow(Shared& shared, const TensorMap& k_map,
                                            const TensorMap& v_map, Position& at, const Tile& tile,
                                            int first_head, const int* block_table, int box_rows,
                                            const Step& step) {
  const int box = threadIdx.x % 32;
  for_pages(tile, first_head, block_table, box, box_rows, step,
            [&](bool needed, int row, int rows) {
              const auto copy = [&](const TensorMap& map, Narrow& to) {
                wait(to.empty, at.parity ^ 1);
                if (box == 0) arrive_expecting(to.full, rows * HEAD_DIM);
                if (needed) copy_box(to.rows + box * box_rows * HEAD_DIM, map, to.full, 0, row);
              };
              copy(k_map, shared.narrow_k);
              copy(v_map, shared.narrow_v);
              at.advance<1>();
            });
}

// Make the ring's matrix of float8 rows: all helpers.
__device__ __forceinline__ void widen(Narrow& from, int from_parity, Matrix& to, Barrier& full,
                                      Barrier& empty, int parity) {
  wait(from.full, from_parity);
  wait(empty, parity ^ 1);
  for (int i = threadIdx.x - 32; i < KEYS * HEAD_DIM / 8; i += 32 * HELPERS) {
    unsigned wide[4];
    unpack<T>(reinterpret_cast<const Pack<KV, 8>*>(from.rows)[i], wide);
    const int row = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8);
    reinterpret_cast<uint4*>(to[chunk / 8])[row * 8 + (chunk % 8 ^ row % 8)] =
        make_uint4(wide[0], wide[1], wide[2], wide[3]);
  }
  publish_to_tensor_cores();
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    arrive(full);
    arrive(from.empty);
  }
}

// What the first fetching warp does. `taken`: two counters, zero before and after a launch.
__device__ __forceinline__ void lead(Shared& shared, const TensorMap& q_map,
                                     const TensorMap& k_map, const TensorMap& v_map,
                                     const int* query_starts, const int* seq_lens,
                                     const int* block_table, unsigned* taken, int box_rows,
                                     int sequences, Step step) {
  const int lane = threadIdx.x;
  // A step's empty last sequences, often most of them, would each leave a number without a tile.
  const int end = query_starts[sequences];
  step.sequences = count_while(sequences, [&](int i) { return query_starts[i] < end; });
  const int tiles = step.tokens / step.queries_per_tile + step.sequences + 1;
  const int total = tiles * (step.heads / step.share);
  Position at;
  int q_parity = 0;
  for (int work = blockIdx.x; work < total;) {
    const int first_head = work / tiles * step.share;
    const int number = tiles - 1 - work % tiles;
    if (lane == 0) work = gridDim.x + atomicAdd(&taken[0], 1);
    // Later tiles of a sequence have more keys, so they start first.
    const Tile tile = find_tile(query_starts, seq_lens, step, number);
    work = __shfl_sync(~0u, work, 0);
    if (tile.queries == 0) continue;

    wait(shared.q_empty, q_parity ^ 1);
    q_parity ^= 1;
    if (lane == 0) {
      shared.tile = tile;
      shared.first_head = first_head;
      arrive(shared.tile_full);
      if (tile.high > 0) {
        arrive_expecting(shared.q_full,
                         HEAD_DIM * sizeof(T) * step.share * step.queries_per_tile);
        for (int c = 0; c < COLUMNS; c++)
          copy_box(shared.q[c], q_map, shared.q_full, c * COLUMN, first_head, tile.first_token);
      } else {
        arrive(shared.q_full);
      }
    }
    __syncwarp();
    if constexpr (NARROW)
      copy_narrow(shared, k_map, v_map, at, tile, first_head, block_table, box_rows, step);
    else
      copy_pages(k_map, shared.k, shared.k_full, shared.k_empty, 0, at, tile, first_head,
                 block_table, box_rows, step);
  }
  let_next_kernel_start();
  wait(shared.q_empty, q_parity ^ 1);
  if (lane == 0) {
    shared.first_head = -1;
    arrive(shared.tile_full);
    arrive(shared.q_full);
    if (atomicAdd(&taken[1], 1) == gridDim.x - 1) {  // the last block: all have taken their last
      taken[0] = 0;
      taken[1] = 0;
    }
  }
}

// What the other fetching warps do.
__device__ __forceinline__ void help(Shared& shared, const TensorMap& k_map,
                                     const TensorMap& v_map, const int* block_table, int box_rows,
                                     const Step& step) {
  const int warp = threadIdx.x / 32;
  Position at, narrow_at;
  for (int parity = 0;; parity ^= 1) {
    wait(shared.tile_full, parity);
    const Tile tile = shared.tile;
    const int first_head = shared.first_head;
    __syncwarp();
    if (first_head < 0) return;
    if (threadIdx.x % 32 == 0) arrive(shared.q_empty);
    if constexpr (NARROW) {
      for (int i = key_tiles(tile); i > 0; i--) {
        const int stage = at.stage;
        widen(shared.narrow_k, narrow_at.parity, shared.k[stage], shared.k_full[stage],
              shared.k_empty[stage], at.parity);
        widen(shared.narrow_v, narrow_at.parity, shared.v[stage], shared.v_full[stage],
              shared.v_empty[stage], at.parity);
        narrow_at.advance<1>();
        at.advance();
      }
    } else if (warp == 1) {
      copy_pages(k_map, shared.k, shared.k_full, shared.k_empty, 1, at, tile, first_head,
                 block_table, box_rows, step);
    } else {
      copy_pages(v_map, shared.v, shared.v_full, shared.v_empty, warp - 2, at, tile, first_head,
                 block_table, box_rows, step);
    }
  }
}

// What a consuming warpgroup does.
__device__ __forceinline__ void consume(Shared& shared, T* out, int warpgroup, const Step& step) {
  const int thread = threadIdx.x % WARPGROUP, warp = thread / 32, lane = thread % 32;
  // A thread has columns 2 * (lane % 4) and the next of each 8 columns, in two rows.
  const int row0 = warpgroup * 64 + warp * 16 + lane / 4;
  const int query0 = row0 / step.share, query1 = (row0 + 8) / step.share;
  const int head0 = row0 - query0 * step.share, head1 = row0 + 8 - query1 * step.share;
  const float exponent = (SOFTCAP ? 1.0f : step.scale) * LOG2E;
  const auto release = [&](Barrier& empty) {
    if (lane == 0) arrive(empty);
  };
  Position k_at, v_at;
  for (int q_parity = 0;; q_parity ^= 1) {
    wait(shared.q_full, q_parity);
    const Tile tile = shared.tile;
    const int first_head = shared.first_head;
    if (first_head < 0) return;
    const int rows = tile.queries * step.share;
    const int low_tile = tile.low / KEYS;
    int key_tile = (tile.high - 1) / KEYS;
    const int count = key_tiles(tile);
    const int upper0 = tile.first_position + query0, upper1 = tile.first_position + query1;

    float accumulator[HEAD_DIM / 2];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) accumulator[i] = 0.0f;
    float max0 = -CUDART_INF_F, max1 = -CUDART_INF_F;
    float sum0 = 0.0f, sum1 = 0.0f;  // of this thread's columns

    if (count == 0) {
      __syncwarp();
      release(shared.q_empty);
    } else if (warpgroup * 64 >= rows) {  // no rows: only keep the ring turning
      for (int i = 0; i < count; i++) {
        wait(shared.k_full[k_at.stage], k_at.parity);
        release(shared.k_empty[k_at.stage]);
        wait(shared.v_full[k_at.stage], k_at.parity);
        release(shared.v_empty[k_at.stage]);
        k_at.advance();
      }
      v_at = k_at;
      __syncwarp();
      release(shared.q_empty);
    } else {
      float score[KEYS / 2];
      unsigned weight[KEYS / 4];  // of the keys, as elements
      const unsigned q_address = shared_address(shared.q[0]) + warpgroup * 64 * COLUMN * sizeof(T);

      const auto await_keys = [&] { wait(shared.k_full[k_at.stage], k_at.parity); };
      const auto begin_scores = [&] {
        const unsigned long long a = descriptor(q_address, 0);
        const unsigned long long b = descriptor(shared_address(shared.k[k_at.stage]), 0);
        begin_products();
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; d++) {
          const int in_column = d % 4 * 16 * int(sizeof(T));
          const int column = d / 4 * COLUMN * int(sizeof(T));
          multiply_rows<KEYS>(score, a + ((column * ROWS + in_column) >> 4),
                              b + ((column * KEYS + in_column) >> 4), d > 0);
        }
        commit_products();
      };
      const auto begin_mix = [&](int first_key) {
        wait(shared.v_full[v_at.stage], v_at.parity);
        // Zero weights must not meet what is no value, or another sequence's. Both warpgroups write
        // these zeros, each before its own products: to share the work they would have to meet,
        // which costs up to 4 % (NOTES.md).
        if (first_key < tile.low || first_key + KEYS > tile.high) {
          for (int i = thread; i < KEYS * COLUMNS * 8; i += WARPGROUP) {
            const int key = i / 8 % KEYS;
            if (first_key + key < tile.low || first_key + key >= tile.high)
              reinterpret_cast<uint4*>(shared.v[v_at.stage])[i] = make_uint4(0, 0, 0, 0);
          }
          publish_to_tensor_cores();
          synchronize_warpgroup(warpgroup);
        }
        const unsigned long long b =
            descriptor(shared_address(shared.v[v_at.stage]), KEYS * COLUMN * sizeof(T));
        constexpr int WIDTH = HEAD_DIM < 128 ? HEAD_DIM : 128;
        begin_products();
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
          for (int d = 0; d < HEAD_DIM / WIDTH; d++)
            multiply_add<WIDTH>(accumulator + d * WIDTH / 2, weight + k * 4,
                                b + ((k * 16 + d * 2 * KEYS) * COLUMN * int(sizeof(T)) >> 4));
        commit_products();
      };
      // Scores to weights (in place), with the maxima and sums so far; gives the factors by which
      // what was summed before is to be multiplied.
      const auto soften = [&](int first_key, float& factor0, float& factor1) {
        if constexpr (SOFTCAP) {
#pragma unroll
          for (int i = 0; i < KEYS / 2; i++)
            score[i] = soft_cap(score[i] * step.scale, step.softcap);
        }
        if (first_key + KEYS > tile.first_position + 1 ||
            first_key <= tile.first_position + tile.queries - 1 - step.window) {
          const int last0 = upper0 - first_key - 2 * (lane % 4);
          const int last1 = upper1 - first_key - 2 * (lane % 4);
#pragma unroll
          for (int i = 0; i < KEYS / 2; i++) {
            const int column = i / 4 * 8 + i % 2, last = i & 2 ? last1 : last0;
            if (column > last || column <= last - step.window) score[i] = -CUDART_INF_F;
          }
        }
        float top0 = max0, top1 = max1;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i += 4) {
          top0 = fmaxf(top0, fmaxf(score[i], score[i + 1]));
          top1 = fmaxf(top1, fmaxf(score[i + 2], score[i + 3]));
        }
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
          top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, distance));
          top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, distance));
        }
        const float base0 = top0 == -CUDART_INF_F ? 0.0f : top0 * exponent;
        const float base1 = top1 == -CUDART_INF_F ? 0.0f : top1 * exponent;
        factor0 = exp2_fast(fmaf(max0, exponent, -base0));
        factor1 = exp2_fast(fmaf(max1, exponent, -base1));
        max0 = top0;
        max1 = top1;
        sum0 *= factor0;
        sum1 *= factor1;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i += 4) {
          score[i] = exp2_fast(fmaf(score[i], exponent, -base0));
          score[i + 1] = exp2_fast(fmaf(score[i + 1], exponent, -base0));
          score[i + 2] = exp2_fast(fmaf(score[i + 2], exponent, -base1));
          score[i + 3] = exp2_fast(fmaf(score[i + 3], exponent, -base1));
          sum0 += score[i] + score[i + 1];
          sum1 += score[i + 2] + score[i + 3];
        }
      };
      // A thread's scores of 16 keys lie as a product's left operand wants them.
      const auto round_weights = [&] {
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) weight[i] = pair<T>(score[2 * i], score[2 * i + 1]);
      };

      float factor0, factor1;
      await_keys();
      begin_scores();
      wait_for_products<0>();
      hold(score);
      release(shared.k_empty[k_at.stage]);
      k_at.advance();
      soften(key_tile * KEYS, factor0, factor1);
      round_weights();
      if (key_tile > low_tile) await_keys();
      for (; key_tile > low_tile; key_tile--) {
        hold(score);
          begin_scores();
        hold(weight);
        hold(accumulator);
        begin_mix(key_tile * KEYS);
          wait_for_products<1>();
        hold(score);
        release(shared.k_empty[k_at.stage]);
        k_at.advance();
        soften((key_tile - 1) * KEYS, factor0, factor1);
        hold(score);
        // The wait for keys stands here, not at the top, since ptxas moves the softmax behind the
        // wait for products unless there is a branch between them.
        if (key_tile - 1 > low_tile) await_keys();
        wait_for_products<0>();
        hold(accumulator);
        hold(weight);
        release(shared.v_empty[v_at.stage]);
        v_at.advance();
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) accumulator[i] *= i & 2 ? factor1 : factor0;
        round_weights();
      }
      __syncwarp();
      release(shared.q_empty);
      hold(weight);
      hold(accumulator);
      begin_mix(key_tile * KEYS);
      wait_for_products<0>();
      hold(accumulator);
      release(shared.v_empty[v_at.stage]);
      v_at.advance();
    }

#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      sum0 += __shfl_xor_sync(~0u, sum0, distance);
      sum1 += __shfl_xor_sync(~0u, sum1, distance);
    }
    const auto store = [&](int query, int head, float sum, int part) {
      if (query >= tile.queries) return;
      const float factor = sum > 0.0f ? step.out_scale / sum : 0.0f;
      T* const to =
          out +
          (static_cast<long long>(tile.first_token + query) * step.heads + first_head + head) *
              HEAD_DIM +
          2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; n++)
        *reinterpret_cast<unsigned*>(to + n * 8) =
            pair<T>(accumulator[4 * n + part] * factor, accumulator[4 * n + part + 1] * factor);
    };
    store(query0, head0, sum0, 0);
    store(query1, head1, sum1, 2);
  }
}

extern "C" __global__ void __launch_bounds__(WARPGROUP * (CONSUMERS + 1), 1)
    prefill_wgmma(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map, const int* query_starts,
                  const int* seq_lens, const int* block_table, T* out, const int* ahead,
                  unsigned* taken, int box_rows, const __grid_constant__ Step step) {
  extern __shared__ unsigned char memory[];
  // TMA's swizzle repeats every 1024 bytes.
  Shared& shared = *reinterpret_cast<Shared*>(
      memory + (1024 - shared_address(memory) % 1024) % 1024);
  if (threadIdx.x == 0) {
    constexpr int WARPS = 4 * CONSUMERS, FILLERS = NARROW ? HELPERS : 1;
    initialize(shared.tile_full, 1);
    initialize(shared.q_full, 1);
    initialize(shared.q_empty, WARPS + HELPERS);
    initialize(shared.narrow_k.full, 1);
    initialize(shared.narrow_k.empty, HELPERS);
    initialize(shared.narrow_v.full, 1);
    initialize(shared.narrow_v.empty, HELPERS);
    for (int i = 0; i < STAGES; i++) {
      initialize(shared.k_full[i], FILLERS);
      initialize(shared.k_empty[i], WARPS);
      initialize(shared.v_full[i], FILLERS);
      initialize(shared.v_empty[i], WARPS);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_previous_kernel();
  const int first_sequence = ahead == nullptr ? 0 : *ahead;
  query_starts += first_sequence;
  seq_lens += first_sequence;
  block_table += static_cast<long long>(first_sequence) * step.table_stride;
  const int warpgroup = threadIdx.x / WARPGROUP;
  if (warpgroup == 0) {
    keep_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32)
      lead(shared, q_map, k_map, v_map, query_starts, seq_lens, block_table, taken, box_rows,
           step.sequences - first_sequence, step);
    else
      help(shared, k_map, v_map, block_table, box_rows, step);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(shared, out, warpgroup - 1, step);
  }
}
#endif
