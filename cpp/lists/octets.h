// Lists with lanes over eight samples, for batches of up to sixteen.
#pragma once

#include <cstdint>

#include "../core/samples.h"
#include "../core/spfmt.h"

namespace spfmt {

// Rows that are summed side by side, and nonzeros of a row that one step takes.
constexpr int kQuadRows = 4, kStepTerms = 4;
// Rows per chunk, which is a unit of parallel work.
constexpr int64_t kOctetRows = 128;

// Lists cut into chunks of kOctetRows rows and tiles of `width` columns, so that the octet of X
// that a pass looks up stays in first-level cache. The rows of a (chunk, tile) with nonzeros there
// are sorted by length, longest first, and taken four at a time: a quad has the steps that its
// longest row needs, and all loops over the quads of a tile end where the branch predictor expects.
//
//   chunk c, tile t: quads quad_ptr[c * tiles + t] .. quad_ptr[c * tiles + t + 1]
//   quad q: rows row[4 q .. 4 q + 3] of the chunk (kOctetRows: none), steps step_ptr[q] ..
//   step s: offset[16 s + 4 i + k] is where in the tile's X the k-th of four nonzeros of row i
//           finds its samples: 8 times its column, counted from the tile's first, or 8 * width
//           where there is none, where X is zero.
//           values[16 s + 4 i + k] (a private copy) is its weight, 0 where there is none.
//
// X is staged tile after tile, each followed by that feature of zeros: padding adds 0 * 0, so it
// needs no mask even where x is infinite.
struct Octets {
  int64_t chunks, tiles, width;
  const int64_t* quad_ptr;
  const int64_t* step_ptr;
  const uint16_t* row;
  const uint16_t* offset;
};

template <class T>
struct OctetBodies {
  // n samples staged as octets, tile after tile, a feature of zeros behind each; the `rows` rows of
  // one chunk, whose first ones bias and y begin with; y with any strides.
  void (*multiply)(const Octets&, const T* values, const T* staged, int n, int64_t chunk, int rows,
                   const T* bias, Activation, Strided<T> y);
};

// Places per nonzero of the octets of some lists, estimated from a few chunks; at least 1.
double octet_padding(const Lists& lists);

}  // namespace spfmt
