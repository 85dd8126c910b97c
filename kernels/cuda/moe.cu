// Mixture of experts: which experts a row chooses, rows in groups by expert, and the products of a
// group's many rows. Groups of few rows are linear.cu's work.
//
// ELEMENT: element type of activations and weights (of logits, in `route`). PARTIAL, if defined:
// choices may be of experts that are not here; what `y` has for them is unwritten.
#include "activation.cuh"
#include "async_copy.cuh"
#include "common.cuh"
#include "mma.cuh"

using T = ELEMENT;

constexpr float LOWEST = -3.4e38f;  // of what is not there

// The top_k largest of a row's logits, best first, ties to the lower id, and their share of the
// softmax; a warp a row. ITEMS: logits a lane holds.
extern "C" __global__ void __launch_bounds__(128)
    route(const T* logits, float* weights, int* ids, int rows, int experts, int top_k,
          long long stride, int renormalize) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x % 32;
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (row >= rows) return;
  float logit[ITEMS];
  float peak = LOWEST, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int id = i * 32 + lane;
    logit[i] = id < experts ? to_float(logits[row * stride + id]) : LOWEST;
    peak = fmaxf(peak, logit[i]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, mask));
#pragma unroll
  for (int i = 0; i < ITEMS; i++) sum += expf(logit[i] - peak);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);

  unsigned taken = 0;
  float own_weight = 0.0f, chosen_sum = 0.0f;
  for (int choice = 0; choice < top_k; choice++) {
    float best = LOWEST;
    int best_id = experts;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int id = i * 32 + lane;
      const bool free = id < experts && !(taken >> i & 1);
      if (free && (best_id == experts || logit[i] > best)) {
        best = logit[i];
        best_id = id;
      }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = __shfl_xor_sync(~0u, best, mask);
      const int other_id = __shfl_xor_sync(~0u, best_id, mask);
      const bool better = other_id < experts &&
                          (best_id == experts || other > best || (other == best && other_id < best_id));
      if (better) {
        best = other;
        best_id = other_id;
      }
    }
    best_id = __shfl_sync(~0u, best_id, 0);  // NaN logits may leave lanes of two minds
    best = __shfl_sync(~0u, best, 0);
    if (best_id % 32 == lane) taken |= 1u << best_id / 32;
    const float weight = expf(best - peak) / sum;
    chosen_sum += weight;
    if (lane == 0) {
      ids[row * top_k + choice] = best_id;
      if (!renormalize) weights[row * top_k + choice] = weight;
    }
    if (choice % 32 == lane) own_weight = weight;
    if (renormalize && (choice % 32 == 31 || choice + 1 == top_k)) {
      // A lane keeps one weight of 32; they are scaled below.
      const int first = choice / 32 * 32;
      if (first + lane <= choice) weights[row * top_k + first + lane] = own_weight;
    }
  }
  if (!renormalize) return;
  __syncwarp();
  for (int choice = lane; choice < top_k; choice += 32) weights[row * top_k + choice] /= chosen_sum;
}

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

// The choices (row * top_k + choice) in groups by expert, each in rising order; experts count from
// `first`, and choices of others are in no group. Group: (expert, first place in `order`, how many,
// 0); those with rows come first, the others up to `slots` are (0, 0, 0, 0). A block an expert; it
// counts for itself what lies before it.
extern "C" __global__ void __launch_bounds__(256)
    group_rows(const int* ids, int choices, int first, int experts, int* order, int4* groups,
               int slots) {
  extern __shared__ int seen[];  // per lower expert, whether anybody chose it
  __shared__ int partial[3][8];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < expert; i += blockDim.x) seen[i] = 0;
  __syncthreads();
  int before = 0, own = 0, groups_before = 0;
  for (int i = threadIdx.x; i < choices; i += blockDim.x) {
    const int id = ids[i] - first;
    own += id == expert;
    if (id >= 0 && id < expert) {
      before++;
      seen[id] = 1;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < expert; i += blockDim.x) groups_before += seen[i];
  before = warp_sum(before), own = warp_sum(own), groups_before = warp_sum(groups_before);
  if (lane == 0) {
    partial[0][warp] = before;
    partial[1][warp] = own;
    partial[2][warp] = groups_before;
  }
  __syncthreads();
  before = own = groups_before = 0;
  for (int w = 0; w < 8; w++) {
    before += partial[0][w];
    own += partial[1][w];
    groups_before += partial[2][w];
  }
  if (threadIdx.x == 0 && own > 0) groups[groups_before] = make_int4(expert, before, own, 0);
  if (expert == experts - 1)
    for (int i = groups_before + (own > 0) + threadIdx.x; i < slots; i += blockDim.x)
      groups[i] = make_int4(0, 0, 0, 0);
  if (own == 0) return;

  for (int base = 0; base < choices; base += blockDim.x) {
    const int i = base + threadIdx.x;
    const bool mine = i < choices && ids[i] - first == expert;
    const unsigned votes = __ballot_sync(~0u, mine);
    __syncthreads();
    if (lane == 0) partial[0][warp] = __popc(votes);
    __syncthreads();
    int place = before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < 8; w++) {
      place += w < warp ? partial[0][w] : 0;
      before += partial[0][w];
    }
    if (mine) order[place] = i;
  }
}

// out[row] = sum over a row's choices of their weights times y[row * top_k + choice].
extern "C" __global__ void __launch_bounds__(256)
    combine(const T* y, const float* weights, const int* ids, int first, int experts, T* out,
            int columns, int top_k, unsigned packs) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const unsigned across = columns / 8;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < packs; i += gridDim.x * blockDim.x) {
    const long long row = i / across, column = i % across * 8;
    float sum[8] = {};
    for (int choice = 0; choice < top_k; choice++) {
#ifdef PARTIAL
      const int id = ids[row * top_k + choice] - first;
      if (id < 0 || id >= experts) continue;
#endif
      const float weight = weights[row * top_k + choice];
      const auto pack =
          *reinterpret_cast<const Pack<T, 8>*>(y + (row * top_k + choice) * columns + column);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += weight * to_float(pack.at[j]);
    }
    Pack<T, 8> result;
#pragma unroll
    for (int j = 0; j < 8; j++) result.at[j] = from_float<T>(sum[j]);
    *reinterpret_cast<Pack<T, 8>*>(out + row * columns + column) = result;
  }
}

#ifdef GATED
// Products of groups of many rows: tiles of 128 rows by 128 outputs (64 if GATED, each with its
// gate), by 64 of `in` at a time, three on their way. Shared memory holds rows of 128 bytes whose
// 16-byte pieces are exchanged by the row's number, so that no matrix load meets itself in a bank.
// SCATTERED: x's rows lie in group order and y's do not; else the other way round.

constexpr int TILE = 128;
constexpr int DEPTH = 64;
constexpr int STAGES = 3;
constexpr int MATRIX_BYTES = TILE * DEPTH * 2;

__device__ __forceinline__ unsigned place(unsigned base, int row, int piece) {
  return base + row * 128 + ((piece ^ (row & 7)) << 4);
}

__device__ __forceinline__ void load_matrices(unsigned (&to)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

extern "C" __global__ void __launch_bounds__(256, 2)
    many_rows(const T* weight, const T* x, T* y, int in, int out, long long x_stride,
              const int4* groups, const int* order, int slots, int choices) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_previous_kernel();
  let_next_kernel_start();

  // The group that this block's tile of rows belongs to.
  int expert = 0, first_row = 0, rows = 0, tiles_before = 0;
  for (int base = 0; base < slots && rows == 0; base += 32) {
    const int4 group = base + lane < slots ? groups[base + lane] : make_int4(0, 0, 0, 0);
    const int own = (group.z + TILE - 1) / TILE;
    int end = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += left;
    }
    end += tiles_before;
    const int tile = blockIdx.y;
    const unsigned found = __ballot_sync(~0u, tile < end && tile >= end - own);
    if (found) {
      const int from = __ffs(found) - 1;
      const int skipped = (tile - __shfl_sync(~0u, end - own, from)) * TILE;
      expert = __shfl_sync(~0u, group.x, from);
      first_row = __shfl_sync(~0u, group.y, from) + skipped;
      rows = min(__shfl_sync(~0u, group.z, from) - skipped, TILE);
    }
    tiles_before = __shfl_sync(~0u, end, 31);
  }
  if (rows == 0) return;
  weight += static_cast<long long>(expert) * out * in;
  const int results = GATED ? out / 2 : out;

  // What this thread copies: 4 pieces of rows of x and of the weight, 32 rows apart.
  const int piece = threadIdx.x % 8;
  const T* x_rows[4];
  const T* weight_rows[4];
  bool x_valid[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = threadIdx.x / 8 + i * 32;
    x_valid[i] = row < rows;
    const int at = first_row + (x_valid[i] ? row : 0);
    x_rows[i] = x + (SCATTERED ? at : order[at] / choices) * x_stride;
    int output;
    if (GATED) {
      output = min(static_cast<int>(blockIdx.x) * 64 + row / 32 * 16 + row % 16, results - 1);
      output += row % 32 / 16 * results;
    } else {
      output = min(static_cast<int>(blockIdx.x) * TILE + row, out - 1);
    }
    weight_rows[i] = weight + static_cast<long long>(output) * in;
  }
  const unsigned base = shared_address(shared);
  const auto copy = [&](int step) {
    const unsigned x_base = base + step % STAGES * (2 * MATRIX_BYTES);
    const int k = step * DEPTH + piece * 8;
    const bool inside = k < in;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = threadIdx.x / 8 + i * 32;
      const int offset = inside ? k : 0;
      copy_async(place(x_base, row, piece), x_rows[i] + offset, x_valid[i] && inside);
      copy_async(place(x_base + MATRIX_BYTES, row, piece), weight_rows[i] + offset, inside);
    }
  };

  const int steps = (in + DEPTH - 1) / DEPTH;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) copy(s);
    commit_copies();
  }
  const int row_base = warp / 4 * 64, out_base = warp % 4 * 32;
  float acc[4][4][4] = {};
  for (int step = 0; step < steps; step++) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) copy(step + STAGES - 1);
    commit_copies();
    const unsigned x_base = base + step % STAGES * (2 * MATRIX_BYTES);
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) {
      unsigned a[4][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 4; m++)
        load_matrices(a[m], place(x_base, row_base + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < 2; n++)
        load_matrices(b[n], place(x_base + MATRIX_BYTES, out_base + n * 16 + lane / 16 * 8 + lane % 8,
                                  k * 2 + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++)
          mma<T>(acc[m][n], {a[m][0], a[m][1], a[m][2], a[m][3]}, b[n / 2][n % 2 * 2],
                 b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 4; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = row_base + m * 16 + half * 8 + lane / 4;
      if (row >= rows) continue;
      const long long at = SCATTERED ? order[first_row + row] : first_row + row;
#pragma unroll
      for (int n = 0; n < (GATED ? 2 : 4); n++) {
        const int output = GATED ? blockIdx.x * 64 + out_base / 2 + n * 8 + lane % 4 * 2
                                 : blockIdx.x * TILE + out_base + n * 8 + lane % 4 * 2;
        float first = acc[m][n][half * 2], second = acc[m][n][half * 2 + 1];
        if (GATED) {
          first = silu(first) * acc[m][n % 2 + 2][half * 2];
          second = silu(second) * acc[m][n % 2 + 2][half * 2 + 1];
        }
        if (output < results) y[at * results + output] = from_float<T>(first);
        if (output + 1 < results) y[at * results + output + 1] = from_float<T>(second);
      }
    }
  }
}
#endif
