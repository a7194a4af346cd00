// Y = A X of RowLists for up to eight samples, lanes = samples, without any layout of A. Included
// once per ISA level.
#pragma once

#include "../tiles.h"
#include "activation-inl.h"

namespace spfmt {
namespace {

// to[f * 8 + b] is feature f of sample b; zero where b >= n.
template <class S, class T = typename S::T>
void stage_octet(Strided<const T> x, int64_t features, int n, T* to) noexcept {
  for (int64_t f = 0; f < features; f += kLanes) {
    const int nf = features - f < kLanes ? static_cast<int>(features - f) : kLanes;
    typename S::V tile[kLanes];
    if (x.feature_stride == 1) {
      for (int b = 0; b < kLanes; ++b) {
        const T* from = x.data + b * x.sample_stride + f;
        tile[b] = b >= n ? S::zero() : nf == kLanes ? S::load(from) : S::load(from, nf);
      }
      S::transpose(tile);
    } else {
      for (int j = 0; j < nf; ++j) {
        const T* from = x.data + (f + j) * x.feature_stride;
        if (x.sample_stride == 1) {
          tile[j] = S::load(from, n);
          continue;
        }
        T lane[kLanes] = {};
        for (int b = 0; b < n; ++b) lane[b] = from[b * x.sample_stride];
        tile[j] = S::load(lane);
      }
    }
    for (int j = 0; j < nf; ++j) S::store(to + (f + j) * kOctet, tile[j], kOctet);
  }
}

// Rows r and r + 1, so that four chains of multiply-adds hide their latency.
template <class S, class T = typename S::T>
inline void octet_pair(const RowLists& a, const T* values, const T* x, int64_t r,
                       T* sums) noexcept {
  const int64_t first = a.indptr[r], middle = a.indptr[r + 1], last = a.indptr[r + 2];
  const int64_t both = middle - first < last - middle ? middle - first : last - middle;
  const T *v = values + first, *w = values + middle;
  const int32_t *i = a.col_indices + first, *j = a.col_indices + middle;
  const auto term = [&](T weight, int32_t column, typename S::Half acc) {
    return S::fma(S::half_set1(weight), S::half_load(x + int64_t{column} * kOctet), acc);
  };
  auto v0 = S::half_zero(), v1 = S::half_zero(), w0 = S::half_zero(), w1 = S::half_zero();
  int64_t k = 0;
  for (; k + 2 <= both; k += 2) {
    v0 = term(v[k], i[k], v0);
    w0 = term(w[k], j[k], w0);
    v1 = term(v[k + 1], i[k + 1], v1);
    w1 = term(w[k + 1], j[k + 1], w1);
  }
  for (int64_t p = k; p < middle - first; ++p) v0 = term(v[p], i[p], v0);
  for (int64_t p = k; p < last - middle; ++p) w0 = term(w[p], j[p], w0);
  S::half_store(sums, S::add(v0, v1));
  S::half_store(sums + kOctet, S::add(w0, w1));
}

template <class S, class T = typename S::T>
inline void octet_row(const RowLists& a, const T* values, const T* x, int64_t r, T* sums) noexcept {
  auto acc = S::half_zero();
  for (int64_t p = a.indptr[r]; p < a.indptr[r + 1]; ++p) {
    acc =
        S::fma(S::half_set1(values[p]), S::half_load(x + int64_t{a.col_indices[p]} * kOctet), acc);
  }
  S::half_store(sums, acc);
}

// sums[i * 8 + b] of `rows` (up to 16) rows to Y, transposed in registers where rows are
// contiguous.
template <class S, class T = typename S::T>
inline void store_octets(T* sums, int rows, const T* bias, Activation kind, int n,
                         Strided<T> y) noexcept {
  if (y.feature_stride != 1) {
    for (int i = 0; i < rows * kOctet; ++i) sums[i] += bias ? bias[i / kOctet] : T(0);
    activate<S>(kind, sums, 0, kLanes * kOctet, nullptr, 1);
    for (int i = 0; i < rows; ++i) {
      for (int b = 0; b < n; ++b) {
        y.data[i * y.feature_stride + b * y.sample_stride] = sums[i * kOctet + b];
      }
    }
    return;
  }
  typename S::V tile[kLanes];
  for (int i = 0; i < kLanes; ++i) tile[i] = S::load(sums + i * kOctet, kOctet);
  S::transpose(tile);
  const auto start = bias ? S::load(bias, rows) : S::zero();
  for (int b = 0; b < n; ++b) {
    S::store(y.data + b * y.sample_stride, activated<S>(kind, S::add(tile[b], start)), rows);
  }
}

// Rows [begin, end); begin is a multiple of 16, so that the same rows pair up however work is cut.
template <class S, class T = typename S::T>
void lists_octet(const RowLists& a, const T* values, const T* staged, int n, const T* bias,
                 Activation kind, Strided<T> y, int64_t begin, int64_t end) noexcept {
  alignas(64) T sums[kLanes * kOctet] = {};
  for (int64_t r = begin; r < end; r += kLanes) {
    const int rows = end - r < kLanes ? static_cast<int>(end - r) : kLanes;
    int i = 0;
    for (; i + 2 <= rows; i += 2) octet_pair<S>(a, values, staged, r + i, sums + i * kOctet);
    if (i < rows) octet_row<S>(a, values, staged, r + i, sums + i * kOctet);
    store_octets<S>(sums, rows, bias ? bias + r : nullptr, kind, n,
                    {y.data + r * y.feature_stride, y.feature_stride, y.sample_stride});
  }
}

}  // namespace
}  // namespace spfmt
