// Y = A X + bias of groups, and convolutions, on the tensor cores of compute capability 9.0.
//
// EXPERIMENTAL: what wgmma does is emulated from its manual, and has not been compared with a
// device.
//
// As groups_spmm.cu, but four warps multiply together, 64 rows by 128 samples, and both operands
// are read where they lie in shared memory. A tile's values and the rows of X both have the sums'
// direction side by side, which is what the manual calls MN-major.
#include "groups.h"

namespace spfmt::cuda {
namespace {

constexpr int kStages = 3, kDepth = 64;

// Rows of eight chunks, 128 bytes, one below the other; what a row has beyond lies behind the last
// row. Chunks change places by the row's number, as the 128-byte swizzle wants them.
struct Atoms {
  static constexpr int kBeside =
      kDepth * 128;  // bytes from eight chunks of a row to the next eight

  __host__ __device__ __forceinline__ static constexpr int at(int row, int chunk) {
    return chunk / 8 * kBeside + row * 128 + ((chunk ^ row) & 7) * 16;
  }
};

// Groups of four warps, each 64 rows.
template <int groups>
using WarpGroups = Warps<4 * groups, 1, 1, 8>;

template <class W, class Source>
struct Stage {
  using Layout = Atoms;
  static constexpr int kDepth = cuda::kDepth, kAChunks = W::kRows / 8;
  using X = Gather<Source, kDepth, W::kColumns / 8, W::kThreads, Layout>;
  static constexpr int kA = kDepth * kAChunks * 16, kBytes = kA + X::kBytes;
};

template <class M, class W, class X, class Y, class T = typename M::T>
__global__ void __launch_bounds__(W::kThreads, 1)
    spmm(Tiles a, const T* values, X x, const float* bias, Y y, int strips) {
  using S = Stage<W, X>;
  DYNAMIC_SHARED(memory);
  unsigned char* shared = aligned_shared<1024>(memory);
  const Tile tile = a.tile[blockIdx.x / strips];
  const int64_t sample = int64_t{blockIdx.x % strips} * W::kColumns;
  const auto* list = x.list(a) + tile.col;
  const Values<T> of_tile(values, tile);
  typename S::X gather;
  gather.go_to(x, sample);
  gather.find(x, list, tile.cols);
  const auto fill = [&](int step) {
    unsigned char* to = shared + step % kStages * S::kBytes;
    copy_values<M, W, S>(to, of_tile, step * kDepth);
    gather.copy(to + S::kA, x);
    const int next = (step + 1) * kDepth;
    gather.find(x, list + next, tile.cols - next);
  };
  Sums<W> sums;
  const int group = threadIdx.x / 128;
  const auto use = [&](int step) {
    const unsigned char* stage = shared + step % kStages * S::kBytes;
    group_begin();
    SPFMT_UNROLL
    for (int depth = 0; depth < kDepth; depth += M::kDepth) {
      group_mma(T{}, sums.of[0], stage + group * Atoms::kBeside + depth * 128,
                stage + S::kA + depth * 128, Atoms::kBeside);
    }
    group_commit();
  };
  const auto done = [&] {
    group_wait();
    group_sees_copies();
  };
  in_stages<kStages>((tile.cols + kDepth - 1) / kDepth, fill, use, done);
  group_wait();
  if (W::row() < tile.rows) write_rows(sums, y, a.row_perm + tile.row, tile.rows, sample, bias);
}

template <class M, int groups, class X, class Y>
int launch(const Tiles& a, const void* values, const X& x, const float* bias, const Y& y,
           void* stream) {
  using W = WarpGroups<groups>;
  using T = typename M::T;
  const int64_t strips = (x.samples + W::kColumns - 1) / W::kColumns;
  if (a.count * strips > kMostBlocks) return kInvalidValue;
  const auto kernel = &spmm<M, W, X, Y>;
  return LAUNCH(kernel, dim3(static_cast<unsigned>(a.count * strips)), W::kThreads,
                kStages * (Stage<W, X>::kBytes) + 1024, stream, a, static_cast<const T*>(values), x,
                bias, y, static_cast<int>(strips));
}

template <class M, class X, class Y>
int launch(const Tiles& a, const void* values, const X& x, const float* bias, const Y& y,
           void* stream) {
  switch (a.most_rows) {
    case 64:
      return launch<M, 1>(a, values, x, bias, y, stream);
    case 128:
      return launch<M, 2>(a, values, x, bias, y, stream);
  }
  return kInvalidValue;
}

template <class Body>
int with_narrow_math(int dtype, const Body& body) {
  switch (static_cast<DType>(dtype)) {
    case DType::bf16:
      return body(Math<bf16, 1>{});
    case DType::f16:
      return body(Math<half, 1>{});
    case DType::f32:
      break;
  }
  return kInvalidValue;
}

}  // namespace
}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_groups_spmm_sm90(int dtype, int, const spfmt::cuda::Tiles* a,
                                           const void* values, const void* x, int64_t x_stride,
                                           int64_t n, const float* bias, void* y, int64_t y_stride,
                                           void* stream) {
  using namespace spfmt::cuda;
  if (a->count == 0 || n == 0) return 0;
  return with_narrow_math(dtype, [&](auto math) {
    using M = decltype(math);
    return with_matrices<typename M::T>(x, x_stride, n, y, y_stride,
                                        [&](const auto& from, const auto& to) {
                                          return launch<M>(*a, values, from, bias, to, stream);
                                        });
  });
}

extern "C" int spfmt_cuda_groups_conv_sm90(int dtype, int, const spfmt::cuda::Tiles* a,
                                           const void* values, const void* x,
                                           const spfmt::cuda::Maps* x_maps, const int32_t* stride,
                                           const float* bias, void* y,
                                           const spfmt::cuda::Maps* y_maps, void* stream) {
  using namespace spfmt::cuda;
  if (a->count == 0) return 0;
  return with_narrow_math(dtype, [&](auto math) {
    using M = decltype(math);
    return with_images<typename M::T>(x, *x_maps, stride, y, *y_maps,
                                      [&](const auto& from, const auto& to) {
                                        return launch<M>(*a, values, from, bias, to, stream);
                                      });
  });
}
