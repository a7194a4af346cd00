// Convolutions of lists: lanes over outputs, or over images, whose numbers lie side by side.
#pragma once

#include <cstdint>

#include "../core/samples.h"
#include "../core/spfmt.h"

namespace spfmt {

// Lists cut into blocks of channels, whose part of a frame stays in L1, and into chunks of rows,
// the units of parallel work of the gradient. Inside a (block, chunk) the pieces of rows are sorted
// by length, longest first, so that their loops end where the branch predictor expects.
//
//   block b, chunk q   pieces piece_ptr[b * chunks + q] .. piece_ptr[b * chunks + q + 1]: of every
//                      row with nonzeros there; in block 0 of all, so that each starts once
//   a piece            `count` values from `start` on in the order of the lists, offsets from
//                      `first` on
struct ImagePiece {
  int64_t start;
  int32_t first, row, count;
};
struct ImagePieces {
  int64_t blocks, chunks;
  const int64_t* piece_ptr;
  const ImagePiece* piece;
  const int32_t* offset;
};

// A tile: `down` rows of `across` vectors of outputs.
template <class T>
struct ListOutputs {
  const T *values, *x;
  int64_t x_row;
  const T* bias;
  T* y;  // of row 0, rows of the structure `plane` apart, those of the tile `y_row`
  int64_t plane, y_row;
  int down, across;
  int64_t chunk, chunk_end;  // of rows
};

// The same tile of dY, and its share in the gradient of one chunk.
template <class T>
struct ListGradient {
  const T *x, *dy;
  int64_t x_row, plane, dy_row;
  T* gradient;  // in the order of the lists
  int down, across;
};

// Lists, and the position of each value where they are another layout's; null: its own.
struct RowLists {
  Lists lists;
  const int64_t* source;
};

template <class T>
struct ListImageBodies {
  int most_vectors, most_held;  // in a tile of outputs, and of the gradient
  void (*multiply)(const ImagePieces&, const ListOutputs<T>&);
  void (*sample)(const ImagePieces&, const ListGradient<T>&, int64_t block, int64_t chunk);
};

}  // namespace spfmt
