// Products of RowLists (condensed, N:M, CSR). Included once per ISA level.
#pragma once

#include "../tiles.h"

namespace spfmt {
namespace {

// The last vector of a row of Y: scratch panels take all lanes, the caller's memory `last` of them.
template <class S, class T = typename S::T>
inline typename S::V load_last(const T* p, int last) noexcept {
  return last == kLanes ? S::load(p) : S::load(p, last);
}
template <class S, class T = typename S::T>
inline void store_last(T* p, typename S::V v, int last) noexcept {
  if (last == kLanes) {
    S::store(p, v);
  } else {
    S::store(p, v, last);
  }
}

// N pieces of equal length against NV vectors of samples: y[i] (+)= sum_k w[i][k] * x[col[i][k]].
// One row alone offers only NV independent chains, fewer than the FMA units' latency needs.
template <class S, int N, int NV, class T = typename S::T>
inline void pieces_panel(const T* const* w, const int32_t* const* col, int count, const T* x,
                         int64_t width, const T* start, T* const* y, int last) noexcept {
  typename S::V acc[N][NV];
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < NV; ++v) {
      acc[i][v] = start        ? S::set1(start[i])
                  : v < NV - 1 ? S::load(y[i] + v * kLanes)
                               : load_last<S>(y[i] + v * kLanes, last);
    }
  }
  for (int k = 0; k < count; ++k) {
    for (int i = 0; i < N; ++i) {
      const auto weight = S::set1(w[i][k]);
      const T* xk = x + col[i][k] * width;
      for (int v = 0; v < NV; ++v) acc[i][v] = S::fma(weight, S::load(xk + v * kLanes), acc[i][v]);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < NV - 1; ++v) S::store(y[i] + v * kLanes, acc[i][v]);
    store_last<S>(y[i] + (NV - 1) * kLanes, acc[i][NV - 1], last);
  }
}

// One (chunk, tile): pieces sorted by length, in pairs where two lengths agree.
template <class S, int NV, class T = typename S::T>
void tile_pieces(const RowPiece* piece, int64_t pieces, bool first, const T* w, const int32_t* col,
                 const T* x, int64_t width, const T* bias, T* y, int64_t ldy, int last) noexcept {
  for (int64_t j = 0; j < pieces && (first || piece[j].count > 0);) {
    const int n = j + 1 < pieces && piece[j].count == piece[j + 1].count ? 2 : 1;
    const T* weights[2];
    const int32_t* columns[2];
    T start[2], *out[2];
    for (int i = 0; i < n; ++i) {
      const RowPiece& q = piece[j + i];
      weights[i] = w + q.start;
      columns[i] = col + q.start;
      out[i] = y + q.row * ldy;
      start[i] = bias ? bias[q.row] : T(0);
    }
    const T* init = first ? start : nullptr;
    if (n == 2) {
      pieces_panel<S, 2, NV>(weights, columns, piece[j].count, x, width, init, out, last);
    } else {
      pieces_panel<S, 1, NV>(weights, columns, piece[j].count, x, width, init, out, last);
    }
    j += n;
  }
}

template <class S, int NV, class T = typename S::T>
void lists_panel_nv(const RowLists& a, const RowTiles& tiles, const T* values,
                    const Panel<const T>& x, const T* bias, T* y, int64_t ldy, int64_t begin,
                    int64_t end) noexcept {
  const int last = x.samples - (NV - 1) * kLanes;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t row = chunk * kRowChunk;
    const int64_t rows = a.rows - row < kRowChunk ? a.rows - row : kRowChunk;
    const T* w = values + tiles.base[chunk];
    const int32_t* col = a.col_indices + tiles.base[chunk];
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const RowPiece* piece = tiles.piece + (chunk * tiles.tiles + t) * kRowChunk;
      tile_pieces<S, NV>(piece, rows, t == 0, w, col, x.data, x.width, bias ? bias + row : nullptr,
                         y + row * ldy, ldy, last);
    }
  }
}

template <class S, class T = typename S::T>
void lists_panel(const RowLists& a, const RowTiles& tiles, const T* values, const Panel<const T>& x,
                 const T* bias, T* y, int64_t ldy, int64_t begin, int64_t end) noexcept {
  const auto call = [&](auto body) { body(a, tiles, values, x, bias, y, ldy, begin, end); };
  switch (x.width / kLanes) {
    case 1:
      return call(lists_panel_nv<S, 1>);
    case 2:
      return call(lists_panel_nv<S, 2>);
    case 3:
      return call(lists_panel_nv<S, 3>);
    default:
      return call(lists_panel_nv<S, 4>);
  }
}

// One slice of 16 rows against N tokens. Two chains per token hide the FMA latency.
template <class S, int N, bool kFinite, class T = typename S::T>
inline void slice_tokens(const RowSlices& a, const T* packed, const T* x, int64_t ldx,
                         int64_t slice, typename S::V* acc) noexcept {
  typename S::V odd[N];
  for (int b = 0; b < N; ++b) acc[b] = odd[b] = S::zero();
  for (int64_t q = a.slice_ptr[slice]; q < a.slice_ptr[slice + 1]; ++q) {
    const int64_t column = int64_t{a.chunk[q]} * kChunk;
    const int64_t left = a.cols - column;
    typename S::Table table[N];
    for (int b = 0; b < N; ++b) {
      table[b] =
          typename S::Table(x + b * ldx + column, left < kChunk ? static_cast<int>(left) : kChunk);
    }
    const auto pick = [&](int b, int64_t k) {
      const uint8_t* index = a.byte_index + k * kLanes;
      return kFinite ? table[b].lookup(index) : table[b].lookup_masked(index);
    };
    int64_t k = a.step_ptr[q];
    const int64_t stop = a.step_ptr[q + 1];
    for (; k + 2 <= stop; k += 2) {
      const auto w0 = S::load(packed + k * kLanes), w1 = S::load(packed + (k + 1) * kLanes);
      for (int b = 0; b < N; ++b) acc[b] = S::fma(w0, pick(b, k), acc[b]);
      for (int b = 0; b < N; ++b) odd[b] = S::fma(w1, pick(b, k + 1), odd[b]);
    }
    if (k < stop) {
      const auto w0 = S::load(packed + k * kLanes);
      for (int b = 0; b < N; ++b) acc[b] = S::fma(w0, pick(b, k), acc[b]);
    }
  }
  for (int b = 0; b < N; ++b) acc[b] = S::add(acc[b], odd[b]);
}

template <class S, int N, bool kFinite, class T = typename S::T>
void slices_tokens_n(const RowSlices& a, const T* packed, const T* x, int64_t ldx, const T* bias,
                     Strided<T> y, int64_t begin, int64_t end) noexcept {
  for (int64_t slice = begin; slice < end; ++slice) {
    typename S::V acc[N];
    slice_tokens<S, N, kFinite>(a, packed, x, ldx, slice, acc);
    const int32_t* row = a.lane_row + slice * kLanes;
    for (int b = 0; b < N; ++b) {
      T lane[kLanes];
      S::store(lane, acc[b]);
      for (int i = 0; i < kLanes && row[i] >= 0; ++i) {
        T* out = y.data + row[i] * y.feature_stride + b * y.sample_stride;
        *out = lane[i] + (bias ? bias[row[i]] : T(0));
      }
    }
  }
}

// `finite`: every x is finite, so padding (0 * x) adds nothing and needs no mask.
template <class S, class T = typename S::T>
void slices_tokens(const RowSlices& a, const T* packed, const T* x, int64_t ldx, int n, bool finite,
                   const T* bias, Strided<T> y, int64_t begin, int64_t end) noexcept {
  const auto call = [&](auto one, auto two, auto three, auto four) {
    (n == 1 ? one : n == 2 ? two : n == 3 ? three : four)(a, packed, x, ldx, bias, y, begin, end);
  };
  if (finite) {
    call(slices_tokens_n<S, 1, true>, slices_tokens_n<S, 2, true>, slices_tokens_n<S, 3, true>,
         slices_tokens_n<S, 4, true>);
  } else {
    call(slices_tokens_n<S, 1, false>, slices_tokens_n<S, 2, false>, slices_tokens_n<S, 3, false>,
         slices_tokens_n<S, 4, false>);
  }
}

// Dot products of one row of dY with 8 columns of X: as many pointers as registers allow.
template <class S, class T = typename S::T>
inline void dots8(const Panel<const T>* dy, const Panel<const T>* x, int panels, int64_t row,
                  const int32_t* col, typename S::V* acc) noexcept {
  for (int k = 0; k < 8; ++k) acc[k] = S::zero();
  for (int q = 0; q < panels; ++q) {
    const int width = x[q].width;
    const T* g = dy[q].data + row * width;
    const T* base[8];
    for (int k = 0; k < 8; ++k) base[k] = x[q].data + int64_t{col[k]} * width;
    for (int b = 0; b < width; b += kLanes) {
      const auto d = S::load(g + b);
      for (int k = 0; k < 8; ++k) acc[k] = S::fma(d, S::load(base[k] + b), acc[k]);
    }
  }
}

template <class S, class T = typename S::T>
void lists_sddmm(const RowLists& a, const Panel<const T>* dy, const Panel<const T>* x, int panels,
                 bool accumulate, T* gradient, int64_t begin, int64_t end) noexcept {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t p = a.indptr[r]; p < a.indptr[r + 1]; p += kLanes) {
      const int64_t left = a.indptr[r + 1] - p;
      const int n = left < kLanes ? static_cast<int>(left) : kLanes;
      int32_t col[kLanes];  // short groups repeat the last column; its dots are not stored
      for (int k = 0; k < kLanes; ++k) col[k] = a.col_indices[p + (k < n ? k : n - 1)];
      typename S::V acc[kLanes];
      dots8<S>(dy, x, panels, r, col, acc);
      if (n > 8) {
        dots8<S>(dy, x, panels, r, col + 8, acc + 8);
      } else {
        for (int k = 8; k < kLanes; ++k) acc[k] = S::zero();
      }
      auto sum = S::sum16(acc);
      if (accumulate) sum = S::add(sum, S::load(gradient + p, n));
      S::store(gradient + p, sum, n);
    }
  }
}

}  // namespace
}  // namespace spfmt
