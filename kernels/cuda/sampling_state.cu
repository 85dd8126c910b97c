// Changes to the state that sampling.cu reads; kernels/batch_sampling.py says what they are.
//
// BANNED, COUNT, ALLOW: its constants of the same name.
#include "common.cuh"

using u32 = unsigned int;

// Grid (rows): a record of `words` words each.
extern "C" __global__ void set_rows(int* rows, const int* index, const int* records, int words) {
  wait_for_previous_kernel();
  if (threadIdx.x < words) {
    rows[static_cast<long long>(index[blockIdx.x]) * words + threadIdx.x] =
        records[blockIdx.x * words + threadIdx.x];
  }
}

extern "C" __global__ void edit_words(u32* words, const u32* index, const u32* edits, int count) {
  wait_for_previous_kernel();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const u32 edit = edits[i];
    if (edit == ALLOW) atomicAnd(words + index[i], ~static_cast<u32>(BANNED));
    else if (edit > COUNT) atomicOr(words + index[i], edit);
    else atomicAdd(words + index[i], edit);
  }
}

extern "C" __global__ void keep_right(int* index, const int* tokens, const int* drafts, int count) {
  wait_for_previous_kernel();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count && tokens[i] != drafts[i]) index[i] = -1;
}
