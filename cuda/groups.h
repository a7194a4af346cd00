// What the kernels of groups share: operands in shared memory, and the product of a block.
//
// Each of the three products is, for a block, a dense one of A (rows, depth) and B (depth, columns)
// that goes along the depth in stages. Both operands come from scattered rows of matrices or from
// the values of a tile, sixteen bytes at a time; what is not there (beyond a list, a band or the
// samples) is zero in both, so that no NaN meets a zero.
#pragma once

#include "operands.h"

namespace spfmt::cuda {

// ------------------------------------------------------------------------------------- arithmetic

// How numbers of a dtype are multiplied. With two parts a float32 is the sum of two numbers of
// tf32, high + low with |low| <= 2^-11 |high|, and a product is high high + high low + low high:
// off by 3 2^-22 of its size at most. What is infinite, or rounds to that, gives NaN then.
template <class T_, int parts>
struct Math {
  using T = T_;
  static constexpr int kParts = parts;
  static constexpr int kChunk = 16 / sizeof(T);  // elements in sixteen bytes
  static constexpr int kDepth = 2 * kChunk;      // of an mma
};

// body(Math) for a dtype and a precision as callers name them.
template <class Body>
int with_math(int dtype, int precision, const Body& body) {
  switch (static_cast<DType>(dtype)) {
    case DType::bf16:
      return body(Math<bf16, 1>{});
    case DType::f16:
      return body(Math<half, 1>{});
    case DType::f32:
      if (static_cast<Precision>(precision) == Precision::tf32) return body(Math<float, 1>{});
      return body(Math<float, 2>{});
  }
  return kInvalidValue;
}

// -------------------------------------------------------------------------------------- fragments

// An operand of a block's product. Plain: its rows run along the depth. Transposed: its rows are
// the depth, and run along the rows of A or the columns of B.
template <bool transposed, int chunks>
struct Operand {
  const unsigned char* bytes;
};

enum class Side { a, b };

// Sixteen rows of A, or sixteen columns of B, by an mma's depth.
template <class M>
struct Fragment {
  uint32_t part[M::kParts][4];
};

template <class M>
__device__ __forceinline__ Fragment<M> split(const uint32_t (&number)[4]) {
  Fragment<M> f;
  SPFMT_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(typename M::T) == 2) {
      f.part[0][i] = number[i];  // two numbers
    } else {
      const float whole = float_of(number[i]);
      f.part[0][i] = to_tf32(whole);
      if constexpr (M::kParts == 2) f.part[1][i] = to_tf32(whole - float_of(f.part[0][i]));
    }
  }
  return f;
}

// The fragment at row or column `place` and at `depth`. Its four matrices go down the rows of A
// first, but along the depth of B.
template <class M, Side side, bool transposed, int chunks>
__device__ __forceinline__ Fragment<M> load(const Operand<transposed, chunks>& from, int place,
                                            int depth) {
  const int lane = threadIdx.x % 32;
  const auto beside = [](int matrix) { return side == Side::a ? matrix % 2 : matrix / 2; };
  const auto deeper = [](int matrix) { return side == Side::a ? matrix / 2 : matrix % 2; };
  uint32_t number[4];
  if constexpr (!transposed) {
    const int row = place + 8 * beside(lane / 8) + lane % 8;
    const int chunk = depth / M::kChunk + deeper(lane / 8);
    ldmatrix(number, from.bytes + Rows<chunks>::at(row, chunk));
  } else if constexpr (sizeof(typename M::T) == 2) {
    const int row = depth + 8 * deeper(lane / 8) + lane % 8;
    ldmatrix_trans(number, from.bytes + Rows<chunks>::at(row, place / 8 + beside(lane / 8)));
  } else {
    SPFMT_UNROLL
    for (int i = 0; i < 4; ++i) {  // ldmatrix transposes nothing of 32 bits
      const int row = depth + 4 * deeper(i) + lane % 4, column = place + 8 * beside(i) + lane / 4;
      number[i] = *reinterpret_cast<const uint32_t*>(
          from.bytes + Rows<chunks>::at(row, column / 4) + column % 4 * 4);
    }
  }
  return split<M>(number);
}

// -------------------------------------------------------------------------- the product of a block

// Warps of a block, `down` by `across`; each has `bands` times 16 rows and `pairs` times 16
// columns, that is pairs of what an mma makes.
template <int down, int across, int bands, int pairs>
struct Warps {
  static constexpr int kBands = bands, kPairs = pairs, kThreads = 32 * down * across;
  static constexpr int kRows = 16 * down * bands, kColumns = 16 * across * pairs;

  // The first row and column of this warp.
  __device__ static int row() { return threadIdx.x / 32 / across * (16 * bands); }
  __device__ static int column() { return threadIdx.x / 32 % across * (16 * pairs); }
};

// body(Warps) for tiles of at most so many rows, times `width` columns, or strips of them.
template <class Body>
int with_warps(int most_rows, int64_t width, const Body& body) {
  const bool wide = width > 64;
  switch (most_rows) {
    case 16:
      return wide ? body(Warps<1, 4, 1, 2>{}) : body(Warps<1, 4, 1, 1>{});
    case 64:
      return wide ? body(Warps<2, 2, 2, 4>{}) : body(Warps<2, 2, 2, 2>{});
    case 128:
      return wide ? body(Warps<4, 2, 2, 4>{}) : body(Warps<4, 2, 2, 2>{});
  }
  return kInvalidValue;
}

// A warp's sums: those of band i and pair p, as two mma leave them.
template <class W>
struct Sums {
  float of[W::kBands][W::kPairs][2][4] = {};
};

template <class M>
__device__ __forceinline__ void multiply(float (&sum)[2][4], const Fragment<M>& a,
                                         const Fragment<M>& b) {
  constexpr typename M::T kType{};
  SPFMT_UNROLL
  for (int i = 0; i < 2; ++i) {
    if constexpr (M::kParts == 2) {  // small ones first
      mma(kType, sum[i], a.part[1], b.part[0] + 2 * i);
      mma(kType, sum[i], a.part[0], b.part[1] + 2 * i);
    }
    mma(kType, sum[i], a.part[0], b.part[0] + 2 * i);
  }
}

// Adds the product at `depth`, of the first `bands` bands of the warp's rows.
template <class M, class W, class A, class B>
__device__ __forceinline__ void multiply(Sums<W>& sums, const A& a, const B& b, int depth,
                                         int bands = W::kBands) {
  Fragment<M> rows[W::kBands];
  SPFMT_UNROLL
  for (int i = 0; i < W::kBands; ++i) {
    if (i < bands) rows[i] = load<M, Side::a>(a, W::row() + 16 * i, depth);
  }
  SPFMT_UNROLL
  for (int p = 0; p < W::kPairs; ++p) {
    const Fragment<M> columns = load<M, Side::b>(b, W::column() + 16 * p, depth);
    SPFMT_UNROLL
    for (int i = 0; i < W::kBands; ++i) {
      if (i < bands) multiply<M>(sums.of[i][p], rows[i], columns);
    }
  }
}

struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

// Runs fill(step) ahead of use(step) by one stage less than there are: a stage is filled again
// behind the barrier that all threads reach when they have used it, and have called done().
template <int stages, class Fill, class Use, class Done = Nothing>
__device__ __forceinline__ void in_stages(int steps, const Fill& fill, const Use& use,
                                          const Done& done = {}) {
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) fill(step);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<stages - 2>();
    done();
    __syncthreads();
    if (step + stages - 1 < steps) fill(step + stages - 1);
    copy_commit();
    use(step);
  }
  copy_wait<0>();
}

// ----------------------------------------------------------------------------- values and results

// Copies the values of columns first .. first + kDepth - 1 of the list to a stage's layout, chunks
// in the order in which they are stored.
template <class M, class W, class S>
__device__ __forceinline__ void copy_values(unsigned char* to, const Values<typename M::T>& values,
                                            int first) {
  constexpr int kOfBand = 16 / M::kChunk, kAll = S::kDepth * S::kAChunks;
  SPFMT_UNROLL
  for (int i = threadIdx.x; i < kAll; i += W::kThreads) {
    const int band = i / kOfBand / S::kDepth, k = i / kOfBand % S::kDepth;
    const int chunk = band * kOfBand + i % kOfBand;
    values.copy(to + S::Layout::at(k, chunk), first + k, chunk * M::kChunk);
  }
}

// The four samples of this lane in the upper or lower half of a pair's rows: an mma leaves two in a
// lane, so neighbours trade. The even one has four of the first mma then, the odd one four of the
// second, and a warp writes whole sectors.
__device__ __forceinline__ void trade(const float (&sum)[2][4], int half, float (&four)[4]) {
  const bool odd = threadIdx.x % 2;
  SPFMT_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float first = sum[0][2 * half + i], second = sum[1][2 * half + i];
    const float got = shuffle_xor(odd ? first : second, 1);
    four[i] = odd ? got : first;
    four[2 + i] = odd ? second : got;
  }
}

template <class W, class Y>
__device__ __forceinline__ void write_rows(const Sums<W>& sums, const Y& y, const int32_t* rows,
                                           int count, int64_t sample, const float* bias) {
  const int lane = threadIdx.x % 32, mine = lane % 2 * 8 + lane % 4 / 2 * 4;
  SPFMT_UNROLL
  for (int p = 0; p < W::kPairs; ++p) {
    const auto place = y.place(sample + W::column() + 16 * p + mine);
    SPFMT_UNROLL
    for (int i = 0; i < 2 * W::kBands; ++i) {
      const int at = W::row() + 8 * i + lane / 4;
      const bool any = at < count;
      const int32_t row = any ? rows[at] : 0;
      const float b = any && bias ? bias[row] : 0.0f;
      float four[4];
      trade(sums.of[i / 2][p], i % 2, four);
      SPFMT_UNROLL
      for (float& number : four) number += b;
      if (any) y.write(row, place, four);
    }
  }
}

}  // namespace spfmt::cuda
