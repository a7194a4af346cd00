#include "plan.h"

#include <algorithm>
#include <numeric>

namespace spfmt {

std::shared_ptr<const Buffer> ValueCache::get(int64_t version, size_t bytes,
                                              const std::function<void(Buffer&)>& fill) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool fits = buffer_ && buffer_->bytes() == bytes;
  if (fits && version != kNoVersion && version == version_) return buffer_;
  version_ = kNoVersion;
  if (!fits || buffer_.use_count() > 1) buffer_ = std::make_shared<Buffer>(bytes);
  // use_count() does not wait for the last reads of who let go of the buffer; this does.
  std::atomic_thread_fence(std::memory_order_acquire);
  fill(*buffer_);
  version_ = version;
  return buffer_;
}

size_t ValueCache::nbytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return buffer_ ? buffer_->bytes() : 0;
}

int64_t SlicePack::nbytes() const {
  return static_cast<int64_t>(4 * (lane_row.size() + chunk.size() + source.size()) +
                              8 * (slice_ptr.size() + step_ptr.size()) + byte_index.size() +
                              values.nbytes());
}

Plan::Plan(const RowLists& v) : layout_(Layout::row_lists), nnz_(v.indptr[v.rows]) {
  pointers_.assign(v.indptr, v.indptr + v.rows + 1);
  indices_.assign(v.col_indices, v.col_indices + nnz_);
  lists_ = {v.rows, v.cols, pointers_.data(), indices_.data()};
}

Plan::Plan(const RowGroups& v) : layout_(Layout::row_groups), nnz_(v.value_ptr[v.tiles]) {
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
}

int64_t Plan::nbytes() const {
  int64_t total = 8 * pointers_.size() + 4 * indices_.size();
  if (const auto* s = slices_.peek()) total += s->nbytes();
  if (const auto* t = tiles_.peek()) total += t->nbytes();
  if (const auto* t = transpose_.peek()) {
    total += 8 * t->source.size() + t->values.nbytes() + t->plan->nbytes();
  }
  if (const auto* c = columns_.peek()) {
    total += 8 * (c->col_ptr.size() + c->entry_value.size()) + 4 * c->entry_tile.size();
  }
  return total;
}

namespace {

// Nonzeros of each row in each chunk of 32 columns; at most 32, so a byte holds it.
std::vector<uint8_t> chunk_counts(const RowLists& a, int64_t chunks) {
  std::vector<uint8_t> counts(a.rows * chunks);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t p = a.indptr[r]; p < a.indptr[r + 1]; ++p) {
      ++counts[r * chunks + a.col_indices[p] / kChunk];
    }
  }
  return counts;
}

// The rows of one slice, walked chunk by chunk with one cursor each.
struct SliceCursor {
  const RowLists& a;
  int32_t row[kRowTile];
  int64_t at[kRowTile], stop[kRowTile], start[kRowTile];
  int lanes = 0;

  SliceCursor(const RowLists& lists, const int32_t* order, int64_t n) : a(lists) {
    for (; lanes < std::min<int64_t>(n, kRowTile); ++lanes) {
      row[lanes] = order[lanes];
      at[lanes] = start[lanes] = a.indptr[order[lanes]];
      stop[lanes] = a.indptr[order[lanes] + 1];
    }
  }
  // The lowest chunk any lane still has to visit, -1 at the end.
  int64_t next_chunk() const {
    int64_t best = -1;
    for (int i = 0; i < lanes; ++i) {
      if (at[i] == stop[i]) continue;
      const int64_t chunk = a.col_indices[at[i]] / kChunk;
      if (best < 0 || chunk < best) best = chunk;
    }
    return best;
  }
  bool in_chunk(int lane, int64_t chunk) const {
    return at[lane] < stop[lane] && a.col_indices[at[lane]] / kChunk == chunk;
  }
};

// Appends one chunk's steps: step k takes the k-th nonzero of every lane that has one.
void append_chunk(SliceCursor& c, int64_t chunk, SlicePack& pack) {
  for (bool any = true; any;) {
    any = false;
    uint8_t index[kRowTile];
    int32_t source[kRowTile];
    for (int i = 0; i < kRowTile; ++i) {
      const bool used = i < c.lanes && c.in_chunk(i, chunk);
      index[i] = used ? static_cast<uint8_t>(c.a.col_indices[c.at[i]] % kChunk) : 0x80;
      source[i] = used ? static_cast<int32_t>(c.at[i] - c.start[i]) : -1;
      if (used) ++c.at[i];
      any |= used;
    }
    if (!any) break;
    pack.byte_index.insert(pack.byte_index.end(), index, index + kRowTile);
    pack.source.insert(pack.source.end(), source, source + kRowTile);
  }
  pack.chunk.push_back(static_cast<int32_t>(chunk));
  pack.step_ptr.push_back(pack.byte_index.size() / kRowTile);
}

// Grouping looks at rows x chunks counts; beyond this many bytes the natural order is kept, so that
// memory stays proportional to the nonzeros.
bool affords_grouping(const RowLists& a, int64_t chunks) {
  return a.rows * chunks <= 16 * a.indptr[a.rows] + (1 << 20);
}

// The order in which rows fill the slices. Rows of equal counts (n:m) need no grouping.
std::vector<int32_t> slice_order(const RowLists& a, int64_t chunks) {
  std::vector<int32_t> order(a.rows);
  std::iota(order.begin(), order.end(), 0);
  if (!affords_grouping(a, chunks)) return order;
  const std::vector<uint8_t> counts = chunk_counts(a, chunks);
  const auto differs = [&](int32_t r) {
    return !std::equal(counts.begin(), counts.begin() + chunks, counts.begin() + r * chunks);
  };
  if (std::none_of(order.begin(), order.end(), differs)) return order;
  return group_rows_by_counts(counts.data(), a.rows, chunks);
}

std::unique_ptr<SlicePack> make_slices(const RowLists& a) {
  auto pack = std::make_unique<SlicePack>();
  const int64_t chunks = (a.cols + kChunk - 1) / kChunk;
  std::vector<int32_t> order = slice_order(a, chunks);
  const int64_t slices = (a.rows + kRowTile - 1) / kRowTile;
  pack->slice_ptr.push_back(0);
  pack->step_ptr.push_back(0);
  for (int64_t s = 0; s < slices; ++s) {
    SliceCursor cursor(a, order.data() + s * kRowTile, a.rows - s * kRowTile);
    for (int64_t chunk; (chunk = cursor.next_chunk()) >= 0;) append_chunk(cursor, chunk, *pack);
    pack->slice_ptr.push_back(pack->chunk.size());
  }
  pack->lane_row = std::move(order);
  pack->lane_row.resize(slices * kRowTile, -1);
  pack->view = {a.rows,
                a.cols,
                slices,
                pack->lane_row.data(),
                pack->slice_ptr.data(),
                pack->chunk.data(),
                pack->step_ptr.data(),
                pack->byte_index.data()};
  return pack;
}

std::unique_ptr<TransposePack> make_transpose(const RowLists& a) {
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
  pack->plan = std::make_shared<Plan>(RowLists{a.cols, a.rows, indptr.data(), rows.data()});
  return pack;
}

std::unique_ptr<ColumnPack> make_columns(const RowGroups& a) {
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

const SlicePack& Plan::slices() const {
  return slices_.get([this] { return make_slices(lists_); });
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

std::shared_ptr<const Plan> make_plan(const RowLists& view) {
  return std::make_shared<const Plan>(view);
}
std::shared_ptr<const Plan> make_plan(const RowGroups& view) {
  return std::make_shared<const Plan>(view);
}
int64_t plan_nnz(const Plan& plan) { return plan.nnz(); }
int64_t plan_nbytes(const Plan& plan) { return plan.nbytes(); }

}  // namespace spfmt
