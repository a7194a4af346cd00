// Moving samples between a caller's strides and panels. Included once per ISA level.
#pragma once

#include "../tiles.h"

namespace spfmt {
namespace {

// Samples are contiguous: copy runs.
template <class S, class T = typename S::T>
void pack_rows(Strided<const T> from, const Panel<T>& to, int64_t begin, int64_t end) noexcept {
  for (int64_t f = begin; f < end; ++f) {
    const T* src = from.data + f * from.feature_stride;
    T* dst = to.data + f * to.width;
    for (int b = 0; b < to.width; b += kLanes) {
      const int n = to.samples - b;
      S::store(dst + b, n >= kLanes ? S::load(src + b) : S::load(src + b, n));
    }
  }
}

// Elements before the first cache line that starts inside every sample, 0 if they have none in
// common. numpy's memory starts anywhere, and a vector that straddles two lines costs two accesses.
template <class T>
int64_t lead(const T* p, int64_t sample_stride) noexcept {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(T));
  return sample_stride % kLine == 0 ? (kLine - address % kLine) % kLine : 0;
}

// Features are contiguous: transpose 16 x 16 tiles in registers.
template <class S, class T = typename S::T>
void pack_transpose(Strided<const T> from, const Panel<T>& to, int64_t begin,
                    int64_t end) noexcept {
  const int64_t first = lead(from.data + begin, from.sample_stride);
  for (int b = 0; b < to.width; b += kLanes) {
    for (int64_t f = begin; f < end;) {
      const int64_t most = f == begin && first > 0 ? first : kLanes;
      const int nf = static_cast<int>(end - f < most ? end - f : most);
      typename S::V tile[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* src = from.data + (b + i) * from.sample_stride + f;
        tile[i] = b + i >= to.samples ? S::zero() : nf == kLanes ? S::load(src) : S::load(src, nf);
      }
      S::transpose(tile);
      for (int i = 0; i < nf; ++i) S::store(to.data + (f + i) * to.width + b, tile[i]);
      f += nf;
    }
  }
}

template <class S, class T = typename S::T>
void pack(Strided<const T> from, const Panel<T>& to, int64_t begin, int64_t end) noexcept {
  if (from.sample_stride == 1) return pack_rows<S>(from, to, begin, end);
  if (from.feature_stride == 1) return pack_transpose<S>(from, to, begin, end);
  for (int64_t f = begin; f < end; ++f) {
    for (int b = 0; b < to.width; ++b) {
      const T* src = from.data + f * from.feature_stride + b * from.sample_stride;
      to.data[f * to.width + b] = b < to.samples ? *src : T(0);
    }
  }
}

template <class S, class T = typename S::T>
void unpack_rows(const Panel<const T>& from, Strided<T> to, int64_t begin, int64_t end) noexcept {
  for (int64_t f = begin; f < end; ++f) {
    const T* src = from.data + f * from.width;
    T* dst = to.data + f * to.feature_stride;
    for (int b = 0; b < from.samples; b += kLanes) {
      const int n = from.samples - b;
      if (n >= kLanes) {
        S::store(dst + b, S::load(src + b));
      } else {
        S::store(dst + b, S::load(src + b, n), n);
      }
    }
  }
}

// Features are contiguous: transpose through a small buffer, so that each sample is written in long
// runs. Sixteen samples side by side would meet in one cache set whenever their stride is a large
// power of two, and lines that a vector straddles would be evicted half written.
template <class S, class T = typename S::T>
void unpack_transpose(const Panel<const T>& from, Strided<T> to, int64_t begin,
                      int64_t end) noexcept {
  constexpr int kRun = 128;
  alignas(64) T run[kLanes][kRun];
  const int64_t first = lead(to.data + begin, to.sample_stride);
  for (int b = 0; b < from.samples; b += kLanes) {
    const int samples = from.samples - b < kLanes ? from.samples - b : kLanes;
    for (int64_t f = begin; f < end;) {
      const int64_t most = f == begin && first > 0 ? first : kRun;
      const int features = static_cast<int>(end - f < most ? end - f : most);
      for (int g = 0; g < features; g += kLanes) {
        typename S::V tile[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          tile[i] =
              g + i < features ? S::load(from.data + (f + g + i) * from.width + b) : S::zero();
        }
        S::transpose(tile);
        for (int i = 0; i < kLanes; ++i) S::store(&run[i][g], tile[i]);
      }
      for (int i = 0; i < samples; ++i) {
        T* dst = to.data + (b + i) * to.sample_stride + f;
        int g = 0;
        for (; g + kLanes <= features; g += kLanes) S::store(dst + g, S::load(&run[i][g]));
        if (g < features) S::store(dst + g, S::load(&run[i][g]), features - g);
      }
      f += features;
    }
  }
}

template <class S, class T = typename S::T>
void unpack(const Panel<const T>& from, Strided<T> to, int64_t begin, int64_t end) noexcept {
  if (to.sample_stride == 1) return unpack_rows<S>(from, to, begin, end);
  if (to.feature_stride == 1) return unpack_transpose<S>(from, to, begin, end);
  for (int64_t f = begin; f < end; ++f) {
    for (int b = 0; b < from.samples; ++b) {
      to.data[f * to.feature_stride + b * to.sample_stride] = from.data[f * from.width + b];
    }
  }
}

}  // namespace
}  // namespace spfmt
