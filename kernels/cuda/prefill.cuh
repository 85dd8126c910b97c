// What the prefill attention kernels share: how a step is cut into tiles, and matrix helpers.
//
// A tile is a few consecutive queries of one sequence times `share` heads of one group, which read
// the same keys: row r of a tile is query r / share and head r % share. Tiles are found from the
// device's query_starts alone: sequence s has the tile numbers from query_starts[s] / Q + s on (Q
// queries a tile). These ranges are disjoint and long enough for any lengths, so T / Q + S + 1
// numbers hold every tile; those that fall into a gap have nothing to do. The last "sequence" is
// the packed tokens behind all sequences, whose rows become zeros. Tokens ahead of the first
// sequence have no tile: their rows are another kernel's.
#pragma once

#include <math_constants.h>

#include "async_copy.cuh"
#include "common.cuh"

// What a step's launch is told; the same for every tile.
struct Step {
  int tokens;     // T, padding included
  int sequences;  // S
  int heads;
  int kv_heads;
  int share;             // heads of a tile; divides heads / kv_heads
  int queries_per_tile;  // Q
  int q_stride;  // elements from a token's queries to the next token's
  int block_size;
  int table_stride;  // of a sequence's row in the block table
  int window;        // a query sees this many positions, its own included
  float scale;       // of q.k, the cache's scale included
  float softcap;
  float out_scale;  // of the result: the cache's scale
};

struct Tile {
  int sequence;
  int first_token;  // packed
  int queries;      // 0: nothing to do
  int first_position;
  int low, high;  // the keys that any query of the tile sees; high <= 0: none
};

// Warp-collective. How many of the numbers from 0 to `count` - 1 hold; all that do come first.
template <typename Holds>
__device__ __forceinline__ int count_while(int count, Holds holds) {
  const int lane = threadIdx.x & 31;
  int found = 0;
  while (count > 0) {
    const int stride = (count + 31) >> 5;
    const bool held = lane * stride < count && holds(found + lane * stride);
    const int probes = __popc(__ballot_sync(~0u, held));
    if (probes == 0) break;
    const int below = (probes - 1) * stride + 1;
    found += below;
    count = min(stride - 1, count - below);
  }
  return found;
}

// Warp-collective.
__device__ __forceinline__ Tile find_tile(const int* query_starts, const int* seq_lens,
                                          const Step& step, int number) {
  Tile tile;
  const int s = count_while(step.sequences + 1, [&](int i) {
                  return query_starts[i] / step.queries_per_tile + i <= number;
                }) - 1;
  if (s < 0) {
    tile.queries = 0;
    return tile;
  }
  tile.sequence = s;
  const bool real = s < step.sequences;
  const int begin = query_starts[s];
  const int end = real ? query_starts[s + 1] : step.tokens;
  const int length = real ? seq_lens[s] : 0;
  const int local = number - (begin / step.queries_per_tile + s);
  tile.first_token = begin + local * step.queries_per_tile;
  tile.queries = max(min(step.queries_per_tile, end - tile.first_token), 0);
  tile.first_position = tile.first_token + length - end;
  tile.high = real ? tile.first_position + tile.queries : 0;
  tile.low = max(tile.first_position - step.window + 1, 0);
  return tile;
}

// --- arithmetic --------------------------------------------------------------------------------

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// cap * tanh(x / cap) to about 1e-6 of cap, which tanh.approx misses by far.
__device__ __forceinline__ float soft_cap(float x, float cap) {
  const float e = exp2_fast(x * (2.0f * LOG2E / cap));
  return cap - __fdividef(2.0f * cap, e + 1.0f);
}
