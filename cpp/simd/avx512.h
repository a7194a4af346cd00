// AVX-512 (F, BW, DQ, VL): sixteen lanes are one register. Interface as in scalar.h.
#pragma once

#ifdef SPFMT_EMULATE_AVX512
#include "emulated.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "../core/samples.h"
#include "../lists/lookup.h"
#include "octet.h"

namespace spfmt {
namespace {

struct Avx512Simd {
  using T = float;
  using V = __m512;
  using Half = YmmSimd;
  using Register = Avx512Simd;
  static constexpr int kSamples = kLanes, kBlockRegisters = 4;
  static constexpr int64_t kFeedingPanel = 1 << 20, kBlockColumns = 64;
  static constexpr int kPieces = 2;
  static constexpr int kBandSamples = 8;
  static constexpr int kDotCols = 4;
  static constexpr int kLookupSamples = 8, kWidestWindow = 64;
  static constexpr int kImageOutputs = 28, kTurnedOutputs = 16, kGradientColumns = 10;
  static constexpr double kTileCost = 1.5;
  static constexpr int64_t kImageColumns = 256;
  static constexpr int kImageVectors = 8, kHeldVectors = 16;

  static __mmask16 first(int n) noexcept { return static_cast<__mmask16>((1u << n) - 1u); }

  static V zero() noexcept { return _mm512_setzero_ps(); }
  static V set1(T x) noexcept { return _mm512_set1_ps(x); }
  static V load(const T* p) noexcept { return _mm512_loadu_ps(p); }
  static V load(const T* p, int n) noexcept { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(T* p, V v) noexcept { _mm512_storeu_ps(p, v); }
  static void store(T* p, V v, int n) noexcept { _mm512_mask_storeu_ps(p, first(n), v); }
  template <class To>
  static void store_quads(const V* v, const To& to) noexcept {
    const V ab = _mm512_unpacklo_ps(v[0], v[1]), ab_high = _mm512_unpackhi_ps(v[0], v[1]);
    const V cd = _mm512_unpacklo_ps(v[2], v[3]), cd_high = _mm512_unpackhi_ps(v[2], v[3]);
    const auto lanes = [&](int i, V four) {
      to(i, [&](T* p) { _mm_storeu_ps(p, _mm512_castps512_ps128(four)); });
      to(4 + i, [&](T* p) { _mm_storeu_ps(p, _mm512_extractf32x4_ps(four, 1)); });
      to(8 + i, [&](T* p) { _mm_storeu_ps(p, _mm512_extractf32x4_ps(four, 2)); });
      to(12 + i, [&](T* p) { _mm_storeu_ps(p, _mm512_extractf32x4_ps(four, 3)); });
    };
    lanes(0, _mm512_shuffle_ps(ab, cd, 0x44));
    lanes(1, _mm512_shuffle_ps(ab, cd, 0xee));
    lanes(2, _mm512_shuffle_ps(ab_high, cd_high, 0x44));
    lanes(3, _mm512_shuffle_ps(ab_high, cd_high, 0xee));
  }
  // In a register from here on: GCC may load a value again for each of its uses.
  static V keep(V v) noexcept {
#ifndef SPFMT_EMULATE_AVX512
    asm("" : "+v"(v));
#endif
    return v;
  }
  static V add(V a, V b) noexcept { return _mm512_add_ps(a, b); }
  static V mul(V a, V b) noexcept { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) noexcept { return _mm512_fmadd_ps(a, b, c); }
  static T sum(V v) noexcept { return _mm512_reduce_add_ps(v); }

  static constexpr bool kLibm = false;
  static V sub(V a, V b) noexcept { return _mm512_sub_ps(a, b); }
  static V div(V a, V b) noexcept { return _mm512_div_ps(a, b); }
  static V min(V a, V b) noexcept { return _mm512_min_ps(a, b); }
  static V max(V a, V b) noexcept { return _mm512_max_ps(a, b); }
  static V magnitude(V v) noexcept { return _mm512_abs_ps(v); }
  static V if_negative(V x, V a, V b) noexcept {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
  }
  static V round(V v) noexcept {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static V scale(V v, V n) noexcept { return _mm512_scalef_ps(v, n); }

  using Dot = V;
  static Dot dot_of(V v) noexcept { return v; }
  static Dot dot_zero() noexcept { return zero(); }
  static Dot dot(V a, V b, Dot sum) noexcept { return fma(a, b, sum); }
  using Quad = V;  // its 128-bit lanes hold four partial sums of four dots side by side
  static Quad quad(Dot a, Dot b, Dot c, Dot d) noexcept {
    const V ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const V cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
               _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  static V fold128(V a, V b) noexcept {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  static V join(Quad a, Quad b, Quad c, Quad d) noexcept {
    return fold128(fold128(a, b), fold128(c, d));
  }

  static __m256 halves(T a, T b) noexcept {
    return _mm256_blend_ps(_mm256_set1_ps(a), _mm256_set1_ps(b), 0xf0);
  }
  template <int P>
  static V spread(const T* const* x, int64_t b) noexcept {
    if constexpr (P == 1) return set1(x[0][b]);
    const __m256 lo = P == 2 ? _mm256_set1_ps(x[0][b]) : halves(x[0][b], x[1][b]);
    const __m256 hi = P == 2 ? _mm256_set1_ps(x[1][b]) : halves(x[P - 2][b], x[P - 1][b]);
    return _mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1);
  }
  template <int P>
  static V fold(V v) noexcept {
    if constexpr (P >= 2) v = add(v, _mm512_shuffle_f32x4(v, v, 0x4e));  // halves
    if constexpr (P == 4) v = add(v, _mm512_shuffle_f32x4(v, v, 0xb1));  // quarters
    return v;
  }
  // Out of line its operands would pass through memory.
  __attribute__((always_inline)) static void transpose(V* a) noexcept {
    V t[kLanes];
    SPFMT_UNROLL
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    SPFMT_UNROLL
    for (int i = 0; i < 16; i += 4) {
      SPFMT_UNROLL
      for (int h = 0; h < 2; ++h) {
        const __m512d x = _mm512_castps_pd(t[i + h]), y = _mm512_castps_pd(t[i + h + 2]);
        a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
        a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
      }
    }
    // Now 4x4 blocks are transposed; transpose the 4x4 grid of 128-bit lanes.
    SPFMT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const V x = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88);
      const V y = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
      const V z = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
      const V w = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
      t[j] = _mm512_shuffle_f32x4(x, z, 0x88);
      t[j + 8] = _mm512_shuffle_f32x4(x, z, 0xdd);
      t[j + 4] = _mm512_shuffle_f32x4(y, w, 0x88);
      t[j + 12] = _mm512_shuffle_f32x4(y, w, 0xdd);
    }
    SPFMT_UNROLL
    for (int i = 0; i < 16; ++i) a[i] = t[i];
  }

  static V repeat4(const T* p) noexcept { return keep(_mm512_broadcast_f32x4(_mm_loadu_ps(p))); }
  template <int K>
  static V each(V v) noexcept {
    return _mm512_permute_ps(v, K * 0x55);
  }
  static V whole(__m256 lo, __m256 hi) noexcept {
    return _mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1);
  }

  // Codes of a slice, widened once for all samples.
  template <int kWidth>
  struct Index {
    __m512i column;
    __mmask16 high;  // 64 columns: which lanes look at the upper 32
    Index() = default;
    explicit Index(const uint8_t* code) noexcept {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code));
      column = _mm512_cvtepu8_epi32(bytes);
      if constexpr (kWidth == 64) high = _mm_movepi8_mask(bytes);
    }
    __mmask16 used() const noexcept {
      return _mm512_testn_epi32_mask(column, _mm512_set1_epi32(kPadding));
    }
  };

  // 32 consecutive x stay in two registers; vpermi2ps looks sixteen of them up at once. That is
  // several times faster than vgatherdps, which takes a load per lane. 64 take two look-ups.
  template <int kWidth>
  struct Table {
    V a, b, c, d;  // no array: GCC would keep it in memory
    Table(const T* x, int64_t stride) noexcept {
      a = keep(load(x));  // or GCC makes each look-up load both of its registers again
      b = keep(load(x + stride));
      if constexpr (kWidth == 64) {
        c = keep(load(x + 2 * stride));
        d = keep(load(x + 3 * stride));
      }
    }
    V lookup(const Index<kWidth>& i) const noexcept {
      const V low = _mm512_permutex2var_ps(a, i.column, b);  // ignores all but the lowest five bits
      if constexpr (kWidth == 64) {
        return _mm512_mask_blend_ps(i.high, low, _mm512_permutex2var_ps(c, i.column, d));
      }
      return low;
    }
    V lookup_masked(const Index<kWidth>& i) const noexcept {
      return _mm512_maskz_mov_ps(i.used(), lookup(i));
    }
  };
};

}  // namespace
}  // namespace spfmt
