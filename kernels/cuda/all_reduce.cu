// The sum of every rank's array, over memory that the ranks' GPUs map from one another.
//
// One shot: a rank writes its array into each other rank's memory, waits until all have done the
// same, and adds up what lies in its own memory, in rank order, so that every rank gets the same
// bits. Block i speaks to block i of the other ranks only.
//
// How a rank knows that all is there: `all_reduce` tells the others once it has written, which takes
// a fence over all GPUs between the two. `all_reduce_small` writes twice the bytes instead, each four
// beside the call's number, so that whoever reads eight sees whether they are the new ones (as NCCL's
// protocol LL does): nothing is waited for but the bytes themselves.
//
// ELEMENT: element type. RANKS: how many there are. BLOCKS: the most blocks of a launch, all of which
// have to fit on a GPU at once. THREADS: threads of a block. SHARE: bytes that a block handles at
// most, a multiple of 16.
//
// A rank's memory, zeros at first:
//   arrived      uint32 [RANKS][BLOCKS]             the last call for which that rank has written
//   calls        uint32 [BLOCKS]                    calls that this rank's block has made
//   data         [2][RANKS][BLOCKS][SHARE bytes]    what was written, by call in turn
//   small calls  uint32 [BLOCKS]                    the same two of all_reduce_small
//   lines        uint4 [2][RANKS][BLOCKS][THREADS][2]
// Two turns do: whoever writes for call n + 2 has heard of call n + 1 from every rank, which each
// began after it had read all of call n.
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

__device__ __forceinline__ uint4* lines(char* memory, unsigned turn, int rank, int block) {
  return reinterpret_cast<uint4*>(memory + LINES_AT) + part(turn, rank, block) * THREADS * 2;
}

__device__ __forceinline__ void tell(unsigned* at, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned ask(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ bool stopped(const unsigned* stop) {
  return *reinterpret_cast<const volatile unsigned*>(stop);
}

__device__ __forceinline__ void write_line(uint4* at, unsigned one, unsigned other, unsigned call) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(one), "r"(call),
               "r"(other), "r"(call)
               : "memory");
}

__device__ __forceinline__ uint2 read_line(const uint4* at, unsigned call, const unsigned* stop) {
  uint4 line;
  for (unsigned spins = 1;; spins++) {
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
                 : "l"(at)
                 : "memory");
    if (line.y == call && line.w == call) break;
    if (spins % 256 == 0 && stopped(stop)) break;
  }
  return make_uint2(line.x, line.z);
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

// One pack a thread: packs <= gridDim.x * THREADS. Otherwise as all_reduce.
extern "C" __global__ void all_reduce_small(const uint4* x, uint4* out, int packs, Peers peers,
                                            int rank, const unsigned* stop) {
  wait_for_previous_kernel();
  const int block = blockIdx.x, thread = threadIdx.x, i = block * THREADS + thread;
  char* const mine = peers.at[rank];
  const unsigned call = *small_calls(mine, block) + 1;
  const unsigned turn = call & 1;
  if (i < packs) {
    const uint4 own = x[i];
#pragma unroll
    for (int peer = 0; peer < RANKS; peer++) {
      if (peer == rank) continue;
      uint4* const at = lines(peers.at[peer], turn, rank, block) + 2 * thread;
      write_line(at, own.x, own.y, call);
      write_line(at + 1, own.z, own.w, call);
    }
    float sum[VEC] = {};
#pragma unroll
    for (int from = 0; from < RANKS; from++) {
      if (from == rank) {
        add(sum, own);
        continue;
      }
      const uint4* const at = lines(mine, turn, from, block) + 2 * thread;
      const uint2 low = read_line(at, call, stop), high = read_line(at + 1, call, stop);
      add(sum, make_uint4(low.x, low.y, high.x, high.y));
    }
    out[i] = rounded(sum);
  }
  __syncthreads();  // all threads have read the calls
  if (thread == 0) *small_calls(mine, block) = call;
}

// x, out: `packs` times 16 bytes. `stop`, in the host's memory: once it is not 0, nobody is waited
// for any more and what comes out is worth nothing.
extern "C" __global__ void all_reduce(const uint4* x, uint4* out, int packs, Peers peers, int rank,
                                      const unsigned* stop) {
  wait_for_previous_kernel();
  const int block = blockIdx.x, thread = threadIdx.x;
  const int share = (packs + gridDim.x - 1) / gridDim.x;
  const int first = block * share, end = min(packs, first + share);
  char* const mine = peers.at[rank];
  const unsigned call = *calls(mine, block) + 1;
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
      if (spins % 256 == 0 && stopped(stop)) break;
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
