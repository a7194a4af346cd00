// Gradients of the values of groups: dY X^T where they are.
//
// A block computes a tile's rows for a strip of its list: A is the rows of dY, B those of X, and
// the depth is the samples, which are contiguous in both. Every value is one block's and one lane's
// sum over all samples.
#include "groups.h"

namespace spfmt::cuda {
namespace {

constexpr int kStages = 3;

// What is in shared memory at a time: 128 bytes of each row.
template <class M, class W>
struct Stage {
  using T = typename M::T;
  static constexpr int kChunks = 8, kDepth = kChunks * M::kChunk;
  using Dy = Gather<T, W::kRows, kChunks, W::kThreads>;
  using X = Gather<T, W::kColumns, kChunks, W::kThreads>;
  static constexpr int kBytes = Dy::kBytes + X::kBytes;
};

// Eight lanes write eight rows of a column, which are neighbours.
template <class W>
__device__ __forceinline__ void write_values(const Sums<W>& sums, const Tile& tile, int first,
                                             float* values) {
  const int lane = threadIdx.x % 32;
  SPFMT_UNROLL
  for (int i = 0; i < W::kBands; ++i) {
    const int band = W::row() / 16 + i, left = tile.rows - 16 * band;
    const int height = left < 16 ? left : 16;
    float* to = values + tile.value + int64_t{16} * tile.cols * band;
    SPFMT_UNROLL
    for (int j = 0; j < 8 * W::kPairs; ++j) {  // number j % 4 of mma j / 4
      const int row = lane / 4 + j % 4 / 2 * 8;
      const int place = first + W::column() + j / 4 * 8 + lane % 4 * 2 + j % 2;
      if (row < height && place < tile.cols) {
        to[int64_t{place} * height + row] = sums.of[i][j / 8][j / 4 % 2][j % 4];
      }
    }
  }
}

template <class M, class W, class T = typename M::T>
__global__ void __launch_bounds__(W::kThreads)
    sddmm(Tiles a, Matrix<const T> dy, Matrix<const T> x, float* values, int strips) {
  using S = Stage<M, W>;
  DYNAMIC_SHARED(shared);
  const Tile tile = a.tile[blockIdx.x / strips];
  const int first = static_cast<int>(blockIdx.x % strips) * W::kColumns;
  if (first >= tile.cols) return;  // all threads do
  typename S::Dy rows;
  typename S::X columns;
  rows.find(a.row_perm + tile.row, tile.rows);
  columns.find(a.col_indices + tile.col + first, tile.cols - first);
  const auto fill = [&](int step) {
    unsigned char* to = shared + step % kStages * S::kBytes;
    const int64_t sample = int64_t{step} * S::kDepth;
    rows.copy(to, dy, sample);
    columns.copy(to + S::Dy::kBytes, x, sample);
  };
  Sums<W> sums;
  const bool any = W::row() < tile.rows && first + W::column() < tile.cols;
  const auto use = [&](int step) {
    if (!any) return;
    const unsigned char* stage = shared + step % kStages * S::kBytes;
    SPFMT_ROLLED
    for (int depth = 0; depth < S::kDepth; depth += M::kDepth) {
      multiply<M>(sums, Operand<false, S::kChunks>{stage},
                  Operand<false, S::kChunks>{stage + S::Dy::kBytes}, depth);
    }
  };
  in_stages<kStages>(static_cast<int>((x.n + S::kDepth - 1) / S::kDepth), fill, use);
  if (any) write_values(sums, tile, first, values);
}

template <class M, class W, class T = typename M::T>
int launch(const Tiles& a, const Matrix<const T>& dy, const Matrix<const T>& x, float* values,
           void* stream) {
  const int strips = (a.most_cols + W::kColumns - 1) / W::kColumns;
  const int64_t blocks = int64_t{a.count} * strips;
  if (blocks > kMostBlocks) return kInvalidValue;
  const auto kernel = &sddmm<M, W>;
  return LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), W::kThreads,
                kStages * (Stage<M, W>::kBytes), stream, a, dy, x, values, strips);
}

}  // namespace
}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_groups_sddmm(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                       const void* dy, int64_t dy_stride, const void* x,
                                       int64_t x_stride, int64_t n, float* values, void* stream) {
  using namespace spfmt::cuda;
  if (a->count == 0 || a->most_cols == 0) return 0;
  return with_math(dtype, precision, [&](auto math) {
    using M = decltype(math);
    using T = typename M::T;
    const Matrix<const T> rows(static_cast<const T*>(dy), dy_stride, n, M::kChunk);
    const Matrix<const T> columns(static_cast<const T*>(x), x_stride, n, M::kChunk);
    return with_warps(a->most_rows, a->most_cols, [&](auto warps) {
      return launch<M, decltype(warps)>(*a, rows, columns, values, stream);
    });
  });
}
