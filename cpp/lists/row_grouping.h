// Orders of rows in which every 16 consecutive ones are alike, so that slices need little padding.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/spfmt.h"

namespace spfmt {

// Rows of all lengths side by side: sorted by length, then by the nonzeros in the left half of the
// columns, then in the left half of each half, and so on, inside blocks of rows small enough that
// the outputs of a block stay in cache. Takes time and memory proportional to the nonzeros.
std::vector<int32_t> sort_rows_by_halves(const Lists& lists, const Executor& executor);

}  // namespace spfmt
