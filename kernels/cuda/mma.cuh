// Tensor core products of 16-bit types (PTX mma.sync m16n8k16, compute capability 8.0 on), and the
// packing of their operands: two 16-bit elements a register.
#pragma once

#include "common.cuh"

struct FragmentA {
  unsigned x0, x1, x2, x3;
};

// c += a b, over 16 terms. A thread holds, with g = lane / 4 and j = 2 * (lane % 4): of a, rows g
// (x0, x2) and g + 8 (x1, x3), columns j, j + 1 (x0, x1) and j + 8, j + 9 (x2, x3); of b, column g,
// rows j, j + 1 (b0) and j + 8, j + 9 (b1); of c, row g (c[0], c[1]) and g + 8, columns j, j + 1.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], FragmentA a, unsigned b0, unsigned b1);

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], FragmentA a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x0), "r"(a.x1), "r"(a.x2), "r"(a.x3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], FragmentA a, unsigned b0,
                                                   unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x0), "r"(a.x1), "r"(a.x2), "r"(a.x3), "r"(b0), "r"(b1));
}

// Two floats rounded to T, the first in the lower half.
template <typename T>
__device__ __forceinline__ unsigned pair(float first, float second) {
  const Pack<T, 2> both = {from_float<T>(first), from_float<T>(second)};
  return *reinterpret_cast<const unsigned*>(&both);
}

// The transpose of the warp's 8 x 8 matrix: a thread holds row lane / 4, columns 2 * (lane % 4) on.
__device__ __forceinline__ unsigned transpose(unsigned x) {
  unsigned y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

template <typename T>
__device__ __forceinline__ unsigned from_halves(__half2_raw x) {  // exact for what was 8 bits
  const float2 floats = __half22float2(__half2(x));
  return pair<T>(floats.x, floats.y);
}
template <>
__device__ __forceinline__ unsigned from_halves<__half>(__half2_raw x) {
  return *reinterpret_cast<const unsigned*>(&x);
}

// Eight elements as T, two a register: from 16 bytes of T, or 8 bytes of float8_e4m3.
template <typename T>
__device__ __forceinline__ void unpack(const unsigned (&words)[4], unsigned (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = words[i];
}

template <typename T>
__device__ __forceinline__ void unpack(const unsigned (&words)[2], unsigned (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const auto two = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> i % 2 * 16);
    to[i] = from_halves<T>(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3));
  }
}

template <typename T, typename U>
__device__ __forceinline__ void unpack(const Pack<U, 8>& elements, unsigned (&to)[4]) {
  unpack<T>(reinterpret_cast<const unsigned (&)[2 * sizeof(U)]>(elements), to);
}
