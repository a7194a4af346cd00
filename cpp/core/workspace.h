// Memory of the core: owned buffers, and workspace that running products borrow.
#pragma once

#include <cstddef>
#include <memory>

namespace spfmt {

// 64-byte aligned, uninitialised memory. Throws std::bad_alloc.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void *data_, *owned_;  // `owned_` is what free() takes
  size_t bytes_;
};

// A Buffer of at least `bytes` for the duration of a product. The thread keeps what it lent last,
// up to kKeptBytes, for its next product: to return a megabyte to the operating system and fault it
// in again costs more than a small product takes. A Workspace dies on the thread that made it.
class Workspace {
 public:
  static constexpr size_t kKeptBytes = size_t{32} << 20;

  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  template <class T>
  T* as() const {
    return buffer_->as<T>();
  }

 private:
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace spfmt
