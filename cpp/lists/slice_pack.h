// Building RowSlices from Lists, and bringing values into their order.
#pragma once

#include <memory>

#include "../core/plan.h"

namespace spfmt {

// `widest`: columns of the widest window that the kernels look up, 32 or 64.
std::unique_ptr<SlicePack> make_slices(const Lists& lists, int widest, const Executor& executor);

// Values in the order of the slices, zero where a lane is padding. `permutation` (or null) maps a
// position of the lists to a place in `values`.
template <class T>
void pack_slice_values(const Lists& lists, const RowSlices& slices, const int64_t* permutation,
                       const T* values, T* packed, const Executor& executor);

}  // namespace spfmt
