// The sum of every rank's array, over memory that the ranks' GPUs map from one another.
//
// One shot: a rank writes its array into each other rank's memory, tells it so, waits until all have
// told it the same, and adds up what lies in its own memory, in rank order, so that every rank gets
// the same bits. Block i speaks to block i of the other ranks only.
//
// ELEMENT: element type. RANKS: how many there are. BLOCKS: the most blocks of a launch, all of which have
// to fit on a GPU at once. SHARE: bytes that a block handles at most, a multiple of 16.
//
// A rank's memory, zeros at first:
//   arrived  uint32 [RANKS][BLOCKS]           the last call for which that rank has written
//   calls    uint32 [BLOCKS]                  calls that this rank's block has made
//   data     [2][RANKS][BLOCKS][SHARE bytes]  what was written, by call in turn
// Two turns do: whoever writes for call n + 2 has heard of call n + 1 from every rank, which each
// began after it had read all of call n.
#include "common.cuh"

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

__device__ __forceinline__ uint4* data(char* memory, unsigned turn, int rank, int block) {
  constexpr long long head = ((RANKS + 1) * BLOCKS * 4 + 15) / 16 * 16;
  const long long share = ((long long)turn * RANKS + rank) * BLOCKS + block;
  return reinterpret_cast<uint4*>(memory + head + share * SHARE);
}

__device__ __forceinline__ void tell(unsigned* at, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned ask(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
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
      if (spins % 256 == 0 && *reinterpret_cast<const volatile unsigned*>(stop)) break;
  }
  __syncthreads();

  for (int i = first + thread; i < end; i += blockDim.x) {
    float sum[VEC] = {};
#pragma unroll
    for (int from = 0; from < RANKS; from++) {
      // Not by the first-level cache, which others' writes do not reach.
      const uint4 pack = from == rank ? x[i] : __ldcg(data(mine, turn, from, block) + (i - first));
      const auto elements = reinterpret_cast<const Elements&>(pack);
#pragma unroll
      for (int j = 0; j < VEC; j++) sum[j] += to_float(elements.at[j]);
    }
    Elements total;
#pragma unroll
    for (int j = 0; j < VEC; j++) total.at[j] = from_float<T>(sum[j]);
    out[i] = reinterpret_cast<const uint4&>(total);
  }
}
