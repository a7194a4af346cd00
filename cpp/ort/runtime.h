// ONNX Runtime as the operators use it: failures, descriptions of tensors, attributes, constants.
// No exception leaves a callback: every one becomes a Status.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ort_api.h"
#include "structure.h"

namespace spfmt::ort {

// The functions of one ONNX Runtime in this process.
struct Runtime {
  const Api* api;
  bool shows_shapes;  // has those of kShapesVersion

  bool operator<(const Runtime& other) const {
    return std::pair(api, shows_shapes) < std::pair(other.api, other.shows_shapes);
  }
};

// A failure that ONNX Runtime reported, on its way back to it.
struct Failure {
  Status* status;
};

inline void check(Status* status) {
  if (status != nullptr) throw Failure{status};
}

// Without allocating: this also reports that memory ran out.
Status* report(const Api& api, ErrorCode code, const char* op, const char* what) noexcept;

// Runs `body` for the operator `op` and turns whatever it throws into a status.
template <class Body>
Status* guarded(const Api& api, const char* op, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::invalid_argument& error) {
    return report(api, ErrorCode::invalid_argument, op, error.what());
  } catch (const std::bad_alloc&) {
    return report(api, ErrorCode::runtime_exception, op, "out of memory");
  } catch (const std::exception& error) {
    return report(api, ErrorCode::fail, op, error.what());
  } catch (...) {
    return report(api, ErrorCode::fail, op, "unknown error");
  }
}

// ONNX Runtime's description of a tensor; released on leaving where we own it.
class Info {
 public:
  static Info of(const Api& api, const Value* value);
  static Info input(const Api& api, const ShapeInferContext* context, size_t index);
  static Info create(const Api& api);
  Info(const Info&) = delete;
  Info& operator=(const Info&) = delete;
  ~Info() {
    if (owned_) api_.ReleaseTensorTypeAndShapeInfo(info_);
  }

  TensorInfo* get() const { return info_; }
  ElementType type() const;
  std::vector<int64_t> shape() const;      // -1 where a size is unknown; empty where the rank is
  std::vector<const char*> names() const;  // of sizes that have one, else ""

 private:
  Info(const Api& api, TensorInfo* info, bool owned) : api_(api), info_(info), owned_(owned) {}

  const Api& api_;
  TensorInfo* info_;
  bool owned_;
};

// Tells that the output of a node has the type of `x`, this shape, and these names of sizes, "" for
// none.
void infer(const Api& api, const ShapeInferContext* context, const Info& x,
           const std::vector<int64_t>& shape, std::vector<const char*> names);

// The C API lacks a way to read a const tensor; nothing here writes through the result.
const void* data_of(const Api& api, const Value* value);

// Throws std::invalid_argument where the input is no constant.
Tensor constant_input(const Api& api, const KernelInfo* node, size_t index, const char* name);

// An integer attribute in [least, most], or one of `count` integers; std::invalid_argument where it
// is missing or another.
int64_t attribute(const Api& api, const KernelInfo* node, const char* name, int64_t least,
                  int64_t most);
std::vector<int64_t> attributes(const Api& api, const KernelInfo* node, const char* name,
                                size_t count, int64_t least, int64_t most);

// The same while shapes are inferred: empty where attributes() would throw.
std::vector<int64_t> known_attributes(const Api& api, const ShapeInferContext* context,
                                      const char* name, size_t count, int64_t least, int64_t most);

}  // namespace spfmt::ort
