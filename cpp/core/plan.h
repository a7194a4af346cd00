// Plan: an owned copy of a structure plus the kernels' private layouts of it, built on first use.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "../cost/cost.h"
#include "spfmt.h"
#include "bodies.h"
#include "workspace.h"

namespace spfmt {

// A private copy of a plan's values in some kernel's order. One entry: training alternates between
// "new values" and "the same values again", nothing else. Readers hold the buffer they were given,
// so a refresh from another thread never changes it under them.
class ValueCache {
 public:
  // fill(Buffer&) packs the values where no copy of this version is kept. A template, as below:
  // std::function would allocate at every product.
  template <class Fill>
  std::shared_ptr<const Buffer> get(int64_t version, size_t bytes, const Fill& fill) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (version != kNoVersion && version == version_ && buffer_->bytes() == bytes) return buffer_;
    Buffer& fresh = renew(bytes);
    fill(fresh);
    version_ = version;
    return buffer_;
  }
  size_t nbytes() const;

 private:
  // A buffer that no reader holds, of no version; the mutex is held.
  Buffer& renew(size_t bytes) const;

  mutable std::mutex mutex_;
  mutable int64_t version_ = kNoVersion;
  mutable std::shared_ptr<Buffer> buffer_;
};

// Built once, on first use, by whoever comes first.
template <class T>
class Lazy {
 public:
  template <class Make>
  const T& get(const Make& make) const {
    if (const T* ready = peek()) return *ready;
    std::call_once(once_, [&] {
      value_ = make();
      ready_.store(value_.get(), std::memory_order_release);
    });
    return *value_;
  }
  // Null until it is built; another thread may be building it right now.
  const T* peek() const { return ready_.load(std::memory_order_acquire); }

 private:
  mutable std::once_flag once_;
  mutable std::unique_ptr<T> value_;
  mutable std::atomic<const T*> ready_{nullptr};
};

struct SlicePack {
  std::vector<int32_t> lane_row;
  std::vector<int64_t> slice_ptr;
  std::unique_ptr<Buffer> block, code;
  RowSlices view;
  ValueCache values;
  // Places for values, padding included.
  int64_t packed() const { return slice_ptr.back() * view.steps * kRowTile; }
  int64_t nbytes() const;
};

// Nonzeros [start, stop) of the lists, all of one row of a chunk.
struct OctetPiece {
  int64_t start, stop;
  uint16_t row;
};

struct OctetPack {
  std::vector<int64_t> quad_ptr, step_ptr;
  std::vector<uint16_t> row, offset;
  std::vector<OctetPiece> piece;  // four per quad
  RowOctets view;
  ValueCache values;
  // Places for values, padding included.
  int64_t packed() const { return static_cast<int64_t>(offset.size()); }
  int64_t nbytes() const;
};

struct TilePack {
  std::vector<int64_t> base, piece_ptr, visit_ptr;
  std::vector<RowPiece> piece;
  std::vector<uint16_t> col;
  RowTiles view;
  ValueCache values;
  int64_t chunks() const { return static_cast<int64_t>(base.size()); }
  int64_t nbytes() const;
};
std::unique_ptr<TilePack> make_tile_pack(const Lists& a);

// The transposed matrix as Lists: its value p is value source[p] of the original.
struct TransposePack {
  std::vector<int64_t> source;
  std::shared_ptr<const Plan> plan;
};

struct ColumnPack {
  std::vector<int64_t> col_ptr, entry_value;
  std::vector<int32_t> entry_tile;
  ColumnEntries view;
};

class Plan {
 public:
  explicit Plan(const Lists& view);
  explicit Plan(const Groups& view);

  Layout layout() const { return layout_; }
  int64_t rows() const { return layout_ == Layout::lists ? lists_.rows : groups_.rows; }
  int64_t cols() const { return layout_ == Layout::lists ? lists_.cols : groups_.cols; }
  int64_t nnz() const { return nnz_; }
  const Summary& summary() const { return summary_; }
  int64_t nbytes() const;

  const Lists& lists() const { return lists_; }
  const Groups& groups() const { return groups_; }
  // `widest`: columns of the widest window that the caller's kernels look up.
  const SlicePack& slices(int widest, const Executor& executor) const;
  const OctetPack& octets() const;
  const TilePack& tiles() const;
  const TransposePack& transpose() const;
  const ColumnPack& columns() const;

 private:
  Layout layout_;
  int64_t nnz_;
  Summary summary_{};
  std::vector<int64_t> pointers_;
  std::vector<int32_t> indices_;
  Lists lists_{};
  Groups groups_{};
  Lazy<SlicePack> slices_[2];  // windows of 32 columns; of up to 64
  Lazy<OctetPack> octets_;
  Lazy<TilePack> tiles_;
  Lazy<TransposePack> transpose_;
  Lazy<ColumnPack> columns_;
};

}  // namespace spfmt
