// Gradients of the values of groups: dY X^T where they are.
//
// A block computes a tile's rows for a strip of its list: A is the rows of dY, B those of X, and
// the depth is the samples, which are contiguous in both. Every value is one block's and one lane's
// sum over all samples, or over a share of them.
#include "groups.h"

namespace spfmt::cuda {
namespace {

constexpr int kStages = 3;

// What is in shared memory at a time: 128 bytes of each row.
template <class M, class W, class Source>
struct Stage {
  static constexpr int kChunks = 8, kDepth = kChunks * M::kChunk;
  using Dy = Gather<Source, W::kRows, kChunks, W::kThreads>;
  using X = Gather<Source, W::kColumns, kChunks, W::kThreads>;
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

// Shares of the samples, in steps: part p of a block's product goes from p * steps on.
struct Parts {
  int count, steps;
  int64_t nnz;  // values from a part's to the next one's
};

template <class M, class W, class Source>
__global__ void __launch_bounds__(W::kThreads, 2)
    sddmm(Tiles a, Source dy, Source x, float* values, int strips, Parts parts) {
  using S = Stage<M, W, Source>;
  DYNAMIC_SHARED(shared);
  const Tile tile = a.tile[blockIdx.x / parts.count / strips];
  const int first = static_cast<int>(blockIdx.x / parts.count % strips) * W::kColumns;
  if (first >= tile.cols) return;  // all threads do
  const int part = blockIdx.x % parts.count;
  typename S::Dy rows;
  typename S::X columns;
  rows.find(dy, Shifted{a.row_perm + tile.row, 0, 0}, tile.rows);
  columns.find(x, x.list(a) + tile.col + first, tile.cols - first);
  const int64_t begin = int64_t{part} * parts.steps;
  const auto fill = [&](int step) {
    unsigned char* to = shared + step % kStages * S::kBytes;
    const int64_t sample = (begin + step) * S::kDepth;
    rows.go_to(dy, sample);
    columns.go_to(x, sample);
    rows.copy(to, dy);
    columns.copy(to + S::Dy::kBytes, x);
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
  const int64_t left = (x.samples + S::kDepth - 1) / S::kDepth - begin;
  in_stages<kStages>(static_cast<int>(left < parts.steps ? left : parts.steps), fill, use);
  if (any) write_values(sums, tile, first, values + part * parts.nnz);
}

template <class M, class Source>
int launch(const Tiles& a, const Source& dy, const Source& x, float* values, int parts, int64_t nnz,
           void* stream) {
  return with_warps(a.most_rows, a.most_cols, [&](auto warps) {
    using W = decltype(warps);
    using S = Stage<M, W, Source>;
    const int strips = (a.most_cols + W::kColumns - 1) / W::kColumns;
    const int64_t blocks = int64_t{a.count} * strips * parts;
    if (blocks > kMostBlocks) return kInvalidValue;
    const int64_t steps = (x.samples + S::kDepth - 1) / S::kDepth;
    const Parts shares{parts, static_cast<int>((steps + parts - 1) / parts), nnz};
    const auto kernel = &sddmm<M, W, Source>;
    return LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), W::kThreads, kStages * S::kBytes,
                  stream, a, dy, x, values, strips, shares);
  });
}

}  // namespace
}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_groups_sddmm(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                       const void* dy, int64_t dy_stride, const void* x,
                                       int64_t x_stride, int64_t n, int32_t parts, int64_t nnz,
                                       float* values, void* stream) {
  using namespace spfmt::cuda;
  if (a->count == 0 || a->most_cols == 0) return 0;
  if (parts < 1) return kInvalidValue;
  return with_math(dtype, precision, [&](auto math) {
    using M = decltype(math);
    using T = typename M::T;
    const Matrix<const T> rows(static_cast<const T*>(dy), dy_stride, n, M::kChunk);
    const Matrix<const T> columns(static_cast<const T*>(x), x_stride, n, M::kChunk);
    return launch<M>(*a, rows, columns, values, parts, nnz, stream);
  });
}

extern "C" int spfmt_cuda_groups_conv_sampled(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                              const void* dy, const spfmt::cuda::Maps* dy_maps,
                                              const void* x, const spfmt::cuda::Maps* x_maps,
                                              const int32_t* stride, int32_t parts, int64_t nnz,
                                              float* values, void* stream) {
  using namespace spfmt::cuda;
  if (a->count == 0 || a->most_cols == 0) return 0;
  if (parts < 1) return kInvalidValue;
  return with_math(dtype, precision, [&](auto math) {
    using M = decltype(math);
    using T = typename M::T;
    const Grid grid = grid_of<T>(dy_maps->height, dy_maps->width, dy, *dy_maps, x, *x_maps);
    if (!is_countable(*dy_maps, grid, 1, 1) || !is_countable(*x_maps, grid, stride[0], stride[1])) {
      return kInvalidValue;
    }
    const Images<const T> rows(static_cast<const T*>(dy), *dy_maps, grid, 1, 1);
    const Images<const T> columns(static_cast<const T*>(x), *x_maps, grid, stride[0], stride[1]);
    return launch<M>(*a, rows, columns, values, parts, nnz, stream);
  });
}
