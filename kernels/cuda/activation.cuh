// Activations of one value, finite for finite values.
#pragma once

constexpr int SILU = 1;
constexpr int GELU_TANH = 2;
constexpr int SOFTCAP = 3;

// Where the divisor exceeds 2^126 the quotient is 0, which it is within 1e-36.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ __forceinline__ float gelu_tanh(float x) {
  // 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2u)).
  const float u = 0.7978845608028654f * x * (1.0f + 0.044715f * x * x);
  return __fdividef(x, 1.0f + __expf(-2.0f * u));
}
