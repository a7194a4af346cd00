// What lanes of a warp do together, and asynchronous copies, as the PTX manual describes them.
#pragma once

#include "block.h"

namespace emulation {

inline int lane() { return block->current->lane; }

// ---------------------------------------------------------------------------------------- memory

inline size_t shared_offset(const void* p, size_t bytes, size_t align, const char* what) {
  const auto offset = static_cast<const unsigned char*>(p) - block->shared;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > block->shared_bytes) {
    fail(std::string(what) + ": outside shared memory");
  }
  if (offset % align) fail(std::string(what) + ": misaligned address in shared memory");
  return static_cast<size_t>(offset);
}

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a vector at a misaligned address");
}

inline void do_copy(const Copy& c) {
  if (c.valid) std::memcpy(c.to, c.from, c.valid);
  std::memset(c.to + c.valid, 0, c.bytes - c.valid);
}

// From global to shared memory; bytes from `valid` on become zero.
inline void copy(void* to, const void* from, int bytes, int valid) {
  shared_offset(to, bytes, bytes, "an asynchronous copy");
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("an asynchronous copy: misaligned source");
  if (valid < 0 || valid > bytes) fail("an asynchronous copy: more bytes than it has");
  const Copy c{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes,
               valid};
  if (settings.late) {
    block->current->open.push_back(c);
  } else {
    do_copy(c);
  }
}

inline void copy_commit() {
  Fiber& f = *block->current;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

// Until at most `left` of this thread's groups are under way.
inline void copy_wait(size_t left) {
  Fiber& f = *block->current;
  while (f.groups.size() > left) {
    for (const Copy& c : f.groups.front()) do_copy(c);
    f.groups.erase(f.groups.begin());
  }
}

// -------------------------------------------------------------------------------------- shuffles

template <class T>
T shuffle(uint32_t mask, T value, int source, const Where& where) {
  struct Operands {
    T value, result;
    int source;
  } mine{value, value, source};
  meet(mask, &mine, where, [](void** all, uint32_t mask) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      auto* own = static_cast<Operands*>(all[i]);
      if (own->source < 0 || own->source > 31) continue;  // keeps its own
      if (!(mask >> own->source & 1)) fail("a shuffle from a lane outside the mask");
      own->result = static_cast<Operands*>(all[own->source])->value;
    }
  });
  return mine.result;
}

inline uint32_t ballot(uint32_t mask, bool vote, const Where& where) {
  struct Operands {
    bool vote;
    uint32_t result;
  } mine{vote, 0};
  meet(mask, &mine, where, [](void** all, uint32_t mask) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1 && static_cast<Operands*>(all[i])->vote) votes |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) static_cast<Operands*>(all[i])->result = votes;
    }
  });
  return mine.result;
}

// ------------------------------------------------------------------------------------- fragments

// Four 8x8 matrices of 16-bit elements: lane 8m + i brings row i of matrix m, and gets of every
// matrix the elements (lane / 4, 2 (lane % 4)) and the next, or of its transpose.
template <bool transposed>
void ldmatrix(uint32_t (&r)[4], const void* row, const Where& where) {
  shared_offset(row, 16, 16, "ldmatrix");
  struct Operands {
    const uint16_t* row;
    uint32_t* r;
  } mine{static_cast<const uint16_t*>(row), r};
  meet(~0u, &mine, where, [](void** all, uint32_t) {
    const auto of = [&](int i) { return static_cast<Operands*>(all[i]); };
    for (int m = 0; m < 4; ++m) {
      int turns[8] = {};  // rows in the same banks take turns, but for one row twice
      for (int i = 0; i < 8; ++i) {
        bool seen = false;
        for (int j = 0; j < i; ++j) seen |= of(8 * m + j)->row == of(8 * m + i)->row;
        const auto at = reinterpret_cast<const unsigned char*>(of(8 * m + i)->row) - block->shared;
        turns[at / 16 % 8] += !seen;
      }
      ++counts.ldmatrix;
      counts.conflicts += *std::max_element(turns, turns + 8) - 1;
      for (int i = 0; i < 32; ++i) {
        const int g = i / 4, t = 2 * (i % 4);
        const auto element = [&](int row, int column) {
          return transposed ? of(8 * m + column)->row[row] : of(8 * m + row)->row[column];
        };
        of(i)->r[m] = element(g, t) | static_cast<uint32_t>(element(g, t + 1)) << 16;
      }
    }
  });
}

// D += A B with A (16, depth), B (depth, 8) and float32 sums; `depth` is 16 for 16-bit elements and
// 8 for tf32. unpack(lane's operands, lane / 4, lane % 4, A, B) tells whose elements are where.
template <int depth, class Unpack>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, const Where& where) {
  struct Operands {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  meet(~0u, &mine, where, [](void** all, uint32_t) {
    float a[16][depth], b[depth][8], d[16][8];
    const auto of = [&](int i) { return static_cast<Operands*>(all[i]); };
    for (int i = 0; i < 32; ++i) {
      Unpack()(of(i)->a, of(i)->b, i / 4, i % 4, a, b);
      for (int j = 0; j < 4; ++j) d[i / 4 + 8 * (j / 2)][2 * (i % 4) + j % 2] = of(i)->d[j];
    }
    for (int r = 0; r < 16; ++r) {
      for (int k = 0; k < depth; ++k) {
        for (int c = 0; c < 8; ++c) d[r][c] += a[r][k] * b[k][c];
      }
    }
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 4; ++j) of(i)->d[j] = d[i / 4 + 8 * (j / 2)][2 * (i % 4) + j % 2];
    }
    ++counts.mma;
  });
}

// ------------------------------------------------------------------------------------- four warps

// An element (side, depth) of an operand of wgmma: MN-major with the 128-byte swizzle, which
// changes addresses, not offsets. `side` goes along the rows of A or the columns of B.
inline uint16_t group_element(const unsigned char* from, int beside, int side, int depth) {
  const size_t linear = shared_offset(from, 1, 16, "an operand of wgmma") + side / 64 * beside +
                        depth / 8 * 1024 + depth % 8 * 128 + side % 64 * 2;
  const size_t swizzled = linear ^ ((linear >> 7 & 7) << 4);
  uint16_t element = 0;
  shared_offset(block->shared + swizzled, 2, 2, "an operand of wgmma");
  std::memcpy(&element, block->shared + swizzled, 2);
  return element;
}

// As device.h says; every lane computes its own sums, late: when it waits for them.
template <float (*to_float)(uint16_t)>
void group_mma(float (&d)[8][2][4], const unsigned char* a, const unsigned char* b, int beside,
               const Where& where) {
  if (shared_offset(a, 1, 16, "wgmma") % 1024 || shared_offset(b, 1, 16, "wgmma") % 1024) {
    fail("an operand of wgmma that does not begin with a swizzle's pattern");
  }
  meet(~0u, nullptr, where, [](void**, uint32_t) { ++counts.mma; });
  const int rank = block->current->rank, g = rank % 32 / 4, t = rank % 4;
  const auto product = [&d, a, b, beside, rank, g, t] {
    float rows[2][16], columns[16];
    for (int k = 0; k < 16; ++k) {
      for (int h = 0; h < 2; ++h) {
        rows[h][k] = to_float(group_element(a, beside, rank / 32 % 4 * 16 + g + 8 * h, k));
      }
    }
    for (int n = 0; n < 32; ++n) {  // the columns 8 (n / 2) + 2t + n % 2
      for (int k = 0; k < 16; ++k) {
        columns[k] = to_float(group_element(b, beside, n / 2 * 8 + 2 * t + n % 2, k));
      }
      for (int h = 0; h < 2; ++h) {
        float& sum = d[n / 4][n / 2 % 2][2 * h + n % 2];
        for (int k = 0; k < 16; ++k) sum += rows[h][k] * columns[k];
      }
    }
  };
  if (settings.late) {
    block->current->products.push_back(product);
  } else {
    product();
  }
}

inline void group_wait() {
  for (const auto& product : block->current->products) product();
  block->current->products.clear();
}

}  // namespace emulation
