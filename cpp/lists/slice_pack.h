// Building Slices from Lists, and bringing values into their order.
#pragma once

#include <memory>
#include <vector>

#include "../core/plan.h"
#include "lookup.h"

namespace spfmt {

struct SlicePack {
  std::vector<int32_t> lane_row;
  std::vector<int64_t> slice_ptr;
  std::unique_ptr<Buffer> block, code;
  Slices view;

  // Places for values, padding included.
  int64_t places() const { return slice_ptr.back() * view.steps * kLanes; }
  int64_t nbytes() const;
};

// `widest`: columns of the widest window that the kernels look up, 32 or 64.
SlicePack make_slices(const Lists& lists, int widest, const Executor& executor);

// Values in the order of the slices, zero where a lane is padding. `source` (or null) maps a
// position of the lists to a place in `values`.
template <class T>
void pack_slice_values(const Lists& lists, const Slices& slices, const int64_t* source,
                       const T* values, T* packed, const Executor& executor);

}  // namespace spfmt
