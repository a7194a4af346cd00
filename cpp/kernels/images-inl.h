// Moving the numbers of images (core/images.h). Included once per ISA level.
#pragma once

#include "../core/images.h"
#include "activation-inl.h"

namespace spfmt {
namespace {

template <class S, class T = typename S::T>
void image_transpose(const T* const* from, int64_t n, T* to, int64_t step, int lanes) noexcept {
  for (int64_t k = 0; k < n; k += kLanes) {
    const int count = n - k < kLanes ? static_cast<int>(n - k) : kLanes;
    typename S::V tile[kLanes];
    if (count == kLanes) {
      SPFMT_UNROLL
      for (int i = 0; i < kLanes; ++i) tile[i] = from[i] ? S::load(from[i] + k) : S::zero();
    } else {
      for (int i = 0; i < kLanes; ++i) tile[i] = from[i] ? S::load(from[i] + k, count) : S::zero();
    }
    S::transpose(tile);
    T* place = to + k * step;
    if (count == kLanes && lanes == kLanes) {
      SPFMT_UNROLL
      for (int i = 0; i < kLanes; ++i) S::store(place + i * step, tile[i]);
    } else {
      for (int i = 0; i < count; ++i) S::store(place + i * step, tile[i], lanes);
    }
  }
}

template <class S, class T = typename S::T>
void image_spread(const T* const* from, int n, T* const* to) noexcept {
  typename S::V tile[kLanes];
  if (n == kLanes) {
    SPFMT_UNROLL
    for (int i = 0; i < kLanes; ++i) tile[i] = S::load(from[i]);
  } else {
    for (int i = 0; i < kLanes; ++i) tile[i] = i < n ? S::load(from[i]) : S::zero();
  }
  S::transpose(tile);
  if (n == kLanes) {
    SPFMT_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (to[i]) S::store(to[i], tile[i]);
    }
  } else {
    for (int i = 0; i < kLanes; ++i) {
      if (to[i]) S::store(to[i], tile[i], n);
    }
  }
}

template <class S, class T = typename S::T>
inline void image_copy_row(const T* from, int64_t step, int64_t count, T* to) noexcept {
  if (step == 1) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) S::store(to + k, S::load(from + k));
    if (k < count) {
      const int n = static_cast<int>(count - k);
      S::store(to + k, S::load(from + k, n), n);
    }
  } else if (step == 2) {  // a constant the compiler makes vectors of
    for (int64_t k = 0; k < count; ++k) to[k] = from[2 * k];
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] = from[k * step];
  }
}

template <class S, class T = typename S::T>
void image_copy(const T* from, int64_t row, int64_t rows, int64_t step, int64_t count, T* to,
                int64_t before, int64_t width) noexcept {
  const int64_t after = width - before - count;
  for (int64_t r = 0; r < rows; ++r, from += row) {
    for (int64_t i = 0; i < before; ++i) *to++ = T(0);
    image_copy_row<S>(from, step, count, to);
    to += count;
    for (int64_t i = 0; i < after; ++i) *to++ = T(0);
  }
}

template <class S, Activation kKind, class T = typename S::T>
void image_add_rows(const T* z, T* y, int64_t n) noexcept {
  const auto sum = [](auto a, auto b) { return activation_of<S, kKind>(S::add(a, b)); };
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) S::store(y + k, sum(S::load(y + k), S::load(z + k)));
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    S::store(y + k, sum(S::load(y + k, rest), S::load(z + k, rest)), rest);
  }
}

template <class S, class T = typename S::T>
void image_add(Activation kind, const T* z, T* y, int64_t n) noexcept {
  with_activation(kind, [&](auto f) { image_add_rows<S, decltype(f)::value>(z, y, n); });
}

template <class S>
constexpr ImageBodies<typename S::T> image_bodies() {
  return {image_transpose<S>, image_spread<S>, image_add<S>, image_copy<S>};
}

}  // namespace
}  // namespace spfmt
