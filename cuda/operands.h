// Where operands of groups come from, and how they reach shared memory.
//
// Matrices and images offer kernels the same: rows that a list names, and places where samples lie.
// Of a matrix a row is a row and a place a sample. Of images a row is what a tap of a convolution
// sees, a channel moved by some pixels, and a place one sample of a pixel of the result; where the
// two meet beyond the maps there are zeros, so nobody needs images that are padded or unfolded.
#pragma once

#include <type_traits>

#include "api.h"
#include "device.h"

namespace spfmt::cuda {

// ---------------------------------------------------------------------- matrices in shared memory

// Rows of `chunks` times sixteen bytes. The chunks of a row change places so that neither one chunk
// of eight rows in a line (ldmatrix) nor two side by side of four rows (fragments of tf32) meet in
// a bank.
template <int chunks>
struct Rows {
  // The byte where a chunk of a row starts.
  __host__ __device__ __forceinline__ static constexpr int at(int row, int chunk) {
    constexpr int kPlaces = chunks < 8 ? chunks : 8;
    const int line = row / (8 / kPlaces);
    const int turn = (line * 2 & (kPlaces - 1)) | (line / (kPlaces / 2) & 1);
    return (row * chunks + (chunk ^ turn)) * 16;
  }
};

// Whether `rows` rows of so many chunks side by side lie in different banks, eight chunks in all.
template <int chunks>
constexpr bool apart(int rows, int row, int chunk) {
  int met = 0;
  for (int i = 0; i < 8; ++i) {
    met |= 1 << Rows<chunks>::at(row + i % rows, chunk + i / rows) / 16 % 8;
  }
  return met == 255;
}
static_assert(apart<2>(8, 8, 1) && apart<4>(8, 8, 3) && apart<8>(8, 8, 5) && apart<32>(8, 8, 9));
static_assert(apart<4>(4, 4, 2) && apart<8>(4, 4, 6) && apart<16>(4, 4, 2) && apart<32>(4, 4, 8));

// The first `count` elements of a chunk, which may be negative, and zeros.
template <bool aligned, class T>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const T* from, int64_t count) {
  constexpr int kChunk = 16 / sizeof(T);
  const int valid = count < 0 ? 0 : count < kChunk ? static_cast<int>(count) : kChunk;
  if constexpr (aligned) {
    copy16(to, from, valid * static_cast<int>(sizeof(T)));
  } else {
    SPFMT_UNROLL
    for (int i = 0; i < kChunk; ++i) reinterpret_cast<T*>(to)[i] = i < valid ? from[i] : T{};
  }
}

// Writes the first `count` of some numbers side by side, all at once where they lie so.
template <int n, class T>
__device__ __forceinline__ void write(T* to, bool aligned, int64_t count,
                                      const float (&number)[n]) {
  Vector<T, n> rounded;
  SPFMT_UNROLL
  for (int i = 0; i < n; ++i) rounded.at[i] = from_float<T>(number[i]);
  if (aligned && count >= n) {
    store_vector(to, rounded);
    return;
  }
  SPFMT_UNROLL
  for (int i = 0; i < n; ++i) {
    if (i < count) to[i] = rounded.at[i];
  }
}

// --------------------------------------------------------------------------------------- matrices

// Rows of a list that all look so many pixels below and to the right.
struct Shifted {
  const int32_t* row;
  int down, across;
};

// Features by samples in the caller's memory.
template <class T>
class Matrix {
 public:
  using Element = T;
  using Row = int32_t;
  using Place = int64_t;

  Matrix(T* data, int64_t stride, int64_t n, int vector)
      : samples(n),
        data_(data),
        stride_(stride),
        aligned_(stride % vector == 0 &&
                 reinterpret_cast<uintptr_t>(data) % (vector * sizeof(T)) == 0) {}

  int64_t samples;

  // What the entries of a structure's lists name.
  __device__ __forceinline__ static const int32_t* list(const Tiles& a) { return a.col_indices; }
  __device__ __forceinline__ static Row none() { return -1; }
  __device__ __forceinline__ Row row(const int32_t* list, int i) const { return list[i]; }
  __device__ __forceinline__ Row row(const Shifted& list, int i) const { return list.row[i]; }
  __device__ __forceinline__ Place place(int64_t sample) const { return sample; }
  // Whether every `vector` samples lie together, from the first of a feature on.
  __device__ __forceinline__ bool aligned() const { return aligned_; }

  template <bool aligned>
  __device__ __forceinline__ void copy(unsigned char* to, Row row, Place place) const {
    const bool any = row >= 0 && place < samples;
    const T* from = any ? data_ + row * stride_ + place : data_;
    copy_chunk<aligned>(to, from, any ? samples - place : 0);
  }
  // Writes samples of a feature from a place on, those that exist.
  template <int n>
  __device__ __forceinline__ void write(int64_t feature, Place place,
                                        const float (&number)[n]) const {
    cuda::write(data_ + feature * stride_ + place, aligned_, samples - place, number);
  }

 private:
  T* data_;
  int64_t stride_;
  bool aligned_;
};

// ----------------------------------------------------------------------------------------- images

// The pixels whose samples a product goes through, one after the other: those of a result. All
// samples of a pixel lie together; where sixteen bytes of them are copied at once, the last ones
// are nobody's.
struct Grid {
  int height, width;
  int per_pixel;
  bool aligned;

  int64_t samples() const { return int64_t{height} * width * per_pixel; }
};

template <class T>
Grid grid_of(int height, int width, const void* x, const Maps& x_maps, const void* y,
             const Maps& y_maps) {
  constexpr int kChunk = 16 / sizeof(T);
  const bool aligned = x_maps.stride % kChunk == 0 && y_maps.stride % kChunk == 0 &&
                       reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(y) % 16 == 0;
  const int batch = y_maps.batch;
  return {height, width, aligned ? (batch + kChunk - 1) / kChunk * kChunk : batch, aligned};
}

// Whether kernels, which count elements with 32 bits and pixels with 16, get to the end of some
// maps in steps of so many pixels.
inline bool is_countable(const Maps& maps, const Grid& grid, int step_down, int step_across) {
  constexpr int64_t kMost = INT32_MAX - 8191;
  const auto fits = [](int64_t pixels) { return pixels <= INT16_MAX; };
  const int64_t rows = int64_t{maps.channels} * maps.height * maps.width;
  return fits(maps.height) && fits(maps.width) && rows <= kMost && rows * maps.stride <= kMost &&
         fits((grid.height - 1) * int64_t{step_down}) &&
         fits((grid.width - 1) * int64_t{step_across}) && grid.samples() <= kMost;
}

template <class T>
class Images {
 public:
  using Element = T;
  struct Row {
    int32_t at;  // elements from where a place lies
    int16_t down, across;
  };
  struct Place {
    int32_t at;
    int down, across, sample;
  };

  // Of every pixel of the grid, the one `step` times as far down and across.
  Images(T* data, const Maps& maps, const Grid& grid, int step_down, int step_across)
      : samples(grid.samples()),
        data_(data),
        maps_(maps),
        grid_(grid),
        step_down_(step_down),
        step_across_(step_across) {}

  int64_t samples;

  __device__ __forceinline__ static const Tap* list(const Tiles& a) { return a.tap; }
  __device__ __forceinline__ static Row none() { return {0, INT16_MIN, 0}; }
  __device__ __forceinline__ Row row(const Tap* list, int i) const {
    return row_of(list[i].channel, list[i].down, list[i].across);
  }
  __device__ __forceinline__ Row row(const Shifted& list, int i) const {
    return row_of(list.row[i], list.down, list.across);
  }
  __device__ __forceinline__ Place place(int64_t sample) const {
    const int s = static_cast<int>(sample), pixel = s / grid_.per_pixel;
    const int down = pixel / grid_.width, across = pixel % grid_.width;
    if (sample >= samples) return {0, kBeyond, 0, 0};
    return at({0, down * step_down_, across * step_across_, s % grid_.per_pixel});
  }
  __device__ __forceinline__ bool aligned() const { return grid_.aligned; }

  template <bool aligned>
  __device__ __forceinline__ void copy(unsigned char* to, const Row& row, Place place) const {
    if constexpr (aligned) {
      const bool any = meet(row, place);
      const T* from = any ? data_ + sum(row.at, place.at) : data_;
      copy_chunk<true>(to, from, any ? maps_.batch - place.sample : 0);
    } else {
      SPFMT_ROLLED
      for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i, place = next(place)) {
        const bool any = meet(row, place);
        reinterpret_cast<Number*>(to)[i] = any ? data_[sum(row.at, place.at)] : Number{};
      }
    }
  }
  template <int n>
  __device__ __forceinline__ void write(int32_t channel, Place place,
                                        const float (&number)[n]) const {
    T* to = data_ + row_of(channel, 0, 0).at;
    if (grid_.aligned) {
      const int count = place.down == kBeyond ? 0 : maps_.batch - place.sample;
      cuda::write(to + place.at, true, count, number);
      return;
    }
    SPFMT_UNROLL
    for (int i = 0; i < n; ++i, place = next(place)) {
      if (place.down != kBeyond) to[place.at] = from_float<Number>(number[i]);
    }
  }

 private:
  using Number = std::remove_const_t<T>;
  static constexpr int kBeyond = 1 << 20;  // beyond all maps
  T* data_;
  Maps maps_;
  Grid grid_;
  int step_down_, step_across_;

  // Elements from the first one on. Modulo 2^32: a pixel may lie beyond the maps until a tap looks
  // back, and only their sum has to fit.
  __device__ __forceinline__ int32_t offset(int channel, int down, int across) const {
    const auto times = [](int a, int b) {
      return static_cast<uint32_t>(a) * static_cast<uint32_t>(b);
    };
    return static_cast<int32_t>(
        (times(channel, maps_.channel) + times(down, maps_.row) + times(across, maps_.column)) *
        static_cast<uint32_t>(maps_.stride));
  }
  __device__ __forceinline__ Row row_of(int channel, int down, int across) const {
    return {offset(channel, down, across), static_cast<int16_t>(down),
            static_cast<int16_t>(across)};
  }
  __device__ __forceinline__ Place at(Place p) const {
    p.at = sum(offset(0, p.down, p.across), p.sample);
    return p;
  }
  __device__ __forceinline__ static int32_t sum(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
  // Whether a tap sees a pixel of the maps.
  __device__ __forceinline__ bool meet(const Row& row, const Place& place) const {
    return static_cast<unsigned>(place.down + row.down) < static_cast<unsigned>(maps_.height) &&
           static_cast<unsigned>(place.across + row.across) < static_cast<unsigned>(maps_.width);
  }
  __device__ __forceinline__ Place next(Place p) const {
    p.at = sum(p.at, 1);
    if (++p.sample < grid_.per_pixel || p.down == kBeyond) return p;
    p.sample = 0;
    p.across += step_across_;
    if (p.across == grid_.width * step_across_) {
      p.across = 0;
      p.down += step_down_;
      if (p.down == grid_.height * step_down_) return {0, kBeyond, 0, 0};
    }
    return at(p);
  }
};

// --------------------------------------------------------------------------------- both, for calls

// body(x, y) with the matrices of a product.
template <class T, class Body>
int with_matrices(const void* x, int64_t x_stride, int64_t n, void* y, int64_t y_stride,
                  const Body& body) {
  const Matrix<const T> from(static_cast<const T*>(x), x_stride, n, 16 / sizeof(T));
  return body(from, Matrix<T>(static_cast<T*>(y), y_stride, n, 4));
}
// The same with the images of a convolution, unless there are none.
template <class T, class Body>
int with_images(const void* x, const Maps& x_maps, const int32_t* stride, void* y,
                const Maps& y_maps, const Body& body) {
  const Grid grid = grid_of<T>(y_maps.height, y_maps.width, x, x_maps, y, y_maps);
  if (grid.samples() == 0) return 0;
  if (!is_countable(x_maps, grid, stride[0], stride[1]) || !is_countable(y_maps, grid, 1, 1)) {
    return kInvalidValue;
  }
  const Images<const T> from(static_cast<const T*>(x), x_maps, grid, stride[0], stride[1]);
  return body(from, Images<T>(static_cast<T*>(y), y_maps, grid, 1, 1));
}

// ------------------------------------------------------------------------------- to shared memory

// Gathers `rows` rows of a source, `chunks` of sixteen bytes of each. Rows are found before they
// are needed, so that nothing waits for them.
template <class Source, int rows, int chunks, int threads, class Layout = Rows<chunks>>
class Gather {
 public:
  static constexpr int kBytes = rows * chunks * 16;

  // Takes entries 0 .. count - 1 of a list, and zeros from there on.
  template <class List>
  __device__ __forceinline__ void find(const Source& x, const List& list, int count) {
    each([&](int piece, int row, int) {
      row_[piece] = row < count ? x.row(list, row) : Source::none();
    });
  }
  // Goes to the samples from `sample` on.
  __device__ __forceinline__ void go_to(const Source& x, int64_t sample) {
    static_assert(threads % chunks == 0);  // a thread has one chunk of every row it copies
    place_ = x.place(sample + static_cast<int>(threadIdx.x) % chunks * kChunk);
  }
  // Copies them to their places from `to` on.
  __device__ __forceinline__ void copy(unsigned char* to, const Source& x) const {
    x.aligned() ? copy_as<true>(to, x) : copy_as<false>(to, x);
  }

 private:
  static constexpr int kChunk = 16 / sizeof(typename Source::Element);
  static constexpr int kAll = rows * chunks, kPieces = (kAll + threads - 1) / threads;
  typename Source::Row row_[kPieces];
  typename Source::Place place_;

  template <bool aligned>
  __device__ __forceinline__ void copy_as(unsigned char* to, const Source& x) const {
    each([&](int piece, int row, int chunk) {
      x.template copy<aligned>(to + Layout::at(row, chunk), row_[piece], place_);
    });
  }
  template <class Body>
  __device__ __forceinline__ static void each(const Body& body) {
    SPFMT_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      const int i = static_cast<int>(threadIdx.x) + piece * threads;
      if (kAll % threads == 0 || i < kAll) body(piece, i / chunks, i % chunks);
    }
  }
};

// The values of a tile.
template <class T>
class Values {
 public:
  __device__ Values(const T* values, const Tile& tile)
      : data_(values + tile.value),
        rows_(tile.rows),
        cols_(tile.cols),
        aligned_(reinterpret_cast<uintptr_t>(data_) % 16 == 0) {}

  // Copies a chunk of rows from `row` on, of the column at a place of the list; zeros if that is
  // negative or beyond the list.
  __device__ __forceinline__ void copy(unsigned char* to, int place, int row) const {
    const int band = row / 16, left = rows_ - 16 * band, height = left < 16 ? left : 16;
    const bool any = height > row % 16 && place >= 0 && place < cols_;
    const int64_t at = int64_t{16} * cols_ * band + int64_t{place} * height + row % 16;
    const T* from = any ? data_ + at : data_;
    const int count = any ? height - row % 16 : 0;
    if (aligned_ && height * sizeof(T) % 16 == 0) {
      copy_chunk<true>(to, from, count);
    } else {
      copy_chunk<false>(to, from, count);
    }
  }

 private:
  const T* data_;
  int rows_, cols_;
  bool aligned_;
};

}  // namespace spfmt::cuda
