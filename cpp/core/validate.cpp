// Checks of structures and products. Kernels index without looking, so everything is looked at
// here.
#include <climits>

#include "plan.h"
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

std::string check_band(const Groups& v, int64_t t, std::vector<int64_t>& seen) {
  const int64_t n = v.row_ptr[t + 1] - v.row_ptr[t];
  if (n < 1 || n > kBandRows) return at("band without 1..16 rows", t);
  if (v.col_begin[t] < 0 || v.col_begin[t] > v.col_end[t] || v.col_end[t] > v.col_count) {
    return at("column range out of bounds in band", t);
  }
  const int64_t cols = v.col_end[t] - v.col_begin[t];
  if (v.value_ptr[t + 1] - v.value_ptr[t] != n * cols)
    return at("wrong number of values in band", t);
  for (int64_t j = v.col_begin[t]; j < v.col_end[t]; ++j) {
    const int32_t c = v.col_indices[j];
    if (seen[c] == t + 1) return at("duplicate column in one band", j);
    seen[c] = t + 1;
  }
  return "";
}

}  // namespace

namespace {

// Whether a row's columns are in range and ascend; without branches, so that compilers vectorise
// it.
bool is_list(const int32_t* columns, int64_t n, int64_t cols) {
  uint32_t bad = 0;
  for (int64_t p = 0; p < n; ++p)
    bad |= static_cast<uint32_t>(columns[p]) >= static_cast<uint32_t>(cols);
  for (int64_t p = 1; p < n; ++p) bad |= static_cast<uint32_t>(columns[p] <= columns[p - 1]);
  return bad == 0;
}

}  // namespace

std::string validate(const Lists& v) {
  std::string error = check_shape(v.rows, v.cols);
  if (error.empty()) error = check_pointers(v.indptr, v.rows, "indptr");
  if (!error.empty()) return error;
  for (int64_t r = 0; r < v.rows; ++r) {
    if (is_list(v.col_indices + v.indptr[r], v.indptr[r + 1] - v.indptr[r], v.cols)) continue;
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
  if (error.empty()) error = check_pointers(v.row_ptr, v.bands, "row_ptr");
  if (error.empty() && v.row_ptr[v.bands] != v.rows) error = "bands do not cover all rows";
  if (error.empty()) error = check_pointers(v.value_ptr, v.bands, "value_ptr");
  if (!error.empty()) return error;
  std::vector<bool> used(v.rows);
  for (int64_t i = 0; i < v.rows; ++i) {
    const int32_t r = v.row_perm[i];
    if (r < 0 || r >= v.rows || used[r]) return at("row_perm is not a permutation", i);
    used[r] = true;
  }
  // Those that no band names, too: a convolution turns all of them into offsets.
  for (int64_t j = 0; j < v.col_count; ++j) {
    const int32_t c = v.col_indices[j];
    if (c < 0 || c >= v.cols) return at("column index out of range", j);
  }
  std::vector<int64_t> seen(v.cols);
  for (int64_t t = 0; t < v.bands && error.empty(); ++t) error = check_band(v, t, seen);
  return error;
}

namespace {

std::string size_text(const View& v) {
  return std::to_string(v.rows) + " x " + std::to_string(v.cols);
}

// `depth`: numbers of every row and column, the pixels of an image.
std::string check_operand(const char* name, const View& v, DType dtype, int64_t rows, int64_t cols,
                          int64_t depth) {
  const std::string who = name;
  if (v.dtype != dtype) return who + " is not of the dtype of the values";
  if (v.rows != rows || v.cols != cols) {
    return who + " is " + size_text(v) + ", not " + std::to_string(rows) + " x " +
           std::to_string(cols);
  }
  if (v.data == nullptr && rows > 0 && cols > 0 && depth > 0) return who + " has no memory";
  return "";
}

// Nothing is read outside of the maps, whatever the sizes say; but they must be numbers that can be
// added up.
std::string check_axis(const Axis& a) {
  constexpr int64_t kMost = int64_t{1} << 30, kMostCells = int64_t{1} << 20;
  for (const int64_t n : {a.size, a.out, a.padding}) {
    if (n < 0 || n > kMost) return "sizes and padding of images are within [0, 2^30]";
  }
  for (const int64_t n : {a.kernel, a.stride, a.dilation}) {
    if (n < 1 || n > kMost) return "kernel, stride and dilation are within [1, 2^30]";
  }
  // What is held for every cell must not depend on channels that there may be none of.
  if (a.kernel > kMostCells) return "kernels are no larger than 2^20";
  if (a.kernel * a.dilation > kMost) return "a kernel reaches no further than 2^30";
  return "";
}

int64_t channels_of(const Plan& plan, const Geometry& g) {
  return g.groups * (plan.cols() / g.cells());
}

std::string check_geometry(const Plan& plan, const Geometry& g) {
  std::string error = check_axis(g.y);
  if (error.empty()) error = check_axis(g.x);
  if (!error.empty()) return error;
  if (g.groups < 1 || plan.rows() % g.groups != 0) return "groups do not divide the rows";
  if (plan.cols() % g.cells() != 0) return "columns are no whole number of kernels";
  return "";
}

}  // namespace

std::string check(const Plan& plan, const Product& p) {
  const bool forward = p.op == Op::spmm, sampled = p.op == Op::sddmm;
  const DType dtype = p.values.dtype;
  const int64_t n = p.in.cols, rows = plan.rows();
  const int64_t cols = p.geometry ? channels_of(plan, *p.geometry) : plan.cols();
  if (p.scales != nullptr) return "no kernel for scales";
  const std::string geometry = p.geometry ? check_geometry(plan, *p.geometry) : "";
  if (!geometry.empty()) return geometry;
  if (p.values.rows < plan.nnz() || p.values.cols != 1) return "fewer values than positions";
  if (p.values.data == nullptr && plan.nnz() > 0) return "values have no memory";
  const int64_t x_depth = p.geometry ? p.geometry->y.size * p.geometry->x.size : 1;
  const int64_t y_depth = p.geometry ? p.geometry->y.out * p.geometry->x.out : 1;
  const auto check_x = [&](const char* name, const View& v) {
    return check_operand(name, v, dtype, cols, n, x_depth);
  };
  const auto check_y = [&](const char* name, const View& v) {
    return check_operand(name, v, dtype, rows, n, y_depth);
  };
  std::string error = forward ? check_x("the operand", p.in) : check_y("the operand", p.in);
  if (error.empty() && sampled) error = check_x("X", p.in2);
  if (error.empty() && !sampled) {
    error = forward ? check_y("the result", p.out) : check_x("the result", p.out);
  }
  if (!error.empty()) return error;
  if (p.add.data != nullptr) {
    if (!forward || p.geometry == nullptr) return "only spmm of images adds";
    error = p.add.data == p.out.data ? "the result is added to itself" : check_y("add", p.add);
    if (!error.empty()) return error;
  }
  if (forward) return p.bias.data ? check_operand("the bias", p.bias, dtype, rows, 1, 1) : "";
  if (p.bias.data != nullptr || p.activation != Activation::none) {
    return "only spmm has a bias and activations";
  }
  return "";
}

}  // namespace spfmt
