// Elementwise: y = residual + f(x + bias), where f is an activation, a gate, both or neither.
//
// INPUT: element type of x and bias; OUTPUT: of residual and result. KIND: the activation, 0 for none;
// GATED: x has twice the columns, f(first half) * second half. VEC: elements a thread moves at once.
#include "activation.cuh"
#include "common.cuh"

using T = INPUT;
using Y = OUTPUT;

constexpr int PACKS = 2;  // that a thread has under way

template <int kind>
__device__ __forceinline__ float activate(float x, float cap) {
  if (kind == SILU) return silu(x);
  if (kind == GELU_TANH) return gelu_tanh(x);
  if (kind == SOFTCAP) return cap * tanhf(x / cap);
  return x;
}

extern "C" __global__ void __launch_bounds__(256)
    elementwise(const T* x, const T* bias, const Y* residual, Y* y, int columns, unsigned packs,
                long long x_stride, long long residual_stride, float cap) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const unsigned across = columns / VEC, stride = gridDim.x * blockDim.x;
  for (unsigned first = blockIdx.x * blockDim.x + threadIdx.x; first < packs;
       first += PACKS * stride) {
    // All loads are under way before the first result is made.
    Pack<T, VEC> values[PACKS], ups[PACKS];
    unsigned rows[PACKS], at[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      const unsigned i = first + p * stride;
      if (i >= packs) break;
      rows[p] = i / across;
      at[p] = (i - rows[p] * across) * VEC;
      const T* source = x + rows[p] * x_stride + at[p];
      values[p] = *reinterpret_cast<const Pack<T, VEC>*>(source);
      if (GATED) ups[p] = *reinterpret_cast<const Pack<T, VEC>*>(source + columns);
    }
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      if (first + p * stride >= packs) break;
      const unsigned row = rows[p], column = at[p];
      float result[VEC];
#pragma unroll
      for (int j = 0; j < VEC; j++) result[j] = to_float(values[p].at[j]);
      if (bias != nullptr) {
        const auto more = *reinterpret_cast<const Pack<T, VEC>*>(bias + column);
#pragma unroll
        for (int j = 0; j < VEC; j++) result[j] += to_float(more.at[j]);
      }
#pragma unroll
      for (int j = 0; j < VEC; j++) result[j] = activate<KIND>(result[j], cap);
      if (GATED) {
        Pack<T, VEC> more = {};
        if (bias != nullptr)
          more = *reinterpret_cast<const Pack<T, VEC>*>(bias + columns + column);
#pragma unroll
        for (int j = 0; j < VEC; j++) {
          const float shift = bias != nullptr ? to_float(more.at[j]) : 0.0f;
          result[j] *= to_float(ups[p].at[j]) + shift;
        }
      }
      if (residual != nullptr) {
        const auto base =
            *reinterpret_cast<const Pack<Y, VEC>*>(residual + row * residual_stride + column);
#pragma unroll
        for (int j = 0; j < VEC; j++) result[j] += to_float(base.at[j]);
      }
      Pack<Y, VEC> packed;
#pragma unroll
      for (int j = 0; j < VEC; j++) packed.at[j] = from_float<Y>(result[j]);
      *reinterpret_cast<Pack<Y, VEC>*>(y + static_cast<long long>(row) * columns + column) = packed;
    }
  }
}
