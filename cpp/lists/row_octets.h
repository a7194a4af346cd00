// The layout of per-row formats for batches of up to sixteen, where lanes run over eight samples.
#pragma once

#include <cstdint>

namespace spfmt {

// Samples per octet: four-byte lanes of a 256-bit register.
constexpr int kOctet = 8;
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
struct RowOctets {
  int64_t chunks, tiles, width;
  const int64_t* quad_ptr;
  const int64_t* step_ptr;
  const uint16_t* row;
  const uint16_t* offset;
};

}  // namespace spfmt
