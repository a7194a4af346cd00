// Values of lists: at each position the product of a row of dY and a row of X, over all samples.
//
// A warp takes eight positions of a row at a time, or each of its teams of eight lanes does where
// samples are few; lanes are samples, up to four side by side. The row of dY is read once for eight
// rows of X, which come from L2 and bound the product: n numbers for every position. Eight products
// are summed over the lanes together, which costs about one shuffle for each. No sum depends on who
// does what: rows that are too few for the device are shared by several warps.
#include "lists.h"

namespace spfmt::cuda {
namespace {

constexpr int kWarps = 8;       // of a block
constexpr int kBatch = 8;       // positions of a team
constexpr int kShortTeam = 8;   // lanes, where samples are few
constexpr int kBusyWarps = 16;  // on each multiprocessor hide the latency of L2
constexpr int64_t kMostParts = 64;

template <class T>
struct Products {
  int64_t rows;
  const int32_t *indptr, *col_indices;
  Strided<const T> dy, x;
  int64_t n;
  float* values;
};

// This lane's samples of a row of dY and of kBatch rows of X.
template <int kTeam, int kVector, class T>
__device__ __forceinline__ void add_products(const T* dy, const T* const (&x)[kBatch], int lane,
                                             int64_t n, float (&sum)[kBatch]) {
  const auto add = [&](int64_t s, int64_t left) {
    const auto d = load_samples<kVector>(dy + s, left);
    SPFMT_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const auto v = load_samples<kVector>(x[i] + s, left);
      SPFMT_UNROLL
      for (int k = 0; k < kVector; ++k) sum[i] += to_float(d.at[k]) * to_float(v.at[k]);
    }
  };
  int64_t s = int64_t{lane} * kVector;
  for (; s + kVector <= n; s += kTeam * kVector) add(s, kVector);
  if (s < n) add(s, n - s);
}

// Grid: rows by the parts that a row is cut into.
template <class T, int kVector, int kTeam>
__global__ void __launch_bounds__(32 * kWarps) sddmm(Products<T> o) {
  constexpr int kStep = kBatch * (32 / kTeam);  // positions of a warp
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= o.rows) return;
  const int lane = threadIdx.x % 32;
  const Kept<kTeam, kBatch> kept(lane);
  const uint32_t end = o.indptr[row + 1];
  for (uint32_t p = o.indptr[row] + kStep * blockIdx.y; p < end; p += kStep * gridDim.y) {
    const uint32_t mine = p + kBatch * (lane / kTeam);
    const T* x[kBatch];
    SPFMT_UNROLL
    for (int i = 0; i < kBatch; ++i) {  // behind the end, the last position stands in
      x[i] = o.x.row(o.col_indices[mine + i < end ? mine + i : end - 1]);
    }
    float sum[kBatch] = {};
    add_products<kTeam, kVector>(o.dy.row(row), x, lane % kTeam, o.n, sum);
    sum_lanes<kTeam, kBatch>(sum, lane);
    if (kept.leader && mine + kept.first < end) o.values[mine + kept.first] = sum[0];
  }
}

template <class T>
int launch(const Products<T>& o, int processors, void* stream) {
  const int64_t spare = int64_t{kBusyWarps} * processors / o.rows;
  const int64_t parts = spare < 1 ? 1 : spare < kMostParts ? spare : kMostParts;
  const dim3 grid(static_cast<unsigned>(ceil_div(o.rows, kWarps)), static_cast<unsigned>(parts));
  const int of_dy = widest_vector(o.dy), of_x = widest_vector(o.x);
  return with_constant<kWidest>(of_dy < of_x ? of_dy : of_x, [&](auto constant) {
    constexpr int kVector = decltype(constant)::value;
    auto* kernel =
        o.n <= kShortTeam * kVector ? &sddmm<T, kVector, kShortTeam> : &sddmm<T, kVector, 32>;
    return LAUNCH(kernel, grid, 32 * kWarps, 0, stream, o);
  });
}

}  // namespace
}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_lists_sddmm(int dtype, const spfmt::cuda::Lists* a, const void* dy,
                                      int64_t dy_stride, const void* x, int64_t x_stride, int64_t n,
                                      float* values, void* stream) {
  using namespace spfmt::cuda;
  if (a->rows == 0) return 0;
  return with_type(dtype, [&](auto zero, const Device& device) {
    using T = decltype(zero);
    const Strided<const T> left{static_cast<const T*>(dy), dy_stride, 1};
    const Strided<const T> right{static_cast<const T*>(x), x_stride, 1};
    return launch(Products<T>{a->rows, a->indptr, a->col_indices, left, right, n, values},
                  device.processors, stream);
  });
}
