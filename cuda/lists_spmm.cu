// Y = A X of lists for many samples, in one of two ways.
//
// Streamed: lanes are samples, up to four side by side each, and a row has as many lanes as it has
// use for, up to a warp. Positions are the same for all lanes of a row, so that a load of four
// serves all of them; no lane waits for another. Rows of X come from L2, which bounds the product:
// n numbers for every position.
//
// Staged (lists_small.cu): where eight samples of all columns fit in shared memory, a position
// costs eight or sixteen look-ups there, at up to five times the rate of L2, and from L2 its value
// and index, which is a quarter of those numbers or less. Values that are looked up through
// `source` would cost a sector of L2 for each slice of samples: those are streamed. The rates are
// an H200's, and which way is the quicker one is counted from them, not measured.
#include "lists.h"

namespace spfmt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLeastStaged = 8;  // samples of a slice
constexpr int kLeastRows = 32;   // fewer are not worth the staging
constexpr int64_t kMostGrid = 65535;

// The samples from s on, of one row; `whole`: as many as a vector has exist.
template <bool whole, int kVector, class T>
__device__ __forceinline__ void multiply(const Weights<T>& a, const Operands<T>& o, int64_t row,
                                         int64_t s) {
  const int64_t left = whole ? kVector : o.n - s;
  const Range range = a.range(row);
  float sum[kVector] = {};
  const auto add = [&](int32_t c, float weight) {
    const auto v = load_samples<kVector>(o.x.row(c) + s, left);
    SPFMT_UNROLL
    for (int i = 0; i < kVector; ++i) sum[i] += weight * to_float(v.at[i]);
  };
  for (uint32_t p = range.begin; p < range.first; ++p) add(a.col_indices[p], a.value(p));
  for_fours(a, range, range.first, kFour, add);
  for (uint32_t p = range.last; p < range.end; ++p) add(a.col_indices[p], a.value(p));
  const float bias = o.bias ? o.bias[row] : 0.0f;
  Vector<T, kVector> out;
  SPFMT_UNROLL
  for (int i = 0; i < kVector; ++i) out.at[i] = from_float<T>(sum[i] + bias);
  store_samples(o.y.row(row) + s, out, left);
}

// `lanes` of a row, a power of two.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) streamed(Weights<T> a, Operands<T> o, int lanes) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % lanes;
  const int64_t step = int64_t{gridDim.y} * lanes * kVector;
  for (int64_t s = (int64_t{blockIdx.y} * lanes + lane) * kVector; s < o.n; s += step) {
    if (s + kVector <= o.n) {
      multiply<true, kVector>(a, o, row, s);
    } else {
      multiply<false, kVector>(a, o, row, s);
    }
  }
}

template <class T>
int launch_streamed(const Weights<T>& a, const Operands<T>& o, void* stream) {
  const int of_x = widest_vector(o.x), of_y = widest_vector(o.y);
  int vector = of_x < of_y ? of_x : of_y;
  while (vector > 1 && 32 * (vector / 2) >= o.n) vector /= 2;  // all lanes have something to do
  int lanes = 1;
  while (lanes < 32 && lanes * vector < o.n) lanes *= 2;
  const int64_t slices = ceil_div(o.n, lanes * vector);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kThreads / lanes)),
                  static_cast<unsigned>(slices < kMostGrid ? slices : kMostGrid));
  return with_constant<kWidest>(vector, [&](auto constant) {
    auto* kernel = &streamed<T, decltype(constant)::value>;
    return LAUNCH(kernel, grid, kThreads, 0, stream, a, o, lanes);
  });
}

template <class T>
bool worth_staging(const Weights<T>& a, const Operands<T>& o, const Device& device) {
  return !a.source && o.n >= kLeastStaged && a.rows >= kLeastRows &&
         staged_bytes<T>(a.cols, kLeastStaged) <= device.shared &&
         ceil_div(o.n, kLeastStaged) <= kMostGrid;
}

}  // namespace
}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_lists_spmm(int dtype, const spfmt::cuda::Lists* a, const void* values,
                                     const void* x, int64_t x_stride, int64_t n, const float* bias,
                                     void* y, int64_t y_stride, void* stream) {
  using namespace spfmt::cuda;
  if (a->rows == 0 || n == 0) return 0;
  return with_type(dtype, [&](auto zero, const Device& device) {
    using T = decltype(zero);
    const Weights<T> weights(*a, values);
    const Operands<T> o{
        {static_cast<const T*>(x), x_stride, 1}, {static_cast<T*>(y), y_stride, 1}, n, bias};
    return worth_staging(weights, o, device) ? lists_staged(weights, o, device, stream)
                                             : launch_streamed(weights, o, stream);
  });
}
