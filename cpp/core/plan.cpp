#include "plan.h"

namespace spfmt {
namespace {

// The transposed lists, a plan of their own that shares the values' packed copies.
struct Transposed {
  std::unique_ptr<const Plan> plan;
  int64_t nbytes() const { return plan->nbytes(); }
};

// So many columns are filled at a time that the lines being written to stay in the L1 cache.
constexpr int64_t kTileCols = 256;

std::shared_ptr<const Transposed> transpose(const Lists& a, std::shared_ptr<PackedValues> values) {
  const int64_t nnz = a.indptr[a.rows];
  std::vector<int64_t> indptr(a.cols + 1), source(nnz);
  std::vector<int32_t> rows(nnz);
  for (int64_t p = 0; p < nnz; ++p) ++indptr[a.col_indices[p] + 1];
  for (int64_t c = 0; c < a.cols; ++c) indptr[c + 1] += indptr[c];
  std::vector<int64_t> next(indptr.begin(), indptr.end() - 1), at(a.indptr, a.indptr + a.rows);
  for (int64_t end = kTileCols; end < a.cols + kTileCols; end += kTileCols) {
    for (int64_t r = 0; r < a.rows; ++r) {
      int64_t p = at[r];
      for (const int64_t stop = a.indptr[r + 1]; p < stop && a.col_indices[p] < end; ++p) {
        const int64_t to = next[a.col_indices[p]]++;
        rows[to] = static_cast<int32_t>(r);
        source[to] = p;
      }
      at[r] = p;
    }
  }
  auto made = std::make_shared<Transposed>();
  made->plan = std::make_unique<const Plan>(a.rows, std::move(indptr), std::move(rows),
                                            std::move(source), std::move(values));
  return made;
}

}  // namespace

Plan::Plan(const Lists& a)
    : Plan(a.cols, {a.indptr, a.indptr + a.rows + 1},
           {a.col_indices, a.col_indices + a.indptr[a.rows]}, {},
           std::make_shared<PackedValues>()) {}

Plan::Plan(int64_t cols, std::vector<int64_t> indptr, std::vector<int32_t> col_indices,
           std::vector<int64_t> source, std::shared_ptr<PackedValues> values)
    : layout_(Layout::lists),
      nnz_(indptr.back()),
      pointers_(std::move(indptr)),
      source_(std::move(source)),
      indices_(std::move(col_indices)),
      values_(std::move(values)) {
  lists_ = {static_cast<int64_t>(pointers_.size()) - 1, cols, pointers_.data(), indices_.data()};
  summary_ = summarize(lists_);
}

Plan::Plan(const Groups& a)
    : layout_(Layout::groups),
      nnz_(a.value_ptr[a.bands]),
      values_(std::make_shared<PackedValues>()) {
  const int64_t n = a.bands;
  pointers_.reserve(4 * n + 2);
  pointers_.insert(pointers_.end(), a.row_ptr, a.row_ptr + n + 1);
  pointers_.insert(pointers_.end(), a.value_ptr, a.value_ptr + n + 1);
  pointers_.insert(pointers_.end(), a.col_begin, a.col_begin + n);
  pointers_.insert(pointers_.end(), a.col_end, a.col_end + n);
  indices_.reserve(a.rows + a.col_count);
  indices_.insert(indices_.end(), a.row_perm, a.row_perm + a.rows);
  indices_.insert(indices_.end(), a.col_indices, a.col_indices + a.col_count);
  const int64_t* p = pointers_.data();
  groups_ = {a.rows,          a.cols,          n,
             a.col_count,     indices_.data(), p,
             p + 2 * (n + 1), p + 3 * n + 2,   indices_.data() + a.rows,
             p + n + 1};
  summary_ = summarize(groups_);
}

const Plan& Plan::transposed() const {
  return *made<Transposed>([this] { return transpose(lists_, values_); }).plan;
}

void Plan::add(Made made) const {
  made.next = made_.load(std::memory_order_relaxed);
  owned_.push_back(std::make_unique<const Made>(std::move(made)));
  made_.store(owned_.back().get(), std::memory_order_release);
}

int64_t Plan::nbytes() const {
  auto total = static_cast<int64_t>(8 * (pointers_.size() + source_.size()) + 4 * indices_.size());
  for (const Made* m = made_.load(std::memory_order_acquire); m != nullptr; m = m->next) {
    total += m->nbytes(m->pack.get());
  }
  {
    const NoFork whole;
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    for (const Shaped& s : shapes_) total += s.nbytes;
  }
  return source_.empty() ? total + values_->nbytes() : total;
}

std::shared_ptr<const Plan> make_plan(const Lists& lists) {
  return std::make_shared<const Plan>(lists);
}
std::shared_ptr<const Plan> make_plan(const Groups& groups) {
  return std::make_shared<const Plan>(groups);
}
int64_t plan_nnz(const Plan& plan) { return plan.nnz(); }
int64_t plan_rows(const Plan& plan) { return plan.rows(); }
int64_t plan_cols(const Plan& plan) { return plan.cols(); }
Layout plan_layout(const Plan& plan) { return plan.layout(); }
int64_t plan_nbytes(const Plan& plan) { return plan.nbytes(); }

}  // namespace spfmt
