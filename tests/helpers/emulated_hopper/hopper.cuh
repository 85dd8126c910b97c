// hopper.cuh on a CPU, for tests: what a kernel's threads do to each other, as the PTX ISA has it, and
// as unkind as it may be. Threads are fibers, taken in random order. A copy lands at any time after it
// was asked for, and its place holds rubbish until then. A product reads its operands when it is waited
// for, not before. Whoever copies what depends on the kernel ahead before waiting for it, or waits for
// ever, fails.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
using std::min;

struct Index {
  int x;
};
inline Index threadIdx, blockIdx;

// --- element types ---------------------------------------------------------------------------------

using __half = _Float16;
struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(__half x) { return float(x); }
inline float to_float(__nv_bfloat16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
template <typename T>
inline T from_float(float x) {
  return T(x);
}
template <>
inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest even
}
template <typename T, int N>
struct Pack {
  T at[N];
};

// --- activation.cuh --------------------------------------------------------------------------------

constexpr int SILU = 1;
inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
inline float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// --- a block ---------------------------------------------------------------------------------------

constexpr int WARPGROUP = 128;
constexpr int SHARED_BYTES = 228 * 1024;
constexpr int SHARED_START = 512;  // no multiple of 1024: kernels have to align

using Barrier = unsigned long long;

struct TensorMap {
  const std::uint16_t* data;
  int columns, rows, box_rows;
  bool waits;  // the kernel ahead writes it
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int thread = 0;
  bool done = false, waited = false;
  std::function<bool()> ready;  // none: it can go on
  std::string waits_for;
  std::vector<std::function<void()>> products;
  std::deque<std::vector<std::function<void()>>> groups;
};

struct State {  // of an mbarrier
  int count, pending, bytes, phase;
};

struct Meeting {  // of threads that wait for each other
  int arrived = 0, generation = 0;
};

inline struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned char> memory;
  std::map<Barrier*, State> barriers;
  std::map<int, Meeting> meetings;  // by number
  std::vector<std::function<void()>> copies;
  std::mt19937 random;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  std::string error;
  std::function<void()> kernel;
  int threads = 0;
} block_;

[[noreturn]] inline void fail(const std::string& why) {
  const Fiber* f = block_.current;
  throw std::runtime_error(why + (f ? " (thread " + std::to_string(f->thread) + ")" : ""));
}

inline unsigned char* aligned_memory() {
  const auto start = reinterpret_cast<std::uintptr_t>(block_.memory.data());
  return block_.memory.data() + (1024 - start % 1024) % 1024;
}
inline unsigned char* shared_memory() { return aligned_memory() + SHARED_START; }

inline unsigned shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - aligned_memory();
  if (offset < SHARED_START || offset >= SHARED_START + SHARED_BYTES) fail("not in shared memory");
  return unsigned(offset);
}
inline unsigned char* at_address(unsigned address, int bytes) {
  if (address < SHARED_START || address + bytes > SHARED_START + 227 * 1024)
    fail("outside of shared memory");
  return aligned_memory() + address;
}
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

inline void block_until(const std::string& what, std::function<bool()> ready) {
  Fiber* const f = block_.current;
  f->ready = std::move(ready);
  f->waits_for = what;
  swapcontext(&f->context, &block_.scheduler);
}

inline void meet(int number, int threads, const char* what) {
  Meeting& m = block_.meetings[number];
  const int generation = m.generation;
  if (++m.arrived == threads) {
    m.arrived = 0;
    m.generation++;
  }
  block_until(what, [&m, generation] { return m.generation != generation; });
}
inline void __syncthreads() { meet(0, block_.threads, "the block"); }
template <int BARRIER, int THREADS>
inline void synchronize_threads() {
  meet(BARRIER, THREADS, "some threads");
}
template <int REGISTERS>
inline void keep_registers() {}
template <int REGISTERS>
inline void take_registers() {}

// --- barriers in shared memory ---------------------------------------------------------------------

inline State& state_of(Barrier* barrier) {
  const auto found = block_.barriers.find(barrier);
  if (found == block_.barriers.end()) fail("a barrier that is not initialized");
  return found->second;
}
inline void settle(State& s) {
  if (s.pending < 0) fail("more arrivals than a barrier expects");
  if (s.pending || s.bytes) return;
  s.pending = s.count;
  s.phase ^= 1;
}
inline void initialize(Barrier& barrier, int arrivals) {
  block_.barriers[&barrier] = {arrivals, arrivals, 0, 0};
}
inline void publish_barriers() {}
inline void arrive(Barrier& barrier) {
  State& s = state_of(&barrier);
  s.pending--;
  settle(s);
}
inline void arrive_expecting(Barrier& barrier, int bytes) {
  State& s = state_of(&barrier);
  s.bytes += bytes;
  s.pending--;
  settle(s);
}
inline void wait(Barrier& barrier, int parity) {
  State& s = state_of(&barrier);
  block_until("a barrier's phase", [&s, parity] { return s.phase != parity; });
}

// --- copies ----------------------------------------------------------------------------------------

inline unsigned long long read_once() { return 0; }
inline void prefetch(const TensorMap&) {}
inline void copy_box(void* to, const TensorMap& map, Barrier& barrier, int x, int y,
                     unsigned long long policy = 0) {
  if (map.waits && !block_.current->waited) fail("a copy before the wait for the kernel ahead");
  const unsigned start = shared_address(to);
  if (start % 128) fail("a copy to where none may go");
  const int bytes = map.box_rows * 128;
  std::memset(at_address(start, bytes), 0xff, bytes);
  Barrier* const told = &barrier;
  block_.copies.push_back([=] {
    for (int r = 0; r < map.box_rows; r++) {
      for (int c = 0; c < 64; c++) {
        const bool inside = y + r < map.rows && x + c < map.columns;
        const std::uint16_t value =
            inside ? map.data[static_cast<long long>(y + r) * map.columns + x + c] : 0;
        std::memcpy(at_address(swizzled(start + r * 128 + c * 2), 2), &value, 2);
      }
    }
    State& s = state_of(told);
    s.bytes -= bytes;
    settle(s);
  });
}

inline void wait_for_previous_kernel() { block_.current->waited = true; }
inline void let_next_kernel_start() {
  if (!block_.current->waited) fail("the next kernel starts before the one ahead has ended");
}

// --- products --------------------------------------------------------------------------------------

inline unsigned long long descriptor(unsigned address, int stride) {
  return (address & 0x3ffff) >> 4 | static_cast<unsigned long long>(stride >> 4) << 16 |
         (1024ull >> 4) << 32 | 1ull << 62;
}
template <typename E>
float element(unsigned long long matrix, int row, int column) {
  const unsigned start = (matrix & 0x3fff) << 4, eight_rows = (matrix >> 32 & 0x3fff) << 4;
  const unsigned at = start + row / 8 * eight_rows + row % 8 * 128 + column * 2;
  E value;
  std::memcpy(&value, at_address(swizzled(at), 2), 2);
  return to_float(value);
}
template <typename E, int N>
void multiply_elements(float* c, unsigned long long a, unsigned long long b, bool add) {
  const int thread = block_.current->thread % WARPGROUP, lane = thread % 32;
  const auto run = [=] {
    for (int half = 0; half < 2; half++) {
      const int row = thread / 32 * 16 + half * 8 + lane / 4;
      float left[16];
      for (int k = 0; k < 16; k++) left[k] = element<E>(a, row, k);
      for (int n = 0; n < N / 8; n++) {
        for (int j = 0; j < 2; j++) {
          float& sum = c[4 * n + 2 * half + j];
          if (!add) sum = 0.0f;
          for (int k = 0; k < 16; k++)
            sum += left[k] * element<E>(b, n * 8 + 2 * (lane % 4) + j, k);
        }
      }
    }
  };
  block_.current->products.push_back(run);
}
inline void begin_products() {}
inline void commit_products() {
  Fiber& f = *block_.current;
  f.groups.push_back(std::move(f.products));
  f.products.clear();
}
template <int PENDING>
void wait_for_products() {
  // Others go on for a while before it is done.
  block_until("products", [] { return true; });
  Fiber& f = *block_.current;
  for (; f.groups.size() > PENDING; f.groups.pop_front()) {
    for (const auto& run : f.groups.front()) run();
  }
  // A warp waits as one.
  meet(16 + f.thread / 32, 32, "its warp");
}
template <int N>
void hold(float (&)[N]) {}

// --- a launch --------------------------------------------------------------------------------------

inline void begin_fiber() {
  Block& b = block_;
  try {
    b.kernel();
  } catch (const std::exception& problem) {
    b.error = problem.what();
  }
  b.current->done = true;
  swapcontext(&b.current->context, &b.scheduler);
}

// Run one block. Gives what went wrong, or nothing.
inline std::string run_block(int number, int threads, std::function<void()> kernel,
                             unsigned seed) {
  Block& b = block_;
  b.fibers.clear();
  b.barriers.clear();
  b.meetings.clear();
  b.copies.clear();
  b.error.clear();
  b.random.seed(seed);
  b.kernel = std::move(kernel);
  b.threads = threads;
  b.memory.assign(SHARED_BYTES + 4096, 0xff);
  for (int i = 0; i < threads; i++) {
    auto f = std::make_unique<Fiber>();
    f->thread = i;
    constexpr int STACK = 64 << 10;
    f->stack.reset(new char[STACK]);
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.get();
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, begin_fiber, 0);
    b.fibers.push_back(std::move(f));
  }
  std::vector<Fiber*> order;
  for (const auto& f : b.fibers) order.push_back(f.get());
  while (b.error.empty()) {
    std::shuffle(order.begin(), order.end(), b.random);
    bool moved = false, left = false, rested = false;
    const auto resting = b.random();  // warps that others get ahead of
    for (Fiber* f : order) {
      if (f->done) continue;
      left = true;
      if (f->ready && !f->ready()) continue;
      if (resting >> f->thread / 32 & 1) {
        rested = true;
        continue;
      }
      f->ready = nullptr;
      moved = true;
      b.current = f;
      threadIdx.x = f->thread;
      blockIdx.x = number;
      swapcontext(&b.scheduler, &f->context);
      b.current = nullptr;
      if (!b.error.empty()) return b.error;
    }
    // Copies land one at a time while threads go on, in any order.
    if (!b.copies.empty() && ((!moved && !rested) || b.random() % 2)) {
      const auto i = b.random() % b.copies.size();
      const auto copy = std::move(b.copies[i]);
      b.copies.erase(b.copies.begin() + i);
      try {
        copy();
      } catch (const std::exception& problem) {
        return problem.what();
      }
      continue;
    }
    if (!left) return b.copies.empty() ? "" : "copies outlive their block";
    if (!moved && !rested) {
      std::map<std::string, int> waiting;
      for (Fiber* f : order)
        if (!f->done) waiting[f->waits_for]++;
      std::string why = "nobody goes on:";
      for (const auto& [what, count] : waiting)
        why += " " + std::to_string(count) + " wait for " + what + ";";
      return why;
    }
  }
  return b.error;
}
