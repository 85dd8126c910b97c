// From logits [rows, vocab] to tokens; kernels/batch_sampling.py says what each kernel does.
//
// LOGIT: the logits' type. BANNED, OK, …: kernels/batch_sampling.py's constants of the same name.
//
// Nothing here sorts a row. A row is cut into slabs of 512 tokens, one warp's load; a first pass
// leaves each slab's maximum and, where needed, its sum of weights. A draw then needs the one slab
// that its cumulative sum falls into. A filter (top-k, top-p) needs the least token that it keeps:
// a histogram over the scores finds the bin that holds it, and either the tokens down to there are
// few, and a sort of them in shared memory settles everything, or those of the bin are, and a last
// pass weighs what is kept. `parts` blocks share a row, and wait for each other at `Worker::sync`:
// the launch must not have more of them than the device runs at once.
//
// Weights are added as integers (units of 2^-44 of the best token's) or in an order fixed by the
// slabs, so that a row's token depends neither on `parts` nor on timing.
#include "common.cuh"

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;                   // consecutive tokens of a lane
constexpr int kVectors = 2;                  // of a lane in a slab
constexpr int kSlab = 32 * kVector * kVectors;
constexpr int kBins = 4 * kThreads;
constexpr int kList = 4 * kThreads;          // tokens that a list holds
constexpr int kHistograms = 3;
constexpr int kLists = 4;
constexpr float kLog2e = 1.4426950408889634f;
constexpr double kUnit = 17592186044416.0;   // 2^44
constexpr u32 kInfinityKey = 0xFF800000u;    // of +inf; those of NaN are above it
constexpr u32 kLowestKey = 0x00800000u;      // of the least finite float; that of -inf is below
constexpr int kGreedyThreads = 256;
constexpr int kGreedyLoads = 4;  // vectors under way at once

struct RowParameters {
  double repetition, frequency, presence, temperature, top_p, min_p;
  u64 seed;
  int top_k, min_tokens, outputs, slot, biased, unused;
};
static_assert(sizeof(RowParameters) == 80, "as ROW in kernels/batch_sampling.py");

// --- arithmetic -------------------------------------------------------------------------------

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xFF800000); }

// NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Keys order as the floats do, with -0 equal to 0 and every NaN of either sign above +inf.
__device__ __forceinline__ u32 key_of(float x) {
  if (x != x) return 0xFFFFFFFFu;
  const u32 bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ __forceinline__ float score_of(u32 key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// A token and its score as one number: the better token has the larger one, of equal scores the
// lower id.
__device__ __forceinline__ u64 place_of(u32 key, int id) {
  return static_cast<u64>(key) << 32 | (0xFFFFFFFFu - static_cast<u32>(id));
}
__device__ __forceinline__ u32 key_at(u64 place) { return static_cast<u32>(place >> 32); }
__device__ __forceinline__ int id_at(u64 place) {
  return static_cast<int>(0xFFFFFFFFu - static_cast<u32>(place));
}

__device__ __forceinline__ int status_of(float best) {
  const u32 key = key_of(best);
  return key >= kInfinityKey ? NOT_FINITE : key < kLowestKey ? ALL_EXCLUDED : OK;
}

// Philox4x32-10 as in kernels/philox.py: 53 random bits, left-aligned in 64.
__device__ __forceinline__ u64 random_bits(u64 seed, u32 position) {
  u32 c0 = position, c1 = 0, c2 = 0, c3 = 0;
  u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const u32 high2 = __umulhi(0xCD9E8D57u, c2), low2 = 0xCD9E8D57u * c2;
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (static_cast<u64>(c0) << 32 | c1) >> 11 << 11;
}

// --- a row's scores ---------------------------------------------------------------------------

// A lane's part of a slab.
struct Vectors {
  Pack<LOGIT, kVector> at[kVectors];
};

struct Scores {
  const LOGIT* logits;
  int vocab;
  bool wide;  // vectors are aligned, and the last one is whole
  // Edits; a row without any has neither words nor mask.
  const u32* words;
  const u32* mask;
  const int* bias_tokens;
  const float* biases;
  int biased;
  u32 held_back;  // words with one of these bits: not to be chosen
  bool penalizes;
  double repetition, frequency, presence;

  __device__ __forceinline__ bool edited() const { return words != nullptr || mask != nullptr; }

  __device__ static int first_token(int slab, int vector) {
    return slab * kSlab + (vector * 32 + threadIdx.x % 32) * kVector;
  }

  // -inf beyond the vocabulary.
  __device__ __forceinline__ void fetch(int first, Pack<LOGIT, kVector>* out) const {
    if (wide && first < vocab) {
      *out = *reinterpret_cast<const Pack<LOGIT, kVector>*>(logits + first);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; i++) {
        out->at[i] = first + i < vocab ? logits[first + i] : from_float<LOGIT>(minus_infinity());
      }
    }
  }
  __device__ __forceinline__ Vectors fetch(int slab) const {
    Vectors found;
#pragma unroll
    for (int v = 0; v < kVectors; v++) fetch(first_token(slab, v), &found.at[v]);
    return found;
  }

  __device__ float bias(int token) const {
    int low = 0, high = biased - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (bias_tokens[middle] < token) low = middle + 1;
      else high = middle;
    }
    return biases[low];
  }

  // In float64 and rounded at each step, as NumPy does it.
  __device__ float penalized(float score, u32 count) const {
    double x = score;
    x = x > 0 ? __ddiv_rn(x, repetition) : __dmul_rn(x, repetition);
    x = __dsub_rn(x, __dmul_rn(frequency, count));
    x = __dsub_rn(x, count ? presence : 0.0);
    return static_cast<float>(x);
  }

  __device__ __noinline__ float edit(float score, int token, u32 word) const {
    if (word & BIASED) score = __fadd_rn(score, bias(token));
    if (word & held_back) score = minus_infinity();
    if (penalizes && word & (SEEN | COUNT)) score = penalized(score, word & COUNT);
    return score;
  }

  // A vector's scores. `slow`: these edits, in memory that a call can take by address.
  __device__ __forceinline__ void apply_edits(int first, float (&scores)[kVector],
                                              const Scores& slow) const {
    if (first >= vocab) return;
    const u32 allowed = mask ? mask[first / 32] >> (first % 32) : ~0u;
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      if (!(allowed >> i & 1)) scores[i] = minus_infinity();
    }
    if (!words) return;
    Pack<u32, kVector> own;
    if (wide) {
      own = *reinterpret_cast<const Pack<u32, kVector>*>(words + first);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; i++) own.at[i] = first + i < vocab ? words[first + i] : 0;
    }
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      if (own.at[i]) scores[i] = slow.edit(scores[i], first + i, own.at[i]);
    }
  }
};

// --- a warp's and a block's work --------------------------------------------------------------

__device__ __forceinline__ u64 warp_inclusive(u64 value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 other = __shfl_up_sync(0xFFFFFFFFu, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

__device__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step; step /= 2) {
    value = max_or_nan(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
  }
  return value;
}

__device__ __forceinline__ void add_wide(u32* low, u32* high, u64 value) {
  const u32 part = static_cast<u32>(value);
  const u32 before = atomicAdd(low, part);
  const u32 rest = static_cast<u32>(value >> 32) + (before + part < before);
  if (rest) atomicAdd(high, rest);
}

// Sorts the first `size` places of the list, a power of two from 64 on, the largest first.
__device__ __noinline__ void sort_list(u64* list, int size) {
  for (int width = 2; width <= size; width *= 2) {
    for (int stride = width / 2; stride; stride /= 2) {
      for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const int i = 2 * pair - pair % stride, j = i + stride;
        const u64 a = list[i], b = list[j];
        if ((a < b) == !(i & width)) {
          list[i] = b;
          list[j] = a;
        }
      }
      // 32 pairs at a stride up to 32 are 64 neighbours: a warp's own until the next wide stride.
      const int next = stride > 1 ? stride / 2 : width;
      if (stride > 32 || next > 32) __syncthreads();
      else __syncwarp();
    }
  }
  __syncthreads();
}

// --- a row's workspace, in device memory ------------------------------------------------------

struct Workspace {
  float *slab_max, *slab_raw, *slab_sum;
  u64 *slab_mass, *list, *bin_mass;
  u32 *bin_count, *list_count, *rank, *arrived, *left;

  __device__ void divide(unsigned char* base, int slabs) {
    slab_mass = reinterpret_cast<u64*>(base);
    list = slab_mass + slabs;
    bin_mass = list + kList;
    bin_count = reinterpret_cast<u32*>(bin_mass + kHistograms * kBins);
    list_count = bin_count + kHistograms * kBins;
    rank = list_count + kLists;
    arrived = rank + 1;  // 0 between launches, like the next
    left = arrived + 1;
    slab_max = reinterpret_cast<float*>(left + 2);
    slab_raw = slab_max + slabs;
    slab_sum = slab_raw + slabs;
  }
};

// --- the blocks of a row ----------------------------------------------------------------------

// How a histogram divides scores: evenly from `best` down to `floor`, or evenly by key from `high`
// down to `low`. Bin 0 has the best; -1: outside.
struct Bins {
  bool by_key;
  float best, floor, scale;
  u32 low, high;
  int shift;

  __device__ __forceinline__ int of(float score) const {
    if (by_key) {
      const u32 key = key_of(score);
      return key < low || key > high ? -1 : static_cast<int>((high - key) >> shift);
    }
    if (!(score >= floor)) return -1;
    return min(__float2int_rz((best - score) * scale), kBins - 1);
  }

  __device__ static Bins down_to(float best, float floor) {
    const float scale = (kBins - 1) / (best - floor);
    // A range too wide or too narrow for a float goes into one bin, which is then divided by key.
    return Bins{false, best, floor, scale < 1e30f ? scale : 0.0f, 0, 0, 0};
  }

  __device__ static Bins between(u32 low, u32 high) {
    const u32 range = high - low;
    return Bins{true, 0, 0, 0, low, high, max(0, 21 - __clz(range))};
  }

  // The keys of one bin.
  __device__ void limits(int bin, u32* lowest, u32* highest) const {
    if (by_key) {
      *highest = high - (static_cast<u32>(bin) << shift);
      const u32 width = (1u << shift) - 1;
      *lowest = *highest - low < width ? low : *highest - width;
      return;
    }
    u32 low_key = key_of(floor), high_key = key_of(best);
    *lowest = first_key(low_key, high_key, bin);
    *highest = bin ? first_key(low_key, high_key, bin - 1) - 1 : high_key;
  }

  // The least key in [low, high] whose bin is at most `bin`, that of `high` being so. A whole warp
  // looks: each lane at one of 32 places.
  __device__ __noinline__ u32 first_key(u32 low_key, u32 high_key, int bin) const {
    while (low_key < high_key) {
      const u32 step = (high_key - low_key) / 32 + 1;
      const u32 offset = step * (threadIdx.x % 32);
      const u32 key = offset < high_key - low_key ? low_key + offset : high_key;
      const u32 inside = __ballot_sync(0xFFFFFFFFu, of(score_of(key)) <= bin);
      const int first = inside ? __ffs(inside) - 1 : 32;
      const u32 end = low_key + step * first;
      if (first == 0) return low_key;
      if (first < 32 && end < high_key) high_key = end;
      low_key += step * (first - 1) + 1;
    }
    return low_key;
  }
};

// Places from `least` to `most`.
struct Range {
  u64 least, most;
  float lowest;  // score at `least`: most tokens fail by it alone

  __device__ Range(u64 least, u64 most = ~static_cast<u64>(0))
      : least(least), most(most), lowest(score_of(key_at(least))) {}

  __device__ __forceinline__ bool has(float score, int id) const {
    if (!(score >= lowest)) return false;
    const u64 place = place_of(key_of(score), id);
    return place >= least && place <= most;
  }
};

// In shared memory: thread 0 writes what is the same for all.
struct Worker {
  Scores scores;
  Workspace work;
  int slabs, part, parts;
  u32 expected;  // arrivals at the next sync; thread 0's
  int round, gathers;
  float best, rate;  // a token weighs 2^((score - best) * rate)
  union {
    struct {
      u32 count[kBins], low[kBins], high[kBins];
    } bins;
    u64 list[kList];
  };
  u64 sums[kWarps];
  float floats[kWarps];
  int found;
  u32 bin_count, above_count;
  u64 above_mass, remainder;

  // For thread 0, before the block's first sync.
  __device__ void begin(unsigned char* workspace, float its_rate) {
    slabs = (scores.vocab + kSlab - 1) / kSlab;
    work.divide(workspace, slabs);
    part = blockIdx.x;
    parts = gridDim.x;
    expected = 0;
    round = gathers = 0;
    rate = its_rate;
  }

  // Every block of the row gets here before any goes on, and sees what the others wrote.
  __device__ __noinline__ void sync() {
    __syncthreads();
    if (gridDim.x == 1) return;
    if (threadIdx.x == 0) {
      expected += gridDim.x;
      __threadfence();
      atomicAdd(work.arrived, 1u);
      while (*static_cast<volatile u32*>(work.arrived) < expected) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }

  // After the last sync.
  __device__ void leave() {
    if (gridDim.x == 1 || threadIdx.x) return;
    if (atomicAdd(work.left, 1u) == gridDim.x - 1) {
      *work.arrived = 0;
      *work.left = 0;
    }
  }

  // The sum over the threads before this one, and over all.
  __device__ __noinline__ u64 block_exclusive(u64 value, u64* total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 inclusive = warp_inclusive(value);
    __syncthreads();
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    const u64 upto = warp_inclusive(lane < kWarps ? sums[lane] : 0);
    *total = __shfl_sync(0xFFFFFFFFu, upto, 31);
    const u64 before = __shfl_sync(0xFFFFFFFFu, upto, (warp + 31) % 32);
    return (warp ? before : 0) + inclusive - value;
  }

  __device__ __noinline__ float block_max(float value) {
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) floats[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_max(floats[threadIdx.x % kWarps]);
  }

  __device__ static int first_token(int slab, int vector) {
    return Scores::first_token(slab, vector);
  }

  // `f(slab, values)` for the slabs of each warp of this block, `values` being the lane's raw
  // logits. The next slab's are under way meanwhile.
  template <typename F>
  __device__ __forceinline__ void each_raw_slab(const Scores& row, F f) const {
    const int count = slabs, step = gridDim.x * kWarps;
    int slab = blockIdx.x * kWarps + threadIdx.x / 32;
    Vectors next;
    if (slab < count) next = row.fetch(slab);
    while (slab < count) {
      const Vectors own = next;
      if (slab + step < count) next = row.fetch(slab + step);
      float values[kVectors][kVector];
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
#pragma unroll
        for (int i = 0; i < kVector; i++) values[v][i] = to_float(own.at[v].at[i]);
      }
      f(slab, values);
      slab += step;
    }
  }

  // The same with edited scores.
  template <typename F>
  __device__ __forceinline__ void each_slab(F f) const {
    const Scores row = scores;
    const bool edited = row.edited();
    each_raw_slab(row, [&](int slab, float (&values)[kVectors][kVector]) {
      if (edited) {
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
          row.apply_edits(first_token(slab, v), values[v], scores);
        }
      }
      f(slab, values);
    });
  }

  // One slab's scores, for every warp.
  __device__ __noinline__ void load(int slab, float (&out)[kVectors][kVector]) const {
    const Scores row = scores;
    const Vectors own = row.fetch(slab);
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
#pragma unroll
      for (int i = 0; i < kVector; i++) out[v][i] = to_float(own.at[v].at[i]);
      if (row.edited()) row.apply_edits(first_token(slab, v), out[v], scores);
    }
  }

  __device__ __forceinline__ static u64 to_units(float weight) {
    return static_cast<u64>(weight * static_cast<float>(kUnit));
  }
  __device__ __forceinline__ float weight(float score) const {
    return power_of_two((score - best) * rate);
  }
  __device__ __forceinline__ u64 mass(float score) const { return to_units(weight(score)); }

  // Each slab's maximum of raw and of edited scores and, if `sums`, its weight against its own
  // maximum. Then `best`; the best raw score is the result.
  __device__ __noinline__ float survey(bool sums) {
    if (gridDim.x > 1) clear_bins(0);
    if (blockIdx.x == 0 && threadIdx.x <= kLists) work.list_count[threadIdx.x] = 0;  // and `rank`
    const Scores row = scores;
    const bool edited = row.edited();
    const float its_rate = rate;
    float *maxima = work.slab_max, *raw_maxima = work.slab_raw, *totals = work.slab_sum;
    each_raw_slab(row, [&](int slab, float (&values)[kVectors][kVector]) {
      auto greatest = [&] {
        float top = values[0][0];
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
#pragma unroll
          for (int i = 0; i < kVector; i++) top = max_or_nan(top, values[v][i]);
        }
        return warp_max(top);
      };
      const float raw = greatest();
      float top = raw;
      if (edited) {
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
          row.apply_edits(first_token(slab, v), values[v], scores);
        }
        top = greatest();
      }
      float sum = 0;
      if (sums && top > minus_infinity()) {
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
          float part[2] = {0, 0};
#pragma unroll
          for (int i = 0; i < kVector; i++) {
            part[i % 2] += power_of_two((values[v][i] - top) * its_rate);
          }
          sum += part[0] + part[1];
        }
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      }
      if (threadIdx.x % 32 == 0) {
        __stcg(maxima + slab, top);
        __stcg(raw_maxima + slab, raw);
        __stcg(totals + slab, sum);
      }
    });
    sync();
    float top = minus_infinity(), raw = minus_infinity();
    for (int slab = threadIdx.x; slab < slabs; slab += kThreads) {
      top = max_or_nan(top, __ldcg(maxima + slab));
      raw = max_or_nan(raw, __ldcg(raw_maxima + slab));
    }
    top = block_max(top);
    raw = edited ? block_max(raw) : top;
    if (threadIdx.x == 0) best = top;
    __syncthreads();
    return raw;
  }

  // A slab's share of the survey's sums, against the row's best.
  __device__ u64 surveyed_mass(int slab) const {
    const float top = __ldcg(work.slab_max + slab);
    if (!(top > minus_infinity())) return 0;
    const double sum = __ldcg(work.slab_sum + slab);
    return static_cast<u64>(sum * weight(top) * kUnit);
  }

  __device__ __noinline__ u64 surveyed_total() {
    u64 own = 0, total;
    for (int slab = threadIdx.x; slab < slabs; slab += kThreads) own += surveyed_mass(slab);
    block_exclusive(own, &total);
    return total;
  }

  // The k-th largest of the slabs' maxima, as a key: at least k tokens reach it. At most kThreads
  // maxima count, so it is for k up to that, and up to `slabs`.
  __device__ __noinline__ u32 key_of_kth_slab(int k) {
    float top = minus_infinity();
    for (int slab = threadIdx.x; slab < slabs; slab += kThreads) {
      top = max_or_nan(top, __ldcg(work.slab_max + slab));
    }
    const u32 key = key_of(top);
    u32 found = 0;
    for (u32 bit = 0x80000000u; bit; bit /= 2) {
      if (__syncthreads_count(key >= (found | bit)) >= k) found |= bit;
    }
    return max(found, kLowestKey);
  }

  // The least of the slabs' maxima above -inf.
  __device__ __noinline__ float least_slab() {
    float top = minus_infinity();  // of the negated maxima
    for (int slab = threadIdx.x; slab < slabs; slab += kThreads) {
      const float value = __ldcg(work.slab_max + slab);
      if (value > minus_infinity()) top = max_or_nan(top, -value);
    }
    return -block_max(top);
  }

  __device__ void clear_bins(int which) {
    for (int i = part * kThreads + threadIdx.x; i < kBins; i += parts * kThreads) {
      __stcg(work.bin_count + which * kBins + i, 0u);
      __stcg(work.bin_mass + which * kBins + i, static_cast<u64>(0));
    }
  }

  // Counts and weights by bin, of the tokens from place `least` up, into `bins`.
  __device__ __noinline__ void histogram(const Bins by, u64 least, bool weigh) {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      bins.count[i] = bins.low[i] = bins.high[i] = 0;
    }
    __syncthreads();
    const bool all = least <= place_of(kLowestKey, scores.vocab);
    const float its_best = best, its_rate = rate;
    int bin = -1;  // runs of one bin are added at once
    u32 count = 0;
    u64 sum = 0;
    auto flush = [&] {
      if (bin < 0) return;
      atomicAdd(&this->bins.count[bin], count);
      if (weigh) add_wide(&this->bins.low[bin], &this->bins.high[bin], sum);
    };
    each_slab([&](int slab, float (&values)[kVectors][kVector]) {
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
#pragma unroll
        for (int i = 0; i < kVector; i++) {
          const float score = values[v][i];
          const int its = by.of(score);
          if (its < 0) continue;
          if (!all && place_of(key_of(score), first_token(slab, v) + i) < least) continue;
          if (its != bin) {
            flush();
            bin = its;
            count = 0;
            sum = 0;
          }
          count++;
          if (weigh) sum += to_units(power_of_two((score - its_best) * its_rate));
        }
      }
    });
    flush();
    __syncthreads();
    if (gridDim.x > 1) {
      u32* counts = work.bin_count + round % kHistograms * kBins;
      u64* weights = work.bin_mass + round % kHistograms * kBins;
      for (int i = threadIdx.x; i < kBins; i += kThreads) {
        if (!bins.count[i]) continue;
        atomicAdd(counts + i, bins.count[i]);
        if (weigh) atomicAdd(weights + i, static_cast<u64>(bins.high[i]) << 32 | bins.low[i]);
      }
      clear_bins((round + 1) % kHistograms);
      sync();
      for (int i = threadIdx.x; i < kBins; i += kThreads) {
        const u64 weight = __ldcg(weights + i);
        bins.count[i] = __ldcg(counts + i);
        bins.low[i] = static_cast<u32>(weight);
        bins.high[i] = static_cast<u32>(weight >> 32);
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) round++;
  }

  // The first bin where the running count, or weight, comes to `amount` with what lies above;
  // -1: none. Leaves the bin's count and, above it, count and weight in members.
  __device__ __noinline__ int find_bin(bool weigh, u64 amount, u32 its_above, u64 its_mass) {
    constexpr int kOwn = kBins / kThreads;
    const int first = threadIdx.x * kOwn;
    u64 counts = 0, masses = 0, total;
    for (int i = first; i < first + kOwn; i++) {
      counts += bins.count[i];
      masses += static_cast<u64>(bins.high[i]) << 32 | bins.low[i];
    }
    if (threadIdx.x == 0) found = -1;  // the sum below has a barrier
    counts = its_above + block_exclusive(counts, &total);
    if (threadIdx.x == kThreads - 1) above_count = its_above + static_cast<u32>(total);
    masses = its_mass + block_exclusive(masses, &total);
    for (int i = first; i < first + kOwn; i++) {
      const u32 count = bins.count[i];
      const u64 mass = static_cast<u64>(bins.high[i]) << 32 | bins.low[i];
      const u64 before = weigh ? masses : counts;
      const u64 after = before + (weigh ? mass : count);
      if (count && before < amount && after >= amount) {
        found = i;
        bin_count = count;
        above_count = static_cast<u32>(counts);
        above_mass = masses;
      }
      counts += count;
      masses += mass;
    }
    __syncthreads();
    return found;
  }

  // Collects the tokens of a range, in no order; returns how many there were, of which the list
  // holds at most kList. The number of this thread's in another range goes to `better`.
  __device__ __noinline__ u32 gather(const Range range, const Range mark = Range(0), u32* better = nullptr) {
    u32* const count = work.list_count + gathers;
    u64* const target = work.list;
    u32 above = 0;
    each_slab([&](int slab, float (&values)[kVectors][kVector]) {
      u32 taken = 0;
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
#pragma unroll
        for (int i = 0; i < kVector; i++) {
          const int id = first_token(slab, v) + i;
          if (range.has(values[v][i], id)) taken |= 1u << (v * kVector + i);
          if (better && mark.has(values[v][i], id)) above++;
        }
      }
      if (!__any_sync(0xFFFFFFFFu, taken)) return;
      const u32 own = __popc(taken);
      const u32 upto = static_cast<u32>(warp_inclusive(own));
      u32 start = 0;
      if (threadIdx.x % 32 == 31) start = atomicAdd(count, upto);
      start = __shfl_sync(0xFFFFFFFFu, start, 31) + upto - own;
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
#pragma unroll
        for (int i = 0; i < kVector; i++) {
          if (!(taken >> (v * kVector + i) & 1)) continue;
          if (start < kList) {
            __stcg(target + start, place_of(key_of(values[v][i]), first_token(slab, v) + i));
          }
          start++;
        }
      }
    });
    if (better) *better = above;
    sync();
    if (threadIdx.x == 0) gathers++;  // there is a barrier before the next one
    return __ldcg(count);
  }

  // The gathered tokens in `list`, the best first.
  __device__ __noinline__ void fetch_list(int count) {
    int size = 64;
    while (size < count) size *= 2;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
      list[i] = i < count ? __ldcg(work.list + i) : 0;
    }
    __syncthreads();
    sort_list(list, size);
  }

  // The sum of the weights of the list's first `count` tokens before this thread's, four from
  // 4 * threadIdx.x, and in all. `by_id`: the list's numbers have their halves exchanged.
  __device__ __noinline__ u64 list_masses(int count, bool by_id, u64 (&own)[4], u64* total) {
    u64 sum = 0;
    for (int j = 0; j < 4; j++) {
      const int i = 4 * threadIdx.x + j;
      own[j] = 0;
      if (i < count) {
        const u64 place = list[i];
        own[j] = mass(score_of(by_id ? static_cast<u32>(place) : key_at(place)));
      }
      sum += own[j];
    }
    return block_exclusive(sum, total);
  }

  // What a token counts for in a draw, 0 outside the range: its weight, or 1 if `equal`.
  __device__ __forceinline__ static float share_of(float score, int id, const Range& range,
                                                   bool equal, float best, float rate) {
    if (!range.has(score, id)) return 0;
    return equal ? 1 : power_of_two((score - best) * rate);
  }

  // Each slab's sum of that, in units, into `slab_mass`.
  __device__ __noinline__ void weigh_slabs(const Range range, bool equal) {
    const float its_best = best, its_rate = rate;
    u64* const target = work.slab_mass;
    each_slab([&](int slab, float (&values)[kVectors][kVector]) {
      float sum = 0;
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
#pragma unroll
        for (int i = 0; i < kVector; i++) {
          const int id = first_token(slab, v) + i;
          sum += share_of(values[v][i], id, range, equal, its_best, its_rate);
        }
      }
#pragma unroll
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      if (threadIdx.x % 32 == 0) {
        __stcg(target + slab, static_cast<u64>(static_cast<double>(sum) * kUnit));
      }
    });
    sync();
  }

  // The token of a range where the running sum of the slabs' masses exceeds `target`, or, for
  // ~0, a share `bits` / 2^64 of their total. `surveyed`: the masses are the survey's.
  __device__ __noinline__ int invert(const Range range, bool equal, bool surveyed, u64 target, u64 bits) {
    const int own = (slabs + kThreads - 1) / kThreads;
    const int first = min(static_cast<int>(threadIdx.x) * own, slabs);
    const int last = min(first + own, slabs);
    u64 sum = 0, total;
    for (int slab = first; slab < last; slab++) sum += slab_mass(slab, surveyed);
    sum = block_exclusive(sum, &total);
    if (target == ~static_cast<u64>(0)) target = __umul64hi(bits, total);
    for (int slab = first; slab < last; slab++) {
      const u64 mass = slab_mass(slab, surveyed);
      if (sum <= target && target < sum + mass) {
        found = slab;
        remainder = target - sum;
      }
      sum += mass;
    }
    __syncthreads();
    return find_token(found, static_cast<double>(remainder) / kUnit, range, equal);
  }

  __device__ __forceinline__ u64 slab_mass(int slab, bool surveyed) const {
    return surveyed ? surveyed_mass(slab) : __ldcg(work.slab_mass + slab);
  }

  // The first token of a slab where the running sum exceeds `rest`; should rounding leave none,
  // the last one that counts. Every warp finds it.
  __device__ __forceinline__ int find_token(int slab, double rest, const Range& range, bool equal) const {
    float values[kVectors][kVector];
    load(slab, values);
    const int lane = threadIdx.x % 32;
    int last = -1;
    double before = 0;
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
      const int first = first_token(slab, v);
      double own = 0;
#pragma unroll
      for (int i = 0; i < kVector; i++) {
        values[v][i] = share_of(values[v][i], first + i, range, equal, best, rate);
        own += static_cast<double>(values[v][i]);
      }
      double upto = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const double other = __shfl_up_sync(0xFFFFFFFFu, upto, step);
        if (lane >= step) upto += other;
      }
      const u32 beyond = __ballot_sync(0xFFFFFFFFu, before + upto > rest);
      int found = -1;
      double sum = before + upto - own;
#pragma unroll
      for (int i = 0; i < kVector; i++) {
        if (values[v][i] > 0 && (sum <= rest || found < 0)) found = first + i;
        sum += static_cast<double>(values[v][i]);
      }
      if (beyond) return __shfl_sync(0xFFFFFFFFu, found, __ffs(beyond) - 1);
#pragma unroll
      for (int step = 16; step; step /= 2) {
        found = max(found, __shfl_xor_sync(0xFFFFFFFFu, found, step));
      }
      last = max(last, found);
      before += __shfl_sync(0xFFFFFFFFu, upto, 31);
    }
    return last;
  }

  // The first token with the row's best score.
  __device__ __noinline__ int find_best() {
    int slab = slabs;
    for (int i = threadIdx.x; i < slabs && slab == slabs; i += kThreads) {
      if (__ldcg(work.slab_max + i) == best) slab = i;
    }
    if (threadIdx.x == 0) found = slabs;
    __syncthreads();
    atomicMin(&found, slab);
    __syncthreads();
    slab = found;
    float values[kVectors][kVector];
    load(slab, values);
    int found = scores.vocab;
#pragma unroll
    for (int v = kVectors - 1; v >= 0; v--) {
#pragma unroll
      for (int i = kVector - 1; i >= 0; i--) {
        if (values[v][i] == best) found = first_token(slab, v) + i;
      }
    }
#pragma unroll
    for (int step = 16; step; step /= 2) {
      found = min(found, __shfl_xor_sync(0xFFFFFFFFu, found, step));
    }
    return found;
  }

  struct Cut {
    u64 least;       // the last place that is kept
    int listed = 0;  // above 0: so many tokens, with all that are kept, lie in `list`
  };

  // Where the running count (or weight), from the best of the tokens from place `least` up,
  // comes to `amount`.
  __device__ __noinline__ Cut narrow(Bins by, u64 least, bool weigh, u64 amount) {
    u32 above = 0;
    u64 mass_above = 0;
    while (true) {
      histogram(by, least, weigh);
      const int bin = find_bin(weigh, amount, above, mass_above);
      u32 low, high;
      if (bin < 0) {
        if (by.by_key || weigh) return Cut{least};  // all are kept
        low = kLowestKey;  // it lies below what was divided
        high = key_of(by.floor) - 1;
        above = above_count;
        __syncthreads();
        if (high < low) return Cut{least};
        by = Bins::between(low, high);
        continue;
      }
      const u32 count = bin_count;
      above = above_count;
      mass_above = above_mass;
      __syncthreads();
      by.limits(bin, &low, &high);
      if (above + count <= kList) {
        gather(Range(max(least, place_of(low, scores.vocab))));
        fetch_list(above + count);
        return Cut{least, static_cast<int>(above + count)};
      }
      if (count <= kList) {
        gather(Range(max(least, place_of(low, scores.vocab)), place_of(high, 0)));
        fetch_list(count);
        int index = static_cast<int>(amount - above) - 1;
        if (weigh) {
          u64 own[4], total;
          u64 sum = mass_above + list_masses(count, false, own, &total);
          u64 before = 0;
          for (int j = 0; j < 4; j++) {
            if (4 * threadIdx.x + j < count && sum + own[j] < amount) before++;
            sum += own[j];
          }
          block_exclusive(before, &total);
          index = min(static_cast<int>(total), static_cast<int>(count) - 1);
        }
        return Cut{list[index]};
      }
      if (low == high) {
        const u64 each = weigh ? mass(score_of(low)) : 1;
        const u64 want = amount - (weigh ? mass_above : above);
        const u64 kept = each ? min((want + each - 1) / each, static_cast<u64>(count)) : count;
        const Range tied(max(least, place_of(low, scores.vocab)), place_of(low, 0));
        weigh_slabs(tied, true);
        const int id = invert(tied, true, false, (kept - 1) * static_cast<u64>(kUnit), 0);
        sync();  // before the slabs' sums change
        return Cut{place_of(low, id)};
      }
      by = Bins::between(low, high);
    }
  }

  // A draw from the list's first tokens: from `count`, of which `top_k` are kept (0: all), then
  // as many as come to `top_p` of `whole` (0: of the kept ones), then those from place `least` up.
  __device__ __noinline__ int draw_from_list(int count, int top_k, double top_p, u64 whole, u64 least, u64 bits) {
    int kept = top_k ? min(top_k, count) : count;
    u64 own[4], total;
    u64 sum = list_masses(kept, false, own, &total);
    const u64 reach = top_p < 1 ? share(top_p, whole ? whole : total) : ~static_cast<u64>(0);
    u64 stays = 0;
    for (int j = 0; j < 4; j++) {
      const int i = 4 * threadIdx.x + j;
      if (i < kept && (i == 0 || sum < reach) && list[i] >= least) stays++;
      sum += own[j];
    }
    block_exclusive(stays, &total);
    kept = static_cast<int>(total);
    // What stays is the list's start. By id instead:
    int size = 64;
    while (size < kept) size *= 2;
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const u64 place = list[i];
      list[i] = i < kept ? place << 32 | place >> 32 : 0;
    }
    __syncthreads();
    sort_list(list, size);
    sum = list_masses(kept, true, own, &total);
    const u64 target = __umul64hi(bits, total);
    for (int j = 0; j < 4; j++) {
      if (sum <= target && target < sum + own[j]) {
        const u64 exchanged = list[4 * threadIdx.x + j];
        found = id_at(exchanged >> 32);
      }
      sum += own[j];
    }
    __syncthreads();
    return found;
  }

  // What a running sum has to come to; at least 1, so that the best token always counts.
  __device__ static u64 share(double of, u64 whole) {
    return max(static_cast<u64>(ceil(of * static_cast<double>(whole))), static_cast<u64>(1));
  }

  // The token of a row that draws; called by all blocks of the row, the result is that of part 0.
  __device__ __noinline__ int draw(const RowParameters& row, u64 bits) {
    const u64 all = place_of(kLowestKey, scores.vocab);
    u64 least = all;  // min-p's
    if (row.min_p > 0) {
      const double lowest = best + row.temperature * log(row.min_p);
      const u32 key = key_of(__double2float_ru(lowest));
      least = max(all, place_of(min(key, key_of(best)), scores.vocab));
    }
    Cut cut{all};
    u64 whole = 0;
    int top_k = row.top_k;
    if (top_k) {
      if (top_k <= min(slabs, kThreads)) {
        const u32 count = gather(Range(place_of(key_of_kth_slab(top_k), scores.vocab)));
        if (count <= kList) {
          fetch_list(count);
          cut.listed = count;
        }
      }
      if (!cut.listed) cut = narrow(Bins::down_to(best, least_slab()), all, false, top_k);
      if (cut.listed) return draw_from_list(cut.listed, top_k, row.top_p, 0, least, bits);
    }
    if (row.top_p < 1) {
      Bins by;
      if (top_k) {
        by = Bins::down_to(best, score_of(key_at(cut.least)));
        histogram(by, cut.least, true);
        find_bin(true, ~static_cast<u64>(0), 0, 0);
        u64 own = 0;
        for (int i = threadIdx.x; i < kBins; i += kThreads) {
          own += static_cast<u64>(bins.high[i]) << 32 | bins.low[i];
        }
        block_exclusive(own, &whole);
      } else {
        // Together the tokens below this weigh less than 1 - top_p of all.
        whole = surveyed_total();
        const double weight = (1 - row.top_p) * (static_cast<double>(whole) / kUnit) / scores.vocab;
        const double floor = best + row.temperature * log(weight);
        by = Bins::down_to(best, fmaxf(__double2float_rd(floor), score_of(kLowestKey)));
      }
      cut = narrow(by, cut.least, true, share(row.top_p, whole));
      if (cut.listed) return draw_from_list(cut.listed, 0, row.top_p, whole, least, bits);
    }
    cut.least = max(cut.least, least);
    const Range kept(cut.least);
    const bool surveyed = cut.least == all && !top_k;  // which has no sums for top-k
    if (!surveyed) weigh_slabs(kept, false);
    return part ? -1 : invert(kept, false, surveyed, ~static_cast<u64>(0), bits);
  }
};

// --- kernels ----------------------------------------------------------------------------------

// Whether a row is left out. All blocks that share it leave then, so that none waits for another.
__device__ __forceinline__ bool left_out(int index, int* out) {
  if (index >= 0) return false;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    out[blockIdx.y] = -1;
    out[gridDim.y + blockIdx.y] = OK;
  }
  return true;
}

// Grid (parts, rows). In `workspace`, `stride` bytes a row.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    sample_rows(const LOGIT* logits, long long pitch, int vocab, int wide, const int* index,
                RowParameters* rows, u32* words, const int* bias_tokens, const float* biases,
                int bias_room, const u32* masks, const int* mask_rows, int mask_words,
                unsigned char* workspace, int stride, int* last_tokens, int* out) {
  __shared__ Worker worker;
  wait_for_previous_kernel();
  const int i = blockIdx.y;
  if (left_out(index[i], out)) return;
  RowParameters& state = rows[index[i]];
  const RowParameters row = state;
  const bool draws = row.temperature != 0;
  if (threadIdx.x == 0) {
    Scores& scores = worker.scores;
    const long long slot = max(row.slot, 0);
    scores.logits = logits + i * pitch;
    scores.vocab = vocab;
    scores.wide = wide;
    scores.words = row.slot < 0 ? nullptr : words + slot * vocab;
    scores.mask = mask_rows && mask_rows[i] >= 0
                      ? masks + static_cast<long long>(mask_rows[i]) * mask_words
                      : nullptr;
    scores.bias_tokens = bias_tokens + slot * bias_room;
    scores.biases = biases + slot * bias_room;
    scores.biased = row.biased;
    scores.held_back = row.outputs < row.min_tokens ? BANNED | STOP : BANNED;
    scores.penalizes =
        row.slot >= 0 && (row.repetition != 1 || row.frequency != 0 || row.presence != 0);
    scores.repetition = row.repetition;
    scores.frequency = row.frequency;
    scores.presence = row.presence;
    worker.begin(workspace + static_cast<long long>(i) * stride,
                 draws ? static_cast<float>(1.4426950408889634 / fmax(row.temperature, 1e-30)) : 0);
  }
  __syncthreads();
  const float raw_best = worker.survey(draws && !row.top_k && (row.top_p < 1 || row.min_p <= 0));
  int token = -1, status = status_of(raw_best);
  if (status == OK && worker.scores.edited()) {
    status = status_of(worker.best);
    if (status != OK) status = status == ALL_EXCLUDED ? NONE_LEFT : OVERFLOW;
  }
  if (status == OK) {
    if (draws) token = worker.draw(row, random_bits(row.seed, row.outputs));
    else if (worker.part == 0) token = worker.find_best();
  }
  worker.leave();
  if (worker.part == 0 && threadIdx.x == 0) {
    out[i] = token;
    out[gridDim.y + i] = status;
    if (status == OK) {
      state.outputs = row.outputs + 1;
      last_tokens[index[i]] = token;
      if (worker.scores.penalizes) words[static_cast<long long>(row.slot) * vocab + token]++;
    }
  }
  let_next_kernel_start();
}

// Grid (parts, scored rows); `out` has SCORE_HEADER + 2 * top words a row.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    score_rows(const LOGIT* logits, long long pitch, int vocab, int wide, const int* index,
               const int* tokens, int top, unsigned char* workspace, int stride, int* out) {
  __shared__ Worker worker;
  wait_for_previous_kernel();
  const int row = index[blockIdx.y], token = tokens[row];
  out += static_cast<long long>(blockIdx.y) * (SCORE_HEADER + 2 * top);
  if (threadIdx.x == 0) {
    worker.scores = Scores{logits + row * pitch, vocab, wide != 0};
    worker.begin(workspace + static_cast<long long>(blockIdx.y) * stride, kLog2e);
  }
  __syncthreads();
  const float raw_best = worker.survey(true);
  const int status = status_of(raw_best);
  if (status != OK || token < 0 || token >= vocab) {
    worker.leave();
    if (worker.part == 0 && threadIdx.x < SCORE_HEADER) {
      out[threadIdx.x] = threadIdx.x == SCORE_HEADER - 1 ? status : 0;
    }
    return;
  }

  const float mine = to_float(logits[row * pitch + token]);
  const u64 all = place_of(kLowestKey, vocab);
  u64 first = all;
  bool small = vocab <= kList;  // all of it is a list
  if (!small && top && top <= worker.slabs) {
    first = place_of(worker.key_of_kth_slab(top), vocab);
    small = true;
  }
  if (!top || !small) first = ~static_cast<u64>(0);  // this pass only counts
  u32 better;
  const Range above(place_of(key_of(mine), token) + 1);
  int listed = worker.gather(Range(first), above, &better);
  u64 total;
  worker.block_exclusive(better, &total);
  if (threadIdx.x == 0) atomicAdd(worker.work.rank, static_cast<u32>(total));
  worker.sync();
  if (top) {
    if (small && listed <= kList) {
      worker.fetch_list(listed);
    } else {
      const auto cut = worker.narrow(Bins::down_to(worker.best, worker.least_slab()), all, false, top);
      listed = cut.listed;
      if (!listed) {
        listed = worker.gather(Range(cut.least));
        worker.fetch_list(listed);
      }
    }
  }
  const u64 whole = worker.surveyed_total();
  worker.leave();
  if (worker.part) return;
  listed = min(listed, top);
  for (int i = threadIdx.x; i < listed; i += kThreads) {
    out[SCORE_HEADER + i] = id_at(worker.list[i]);
    out[SCORE_HEADER + top + i] = __float_as_int(score_of(key_at(worker.list[i])));
  }
  if (threadIdx.x == 0) {
    const double normalizer = worker.best + log(static_cast<double>(whole) / kUnit);
    const u64 bits = __double_as_longlong(normalizer);
    out[0] = static_cast<int>(static_cast<u32>(bits));
    out[1] = static_cast<int>(static_cast<u32>(bits >> 32));
    out[2] = __float_as_int(mine);
    out[3] = 1 + static_cast<int>(__ldcg(worker.work.rank));
    out[4] = listed;
    out[5] = OK;
  }
}

// Grid (parts, rows). `best` and `arrived`, one a row, are 0 between launches.
extern "C" __global__ void __launch_bounds__(kGreedyThreads)
    greedy_rows(const LOGIT* logits, long long pitch, int vocab, int wide, const int* index,
                RowParameters* rows, u64* best, u32* arrived, int* last_tokens, int* out) {
  __shared__ u64 shared[kGreedyThreads / 32];
  wait_for_previous_kernel();
  const int i = blockIdx.y;
  if (left_out(index[i], out)) return;
  const Scores scores{logits + i * pitch, vocab, wide != 0};
  float top = minus_infinity();
  int where = 0;
  const int step = gridDim.x * kGreedyThreads * kVector;
  for (int first = (blockIdx.x * kGreedyThreads + threadIdx.x) * kVector; first < vocab;
       first += kGreedyLoads * step) {
    Pack<LOGIT, kVector> own[kGreedyLoads];
#pragma unroll
    for (int load = 0; load < kGreedyLoads; load++) scores.fetch(first + load * step, &own[load]);
#pragma unroll
    for (int load = 0; load < kGreedyLoads; load++) {
      float its = to_float(own[load].at[0]);
#pragma unroll
      for (int j = 1; j < kVector; j++) its = max_or_nan(its, to_float(own[load].at[j]));
      if (its > top || its != its) {
        top = its;
        where = first + load * step;
      }
    }
  }
  u64 place = place_of(key_of(top), where);
#pragma unroll
  for (int width = 16; width; width /= 2) {
    place = max(place, __shfl_xor_sync(0xFFFFFFFFu, place, width));
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = place;
  __syncthreads();
  if (threadIdx.x) return;
  for (int warp = 1; warp < kGreedyThreads / 32; warp++) place = max(place, shared[warp]);
  if (gridDim.x > 1) {
    atomicMax(best + i, place);
    __threadfence();
    if (atomicAdd(arrived + i, 1u) != gridDim.x - 1) return;
    place = atomicExch(best + i, static_cast<u64>(0));
    arrived[i] = 0;
  }
  int token = -1;
  const u32 key = key_at(place);
  const int status = key >= kInfinityKey ? NOT_FINITE : key < kLowestKey ? ALL_EXCLUDED : OK;
  if (status == OK) {
    const float wanted = score_of(key);
    token = id_at(place);
    Pack<LOGIT, kVector> own;
    scores.fetch(token, &own);
    int offset = 0;
#pragma unroll
    for (int j = kVector - 1; j >= 0; j--) offset = to_float(own.at[j]) == wanted ? j : offset;
    token += offset;
    rows[index[i]].outputs++;
    last_tokens[index[i]] = token;
  }
  out[i] = token;
  out[gridDim.y + i] = status;
}
