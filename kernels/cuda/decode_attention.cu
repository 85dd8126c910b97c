// Attention of one query a sequence over paged keys and values, split over the KV length
// (Flash-Decoding; online softmax of Milakov & Gimelshein, arXiv 1805.02867).
//
// A block takes the query heads of one KV head (eight at most), of one sequence, over one range of
// its positions; each of its warps takes tiles of 16 positions in turn. Scores are S^T = K Q^T and
// outputs O^T = V^T P^T, so that positions and dims fill the tensor cores' 16 rows and the few
// heads their 8 columns. Keys and values go from memory straight into the registers the tensor
// cores read: a sum over dims may run in any order, and so may the order of O's rows, so each
// thread takes 16 consecutive bytes of a row; only pairs of V's rows have to be interleaved.
//
// DTYPE: type of q and out (__half, __nv_bfloat16); KV_DTYPE: of the pages; HEAD_DIM: a multiple of 8;
// GROUP: query heads a KV head; BLOCK_SIZE; WARPS; MIN_BLOCKS: blocks a multiprocessor should hold;
// SPLIT_TILES: fewest tiles worth a block of their own; SOFTCAP: 1 if scores are capped.
#include "common.cuh"
#include "mma.cuh"

using T = DTYPE;
using KV = KV_DTYPE;

constexpr int TILE = 16;  // positions
constexpr int HEADS = GROUP < 8 ? GROUP : 8;  // of this block
constexpr int HEAD_TILES = (GROUP + 7) / 8;
constexpr int K_CHUNKS = (HEAD_DIM + 31) / 32;  // 4 threads x 8 dims
constexpr int V_CHUNKS = (HEAD_DIM + 63) / 64;  // 8 threads x 8 dims
constexpr bool TILE_IN_BLOCK = BLOCK_SIZE % TILE == 0;
constexpr float NONE = -3e38f;  // a score below all

using Raw = Pack<KV, 8>;  // 8 dims as they lie in memory

struct Range {
  int low, high;  // positions that the query sees
  int first_tile, last_tile;
};

// One KV head's pages as one sequence's tiles.
struct Pages {
  const KV* keys;
  const KV* values;
  const int* blocks;  // the sequence's row of the block table
  long long block_stride;

  // Where a tile's first row lies; `block` is its id.
  __device__ long long tile_offset(int tile, int block) const {
    return block * block_stride + static_cast<long long>(tile * TILE % BLOCK_SIZE) * HEAD_DIM;
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
    uint4& x = reinterpret_cast<uint4&>(raw);
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
  } else {
    uint2& x = reinterpret_cast<uint2&>(raw);
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "l"(from));
  }
  return raw;
}

__device__ __forceinline__ Raw zero_raw() {
  Raw raw;
#pragma unroll
  for (int i = 0; i < sizeof(Raw) / 4; i++) reinterpret_cast<unsigned*>(&raw)[i] = 0;
  return raw;
}

// Rows of a tile, a thread's 8 dims of each chunk of WIDTH dims. Positions outside the range, and
// dims past the head's end, are zeros and not read.
template <int ROWS, int CHUNKS, int WIDTH>
__device__ __forceinline__ void load_rows(Raw (&to)[ROWS][CHUNKS], const KV* base,
                                          const Pages& pages, long long tile_offset, int tile,
                                          const int (&rows)[ROWS], int dim, const Range& range) {
  const int start = tile * TILE;
  const bool whole = start >= range.low && start + TILE <= range.high;
  if (whole && TILE_IN_BLOCK && HEAD_DIM % WIDTH == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
        to[r][c] = load_raw(base + tile_offset + rows[r] * HEAD_DIM + c * WIDTH + dim);
    return;
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int position = start + rows[r];
    const bool seen = position >= range.low && position < range.high;
    const long long offset = TILE_IN_BLOCK ? tile_offset + rows[r] * HEAD_DIM
                             : seen        ? pages.row_offset(position)
                                           : 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int column = c * WIDTH + dim;
      to[r][c] = seen && column < HEAD_DIM ? load_raw(base + offset + column) : zero_raw();
    }
  }
}

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

__device__ __forceinline__ void attend_tile(State& state, const unsigned (&q)[K_CHUNKS][4],
                                            const Raw (&k)[2][K_CHUNKS], int tile, int lane,
                                            const Range& range, float scale, float cap,
                                            unsigned (&weights)[2]) {
  float score[4] = {};
#pragma unroll
  for (int c = 0; c < K_CHUNKS; c++) {
    unsigned upper[4], lower[4];
    unpack<T>(k[0][c], upper);
    unpack<T>(k[1][c], lower);
    mma<T>(score, {upper[0], lower[0], upper[1], lower[1]}, q[c][0], q[c][1]);
    mma<T>(score, {upper[2], lower[2], upper[3], lower[3]}, q[c][2], q[c][3]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) score[i] = capped(score[i], scale, cap);
  const int start = tile * TILE;
  if (start < range.low || start + TILE > range.high) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int position = start + lane / 4 + (i / 2) * 8;
      if (position < range.low || position >= range.high) score[i] = NONE;
    }
  }
  float peak[2] = {fmaxf(score[0], score[2]), fmaxf(score[1], score[3])};
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
  float weight[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    weight[i] = exp2f(score[i] - state.peak[i % 2]);
    state.sum[i % 2] += weight[i];
  }
  weights[0] = transpose(pair<T>(weight[0], weight[1]));
  weights[1] = transpose(pair<T>(weight[2], weight[3]));
}

__device__ __forceinline__ void add_values(State& state, const Raw (&v)[4][V_CHUNKS],
                                           const unsigned (&weights)[2]) {
#pragma unroll
  for (int c = 0; c < V_CHUNKS; c++) {
    unsigned row[4][4];
#pragma unroll
    for (int r = 0; r < 4; r++) unpack<T>(v[r][c], row[r]);
#pragma unroll
    for (int t = 0; t < 4; t++) {
      mma<T>(state.out[c][t],
             {__byte_perm(row[0][t], row[1][t], 0x5410), __byte_perm(row[0][t], row[1][t], 0x7632),
              __byte_perm(row[2][t], row[3][t], 0x5410), __byte_perm(row[2][t], row[3][t], 0x7632)},
             weights[0], weights[1]);
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

// Grid: kv_heads * HEAD_TILES, the most splits of a sequence, sequences. q's rows are q_stride
// elements apart. scale: of a score, in powers of two unless capped; window: 0 for none.
// partials: float [sequences, kv_heads * HEAD_TILES, splits, HEADS, HEAD_DIM], then their peak and
// sum [.., HEADS, 2]; arrivals [sequences * kv_heads * HEAD_TILES], zeros before and after.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    decode_attention(const T* q, const KV* k_pages, const KV* v_pages, const int* seq_lens,
                     const int* block_table, T* out, float* partials, unsigned* arrivals,
                     int q_stride, int kv_heads, int table_width, int window, float scale,
                     float cap, float value_scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int kv_head = blockIdx.x / HEAD_TILES;
  const int first_head = blockIdx.x % HEAD_TILES * 8;  // within the group
  const int sequence = blockIdx.z;
  const int heads = kv_heads * GROUP;
  const int own_heads = min(HEADS, GROUP - first_head);

  // Metadata comes from the host, ahead of the kernel before this one.
  const int length = seq_lens[sequence];
  Range range;
  range.low = window > 0 ? max(0, length - window) : 0;
  range.high = length;
  const int first = range.low / TILE;
  const int tiles = (length + TILE - 1) / TILE - first;
  int splits = max(1, min(static_cast<int>(gridDim.y), tiles / SPLIT_TILES));
  const int each = (tiles + splits - 1) / splits;
  if (each > 0) splits = (tiles + each - 1) / each;
  const int split = blockIdx.y;
  range.first_tile = first + split * each;
  range.last_tile = min(range.first_tile + each, first + tiles);

  Pages pages;
  pages.blocks = block_table + static_cast<long long>(sequence) * table_width;
  pages.block_stride = static_cast<long long>(kv_heads) * BLOCK_SIZE * HEAD_DIM;
  pages.keys = k_pages + static_cast<long long>(kv_head) * BLOCK_SIZE * HEAD_DIM;
  pages.values = v_pages + static_cast<long long>(kv_head) * BLOCK_SIZE * HEAD_DIM;
  // The blocks of this warp's next 32 tiles, one a lane.
  const auto blocks_from = [&](int tile) {
    tile += lane * WARPS;
    return tile < range.last_tile ? pages.blocks[tile * TILE / BLOCK_SIZE] : 0;
  };
  int tile = range.first_tile + warp;
  int ids = split < splits && TILE_IN_BLOCK ? blocks_from(tile) : 0;

  wait_for_previous_kernel();
  let_next_kernel_start();
  if (split >= splits) return;
  T* own_out = out + (static_cast<long long>(sequence) * heads + kv_head * GROUP + first_head) *
                         HEAD_DIM;
  if (length <= 0) {
    for (int i = threadIdx.x; i < own_heads * HEAD_DIM; i += WARPS * 32)
      own_out[i] = from_float<T>(0.0f);
    return;
  }

  const int k_rows[2] = {lane / 4, lane / 4 + 8};
  const int v_rows[4] = {lane % 4 * 2, lane % 4 * 2 + 1, lane % 4 * 2 + 8, lane % 4 * 2 + 9};
  const int k_dim = lane % 4 * 8, v_dim = lane / 4 * 8;
  Raw k[2][K_CHUNKS], v[4][V_CHUNKS];
  unsigned query[K_CHUNKS][4];
  State state;
  int done = 0;
  const auto offset_of_next = [&] {
    return pages.tile_offset(tile, __shfl_sync(0xffffffff, ids, done % 32));
  };
  long long offset = offset_of_next();
  if (tile < range.last_tile) {
    load_rows<2, K_CHUNKS, 32>(k, pages.keys, pages, offset, tile, k_rows, k_dim, range);
    load_rows<4, V_CHUNKS, 64>(v, pages.values, pages, offset, tile, v_rows, v_dim, range);
  }
  {
    const int head = lane / 4;
    const T* row = q + static_cast<long long>(sequence) * q_stride +
                   (kv_head * GROUP + first_head + head) * HEAD_DIM;
#pragma unroll
    for (int c = 0; c < K_CHUNKS; c++) {
      const int column = c * 32 + k_dim;
      uint4 x = {0, 0, 0, 0};
      if (head < own_heads && column < HEAD_DIM) x = *reinterpret_cast<const uint4*>(row + column);
      query[c][0] = x.x, query[c][1] = x.y, query[c][2] = x.z, query[c][3] = x.w;
    }
  }
  while (tile < range.last_tile) {
    const int next = tile + WARPS;
    unsigned weights[2];
    attend_tile(state, query, k, tile, lane, range, scale, cap, weights);
    tile = next;
    done++;
    if (done % 32 == 0 && TILE_IN_BLOCK) ids = blocks_from(tile);
    offset = offset_of_next();
    if (tile < range.last_tile)
      load_rows<2, K_CHUNKS, 32>(k, pages.keys, pages, offset, tile, k_rows, k_dim, range);
    add_values(state, v, weights);
    if (tile < range.last_tile)
      load_rows<4, V_CHUNKS, 64>(v, pages.values, pages, offset, tile, v_rows, v_dim, range);
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
#pragma unroll 4
    for (int s = 0; s < splits; s++) peak = fmaxf(peak, __ldcg(&stats[row + s * HEADS]).x);
#pragma unroll 4
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
