// Convolutions of groups: lanes over the rows of a band, a tile of outputs at a time.
#pragma once

#include <cstdint>

#include "../core/samples.h"
#include "../core/spfmt.h"

namespace spfmt {

// Outputs of one band, as many as a tile has.
template <class T>
struct BandOutputs {
  const T* values;  // (cols, rows)
  int rows;         // of the band
  const int32_t* offset;
  int64_t cols;
  const T* x;          // numbers of the first output
  int64_t row_stride;  // from an output to the one below it
  const T* start;      // (kBandRows), the bias; null: what is in `sums`
  T* sums;             // kBandRows numbers per output: the whole tile is written
  int64_t sums_row;
};

// Where a number of dX gets a share from: a column of a band, and rows of dY.
struct TurnedEntry {
  int64_t value;
  int32_t offset;
  int32_t rows;
};

// Outputs of one channel of dX in one phase.
template <class T>
struct TurnedOutputs {
  const T* values;
  const TurnedEntry *entry, *end;
  const T* dy;
  int64_t row_stride;
  T* out;
  int64_t out_row, out_step;
  int height, width;
};

// The gradient of columns of one band over `images` maps of height x width outputs.
template <class T>
struct BandGradient {
  const T *dy, *x;
  int64_t dy_image, x_image, dy_row, x_row;
  int images;
  int64_t height, width;
  const int32_t* offset;
  int64_t cols;
  int rows;
  T* gradient;  // (cols, rows)
};

template <class Outputs>
struct Tile {
  int rows, width;
  void (*run)(const Outputs&);
};

constexpr int kMostTiles = 20;
template <class Outputs>
struct Tiles {
  Tile<Outputs> tile[kMostTiles];
  int count;
  double cost;  // of a tile beside that of its outputs, in outputs
};

template <class T>
struct GroupImageBodies {
  int64_t columns;  // of a band whose weights, and numbers of a tile, L1 holds beside sums
  const Tiles<BandOutputs<T>>* multiply;
  const Tiles<TurnedOutputs<T>>* multiply_t;
  void (*sample)(const BandGradient<T>&);
};

}  // namespace spfmt
