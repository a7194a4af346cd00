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
template <class M, class W, class Source>
struct Stage {
  using T = typename M::T;
  static constexpr int kDepth = 2 * M::kDepth;
  static constexpr int kAChunks = W::kRows / M::kChunk, kBChunks = W::kColumns / M::kChunk;
  using Layout = Rows<kAChunks>;
  using X = Gather<Source, kDepth, kBChunks, W::kThreads>;
  static constexpr int kA = kDepth * kAChunks * 16, kBytes = kA + X::kBytes;
};

template <class M, class W, class X, class Y, class T = typename M::T>
__global__ void __launch_bounds__(W::kThreads, 1)
    spmm(Tiles a, const T* values, X x, const float* bias, Y y, int strips) {
  using S = Stage<M, W, X>;
  DYNAMIC_SHARED(shared);
  const Tile tile = a.tile[blockIdx.x / strips];
  const int64_t sample = int64_t{blockIdx.x % strips} * W::kColumns;
  const auto* list = x.list(a) + tile.col;
  const Values<T> of_tile(values, tile);
  typename S::X gather;
  gather.go_to(x, sample);
  gather.find(x, list, tile.cols);
  const auto fill = [&](int step) {
    unsigned char* to = shared + step % kStages * S::kBytes;
    copy_values<M, W, S>(to, of_tile, step * S::kDepth);
    gather.copy(to + S::kA, x);
    const int next = (step + 1) * S::kDepth;
    gather.find(x, list + next, tile.cols - next);
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

template <class M, class X, class Y, class T = typename M::T>
int launch(const Tiles& a, const void* values, const X& x, const float* bias, const Y& y,
           void* stream) {
  return with_warps(a.most_rows, x.samples, [&](auto warps) {
    using W = decltype(warps);
    const int64_t strips = (x.samples + W::kColumns - 1) / W::kColumns;
    if (a.count * strips > kMostBlocks) return kInvalidValue;
    const auto kernel = &spmm<M, W, X, Y>;
    return LAUNCH(kernel, dim3(static_cast<unsigned>(a.count * strips)), W::kThreads,
                  kStages * (Stage<M, W, X>::kBytes), stream, a, static_cast<const T*>(values), x,
                  bias, y, static_cast<int>(strips));
  });
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
    return with_matrices<typename M::T>(x, x_stride, n, y, y_stride,
                                        [&](const auto& from, const auto& to) {
                                          return launch<M>(*a, values, from, bias, to, stream);
                                        });
  });
}

extern "C" int spfmt_cuda_groups_conv(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                      const void* values, const void* x,
                                      const spfmt::cuda::Maps* x_maps, const int32_t* stride,
                                      const float* bias, void* y, const spfmt::cuda::Maps* y_maps,
                                      void* stream) {
  using namespace spfmt::cuda;
  if (a->count == 0) return 0;
  return with_math(dtype, precision, [&](auto math) {
    using M = decltype(math);
    return with_images<typename M::T>(x, *x_maps, stride, y, *y_maps,
                                      [&](const auto& from, const auto& to) {
                                        return launch<M>(*a, values, from, bias, to, stream);
                                      });
  });
}
