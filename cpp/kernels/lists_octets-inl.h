// Lists with lanes over eight samples (lists/octets.h). Included once per ISA level.
#pragma once

#include <cstring>

#include "../lists/octets.h"
#include "activation-inl.h"

namespace spfmt {
namespace {

// The steps of one quad, added to its rows' sums; two chains a row hide the latency of the
// multiply-adds. A weight comes with three others in one load and is spread inside the register,
// an offset comes with another one: what limits this loop is the number of loads.
template <class S, class T = typename S::T, class H = typename S::Half>
inline void quad_sums(const T* w, const uint16_t* offset, const T* w_end, const T* x,
                      const uint16_t* row, T* sums) noexcept {
  typename H::V acc[kQuadRows][2];
  SPFMT_UNROLL
  for (int i = 0; i < kQuadRows; ++i) acc[i][0] = acc[i][1] = H::zero();
  for (; w < w_end; w += kQuadRows * kStepTerms, offset += kQuadRows * kStepTerms) {
    SPFMT_UNROLL
    for (int i = 0; i < kQuadRows; ++i) {
      const auto four = H::twice(w + kStepTerms * i);
      uint32_t at[2];
      std::memcpy(at, offset + kStepTerms * i, sizeof at);
      const T *x0 = x + (at[0] & 0xffff), *x1 = x + (at[0] >> 16);
      const T *x2 = x + (at[1] & 0xffff), *x3 = x + (at[1] >> 16);
      acc[i][0] = H::fma(H::template spread<0>(four), H::load(x0), acc[i][0]);
      acc[i][1] = H::fma(H::template spread<1>(four), H::load(x1), acc[i][1]);
      acc[i][0] = H::fma(H::template spread<2>(four), H::load(x2), acc[i][0]);
      acc[i][1] = H::fma(H::template spread<3>(four), H::load(x3), acc[i][1]);
    }
  }
  SPFMT_UNROLL
  for (int i = 0; i < kQuadRows; ++i) {
    T* to = sums + row[i] * kOctet;
    H::store(to, H::add(H::load(to), H::add(acc[i][0], acc[i][1])));
  }
}

// store_octets where the rows of a sample are contiguous.
template <class S, class T = typename S::T, class H = typename S::Half>
inline void store_transposed(const T* sums, int rows, const T* bias, Activation kind, int n,
                             Strided<T> y) noexcept {
  typename H::V upper[kOctet], lower[kOctet];
  for (int i = 0; i < kOctet; ++i) {
    upper[i] = H::load(sums + i * kOctet);
    lower[i] = H::load(sums + (kOctet + i) * kOctet);
  }
  H::transpose(upper);
  H::transpose(lower);
  const auto start = bias ? S::load(bias, rows) : S::zero();
  for (int b = 0; b < n; ++b) {
    const auto sum = activated<S>(kind, S::add(S::whole(upper[b], lower[b]), start));
    T* to = y.data + b * y.sample_stride;
    S::store(to, sum, rows);
  }
}

// sums[i * 8 + b] of `rows` (up to 16) rows to Y.
template <class S, class T = typename S::T, class H = typename S::Half>
inline void store_octets(T* sums, int rows, const T* bias, Activation kind, int n,
                         Strided<T> y) noexcept {
  if (y.feature_stride == 1) return store_transposed<S>(sums, rows, bias, kind, n, y);
  for (int i = 0; bias && i < rows * kOctet; ++i) sums[i] += bias[i / kOctet];
  activate<S>(kind, sums, 0, kLanes * kOctet, nullptr, 1);
  for (int i = 0; i < rows; ++i) {
    T* to = y.data + i * y.feature_stride;
    if (y.sample_stride == 1) {
      H::store(to, H::load(sums + i * kOctet), n);
    } else {
      for (int b = 0; b < n; ++b) to[b * y.sample_stride] = sums[i * kOctet + b];
    }
  }
}

template <class S, class T = typename S::T>
void lists_octet(const Octets& a, const T* values, const T* staged, int n, int64_t chunk, int rows,
                 const T* bias, Activation kind, Strided<T> y) noexcept {
  constexpr int kStep = kQuadRows * kStepTerms;
  alignas(64) T sums[(kOctetRows + 1) * kOctet] = {};  // the last row is that of quads with fewer
  for (int64_t t = 0; t < a.tiles; ++t) {
    const T* x = staged + t * (a.width + 1) * kOctet;
    const int64_t k = chunk * a.tiles + t;
    for (int64_t q = a.quad_ptr[k]; q < a.quad_ptr[k + 1]; ++q) {
      const int64_t first = a.step_ptr[q] * kStep, last = a.step_ptr[q + 1] * kStep;
      quad_sums<S>(values + first, a.offset + first, values + last, x, a.row + q * kQuadRows, sums);
    }
  }
  for (int r = 0; r < rows; r += kLanes) {
    store_octets<S>(sums + r * kOctet, rows - r < kLanes ? rows - r : kLanes,
                    bias ? bias + r : nullptr, kind, n,
                    {y.data + r * y.feature_stride, y.feature_stride, y.sample_stride});
  }
}

template <class S>
constexpr OctetBodies<typename S::T> octet_bodies() {
  return {lists_octet<S>};
}

}  // namespace
}  // namespace spfmt
