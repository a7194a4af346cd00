// Groups with lanes over samples (groups/panels.h). Included once per ISA level.
#pragma once

#include <type_traits>

#include "../groups/panels.h"
#include "band-inl.h"

namespace spfmt {
namespace {

// Columns [begin, end) of a band. The first of them start rows of Y, later ones add to them.
struct Columns {
  int64_t begin, end;
};

// RB rows by NV registers of samples stay in place while columns pass by.
template <class R, int RB, int NV, class T = typename R::T>
inline void band_panel(const Band& g, Columns columns, const T* w, int first, const T* x,
                       int64_t width, const T* bias, T* y, int64_t ldy) noexcept {
  typename R::V acc[RB][NV];
  SPFMT_UNROLL
  for (int i = 0; i < RB; ++i) {
    const int32_t row = g.row[first + i];
    const auto start = R::set1(bias ? bias[row] : T(0));
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) {
      acc[i][v] = columns.begin == 0 ? start : R::load(y + row * ldy + v * R::kSamples);
    }
  }
  const T* weight = w + columns.begin * g.rows + first;
  // Twice, for fewer instructions beside the multiply-adds: two threads that share a core, as in a
  // cloud, share the instructions that it starts per cycle.
#pragma GCC unroll 2
  for (int64_t j = columns.begin; j < columns.end; ++j, weight += g.rows) {
    const T* xj = x + g.col[j] * width;
    typename R::V xv[NV];
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) xv[v] = R::load(xj + v * R::kSamples);
    SPFMT_UNROLL
    for (int i = 0; i < RB; ++i) {
      const auto wi = R::set1(weight[i]);
      SPFMT_UNROLL
      for (int v = 0; v < NV; ++v) acc[i][v] = R::fma(wi, xv[v], acc[i][v]);
    }
  }
  SPFMT_UNROLL
  for (int i = 0; i < RB; ++i) {
    T* out = y + g.row[first + i] * ldy;
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) R::store(out + v * R::kSamples, acc[i][v]);
  }
}

// Rows [first, ...) of a band, RB at a time, then the rest by halves.
template <class R, int RB, int NV, class T = typename R::T>
inline void band_rows(const Band& g, Columns columns, const T* w, int first, const T* x,
                      int64_t width, const T* bias, T* y, int64_t ldy) noexcept {
  for (; first + RB <= g.rows; first += RB) {
    band_panel<R, RB, NV>(g, columns, w, first, x, width, bias, y, ldy);
  }
  if constexpr (RB > 1) {
    if (first < g.rows) band_rows<R, RB / 2, NV>(g, columns, w, first, x, width, bias, y, ldy);
  }
}

// Samples [sample, sample + NV registers) of a panel. A function of its own, or its caller's
// variables take registers that addresses need.
template <class S, int NV, class T = typename S::T>
__attribute__((noinline)) void groups_panel_nv(const Groups& a, const T* values,
                                               const Panel<const T>& x, int64_t sample,
                                               const T* bias, T* y, int64_t ldy, int64_t begin,
                                               int64_t end) noexcept {
  // Fewer samples leave room for more rows where there are 32 registers.
  constexpr int kRows = S::kBlockRegisters < 4 || NV > 2 ? 4 : NV == 2 ? 8 : 16;
  const bool fed = x.features * x.width * static_cast<int64_t>(sizeof(T)) <= S::kFeedingPanel;
  for (int64_t t = begin; t < end; ++t) {
    const Band g = band_of(a, t);
    const int64_t parts = fed ? 1 : (g.cols + S::kBlockColumns / 2) / S::kBlockColumns;
    int64_t column = 0, part = 0;
    do {  // once for a band without columns: its rows are bias
      const int64_t stop = parts > 1 ? g.cols * ++part / parts : g.cols;
      band_rows<typename S::Register, kRows, NV>(g, {column, stop}, values + g.value, 0,
                                                 x.data + sample, x.width, bias, y + sample, ldy);
      column = stop;
    } while (column < g.cols);
  }
}

// body(n, sample) over a panel's samples in parts of up to kMost registers of R, n a constant. A
// panel's width is a multiple of sixteen samples, so that parts of eight samples never come up.
template <class R, int kMost, class Body>
void for_registers(int64_t width, const Body& body) {
  static_assert(kMost <= 4 && kMost * R::kSamples >= kLanes);
  for_parts(width / R::kSamples, kMost, [&](int64_t first, int n) {
    const int64_t sample = first * R::kSamples;
    if constexpr (kMost >= 4) {
      if (n == 4) return body(std::integral_constant<int, 4>(), sample);
    }
    if constexpr (kMost >= 3) {
      if (n == 3) return body(std::integral_constant<int, 3>(), sample);
    }
    if constexpr (kMost >= 2) {
      if (n == 2) return body(std::integral_constant<int, 2>(), sample);
    }
    if constexpr (R::kSamples == kLanes) body(std::integral_constant<int, 1>(), sample);
  });
}

template <class S, class T = typename S::T>
void groups_panel(const Groups& a, const T* values, const Panel<const T>& x, const T* bias, T* y,
                  int64_t ldy, int64_t begin, int64_t end) noexcept {
  // A few bands at a time, so that a level with narrow registers revisits weights in L1.
  constexpr int64_t kStep = 8;
  for (int64_t t = begin; t < end; t += kStep) {
    const int64_t stop = t + kStep < end ? t + kStep : end;
    for_registers<typename S::Register, S::kBlockRegisters>(
        x.width, [&](auto vecs, int64_t sample) {
          groups_panel_nv<S, vecs()>(a, values, x, sample, bias, y, ldy, t, stop);
        });
  }
}

// CB columns of dX by NV registers stay in place while the band's rows of dY pass by.
template <class R, int CB, int NV, class T = typename R::T>
inline void band_t_panel(const Band& g, const T* w, const int32_t* col, const T* dy, int64_t width,
                         T* dx) noexcept {
  typename R::V acc[CB][NV];
  const T* weights[CB];
  SPFMT_UNROLL
  for (int c = 0; c < CB; ++c) {
    weights[c] = w + c * g.rows;
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) acc[c][v] = R::load(dx + col[c] * width + v * R::kSamples);
  }
  SPFMT_UNROLL
  for (int i = 0; i < g.rows; ++i) {
    const T* dyi = dy + g.row[i] * width;
    typename R::V d[NV];
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) d[v] = R::load(dyi + v * R::kSamples);
    SPFMT_UNROLL
    for (int c = 0; c < CB; ++c) {
      const auto wi = R::set1(weights[c][i]);
      SPFMT_UNROLL
      for (int v = 0; v < NV; ++v) acc[c][v] = R::fma(wi, d[v], acc[c][v]);
    }
  }
  SPFMT_UNROLL
  for (int c = 0; c < CB; ++c) {
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) R::store(dx + col[c] * width + v * R::kSamples, acc[c][v]);
  }
}

template <class R, int NV, class T = typename R::T>
void groups_t_panel_nv(const Groups& a, const T* values, const T* dy, int64_t width,
                       T* dx) noexcept {
  for (int64_t t = 0; t < a.bands; ++t) {
    const Band g = band_of(a, t);
    const T* w = values + g.value;
    int64_t j = 0;
    for (; j + 4 <= g.cols; j += 4) {
      band_t_panel<R, 4, NV>(g, w + j * g.rows, g.col + j, dy, width, dx);
    }
    for (; j < g.cols; ++j) band_t_panel<R, 1, NV>(g, w + j * g.rows, g.col + j, dy, width, dx);
  }
}

template <class S, class T = typename S::T>
void groups_t_panel(const Groups& a, const T* values, const Panel<const T>& dy,
                    const Panel<T>& dx) noexcept {
  using R = typename S::Register;
  // Every part loads and stores dX: parts of whole cache lines, or short bands slow down.
  constexpr int kMost = S::kBlockRegisters * R::kSamples / kLanes * kLanes / R::kSamples;
  for_registers<R, kMost>(dy.width, [&](auto vecs, int64_t sample) {
    groups_t_panel_nv<R, vecs()>(a, values, dy.data + sample, dy.width, dx.data + sample);
  });
}

// The band's rows of dY, sixteen samples of all rows after each other; zeros behind a short band.
template <class S, class T = typename S::T>
void gather_rows(const Band& g, const SampleRows<T>& dy, int width, T* to) noexcept {
  for (int i = 0; i < kLanes; ++i) {
    const T* row = dy.data + int64_t{i < g.rows ? g.row[i] : 0} * dy.stride;
    for (int b = 0; b < width; b += kLanes) {
      S::store(to + b * kLanes + i * kLanes, i < g.rows ? S::load(row + b) : S::zero());
    }
  }
}

// Dot products of CB columns of X with the rows that gather_rows laid out, four rows at a time: for
// AVX-512's four columns that is 8 loads for 16 FMAs.
template <class S, int CB, class T = typename S::T>
inline void band_dots(const T* dy, int rows, const Panel<const T>& x, const int32_t* col,
                      typename S::Quad (*quad)[4]) noexcept {
  const T* xc[CB];
  SPFMT_UNROLL
  for (int c = 0; c < CB; ++c) xc[c] = x.data + int64_t{col[c]} * x.width;
  for (int i = 0; i < rows; i += 4) {
    typename S::Dot acc[CB][4];
    SPFMT_UNROLL
    for (int c = 0; c < CB; ++c) {
      SPFMT_UNROLL
      for (int k = 0; k < 4; ++k) acc[c][k] = S::dot_zero();
    }
    const T* d = dy + i * kLanes;
    for (int64_t b = 0; b < x.width; b += kLanes, d += kLanes * kLanes) {
      typename S::V dv[4];
      SPFMT_UNROLL
      for (int k = 0; k < 4; ++k) dv[k] = S::load(d + k * kLanes);
      SPFMT_UNROLL
      for (int c = 0; c < CB; ++c) {
        const auto xv = S::load(xc[c] + b);
        SPFMT_UNROLL
        for (int k = 0; k < 4; ++k) acc[c][k] = S::dot(xv, dv[k], acc[c][k]);
      }
    }
    SPFMT_UNROLL
    for (int c = 0; c < CB; ++c) {
      quad[c][i / 4] = S::quad(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
    }
  }
}

template <class S, int CB, class T = typename S::T>
void columns_sddmm(const Band& g, int64_t j, const T* dy, const Panel<const T>& x, bool accumulate,
                   T* gradient) noexcept {
  typename S::Quad quad[CB][4] = {};
  band_dots<S, CB>(dy, g.rows, x, g.col + j, quad);
  for (int c = 0; c < CB; ++c) {
    T* out = gradient + g.value + (j + c) * g.rows;
    auto sum = S::join(quad[c][0], quad[c][1], quad[c][2], quad[c][3]);
    if (accumulate) sum = S::add(sum, S::load(out, g.rows));
    S::store(out, sum, g.rows);
  }
}

template <class S, class T = typename S::T>
void groups_sddmm(const Groups& a, const SampleRows<T>& dy, const Panel<const T>& x,
                  bool accumulate, T* gradient, int64_t begin, int64_t end) noexcept {
  constexpr int kCols = S::kDotCols;
  alignas(64) T rows[kSampleStrip * kLanes];
  for (int64_t t = begin; t < end; ++t) {
    const Band g = band_of(a, t);
    gather_rows<S>(g, dy, x.width, rows);
    int64_t j = 0;
    for (; j + kCols <= g.cols; j += kCols) {
      columns_sddmm<S, kCols>(g, j, rows, x, accumulate, gradient);
    }
    for (; j < g.cols; ++j) columns_sddmm<S, 1>(g, j, rows, x, accumulate, gradient);
  }
}

template <class S>
constexpr GroupPanelBodies<typename S::T> group_panel_bodies() {
  return {groups_panel<S>, groups_t_panel<S>, groups_sddmm<S>};
}

}  // namespace
}  // namespace spfmt
