// Y = A X of lists with X in shared memory: for few samples, where a product is bound by reading
// values and indices once from device memory.
//
// A block holds all columns of up to 16 samples. A warp takes a row, or a team of eight lanes does
// where rows are short, and lanes take fours of its positions. The samples of a column lie side by
// side: a position costs one look-up of up to 16 bytes for 4 or 8 samples, and look-ups of random
// columns collide in the banks less than one by one. There is one block on each multiprocessor, so
// that X goes there once; the fours that its 32 warps wait for are 24 KiB (of 16-bit values) or
// 32 KiB, about what device memory needs to have under way to be busy. All this is counted for an
// H200, not measured. From 16 samples on, look-ups take as long as the weights.
//
// Where not all samples fit, several blocks share them and read the weights again, from L2; columns
// of which not one sample fits are read through the caches.
#include "lists.h"

namespace spfmt::cuda {
namespace {

constexpr int kWarps = 32;        // of a block, at most
constexpr int kMostSamples = 16;  // of a block
constexpr int kCached = 4;        // samples of a block that reads X through the caches
constexpr int kShortTeam = 8;     // lanes of a short row
constexpr int kShortRow = 64;     // positions of rows that are short, on average

// The columns of X in shared memory, in planes of vectors.
template <class T, int kSamples>
struct StagedColumns {
  static constexpr int kVector = kSamples < 16 / int{sizeof(T)} ? kSamples : 16 / int{sizeof(T)};
  static constexpr int kPlanes = kSamples / kVector;
  using V = Vector<T, kVector>;

  V* memory;
  int32_t cols;

  // n samples exist; zeros stand for the others.
  __device__ __forceinline__ void stage(const Strided<const T>& x, int64_t sample, int64_t n) {
    for (int32_t c = threadIdx.x; c < cols; c += blockDim.x) {
      SPFMT_UNROLL
      for (int k = 0; k < kPlanes; ++k) {
        V v;
        SPFMT_UNROLL
        for (int i = 0; i < kVector; ++i) {
          const int64_t s = sample + k * kVector + i;
          v.at[i] = s < n ? x.at(c, s) : T{};
        }
        memory[k * cols + c] = v;
      }
    }
  }

  __device__ __forceinline__ void add(int32_t c, float weight, float (&sum)[kSamples]) const {
    SPFMT_UNROLL
    for (int k = 0; k < kPlanes; ++k) {
      const V v = memory[k * cols + c];
      SPFMT_UNROLL
      for (int i = 0; i < kVector; ++i) sum[k * kVector + i] += weight * to_float(v.at[i]);
    }
  }
};

// The columns of X where they are.
template <class T, int kSamples>
struct CachedColumns {
  Strided<const T> x;
  int64_t sample, n;

  __device__ __forceinline__ void add(int32_t c, float weight, float (&sum)[kSamples]) const {
    SPFMT_UNROLL
    for (int i = 0; i < kSamples; ++i) {
      if (sample + i < n) sum[i] += weight * to_float(x.at(c, sample + i));
    }
  }
};

// One lane's part of a row: its fours, and what lies before and behind them.
template <int kTeam, class T, class Columns, int kSamples>
__device__ __forceinline__ void add_row(const Weights<T>& a, const Range& row,
                                        const Columns& columns, int lane, float (&sum)[kSamples]) {
  static_assert(kTeam >= 2 * kFour, "three lanes before the fours, three behind");
  const uint32_t edge = lane < kFour ? row.begin + lane : row.last + lane - kFour;
  if (lane < 2 * kFour && edge < (lane < kFour ? row.first : row.end)) {
    columns.add(a.col_indices[edge], a.value(edge), sum);
  }
  for_fours(a, row, row.first + kFour * lane, kFour * kTeam,
            [&](int32_t c, float weight) { columns.add(c, weight, sum); });
}

// The rows of this block, dealt warp by warp to all blocks: all have as many, of whatever team.
template <int kTeam, int kSamples, class T, class Columns>
__device__ __forceinline__ void multiply(const Weights<T>& a, const Columns& columns,
                                         const Operands<T>& o, int64_t sample) {
  constexpr int kTeams = 32 / kTeam;
  const int lane = threadIdx.x % 32;
  const int64_t warp = int64_t{threadIdx.x / 32} * gridDim.x + blockIdx.x;
  const int64_t warps = int64_t{blockDim.x / 32} * gridDim.x;
  const Kept<kTeam, kSamples> kept(lane);
  for (int64_t top = warp * kTeams; top < a.rows; top += warps * kTeams) {
    const int64_t row = top + lane / kTeam;
    float sum[kSamples] = {};
    if (row < a.rows) add_row<kTeam>(a, a.range(row), columns, lane % kTeam, sum);
    sum_lanes<kTeam, kSamples>(sum, lane);
    if (row >= a.rows || !kept.leader) continue;
    const float bias = o.bias ? o.bias[row] : 0.0f;
    SPFMT_UNROLL
    for (int i = 0; i < kept.kCount; ++i) {
      const int64_t s = sample + kept.first + i;
      if (s < o.n) o.y.at(row, s) = from_float<T>(sum[i] + bias);
    }
  }
}

template <int kSamples, class T, class Columns>
__device__ __forceinline__ void multiply(const Weights<T>& a, const Columns& columns,
                                         const Operands<T>& o, int64_t sample) {
  if (a.indptr[a.rows] <= kShortRow * a.rows) {
    multiply<kShortTeam, kSamples>(a, columns, o, sample);
  } else {
    multiply<32, kSamples>(a, columns, o, sample);
  }
}

template <class T, int kSamples>
__global__ void __launch_bounds__(32 * kWarps) staged(Weights<T> a, Operands<T> o) {
  DYNAMIC_SHARED(shared);
  using Columns = StagedColumns<T, kSamples>;
  const int64_t sample = int64_t{blockIdx.y} * kSamples;
  Columns columns{reinterpret_cast<typename Columns::V*>(shared), static_cast<int32_t>(a.cols)};
  columns.stage(o.x, sample, o.n);
  __syncthreads();
  multiply<kSamples>(a, columns, o, sample);
}

template <class T, int kSamples>
__global__ void __launch_bounds__(32 * kWarps) cached(Weights<T> a, Operands<T> o) {
  const int64_t sample = int64_t{blockIdx.y} * kSamples;
  multiply<kSamples>(a, CachedColumns<T, kSamples>{o.x, sample, o.n}, o, sample);
}

// Launches a kernel whose blocks take `samples` samples.
template <class T, class Kernel>
int launch(Kernel* kernel, int64_t samples, int64_t shared, const Weights<T>& a,
           const Operands<T>& o, int processors, void* stream) {
  const int64_t slices = ceil_div(o.n, samples);
  const int64_t room = processors > slices ? processors / slices : 1;
  const int64_t blocks = room < a.rows ? room : a.rows;
  const int64_t rows = ceil_div(a.rows, blocks);
  const int64_t warps = rows < kWarps ? rows : kWarps;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(slices));
  return LAUNCH(kernel, grid, static_cast<unsigned>(32 * warps), shared, stream, a, o);
}

}  // namespace

template <class T>
int lists_staged(const Weights<T>& a, const Operands<T>& o, const Device& device, void* stream) {
  if (staged_bytes<T>(a.cols, 1) > device.shared) {
    return o.n == 1 ? launch(&cached<T, 1>, 1, 0, a, o, device.processors, stream)
                    : launch(&cached<T, kCached>, kCached, 0, a, o, device.processors, stream);
  }
  int64_t samples = 1;
  while (samples < o.n && samples < kMostSamples) samples *= 2;
  while (staged_bytes<T>(a.cols, samples) > device.shared) samples /= 2;
  return with_constant<kMostSamples>(samples, [&](auto constant) {
    constexpr int kSamples = decltype(constant)::value;
    return launch(&staged<T, kSamples>, kSamples, staged_bytes<T>(a.cols, kSamples), a, o,
                  device.processors, stream);
  });
}
template int lists_staged(const Weights<float>&, const Operands<float>&, const Device&, void*);
template int lists_staged(const Weights<bf16>&, const Operands<bf16>&, const Device&, void*);
template int lists_staged(const Weights<half>&, const Operands<half>&, const Device&, void*);

}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_lists_small(int dtype, const spfmt::cuda::Lists* a, const void* values,
                                      const void* x, int64_t x_stride, int64_t n, const float* bias,
                                      void* y, int64_t y_stride, void* stream) {
  using namespace spfmt::cuda;
  if (a->rows == 0 || n == 0) return 0;
  return with_type(dtype, [&](auto zero, const Device& device) {
    using T = decltype(zero);
    const Operands<T> o{
        {static_cast<const T*>(x), 1, x_stride}, {static_cast<T*>(y), 1, y_stride}, n, bias};
    return lists_staged(Weights<T>(*a, values), o, device, stream);
  });
}
