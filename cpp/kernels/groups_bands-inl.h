// Groups with lanes over the rows of a band (groups/bands.h). Included once per ISA level.
#pragma once

#include <type_traits>

#include "../groups/bands.h"
#include "activation-inl.h"
#include "band-inl.h"

namespace spfmt {
namespace {

// Lanes = the band's rows: broadcasts of x and a contiguous run of weights, no gather. P columns of
// a band of 16 / P rows share a vector of weights; with P = 1 the upper lanes of a short band see
// weights of the next column and are not stored. kAdjacent: a feature's samples are side by side,
// which saves addresses. CH chains per sample hide the FMA latency when there are few samples.
// `readable` columns, a multiple of P, have sixteen weights that belong to the caller.
template <class S, int N, int CH, int P, bool kAdjacent, class T = typename S::T>
inline void band_samples(const Band& g, int64_t readable, const T* w, Strided<const T> x,
                         typename S::V* out) noexcept {
  const int64_t sample = kAdjacent ? 1 : x.sample_stride;
  typename S::V acc[CH][N];
  SPFMT_UNROLL
  for (int c = 0; c < CH; ++c) {
    SPFMT_UNROLL
    for (int b = 0; b < N; ++b) acc[c][b] = S::zero();
  }
  const auto step = [&](int64_t j, typename S::V* sum) {
    const auto weights = S::keep(S::load(w + j * g.rows));
    const T* xj[P];
    SPFMT_UNROLL
    for (int p = 0; p < P; ++p) xj[p] = x.data + g.col[j + p] * x.feature_stride;
    SPFMT_UNROLL
    for (int b = 0; b < N; ++b) {
      sum[b] = S::fma(weights, S::template spread<P>(xj, b * sample), sum[b]);
    }
  };
  int64_t j = 0;
  for (; j + CH * P <= readable; j += CH * P) {
    SPFMT_UNROLL
    for (int c = 0; c < CH; ++c) step(j + c * P, acc[c]);
  }
  for (; j < readable; j += P) step(j, acc[0]);
  SPFMT_UNROLL
  for (int b = 0; b < N; ++b) {
    SPFMT_UNROLL
    for (int c = 1; c < CH; ++c) acc[0][b] = S::add(acc[0][b], acc[c][b]);
    out[b] = S::template fold<P>(acc[0][b]);
  }
}

// The columns of the last bands that have fewer weights behind them than a vector holds.
template <class S, class T = typename S::T>
__attribute__((noinline)) void last_columns(const Band& g, int64_t j, const T* w,
                                            Strided<const T> x, int n,
                                            typename S::V* out) noexcept {
  for (; j < g.cols; ++j) {
    const auto wj = S::load(w + j * g.rows, g.rows);
    const T* xj = x.data + g.col[j] * x.feature_stride;
    for (int b = 0; b < n; ++b) out[b] = S::fma(wj, S::set1(xj[b * x.sample_stride]), out[b]);
  }
}

// Columns of a band, a multiple of the power of two `pack`, that have sixteen weights behind their
// start which belong to the caller: all but a few of the last band's.
inline int64_t readable_columns(const Groups& a, const Band& g, int pack) noexcept {
  const int64_t left = a.value_ptr[a.bands] - g.value, needed = g.cols * g.rows + kLanes - g.rows;
  int64_t columns = g.cols;
  if (left < needed) columns = left < kLanes ? 0 : (left - kLanes) / g.rows + 1;
  return columns & -int64_t{pack};
}

constexpr int most_chains(int chains) { return chains < 1 ? 1 : chains > 4 ? 4 : chains; }

template <class S, int N, bool kAdjacent, class T = typename S::T>
__attribute__((noinline)) void groups_bands_n(const Groups& a, const T* values, Strided<const T> x,
                                              const T* bias, Activation kind, Strided<T> y,
                                              bool quads, int64_t begin, int64_t end) noexcept {
  constexpr int kChains = most_chains(S::kBandSamples / N);
  for (int64_t t = begin; t < end; ++t) {
    const Band g = band_of(a, t);
    const int pack = g.rows == 8 ? 2 : g.rows == 4 && N <= 4 ? 4 : 1;  // as registers allow
    const int64_t readable = readable_columns(a, g, pack);
    typename S::V out[N];
    const auto call = [&](auto body) { body(g, readable, values + g.value, x, out); };
    if (pack == 1) call(band_samples<S, N, kChains, 1, kAdjacent>);
    if (pack == 2) call(band_samples<S, N, kChains, 2, kAdjacent>);
    if constexpr (N <= 4) {
      // Four broadcasts need two registers more, and four places of each sample their addresses.
      constexpr int kFewer = (S::kBandSamples - 2) / N / (kAdjacent ? 1 : 2);
      if (pack == 4) call(band_samples<S, N, most_chains(kFewer), 4, kAdjacent>);
    }
    if (readable < g.cols) last_columns<S>(g, readable, values + g.value, x, N, out);
    scatter_rows<S, N>(out, g.row, g.rows, bias, kind, y, quads);
  }
}

template <class S, int N, class T = typename S::T>
void groups_bands_to(const Groups& a, const T* values, Strided<const T> x, int n, const T* bias,
                     Activation kind, Strided<T> y, bool quads, int64_t begin,
                     int64_t end) noexcept {
  const auto call = [&](auto body) { body(a, values, x, bias, kind, y, quads, begin, end); };
  if constexpr (N > 1) {
    if (n < N) return groups_bands_to<S, N - 1>(a, values, x, n, bias, kind, y, quads, begin, end);
    if (x.sample_stride != 1) return call(groups_bands_n<S, N, false>);
  }
  call(groups_bands_n<S, N, true>);  // a single sample is adjacent to itself
}

template <class S, class T = typename S::T>
void groups_bands(const Groups& a, const T* values, Strided<const T> x, int n, const T* bias,
                  Activation kind, Strided<T> y, bool quads, int64_t begin, int64_t end) noexcept {
  static_assert(S::kBandSamples >= 4, "a part of fewer would write past eight samples");
  groups_bands_to<S, S::kBandSamples>(a, values, x, n, bias, kind, y, quads, begin, end);
}

template <class S, int N, class T = typename S::T>
void groups_t_bands_n(const Groups& a, const ColumnEntries& entries, const T* values,
                      const T* dy_bands, Strided<T> dx, int64_t begin, int64_t end) noexcept {
  for (int64_t c = begin; c < end; ++c) {
    typename S::V acc[N];
    for (int b = 0; b < N; ++b) acc[b] = S::zero();
    for (int64_t e = entries.col_ptr[c]; e < entries.col_ptr[c + 1]; ++e) {
      const int64_t t = entries.entry_band[e];
      const int rows = static_cast<int>(a.row_ptr[t + 1] - a.row_ptr[t]);
      const T* w = values + entries.entry_value[e];
      const auto wv = rows == kLanes ? S::load(w) : S::load(w, rows);
      for (int b = 0; b < N; ++b) {
        acc[b] = S::fma(wv, S::load(dy_bands + (b * a.bands + t) * kLanes), acc[b]);
      }
    }
    for (int b = 0; b < N; ++b) {
      dx.data[c * dx.feature_stride + b * dx.sample_stride] = S::sum(acc[b]);
    }
  }
}

template <class S, class T = typename S::T>
void groups_t_bands(const Groups& a, const ColumnEntries& entries, const T* values,
                    const T* dy_bands, int n, Strided<T> dx, int64_t begin, int64_t end) noexcept {
  const auto call = [&](auto body) { body(a, entries, values, dy_bands, dx, begin, end); };
  n == 1   ? call(groups_t_bands_n<S, 1>)
  : n == 2 ? call(groups_t_bands_n<S, 2>)
  : n == 3 ? call(groups_t_bands_n<S, 3>)
           : call(groups_t_bands_n<S, 4>);
}

template <class S>
constexpr BandBodies<typename S::T> band_bodies() {
  return {S::kBandSamples, groups_bands<S>, groups_t_bands<S>};
}

}  // namespace
}  // namespace spfmt
