// Eight lanes of AVX2: the register of an octet at both vector levels, and of a panel at AVX2's.
// Interface as in scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unroll.h"

namespace spfmt {
namespace {

struct YmmSimd {
  using T = float;
  using V = __m256;
  static constexpr int kSamples = 8;

  // A window into this table is a mask of the first n lanes.
  static __m256i first(int n) noexcept {
    alignas(32) static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                      0,  0,  0,  0,  0,  0,  0,  0};
    const int k = n < 0 ? 0 : (n > 8 ? 8 : n);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - k));
  }

  static V zero() noexcept { return _mm256_setzero_ps(); }
  static V set1(T x) noexcept { return _mm256_set1_ps(x); }
  static V load(const T* p) noexcept { return _mm256_loadu_ps(p); }
  static V load(const T* p, int n) noexcept { return _mm256_maskload_ps(p, first(n)); }
  static void store(T* p, V v) noexcept { _mm256_storeu_ps(p, v); }
  // In pieces: AMD stores under a mask in microcode, some twenty cycles.
  __attribute__((always_inline)) static void store(T* p, V v, int n) noexcept {
    if (n >= 8) return store(p, v);
    if (n <= 0) return;
    __m128 rest = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
  }
  static V add(V a, V b) noexcept { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) noexcept { return _mm256_fmadd_ps(a, b, c); }
  static V twice(const T* p) noexcept {
    __m256 v = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    asm("" : "+x"(v));  // or GCC loads each of the four by itself
    return v;
  }
  template <int K>
  static V spread(V v) noexcept {
    return _mm256_permute_ps(v, K * 0x55);
  }
  // Out of line its operands would pass through memory.
  __attribute__((always_inline)) static void transpose(V* r) noexcept {
    __m256 t[8];
    SPFMT_UNROLL
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    SPFMT_UNROLL
    for (int i = 0; i < 8; i += 4) {
      SPFMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0x44);
        r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0xee);
      }
    }
    SPFMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    SPFMT_UNROLL
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace spfmt
