// Transposes a matrix and rounds it to another dtype on the way.
//
// A block turns 64 x 64 numbers in shared memory. A lane brings two neighbours and takes two that
// were below each other, so that a warp reads and writes 64 numbers in a line. Even places come
// before odd ones in shared memory, in both directions: either access meets 32 banks.
#include "api.h"
#include "device.h"

namespace spfmt::cuda {
namespace {

constexpr int kSide = 64, kWarps = 8, kThreads = 32 * kWarps, kPitch = kSide + 1;

template <class T>
struct Pairs {
  T* data;
  int64_t stride, rows, cols;
  bool aligned;  // every even place of a row is that of a Pair

  Pairs(T* data, int64_t stride, int64_t rows, int64_t cols)
      : data(data),
        stride(stride),
        rows(rows),
        cols(cols),
        aligned(stride % 2 == 0 && reinterpret_cast<uintptr_t>(data) % (2 * sizeof(T)) == 0) {}
};

template <class T>
__device__ __forceinline__ Pair<float> read(const Pairs<const T>& m, int64_t row, int64_t col) {
  Pair<float> got{0.0f, 0.0f};
  if (row >= m.rows || col >= m.cols) return got;
  const T* from = m.data + row * m.stride + col;
  if (m.aligned && col + 1 < m.cols) {
    const auto both = *reinterpret_cast<const Pair<T>*>(from);
    return {to_float(both.x), to_float(both.y)};
  }
  got.x = to_float(from[0]);
  if (col + 1 < m.cols) got.y = to_float(from[1]);
  return got;
}

template <class T>
__device__ __forceinline__ void write(const Pairs<T>& m, int64_t row, int64_t col,
                                      Pair<float> both) {
  if (row >= m.rows || col >= m.cols) return;
  T* to = m.data + row * m.stride + col;
  const Pair<T> rounded{from_float<T>(both.x), from_float<T>(both.y)};
  if (m.aligned && col + 1 < m.cols) {
    *reinterpret_cast<Pair<T>*>(to) = rounded;
    return;
  }
  to[0] = rounded.x;
  if (col + 1 < m.cols) to[1] = rounded.y;
}

// Where a row or a column lies in shared memory.
__device__ __forceinline__ int slot(int i) { return i / 2 + i % 2 * (kSide / 2); }

template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    transpose(Pairs<const From> in, Pairs<To> out, int64_t tiles_across) {
  DYNAMIC_SHARED(shared);
  float* turned = reinterpret_cast<float*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x / tiles_across * kSide, col = blockIdx.x % tiles_across * kSide;
  for (int i = warp; i < kSide; i += kWarps) {
    const Pair<float> both = read(in, row + i, col + 2 * lane);
    turned[slot(i) * kPitch + slot(2 * lane)] = both.x;
    turned[slot(i) * kPitch + slot(2 * lane + 1)] = both.y;
  }
  __syncthreads();
  for (int i = warp; i < kSide; i += kWarps) {
    write(
        out, col + i, row + 2 * lane,
        {turned[slot(2 * lane) * kPitch + slot(i)], turned[slot(2 * lane + 1) * kPitch + slot(i)]});
  }
}

template <class From, class To>
int launch(const void* in, int64_t in_stride, int64_t rows, int64_t cols, void* out,
           int64_t out_stride, void* stream) {
  const int64_t down = (rows + kSide - 1) / kSide, across = (cols + kSide - 1) / kSide;
  const Pairs<const From> from(static_cast<const From*>(in), in_stride, rows, cols);
  const Pairs<To> to(static_cast<To*>(out), out_stride, cols, rows);
  if (down * across > kMostBlocks) return kInvalidValue;
  const auto kernel = &transpose<From, To>;
  return LAUNCH(kernel, dim3(static_cast<unsigned>(down * across)), kThreads,
                kSide * kPitch * sizeof(float), stream, from, to, across);
}

// body(a number of that dtype)
template <class Body>
int with_dtype(int dtype, const Body& body) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(half{});
  }
  return kInvalidValue;
}

}  // namespace
}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_transpose(int from, int to, const void* in, int64_t in_stride,
                                    int64_t rows, int64_t cols, void* out, int64_t out_stride,
                                    void* stream) {
  using namespace spfmt::cuda;
  if (rows == 0 || cols == 0) return 0;
  return with_dtype(from, [&](auto read) {
    return with_dtype(to, [&](auto written) {
      return launch<decltype(read), decltype(written)>(in, in_stride, rows, cols, out, out_stride,
                                                       stream);
    });
  });
}
