// Rows of a table by index. IN, OUT: element types; VEC: elements a thread moves at once.
#include "common.cuh"

extern "C" __global__ void gather_rows(const IN* table, const int* index, OUT* out, int width,
                                       int table_rows, int first_row) {
  wait_for_previous_kernel();
  const int row = index[blockIdx.x] - first_row;
  const bool inside = row >= 0 && row < table_rows;
  const IN* source = table + static_cast<long long>(inside ? row : 0) * width;
  OUT* target = out + static_cast<long long>(blockIdx.x) * width;
  for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * VEC; i < width;
       i += gridDim.y * blockDim.x * VEC) {
    Pack<OUT, VEC> result;
    if (inside) {
      const auto values = *reinterpret_cast<const Pack<IN, VEC>*>(source + i);
#pragma unroll
      for (int j = 0; j < VEC; j++) result.at[j] = from_float<OUT>(to_float(values.at[j]));
    } else {
#pragma unroll
      for (int j = 0; j < VEC; j++) result.at[j] = from_float<OUT>(0.0f);
    }
    *reinterpret_cast<Pack<OUT, VEC>*>(target + i) = result;
  }
  let_next_kernel_start();
}
