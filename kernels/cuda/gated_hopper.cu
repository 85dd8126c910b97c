// A gated product for Hopper: y = act(x G^T) * (x U^T), weight [2 results, in] row-major, G's rows
// before U's.
//
// A block makes a tile of ROWS rows of x by OUTS / 2 results, of OUTS outputs: those that gate and
// those that are gated. Its first thread copies chunks of 64 columns of x and weight, by TMA, to a
// ring in shared memory; warpgroups multiply them (wgmma) and keep the sums in registers, where a
// thread has what gates its outputs. As far as the ring goes, the weight comes ahead of the kernel
// before this one. Blocks of the same results follow each other: they find the weight in the L2
// cache.
//
// ELEMENT: type of all, MMA_TYPE its name in PTX. STAGES: of the ring.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "activation.cuh"
#include "hopper.cuh"

namespace {

using T = ELEMENT;

constexpr int CHUNK = 64;
constexpr int LINE = CHUNK * 2;  // bytes of a row in shared memory, swizzled
constexpr int STEP = 16 * 2;     // bytes of a row that one product takes

constexpr int CONSUMERS = ROWS == 64 ? 1 : 2;  // warpgroups that multiply
constexpr int BANDS = ROWS / 64 / CONSUMERS;   // of 64 rows, that one of them has
constexpr int CONSUMING_THREADS = CONSUMERS * WARPGROUP;
static_assert(ROWS == 64 * CONSUMERS * BANDS && BANDS <= 2);

constexpr int RESULTS = OUTS / 2;
static_assert(OUTS % 16 == 0, "the swizzle repeats every 8 rows, and results are stored by 8");
constexpr int X_BYTES = ROWS * LINE;
constexpr int STAGE_BYTES = X_BYTES + OUTS * LINE;
constexpr int BARRIERS_AT = STAGES * STAGE_BYTES;
static_assert(STAGES >= 2 && BARRIERS_AT + 16 * STAGES + 1024 <= 227 * 1024);

// Results leave registers through shared memory, in the ring's place.
constexpr int PITCH = RESULTS + 8;
constexpr int PACK = 8;  // results that a thread stores at a time
static_assert(ROWS * PITCH * 2 <= BARRIERS_AT);

// Copy a chunk of the weight. The stage is full once its part of x is there, too.
__device__ __forceinline__ void copy_weight(unsigned char* ring, Barrier* full,
                                            const TensorMap& map, int chunk, int stage,
                                            int first_result, int results,
                                            unsigned long long policy) {
  unsigned char* const to = ring + stage * STAGE_BYTES + X_BYTES;
  arrive_expecting(full[stage], STAGE_BYTES);
  copy_box(to, map, full[stage], chunk * CHUNK, first_result, policy);
  copy_box(to + RESULTS * LINE, map, full[stage], chunk * CHUNK, results + first_result, policy);
}

// Multiply the chunks as they come, then leave the tile's results in the ring's place.
__device__ __forceinline__ void multiply(unsigned char* ring, Barrier* full, Barrier* empty,
                                         int chunks, int gate) {
  const int warpgroup = threadIdx.x / WARPGROUP - 1;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float sums[BANDS][OUTS / 2];
#pragma unroll
  for (int m = 0; m < BANDS; m++) {
#pragma unroll
    for (int i = 0; i < OUTS / 2; i++) sums[m][i] = 0.0f;
  }
  int stage = 0, parity = 0, previous = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    wait(full[stage], parity);
    const unsigned address = shared_address(ring) + stage * STAGE_BYTES;
    const unsigned long long a = descriptor(address + warpgroup * BANDS * 64 * LINE, 0);
    const unsigned long long b = descriptor(address + X_BYTES, 0);
    begin_products();
#pragma unroll
    for (int k = 0; k < LINE / STEP; k++) {
#pragma unroll
      for (int m = 0; m < BANDS; m++)
        multiply_rows<OUTS>(sums[m], a + ((m * 64 * LINE + k * STEP) >> 4), b + (k * STEP >> 4),
                            true);
    }
    commit_products();
    wait_for_products<1>();  // of the chunk before
    if (chunk > 0 && lane == 0) arrive(empty[previous]);
    previous = stage;
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
  wait_for_products<0>();
#pragma unroll
  for (int m = 0; m < BANDS; m++) hold(sums[m]);

  synchronize_threads<1, CONSUMING_THREADS>();  // nobody reads the ring any more
  T* const tile = reinterpret_cast<T*>(ring);
#pragma unroll
  for (int m = 0; m < BANDS; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = (warpgroup * BANDS + m) * 64 + warp * 16 + half * 8 + lane / 4;
      T* const to = tile + row * PITCH + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < RESULTS / 8; n++) {
        Pack<T, 2> pair;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float x = sums[m][4 * n + 2 * half + j];
          const float up = sums[m][4 * (n + RESULTS / 8) + 2 * half + j];
          pair.at[j] = from_float<T>((gate == SILU ? silu(x) : gelu_tanh(x)) * up);
        }
        *reinterpret_cast<Pack<T, 2>*>(to + n * 8) = pair;
      }
    }
  }
}

__device__ __forceinline__ void store(const unsigned char* ring, T* y, int first_row, int rows,
                                      int first_result, int results) {
  const T* const tile = reinterpret_cast<const T*>(ring);
  constexpr int ACROSS = RESULTS / PACK;
  for (int i = threadIdx.x - WARPGROUP; i < ROWS * ACROSS; i += CONSUMING_THREADS) {
    const int in_tile = i / ACROSS, column = i % ACROSS * PACK;
    const int row = first_row + in_tile, result = first_result + column;
    if (row < rows && result < results)
      *reinterpret_cast<Pack<T, PACK>*>(y + static_cast<long long>(row) * results + result) =
          *reinterpret_cast<const Pack<T, PACK>*>(tile + in_tile * PITCH + column);
  }
}

}  // namespace

// `results` is a multiple of 8. Blocks: one a tile.
extern "C" __global__ void __launch_bounds__(WARPGROUP * (CONSUMERS + 1), 1)
    gated_product(const __grid_constant__ TensorMap x_map,
                  const __grid_constant__ TensorMap weight_map, T* y, int inner, int results,
                  int rows, int gate, int weight_ahead) {
  extern __shared__ unsigned char memory[];
  // TMA's swizzle repeats every 1024 bytes.
  unsigned char* const ring = memory + (1024 - shared_address(memory) % 1024) % 1024;
  Barrier* const full = reinterpret_cast<Barrier*>(ring + BARRIERS_AT);
  Barrier* const empty = full + STAGES;

  const int row_tiles = (rows + ROWS - 1) / ROWS;
  const int first_row = static_cast<int>(blockIdx.x) % row_tiles * ROWS;
  const int first_result = static_cast<int>(blockIdx.x) / row_tiles * RESULTS;
  const int chunks = (inner + CHUNK - 1) / CHUNK;
  const int ahead = weight_ahead ? min(chunks, STAGES) : 0;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      initialize(full[i], 1);
      initialize(empty[i], CONSUMING_THREADS / 32);
    }
    publish_barriers();
    prefetch(x_map);
#pragma unroll 1
    for (int chunk = 0; chunk < ahead; chunk++)
      copy_weight(ring, full, weight_map, chunk, chunk, first_result, results, read_once());
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    if constexpr (CONSUMERS == 2) keep_registers<24>();
    if (threadIdx.x == 0) {
      wait_for_previous_kernel();
      const unsigned long long policy = read_once();
      int stage = 0, parity = 0;
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; chunk++) {
        if (chunk >= ahead) {
          wait(empty[stage], parity ^ 1);
          copy_weight(ring, full, weight_map, chunk, stage, first_result, results, policy);
        }
        copy_box(ring + stage * STAGE_BYTES, x_map, full[stage], chunk * CHUNK, first_row);
        if (++stage == STAGES) {
          stage = 0;
          parity ^= 1;
        }
      }
      let_next_kernel_start();
    }
  } else {
    if constexpr (CONSUMERS == 2) take_registers<240>();
    wait_for_previous_kernel();
    multiply(ring, full, empty, chunks, gate);
    synchronize_threads<1, CONSUMING_THREADS>();
    store(ring, y, first_row, rows, first_result, results);
  }
}
#endif
