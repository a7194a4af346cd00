// dX = A^T dY of groups.
//
// A block owns `chunk` rows of dX, which are columns of the matrix, for a strip of samples, and
// holds their sums in shared memory. It goes through the pieces of the tiles that name such
// columns: A is their values, transposed (the values of a column are neighbours), B the tile's rows
// of dY. Their product is added at the piece's columns. A warp has the same samples throughout, so
// every sum has one owner, who adds in the order of the tiles: no atomics, the same bits each time.
#include "groups.h"

namespace spfmt::cuda {
namespace {

constexpr int kStages = 3, kColumns = 64, kSamples = 64;
using W = Warps<1, 4, kColumns / 16, 1>;

// What is in shared memory at a time: some of a tile's rows, and the numbers of the columns.
template <class M, int depth, class Source>
struct Stage {
  using T = typename M::T;
  static constexpr int kDepth = depth, kAChunks = depth / M::kChunk;
  static constexpr int kBChunks = kSamples / M::kChunk;
  using Dy = Gather<Source, depth, kBChunks, W::kThreads>;
  static constexpr int kA = kColumns * kAChunks * 16, kB = kA + Dy::kBytes;
  static constexpr int kBytes = kB + kColumns * 4;
};

// The columns of a piece as places of the tile's list, found before they are needed.
template <class M, class S>
class Places {
 public:
  __device__ __forceinline__ void find(const int32_t* ascending, int count) {
    each([&](int i, int column, int) { place_[i] = column < count ? ascending[column] : -1; });
  }
  // Copies the values of rows `row` .. row + depth - 1.
  __device__ __forceinline__ void copy(unsigned char* to, const Values<typename M::T>& values,
                                       int row) const {
    each([&](int i, int column, int chunk) {
      values.copy(to + Rows<S::kAChunks>::at(column, chunk), place_[i], row + chunk * M::kChunk);
    });
  }

 private:
  static constexpr int kPieces = kColumns * S::kAChunks / W::kThreads;
  static_assert(kPieces * W::kThreads == kColumns * S::kAChunks);
  int32_t place_[kPieces];

  template <class Body>
  __device__ __forceinline__ static void each(const Body& body) {
    SPFMT_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      const int i = static_cast<int>(threadIdx.x) + piece * W::kThreads;
      body(piece, i / S::kAChunks, i % S::kAChunks);
    }
  }
};

// The sums of a block: of each column kSamples, eight of them side by side. Where eights lie in a
// row depends on the column, so that neighbours meet in other banks.
struct ColumnSums {
  float* sum;

  __device__ __forceinline__ float* at(int column, int sample) const {
    return sum + column * kSamples + ((sample / 8 ^ column) & 7) * 8 + sample % 8;
  }
};

__device__ __forceinline__ void add_piece(const ColumnSums& to, Sums<W>& sums,
                                          const int32_t* columns, int count, int first) {
  const int lane = threadIdx.x % 32;
  SPFMT_UNROLL
  for (int i = 0; i < 2 * W::kBands; ++i) {
    const int place = 8 * i + lane / 4;
    if (place >= count) continue;
    SPFMT_UNROLL
    for (int j = 0; j < 2 * W::kPairs; ++j) {
      const float* from = sums.of[i / 2][j / 2][j % 2] + i % 2 * 2;
      auto* at = reinterpret_cast<Pair<float>*>(
          to.at(columns[place] - first, W::column() + 8 * j + lane % 4 * 2));
      const Pair<float> before = *at;
      *at = {before.x + from[0], before.y + from[1]};
    }
  }
}

template <class Dx>
__device__ __forceinline__ void write_columns(const ColumnSums& from, const Dx& dx, int first,
                                              int count, int64_t sample) {
  const int warp = threadIdx.x / 32, pair = threadIdx.x % 32 * 2;
  const auto place = dx.place(sample + pair);
  for (int column = warp; column < count; column += W::kThreads / 32) {
    const float* sum = from.at(column, pair);
    dx.write(first + column, place, {sum[0], sum[1]});
  }
}

// Rows of a tile by columns of a piece.
struct Slice {
  int rows, columns;
  bool last;  // of the piece
};

// The pieces that a block goes through, each in `slices` of its rows.
//
// What a slice needs is read in three steps that do not wait for each other: its record, its rows
// and columns one slice later, the operands themselves yet one later.
template <class M, class S, class Dy, class T = typename M::T>
class Pieces {
 public:
  __device__ Pieces(const Tiles& a, const T* values, const Dy& dy, int64_t sample, int chunk)
      : a_(a),
        values_(values),
        dy_(dy),
        piece_(a.piece + a.piece_ptr[chunk]),
        slices_((a.most_rows + S::kDepth - 1) / S::kDepth),
        steps_((a.piece_ptr[chunk + 1] - a.piece_ptr[chunk]) * slices_) {
    gather_.go_to(dy, sample);
    read(0);
    find();
    read(1);
    look_at(0);
  }
  __device__ int steps() const { return steps_; }

  // Returns what is used at a step, and reads the same of the next one.
  __device__ __forceinline__ Slice take(int step) {
    const Slice slice = used_;
    look_at(step + 1);
    return slice;
  }
  // Copies what read() and find() have prepared, and prepares the next slice.
  __device__ __forceinline__ void fill(unsigned char* to, int step) {
    const Values<T> values(values_, found_.tile);
    places_.copy(to, values, found_row_);
    gather_.copy(to + S::kA, dy_);
    if (threadIdx.x < kColumns) {
      const int i = threadIdx.x;
      const bool any = i < found_.count;
      copy4(to + S::kB + 4 * i, a_.sorted_cols + (any ? found_.first + i : 0), any ? 4 : 0);
    }
    find();
    read(step + 2);
  }

 private:
  const Tiles& a_;
  const T* values_;
  const Dy& dy_;
  const Piece* piece_;
  int slices_, steps_;
  Piece next_, found_;  // as read, and as found
  int next_row_, found_row_;
  Slice used_{};
  Places<M, S> places_;
  typename S::Dy gather_;

  __device__ const Piece& piece(int step) const { return piece_[step / slices_]; }
  __device__ __forceinline__ void look_at(int step) {
    if (step >= steps_) return;
    const int slice = step % slices_;
    const Piece& p = piece(step);
    used_ = {p.tile.rows - slice * S::kDepth, p.count, slice == slices_ - 1};
  }
  __device__ __forceinline__ void read(int step) {
    if (step >= steps_) return;
    next_ = piece(step);
    next_row_ = step % slices_ * S::kDepth;
  }
  __device__ __forceinline__ void find() {
    if (steps_ == 0) return;
    found_ = next_;
    found_row_ = next_row_;
    places_.find(a_.ascending + found_.first, found_.count);
    const int32_t* rows = a_.row_perm + found_.tile.row + found_row_;
    gather_.find(dy_, Shifted{rows, found_.down, found_.across}, found_.tile.rows - found_row_);
  }
};

template <class M, class S, class Dy, class Dx, class T = typename M::T>
__global__ void __launch_bounds__(W::kThreads)
    spmm_t(Tiles a, const T* values, Dy dy, Dx dx, int strips) {
  DYNAMIC_SHARED(shared);
  const int chunk = blockIdx.x / strips, first = chunk * a.chunk;
  const int64_t sample = int64_t{blockIdx.x % strips} * kSamples;
  const int count = static_cast<int>(a.cols - first < a.chunk ? a.cols - first : a.chunk);
  const ColumnSums total{reinterpret_cast<float*>(shared + kStages * S::kBytes)};
  for (int i = threadIdx.x; i < count * kSamples; i += W::kThreads) total.sum[i] = 0.0f;

  Pieces<M, S, Dy> pieces(a, values, dy, sample, chunk);
  const auto fill = [&](int step) { pieces.fill(shared + step % kStages * S::kBytes, step); };
  Sums<W> sums;
  const auto use = [&](int step) {
    const unsigned char* stage = shared + step % kStages * S::kBytes;
    const Slice slice = pieces.take(step);
    for (int depth = 0; depth < S::kDepth && depth < slice.rows; depth += M::kDepth) {
      multiply<M>(sums, Operand<false, S::kAChunks>{stage},
                  Operand<true, S::kBChunks>{stage + S::kA}, depth, (slice.columns + 15) / 16);
    }
    if (!slice.last) return;
    add_piece(total, sums, reinterpret_cast<const int32_t*>(stage + S::kB), slice.columns, first);
    sums = {};
  };
  in_stages<kStages>(pieces.steps(), fill, use);
  __syncthreads();
  write_columns(total, dx, first, count, sample);
}

template <class M, int depth, class Dy, class Dx>
int launch(const Tiles& a, const void* values, const Dy& dy, const Dx& dx, void* stream) {
  using S = Stage<M, depth, Dy>;
  using T = typename M::T;
  const int64_t strips = (dx.samples + kSamples - 1) / kSamples;
  const int64_t blocks = (a.cols + a.chunk - 1) / a.chunk * strips;
  if (blocks > kMostBlocks) return kInvalidValue;
  const int64_t owned = a.cols < a.chunk ? a.cols : a.chunk;
  const auto kernel = &spmm_t<M, S, Dy, Dx>;
  return LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), W::kThreads,
                kStages * S::kBytes + owned * kSamples * sizeof(float), stream, a,
                static_cast<const T*>(values), dy, dx, static_cast<int>(strips));
}

template <class M, class Dy, class Dx>
int launch(const Tiles& a, const void* values, const Dy& dy, const Dx& dx, void* stream) {
  if (a.most_rows == 16) return launch<M, 16>(a, values, dy, dx, stream);
  return launch<M, 8 * M::kChunk>(a, values, dy, dx, stream);
}

// The pixels of dX that are (down, across) modulo the strides: dY has a pixel for each of them at
// some cells of the kernel, the same ones for all.
template <class M>
int launch_phase(Tiles a, const void* values, const void* dy, const Maps& dy_maps,
                 const int32_t* stride, int down, int across, void* dx, Maps maps, void* stream) {
  using T = typename M::T;
  const int height = (maps.height - down + stride[0] - 1) / stride[0];
  const int width = (maps.width - across + stride[1] - 1) / stride[1];
  Grid grid = grid_of<T>(height, width, dy, dy_maps, dx, maps);
  if (grid.samples() == 0) return 0;
  if (!is_countable(dy_maps, grid, 1, 1) || !is_countable(maps, grid, 1, 1)) return kInvalidValue;
  const int64_t first = (int64_t{down} * maps.row + int64_t{across} * maps.column) * maps.stride;
  maps.row *= stride[0];
  maps.column *= stride[1];
  a.piece_ptr += (stride[1] * down + across) * ((a.cols + a.chunk - 1) / a.chunk);
  const Images<const T> from(static_cast<const T*>(dy), dy_maps, grid, 1, 1);
  const Images<T> to(static_cast<T*>(dx) + first, maps, grid, 1, 1);
  return launch<M>(a, values, from, to, stream);
}

}  // namespace
}  // namespace spfmt::cuda

extern "C" int spfmt_cuda_groups_spmm_t(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                        const void* values, const void* dy, int64_t dy_stride,
                                        int64_t n, void* dx, int64_t dx_stride, void* stream) {
  using namespace spfmt::cuda;
  if (a->cols == 0 || n == 0) return 0;
  return with_math(dtype, precision, [&](auto math) {
    using M = decltype(math);
    using T = typename M::T;
    const Matrix<const T> from(static_cast<const T*>(dy), dy_stride, n, M::kChunk);
    const Matrix<T> to(static_cast<T*>(dx), dx_stride, n, 2);
    return launch<M>(*a, values, from, to, stream);
  });
}

extern "C" int spfmt_cuda_groups_conv_t(int dtype, int precision, const spfmt::cuda::Tiles* a,
                                        const void* values, const void* dy,
                                        const spfmt::cuda::Maps* dy_maps, const int32_t* stride,
                                        void* dx, const spfmt::cuda::Maps* dx_maps, void* stream) {
  using namespace spfmt::cuda;
  if (a->cols == 0) return 0;
  return with_math(dtype, precision, [&](auto math) {
    // Where the stride is wider than the maps, few of its remainders are pixels.
    const int down = stride[0] < dx_maps->height ? stride[0] : dx_maps->height;
    const int across = stride[1] < dx_maps->width ? stride[1] : dx_maps->width;
    for (int i = 0; i < down; ++i) {
      for (int j = 0; j < across; ++j) {
        const int error = launch_phase<decltype(math)>(*a, values, dy, *dy_maps, stride, i, j, dx,
                                                       *dx_maps, stream);
        if (error) return error;
      }
    }
    return 0;
  });
}
