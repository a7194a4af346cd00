// Lists with lanes over rows (lists/lookup.h). Included once per ISA level.
#pragma once

#include "../lists/lookup.h"
#include "activation-inl.h"

namespace spfmt {
namespace {

// n samples into blocks: to[(c * n + b) * 16 + j] is feature 16 c + j of sample b. Tells whether
// all of them are finite.
template <class S, class T = typename S::T>
bool stage(Strided<const T> x, int64_t features, int n, int64_t blocks, T* to) noexcept {
  auto check = S::zero();  // 0 * inf and 0 * nan are nan
  for (int64_t c = 0; c < blocks; ++c) {
    const int64_t f = c * kBlockCols, left = features - f;
    const int nf = left >= kLanes ? kLanes : left < 0 ? 0 : static_cast<int>(left);
    typename S::V tile[kLanes];
    if (x.feature_stride == 1) {
      for (int b = 0; b < n; ++b) {
        const T* from = x.data + b * x.sample_stride + f;
        tile[b] = nf == kLanes ? S::load(from) : nf > 0 ? S::load(from, nf) : S::zero();
      }
    } else if (x.sample_stride == 1) {
      for (int j = 0; j < kLanes; ++j) {
        tile[j] = j < nf ? S::load(x.data + (f + j) * x.feature_stride, n) : S::zero();
      }
      S::transpose(tile);
    } else {
      for (int b = 0; b < n; ++b) {
        T lane[kLanes] = {};
        for (int j = 0; j < nf; ++j) {
          lane[j] = x.data[(f + j) * x.feature_stride + b * x.sample_stride];
        }
        tile[b] = S::load(lane);
      }
    }
    for (int b = 0; b < n; ++b) {
      check = S::fma(tile[b], S::zero(), check);
      S::store(to + (c * n + b) * kLanes, tile[b]);
    }
  }
  return S::sum(check) == T(0);
}

// Slices with wide windows stream from memory, where the CPU's own prefetchers look too few lines
// ahead. Addresses behind the end do no harm.
constexpr int kAhead = 32;  // steps
inline void prefetch(const void* p) noexcept { __builtin_prefetch(p); }

// One slice against N staged samples. Steps of a record go to separate sums where samples are too
// few to hide the latency of the multiply-adds.
template <class S, int kWidth, int kSteps, int N, class T = typename S::T>
inline void slice_sums(const Slices& a, const T* packed, const T* staged, int64_t slice,
                       typename S::V* sum) noexcept {
  constexpr int kChains = N >= 4 || kSteps == 1 ? 1 : kSteps < 4 / N ? kSteps : 4 / N;
  typename S::V acc[N][kChains];
  SPFMT_UNROLL
  for (int b = 0; b < N; ++b) {
    SPFMT_UNROLL
    for (int i = 0; i < kChains; ++i) acc[b][i] = S::zero();
  }
  for (int64_t q = a.slice_ptr[slice]; q < a.slice_ptr[slice + 1]; ++q) {
    const T* window = staged + int64_t{a.block[q]} * (N * kLanes);
    typename S::template Index<kWidth> index[kSteps];
    typename S::V weight[kSteps];
    SPFMT_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      index[k] = typename S::template Index<kWidth>(a.code + (q * kSteps + k) * kLanes);
      weight[k] = S::load(packed + (q * kSteps + k) * kLanes);
      if (kWidth == 64) prefetch(packed + (q * kSteps + k + kAhead) * kLanes);
    }
    SPFMT_UNROLL
    for (int b = 0; b < N; ++b) {
      const typename S::template Table<kWidth> table(window + b * kLanes, N * kLanes);
      SPFMT_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        auto& chain = acc[b][k % kChains];
        chain = S::fma(weight[k], table.lookup(index[k]), chain);
      }
    }
  }
  SPFMT_UNROLL
  for (int b = 0; b < N; ++b) {
    sum[b] = acc[b][0];
    SPFMT_UNROLL
    for (int i = 1; i < kChains; ++i) sum[b] = S::add(sum[b], acc[b][i]);
  }
}

// The same for one of n staged samples, with padding masked: x may be infinite there.
template <class S, int kWidth, class T = typename S::T>
inline typename S::V slice_sum_masked(const Slices& a, const T* packed, const T* staged, int n,
                                      int64_t slice) noexcept {
  auto sum = S::zero();
  for (int64_t q = a.slice_ptr[slice]; q < a.slice_ptr[slice + 1]; ++q) {
    const typename S::template Table<kWidth> table(staged + int64_t{a.block[q]} * n * kLanes,
                                                   int64_t{n} * kLanes);
    for (int64_t k = q * a.steps; k < (q + 1) * a.steps; ++k) {
      const typename S::template Index<kWidth> index(a.code + k * kLanes);
      sum = S::fma(S::load(packed + k * kLanes), table.lookup_masked(index), sum);
    }
  }
  return sum;
}

// Sums of one slice to one sample of Y.
template <class S, class T = typename S::T>
inline void store_lanes(const int32_t* row, typename S::V sum, const T* bias, Activation kind, T* y,
                        int64_t stride) noexcept {
  if (stride == 1 && row[kLanes - 1] == row[0] + kLanes - 1) {  // rows ascend: no gaps
    if (bias) sum = S::add(sum, S::load(bias + row[0]));
    return S::store(y + row[0], activated<S>(kind, sum));
  }
  int rows = 0;
  while (rows < kLanes && row[rows] >= 0) ++rows;
  scatter_rows<S, 1>(&sum, row, rows, bias, kind, Strided<T>{y, stride, 0}, false);
}

template <class S, int kWidth, int kSteps, int N, class T = typename S::T>
void slices_n(const Slices& a, const T* packed, const T* staged, const T* bias, Activation kind,
              Strided<T> y, int64_t begin, int64_t end) noexcept {
  for (int64_t s = begin; s < end; ++s) {
    typename S::V sum[N];
    slice_sums<S, kWidth, kSteps, N>(a, packed, staged, s, sum);
    for (int b = 0; b < N; ++b) {
      store_lanes<S>(a.lane_row + s * kLanes, sum[b], bias, kind, y.data + b * y.sample_stride,
                     y.feature_stride);
    }
  }
}

template <class S, int kWidth, class T = typename S::T>
void slices_masked(const Slices& a, const T* packed, const T* staged, int n, const T* bias,
                   Activation kind, Strided<T> y, int64_t begin, int64_t end) noexcept {
  for (int64_t s = begin; s < end; ++s) {
    for (int b = 0; b < n; ++b) {
      const auto sum = slice_sum_masked<S, kWidth>(a, packed, staged + b * kLanes, n, s);
      store_lanes<S>(a.lane_row + s * kLanes, sum, bias, kind, y.data + b * y.sample_stride,
                     y.feature_stride);
    }
  }
}

template <class S, int kWidth, int N, class T = typename S::T>
void slices_steps(const Slices& a, const T* packed, const T* staged, const T* bias, Activation kind,
                  Strided<T> y, int64_t begin, int64_t end) noexcept {
  const auto call = [&](auto body) { body(a, packed, staged, bias, kind, y, begin, end); };
  switch (a.steps) {
    case 1:
      return call(slices_n<S, kWidth, 1, N>);
    case 2:
      return call(slices_n<S, kWidth, 2, N>);
    case 3:
      return call(slices_n<S, kWidth, 3, N>);
    default:
      return call(slices_n<S, kWidth, 4, N>);
  }
}

template <class S, int kWidth, class T = typename S::T>
void slices_width(const Slices& a, const T* packed, const T* staged, int n, bool finite,
                  const T* bias, Activation kind, Strided<T> y, int64_t begin,
                  int64_t end) noexcept {
  if (!finite) {
    return slices_masked<S, kWidth>(a, packed, staged, n, bias, kind, y, begin, end);
  }
  const auto call = [&](auto body) { body(a, packed, staged, bias, kind, y, begin, end); };
  if constexpr (S::kLookupSamples >= 8) {
    if (n == 8) return call(slices_steps<S, kWidth, 8>);
  }
  if constexpr (S::kLookupSamples >= 4) {
    if (n == 4) return call(slices_steps<S, kWidth, 4>);
  }
  if (n == 2) return call(slices_steps<S, kWidth, 2>);
  call(slices_steps<S, kWidth, 1>);
}

// `finite`: every x is finite, so padding (0 * x) adds nothing and needs no mask.
template <class S, class T = typename S::T>
void slices(const Slices& a, const T* packed, const T* staged, int n, bool finite, const T* bias,
            Activation kind, Strided<T> y, int64_t begin, int64_t end) noexcept {
  const auto call = [&](auto body) {
    body(a, packed, staged, n, finite, bias, kind, y, begin, end);
  };
  if constexpr (S::kWidestWindow >= 64) {
    if (a.width == 64) return call(slices_width<S, 64>);
  }
  call(slices_width<S, 32>);
}

template <class S>
constexpr LookupBodies<typename S::T> lookup_bodies() {
  return {stage<S>, slices<S>, S::kLookupSamples, S::kWidestWindow};
}

}  // namespace
}  // namespace spfmt
