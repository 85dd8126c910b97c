// Products of few rows with a weight that is read once: y = x W^T, W [out, in] row-major.
//
// The weight is the A operand of the tensor cores' m16n8k16 and x, of at most 8 * NTILES rows, the
// B operand, so a single row wastes arithmetic that is there anyway and no bandwidth. The sum over
// `in` is taken in any order, so a thread loads 16 consecutive bytes of a weight's row and calls
// its 8 elements what the instruction wants of it; x is loaded to match. Each thread then reads back
// from shared memory just what it copied there itself (cp.async): the pipeline needs no barriers,
// and is as deep as shared memory is large.
//
// A team of TEAM warps makes tiles of 16 * MTILES outputs. Its warps share `in` between them in
// chunks of 64; their sums meet in shared memory, always in the same order. With RESIDENT a block
// keeps all of x in shared memory; otherwise x comes with the weights, chunk by chunk.
//
// WEIGHT: element type of weight, norm and bias; INPUT: of x, WEIGHT unless RESIDENT; OUTPUT: of
// residual and result. NORM: x is normed as it is made resident. GATED: tiles alternate between a
// gate's 16 outputs and those that it gates.
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
constexpr int TEAMS = WARPS / TEAM;
constexpr int CHUNK = 64;
constexpr int ROWS = 8 * NTILES;
constexpr int OUTS = 16 * MTILES;
constexpr int RESULTS = GATED ? OUTS / 2 : OUTS;

// What a warp copies at a time, in units of 16 bytes a lane.
constexpr int UNIT = 32 * 16;
constexpr int X_FIRST = 4 * MTILES;
constexpr int UNITS = X_FIRST + (RESIDENT ? 0 : 2 * NTILES);

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

__device__ __forceinline__ void team_barrier(int team) {
  if (TEAM == 1)
    __syncwarp();
  else if (TEAM == WARPS)
    __syncthreads();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(TEAM * 32) : "memory");
}

// x's rows in shared memory, `pitch` bytes from one to the next, as T and normed if asked.
__device__ __forceinline__ void make_resident(unsigned char* target, int pitch, const X* x,
                                              const T* norm, float (*partial)[WARPS], int rows,
                                              int in, long long stride, float eps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (NORM) {
    for (int row = 0; row < rows; row++) {
      float sum = 0.0f;
#pragma unroll 2
      for (int k = threadIdx.x * 8; k < in; k += THREADS * 8) {
        const auto values = *reinterpret_cast<const Pack<X, 8>*>(x + row * stride + k);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += to_float(values.at[j]) * to_float(values.at[j]);
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
      if (lane == 0) partial[row][warp] = sum;
    }
    __syncthreads();
  }
  for (int row = 0; row < rows; row++) {
    float scale = 0.0f;
    if (NORM) {
#pragma unroll
      for (int w = 0; w < WARPS; w++) scale += partial[row][w];
      scale = rsqrtf(scale / in + eps);
    }
#pragma unroll 4
    for (int k = threadIdx.x * 8; k < in; k += THREADS * 8) {
      const auto values = *reinterpret_cast<const Pack<X, 8>*>(x + row * stride + k);
      Pack<T, 8> kept;
      if (NORM) {
        const auto factors = *reinterpret_cast<const Pack<T, 8>*>(norm + k);
#pragma unroll
        for (int j = 0; j < 8; j++)
          kept.at[j] = from_float<T>(to_float(values.at[j]) * scale * to_float(factors.at[j]));
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++) kept.at[j] = from_float<T>(to_float(values.at[j]));
      }
      *reinterpret_cast<Pack<T, 8>*>(target + row * pitch + k * 2) = kept;
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
  const int team = warp / TEAM, mate = warp % TEAM;
  const int group = lane / 4, quad = lane % 4;
  const unsigned ring = shared_address(shared);
  const unsigned own = ring + warp * UNITS * UNIT + lane * 16;

  const int results = GATED ? out / 2 : out;
  const int tiles = (results + RESULTS - 1) / RESULTS;
  const int first = blockIdx.x * TEAMS + team, stride = gridDim.x * TEAMS;
  const int rounds = (in + CHUNK * TEAM - 1) / (CHUNK * TEAM);
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
  int copied = 0, copied_tile = first, copied_k = mate * CHUNK + quad * 8;
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
        for (int h = 0; h < 2; h++) {
          const int k = at + h * 32;
          copy_async(target + (m * 4 + half * 2 + h) * UNIT,
                     weight_rows[m][half] + (k < in ? k : 0), k < in);
        }
      }
    }
  };
  const auto copy_x = [&](unsigned target, int at) {
    if (RESIDENT) return;
#pragma unroll
    for (int n = 0; n < NTILES; n++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int k = at + h * 32;
        const bool valid = x_rows[n] != nullptr && k < in;
        copy_async(target + (X_FIRST + n * 2 + h) * UNIT, valid ? x_rows[n] + k : x, valid);
      }
    }
  };
  const auto advance = [&] {
    copied++;
    copied_to += WARPS * UNITS * UNIT;
    if (copied_to == own + RING_BYTES) copied_to = own;
    copied_k += TEAM * CHUNK;
    if (copied_k - mate * CHUNK - quad * 8 >= rounds * TEAM * CHUNK) {
      copied_k = mate * CHUNK + quad * 8;
      copied_tile += stride;
      find_weight_rows();
    }
    if (copied == steps) let_next_kernel_start();  // memory has nothing to do but its copies
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
  wait_for_previous_kernel();
#pragma unroll
  for (int n = 0; n < NTILES; n++) {
    const int row = n * 8 + group;
    x_rows[n] = nullptr;
    if (row < rows)
      x_rows[n] = x + (GROUPED == 1 ? order[first_row + row] / choices : first_row + row) * x_stride;
  }
  if (weights_ahead) {
    // Their x: a tile has at least one step and may have fewer than there are stages.
    int k = mate * CHUNK + quad * 8, round = 0;
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      if (s < steps) copy_x(own + s * (WARPS * UNITS * UNIT), k);
      commit_copies();
      k += TEAM * CHUNK;
      if (++round == rounds) {
        round = 0;
        k = mate * CHUNK + quad * 8;
      }
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
  const int pitch = (in + 63) / 64 * 128 + 64;  // spreads a row's neighbours over the banks
  unsigned char* const resident = shared + RING_BYTES + SUMS_BYTES;
  if (RESIDENT)
    make_resident(resident, pitch, x, norm, reinterpret_cast<float(*)[WARPS]>(shared + RING_BYTES),
                  rows, in, x_stride, eps);

  float acc[MTILES][NTILES][4] = {};
  unsigned source = own;
  int tile = first, round = 0;
  for (int step = 0; step < steps; step++) {
    wait_for_copies<STAGES - 1>();
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4 b[NTILES];
#pragma unroll
      for (int n = 0; n < NTILES; n++) {
        if (RESIDENT) {
          const int k = (round * TEAM + mate) * CHUNK + quad * 8 + h * 32, row = n * 8 + group;
          b[n] = make_uint4(0, 0, 0, 0);
          if (row < rows && k < in) b[n] = load_unit(shared_address(resident) + row * pitch + k * 2);
        } else {
          b[n] = load_unit(source + (X_FIRST + n * 2 + h) * UNIT);
        }
      }
#pragma unroll
      for (int m = 0; m < MTILES; m++) {
        const uint4 low = load_unit(source + (m * 4 + h) * UNIT);
        const uint4 high = load_unit(source + (m * 4 + 2 + h) * UNIT);
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
    }
    commit_copies();
    source += WARPS * UNITS * UNIT;
    if (source == own + RING_BYTES) source = own;
    if (++round < rounds) continue;

    // The tile is whole: add up what the team's warps have of it.
    float* const sums =
        reinterpret_cast<float*>(shared + RING_BYTES) + team * TEAM * ROWS * PITCH;
    float* const mine = sums + (mate * ROWS + quad * 2) * PITCH + group;
    team_barrier(team);  // the tile before this one has been read
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
    team_barrier(team);
    const auto total = [&](int row, int at) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < TEAM; w++) sum += sums[(w * ROWS + row) * PITCH + at];
      return sum;
    };
    for (int i = mate * 32 + lane; i < rows * RESULTS; i += TEAM * 32) {
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
