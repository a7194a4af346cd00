// AVX2 + FMA: sixteen lanes are two registers. Interface as in scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../core/samples.h"
#include "../lists/lookup.h"
#include "octet.h"

namespace spfmt {
namespace {

struct Avx2Simd {
  using T = float;
  struct V {
    __m256 lo, hi;
  };
  using Half = YmmSimd;
  using Register = YmmSimd;
  static constexpr int kSamples = kLanes;
  static constexpr int kBlockRegisters = 3;  // four rows by three, of sixteen
  static constexpr int64_t kFeedingPanel = 0, kBlockColumns = 64;
  static constexpr int kPieces = 1;  // four vectors are eight registers
  static constexpr int kBandSamples = 6;
  static constexpr int kDotCols = 2;
  static constexpr int kLookupSamples = 2, kWidestWindow = 32;
  static constexpr int kImageOutputs = 6, kTurnedOutputs = 8, kGradientColumns = 5;
  static constexpr double kTileCost = 4.0;
  static constexpr int64_t kImageColumns = 64;
  static constexpr int kImageVectors = 4, kHeldVectors = 4;

  static V zero() noexcept { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static V set1(T x) noexcept {
    const __m256 v = _mm256_set1_ps(x);
    return {v, v};
  }
  static V load(const T* p) noexcept { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static V load(const T* p, int n) noexcept {
    return {_mm256_maskload_ps(p, YmmSimd::first(n)),
            _mm256_maskload_ps(p + 8, YmmSimd::first(n - 8))};
  }
  static void store(T* p, V v) noexcept {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
  }
  static void store(T* p, V v, int n) noexcept {
    YmmSimd::store(p, v.lo, n);
    YmmSimd::store(p + 8, v.hi, n - 8);
  }
  template <class To>
  static void store_quads(const V* v, const To& to) noexcept {
    quads8(v[0].lo, v[1].lo, v[2].lo, v[3].lo, to);
    quads8(v[0].hi, v[1].hi, v[2].hi, v[3].hi, [&](int i, auto quad) { to(8 + i, quad); });
  }
  template <class To>
  static void quads8(__m256 a, __m256 b, __m256 c, __m256 d, const To& to) noexcept {
    const __m256 ab = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
    const __m256 cd = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
    const auto lanes = [&](int i, __m256 v) {
      to(i, [&](T* p) { _mm_storeu_ps(p, _mm256_castps256_ps128(v)); });
      to(4 + i, [&](T* p) { _mm_storeu_ps(p, _mm256_extractf128_ps(v, 1)); });
    };
    lanes(0, _mm256_shuffle_ps(ab, cd, 0x44));
    lanes(1, _mm256_shuffle_ps(ab, cd, 0xee));
    lanes(2, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
    lanes(3, _mm256_shuffle_ps(ab_high, cd_high, 0xee));
  }
  // In registers from here on: GCC may load a value again for each of its uses.
  static V keep(V v) noexcept {
    asm("" : "+x"(v.lo), "+x"(v.hi));
    return v;
  }
  static V add(V a, V b) noexcept { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static V mul(V a, V b) noexcept { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static V fma(V a, V b, V c) noexcept {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static T sum(V v) noexcept {
    const __m256 a = _mm256_add_ps(v.lo, v.hi);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  static constexpr bool kLibm = false;
  static V sub(V a, V b) noexcept { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static V div(V a, V b) noexcept { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static V min(V a, V b) noexcept { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static V max(V a, V b) noexcept { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static V magnitude(V v) noexcept {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, v.lo), _mm256_andnot_ps(sign, v.hi)};
  }
  static V if_negative(V x, V a, V b) noexcept {
    return {_mm256_blendv_ps(b.lo, a.lo, x.lo), _mm256_blendv_ps(b.hi, a.hi, x.hi)};
  }
  static V round(V v) noexcept {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(v.lo, kNearest), _mm256_round_ps(v.hi, kNearest)};
  }
  static __m256 scale8(__m256 v, __m256 n) noexcept {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static V scale(V v, V n) noexcept { return {scale8(v.lo, n.lo), scale8(v.hi, n.hi)}; }

  using Dot = __m256;
  static Dot dot_of(V v) noexcept { return _mm256_add_ps(v.lo, v.hi); }
  static Dot dot_zero() noexcept { return _mm256_setzero_ps(); }
  static Dot dot(V a, V b, Dot sum) noexcept {
    return _mm256_fmadd_ps(a.hi, b.hi, _mm256_fmadd_ps(a.lo, b.lo, sum));
  }
  using Quad = __m256;  // its 128-bit lanes hold two partial sums of four dots side by side
  static Quad quad(Dot a, Dot b, Dot c, Dot d) noexcept {
    return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  }
  static __m256 fold128(Quad a, Quad b) noexcept {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  static V join(Quad a, Quad b, Quad c, Quad d) noexcept { return {fold128(a, b), fold128(c, d)}; }

  static __m256 spread2(T a, T b) noexcept {
    return _mm256_blend_ps(_mm256_set1_ps(a), _mm256_set1_ps(b), 0xf0);
  }
  template <int P>
  static V spread(const T* const* x, int64_t b) noexcept {
    if constexpr (P == 1) return set1(x[0][b]);
    if constexpr (P == 2) return {_mm256_set1_ps(x[0][b]), _mm256_set1_ps(x[1][b])};
    if constexpr (P == 4) return {spread2(x[0][b], x[1][b]), spread2(x[2][b], x[3][b])};
  }
  template <int P>
  static V fold(V v) noexcept {
    if constexpr (P >= 2) v.lo = _mm256_add_ps(v.lo, v.hi);
    if constexpr (P == 4) v.lo = _mm256_add_ps(v.lo, _mm256_permute2f128_ps(v.lo, v.lo, 0x01));
    return v;
  }
  static void transpose(V* a) noexcept {
    __m256 q[4][8];
    SPFMT_UNROLL
    for (int i = 0; i < 8; ++i) {
      q[0][i] = a[i].lo;
      q[1][i] = a[i].hi;
      q[2][i] = a[i + 8].lo;
      q[3][i] = a[i + 8].hi;
    }
    SPFMT_UNROLL
    for (auto& block : q) YmmSimd::transpose(block);
    SPFMT_UNROLL
    for (int i = 0; i < 8; ++i) {
      a[i] = {q[0][i], q[2][i]};
      a[i + 8] = {q[1][i], q[3][i]};
    }
  }

  static V repeat4(const T* p) noexcept {
    const __m256 four = YmmSimd::twice(p);
    return {four, four};
  }
  template <int K>
  static V each(V v) noexcept {
    const __m256 one = YmmSimd::spread<K>(v.lo);
    return {one, one};
  }
  static V whole(__m256 lo, __m256 hi) noexcept { return {lo, hi}; }

  // Codes of a slice, widened once for all samples.
  template <int kWidth>
  struct Index {
    __m256i lo, hi;
    Index() = default;
    explicit Index(const uint8_t* code) noexcept : lo(widen(code)), hi(widen(code + 8)) {}
    static __m256i widen(const uint8_t* code) noexcept {
      return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code)));
    }
  };

  // 32 consecutive x are four registers: vpermps looks eight lanes up in each, and bits 3 and 4 of
  // the column, moved to the sign, choose among the four. More instructions than two gathers, but
  // a gather takes a load per lane.
  template <int kWidth>
  struct Table {
    static_assert(kWidth == 32, "wider windows take more look-ups than they save");
    const T* x;
    int64_t stride;
    Table(const T* p, int64_t s) noexcept : x(p), stride(s) {}
    static __m256 choose(__m256 a, __m256 b, __m256i sign) noexcept {
      return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(sign));
    }
    __m256 pick(__m256i i) const noexcept {
      const __m256i bit3 = _mm256_slli_epi32(i, 28), bit4 = _mm256_slli_epi32(i, 27);
      const __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), i);
      const __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), i);
      const __m256 c = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + stride), i);
      const __m256 d = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + stride + 8), i);
      return choose(choose(a, b, bit3), choose(c, d, bit3), bit4);
    }
    V lookup(const Index<kWidth>& i) const noexcept { return {pick(i.lo), pick(i.hi)}; }
    static __m256 clear_padding(__m256 v, __m256i i) noexcept {
      const __m256i flag = _mm256_and_si256(i, _mm256_set1_epi32(kPadding));
      const __m256i used = _mm256_cmpeq_epi32(flag, _mm256_setzero_si256());
      return _mm256_and_ps(v, _mm256_castsi256_ps(used));
    }
    V lookup_masked(const Index<kWidth>& i) const noexcept {
      return {clear_padding(pick(i.lo), i.lo), clear_padding(pick(i.hi), i.hi)};
    }
  };
};

}  // namespace
}  // namespace spfmt
