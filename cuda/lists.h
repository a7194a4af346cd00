// What the kernels of lists share: how they read positions and samples, and sum over lanes.
#pragma once

#include <type_traits>

#include "api.h"
#include "device.h"

namespace spfmt::cuda {

inline bool is_aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs f(T(), device) with the type that a DType names, and the current device.
template <class F>
int with_type(int dtype, const F& f) {
  Device device;
  if (const int error = current_device(&device)) return error;
  switch (static_cast<DType>(dtype)) {
    case DType::bf16:
      return f(bf16(), device);
    case DType::f16:
      return f(half(), device);
    case DType::f32:
      return f(float(), device);
  }
  return kInvalidValue;
}

// Runs f(std::integral_constant<int, n>()), n a power of two up to `most`.
template <int most, class F>
int with_constant(int64_t n, const F& f) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most / 2>(n, f);
  }
  return f(std::integral_constant<int, most>());
}

// ------------------------------------------------------------------------------------- positions

constexpr int kFour = 4;

// Four positions, loaded at once.
template <class T>
struct Four {
  Vector<int32_t, kFour> col;
  Vector<T, kFour> value;
};

// The positions of a row. Those of [first, last) come in fours that begin at multiples of four; up
// to three lie before them, and up to three behind.
struct Range {
  uint32_t begin, first, last, end;
};

// Lists with their values.
template <class T>
struct Weights {
  int64_t rows, cols;
  const int32_t *indptr, *col_indices, *source;
  const T* values;
  bool vectors;  // whether the arrays allow vector loads where positions are multiples of four

  Weights(const Lists& a, const void* values)
      : rows(a.rows),
        cols(a.cols),
        indptr(a.indptr),
        col_indices(a.col_indices),
        source(a.source),
        values(static_cast<const T*>(values)),
        vectors(is_aligned(col_indices, sizeof(Four<T>::col)) &&
                (source ? is_aligned(source, sizeof(Four<T>::col))
                        : is_aligned(values, sizeof(Four<T>::value)))) {}

  __device__ __forceinline__ Range range(int64_t row) const {
    const uint32_t begin = indptr[row], end = indptr[row + 1];
    const uint32_t up = (begin + kFour - 1) / kFour * kFour, down = end / kFour * kFour;
    const uint32_t first = up < end ? up : end;
    return {begin, first, down > first ? down : first, end};
  }

  __device__ __forceinline__ float value(uint32_t p) const {
    return to_float(values[source ? source[p] : p]);
  }

  // The branches are the same for every thread of a launch.
  __device__ __forceinline__ Four<T> four(uint32_t p) const {
    Four<T> out;
    out.col = numbers(col_indices, p);
    if (source) {
      const Vector<int32_t, kFour> from = numbers(source, p);
      SPFMT_UNROLL
      for (int i = 0; i < kFour; ++i) out.value.at[i] = values[from.at[i]];
    } else {
      out.value = numbers(values, p);
    }
    return out;
  }

 private:
  template <class N>
  __device__ __forceinline__ Vector<N, kFour> numbers(const N* from, uint32_t p) const {
    if (vectors) return load_vector<kFour>(from + p);
    Vector<N, kFour> out;
    SPFMT_UNROLL
    for (int i = 0; i < kFour; ++i) out.at[i] = from[p + i];
    return out;
  }
};

// Calls body(column, value) for the fours of a row that begin at p, p + step, ...; the next four
// are on their way while one is worked on.
template <class T, class Body>
__device__ __forceinline__ void for_fours(const Weights<T>& a, const Range& row, uint32_t p,
                                          uint32_t step, const Body& body) {
  if (p >= row.last) return;
  Four<T> next = a.four(p);
  while (p < row.last) {
    const Four<T> now = next;
    p += step;
    if (p < row.last) next = a.four(p);
    SPFMT_UNROLL
    for (int i = 0; i < kFour; ++i) body(now.col.at[i], to_float(now.value.at[i]));
  }
}

// --------------------------------------------------------------------------------------- samples

// A matrix of features by samples, one of the two contiguous.
template <class T>
struct Strided {
  T* data;
  int64_t feature_stride, sample_stride;

  // The samples of a feature, where they are contiguous.
  __device__ __forceinline__ T* row(int64_t feature) const {
    return data + feature * feature_stride;
  }
  __device__ __forceinline__ T& at(int64_t feature, int64_t sample) const {
    return data[feature * feature_stride + sample * sample_stride];
  }
};

// The widest vector, of up to kWidest samples, whose loads are aligned in each row of a matrix.
constexpr int kWidest = 4;
template <class T>
int widest_vector(const Strided<T>& m) {
  int n = kWidest;
  while (!is_aligned(m.data, n * sizeof(T)) || m.feature_stride % n != 0) n /= 2;
  return n;
}

// Samples of which the first `left` exist; the others are not read, and are zeros.
template <int n, class T>
__device__ __forceinline__ Vector<T, n> load_samples(const T* from, int64_t left) {
  if (left >= n) return load_vector<n>(from);
  Vector<T, n> out;
  SPFMT_UNROLL
  for (int i = 0; i < n; ++i) out.at[i] = i < left ? from[i] : T{};
  return out;
}
template <int n, class T>
__device__ __forceinline__ void store_samples(T* to, const Vector<T, n>& v, int64_t left) {
  if (left >= n) return store_vector(to, v);
  SPFMT_UNROLL
  for (int i = 0; i < n; ++i) {
    if (i < left) to[i] = v.at[i];
  }
}

// ------------------------------------------------------------------------------------------ sums

// What a lane keeps of n sums over a team of lanes.
template <int kTeam, int n>
struct Kept {
  static constexpr int kCount = n > kTeam ? n / kTeam : 1;
  int first;    // the number of sum[0]
  bool leader;  // of the lanes that keep the same, one
  __device__ __forceinline__ explicit Kept(int lane)
      : first(lane % kTeam * n / kTeam), leader(n >= kTeam || lane % kTeam * n % kTeam == 0) {}
};

// Sums n numbers, powers of two, over each team of kTeam neighbouring lanes; all lanes of the warp
// take part. Two lanes share the work: one goes on with the first half of the numbers, the other
// with the second, so that n numbers cost about n shuffles instead of n for every halving.
template <int kTeam, int n>
__device__ __forceinline__ void sum_lanes(float* sum, int lane) {
  if constexpr (kTeam > 1) {
    constexpr int kBits = kTeam / 2, kHalf = n / 2;
    if constexpr (n == 1) {
      sum[0] += shuffle_xor(sum[0], kBits);
      sum_lanes<kBits, 1>(sum, lane);
    } else {
      const bool second = lane & kBits;
      SPFMT_UNROLL
      for (int i = 0; i < kHalf; ++i) {
        const float mine = second ? sum[kHalf + i] : sum[i];
        sum[i] = mine + shuffle_xor(second ? sum[i] : sum[kHalf + i], kBits);
      }
      sum_lanes<kBits, kHalf>(sum, lane);
    }
  }
}

// ------------------------------------------------------------------------------------- kernels

// A product that keeps as many samples of X in shared memory as fit: lists_small.cu. X and Y may be
// contiguous in either direction; all pointers are the device's.
template <class T>
struct Operands {
  Strided<const T> x;
  Strided<T> y;
  int64_t n;
  const float* bias;
};
// Columns of so many samples in shared memory, in bytes.
template <class T>
constexpr int64_t staged_bytes(int64_t cols, int64_t samples) {
  return cols * samples * static_cast<int64_t>(sizeof(T));
}
template <class T>
int lists_staged(const Weights<T>& a, const Operands<T>& o, const Device& device, void* stream);

}  // namespace spfmt::cuda
