#include "packed.h"

#include <atomic>
#include <cstring>

namespace spfmt {

PackedValues::Content PackedValues::compared(const void* values, size_t bytes) {
  std::shared_ptr<const Buffer> copy;
  int64_t number = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    copy = copy_;
    number = comparisons_;
  }
  // Outside the lock: threads that share a weight compare it side by side.
  if (!copy || copy->bytes() != bytes || std::memcmp(copy->as<void>(), values, bytes) != 0) {
    auto fresh = std::make_shared<Buffer>(bytes);
    std::memcpy(fresh->as<void>(), values, bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    copy_ = copy = std::move(fresh);
    number = ++comparisons_;
  }
  return {copy->as<void>(), number, false, copy};
}

PackedValues::Entry& PackedValues::find(const PackedKey& key) {
  for (Entry& entry : entries_) {
    if (entry.key == key) return entry;
  }
  entries_.push_back({key, nullptr});
  return entries_.back();
}

Buffer& PackedValues::renew(Entry& entry, size_t bytes) {
  entry.number = -1;
  const bool fits = entry.buffer && entry.buffer->bytes() == bytes;
  if (!fits || entry.buffer.use_count() > 1) entry.buffer = std::make_shared<Buffer>(bytes);
  // use_count() does not wait for the last reads of who let go of the buffer; this does.
  std::atomic_thread_fence(std::memory_order_acquire);
  return *entry.buffer;
}

int64_t PackedValues::nbytes() const {
  const NoFork whole;
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = copy_ ? static_cast<int64_t>(copy_->bytes()) : 0;
  for (const Entry& entry : entries_) {
    if (entry.buffer) total += static_cast<int64_t>(entry.buffer->bytes());
  }
  return total;
}

}  // namespace spfmt
