// Packed values: a variant's private placement of a plan's values, reused only where it is certain
// that they are unchanged.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "fork.h"
#include "spfmt.h"
#include "workspace.h"

namespace spfmt {

// Which placement. Values live on the CPU so far; a device would be another field.
struct PackedKey {
  const void* variant;
  bool transposed;
  DType dtype;

  bool operator==(const PackedKey& other) const {
    return variant == other.variant && transposed == other.transposed && dtype == other.dtype;
  }
};

// The packed copies of one plan's values, shared with its transposed plan.
//
// Values whose owner promises that they are constant are known by the number of that promise. All
// others are compared whole, at the speed of memory, with the copy that was packed last; a sample
// of them, a version counter or an address would be no certainty. Readers hold the buffer they were
// given, so a refresh from another thread never changes it under them.
class PackedValues {
 public:
  // fill(const void* values, Buffer&) packs where there is no placement of these values.
  template <class Fill>
  std::shared_ptr<const Buffer> get(const PackedKey& key, const Product& p, int64_t nnz,
                                    size_t bytes, const Fill& fill) {
    const NoFork whole;
    const Content content = p.constant < 0 ? compared(p.values.data, nnz * size_of(p.values.dtype))
                                           : Content{p.values.data, p.constant, true, nullptr};
    const std::lock_guard<std::mutex> lock(mutex_);
    Entry& entry = find(key);
    if (entry.holds(content, bytes)) return entry.buffer;
    Buffer& fresh = renew(entry, bytes);
    fill(content.data, fresh);
    entry.number = content.number;
    entry.constant = content.constant;
    return entry.buffer;
  }
  int64_t nbytes() const;

 private:
  // What is to be packed, and the number by which it is known: a promise, or of a comparison.
  struct Content {
    const void* data;
    int64_t number;
    bool constant;
    std::shared_ptr<const Buffer> copy;  // keeps `data`
  };
  struct Entry {
    PackedKey key;
    std::shared_ptr<Buffer> buffer;
    int64_t number = -1;
    bool constant = false;

    bool holds(const Content& content, size_t bytes) const {
      return number == content.number && constant == content.constant && buffer &&
             buffer->bytes() == bytes;
    }
  };

  Content compared(const void* values, size_t bytes);
  Entry& find(const PackedKey& key);
  // A buffer that no reader holds, of no content; the mutex is held.
  static Buffer& renew(Entry& entry, size_t bytes);

  mutable std::mutex mutex_;
  std::vector<Entry> entries_;  // two or three
  std::shared_ptr<const Buffer> copy_;
  int64_t comparisons_ = 0;  // content that differed from the one before
};

}  // namespace spfmt
