// Products of few rows with a weight that is read once: y = x W^T, W [out, in] row-major.
//
// The weight is the A operand of the tensor cores' m16n8k16 and x, of at most 8 * NTILES rows, the
// B operand, so a single row wastes arithmetic that is there anyway and no bandwidth. The sum over
// `in` is taken in any order, so a thread loads 16 consecutive bytes of a weight's row and calls
// its 8 elements what the instruction wants of it; x is loaded to match. Each thread then reads back
// from shared memory just what it copied there itself (cp.async): the pipeline needs no barriers,
// and is as deep as shared memory is large.
//
// A block makes tiles of 16 * MTILES outputs. Its warps share `in` between them in chunks of 64,
// as do the blocks of a cluster; their sums meet in shared memory, always in the same order.
//
// WEIGHT: element type of weight, norm and bias; INPUT: of x; OUTPUT: of residual and result.
// NORM: x is normed on the way. GATED: tiles alternate between a gate's 16 outputs and those that it gates.
#include "activation.cuh"
#include "common.cuh"

namespace {

using T = WEIGHT;
using X = INPUT;
using Y = OUTPUT;

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 64;
constexpr int ROWS = 8 * NTILES;
constexpr int OUTS = 16 * MTILES;
constexpr int RESULTS = GATED ? OUTS / 2 : OUTS;

// What a warp copies at a time, in units of 16 bytes a lane.
constexpr int UNIT = 32 * 16;
constexpr int X_UNITS = sizeof(X) / 2;
constexpr int X_FIRST = 4 * MTILES;
constexpr int NORM_FIRST = X_FIRST + 2 * NTILES * X_UNITS;
constexpr int UNITS = NORM_FIRST + (NORM ? 2 : 0);

constexpr int PITCH = OUTS + 4;  // spreads a warp's sums over the banks
constexpr int RING_BYTES = STAGES * WARPS * UNITS * UNIT;

__device__ __forceinline__ void copy_async(unsigned target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load_unit(unsigned source) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(source));
  return v;
}

__device__ __forceinline__ void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                             unsigned a3, unsigned b0, unsigned b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                             unsigned a3, unsigned b0, unsigned b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// --- clusters -----------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
#else
  return 1;
#endif
}

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned n;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
  return n;
#else
  return 0;
#endif
}

__device__ __forceinline__ void cluster_barrier(int size) {
#if __CUDA_ARCH__ >= 900
  if (size > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// A float of another block's shared memory, at the address it has in this block's.
__device__ __forceinline__ float load_from(unsigned source, int rank) {
  float v;
#if __CUDA_ARCH__ >= 900
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(source), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
#else
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(source) : "memory");
#endif
  return v;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, NTILES > 2 ? 1 : 2)
    few_rows(const T* weight, const X* x, const T* norm, const T* bias, const Y* residual, Y* y,
             int in, int out, int rows, long long x_stride, long long residual_stride, float eps,
             int gate, int weights_ahead) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const unsigned ring = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const unsigned own = ring + warp * UNITS * UNIT + lane * 16;
  const unsigned sums = ring + RING_BYTES;

  const int splits = cluster_size(), split = cluster_rank();
  const int results = GATED ? out / 2 : out;
  const int tiles = (results + RESULTS - 1) / RESULTS;
  const int first = blockIdx.x / splits, stride = gridDim.x / splits;
  const int rounds = (in + CHUNK * WARPS * splits - 1) / (CHUNK * WARPS * splits);
  const int steps = first < tiles ? ((tiles - first + stride - 1) / stride) * rounds : 0;

  let_next_kernel_start();

  // Copies of step i: its tile, and this thread's place in `in`.
  const auto place = [&](int step) {
    return ((step % rounds * splits + split) * WARPS + warp) * CHUNK + quad * 8;
  };
  const auto copy_weight = [&](int step) {
    const int tile = first + step / rounds * stride;
    const int at = place(step);
    const unsigned target = own + step % STAGES * (WARPS * UNITS * UNIT);
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = half * 8 + group;
        if (GATED) {
          row += (tile * (MTILES / 2) + m / 2) * 16;
          row = min(row, results - 1) + m % 2 * results;
        } else {
          row = min(row + (tile * MTILES + m) * 16, out - 1);
        }
        const T* source = weight + static_cast<long long>(row) * in;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int k = at + h * 32;
          copy_async(target + (m * 4 + half * 2 + h) * UNIT, source + (k < in ? k : 0), k < in);
        }
      }
    }
    if (NORM) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int k = at + h * 32;
        copy_async(target + (NORM_FIRST + h) * UNIT, norm + (k < in ? k : 0), k < in);
      }
    }
  };
  const auto copy_x = [&](int step) {
    const int at = place(step);
    const unsigned target = own + step % STAGES * (WARPS * UNITS * UNIT) + X_FIRST * UNIT;
#pragma unroll
    for (int n = 0; n < NTILES; n++) {
      const int row = n * 8 + group;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int k = at + h * 32;
        const bool valid = row < rows && k < in;
        const X* source = x + (valid ? row * x_stride + k : 0);
#pragma unroll
        for (int u = 0; u < X_UNITS; u++)
          copy_async(target + ((n * 2 + h) * X_UNITS + u) * UNIT, source + u * (16 / sizeof(X)),
                     valid);
      }
    }
  };

  if (weights_ahead) {
#pragma unroll
    for (int s = 0; s < STAGES; s++)
      if (s < steps) copy_weight(s);
    wait_for_previous_kernel();
  } else {
    wait_for_previous_kernel();
  }
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    if (s < steps) {
      if (!weights_ahead) copy_weight(s);
      copy_x(s);
    }
    commit_copies();
  }

  float scale[NTILES];
  if (NORM) {
    // Sums of squares of x's rows, from all of the block's threads; `sums` is free as yet.
    float* partial = reinterpret_cast<float*>(shared + RING_BYTES);
    for (int row = 0; row < rows; row++) {
      float sum = 0.0f;
#pragma unroll 4
      for (int k = threadIdx.x * 8; k < in; k += THREADS * 8) {
        const auto values = *reinterpret_cast<const Pack<X, 8>*>(x + row * x_stride + k);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += to_float(values.at[j]) * to_float(values.at[j]);
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
      if (lane == 0) partial[row * WARPS + warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < NTILES; n++) {
      float sum = 0.0f;
      if (n * 8 + group < rows) {
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[(n * 8 + group) * WARPS + w];
      }
      scale[n] = 1.0f / sqrtf(sum / in + eps);
    }
    __syncthreads();
  }

  float acc[MTILES][NTILES][4] = {};
  for (int step = 0; step < steps; step++) {
    wait_for_copies<STAGES - 1>();
    const unsigned source = own + step % STAGES * (WARPS * UNITS * UNIT);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4 b[NTILES];
#pragma unroll
      for (int n = 0; n < NTILES; n++) {
        const unsigned unit = source + (X_FIRST + (n * 2 + h) * X_UNITS) * UNIT;
        if (!NORM) {
          b[n] = load_unit(unit);
          continue;
        }
        const uint4 factors = load_unit(source + (NORM_FIRST + h) * UNIT);
        const T* factor = reinterpret_cast<const T*>(&factors);
        uint4 raw[X_UNITS];
#pragma unroll
        for (int u = 0; u < X_UNITS; u++) raw[u] = load_unit(unit + u * UNIT);
        const X* value = reinterpret_cast<const X*>(raw);
        T* normed = reinterpret_cast<T*>(&b[n]);
#pragma unroll
        for (int j = 0; j < 8; j++)
          normed[j] = from_float<T>(to_float(value[j]) * scale[n] * to_float(factor[j]));
      }
#pragma unroll
      for (int m = 0; m < MTILES; m++) {
        const uint4 low = load_unit(source + (m * 4 + h) * UNIT);
        const uint4 high = load_unit(source + (m * 4 + 2 + h) * UNIT);
#pragma unroll
        for (int n = 0; n < NTILES; n++) {
          multiply_add(acc[m][n], low.x, high.x, low.y, high.y, b[n].x, b[n].y, T());
          multiply_add(acc[m][n], low.z, high.z, low.w, high.w, b[n].z, b[n].w, T());
        }
      }
    }
    if (step + STAGES < steps) {
      copy_weight(step + STAGES);
      copy_x(step + STAGES);
    }
    commit_copies();
    if ((step + 1) % rounds != 0) continue;

    // The tile is whole: add up what warps and blocks have of it.
    const int tile = first + step / rounds * stride;
    const unsigned mine = sums + (warp * ROWS * PITCH + quad * 2 * PITCH + group) * 4;
#pragma unroll
    for (int m = 0; m < MTILES; m++) {
#pragma unroll
      for (int n = 0; n < NTILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int at = (n * 8 + i % 2) * PITCH + m * 16 + i / 2 * 8;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(mine + at * 4), "f"(acc[m][n][i]) : "memory");
          acc[m][n][i] = 0.0f;
        }
      }
    }
    cluster_barrier(splits);
    const auto total = [&](int row, int at) {
      float sum = 0.0f;
      for (int rank = 0; rank < splits; rank++) {
#pragma unroll
        for (int w = 0; w < WARPS; w++)
          sum += load_from(sums + ((w * ROWS + row) * PITCH + at) * 4, rank);
      }
      return sum;
    };
    for (int i = split * THREADS + threadIdx.x; i < rows * RESULTS; i += splits * THREADS) {
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
      y[static_cast<long long>(row) * results + result] = from_float<Y>(value);
    }
    cluster_barrier(splits);
  }
}
