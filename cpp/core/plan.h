// Plan: an owned copy of a structure plus what the variants have made of it, built on first use.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "../cost/cost.h"
#include "fork.h"
#include "packed.h"
#include "spfmt.h"

namespace spfmt {

class Plan {
 public:
  explicit Plan(const Lists& lists);
  explicit Plan(const Groups& groups);
  // Lists that are another plan's, transposed: position p holds value source[p] of that plan.
  Plan(int64_t cols, std::vector<int64_t> indptr, std::vector<int32_t> col_indices,
       std::vector<int64_t> source, std::shared_ptr<PackedValues> values);

  Layout layout() const { return layout_; }
  int64_t rows() const { return layout_ == Layout::lists ? lists_.rows : groups_.rows; }
  int64_t cols() const { return layout_ == Layout::lists ? lists_.cols : groups_.cols; }
  int64_t nnz() const { return nnz_; }
  const Summary& summary() const { return summary_; }
  int64_t nbytes() const;

  const Lists& lists() const { return lists_; }
  const Groups& groups() const { return groups_; }
  // The plan that a product multiplies with: spmm_t of lists is spmm of the transposed lists.
  const Plan& oriented(Op op) const {
    return op == Op::spmm_t && layout_ == Layout::lists ? transposed() : *this;
  }
  // Null unless the plan is another's, transposed.
  const int64_t* source() const { return source_.empty() ? nullptr : source_.data(); }
  // Values in a variant's placement of `places` elements: reused, or filled by fill(T* packed,
  // const T* values) from those of the product. Whoever reads them holds the buffer.
  template <class T, class Fill>
  std::shared_ptr<const Buffer> packed(const void* variant, const Product& p, int64_t places,
                                       const Fill& fill) const {
    return values_->get({variant, source() != nullptr, p.values.dtype}, p, nnz_, sizeof(T) * places,
                        [&](const void* values, Buffer& buffer) {
                          fill(buffer.as<T>(), static_cast<const T*>(values));
                        });
  }

  // What a variant has made of the structure, by its type: make() builds it where it is not there.
  // A Pack has nbytes().
  template <class Pack, class Make>
  const Pack& made(const Make& make) const {
    const void* key = key_of<Pack>();
    if (const void* found = find(key)) return *static_cast<const Pack*>(found);
    const NoFork whole;
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (const void* found = find(key)) return *static_cast<const Pack*>(found);
    std::shared_ptr<const Pack> pack = make();
    const auto nbytes = [](const void* p) { return static_cast<const Pack*>(p)->nbytes(); };
    add({key, pack, nbytes, nullptr});
    return *pack;
  }

  // The same for images of one geometry, of which the plan keeps the last kMostShapes that were
  // used; `choice` tells apart what one type makes of one geometry.
  static constexpr size_t kMostShapes = 16;
  template <class Pack, class Make>
  std::shared_ptr<const Pack> shaped(const Geometry& geometry, int64_t choice,
                                     const Make& make) const {
    const NoFork whole;
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const void* key = key_of<Pack>();
    for (size_t i = shapes_.size(); i-- > 0;) {
      const Shaped& s = shapes_[i];
      if (s.key != key || s.choice != choice || !(s.geometry == geometry)) continue;
      std::rotate(shapes_.begin() + i, shapes_.begin() + i + 1, shapes_.end());
      return std::static_pointer_cast<const Pack>(shapes_.back().pack);
    }
    std::shared_ptr<const Pack> pack = make();
    if (shapes_.size() >= kMostShapes) shapes_.erase(shapes_.begin());
    shapes_.push_back({key, choice, geometry, pack, pack->nbytes()});
    return pack;
  }
  size_t shapes() const {
    const NoFork whole;
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    return shapes_.size();
  }

 private:
  struct Shaped {
    const void* key;
    int64_t choice;
    Geometry geometry;
    std::shared_ptr<const void> pack;
    int64_t nbytes;
  };
  struct Made {
    const void* key;
    std::shared_ptr<const void> pack;
    int64_t (*nbytes)(const void*);
    const Made* next;
  };
  template <class Pack>
  static const void* key_of() {
    static const char key = 0;
    return &key;
  }
  const void* find(const void* key) const {
    for (const Made* m = made_.load(std::memory_order_acquire); m != nullptr; m = m->next) {
      if (m->key == key) return m->pack.get();
    }
    return nullptr;
  }
  void add(Made made) const;  // the mutex is held
  const Plan& transposed() const;

  Layout layout_;
  int64_t nnz_;
  Summary summary_{};
  std::vector<int64_t> pointers_, source_;
  std::vector<int32_t> indices_;
  Lists lists_{};
  Groups groups_{};
  std::shared_ptr<PackedValues> values_;
  mutable std::recursive_mutex mutex_;  // what is made may need what another variant made
  mutable std::vector<std::unique_ptr<const Made>> owned_;
  mutable std::vector<Shaped> shapes_;  // last used last
  mutable std::atomic<const Made*> made_{nullptr};
};

}  // namespace spfmt
