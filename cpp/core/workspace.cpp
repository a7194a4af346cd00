#include "workspace.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace spfmt {
namespace {

// What one thread has lent and got back, oldest first. No lock, so a forked child finds none held.
class Kept {
 public:
  // The latest buffer that fits without wasting half of itself, or null.
  std::unique_ptr<Buffer> take(size_t bytes) {
    for (size_t i = buffers_.size(); i-- > 0;) {
      if (buffers_[i]->bytes() < bytes || buffers_[i]->bytes() > 2 * bytes) continue;
      std::unique_ptr<Buffer> found = std::move(buffers_[i]);
      buffers_.erase(buffers_.begin() + i);
      bytes_ -= found->bytes();
      return found;
    }
    return nullptr;
  }
  void put(std::unique_ptr<Buffer> buffer) {
    if (buffer->bytes() > Workspace::kKeptBytes) return;  // or it would push all others out
    bytes_ += buffer->bytes();
    buffers_.push_back(std::move(buffer));
    while (bytes_ > Workspace::kKeptBytes || buffers_.size() > kMost) {
      bytes_ -= buffers_.front()->bytes();
      buffers_.erase(buffers_.begin());
    }
  }

 private:
  static constexpr size_t kMost = 8;
  std::vector<std::unique_ptr<Buffer>> buffers_ = reserved();
  size_t bytes_ = 0;

  // put() runs in a destructor and must not throw.
  static std::vector<std::unique_ptr<Buffer>> reserved() {
    std::vector<std::unique_ptr<Buffer>> buffers;
    buffers.reserve(kMost + 1);
    return buffers;
  }
};

thread_local Kept kept;

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  // Streaming from memory, half of the time goes into small pages: prefetchers stop at each.
  constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
  if (bytes > PTRDIFF_MAX) throw std::bad_alloc();  // rounded up, it could begin at 0 again
  const size_t unit = bytes < 2 * kHugePage ? kLine : kHugePage;
  const size_t whole = (bytes / unit + 1) * unit;
  // Aligned by hand: malloc hands out what was freed last. aligned_alloc takes longer to find a few
  // bytes, and asks the system for new pages at every call for a few megabytes.
  owned_ = std::malloc(whole + unit);
  if (owned_ == nullptr) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(owned_);
  data_ = static_cast<char*>(owned_) + (unit - address % unit) % unit;
  if (unit == kHugePage) madvise(data_, whole, MADV_HUGEPAGE);  // advice: a refusal does no harm
}
Buffer::~Buffer() { std::free(owned_); }

Workspace::Workspace(size_t bytes) : buffer_(kept.take(bytes)) {
  if (!buffer_) buffer_ = std::make_unique<Buffer>(bytes);
}
Workspace::~Workspace() { kept.put(std::move(buffer_)); }

}  // namespace spfmt
