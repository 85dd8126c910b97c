// Sums over the threads of a warp or a block, which all of them get.
#pragma once

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

// The sum of one value a thread, over the block. Each call has a scratch of its own.
__device__ __forceinline__ float block_sum(float value, float (&scratch)[32]) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  value = warp_sum(value);
  if (warps == 1) return value;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
