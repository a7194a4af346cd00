#include "structure.h"

#include <algorithm>
#include <climits>
#include <numeric>
#include <stdexcept>

namespace spfmt::ort {
namespace {

using Indices = std::vector<int32_t>;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void expect(bool condition, const std::string& message) {
  if (!condition) refuse(message);
}

std::string text(const std::vector<int64_t>& shape) {
  std::string out = "(";
  for (const int64_t n : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + ")";
}

// Every extent below 2^31, so that a product of two of them cannot overflow.
void expect_rank(const Tensor& tensor, size_t rank, const char* name) {
  expect(tensor.shape.size() == rank, std::string(name) + ": got shape " + text(tensor.shape) +
                                          ", expected " + std::to_string(rank) + " dimensions");
  for (const int64_t n : tensor.shape) {
    expect(n >= 0 && n <= INT32_MAX, std::string(name) + ": an extent is outside [0, 2^31)");
  }
}

void expect_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* name) {
  expect(tensor.shape == shape,
         std::string(name) + ": got shape " + text(tensor.shape) + ", expected " + text(shape));
}

int64_t size_of(const Tensor& tensor) {
  return std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1},
                         [](int64_t a, int64_t b) { return a * b; });
}

// Indices of either width; each must lie in [0, limit).
Indices read_indices(const Tensor& tensor, int64_t limit, const char* name) {
  const int64_t n = size_of(tensor);
  Indices out(n);
  if (tensor.type == ElementType::u16) {
    std::copy_n(static_cast<const uint16_t*>(tensor.data), n, out.begin());
  } else if (tensor.type == ElementType::i32) {
    std::copy_n(static_cast<const int32_t*>(tensor.data), n, out.begin());
  } else {
    refuse(std::string(name) + ": expected uint16 or int32 indices");
  }
  for (int64_t i = 0; i < n; ++i) {
    if (out[i] < 0 || out[i] >= limit) {
      refuse(std::string(name) + ": index " + std::to_string(out[i]) + " at " + std::to_string(i) +
             " is outside [0, " + std::to_string(limit) + ")");
    }
  }
  return out;
}

// Pointers (n + 1,) from 0 to `total`, never falling.
std::vector<int64_t> read_pointers(const Tensor& tensor, int64_t total, const char* name) {
  expect_rank(tensor, 1, name);
  const Indices raw = read_indices(tensor, total + 1, name);
  expect(!raw.empty() && raw.front() == 0 && raw.back() == total,
         std::string(name) + ": expected pointers from 0 to " + std::to_string(total));
  expect(std::is_sorted(raw.begin(), raw.end()), std::string(name) + ": pointers fall");
  return {raw.begin(), raw.end()};
}

Structure list_structure(const Constants& node, const std::vector<int64_t>& indptr,
                         const Indices& columns) {
  const Lists view{node.rows, node.cols, indptr.data(), columns.data()};
  const std::string error = validate(view);
  expect(error.empty(), "col_indices: " + error);
  return {make_plan(view), {}};
}

Structure read_condensed(const Constants& node) {
  const Tensor& values = node.inputs[0];
  expect_rank(values, 2, "values");
  expect_shape(node.inputs[1], {values.shape[0]}, "row_indices");
  expect_shape(node.inputs[2], values.shape, "col_indices");
  const Indices active = read_indices(node.inputs[1], node.rows, "row_indices");
  std::vector<int64_t> indptr(node.rows + 1);
  for (size_t i = 0; i < active.size(); ++i) {
    if (i > 0 && active[i - 1] >= active[i]) {
      refuse("row_indices: expected ascending rows without duplicates");
    }
    indptr[active[i] + 1] = values.shape[1];
  }
  std::partial_sum(indptr.begin(), indptr.end(), indptr.begin());
  return list_structure(node, indptr, read_indices(node.inputs[2], node.cols, "col_indices"));
}

// Position j of a row belongs to group j / n, that is to columns [g * m, (g + 1) * m).
void expect_groups_of_m(const Indices& columns, int64_t kept, int64_t n, int64_t m) {
  for (size_t p = 0; p < columns.size(); ++p) {
    const int64_t group = static_cast<int64_t>(p) % kept / n;
    if (columns[p] / m != group) {
      refuse("col_indices: column " + std::to_string(columns[p]) + " at " + std::to_string(p) +
             " breaks " + std::to_string(n) + ":" + std::to_string(m));
    }
  }
}

Structure read_nm(const Constants& node) {
  const Tensor& values = node.inputs[0];
  const int64_t n = node.attributes[0], m = node.attributes[1];
  expect(n >= 0 && m >= 1 && n <= m && m <= INT32_MAX, "n, m: expected 0 <= n <= m, m >= 1");
  const int64_t kept = node.cols / m * n + std::min(n, node.cols % m);
  expect_shape(values, {node.rows, kept}, "values");
  expect_shape(node.inputs[1], values.shape, "col_indices");
  const Indices columns = read_indices(node.inputs[1], node.cols, "col_indices");
  expect_groups_of_m(columns, kept, n, m);
  std::vector<int64_t> indptr(node.rows + 1);
  for (int64_t r = 0; r <= node.rows; ++r) indptr[r] = r * kept;
  return list_structure(node, indptr, columns);
}

Structure read_csr(const Constants& node) {
  const Tensor& values = node.inputs[0];
  expect_rank(values, 1, "values");
  expect_shape(node.inputs[1], {node.rows + 1}, "indptr");
  expect_shape(node.inputs[2], values.shape, "col_indices");
  const std::vector<int64_t> indptr = read_pointers(node.inputs[1], values.shape[0], "indptr");
  return list_structure(node, indptr, read_indices(node.inputs[2], node.cols, "col_indices"));
}

// Groups of rows that share columns, as both group formats store them: entry e of a group is one of
// its columns with `width` values, one per row of the group.
struct Grouped {
  int64_t width;
  std::vector<int64_t> entry_ptr;  // (groups + 1)
  Indices columns;                 // (entries)
  Tensor row_positions;            // row r is row position % width of group position / width
};

// (position, row) of every row, group after group.
std::vector<std::pair<int64_t, int32_t>> rows_in_order(const Constants& node,
                                                       const Grouped& grouped) {
  expect_shape(grouped.row_positions, {node.rows}, "row_positions");
  const int64_t groups = static_cast<int64_t>(grouped.entry_ptr.size()) - 1;
  const Indices positions =
      read_indices(grouped.row_positions, groups * grouped.width, "row_positions");
  std::vector<std::pair<int64_t, int32_t>> rows(node.rows);
  for (int64_t r = 0; r < node.rows; ++r) rows[r] = {positions[r], static_cast<int32_t>(r)};
  std::sort(rows.begin(), rows.end());
  for (size_t i = 1; i < rows.size(); ++i) {
    if (rows[i - 1].first == rows[i].first) {
      refuse("row_positions: rows " + std::to_string(rows[i - 1].second) + " and " +
             std::to_string(rows[i].second) + " share one position");
    }
  }
  return rows;
}

// The arrays that a Groups view points to.
struct Tiles {
  Indices row_perm;
  std::vector<int64_t> row_ptr{0}, col_begin, col_end, value_ptr{0}, source;
};

Structure group_structure(const Constants& node, const Grouped& grouped) {
  const auto rows = rows_in_order(node, grouped);
  Tiles tiles;
  for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
    const int64_t group = rows[begin].first / grouped.width;
    const size_t limit = std::min(rows.size(), begin + kBandRows);
    while (end < limit && rows[end].first / grouped.width == group) ++end;
    for (size_t i = begin; i < end; ++i) tiles.row_perm.push_back(rows[i].second);
    tiles.row_ptr.push_back(static_cast<int64_t>(end));
    tiles.col_begin.push_back(grouped.entry_ptr[group]);
    tiles.col_end.push_back(grouped.entry_ptr[group + 1]);
    for (int64_t e = grouped.entry_ptr[group]; e < grouped.entry_ptr[group + 1]; ++e) {
      for (size_t i = begin; i < end; ++i) {
        tiles.source.push_back(e * grouped.width + rows[i].first % grouped.width);
      }
    }
    tiles.value_ptr.push_back(static_cast<int64_t>(tiles.source.size()));
  }
  const Groups view{node.rows,
                    node.cols,
                    static_cast<int64_t>(tiles.col_begin.size()),
                    static_cast<int64_t>(grouped.columns.size()),
                    tiles.row_perm.data(),
                    tiles.row_ptr.data(),
                    tiles.col_begin.data(),
                    tiles.col_end.data(),
                    grouped.columns.data(),
                    tiles.value_ptr.data()};
  const std::string error = validate(view);
  expect(error.empty(), "structure: " + error);
  return {make_plan(view), std::move(tiles.source)};
}

Structure read_shuffled_block(const Constants& node) {
  const Tensor& values = node.inputs[0];
  expect_rank(values, 2, "values");
  expect_shape(node.inputs[2], {values.shape[0]}, "col_indices");
  Grouped grouped{values.shape[1], read_pointers(node.inputs[1], values.shape[0], "group_ptr"),
                  read_indices(node.inputs[2], node.cols, "col_indices"), node.inputs[3]};
  return group_structure(node, grouped);
}

Structure read_hrbp(const Constants& node) {
  const Tensor &values = node.inputs[0], &channels = node.inputs[1], &patterns = node.inputs[2];
  const int64_t cells = node.attributes[0];
  expect(cells >= 1 && node.cols % cells == 0, "cells: expected a divisor of in_features");
  expect_rank(values, 3, "values");
  expect_rank(channels, 2, "channel_indices");
  expect_rank(patterns, 2, "pattern_indices");
  const int64_t groups = values.shape[0], n_channels = channels.shape[1];
  const int64_t n_cells = patterns.shape[1], n_columns = values.shape[1];
  expect(channels.shape[0] == groups && patterns.shape[0] == groups &&
             n_channels * n_cells == n_columns,
         "values: got shape " + text(values.shape) + ", expected one column per channel of " +
             text(channels.shape) + " and cell of " + text(patterns.shape));
  const Indices channel = read_indices(channels, node.cols / cells, "channel_indices");
  const Indices cell = read_indices(patterns, cells, "pattern_indices");
  Grouped grouped{values.shape[2], {0}, {}, node.inputs[3]};
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < n_channels; ++i) {
      for (int64_t j = 0; j < n_cells; ++j) {
        const int64_t column = channel[g * n_channels + i] * cells + cell[g * n_cells + j];
        grouped.columns.push_back(static_cast<int32_t>(column));
      }
    }
    grouped.entry_ptr.push_back(static_cast<int64_t>(grouped.columns.size()));
  }
  return group_structure(node, grouped);
}

}  // namespace

const std::vector<Operator>& operators() {
  static const std::vector<Operator> kOperators = {
      {"CondensedLinear",
       "condensed",
       {"values", "row_indices", "col_indices"},
       {},
       read_condensed},
      {"NMLinear", "nm", {"values", "col_indices"}, {"n", "m"}, read_nm},
      {"ShuffledBlockLinear",
       "shuffled_block",
       {"values", "group_ptr", "col_indices", "row_positions"},
       {},
       read_shuffled_block},
      {"HRBPLinear",
       "hrbp",
       {"values", "channel_indices", "pattern_indices", "row_positions"},
       {"cells"},
       read_hrbp},
      {"CSRLinear", "csr", {"values", "indptr", "col_indices"}, {}, read_csr},
  };
  return kOperators;
}

}  // namespace spfmt::ort
