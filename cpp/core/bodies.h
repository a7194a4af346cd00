// The serial pieces that an ISA level provides. Drivers split work into tiles and call these; the
// functions hold no threads, no allocation and no checks.
#pragma once

#include <cstdint>

#include "../lists/row_octets.h"
#include "../lists/row_slices.h"
#include "../simd/unroll.h"
#include "spfmt.h"

namespace spfmt {

// Samples per panel: four 512-bit registers of float32.
constexpr int kPanel = 64;
// Samples that the gradient of row groups takes at a time, in one wide panel: sixteen rows of dY
// then are half of a first-level cache.
constexpr int kSampleStrip = 256;

// A panel holds up to 64 samples of all features, feature after feature:
//
//   data[f * width + b],   width = samples rounded up to a multiple of 16, zeros behind the last
//
// A small panel holds up to eight samples; it is as wide as there are samples, with room for eight
// numbers behind the last feature, or kOctet wide.
template <class T>
struct Panel {
  T* data;
  int64_t features;
  int width;    // 1 .. 8, 16, 32, 48 or 64; for the gradient of row groups up to kSampleStrip
  int samples;  // 1 .. width
};

// Lists cut into chunks of kRowChunk rows and tiles of `width` columns, so that the part of X
// that a pass touches stays in cache. Inside a (chunk, tile) the pieces of rows are sorted by
// length, longest first: pieces of one length follow each other, so their loops end where the
// branch predictor expects, and two of them run side by side. Columns, and a private copy of the
// values, are stored in the order in which they are visited: both stream.
//
//   chunk q, tile t: pieces piece_ptr[q * tiles + t] .. piece_ptr[q * tiles + t + 1], one per row
//           with nonzeros there; in tile 0 one for every row of the chunk, so that each starts once
//   a piece: `count` nonzeros of row `row` of the chunk, from position base[q] + start
//   col[visit_ptr[q * tiles + t] + k]: the k-th column visited there, counted from the tile's first
struct RowPiece {
  int32_t start;
  uint16_t row;
  uint16_t count;
};
struct RowTiles {
  int64_t tiles, width;
  const int64_t* base;
  const int64_t* piece_ptr;
  const int64_t* visit_ptr;
  const RowPiece* piece;
  const uint16_t* col;
};
constexpr int64_t kRowChunk = 256;

// Groups seen from the columns: column c occurs at entries col_ptr[c] .. col_ptr[c + 1]; entry e
// is a column of tile entry_tile[e] whose values start at entry_value[e].
struct ColumnEntries {
  const int64_t* col_ptr;
  const int32_t* entry_tile;
  const int64_t* entry_value;
};

// Features by samples with arbitrary strides, at most one panel wide.
template <class T>
struct Strided {
  T* data;
  int64_t feature_stride, sample_stride;
};

// Samples of all features, as in a Panel but with any stride between features: the caller's memory.
template <class T>
struct SampleRows {
  const T* data;
  int64_t stride;
};

// body(first, n) over `count` tokens or registers in as few parts of at most `most` as there can
// be, all about equal: a part of one or two would load every weight for little.
template <class Body>
inline void for_parts(int64_t count, int64_t most, const Body& body) {
  const int64_t parts = (count + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = count * i / parts, end = count * (i + 1) / parts;
    body(first, static_cast<int>(end - first));
  }
}

template <class T>
struct Tiles {
  // Panel <-> memory for features [begin, end).
  void (*pack)(Strided<const T> from, const Panel<T>& to, int64_t begin, int64_t end);
  void (*unpack)(const Panel<const T>& from, Strided<T> to, int64_t begin, int64_t end);
  // y[row * ldy + b], b < width (a multiple of 16), for n rows: those that `rows` names, or the
  // first n where it is null.
  void (*activate)(Activation, T* y, int64_t ldy, int width, const int32_t* rows, int64_t n);

  // y[r * x.width + b] for the rows of one chunk; `values` in visiting order.
  void (*lists_panel)(const RowTiles&, const T* values, const Panel<const T>& x, const T* bias,
                      T* y, int64_t chunk);
  // n tokens into blocks of 16 features: staged[(c * n + b) * 16 + j] is feature 16 c + j of token
  // b, zero behind the last feature. Tells whether all of them are finite.
  bool (*stage_tokens)(Strided<const T> x, int64_t features, int n, int64_t blocks, T* staged);
  // n staged tokens, a power of two up to slice_tokens; y with any strides; slices [begin, end).
  void (*slices_tokens)(const RowSlices&, const T* packed, const T* staged, int n, bool finite,
                        const T* bias, Activation, Strided<T> y, int64_t begin, int64_t end);
  int slice_tokens, widest_window;
  // n samples staged as octets, tile after tile, a feature of zeros behind each; the `rows` rows of
  // one chunk, whose first ones bias and y begin with; y with any strides.
  void (*lists_octet)(const RowOctets&, const T* values, const T* staged, int n, int64_t chunk,
                      int rows, const T* bias, Activation, Strided<T> y);
  // gradient[p] (+)= sum_b dY[row, b] X[col, b] over `panels` consecutive panels; one chunk.
  void (*lists_sddmm)(const RowTiles&, const SampleRows<T>* dy, const Panel<const T>* x, int panels,
                      bool accumulate, T* gradient, int64_t chunk);

  // y[r * ldy + b] for the rows of tiles [begin, end), b < x.width.
  void (*groups_panel)(const Groups&, const T* values, const Panel<const T>& x, const T* bias,
                       T* y, int64_t ldy, int64_t begin, int64_t end);
  // n samples (1..most_tokens), x and y with any strides; tiles [begin, end). `quads` where a row's
  // samples are contiguous in y: n rounded up to four are written, so that parts of a batch go in
  // order, and eight samples of room are enough for all parts of up to eight.
  int most_tokens;
  void (*groups_tokens)(const Groups&, const T* values, Strided<const T> x, int n, const T* bias,
                        Activation, Strided<T> y, bool quads, int64_t begin, int64_t end);
  // dx += A^T dy over all tiles, in order; dx starts as zeros.
  void (*groups_t_panel)(const Groups&, const T* values, const Panel<const T>& dy,
                         const Panel<T>& dx);
  // dy_tiles[(b * tiles + t) * 16 + i]: dY by tile, zeros behind a short tile; columns [begin,
  // end).
  void (*groups_t_tokens)(const Groups&, const ColumnEntries&, const T* values,
                          const T* dy_tiles, int n, Strided<T> dx, int64_t begin, int64_t end);
  // gradient (+)= dY X^T at tiles [begin, end), over one panel of at most kSampleStrip samples.
  void (*groups_sddmm)(const Groups&, const SampleRows<T>& dy, const Panel<const T>& x,
                       bool accumulate, T* gradient, int64_t begin, int64_t end);
};

const Tiles<float>& scalar_tiles_f32();
const Tiles<double>& scalar_tiles_f64();
const Tiles<float>& avx2_tiles();
const Tiles<float>& avx512_tiles();

}  // namespace spfmt
