// A step's metadata on the device. See kernels/step.py for the layout of `packed`.
#include "common.cuh"

extern "C" __global__ void update_tables(const int* packed, int* tables) {
  const int count = packed[UPDATES];
  const int* pairs = packed + packed[UPDATES_AT];
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    tables[pairs[2 * i]] = pairs[2 * i + 1];
}

// A block a sequence, then blocks for the padding tokens.
extern "C" __global__ void unpack_step(const int* packed, const int* tables,
                                       const int* last_tokens, int* tokens, int* positions,
                                       long long* slots, int* block_tables, int rows_at,
                                       int starts_at, int lens_at, int groups, int table_rows,
                                       int width, int total_tokens, int seqs,
                                       long long slots_stride, long long block_tables_stride,
                                       int block_size) {
  wait_for_previous_kernel();
  if (blockIdx.x >= seqs) {
    const int first = packed[TOKENS] + (blockIdx.x - seqs) * blockDim.x + threadIdx.x;
    for (int t = first; t < total_tokens; t += (gridDim.x - seqs) * blockDim.x) {
      tokens[t] = 0;
      positions[t] = 0;
      for (int g = 0; g < groups; g++) slots[g * slots_stride + t] = -1;
    }
  } else {
    const int s = blockIdx.x;
    const int row = packed[rows_at + s];
    const int length = packed[lens_at + s];
    const int first = packed[starts_at + s];
    const int count = packed[starts_at + s + 1] - first;
    const int tokens_at = packed[TOKENS_AT];
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int t = first + i;
      const int position = length - count + i;
      const int given = tokens_at < 0 ? -1 : packed[tokens_at + t];
      tokens[t] = given < 0 ? last_tokens[row] : given;
      positions[t] = position;
      for (int g = 0; g < groups; g++) {
        const long long table = (static_cast<long long>(g) * table_rows + row) * width;
        const long long block = tables[table + position / block_size];
        slots[g * slots_stride + t] = block * block_size + position % block_size;
      }
    }
    const int used = (length + block_size - 1) / block_size;
    for (int g = 0; g < groups; g++) {
      const int* source = tables + (static_cast<long long>(g) * table_rows + row) * width;
      int* target = block_tables + g * block_tables_stride + static_cast<long long>(s) * width;
      for (int j = threadIdx.x; j < used; j += blockDim.x) target[j] = source[j];
    }
  }
  let_next_kernel_start();
}
