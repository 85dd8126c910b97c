// Attention of one query a sequence over paged keys and values, split over the KV length
// (Flash-Decoding; online softmax of Milakov & Gimelshein, arXiv 1805.02867).
//
// A block takes the query heads of one KV head (eight at most), of one sequence, over one range of
// its positions; each of its warps takes tiles of 16 positions (32 of an 8-bit cache) in turn. Scores are S^T = K Q^T and
// outputs O^T = V^T P^T, so that positions and dims fill the tensor cores' 16 rows and the few
// heads their 8 columns. Keys and values go from memory straight into the registers the tensor
// cores read: a sum over dims may run in any order, and so may the order of O's rows, so each
// thread takes 16 consecutive bytes of a row; only pairs of V's rows have to be interleaved.
//
// DTYPE: type of q and out (__half, __nv_bfloat16); KV_DTYPE: of the pages; HEAD_DIM: a multiple of 8;
// GROUP: query heads a KV head; BLOCK_SIZE; WARPS; MIN_BLOCKS: blocks a multiprocessor should hold;
// SPLIT_TILES: fewest tiles worth a block of their own; SOFTCAP: 1 if scores are capped; ROPE: 1 to
// rotate q and the newest key and append key and value first, which takes a HEAD_DIM divisible by 64
// that rotates whole; NORM: 1 to RMS-normalise q's and that key's heads before.
#include "common.cuh"
#include "mma.cuh"

using T = DTYPE;
using KV = KV_DTYPE;

constexpr int SUB = 16;  // positions that fill the tensor cores' rows
constexpr int SUBS = 2 / sizeof(KV);  // of a tile: the same bytes in flight for any cache
constexpr int TILE = SUB * SUBS;
constexpr int HEADS = GROUP < 8 ? GROUP : 8;  // of this block
constexpr int HEAD_TILES = (GROUP + 7) / 8;
constexpr int K_CHUNKS = (HEAD_DIM + 31) / 32;  // 4 threads x 8 dims
constexpr int V_CHUNKS = (HEAD_DIM + 63) / 64;  // 8 threads x 8 dims
constexpr bool SUB_IN_BLOCK = BLOCK_SIZE % SUB == 0;
constexpr float NONE = -3e38f;  // a score below all

// 8 dims as they lie in memory. Words: a struct of bytes would take a register each.
struct alignas(8 * sizeof(KV)) Raw {
  unsigned words[2 * sizeof(KV)];
};

struct Range {
  int low, high;  // positions that the query sees
};

// One KV head's pages as one sequence's tiles.
struct Pages {
  const KV* keys;
  const KV* values;
  const int* blocks;  // the sequence's row of the block table
  long long block_stride;

  // Where the row of a position that begins a SUB lies; `block` is its id.
  __device__ long long sub_offset(int position, int block) const {
    return block * block_stride + static_cast<long long>(position % BLOCK_SIZE) * HEAD_DIM;
  }
  // Where any position's row lies.
  __device__ long long row_offset(int position) const {
    return blocks[position / BLOCK_SIZE] * block_stride +
           static_cast<long long>(position % BLOCK_SIZE) * HEAD_DIM;
  }
};

__device__ __forceinline__ Raw load_raw(const KV* from) {
  Raw raw;
  if constexpr (sizeof(Raw) == 16) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.words[0]), "=r"(raw.words[1]), "=r"(raw.words[2]), "=r"(raw.words[3])
                 : "l"(from));
  } else {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(raw.words[0]), "=r"(raw.words[1])
                 : "l"(from));
  }
  return raw;
}

// A tile's rows, a thread's 8 dims of each chunk of WIDTH dims; offsets are of each SUB's first row.
// Positions outside the range, and dims past the head's end, are zeros and not read.
template <int ROWS, int CHUNKS, int WIDTH>
__device__ __forceinline__ void load_rows(Raw (&to)[SUBS][ROWS][CHUNKS], const KV* base,
                                          const Pages& pages, const long long (&offsets)[SUBS],
                                          int tile, const int (&rows)[ROWS], int dim,
                                          const Range& range) {
  const int start = tile * TILE;
  const bool whole = start >= range.low && start + TILE <= range.high;
  if (whole && SUB_IN_BLOCK && HEAD_DIM % WIDTH == 0) {
#pragma unroll
    for (int u = 0; u < SUBS; u++)
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
          to[u][r][c] = load_raw(base + offsets[u] + rows[r] * HEAD_DIM + c * WIDTH + dim);
    return;
  }
#pragma unroll
  for (int u = 0; u < SUBS; u++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int position = start + u * SUB + rows[r];
      const bool seen = position >= range.low && position < range.high;
      const long long offset = SUB_IN_BLOCK ? offsets[u] + rows[r] * HEAD_DIM
                               : seen       ? pages.row_offset(position)
                                            : 0;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        const int column = c * WIDTH + dim;
        to[u][r][c] = seen && column < HEAD_DIM ? load_raw(base + offset + column) : Raw{};
      }
    }
}

#if ROPE
static_assert(HEAD_DIM % 64 == 0, "a thread holds both dims of a pair");

// A head's dims as the tensor cores' operands lie: 8 of each chunk of 32, those of lane % 4.
struct Row {
  float at[K_CHUNKS][8];

  __device__ __forceinline__ void load(const T* from, int dim) {
#pragma unroll
    for (int c = 0; c < K_CHUNKS; c++) {
      const auto values = *reinterpret_cast<const Pack<T, 8>*>(from + c * 32 + dim);
#pragma unroll
      for (int j = 0; j < 8; j++) at[c][j] = to_float(values.at[j]);
    }
  }

  __device__ __forceinline__ void normalise(const T* weight, int dim, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < K_CHUNKS; c++)
#pragma unroll
      for (int j = 0; j < 8; j++) squares += at[c][j] * at[c][j];
    squares += __shfl_xor_sync(0xffffffff, squares, 1);
    squares += __shfl_xor_sync(0xffffffff, squares, 2);
    const float factor = rsqrtf(squares / HEAD_DIM + eps);
#pragma unroll
    for (int c = 0; c < K_CHUNKS; c++) {
      const auto w = *reinterpret_cast<const Pack<T, 8>*>(weight + c * 32 + dim);
#pragma unroll
      for (int j = 0; j < 8; j++) at[c][j] *= factor * to_float(w.at[j]);
    }
  }

  __device__ __forceinline__ void rotate(const float* cosines, int dim) {
    constexpr int HALF = K_CHUNKS / 2;
#pragma unroll
    for (int c = 0; c < HALF; c++) {
      const auto cos = *reinterpret_cast<const Pack<float, 8>*>(cosines + c * 32 + dim);
      const auto sin =
          *reinterpret_cast<const Pack<float, 8>*>(cosines + HEAD_DIM / 2 + c * 32 + dim);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float first = at[c][j], second = at[c + HALF][j];
        at[c][j] = first * cos.at[j] - second * sin.at[j];
        at[c + HALF][j] = second * cos.at[j] + first * sin.at[j];
      }
    }
  }
};

template <typename U>
__device__ __forceinline__ void pack(const float (&x)[8], float factor,
                                     unsigned (&words)[2 * sizeof(U)]) {
  Pack<U, 8> result;
#pragma unroll
  for (int j = 0; j < 8; j++) result.at[j] = from_float<U>(x[j] * factor);
#pragma unroll
  for (int i = 0; i < 2 * sizeof(U); i++) words[i] = reinterpret_cast<unsigned*>(&result)[i];
}
#endif

// A warp's running softmax and output: heads 2 * (lane % 4) and the next, dims by lane / 4.
struct State {
  float peak[2] = {NONE, NONE};  // of the scores so far, in powers of two
  float sum[2] = {0.0f, 0.0f};   // this thread's share
  float out[V_CHUNKS][4][4] = {};
};

__device__ __forceinline__ float capped(float score, float scale, float cap) {
#if SOFTCAP
  return cap * tanhf(score * scale);
#else
  return score * scale;
#endif
}

// Enter a tile's scores into the running softmax; `weights` become its keys' weights.
__device__ __forceinline__ void attend_tile(State& state, const unsigned (&q)[K_CHUNKS][4],
                                            const Raw (&k)[SUBS][2][K_CHUNKS], int tile, int lane,
                                            const Range& range, float scale, float cap,
                                            unsigned (&weights)[SUBS][2]) {
  float score[SUBS][4];
  float peak[2] = {NONE, NONE};
#pragma unroll
  for (int u = 0; u < SUBS; u++) {
    float part[2][4] = {};  // two chains of products finish sooner than one
#pragma unroll
    for (int c = 0; c < K_CHUNKS; c++) {
      unsigned upper[4], lower[4];
      unpack<T>(k[u][0][c].words, upper);
      unpack<T>(k[u][1][c].words, lower);
      mma<T>(part[0], {upper[0], lower[0], upper[1], lower[1]}, q[c][0], q[c][1]);
      mma<T>(part[1], {upper[2], lower[2], upper[3], lower[3]}, q[c][2], q[c][3]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) score[u][i] = capped(part[0][i] + part[1][i], scale, cap);
    const int start = tile * TILE + u * SUB;
    if (start < range.low || start + SUB > range.high) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int position = start + lane / 4 + (i / 2) * 8;
        if (position < range.low || position >= range.high) score[u][i] = NONE;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) peak[i % 2] = fmaxf(peak[i % 2], score[u][i]);
  }
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    peak[0] = fmaxf(peak[0], __shfl_xor_sync(0xffffffff, peak[0], offset));
    peak[1] = fmaxf(peak[1], __shfl_xor_sync(0xffffffff, peak[1], offset));
  }
  const bool higher = peak[0] > state.peak[0] || peak[1] > state.peak[1];
  if (__any_sync(0xffffffff, higher)) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      peak[i] = fmaxf(peak[i], state.peak[i]);
      factor[i] = exp2f(state.peak[i] - peak[i]);
      state.peak[i] = peak[i];
      state.sum[i] *= factor[i];
    }
#pragma unroll
    for (int v = 0; v < V_CHUNKS; v++)
#pragma unroll
      for (int t = 0; t < 4; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) state.out[v][t][i] *= factor[i % 2];
  }
#pragma unroll
  for (int u = 0; u < SUBS; u++) {
    float weight[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      weight[i] = exp2f(score[u][i] - state.peak[i % 2]);
      state.sum[i % 2] += weight[i];
    }
    weights[u][0] = transpose(pair<T>(weight[0], weight[1]));
    weights[u][1] = transpose(pair<T>(weight[2], weight[3]));
  }
}

__device__ __forceinline__ void add_values(State& state, const Raw (&v)[SUBS][4][V_CHUNKS],
                                           const unsigned (&weights)[SUBS][2]) {
#pragma unroll
  for (int u = 0; u < SUBS; u++)
#pragma unroll
    for (int c = 0; c < V_CHUNKS; c++) {
      unsigned row[4][4];
#pragma unroll
      for (int r = 0; r < 4; r++) unpack<T>(v[u][r][c].words, row[r]);
#pragma unroll
      for (int t = 0; t < 4; t++) {
        mma<T>(state.out[c][t],
               {__byte_perm(row[0][t], row[1][t], 0x5410),
                __byte_perm(row[0][t], row[1][t], 0x7632),
                __byte_perm(row[2][t], row[3][t], 0x5410),
                __byte_perm(row[2][t], row[3][t], 0x7632)},
               weights[u][0], weights[u][1]);
      }
    }
}

// The factor by which a part with peak `peak` enters a sum with peak `all`.
__device__ __forceinline__ float share(float peak, float all) {
  return peak == NONE ? 0.0f : exp2f(peak - all);
}

__device__ __forceinline__ void store_out(T* to, float4 x, float factor) {
  Pack<T, 4> result;
  result.at[0] = from_float<T>(x.x * factor);
  result.at[1] = from_float<T>(x.y * factor);
  result.at[2] = from_float<T>(x.z * factor);
  result.at[3] = from_float<T>(x.w * factor);
  *reinterpret_cast<Pack<T, 4>*>(to) = result;
}

// Grid: kv_heads * HEAD_TILES, the most splits of a sequence, sequences. Rows of q (and of new_k,
// new_v) are `*_stride` elements apart. scale: of a score, in powers of two unless capped; window:
// 0 for none; value_scale: what the pages' values are multiplied by. partials: float [sequences,
// kv_heads * HEAD_TILES, splits, HEADS, HEAD_DIM], then their peak and sum [.., HEADS, 2]; arrivals
// [sequences * kv_heads * HEAD_TILES], zeros before and after. From new_k to eps, for ROPE alone.
// count, if not null: so many of the sequences, the first, are there; others' rows are left alone.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    decode_attention(const T* q, KV* k_pages, KV* v_pages, const int* seq_lens,
                     const int* block_table, T* out, float* partials, unsigned* arrivals,
                     int q_stride, int kv_heads, int table_width, int window, float scale,
                     float cap, float value_scale, const T* new_k, const T* new_v,
                     const float* cosines, const int* positions, const long long* slots,
                     const T* q_weight, const T* k_weight, int k_stride, int v_stride, float eps,
                     const int* count) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int kv_head = blockIdx.x / HEAD_TILES;
  const int first_head = blockIdx.x % HEAD_TILES * 8;  // within the group
  const int sequence = blockIdx.z;
  const int heads = kv_heads * GROUP;
  const int own_heads = min(HEADS, GROUP - first_head);

  // Metadata comes from the host, ahead of the kernel before this one.
  const bool absent = count != nullptr && sequence >= *count;
  const int length = absent ? 0 : seq_lens[sequence];
  const Range range = {window > 0 ? max(0, length - window) : 0, length};
  const int lowest = range.low / TILE;
  const int tiles = (length + TILE - 1) / TILE - lowest;
  int splits = max(1, min(static_cast<int>(gridDim.y), tiles / SPLIT_TILES));
  const int each = (tiles + splits - 1) / splits;
  if (each > 0) splits = (tiles + each - 1) / each;
  const int split = blockIdx.y;
  // Tiles are taken from the last on: the newest key comes in the first that any warp takes.
  const int first = lowest + split * each;
  int tile = min(first + each, lowest + tiles) - 1 - warp;

  Pages pages;
  pages.blocks = block_table + static_cast<long long>(sequence) * table_width;
  pages.block_stride = static_cast<long long>(kv_heads) * BLOCK_SIZE * HEAD_DIM;
  pages.keys = k_pages + static_cast<long long>(kv_head) * BLOCK_SIZE * HEAD_DIM;
  pages.values = v_pages + static_cast<long long>(kv_head) * BLOCK_SIZE * HEAD_DIM;
  // The blocks of this warp's next 32 SUBs, one a lane.
  const auto blocks_from = [&](int from) {
    const int start = (from - lane / SUBS * WARPS) * TILE + lane % SUBS * SUB;
    const bool wanted = SUB_IN_BLOCK && start >= first * TILE && start < length;
    return wanted ? pages.blocks[start / BLOCK_SIZE] : 0;
  };
  int ids = split < splits ? blocks_from(tile) : 0;
  int done = 0;
  long long offsets[SUBS];
  const auto find_tile = [&] {
#pragma unroll
    for (int u = 0; u < SUBS; u++) {
      const int block = __shfl_sync(0xffffffff, ids, (done * SUBS + u) % 32);
      offsets[u] = pages.sub_offset(tile * TILE + u * SUB, block);
    }
  };
  const int k_rows[2] = {lane / 4, lane / 4 + 8};
  const int v_rows[4] = {lane % 4 * 2, lane % 4 * 2 + 1, lane % 4 * 2 + 8, lane % 4 * 2 + 9};
  const int k_dim = lane % 4 * 8, v_dim = lane / 4 * 8;
  Raw k[SUBS][2][K_CHUNKS], v[SUBS][4][V_CHUNKS];
  const auto load_keys = [&](const Range& seen) {
    load_rows<2, K_CHUNKS, 32>(k, pages.keys, pages, offsets, tile, k_rows, k_dim, seen);
  };
  const auto load_values = [&](const Range& seen) {
    load_rows<4, V_CHUNKS, 64>(v, pages.values, pages, offsets, tile, v_rows, v_dim, seen);
  };
  find_tile();
#if ROPE
  // All but the newest key and value have been there since before the kernel ahead.
  const Range older = {range.low, length - 1};
  const bool newest = warp == 0 && split == splits - 1;  // this warp appends
  const float* angles = cosines + static_cast<long long>(positions[sequence]) * HEAD_DIM;
  const long long slot = slots[sequence];
  if (split < splits && tile >= first) {
    load_keys(older);
    load_values(older);
  }
#endif

  wait_for_previous_kernel();
  let_next_kernel_start();
  if (split >= splits || absent) return;
  T* own_out = out + (static_cast<long long>(sequence) * heads + kv_head * GROUP + first_head) *
                         HEAD_DIM;
  if (length <= 0) {
    for (int i = threadIdx.x; i < own_heads * HEAD_DIM; i += WARPS * 32)
      own_out[i] = from_float<T>(0.0f);
    return;
  }
  unsigned query[K_CHUNKS][4];
  const int head = min(lane / 4, own_heads - 1);  // those past the last compute what is not used
  const T* q_row = q + static_cast<long long>(sequence) * q_stride +
                   (kv_head * GROUP + first_head + head) * HEAD_DIM;
#if ROPE
  {
    Row row;
    row.load(q_row, k_dim);
#if NORM
    row.normalise(q_weight, k_dim, eps);
#endif
    row.rotate(angles, k_dim);
#pragma unroll
    for (int c = 0; c < K_CHUNKS; c++) pack<T>(row.at[c], 1.0f, query[c]);
  }
  if (newest) {
    const float inverse = 1.0f / value_scale;
    const long long to = (slot / BLOCK_SIZE * kv_heads + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE;
    const bool stores = slot >= 0 && first_head == 0;
    const int own = (length - 1) % SUB, own_sub = (length - 1) % TILE / SUB;
    Row row;
    row.load(new_k + static_cast<long long>(sequence) * k_stride + kv_head * HEAD_DIM, k_dim);
#if NORM
    row.normalise(k_weight, k_dim, eps);
#endif
    row.rotate(angles, k_dim);
#pragma unroll
    for (int c = 0; c < K_CHUNKS; c++) {
      Raw key;
      pack<KV>(row.at[c], inverse, key.words);
#pragma unroll
      for (int u = 0; u < SUBS; u++)
#pragma unroll
        for (int r = 0; r < 2; r++)
          if (u == own_sub && k_rows[r] == own) k[u][r][c] = key;
      if (stores && lane < 4)
        *reinterpret_cast<Raw*>(k_pages + to * HEAD_DIM + c * 32 + k_dim) = key;
    }
    const T* v_row = new_v + static_cast<long long>(sequence) * v_stride + kv_head * HEAD_DIM;
#pragma unroll
    for (int c = 0; c < V_CHUNKS; c++) {
      const auto wide = *reinterpret_cast<const Pack<T, 8>*>(v_row + c * 64 + v_dim);
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] = to_float(wide.at[j]);
      Raw value;
      pack<KV>(x, inverse, value.words);
#pragma unroll
      for (int u = 0; u < SUBS; u++)
#pragma unroll
        for (int r = 0; r < 4; r++)
          if (u == own_sub && v_rows[r] == own) v[u][r][c] = value;
      if (stores && lane % 4 == 0)
        *reinterpret_cast<Raw*>(v_pages + to * HEAD_DIM + c * 64 + v_dim) = value;
    }
  }
#else
  if (tile >= first) {
    load_keys(range);
    load_values(range);
  }
#pragma unroll
  for (int c = 0; c < K_CHUNKS; c++) {
    const int column = c * 32 + k_dim;
    uint4 x = {0, 0, 0, 0};
    if (column < HEAD_DIM) x = *reinterpret_cast<const uint4*>(q_row + column);
    query[c][0] = x.x, query[c][1] = x.y, query[c][2] = x.z, query[c][3] = x.w;
  }
#endif

  State state;
  while (tile >= first) {
    unsigned weights[SUBS][2];
    attend_tile(state, query, k, tile, lane, range, scale, cap, weights);
    tile -= WARPS;
    done++;
    if (done * SUBS % 32 == 0) ids = blocks_from(tile);
    find_tile();
    if (tile >= first) load_keys(range);
    add_values(state, v, weights);
    if (tile >= first) load_values(range);
  }

  // The warps' results become one.
  __shared__ __align__(16) float parts[WARPS][HEADS][HEAD_DIM];
  __shared__ float2 part_stats[WARPS][HEADS];  // peak, sum
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int head = lane % 4 * 2 + i;
#pragma unroll
    for (int reach = 4; reach < 32; reach *= 2)
      state.sum[i] += __shfl_xor_sync(0xffffffff, state.sum[i], reach);
    if (head >= HEADS) continue;
    if (lane < 4) part_stats[warp][head] = {state.peak[i], state.sum[i]};
#pragma unroll
    for (int c = 0; c < V_CHUNKS; c++) {
      const int column = c * 64 + v_dim;
      if (column >= HEAD_DIM) continue;
      float4* to = reinterpret_cast<float4*>(&parts[warp][head][column]);
      const auto& o = state.out[c];
      to[0] = {o[0][i], o[0][i + 2], o[1][i], o[1][i + 2]};
      to[1] = {o[2][i], o[2][i + 2], o[3][i], o[3][i + 2]};
    }
  }
  __syncthreads();
  const long long item = static_cast<long long>(sequence) * gridDim.x + blockIdx.x;
  float2* stats = reinterpret_cast<float2*>(partials + static_cast<long long>(gridDim.z) *
                                                           gridDim.x * gridDim.y * HEADS *
                                                           HEAD_DIM);
  constexpr int QUADS = HEAD_DIM / 4;
  for (int i = threadIdx.x; i < own_heads * QUADS; i += WARPS * 32) {
    const int head = i / QUADS, column = i % QUADS * 4;
    float peak = NONE, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, part_stats[w][head].x);
    float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = share(part_stats[w][head].x, peak);
      const float4 part = *reinterpret_cast<const float4*>(&parts[w][head][column]);
      sum += factor * part_stats[w][head].y;
      total.x += factor * part.x, total.y += factor * part.y;
      total.z += factor * part.z, total.w += factor * part.w;
    }
    if (splits == 1) {
      store_out(own_out + head * HEAD_DIM + column, total, value_scale / sum);
    } else {
      const long long row = (item * gridDim.y + split) * HEADS + head;
      *reinterpret_cast<float4*>(partials + row * HEAD_DIM + column) = total;
      if (column == 0) stats[row] = {peak, sum};
    }
  }
  if (splits == 1) return;

  // The block that arrives last merges the splits.
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(arrivals + item)
                 : "memory");
    last = before + 1 == splits;
    if (last) arrivals[item] = 0;
  }
  __syncthreads();
  if (!last) return;
  for (int i = threadIdx.x; i < own_heads * QUADS; i += WARPS * 32) {
    const int head = i / QUADS, column = i % QUADS * 4;
    const long long row = item * gridDim.y * HEADS + head;
    float peak = NONE, sum = 0.0f;
    float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int s = 0; s < splits; s++) peak = fmaxf(peak, __ldcg(&stats[row + s * HEADS]).x);
#pragma unroll 8
    for (int s = 0; s < splits; s++) {
      const float2 stat = __ldcg(&stats[row + s * HEADS]);
      const float4 part =
          __ldcg(reinterpret_cast<const float4*>(partials + (row + s * HEADS) * HEAD_DIM + column));
      const float factor = share(stat.x, peak);
      sum += factor * stat.y;
      total.x += factor * part.x, total.y += factor * part.y;
      total.z += factor * part.z, total.w += factor * part.w;
    }
    store_out(own_out + head * HEAD_DIM + column, total, value_scale / sum);
  }
}
