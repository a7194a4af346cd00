// Sixteen logical lanes without vector instructions; the only level that also does float64.
// The same interface is in avx2.h and avx512.h; kernels are written once against it.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/samples.h"
#include "../lists/lookup.h"

namespace spfmt {
namespace {

// N lanes: what eight and sixteen have in common.
template <class Real, int N>
struct ScalarLanes {
  using T = Real;
  static constexpr int kSamples = N;
  struct V {
    T lane[N];
  };
  static V zero() noexcept { return set1(T(0)); }
  static V set1(T x) noexcept {
    V v;
    for (T& lane : v.lane) lane = x;
    return v;
  }
  static V load(const T* p) noexcept {
    V v;
    for (int i = 0; i < N; ++i) v.lane[i] = p[i];
    return v;
  }
  // The first n lanes from memory, zero in the rest; memory behind them is not touched.
  static V load(const T* p, int n) noexcept {
    V v;
    for (int i = 0; i < N; ++i) v.lane[i] = i < n ? p[i] : T(0);
    return v;
  }
  static void store(T* p, const V& v) noexcept {
    for (int i = 0; i < N; ++i) p[i] = v.lane[i];
  }
  static void store(T* p, const V& v, int n) noexcept {
    for (int i = 0; i < n && i < N; ++i) p[i] = v.lane[i];
  }
  static V add(const V& a, const V& b) noexcept {
    V v;
    for (int i = 0; i < N; ++i) v.lane[i] = a.lane[i] + b.lane[i];
    return v;
  }
  static V fma(const V& a, const V& b, const V& c) noexcept {
    V v;
    for (int i = 0; i < N; ++i) v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return v;
  }
  static void transpose(V* a) noexcept {
    for (int i = 0; i < N; ++i) {
      for (int j = i + 1; j < N; ++j) {
        const T t = a[i].lane[j];
        a[i].lane[j] = a[j].lane[i];
        a[j].lane[i] = t;
      }
    }
  }
};

template <class Real>
struct ScalarHalfSimd : ScalarLanes<Real, kLanes / 2> {
  using V = typename ScalarLanes<Real, kLanes / 2>::V;
  // Four elements, twice; then one of them in all lanes.
  static V twice(const Real* p) noexcept {
    V v;
    for (int i = 0; i < kLanes / 2; ++i) v.lane[i] = p[i % 4];
    return v;
  }
  template <int K>
  static V spread(const V& v) noexcept {
    return ScalarHalfSimd::set1(v.lane[K]);
  }
};

template <class Real>
struct ScalarSimd : ScalarLanes<Real, kLanes> {
  using Lanes = ScalarLanes<Real, kLanes>;
  using T = Real;
  using V = typename Lanes::V;
  using Lanes::fma, Lanes::set1, Lanes::zero;
  using Half = ScalarHalfSimd<Real>;
  // The register that holds samples of a panel, kSamples of them, and how many registers of
  // accumulators each of four rows may have. A panel of X of up to kFeedingPanel bytes comes from
  // L2 as fast as these four rows need it; from a larger one a tile takes kBlockColumns columns at
  // a time, so that its other rows find them in L1.
  using Register = ScalarSimd;
  static constexpr int kBlockRegisters = 1;
  static constexpr int64_t kFeedingPanel = 0, kBlockColumns = 64;
  // Rows whose four accumulator vectors fit it side by side.
  static constexpr int kPieces = 1;
  // Vectors that fit it next to one of weights, and are enough to hide the latency of an FMA.
  static constexpr int kBandSamples = 6;
  // Columns of X whose dot products with four rows of dY fit it.
  static constexpr int kDotCols = 1;
  // Samples and columns of a window that one pass over slices takes at most.
  static constexpr int kLookupSamples = 2, kWidestWindow = 32;
  // Of convolutions: accumulators of a tile of outputs next to a vector of weights, and of one of
  // dX; columns whose gradients fit next to a vector of dY; vectors of outputs of one list, and of
  // its dY, that are held while its columns pass by.
  static constexpr int kImageOutputs = 4, kTurnedOutputs = 4, kGradientColumns = 2;
  static constexpr double kTileCost = 1.0;
  static constexpr int64_t kImageColumns = 64;
  static constexpr int kImageVectors = 2, kHeldVectors = 2;

  // to(i, quad) for every lane i; quad(p) stores that lane of four vectors at p.
  template <class To>
  static void store_quads(const V* v, const To& to) noexcept {
    for (int i = 0; i < kLanes; ++i) {
      to(i, [&](T* p) {
        for (int b = 0; b < 4; ++b) p[b] = v[b].lane[i];
      });
    }
  }
  static V keep(const V& v) noexcept { return v; }
  static V mul(const V& a, const V& b) noexcept {
    V v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] * b.lane[i];
    return v;
  }
  static T sum(const V& v) noexcept {
    T total = T(0);
    for (T lane : v.lane) total += lane;
    return total;
  }
  // Activations of this level are libm's. The others have, beside sub, div and magnitude:
  //   min(a, b), max(a, b)   b where either is NaN
  //   if_negative(x, a, b)   a where x has its sign bit set, else b
  //   round(v)               nearest integer, ties to even
  //   scale(v, n)            v * 2^n for an integer n in [-126, 127]
  static constexpr bool kLibm = true;
  static double exp(double x) noexcept { return std::exp(x); }
  static double erfc(double x) noexcept { return std::erfc(x); }

  // Dot products: partial sums of one in a V, in a Dot, which may take fewer registers, and of four
  // in a Quad; sixteen results in a V.
  using Dot = V;
  static Dot dot_of(const V& v) noexcept { return v; }
  static Dot dot_zero() noexcept { return zero(); }
  static Dot dot(const V& a, const V& b, const Dot& sum) noexcept { return fma(a, b, sum); }
  struct Quad {
    T sum[4];
  };
  static Quad quad(const Dot& a, const Dot& b, const Dot& c, const Dot& d) noexcept {
    return {{sum(a), sum(b), sum(c), sum(d)}};
  }
  // Lane 4 q + i is the i-th dot product of quad q.
  static V join(const Quad& a, const Quad& b, const Quad& c, const Quad& d) noexcept {
    V v;
    for (int i = 0; i < 4; ++i) {
      v.lane[i] = a.sum[i];
      v.lane[4 + i] = b.sum[i];
      v.lane[8 + i] = c.sum[i];
      v.lane[12 + i] = d.sum[i];
    }
    return v;
  }
  // Lanes in P equal parts, part p filled with x[p][b].
  template <int P>
  static V spread(const T* const* x, int64_t b) noexcept {
    V v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = x[i * P / kLanes][b];
    return v;
  }
  // The sum of P equal parts of the lanes, in the first of them.
  template <int P>
  static V fold(const V& v) noexcept {
    V sum = v;
    for (int i = kLanes / P; i < kLanes; ++i) sum.lane[i % (kLanes / P)] += v.lane[i];
    return sum;
  }
  // Four elements, again and again; then one of them in all lanes.
  static V repeat4(const T* p) noexcept {
    V v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = p[i % 4];
    return v;
  }
  template <int K>
  static V each(const V& v) noexcept {
    return set1(v.lane[K]);
  }
  static V whole(const typename Half::V& lo, const typename Half::V& hi) noexcept {
    V v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = i < 8 ? lo.lane[i] : hi.lane[i - 8];
    return v;
  }

  // Codes of a slice, see lists/lookup.h.
  template <int kWidth>
  struct Index {
    const uint8_t* code;
    Index() = default;
    explicit Index(const uint8_t* p) noexcept : code(p) {}
  };

  // Looks sixteen of a window's x up. Blocks of 16 of them are `stride` apart.
  template <int kWidth>
  struct Table {
    static_assert(kWidth == 32, "this level looks at the narrower windows only");
    const T* x;
    int64_t stride;
    Table(const T* p, int64_t s) noexcept : x(p), stride(s) {}
    T at(uint8_t code) const noexcept { return x[(code >> 4 & 1) * stride + (code & 15)]; }
    V lookup(const Index<kWidth>& index) const noexcept {
      V v;
      for (int i = 0; i < kLanes; ++i) v.lane[i] = at(index.code[i]);
      return v;
    }
    // Zero where the code marks padding, whatever x holds.
    V lookup_masked(const Index<kWidth>& index) const noexcept {
      V v;
      for (int i = 0; i < kLanes; ++i) {
        v.lane[i] = index.code[i] & kPadding ? T(0) : at(index.code[i]);
      }
      return v;
    }
  };
};

}  // namespace
}  // namespace spfmt
