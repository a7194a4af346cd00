// Y = A X + bias of groups.
//
// A block computes a tile's rows for a strip of samples: A is the tile's values, as they are
// stored, B the rows of X that its list names. All rows of a tile share what is gathered of X,
// which is why a tile of 64 rows is worth more than four of 16.
#include "groups.h"

namespace spfmt::cuda {
namespace {

constexpr int kStages = 3;

// What is in shared memory at a time: some columns of the list.
template <class M, class W>
struct Stage {
  using T = typename M::T;
  static constexpr int kDepth = 2 * M::kDepth;
  static constexpr int kAChunks = W::kRows / M::kChunk, kBChunks = W::kColumns / M::kChunk;
  using X = Gather<T, kDepth, kBChunks, W::kThreads>;
  static constexpr int kA = kDepth * kAChunks * 16, kBytes = kA + X::kBytes;
};

// Columns first .. first + kDepth - 1 of the list, chunks in the order in which they are stored.
template <class M, class W>
__device__ __forceinline__ void copy_values(unsigned char* to, const Values<typename M::T>& values,
                                            int first) {
  using S = Stage<M, W>;
  constexpr int kOfBand = 16 / M::kChunk, kAll = S::kDepth * S::kAChunks;
  SPFMT_UNROLL
  for (int i = threadIdx.x; i < kAll; i += W::kThreads) {
    const int band = i / kOfBand / S::kDepth, k = i / kOfBand % S::kDepth;
    const int chunk = band * kOfBand + i % kOfBand;
    values.copy(to + Rows<S::kAChunks>::at(k, chunk), first + k, chunk * M::kChunk);
  }
}

// Writes four samples of a row; those beyond the last are nobody's.
template <class T>
__device__ __forceinline__ void write4(const Matrix<T>& y, int64_t row, int64_t sample,
                                       const float (&sum)[4], float bias) {
  T* to = y.data + row * y.stride + sample;
  T rounded[4];
  SPFMT_UNROLL
  for (int i = 0; i < 4; ++i) rounded[i] = from_float<T>(sum[i] + bias);
  if (y.aligned && sample + 3 < y.n) {
    *reinterpret_cast<Pair<Pair<T>>*>(to) = {{rounded[0], rounded[1]}, {rounded[2], rounded[3]}};
    return;
  }
  SPFMT_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (sample + i < y.n) to[i] = rounded[i];
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

template <class W, class T>
__device__ __forceinline__ void write_rows(const Sums<W>& sums, const Matrix<T>& y,
                                           const int32_t* rows, int count, int64_t sample,
                                           const float* bias) {
  const int lane = threadIdx.x % 32, mine = lane % 2 * 8 + lane % 4 / 2 * 4;
  SPFMT_UNROLL
  for (int i = 0; i < 2 * W::kBands; ++i) {
    const int place = W::row() + 8 * i + lane / 4;
    const bool any = place < count;
    const int64_t row = any ? rows[place] : 0;
    const float b = any && bias ? bias[row] : 0.0f;
    SPFMT_UNROLL
    for (int p = 0; p < W::kPairs; ++p) {
      float four[4];
      trade(sums.of[i / 2][p], i % 2, four);
      if (any) write4(y, row, sample + W::column() + 16 * p + mine, four, b);
    }
  }
}

template <class M, class W, class T = typename M::T>
__global__ void __launch_bounds__(W::kThreads)
    spmm(Tiles a, const T* values, Matrix<const T> x, const float* bias, Matrix<T> y, int strips) {
  using S = Stage<M, W>;
  DYNAMIC_SHARED(shared);
  const Tile tile = a.tile[blockIdx.x / strips];
  const int64_t sample = int64_t{blockIdx.x % strips} * W::kColumns;
  const int32_t* list = a.col_indices + tile.col;
  const Values<T> of_tile(values, tile);
  typename S::X gather;
  gather.find(list, tile.cols);
  const auto fill = [&](int step) {
    unsigned char* to = shared + step % kStages * S::kBytes;
    copy_values<M, W>(to, of_tile, step * S::kDepth);
    gather.copy(to + S::kA, x, sample);
    const int next = (step + 1) * S::kDepth;
    gather.find(list + next, tile.cols - next);
  };
  Sums<W> sums;
  const bool any = W::row() < tile.rows;
  const auto use = [&](int step) {
    if (!any) return;
    const unsigned char* stage = shared + step % kStages * S::kBytes;
    SPFMT_UNROLL
    for (int depth = 0; depth < S::kDepth; depth += M::kDepth) {
      multiply<M>(sums, Operand<true, S::kAChunks>{stage},
                  Operand<true, S::kBChunks>{stage + S::kA}, depth);
    }
  };
  in_stages<kStages>((tile.cols + S::kDepth - 1) / S::kDepth, fill, use);
  if (any) write_rows(sums, y, a.row_perm + tile.row, tile.rows, sample, bias);
}

template <class M, class W, class T = typename M::T>
int launch(const Tiles& a, const void* values, const Matrix<const T>& x, const float* bias,
           const Matrix<T>& y, void* stream) {
  const int64_t strips = (x.n + W::kColumns - 1) / W::kColumns;
  if (a.count * strips > kMostBlocks) return kInvalidValue;
  const auto kernel = &spmm<M, W>;
  return LAUNCH(kernel, dim3(static_cast<unsigned>(a.count * strips)), W::kThreads,
                kStages * (Stage<M, W>::kBytes), stream, a, static_cast<const T*>(values), x, bias,
                y, static_cast<int>(strips));
}

}  // namespace
}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_groups_spmm(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                      const void* values, const void* x, int64_t x_stride,
                                      int64_t n, const float* bias, void* y, int64_t y_stride,
                                      void* stream) {
  using namespace spfmt::cuda;
  if (a->count == 0 || n == 0) return 0;
  return with_math(dtype, precision, [&](auto math) {
    using M = decltype(math);
    using T = typename M::T;
    const Matrix<const T> from(static_cast<const T*>(x), x_stride, n, M::kChunk);
    const Matrix<T> to(static_cast<T*>(y), y_stride, n, 4);
    return with_warps(a->most_rows, n, [&](auto warps) {
      return launch<M, decltype(warps)>(*a, values, from, bias, to, stream);
    });
  });
}
