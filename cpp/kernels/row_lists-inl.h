// Products of RowLists (condensed, N:M, CSR). Included once per ISA level.
#pragma once

#include "../tiles.h"
#include "activation-inl.h"

namespace spfmt {
namespace {

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
                     Activation kind, Strided<T> y, int64_t begin, int64_t end) noexcept {
  for (int64_t slice = begin; slice < end; ++slice) {
    typename S::V acc[N];
    slice_tokens<S, N, kFinite>(a, packed, x, ldx, slice, acc);
    const int32_t* row = a.lane_row + slice * kLanes;
    int rows = 0;
    while (rows < kLanes && row[rows] >= 0) ++rows;
    scatter_rows<S, N>(acc, row, rows, bias, kind, y);
  }
}

// `finite`: every x is finite, so padding (0 * x) adds nothing and needs no mask.
template <class S, class T = typename S::T>
void slices_tokens(const RowSlices& a, const T* packed, const T* x, int64_t ldx, int n, bool finite,
                   const T* bias, Activation kind, Strided<T> y, int64_t begin,
                   int64_t end) noexcept {
  const auto call = [&](auto one, auto two, auto three, auto four) {
    (n == 1   ? one
     : n == 2 ? two
     : n == 3 ? three
              : four)(a, packed, x, ldx, bias, kind, y, begin, end);
  };
  if (finite) {
    call(slices_tokens_n<S, 1, true>, slices_tokens_n<S, 2, true>, slices_tokens_n<S, 3, true>,
         slices_tokens_n<S, 4, true>);
  } else {
    call(slices_tokens_n<S, 1, false>, slices_tokens_n<S, 2, false>, slices_tokens_n<S, 3, false>,
         slices_tokens_n<S, 4, false>);
  }
}

}  // namespace
}  // namespace spfmt
