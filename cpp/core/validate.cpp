// Checks of whole structures. Kernels index without looking, so everything is looked at here.
#include <climits>

#include "spfmt.h"

namespace spfmt {
namespace {

std::string at(const char* what, int64_t where) {
  return std::string(what) + " at " + std::to_string(where);
}

std::string check_shape(int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 0 || rows > INT32_MAX || cols > INT32_MAX) {
    return "shape " + std::to_string(rows) + " x " + std::to_string(cols) + " outside [0, 2^31)";
  }
  return "";
}

// A pointer array starts at 0 and never falls.
std::string check_pointers(const int64_t* p, int64_t n, const char* name) {
  if (p[0] != 0) return std::string(name) + " does not start at 0";
  for (int64_t i = 0; i < n; ++i) {
    if (p[i + 1] < p[i]) return at((std::string(name) + " falls").c_str(), i);
  }
  return "";
}

std::string check_tile(const Groups& v, int64_t t, std::vector<int64_t>& seen) {
  const int64_t n = v.row_ptr[t + 1] - v.row_ptr[t];
  if (n < 1 || n > kRowTile) return at("tile without 1..16 rows", t);
  if (v.col_begin[t] < 0 || v.col_begin[t] > v.col_end[t] || v.col_end[t] > v.col_count) {
    return at("column range out of bounds in tile", t);
  }
  const int64_t cols = v.col_end[t] - v.col_begin[t];
  if (v.value_ptr[t + 1] - v.value_ptr[t] != n * cols)
    return at("wrong number of values in tile", t);
  for (int64_t j = v.col_begin[t]; j < v.col_end[t]; ++j) {
    const int32_t c = v.col_indices[j];
    if (c < 0 || c >= v.cols) return at("column index out of range", j);
    if (seen[c] == t + 1) return at("duplicate column in one tile", j);
    seen[c] = t + 1;
  }
  return "";
}

}  // namespace

std::string validate(const Lists& v) {
  std::string error = check_shape(v.rows, v.cols);
  if (error.empty()) error = check_pointers(v.indptr, v.rows, "indptr");
  if (!error.empty()) return error;
  for (int64_t r = 0; r < v.rows; ++r) {
    for (int64_t p = v.indptr[r]; p < v.indptr[r + 1]; ++p) {
      const int32_t c = v.col_indices[p];
      if (c < 0 || c >= v.cols) return at("column index out of range", p);
      if (p > v.indptr[r] && c <= v.col_indices[p - 1]) return at("columns do not ascend", p);
    }
  }
  return "";
}

std::string validate(const Groups& v) {
  std::string error = check_shape(v.rows, v.cols);
  if (error.empty()) error = check_pointers(v.row_ptr, v.tiles, "row_ptr");
  if (error.empty() && v.row_ptr[v.tiles] != v.rows) error = "tiles do not cover all rows";
  if (error.empty()) error = check_pointers(v.value_ptr, v.tiles, "value_ptr");
  if (!error.empty()) return error;
  std::vector<bool> used(v.rows);
  for (int64_t i = 0; i < v.rows; ++i) {
    const int32_t r = v.row_perm[i];
    if (r < 0 || r >= v.rows || used[r]) return at("row_perm is not a permutation", i);
    used[r] = true;
  }
  std::vector<int64_t> seen(v.cols);
  for (int64_t t = 0; t < v.tiles && error.empty(); ++t) error = check_tile(v, t, seen);
  return error;
}

}  // namespace spfmt
