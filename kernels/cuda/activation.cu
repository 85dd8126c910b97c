// Elementwise: y = residual + f(x + bias), where f is an activation, a gate, both or neither.
//
// INPUT: element type of x and bias; OUTPUT: of residual and result. KIND: the activation, 0 for none;
// GATED: x has twice the columns, f(first half) * second half. VEC: elements a thread moves at once.
#include "activation.cuh"
#include "common.cuh"

using T = INPUT;
using Y = OUTPUT;

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
  const unsigned across = columns / VEC;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < packs; i += gridDim.x * blockDim.x) {
    const unsigned row = i / across, column = i % across * VEC;
    const T* source = x + row * x_stride + column;
    const auto values = *reinterpret_cast<const Pack<T, VEC>*>(source);
    float result[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) result[j] = to_float(values.at[j]);
    if (bias != nullptr) {
      const auto more = *reinterpret_cast<const Pack<T, VEC>*>(bias + column);
#pragma unroll
      for (int j = 0; j < VEC; j++) result[j] += to_float(more.at[j]);
    }
#pragma unroll
    for (int j = 0; j < VEC; j++) result[j] = activate<KIND>(result[j], cap);
    if (GATED) {
      const auto up = *reinterpret_cast<const Pack<T, VEC>*>(source + columns);
      Pack<T, VEC> more = {};
      if (bias != nullptr)
        more = *reinterpret_cast<const Pack<T, VEC>*>(bias + columns + column);
#pragma unroll
      for (int j = 0; j < VEC; j++) {
        const float shift = bias != nullptr ? to_float(more.at[j]) : 0.0f;
        result[j] *= to_float(up.at[j]) + shift;
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
