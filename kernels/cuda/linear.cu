// Products of few rows with a weight that is read once: y = x W^T, W [out, in] row-major.
//
// The weight is the A operand of the tensor cores' m16n8k16 and x, of at most 8 * NTILES rows, the
// B operand, so a single row wastes arithmetic that is there anyway and no bandwidth. The sum over
// `in` is taken in any order, so a thread loads 16 consecutive bytes of a weight's row and calls
// its 8 elements what the instruction wants of it; x is loaded to match. Each thread then reads back
// from shared memory just what it copied there itself (cp.async): the pipeline needs no barriers,
// and is as deep as shared memory is large.
//
// A block makes tiles of 16 * MTILES outputs, as many at a time as the pipeline has room for. Its
// warps share `in` between them in chunks of 64; their sums meet in shared memory, always
// in the same order. x comes with the weights, chunk by chunk, unless NORM: then a block norms it
// first and keeps all of it in shared memory.
//
// WEIGHT: element type of weight, norm and bias; INPUT: of x, WEIGHT unless NORM; OUTPUT: of
// residual and result. GATED: tiles alternate between a gate's 16 outputs and those that it gates.
//
// GROUPED, if not 0: a block takes rows of a group, ROWS of them, and one of the weights that
// `weight` is a stack of (moe.cu says how groups are made). 1: x is gathered, 2: y is scattered.
#include "activation.cuh"
#include "async_copy.cuh"
#include "common.cuh"
#include "mma.cuh"

namespace {

using T = WEIGHT;
using X = INPUT;
using Y = OUTPUT;

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int HALVES = 2;  // of a chunk: 64 bytes of a row, of which a thread copies 16
constexpr int CHUNK = 32 * HALVES;
constexpr int ROWS = 8 * NTILES;
constexpr int OUTS = 16 * MTILES;
constexpr int RESULTS = GATED ? OUTS / 2 : OUTS;

// What a warp copies at a time, in units of 16 bytes a lane.
constexpr int UNIT = 32 * 16;
constexpr int X_FIRST = 2 * HALVES * MTILES;
constexpr int UNITS = X_FIRST + (NORM ? 0 : HALVES * NTILES);

constexpr int PITCH = OUTS + 4;  // spreads a warp's sums over the banks
constexpr int RING_BYTES = STAGES * WARPS * UNITS * UNIT;
constexpr int SUMS_BYTES = WARPS * ROWS * PITCH * 4;

__device__ __forceinline__ uint4 load_unit(unsigned source) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(source));
  return v;
}

// The packs of a row of x, or of its norm's weight, that a thread holds while x is normed.
constexpr int HELD = 4;  // of 8 elements: rows of up to 8192

template <typename E>
__device__ __forceinline__ void hold(Pack<E, 8> (&held)[HELD], const E* row, int in) {
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int k = (i * THREADS + threadIdx.x) * 8;
    if (k < in) held[i] = *reinterpret_cast<const Pack<E, 8>*>(row + k);
  }
}

// Norms x's rows into shared memory, `pitch` bytes from one to the next.
__device__ __forceinline__ void norm_rows(unsigned char* target, int pitch, const X* x,
                                          const Pack<T, 8> (&factors)[HELD],
                                          float (*partial)[WARPS], int rows, int in,
                                          long long stride, float eps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Pack<X, 8> values[HELD], next[HELD];
  hold(next, x, in);
  for (int row = 0; row < rows; row++) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      values[i] = next[i];
      if ((i * THREADS + threadIdx.x) * 8 >= in) continue;
#pragma unroll
      for (int j = 0; j < 8; j++) sum += to_float(values[i].at[j]) * to_float(values[i].at[j]);
    }
    if (row + 1 < rows) hold(next, x + (row + 1) * stride, in);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (lane == 0) partial[row][warp] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[row][w];
    const float scale = rsqrtf(sum / in + eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const int k = (i * THREADS + threadIdx.x) * 8;
      if (k >= in) continue;
      Pack<T, 8> normed;
#pragma unroll
      for (int j = 0; j < 8; j++)
        normed.at[j] = from_float<T>(to_float(values[i].at[j]) * scale * to_float(factors[i].at[j]));
      *reinterpret_cast<Pack<T, 8>*>(target + row * pitch + k * 2) = normed;
    }
  }
  __syncthreads();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, NTILES > 2 ? 1 : 2)
    few_rows(const T* weight, const X* x, const T* norm, const T* bias, const Y* residual, Y* y,
             int in, int out, int rows, long long x_stride, long long residual_stride, float eps,
             int gate, int weights_ahead, const int4* groups, const int* order, int choices) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const unsigned ring = shared_address(shared);
  const unsigned own = ring + warp * UNITS * UNIT + lane * 16;

  const int results = GATED ? out / 2 : out;
  const int tiles = (results + RESULTS - 1) / RESULTS;
  const int first = blockIdx.x, stride = gridDim.x;
  const int rounds = (in + CHUNK * WARPS - 1) / (CHUNK * WARPS);
  const int own_k = warp * CHUNK + quad * 8;  // where in a round's share of `in` this thread is
  const int steps = first < tiles ? ((tiles - first + stride - 1) / stride) * rounds : 0;

  int first_row = 0;
  if (GROUPED) {
    wait_for_previous_kernel();
    const int4 own_group = groups[blockIdx.y];  // weight, first row, rows
    rows = min(own_group.z - static_cast<int>(blockIdx.z) * ROWS, ROWS);
    if (rows <= 0) return;
    first_row = own_group.y + blockIdx.z * ROWS;
    weight += static_cast<long long>(own_group.x) * out * in;
  }

  // The rows of x that this thread copies, null past the last.
  const X* x_rows[NTILES];
  // The next copy: its number, tile and place in `in`, and the rows of the weight there.
  int copied = 0, copied_tile = first, copied_k = own_k;
  unsigned copied_to = own;
  const T* weight_rows[MTILES][2];
  const auto find_weight_rows = [&] {
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = half * 8 + group;
        if (GATED) {
          row += (copied_tile * (MTILES / 2) + m / 2) * 16;
          row = min(row, results - 1) + m % 2 * results;
        } else {
          row = min(row + (copied_tile * MTILES + m) * 16, out - 1);
        }
        weight_rows[m][half] = weight + static_cast<long long>(row) * in;
      }
    }
  };
  const auto copy_weight = [&](unsigned target, int at) {
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
          const int k = at + h * 32;
          copy_async(target + ((m * 2 + half) * HALVES + h) * UNIT,
                     weight_rows[m][half] + (k < in ? k : 0), k < in);
        }
      }
    }
  };
  const auto copy_x = [&](unsigned target, int at) {
    if (NORM) return;
#pragma unroll
    for (int n = 0; n < NTILES; n++) {
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        const int k = at + h * 32;
        const bool valid = x_rows[n] != nullptr && k < in;
        copy_async(target + (X_FIRST + n * HALVES + h) * UNIT, valid ? x_rows[n] + k : x, valid);
      }
    }
  };
  const auto advance = [&] {
    copied++;
    copied_to += WARPS * UNITS * UNIT;
    if (copied_to == own + RING_BYTES) copied_to = own;
    copied_k += WARPS * CHUNK;
    if (copied_k == own_k + rounds * WARPS * CHUNK) {
      copied_k = own_k;
      copied_tile += stride;
      find_weight_rows();
    }
  };

  find_weight_rows();
  if (weights_ahead) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      if (s < steps) {
        copy_weight(copied_to, copied_k);
        advance();
      }
    }
  }
  Pack<T, 8> factors[HELD];
  if (NORM) hold(factors, norm, in);
  wait_for_previous_kernel();
#pragma unroll
  for (int n = 0; n < NTILES; n++) {
    const int row = n * 8 + group;
    x_rows[n] = nullptr;
    if (row < rows)
      x_rows[n] = x + (GROUPED == 1 ? order[first_row + row] / choices : first_row + row) * x_stride;
  }
  if (weights_ahead) {
    int k = own_k;  // of the x that goes with them
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      if (s < steps) copy_x(own + s * (WARPS * UNITS * UNIT), k);
      commit_copies();
      k += WARPS * CHUNK;
      if (k == own_k + rounds * WARPS * CHUNK) k = own_k;
    }
  } else {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      if (s < steps) {
        copy_weight(copied_to, copied_k);
        copy_x(copied_to, copied_k);
        advance();
      }
      commit_copies();
    }
  }
  // When memory has nothing left to do but copies under way, the next kernel's may follow.
  if (copied == steps) let_next_kernel_start();
  const int pitch = (in + 63) / 64 * 128 + 64;  // spreads a row's neighbours over the banks
  unsigned char* const normed = shared + RING_BYTES + SUMS_BYTES;
  float* const sums = reinterpret_cast<float*>(shared + RING_BYTES);
  if (NORM)
    norm_rows(normed, pitch, x, factors, reinterpret_cast<float(*)[WARPS]>(sums), rows, in, x_stride,
              eps);

  float acc[MTILES][NTILES][4] = {};
  unsigned source = own;
  int tile = first, round = 0;
  for (int step = 0; step < steps; step++) {
    wait_for_copies<STAGES - 1>();
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      uint4 b[NTILES];
#pragma unroll
      for (int n = 0; n < NTILES; n++) {
        if (NORM) {
          const int k = round * WARPS * CHUNK + own_k + h * 32, row = n * 8 + group;
          b[n] = make_uint4(0, 0, 0, 0);
          if (row < rows && k < in) b[n] = load_unit(shared_address(normed) + row * pitch + k * 2);
        } else {
          b[n] = load_unit(source + (X_FIRST + n * HALVES + h) * UNIT);
        }
      }
#pragma unroll
      for (int m = 0; m < MTILES; m++) {
        const uint4 low = load_unit(source + (m * 2 * HALVES + h) * UNIT);
        const uint4 high = load_unit(source + ((m * 2 + 1) * HALVES + h) * UNIT);
#pragma unroll
        for (int n = 0; n < NTILES; n++) {
          mma<T>(acc[m][n], {low.x, high.x, low.y, high.y}, b[n].x, b[n].y);
          mma<T>(acc[m][n], {low.z, high.z, low.w, high.w}, b[n].z, b[n].w);
        }
      }
    }
    if (copied < steps) {
      copy_weight(copied_to, copied_k);
      copy_x(copied_to, copied_k);
      advance();
      if (copied == steps) let_next_kernel_start();
    }
    commit_copies();
    source += WARPS * UNITS * UNIT;
    if (source == own + RING_BYTES) source = own;
    if (++round < rounds) continue;

    // The tile is whole: add up what the warps have of it.
    float* const mine = sums + (warp * ROWS + quad * 2) * PITCH + group;
    __syncthreads();  // the sums of the tile before have been read
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
#pragma unroll
      for (int n = 0; n < NTILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          mine[(n * 8 + i % 2) * PITCH + m * 16 + i / 2 * 8] = acc[m][n][i];
          acc[m][n][i] = 0.0f;
        }
      }
    }
    __syncthreads();
    const auto total = [&](int row, int at) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += sums[(w * ROWS + row) * PITCH + at];
      return sum;
    };
    for (int i = threadIdx.x; i < rows * RESULTS; i += THREADS) {
      const int row = i / RESULTS, at = i % RESULTS, result = tile * RESULTS + at;
      if (result >= results) continue;
      float value;
      if (GATED) {
        const int m = at / 16 * 32 + at % 16;
        float up = total(row, m + 16);
        value = total(row, m);
        if (bias != nullptr) {
          value += to_float(bias[result]);
          up += to_float(bias[results + result]);
        }
        value = (gate == SILU ? silu(value) : gelu_tanh(value)) * up;
      } else {
        value = total(row, at);
        if (bias != nullptr) value += to_float(bias[result]);
      }
      if (residual != nullptr) value += to_float(residual[row * residual_stride + result]);
      const long long y_row = GROUPED == 2 ? order[first_row + row] : first_row + row;
      y[y_row * results + result] = from_float<Y>(value);
    }
    tile += stride;
    round = 0;
  }
}
