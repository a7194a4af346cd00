#include "plan.h"

#include <algorithm>
#include <numeric>

#include "../lists/octet_pack.h"
#include "../lists/slice_pack.h"

namespace spfmt {

Buffer& ValueCache::renew(size_t bytes) const {
  version_ = kNoVersion;
  const bool fits = buffer_ && buffer_->bytes() == bytes;
  if (!fits || buffer_.use_count() > 1) buffer_ = std::make_shared<Buffer>(bytes);
  // use_count() does not wait for the last reads of who let go of the buffer; this does.
  std::atomic_thread_fence(std::memory_order_acquire);
  return *buffer_;
}

size_t ValueCache::nbytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return buffer_ ? buffer_->bytes() : 0;
}

Plan::Plan(const Lists& v) : layout_(Layout::lists), nnz_(v.indptr[v.rows]) {
  pointers_.assign(v.indptr, v.indptr + v.rows + 1);
  indices_.assign(v.col_indices, v.col_indices + nnz_);
  lists_ = {v.rows, v.cols, pointers_.data(), indices_.data()};
  summary_ = summarize(lists_);
}

Plan::Plan(const Groups& v) : layout_(Layout::groups), nnz_(v.value_ptr[v.tiles]) {
  const int64_t n = v.tiles;
  pointers_.reserve(4 * n + 2);
  pointers_.insert(pointers_.end(), v.row_ptr, v.row_ptr + n + 1);
  pointers_.insert(pointers_.end(), v.value_ptr, v.value_ptr + n + 1);
  pointers_.insert(pointers_.end(), v.col_begin, v.col_begin + n);
  pointers_.insert(pointers_.end(), v.col_end, v.col_end + n);
  indices_.reserve(v.rows + v.col_count);
  indices_.insert(indices_.end(), v.row_perm, v.row_perm + v.rows);
  indices_.insert(indices_.end(), v.col_indices, v.col_indices + v.col_count);
  const int64_t* p = pointers_.data();
  groups_ = {v.rows,          v.cols,          n,
             v.col_count,     indices_.data(), p,
             p + 2 * (n + 1), p + 3 * n + 2,   indices_.data() + v.rows,
             p + n + 1};
  summary_ = summarize(groups_);
}

int64_t Plan::nbytes() const {
  int64_t total = 8 * pointers_.size() + 4 * indices_.size();
  for (const auto& slices : slices_) {
    if (const auto* s = slices.peek()) total += s->nbytes();
  }
  if (const auto* o = octets_.peek()) total += o->nbytes();
  if (const auto* t = tiles_.peek()) total += t->nbytes();
  if (const auto* t = transpose_.peek()) {
    total += 8 * t->source.size() + t->plan->nbytes();
  }
  if (const auto* c = columns_.peek()) {
    total += 8 * (c->col_ptr.size() + c->entry_value.size()) + 4 * c->entry_tile.size();
  }
  return total;
}

namespace {

std::unique_ptr<TransposePack> make_transpose(const Lists& a) {
  auto pack = std::make_unique<TransposePack>();
  const int64_t nnz = a.indptr[a.rows];
  std::vector<int64_t> indptr(a.cols + 1), next;
  for (int64_t p = 0; p < nnz; ++p) ++indptr[a.col_indices[p] + 1];
  for (int64_t c = 0; c < a.cols; ++c) indptr[c + 1] += indptr[c];
  next.assign(indptr.begin(), indptr.end() - 1);
  std::vector<int32_t> rows(nnz);
  pack->source.resize(nnz);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t p = a.indptr[r]; p < a.indptr[r + 1]; ++p) {
      const int64_t to = next[a.col_indices[p]]++;
      rows[to] = static_cast<int32_t>(r);
      pack->source[to] = p;
    }
  }
  pack->plan = std::make_shared<Plan>(Lists{a.cols, a.rows, indptr.data(), rows.data()});
  return pack;
}

std::unique_ptr<ColumnPack> make_columns(const Groups& a) {
  auto pack = std::make_unique<ColumnPack>();
  pack->col_ptr.assign(a.cols + 1, 0);
  for (int64_t t = 0; t < a.tiles; ++t) {
    for (int64_t j = a.col_begin[t]; j < a.col_end[t]; ++j) ++pack->col_ptr[a.col_indices[j] + 1];
  }
  for (int64_t c = 0; c < a.cols; ++c) pack->col_ptr[c + 1] += pack->col_ptr[c];
  pack->entry_tile.resize(pack->col_ptr[a.cols]);
  pack->entry_value.resize(pack->col_ptr[a.cols]);
  std::vector<int64_t> next(pack->col_ptr.begin(), pack->col_ptr.end() - 1);
  for (int64_t t = 0; t < a.tiles; ++t) {
    const int64_t rows = a.row_ptr[t + 1] - a.row_ptr[t];
    for (int64_t j = a.col_begin[t]; j < a.col_end[t]; ++j) {
      const int64_t e = next[a.col_indices[j]]++;
      pack->entry_tile[e] = static_cast<int32_t>(t);
      pack->entry_value[e] = a.value_ptr[t] + (j - a.col_begin[t]) * rows;
    }
  }
  pack->view = {pack->col_ptr.data(), pack->entry_tile.data(), pack->entry_value.data()};
  return pack;
}

}  // namespace

const SlicePack& Plan::slices(int widest, const Executor& executor) const {
  return slices_[widest > 32].get([&] { return make_slices(lists_, widest, executor); });
}
const OctetPack& Plan::octets() const {
  return octets_.get([this] { return make_octets(lists_); });
}
const TilePack& Plan::tiles() const {
  return tiles_.get([this] { return make_tile_pack(lists_); });
}
const TransposePack& Plan::transpose() const {
  return transpose_.get([this] { return make_transpose(lists_); });
}
const ColumnPack& Plan::columns() const {
  return columns_.get([this] { return make_columns(groups_); });
}

std::shared_ptr<const Plan> make_plan(const Lists& view) {
  return std::make_shared<const Plan>(view);
}
std::shared_ptr<const Plan> make_plan(const Groups& view) {
  return std::make_shared<const Plan>(view);
}
int64_t plan_nnz(const Plan& plan) { return plan.nnz(); }
int64_t plan_nbytes(const Plan& plan) { return plan.nbytes(); }

}  // namespace spfmt
