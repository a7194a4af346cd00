// Lists with lanes over samples (lists/panels.h). Included once per ISA level.
#pragma once

#include "../lists/panels.h"

namespace spfmt {
namespace {

// N pieces of equal length against NV vectors of samples: y[i] (+)= sum_k w[i][k] * x[col[i][k]].
// One row alone offers only NV independent chains, fewer than the FMA units' latency needs. Weights
// are loaded four at a time and spread inside the register, so that X has the load units to itself.
// `w` are the chunk's, in the order of the lists.
template <class S, int N, int NV, bool kFirst, class T = typename S::T>
inline void pieces_panel(const Piece* piece, const T* w, const uint16_t* col, int64_t count,
                         const T* x, const T* bias, T* y) noexcept {
  constexpr int64_t kWidth = NV * kLanes;
  typename S::V acc[N][NV];
  const T* weight[N];
  const uint16_t* column[N];
  SPFMT_UNROLL
  for (int i = 0; i < N; ++i) {
    weight[i] = w + piece[i].start;
    column[i] = col + i * count;
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) {
      acc[i][v] = kFirst ? S::set1(bias ? bias[piece[i].row] : T(0))
                         : S::load(y + piece[i].row * kWidth + v * kLanes);
    }
  }
  const auto add = [&](int i, int64_t k, typename S::V wk) {
    const T* xk = x + column[i][k] * kWidth;
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) acc[i][v] = S::fma(wk, S::load(xk + v * kLanes), acc[i][v]);
  };
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    SPFMT_UNROLL
    for (int i = 0; i < N; ++i) {
      const auto four = S::repeat4(weight[i] + k);
      add(i, k, S::template each<0>(four));
      add(i, k + 1, S::template each<1>(four));
      add(i, k + 2, S::template each<2>(four));
      add(i, k + 3, S::template each<3>(four));
    }
  }
  for (; k < count; ++k) {
    SPFMT_UNROLL
    for (int i = 0; i < N; ++i) add(i, k, S::set1(weight[i][k]));
  }
  SPFMT_UNROLL
  for (int i = 0; i < N; ++i) {
    SPFMT_UNROLL
    for (int v = 0; v < NV; ++v) S::store(y + piece[i].row * kWidth + v * kLanes, acc[i][v]);
  }
}

// One (chunk, tile): pieces sorted by length, as many of one length side by side as fit registers.
template <class S, int NV, bool kFirst, class T = typename S::T>
void tile_pieces(const Piece* piece, const Piece* stop, const T* w, const uint16_t* col, const T* x,
                 const T* bias, T* y) noexcept {
  while (piece < stop) {
    constexpr int kMost = 4 * S::kPieces / NV < 4 ? 4 * S::kPieces / NV : 4;
    const int count = piece->count;
    const auto equal = [&](int n) {
      return n <= kMost && stop - piece >= n && piece[n - 1].count == count;
    };
    const int n = equal(4) ? 4 : equal(2) ? 2 : 1;
    const auto call = [&](auto body) { body(piece, w, col, count, x, bias, y); };
    if constexpr (kMost >= 4) {
      if (n == 4) call(pieces_panel<S, 4, NV, kFirst>);
    }
    if constexpr (kMost >= 2) {
      if (n == 2) call(pieces_panel<S, 2, NV, kFirst>);
    }
    if (n == 1) call(pieces_panel<S, 1, NV, kFirst>);
    piece += n;
    col += n * count;
  }
}

template <class S, int NV, class T = typename S::T>
void lists_panel_nv(const Pieces& a, const T* values, const T* x, const T* bias, T* y,
                    int64_t chunk) noexcept {
  for (int64_t t = 0; t < a.tiles; ++t) {
    const int64_t k = chunk * a.tiles + t;
    const auto call = [&](auto body) {
      body(a.piece + a.piece_ptr[k], a.piece + a.piece_ptr[k + 1], values + a.base[chunk],
           a.col + a.visit_ptr[k], x + t * a.width * NV * kLanes, bias, y);
    };
    t == 0 ? call(tile_pieces<S, NV, true>) : call(tile_pieces<S, NV, false>);
  }
}

template <class S, class T = typename S::T>
void lists_panel(const Pieces& a, const T* values, const Panel<const T>& x, const T* bias, T* y,
                 int64_t chunk) noexcept {
  if (bias) bias += chunk * kRowChunk;
  switch (x.width / kLanes) {
    case 1:
      return lists_panel_nv<S, 1>(a, values, x.data, bias, y, chunk);
    case 2:
      return lists_panel_nv<S, 2>(a, values, x.data, bias, y, chunk);
    case 3:
      return lists_panel_nv<S, 3>(a, values, x.data, bias, y, chunk);
    default:
      return lists_panel_nv<S, 4>(a, values, x.data, bias, y, chunk);
  }
}

// Lane k < 4 Q of the result: the dot product of d with column col[k] of X. Places behind the n-th
// repeat the last column.
template <class S, int NV, int Q, class T = typename S::T>
inline typename S::V dots(const typename S::V* d, const T* x, const uint16_t* col, int n) noexcept {
  typename S::Quad quad[4];
  SPFMT_UNROLL
  for (int q = 0; q < Q; ++q) {
    typename S::V acc[4];
    SPFMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int k = 4 * q + i;
      const T* xk = x + col[q < Q - 1 || k < n ? k : n - 1] * int64_t{NV * kLanes};
      acc[i] = S::mul(d[0], S::load(xk));
      SPFMT_UNROLL
      for (int v = 1; v < NV; ++v) acc[i] = S::fma(d[v], S::load(xk + v * kLanes), acc[i]);
    }
    quad[q] = S::quad(S::dot_of(acc[0]), S::dot_of(acc[1]), S::dot_of(acc[2]), S::dot_of(acc[3]));
  }
  for (int q = Q; q < 4; ++q) quad[q] = quad[0];
  return S::join(quad[0], quad[1], quad[2], quad[3]);
}

// The gradient of one piece: dY's row stays in registers while the columns pass by.
template <class S, int NV, class T = typename S::T>
inline void piece_sddmm(const T* dy, const T* x, const uint16_t* col, int count, bool accumulate,
                        T* gradient) noexcept {
  typename S::V d[NV];
  for (int v = 0; v < NV; ++v) d[v] = S::load(dy + v * kLanes);
  for (int k = 0; k < count; k += kLanes) {
    const int n = count - k < kLanes ? count - k : kLanes;
    auto sum = n > 12  ? dots<S, NV, 4>(d, x, col + k, n)
               : n > 8 ? dots<S, NV, 3>(d, x, col + k, n)
               : n > 4 ? dots<S, NV, 2>(d, x, col + k, n)
                       : dots<S, NV, 1>(d, x, col + k, n);
    if (accumulate) sum = S::add(sum, S::load(gradient + k, n));
    S::store(gradient + k, sum, n);
  }
}

template <class S, int NV, class T = typename S::T>
void tile_sddmm(const Pieces& a, int64_t k, const SampleRows<T>& dy, const T* x, bool accumulate,
                T* gradient) noexcept {
  const uint16_t* col = a.col + a.visit_ptr[k];
  for (int64_t p = a.piece_ptr[k]; p < a.piece_ptr[k + 1]; ++p) {
    const Piece& piece = a.piece[p];
    piece_sddmm<S, NV>(dy.data + piece.row * dy.stride, x, col, piece.count, accumulate,
                       gradient + piece.start);
    col += piece.count;
  }
}

template <class S, class T = typename S::T>
void lists_sddmm(const Pieces& a, const SampleRows<T>* dy, const Panel<const T>* x, int panels,
                 bool accumulate, T* gradient, int64_t chunk) noexcept {
  for (int64_t t = 0; t < a.tiles; ++t) {
    for (int q = 0; q < panels; ++q) {
      const int width = x[q].width;
      const auto call = [&](auto body) {
        const SampleRows<T> rows{dy[q].data + chunk * kRowChunk * dy[q].stride, dy[q].stride};
        body(a, chunk * a.tiles + t, rows, x[q].data + t * a.width * width, accumulate || q > 0,
             gradient + a.base[chunk]);
      };
      width == 16   ? call(tile_sddmm<S, 1>)
      : width == 32 ? call(tile_sddmm<S, 2>)
      : width == 48 ? call(tile_sddmm<S, 3>)
                    : call(tile_sddmm<S, 4>);
    }
  }
}

template <class S>
constexpr ListPanelBodies<typename S::T> list_panel_bodies() {
  return {lists_panel<S>, lists_sddmm<S>};
}

}  // namespace
}  // namespace spfmt
