// The sum of every rank's array, over memory that the ranks' GPUs map from one another.
//
// One shot: a rank writes its array into each other rank's memory, waits until all have done the
// same, and adds up what lies in its own memory, in rank order, so that every rank gets the same
// bits. Block i speaks to block i of the other ranks only.
//
// How a rank knows that all is there: `all_reduce` tells the others once it has written, which takes
// a fence over all GPUs between the two. `all_reduce_small` writes twice the bytes instead, each four
// beside the call's number in one access of eight, so that whoever reads the eight sees whether the
// four are new (as NCCL's protocol LL does): nothing is waited for but the bytes themselves.
// `all_reduce_norm` is a small call as well, a block a row, which goes on with what follows a sum.
//
// ELEMENT: element type; STREAM: of the residual stream. RANKS: how many there are. BLOCKS: the most
// blocks of a launch, all of which have to fit on a GPU at once. SHARE: bytes that a block handles at
// most, a multiple of 16; PACKS: 16 bytes each, that a block of a small call does, no fewer than it
// has threads.
//
// A rank's memory, zeros at first:
//   arrived      uint32 [RANKS][BLOCKS]             the last call for which that rank has written
//   calls        uint32 [BLOCKS]                    calls that this rank's block has made
//   data         [2][RANKS][BLOCKS][SHARE bytes]    what was written, by call in turn
//   small calls  uint32 [BLOCKS]                    the same two of small calls
//   lines        uint4 [2][RANKS][BLOCKS][2][PACKS]
// Two turns do: whoever writes for call n + 2 has heard of call n + 1 from every rank, which each
// began after it had read all of call n. A line is as old as its block's last call but one, or as the
// last that was as long: only one of exactly 2^32 calls ago would be taken for new.
#include "block_sum.cuh"
#include "common.cuh"

static_assert(SHARE % 16 == 0 && BLOCKS % 4 == 0, "what follows has to be aligned");

using T = ELEMENT;
constexpr int VEC = 16 / sizeof(T);
using Elements = Pack<T, VEC>;

struct Peers {
  char* at[RANKS];
};

__device__ __forceinline__ unsigned* arrived(char* memory, int rank, int block) {
  return reinterpret_cast<unsigned*>(memory) + rank * BLOCKS + block;
}

__device__ __forceinline__ unsigned* calls(char* memory, int block) {
  return reinterpret_cast<unsigned*>(memory) + RANKS * BLOCKS + block;
}

constexpr long long DATA_AT = (RANKS + 1) * BLOCKS * 4;
constexpr long long SMALL_CALLS_AT = DATA_AT + 2ll * RANKS * BLOCKS * SHARE;
constexpr long long LINES_AT = SMALL_CALLS_AT + BLOCKS * 4;

// The number of a block's part of what a rank wrote in a turn.
__device__ __forceinline__ long long part(unsigned turn, int rank, int block) {
  return ((long long)turn * RANKS + rank) * BLOCKS + block;
}

__device__ __forceinline__ uint4* data(char* memory, unsigned turn, int rank, int block) {
  return reinterpret_cast<uint4*>(memory + DATA_AT + part(turn, rank, block) * SHARE);
}

__device__ __forceinline__ unsigned* small_calls(char* memory, int block) {
  return reinterpret_cast<unsigned*>(memory + SMALL_CALLS_AT) + block;
}

// Where a pack's first 8 bytes lie; the others PACKS lines further, so that a warp's are together.
__device__ __forceinline__ uint4* line(char* memory, unsigned turn, int rank, int block, int pack) {
  return reinterpret_cast<uint4*>(memory + LINES_AT) + part(turn, rank, block) * 2 * PACKS + pack;
}

__device__ __forceinline__ void tell(unsigned* at, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned ask(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// Looks for others' bytes between two at the host's word to stop: some milliseconds. Such a look is a
// trip over PCIe for each warp, half a millisecond for all of a large call's; had they come sooner,
// ranks would keep each other waiting in turn.
constexpr unsigned LOOK_AWAY = 4096;

__device__ __forceinline__ bool stopped(const unsigned* stop) {
  return *reinterpret_cast<const volatile unsigned*>(stop);
}

// Two accesses of 8 bytes, each whole or not at all: four of data below the call's number.
__device__ __forceinline__ void write_line(uint4* at, unsigned one, unsigned other, unsigned call) {
  const unsigned long long high = (unsigned long long)call << 32;
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(at), "l"(high | one),
               "l"(high | other)
               : "memory");
}

// Whether a line is the call's; its data in `one` and `other`.
__device__ __forceinline__ bool read_line(const uint4* at, unsigned call, unsigned& one,
                                          unsigned& other) {
  unsigned long long low, high;
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(low), "=l"(high)
               : "l"(at)
               : "memory");
  one = (unsigned)low, other = (unsigned)high;
  return (unsigned)(low >> 32) == call && (unsigned)(high >> 32) == call;
}

__device__ __forceinline__ void write_pack(uint4* at, const uint4& pack, unsigned call) {
  write_line(at, pack.x, pack.y, call);
  write_line(at + PACKS, pack.z, pack.w, call);
}

// A pack of the call's, once it is there.
__device__ __forceinline__ uint4 read_pack(const uint4* at, unsigned call, const unsigned* stop) {
  uint4 pack;
  for (unsigned spins = 1;; spins++) {
    const bool low = read_line(at, call, pack.x, pack.y);
    const bool high = read_line(at + PACKS, call, pack.z, pack.w);
    if ((low && high) || (spins % LOOK_AWAY == 0 && stopped(stop))) return pack;
  }
}

__device__ __forceinline__ void add(float (&sum)[VEC], const uint4& pack) {
  const auto& elements = reinterpret_cast<const Elements&>(pack);
#pragma unroll
  for (int j = 0; j < VEC; j++) sum[j] += to_float(elements.at[j]);
}

__device__ __forceinline__ uint4 rounded(const float (&sum)[VEC]) {
  Elements total;
#pragma unroll
  for (int j = 0; j < VEC; j++) total.at[j] = from_float<T>(sum[j]);
  return reinterpret_cast<const uint4&>(total);
}

// The sum of every rank's pack `own`, which block and pack number name alike on all of them.
__device__ __forceinline__ uint4 sum_of(const uint4& own, int pack, const Peers& peers, int rank,
                                        unsigned call, const unsigned* stop) {
  const int block = blockIdx.x;
  const unsigned turn = call & 1;
#pragma unroll
  for (int peer = 0; peer < RANKS; peer++)
    if (peer != rank) write_pack(line(peers.at[peer], turn, rank, block, pack), own, call);
  float sum[VEC] = {};
#pragma unroll
  for (int from = 0; from < RANKS; from++)
    add(sum, from == rank ? own
                          : read_pack(line(peers.at[rank], turn, from, block, pack), call, stop));
  return rounded(sum);
}

// One pack a thread, and no block without any. Otherwise as all_reduce.
extern "C" __global__ void all_reduce_small(const uint4* x, uint4* out, int packs, Peers peers,
                                            int rank, const unsigned* stop) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  unsigned* const calls = small_calls(peers.at[rank], blockIdx.x);
  const unsigned call = __ldcg(calls) + 1;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < packs) out[i] = sum_of(x[i], threadIdx.x, peers, rank, call, stop);
  __syncthreads();  // all threads have read the calls
  if (threadIdx.x == 0) *calls = call;
}

__device__ __forceinline__ void unpack(float (&to)[VEC], const uint4& pack) {
  const auto& elements = reinterpret_cast<const Elements&>(pack);
#pragma unroll
  for (int j = 0; j < VEC; j++) to[j] = to_float(elements.at[j]);
}

__device__ __forceinline__ float squares(const float (&row)[VEC]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < VEC; j++) sum += row[j] * row[j];
  return sum;
}

// sum: of every rank's delta, in T. total = x + sum, or x + sum / rms(sum) * delta_weight;
// y = total / rms(total) * weight. A block a row of n elements, of which a thread has one pack.
extern "C" __global__ void __launch_bounds__(PACKS)
    all_reduce_norm(const STREAM* x, const uint4* delta, const uint4* delta_weight,
                    const uint4* weight, STREAM* total, uint4* y, int n, long long x_stride,
                    float eps, Peers peers, int rank, const unsigned* stop) {
  using Stream = Pack<STREAM, VEC>;
  __shared__ float scratch[2][32];
  const int thread = threadIdx.x, packs = n / VEC;
  const bool any = thread < packs;
  uint4 own, scale, delta_scale;
  if (any) {
    scale = weight[thread];
    if (delta_weight != nullptr) delta_scale = delta_weight[thread];
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  unsigned* const calls = small_calls(peers.at[rank], blockIdx.x);
  const unsigned call = __ldcg(calls) + 1;
  const long long row = blockIdx.x, i = row * packs + thread;
  Stream base;
  float values[VEC] = {};
  if (any) {
    own = delta[i];
    base = *reinterpret_cast<const Stream*>(x + row * x_stride + thread * VEC);
    unpack(values, sum_of(own, thread, peers, rank, call, stop));
  }
  __syncthreads();  // all threads have read the calls
  if (thread == 0) *calls = call;

  if (delta_weight != nullptr) {
    const float by = rsqrtf(block_sum(squares(values), scratch[0]) / n + eps);
    if (any) {
      float factors[VEC];
      unpack(factors, delta_scale);
#pragma unroll
      for (int j = 0; j < VEC; j++) values[j] = values[j] * by * factors[j];
    }
  }
  if (any) {
#pragma unroll
    for (int j = 0; j < VEC; j++) {
      base.at[j] = from_float<STREAM>(to_float(base.at[j]) + values[j]);
      values[j] = to_float(base.at[j]);
    }
    *reinterpret_cast<Stream*>(total + row * n + thread * VEC) = base;
  }
  const float by = rsqrtf(block_sum(squares(values), scratch[1]) / n + eps);
  if (any) {
    float factors[VEC];
    unpack(factors, scale);
#pragma unroll
    for (int j = 0; j < VEC; j++) values[j] = values[j] * by * factors[j];
    y[i] = rounded(values);
  }
}

// x, out: `packs` times 16 bytes. `stop`, in the host's memory: once it is not 0, nobody is waited
// for any more and what comes out is worth nothing.
extern "C" __global__ void all_reduce(const uint4* x, uint4* out, int packs, Peers peers, int rank,
                                      const unsigned* stop) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int block = blockIdx.x, thread = threadIdx.x;
  const int share = (packs + gridDim.x - 1) / gridDim.x;
  const int first = block * share, end = min(packs, first + share);
  char* const mine = peers.at[rank];
  const unsigned call = __ldcg(calls(mine, block)) + 1;
  const unsigned turn = call & 1;

  for (int i = first + thread; i < end; i += blockDim.x) {
    const uint4 pack = x[i];
#pragma unroll
    for (int peer = 0; peer < RANKS; peer++)
      if (peer != rank) data(peers.at[peer], turn, rank, block)[i - first] = pack;
  }
  __threadfence_system();
  __syncthreads();  // also: all threads have read `calls`
  if (thread == 0) *calls(mine, block) = call;
  if (thread < RANKS && thread != rank) {
    tell(arrived(peers.at[thread], rank, block), call);
    const unsigned* told = arrived(mine, thread, block);
    // One that is ahead has told of its next call already.
    for (unsigned spins = 1; int(ask(told) - call) < 0; spins++)
      if (spins % LOOK_AWAY == 0 && stopped(stop)) break;
  }
  __syncthreads();

  for (int i = first + thread; i < end; i += blockDim.x) {
    float sum[VEC] = {};
#pragma unroll
    for (int from = 0; from < RANKS; from++)
      // Not by the first-level cache, which others' writes do not reach.
      add(sum, from == rank ? x[i] : __ldcg(data(mine, turn, from, block) + (i - first)));
    out[i] = rounded(sum);
  }
}
