// What the kernels of groups share: operands in shared memory, and the product of a block.
//
// Each of the three products is, for a block, a dense one of A (rows, depth) and B (depth, columns)
// that goes along the depth in stages. Both operands come from scattered rows of matrices or from
// the values of a tile, sixteen bytes at a time; what is not there (beyond a list, a band or the
// samples) is zero in both, so that no NaN meets a zero.
#pragma once

#include "api.h"
#include "device.h"

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

// ---------------------------------------------------------------------- matrices in shared memory

// Rows of `chunks` times sixteen bytes. The chunks of a row change places so that neither one chunk
// of eight rows in a line (ldmatrix) nor two side by side of four rows (fragments of tf32) meet in
// a bank.
template <int chunks>
struct Rows {
  // The byte where a chunk of a row starts.
  __host__ __device__ __forceinline__ static constexpr int at(int row, int chunk) {
    constexpr int kPlaces = chunks < 8 ? chunks : 8;
    const int line = row / (8 / kPlaces);
    const int turn = (line * 2 & (kPlaces - 1)) | (line / (kPlaces / 2) & 1);
    return (row * chunks + (chunk ^ turn)) * 16;
  }
};

// Whether `rows` rows of so many chunks side by side lie in different banks, eight chunks in all.
template <int chunks>
constexpr bool apart(int rows, int row, int chunk) {
  int met = 0;
  for (int i = 0; i < 8; ++i) {
    met |= 1 << Rows<chunks>::at(row + i % rows, chunk + i / rows) / 16 % 8;
  }
  return met == 255;
}
static_assert(apart<2>(8, 8, 1) && apart<4>(8, 8, 3) && apart<8>(8, 8, 5) && apart<32>(8, 8, 9));
static_assert(apart<4>(4, 4, 2) && apart<8>(4, 4, 6) && apart<16>(4, 4, 2) && apart<32>(4, 4, 8));

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

// Runs fill(step) ahead of use(step) by one stage less than there are: a stage is filled again
// behind the barrier that all threads reach when they have used it.
template <int stages, class Fill, class Use>
__device__ __forceinline__ void in_stages(int steps, const Fill& fill, const Use& use) {
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) fill(step);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<stages - 2>();
    __syncthreads();
    if (step + stages - 1 < steps) fill(step + stages - 1);
    copy_commit();
    use(step);
  }
  copy_wait<0>();
}

// ------------------------------------------------------------------------------ to shared memory

// Features by samples in the caller's memory.
template <class T>
struct Matrix {
  T* data;
  int64_t stride, n;
  bool aligned;  // every `vector` samples, from the first of a feature on

  Matrix(T* data, int64_t stride, int64_t n, int vector)
      : data(data),
        stride(stride),
        n(n),
        aligned(stride % vector == 0 &&
                reinterpret_cast<uintptr_t>(data) % (vector * sizeof(T)) == 0) {}
};

// The first `count` elements of a chunk, which may be negative, and zeros.
template <bool aligned, class T>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const T* from, int64_t count) {
  constexpr int kChunk = 16 / sizeof(T);
  const int valid = count < 0 ? 0 : count < kChunk ? static_cast<int>(count) : kChunk;
  if constexpr (aligned) {
    copy16(to, from, valid * static_cast<int>(sizeof(T)));
  } else {
    SPFMT_UNROLL
    for (int i = 0; i < kChunk; ++i) reinterpret_cast<T*>(to)[i] = i < valid ? from[i] : T{};
  }
}

// Gathers `rows` rows of a matrix, `chunks` of sixteen bytes of each. Indices are found before they
// are needed, so that nothing waits for them.
template <class T, int rows, int chunks, int threads>
class Gather {
 public:
  static constexpr int kBytes = rows * chunks * 16;

  // Takes rows index[0 .. count] of the matrix, and zeros from there on.
  __device__ __forceinline__ void find(const int32_t* index, int count) {
    each([&](int piece, int row, int) { row_[piece] = row < count ? index[row] : -1; });
  }
  // Copies samples from `sample` on to Rows<chunks> at `to`.
  __device__ __forceinline__ void copy(unsigned char* to, const Matrix<const T>& x,
                                       int64_t sample) const {
    x.aligned ? copy_as<true>(to, x, sample) : copy_as<false>(to, x, sample);
  }

 private:
  static constexpr int kAll = rows * chunks, kPieces = (kAll + threads - 1) / threads;
  int32_t row_[kPieces];

  template <bool aligned>
  __device__ __forceinline__ void copy_as(unsigned char* to, const Matrix<const T>& x,
                                          int64_t sample) const {
    each([&](int piece, int row, int chunk) {
      const int64_t first = sample + chunk * (16 / static_cast<int>(sizeof(T)));
      const bool any = row_[piece] >= 0 && first < x.n;
      const T* from = any ? x.data + row_[piece] * x.stride + first : x.data;
      copy_chunk<aligned>(to + Rows<chunks>::at(row, chunk), from, any ? x.n - first : 0);
    });
  }
  template <class Body>
  __device__ __forceinline__ static void each(const Body& body) {
    SPFMT_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      const int i = static_cast<int>(threadIdx.x) + piece * threads;
      if (kAll % threads == 0 || i < kAll) body(piece, i / chunks, i % chunks);
    }
  }
};

// The values of a tile.
template <class T>
class Values {
 public:
  __device__ Values(const T* values, const Tile& tile)
      : data_(values + tile.value),
        rows_(tile.rows),
        cols_(tile.cols),
        aligned_(reinterpret_cast<uintptr_t>(data_) % 16 == 0) {}

  // Copies a chunk of rows from `row` on, of the column at a place of the list; zeros if that is
  // negative or beyond the list.
  __device__ __forceinline__ void copy(unsigned char* to, int place, int row) const {
    const int band = row / 16, left = rows_ - 16 * band, height = left < 16 ? left : 16;
    const bool any = height > row % 16 && place >= 0 && place < cols_;
    const int64_t at = int64_t{16} * cols_ * band + int64_t{place} * height + row % 16;
    const T* from = any ? data_ + at : data_;
    const int count = any ? height - row % 16 : 0;
    if (aligned_ && height * sizeof(T) % 16 == 0) {
      copy_chunk<true>(to, from, count);
    } else {
      copy_chunk<false>(to, from, count);
    }
  }

 private:
  const T* data_;
  int rows_, cols_;
  bool aligned_;
};

}  // namespace spfmt::cuda
