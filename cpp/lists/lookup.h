// Lists with lanes over rows, for small batches: columns are looked up in registers.
#pragma once

#include <cstdint>

#include "../core/samples.h"
#include "../core/spfmt.h"

namespace spfmt {

// Columns per block: what one 512-bit register of float32 holds. Windows start at a block.
constexpr int kBlockCols = 16;

// Lists cut into slices of 16 rows, lanes = rows (SELL-16), and every slice into records: a
// window of 32 or 64 columns and a fixed number of steps, each of which takes one nonzero per lane.
//
//   slice s: lane i is row lane_row[16 s + i] (-1: none), records slice_ptr[s] .. slice_ptr[s + 1]
//   record q: columns 16 * block[q] .. + width, steps q * steps .. (q + 1) * steps
//   step k: code[16 k + i] says which column of the window lane i takes (see below)
//           values[16 k + i] (a private copy) is its weight, 0 where the lane is padding
//
// Windows overlap: a lane's nonzeros are taken in order, each at the first record that reaches it,
// and a record starts at the block of the lowest column left in any lane. That is the fewest
// records possible, far fewer than with chunks that all lanes have to finish before they go on,
// because a lane behind in one block makes up for it in the next. A fixed number of steps keeps
// the kernel free of branches that depend on the structure, which would be mispredicted.
//
// A lane's nonzeros keep their order, so values need no index: lane i's k-th code without kPadding
// belongs to the k-th value of its row.
struct Slices {
  int64_t slices;
  int width, steps;
  const int32_t* lane_row;
  const int64_t* slice_ptr;
  const int32_t* block;
  const uint8_t* code;
};

// A code: bits 0 to 4 are those of the column in the window, bit 7 is its bit 5 (instructions turn
// the top bit into a mask), bit 6 marks padding.
constexpr uint8_t kPadding = 0x40;
constexpr uint8_t window_code(int column) {
  return static_cast<uint8_t>((column & 31) | (column & 32) << 2);
}

template <class T>
struct LookupBodies {
  // n samples into blocks of 16 features: staged[(c * n + b) * 16 + j] is feature 16 c + j of
  // sample b, zero behind the last feature. Tells whether all of them are finite.
  bool (*stage)(Strided<const T> x, int64_t features, int n, int64_t blocks, T* staged);
  // n staged samples, a power of two up to `samples`; y with any strides; slices [begin, end).
  void (*multiply)(const Slices&, const T* packed, const T* staged, int n, bool finite,
                   const T* bias, Activation, Strided<T> y, int64_t begin, int64_t end);
  int samples, widest_window;
};

class Plan;
// Places per nonzero of a plan's slices, which are built if they are not there yet.
double lookup_padding(const Plan& plan, int widest_window);

}  // namespace spfmt
