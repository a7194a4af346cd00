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

// Greedy: every 16 consecutive rows have like counts, so that padding each chunk to its fullest row
// wastes little. counts: (rows, chunks) row-major, nonzeros per chunk of columns. Deterministic.
std::vector<int32_t> group_rows_by_counts(const uint8_t* counts, int64_t rows, int64_t chunks);

}  // namespace spfmt
