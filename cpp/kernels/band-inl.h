// One band of groups, as their kernels see it. Included once per ISA level.
#pragma once

#include "../core/spfmt.h"

namespace spfmt {
namespace {

struct Band {
  const int32_t* row;
  const int32_t* col;
  int rows;
  int64_t cols;
  int64_t value;
};

inline Band band_of(const Groups& a, int64_t t) noexcept {
  return {a.row_perm + a.row_ptr[t], a.col_indices + a.col_begin[t],
          static_cast<int>(a.row_ptr[t + 1] - a.row_ptr[t]), a.col_end[t] - a.col_begin[t],
          a.value_ptr[t]};
}

}  // namespace
}  // namespace spfmt
