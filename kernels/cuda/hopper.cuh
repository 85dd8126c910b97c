// What Hopper's kernels are made of: barriers in shared memory, copies by the tensor memory
// accelerator (TMA), products of a warpgroup (wgmma). Needs sm_90a.
//
// MMA_TYPE: the name in PTX of the type that is multiplied, f16 or bf16.
#pragma once

#include "async_copy.cuh"
#include "common.cuh"

constexpr int WARPGROUP = 128;  // threads

struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

// --- barriers in shared memory -----------------------------------------------------------------

using Barrier = unsigned long long;

__device__ __forceinline__ void initialize(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait(Barrier& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Barriers just initialized become visible to copies.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// What this thread wrote to shared memory becomes visible to tensor cores and TMA, after a barrier.
__device__ __forceinline__ void publish_to_tensor_cores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// A barrier of a warpgroup.
__device__ __forceinline__ void synchronize_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + warpgroup), "n"(WARPGROUP) : "memory");
}

// A barrier of the first THREADS threads that come to it, warps as a whole; 0 is __syncthreads()'s.
template <int BARRIER, int THREADS>
__device__ __forceinline__ void synchronize_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

// A warpgroup gives registers back, or takes what others gave back: how many a thread has then.
template <int REGISTERS>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- copies by the tensor memory accelerator ---------------------------------------------------

__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, Barrier& barrier, int x,
                                         int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(x), "r"(y), "r"(shared_address(&barrier))
      : "memory");
}
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, Barrier& barrier, int x,
                                         int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(shared_address(&barrier))
      : "memory");
}
// A policy of the L2 cache: what is read goes first. Copies may keep to one.
__device__ __forceinline__ unsigned long long read_once() {
  unsigned long long policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, Barrier& barrier, int x,
                                         int y, unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(x), "r"(y), "r"(shared_address(&barrier)), "l"(policy)
      : "memory");
}
// The map itself, not what it describes.
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// --- products of a warpgroup -------------------------------------------------------------------

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define TYPES ".f32." TEXT(MMA_TYPE) "." TEXT(MMA_TYPE) " "
#define LIST8(a, b, c, d, e, f, g, h) \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define LIST32 LIST8(0, 1, 2, 3, 4, 5, 6, 7) ", " LIST8(8, 9, 10, 11, 12, 13, 14, 15) ", " \
  LIST8(16, 17, 18, 19, 20, 21, 22, 23) ", " LIST8(24, 25, 26, 27, 28, 29, 30, 31)
#define LIST48 LIST32 ", " LIST8(32, 33, 34, 35, 36, 37, 38, 39) ", " \
  LIST8(40, 41, 42, 43, 44, 45, 46, 47)
#define LIST56 LIST48 ", " LIST8(48, 49, 50, 51, 52, 53, 54, 55)
#define LIST64 LIST56 ", " LIST8(56, 57, 58, 59, 60, 61, 62, 63)
#define LIST72 LIST64 ", " LIST8(64, 65, 66, 67, 68, 69, 70, 71)
#define LIST80 LIST72 ", " LIST8(72, 73, 74, 75, 76, 77, 78, 79)
#define LIST88 LIST80 ", " LIST8(80, 81, 82, 83, 84, 85, 86, 87)
#define LIST96 LIST88 ", " LIST8(88, 89, 90, 91, 92, 93, 94, 95)
#define LIST104 LIST96 ", " LIST8(96, 97, 98, 99, 100, 101, 102, 103)
#define LIST112 LIST104 ", " LIST8(104, 105, 106, 107, 108, 109, 110, 111)
#define FLOATS4(c, i) "+f"((c)[i]), "+f"((c)[i + 1]), "+f"((c)[i + 2]), "+f"((c)[i + 3])
#define FLOATS8(c, i) FLOATS4(c, i), FLOATS4(c, i + 4)
#define FLOATS_32(c) FLOATS8(c, 0), FLOATS8(c, 8), FLOATS8(c, 16), FLOATS8(c, 24)
#define FLOATS_48(c) FLOATS_32(c), FLOATS8(c, 32), FLOATS8(c, 40)
#define FLOATS_56(c) FLOATS_48(c), FLOATS8(c, 48)
#define FLOATS_64(c) FLOATS_56(c), FLOATS8(c, 56)
#define FLOATS_72(c) FLOATS_64(c), FLOATS8(c, 64)
#define FLOATS_80(c) FLOATS_72(c), FLOATS8(c, 72)
#define FLOATS_88(c) FLOATS_80(c), FLOATS8(c, 80)
#define FLOATS_96(c) FLOATS_88(c), FLOATS8(c, 88)
#define FLOATS_104(c) FLOATS_96(c), FLOATS8(c, 96)
#define FLOATS_112(c) FLOATS_104(c), FLOATS8(c, 104)
// C: registers a thread has for N columns; A, B, ADD: the numbers of the operands after them.
#define PRODUCT(N, C, A, B, ADD)                                           \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16" TYPES "{" LIST##C \
               "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n}\n"                 \
               : FLOATS_##C(c)                                             \
               : "l"(a), "l"(b), "r"(int(add)))

// c = a b^T, or c += a b^T: a of 64 rows and b of N rows, 16 columns each, both in shared memory.
// A thread has, with g = 16 * (warp % 4) + lane / 4 and j = 2 * (lane % 4), of each 8 columns j and
// the next of row g (c[4 n], c[4 n + 1]) and of row g + 8 (c[4 n + 2], c[4 n + 3]).
template <int N>
__device__ __forceinline__ void multiply_rows(float* c, unsigned long long a, unsigned long long b,
                                              bool add) {
  if constexpr (N == 64) {
    PRODUCT(64, 32, 32, 33, 34);
  } else if constexpr (N == 96) {
    PRODUCT(96, 48, 48, 49, 50);
  } else if constexpr (N == 112) {
    PRODUCT(112, 56, 56, 57, 58);
  } else if constexpr (N == 128) {
    PRODUCT(128, 64, 64, 65, 66);
  } else if constexpr (N == 160) {
    PRODUCT(160, 80, 80, 81, 82);
  } else if constexpr (N == 176) {
    PRODUCT(176, 88, 88, 89, 90);
  } else if constexpr (N == 192) {
    PRODUCT(192, 96, 96, 97, 98);
  } else if constexpr (N == 224) {
    PRODUCT(224, 112, 112, 113, 114);
  } else {
    static_assert(N == 0, "no product of so many columns");
  }
}

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most PENDING groups of products are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler does not know that products write later than they are issued: keep what reads or
// writes these registers on its side of this line.
template <int N>
__device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(unsigned (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

// A matrix in shared memory, 128 bytes a row, swizzled; `stride` bytes from a column of 64 to the
// next, if a product reads across (PTX ISA, "Matrix-descriptor format").
__device__ __forceinline__ unsigned long long descriptor(unsigned address, int stride) {
  return (address & 0x3ffff) >> 4 | static_cast<unsigned long long>(stride >> 4) << 16 |
         (1024ull >> 4) << 32 | 1ull << 62;
}
