// Moving samples between a caller's strides and panels. Included once per ISA level.
#pragma once

#include "../core/samples.h"

namespace spfmt {
namespace {

// Samples are contiguous: copy runs.
template <class R, class T = typename R::T>
void pack_rows(Strided<const T> from, const Panel<T>& to, int64_t begin, int64_t end) noexcept {
  for (int64_t f = begin; f < end; ++f) {
    const T* src = from.data + f * from.feature_stride;
    T* dst = to.data + f * to.width;
    for (int b = 0; b < to.width; b += R::kSamples) {
      const int n = to.samples - b;
      const auto v = n >= R::kSamples ? R::load(src + b) : n > 0 ? R::load(src + b, n) : R::zero();
      R::store(dst + b, v);
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

// Up to kSide samples of up to kSide features, transposed; zeros behind the last sample.
template <class R, class T = typename R::T>
inline void pack_tile(const T* from, int64_t stride, int samples, int features, T* to,
                      int width) noexcept {
  constexpr int kSide = R::kSamples;
  typename R::V tile[kSide];
  if (features == kSide) {
    SPFMT_UNROLL
    for (int i = 0; i < kSide; ++i) tile[i] = i < samples ? R::load(from + i * stride) : R::zero();
    R::transpose(tile);
    SPFMT_UNROLL
    for (int i = 0; i < kSide; ++i) R::store(to + i * width, tile[i]);
    return;
  }
  for (int i = 0; i < kSide; ++i) {
    tile[i] = i < samples ? R::load(from + i * stride, features) : R::zero();
  }
  R::transpose(tile);
  for (int i = 0; i < features; ++i) R::store(to + i * width, tile[i]);
}

// Features are contiguous.
template <class R, class T = typename R::T>
void pack_transpose(Strided<const T> from, const Panel<T>& to, int64_t begin,
                    int64_t end) noexcept {
  constexpr int kSide = R::kSamples;
  const int64_t first = lead(from.data + begin, from.sample_stride) % kSide;
  for (int b = 0; b < to.width; b += kSide) {
    for (int64_t f = begin; f < end;) {
      const int64_t most = f == begin && first > 0 ? first : kSide;
      const int nf = static_cast<int>(end - f < most ? end - f : most);
      pack_tile<R>(from.data + b * from.sample_stride + f, from.sample_stride, to.samples - b, nf,
                   to.data + f * to.width + b, to.width);
      f += nf;
    }
  }
}

template <class R, class T = typename R::T>
void pack_in(Strided<const T> from, const Panel<T>& to, int64_t begin, int64_t end) noexcept {
  if (from.sample_stride == 1) return pack_rows<R>(from, to, begin, end);
  if (from.feature_stride == 1) return pack_transpose<R>(from, to, begin, end);
  for (int64_t f = begin; f < end; ++f) {
    for (int b = 0; b < to.width; ++b) {
      const T* src = from.data + f * from.feature_stride + b * from.sample_stride;
      to.data[f * to.width + b] = b < to.samples ? *src : T(0);
    }
  }
}

// A small panel is at most one register of eight wide, and features are stored in order: what one
// writes into the next is overwritten. Wider panels are moved in whole cache lines.
template <class S, class T = typename S::T>
void pack(Strided<const T> from, const Panel<T>& to, int64_t begin, int64_t end) noexcept {
  if (to.width <= kOctet) return pack_in<typename S::Half>(from, to, begin, end);
  pack_in<S>(from, to, begin, end);
}

template <class R, class T = typename R::T>
void unpack_rows(const Panel<const T>& from, Strided<T> to, int64_t begin, int64_t end) noexcept {
  for (int64_t f = begin; f < end; ++f) {
    const T* src = from.data + f * from.width;
    T* dst = to.data + f * to.feature_stride;
    for (int b = 0; b < from.samples; b += R::kSamples) {
      const int n = from.samples - b;
      if (n >= R::kSamples) {
        R::store(dst + b, R::load(src + b));
      } else {
        R::store(dst + b, R::load(src + b, n), n);
      }
    }
  }
}

// A square tile of up to kSide features, transposed; zeros behind the last feature.
template <class R, class T = typename R::T>
inline void unpack_tile(const T* from, int width, int64_t features, T* to,
                        int64_t stride) noexcept {
  constexpr int kSide = R::kSamples;
  typename R::V tile[kSide];
  if (features >= kSide) {
    SPFMT_UNROLL
    for (int i = 0; i < kSide; ++i) tile[i] = R::load(from + i * width);
  } else {
    for (int i = 0; i < kSide; ++i) tile[i] = i < features ? R::load(from + i * width) : R::zero();
  }
  R::transpose(tile);
  SPFMT_UNROLL
  for (int i = 0; i < kSide; ++i) R::store(to + i * stride, tile[i]);
}

// Features are contiguous: transpose through a small buffer, so that each sample is written in long
// runs. Samples side by side would meet in one cache set whenever their stride is a large power of
// two, and lines that a vector straddles would be evicted half written.
template <class R, class T = typename R::T>
void unpack_transpose(const Panel<const T>& from, Strided<T> to, int64_t begin,
                      int64_t end) noexcept {
  constexpr int kRun = 128, kSide = R::kSamples;
  alignas(64) T run[kSide][kRun];
  const int64_t first = lead(to.data + begin, to.sample_stride);
  for (int b = 0; b < from.samples; b += kSide) {
    const int samples = from.samples - b < kSide ? from.samples - b : kSide;
    for (int64_t f = begin; f < end;) {
      const int64_t most = f == begin && first > 0 ? first : kRun;
      const int features = static_cast<int>(end - f < most ? end - f : most);
      for (int g = 0; g < features; g += kSide) {
        unpack_tile<R>(from.data + (f + g) * from.width + b, from.width, features - g, run[0] + g,
                       kRun);
      }
      for (int i = 0; i < samples; ++i) {
        T* dst = to.data + (b + i) * to.sample_stride + f;
        int g = 0;
        for (; g + kSide <= features; g += kSide) R::store(dst + g, R::load(&run[i][g]));
        if (g < features) R::store(dst + g, R::load(&run[i][g]), features - g);
      }
      f += features;
    }
  }
}

template <class R, class T = typename R::T>
void unpack_in(const Panel<const T>& from, Strided<T> to, int64_t begin, int64_t end) noexcept {
  if (to.sample_stride == 1) return unpack_rows<R>(from, to, begin, end);
  if (to.feature_stride == 1) return unpack_transpose<R>(from, to, begin, end);
  for (int64_t f = begin; f < end; ++f) {
    for (int b = 0; b < from.samples; ++b) {
      to.data[f * to.feature_stride + b * to.sample_stride] = from.data[f * from.width + b];
    }
  }
}

template <class S, class T = typename S::T>
void unpack(const Panel<const T>& from, Strided<T> to, int64_t begin, int64_t end) noexcept {
  if (from.width == kOctet) return unpack_in<typename S::Half>(from, to, begin, end);
  unpack_in<S>(from, to, begin, end);
}

}  // namespace
}  // namespace spfmt
