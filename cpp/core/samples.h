// Samples as kernels see them: in the caller's memory, or packed into panels.
#pragma once

#include <cstdint>

#include "../simd/unroll.h"
#include "spfmt.h"

namespace spfmt {

// Elements that a level's vectors work on at a time: one 512-bit register of float32, or several
// smaller ones.
constexpr int kLanes = 16;
// Samples per octet: four-byte lanes of a 256-bit register.
constexpr int kOctet = 8;
// Samples per panel: four 512-bit registers of float32.
constexpr int kPanel = 64;
// Samples that the gradient of groups takes at a time, in one wide panel: sixteen rows of dY
// then are half of a first-level cache.
constexpr int kSampleStrip = 256;

// A panel holds up to 64 samples of all features, feature after feature:
//
//   data[f * width + b],   width = samples rounded up to a multiple of 16, zeros behind the last
//
// A small panel holds up to eight samples; it is as wide as there are samples, with room for eight
// numbers behind the last feature, or kOctet wide.
template <class T>
struct Panel {
  T* data;
  int64_t features;
  int width;    // 1 .. 8, 16, 32, 48 or 64; for the gradient of groups up to kSampleStrip
  int samples;  // 1 .. width
};

// Features by samples with arbitrary strides, at most one panel wide.
template <class T>
struct Strided {
  T* data;
  int64_t feature_stride, sample_stride;
};

// Samples of all features, as in a Panel but with any stride between features: the caller's memory.
template <class T>
struct SampleRows {
  const T* data;
  int64_t stride;
};

// body(first, n) over `count` samples or registers in as few parts of at most `most` as there can
// be, all about equal: a part of one or two would load every weight for little.
template <class Body>
inline void for_parts(int64_t count, int64_t most, const Body& body) {
  const int64_t parts = (count + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = count * i / parts, end = count * (i + 1) / parts;
    body(first, static_cast<int>(end - first));
  }
}

// What every level does with samples, whatever multiplies them.
template <class T>
struct SampleBodies {
  // Panel <-> memory for features [begin, end).
  void (*pack)(Strided<const T> from, const Panel<T>& to, int64_t begin, int64_t end);
  void (*unpack)(const Panel<const T>& from, Strided<T> to, int64_t begin, int64_t end);
  // y[row * ldy + b], b < width (a multiple of 16), for n rows: those that `rows` names, or the
  // first n where it is null.
  void (*activate)(Activation, T* y, int64_t ldy, int64_t width, const int32_t* rows, int64_t n);
};

template <class T>
Strided<T> samples_from(const Matrix<T>& m, int64_t sample) {
  return {m.data + sample * m.col_stride, m.row_stride, m.col_stride};
}

}  // namespace spfmt
