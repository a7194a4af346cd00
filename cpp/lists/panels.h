// Lists with lanes over samples, up to 64 at a time.
#pragma once

#include <cstdint>

#include "../core/samples.h"
#include "../core/spfmt.h"

namespace spfmt {

// Rows per chunk, which is a unit of parallel work.
constexpr int64_t kRowChunk = 256;

// Lists cut into chunks of kRowChunk rows and tiles of `width` columns, so that the part of X that
// a pass touches stays in cache. Inside a (chunk, tile) the pieces of rows are sorted by length,
// longest first: pieces of one length follow each other, so their loops end where the branch
// predictor expects, and several of them run side by side. Columns are stored in the order in which
// they are visited, so that they stream; values are read where they lie, a piece at a time.
//
//   chunk q, tile t: pieces piece_ptr[q * tiles + t] .. piece_ptr[q * tiles + t + 1], one per row
//           with nonzeros there; in tile 0 one for every row of the chunk, so that each starts once
//   a piece: `count` nonzeros of row `row` of the chunk, from position base[q] + start
//   col[visit_ptr[q * tiles + t] + k]: the k-th column visited there, counted from the tile's first
struct Piece {
  int32_t start;
  uint16_t row;
  uint16_t count;
};
struct Pieces {
  int64_t tiles, width;
  const int64_t* base;
  const int64_t* piece_ptr;
  const int64_t* visit_ptr;
  const Piece* piece;
  const uint16_t* col;
};

template <class T>
struct ListPanelBodies {
  // y[r * x.width + b] for the rows of one chunk; `values` in the order of the lists.
  void (*multiply)(const Pieces&, const T* values, const Panel<const T>& x, const T* bias, T* y,
                   int64_t chunk);
  // gradient[p] (+)= sum_b dY[row, b] X[col, b] over `panels` consecutive panels; one chunk.
  void (*sample)(const Pieces&, const SampleRows<T>* dy, const Panel<const T>* x, int panels,
                 bool accumulate, T* gradient, int64_t chunk);
};

}  // namespace spfmt
