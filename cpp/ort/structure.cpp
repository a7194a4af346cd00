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

std::shared_ptr<const Plan> read_lists(const Constants& node) {
  const int64_t nnz = node.inputs[0].shape[0];
  expect_shape(node.inputs[1], {node.rows + 1}, "indptr");
  expect_shape(node.inputs[2], {nnz}, "col_indices");
  const std::vector<int64_t> indptr = read_pointers(node.inputs[1], nnz, "indptr");
  const Indices columns = read_indices(node.inputs[2], node.cols, "col_indices");
  const Lists view{node.rows, node.cols, indptr.data(), columns.data()};
  const std::string error = validate(view);
  expect(error.empty(), "structure: " + error);
  return make_plan(view);
}

// Where the values of each band begin, from its rows and columns, and where the last ones end.
std::vector<int64_t> value_pointers(const std::vector<int64_t>& row_ptr, const Indices& begin,
                                    const Indices& end) {
  std::vector<int64_t> value_ptr{0};
  for (size_t b = 0; b < begin.size(); ++b) {
    const int64_t columns = std::max<int64_t>(0, int64_t{end[b]} - begin[b]);
    value_ptr.push_back(value_ptr.back() + (row_ptr[b + 1] - row_ptr[b]) * columns);
  }
  return value_ptr;
}

std::shared_ptr<const Plan> read_groups(const Constants& node) {
  expect_rank(node.inputs[2], 1, "row_ptr");
  expect_rank(node.inputs[5], 1, "col_indices");
  const int64_t bands = node.inputs[2].shape[0] - 1, places = node.inputs[5].shape[0];
  expect_shape(node.inputs[1], {node.rows}, "row_perm");
  expect_shape(node.inputs[3], {bands}, "col_begin");
  expect_shape(node.inputs[4], {bands}, "col_end");
  const Indices perm = read_indices(node.inputs[1], node.rows, "row_perm");
  const std::vector<int64_t> row_ptr = read_pointers(node.inputs[2], node.rows, "row_ptr");
  const Indices begin = read_indices(node.inputs[3], places + 1, "col_begin");
  const Indices end = read_indices(node.inputs[4], places + 1, "col_end");
  const Indices columns = read_indices(node.inputs[5], node.cols, "col_indices");
  const std::vector<int64_t> col_begin(begin.begin(), begin.end()), col_end(end.begin(), end.end());
  const std::vector<int64_t> value_ptr = value_pointers(row_ptr, begin, end);
  const Groups view{
      node.rows,      node.cols,        bands,          places,         perm.data(),
      row_ptr.data(), col_begin.data(), col_end.data(), columns.data(), value_ptr.data()};
  const std::string error = validate(view);
  expect(error.empty(), "structure: " + error);
  expect_shape(node.inputs[0], {value_ptr.back()}, "values");
  return make_plan(view);
}

}  // namespace

const std::vector<Structure>& structures() {
  static const std::vector<Structure> kStructures = {
      {"Lists", {"values", "indptr", "col_indices"}, read_lists},
      {"Groups",
       {"values", "row_perm", "row_ptr", "col_begin", "col_end", "col_indices"},
       read_groups},
  };
  return kStructures;
}

}  // namespace spfmt::ort
