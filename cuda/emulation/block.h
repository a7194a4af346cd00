// A block of threads, its shared memory, and where its threads wait for each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

using Where = std::source_location;

inline std::string text(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}
inline bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && !std::strcmp(a.file_name(), b.file_name());
}

// How launches run, for those who want an error to show.
struct Settings {
  enum Order { forward, reverse, seeded };
  Order order = forward;  // in which threads run between two meetings
  unsigned seed = 0;
  bool late = true;  // asynchronous copies happen when they are waited for, not at once
  int hosts = 1;     // blocks that run side by side
};
inline Settings settings;

// Counted over all launches, until somebody sets them to zero.
struct Counts {
  std::atomic<int64_t> switches{0}, mma{0}, ldmatrix{0}, conflicts{0};
};
inline Counts counts;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
};

struct Warp;

struct Fiber : Context {
  dim3 index;
  int rank = 0, lane = 0;
  Warp* warp = nullptr;
  bool ready = true, finished = false, at_barrier = false;
  Where where;             // of the meeting that it waits in
  std::vector<Copy> open;  // asynchronous copies that belong to no group yet
  std::vector<std::vector<Copy>> groups;
  std::vector<std::function<void()>> products;  // of a group of warps, under way
};

// Lanes that wait for each other. What they bring lies on their own stacks meanwhile.
struct Warp {
  Fiber* lane[32] = {};
  void* brought[32] = {};
  const void* kind[32] = {};
  uint32_t mask[32] = {}, waiting = 0;
};

struct Block {
  dim3 index, threads, grid;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Context scheduler;
  Fiber* current = nullptr;
  int live = 0, at_barrier = 0;
  const std::function<void()>* body = nullptr;
  std::string error;
};
inline thread_local Block* block = nullptr;

[[noreturn]] inline void fail(const std::string& what) {
  const Block& b = *block;
  throw std::runtime_error(what + " (block " + std::to_string(b.index.x) + "," +
                           std::to_string(b.index.y) + " thread " +
                           std::to_string(b.current->rank) + ")");
}

// -------------------------------------------------------------------------------------- meetings

inline void sleep_until_ready(const Where& where) {
  Fiber& f = *block->current;
  f.ready = false;
  f.where = where;
  switch_to(f, block->scheduler);
}

inline void barrier(const Where& where = Where::current()) {
  Block& b = *block;
  b.current->at_barrier = true;
  if (++b.at_barrier < b.live) return sleep_until_ready(where);
  b.at_barrier = 0;
  for (Fiber& f : b.fibers) {
    f.ready |= f.at_barrier;
    f.at_barrier = false;
  }
}

// The last lane of `mask` to come runs op(what all lanes brought, mask) for everyone. Lanes that
// meet from different lines, or with different operations or masks, have diverged.
template <class Op>
void meet(uint32_t mask, void* mine, const Where& where, const Op& op) {
  static const char kind = 0;  // one address for every operation
  Fiber& f = *block->current;
  Warp& w = *f.warp;
  if (!(mask >> f.lane & 1)) fail("a lane outside its own mask at " + text(where));
  for (int i = 0; i < 32; ++i) {
    if (!((mask & w.waiting) >> i & 1)) continue;
    if (w.kind[i] != &kind || w.mask[i] != mask || !same(where, w.lane[i]->where)) {
      fail("lanes meet at different operations: " + text(where) + " and " + text(w.lane[i]->where));
    }
  }
  w.brought[f.lane] = mine;
  w.kind[f.lane] = &kind;
  w.mask[f.lane] = mask;
  w.waiting |= 1u << f.lane;
  if ((w.waiting & mask) != mask) return sleep_until_ready(where);
  op(w.brought, mask);
  w.waiting &= ~mask;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) w.lane[i]->ready = true;
  }
}

// ------------------------------------------------------------------------------------- one block

// Bytes that start as NaN, and a stretch behind them that nobody may write: AddressSanitizer sees
// any access to it, and without it a changed byte is found in the end.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    void* found = nullptr;
    if (posix_memalign(&found, 1024, bytes + kBeyond)) throw std::bad_alloc();
    memory_.reset(static_cast<unsigned char*>(found));
    std::memset(memory_.get(), 0xff, bytes + kBeyond);
    poison(true);
  }
  ~SharedMemory() { poison(false); }
  unsigned char* data() const { return memory_.get(); }
  void check_beyond() {
    poison(false);
    const unsigned char* end = memory_.get() + bytes_;
    if (std::any_of(end, end + kBeyond, [](int c) { return c != 0xff; })) {
      throw std::runtime_error("a store beyond shared memory");
    }
  }

 private:
  static constexpr size_t kBeyond = 16 << 10;
  size_t bytes_;
  std::unique_ptr<unsigned char, void (*)(void*)> memory_{nullptr, free};

  void poison([[maybe_unused]] bool on) {
#if defined(__SANITIZE_ADDRESS__)
    unsigned char* end = memory_.get() + bytes_;
    on ? __asan_poison_memory_region(end, kBeyond) : __asan_unpoison_memory_region(end, kBeyond);
#endif
  }
};

inline void run_fiber() {
  Block& b = *block;
  arrive(b.scheduler);
  Fiber& f = *b.current;
  try {
    (*b.body)();
    if (!f.open.empty() || !f.groups.empty()) fail("an asynchronous copy is never waited for");
    if (!f.products.empty()) fail("a product of a group of warps is never waited for");
    if (b.at_barrier) fail("a thread leaves while others wait at a barrier");
  } catch (const std::exception& e) {
    if (b.error.empty()) b.error = e.what();
  }
  f.finished = true;
  f.ready = false;
  --b.live;
  switch_to(f, b.scheduler, true);
  __builtin_unreachable();
}

inline std::string where_they_wait(const Block& b) {
  std::string places;
  for (const Fiber& f : b.fibers) {
    const std::string place = " " + text(f.where);
    if (!f.finished && (places + " ").find(place + " ") == std::string::npos) places += place;
  }
  return places;
}

// Runs what is ready, warp after warp; whether there was anything. A greedy round lets a warp go on
// until all its lanes wait for others.
inline bool run_round(Block& b, const std::vector<int>& warps, const std::vector<int>& lanes,
                      bool greedy) {
  bool any = false;
  for (const int w : warps) {
    bool again = true;
    while (again) {
      again = false;
      for (const int l : lanes) {
        Fiber* f = b.warps[w].lane[l];
        if (!f || !f->ready) continue;
        any = again = true;
        ++counts.switches;
        b.current = f;
        switch_to(b.scheduler, *f);
        if (!b.error.empty()) throw std::runtime_error(b.error);
      }
      again &= greedy;
    }
  }
  return any;
}

inline void run_block(Block& b, Stacks& stacks) {
  const int n = static_cast<int>(b.threads.x * b.threads.y * b.threads.z);
  SharedMemory shared(b.shared_bytes);
  block = &b;
  b.shared = shared.data();
  b.live = n;
  b.fibers = std::vector<Fiber>(n);
  b.warps = std::vector<Warp>((n + 31) / 32);
  for (int i = 0; i < n; ++i) {
    Fiber& f = b.fibers[i];
    f.rank = i;
    f.lane = i % 32;
    f.warp = &b.warps[i / 32];
    f.warp->lane[f.lane] = &f;
    f.index = dim3(i % b.threads.x, i / b.threads.x % b.threads.y, i / (b.threads.x * b.threads.y));
    stacks.prepare(i, f, run_fiber);
  }
  std::vector<int> warps(b.warps.size()), lanes(32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  for (int i = 0; i < 32; ++i) lanes[i] = i;
  if (settings.order == Settings::reverse) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  std::mt19937 random(settings.seed + 977 * b.index.x + 31337 * b.index.y + 7919 * b.index.z);
  while (b.live > 0) {
    bool greedy = false;
    if (settings.order == Settings::seeded) {
      std::shuffle(warps.begin(), warps.end(), random);
      std::shuffle(lanes.begin(), lanes.end(), random);
      greedy = random() % 2;
    }
    if (!run_round(b, warps, lanes, greedy)) {
      throw std::runtime_error("deadlock: threads wait at" + where_they_wait(b));
    }
  }
  shared.check_beyond();
}

}  // namespace emulation
