#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <cstdio>

namespace spfmt::ort {

Status* report(const Api& api, ErrorCode code, const char* op, const char* what) noexcept {
  char message[512];
  std::snprintf(message, sizeof(message), "spfmt::%s: %s", op, what);
  return api.CreateStatus(code, message);
}

Info Info::of(const Api& api, const Value* value) {
  TensorInfo* info = nullptr;
  check(api.GetTensorTypeAndShape(value, &info));
  return Info(api, info, true);
}

Info Info::input(const Api& api, const ShapeInferContext* context, size_t index) {
  TensorInfo* info = nullptr;
  check(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  return Info(api, info, false);
}

Info Info::create(const Api& api) {
  TensorInfo* info = nullptr;
  check(api.CreateTensorTypeAndShapeInfo(&info));
  return Info(api, info, true);
}

ElementType Info::type() const {
  ElementType type = ElementType::undefined;
  check(api_.GetTensorElementType(info_, &type));
  return type;
}

std::vector<int64_t> Info::shape() const {
  size_t rank = 0;
  check(api_.GetDimensionsCount(info_, &rank));
  std::vector<int64_t> shape(rank);
  check(api_.GetDimensions(info_, shape.data(), rank));
  return shape;
}

std::vector<const char*> Info::names() const {
  size_t rank = 0;
  check(api_.GetDimensionsCount(info_, &rank));
  std::vector<const char*> names(rank);
  check(api_.GetSymbolicDimensions(info_, names.data(), rank));
  return names;
}

void infer(const Api& api, const ShapeInferContext* context, const Info& x,
           const std::vector<int64_t>& shape, std::vector<const char*> names) {
  // ONNX Runtime would take an unknown size without a name for the number -1, and warn at each run
  // of a size that differs. No two get the same name, for that would say that they are equal.
  static std::atomic<uint64_t> unknown{0};
  std::vector<std::string> fresh(names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    if (shape[i] >= 0 || *names[i] != '\0') continue;
    fresh[i] = "spfmt_size_" + std::to_string(unknown.fetch_add(1));
    names[i] = fresh[i].c_str();
  }
  const Info y = Info::create(api);
  check(api.SetTensorElementType(y.get(), x.type()));
  check(api.SetDimensions(y.get(), shape.data(), shape.size()));
  check(api.SetSymbolicDimensions(y.get(), names.data(), names.size()));
  check(api.ShapeInferContext_SetOutputTypeShape(context, 0, y.get()));
}

const void* data_of(const Api& api, const Value* value) {
  void* data = nullptr;
  check(api.GetTensorMutableData(const_cast<Value*>(value), &data));
  return data;
}

Tensor constant_input(const Api& api, const KernelInfo* node, size_t index, const char* name) {
  int is_constant = 0;
  const Value* value = nullptr;
  check(api.KernelInfoGetConstantInput_tensor(node, index, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) {
    throw std::invalid_argument(std::string(name) +
                                ": expected a constant (an initializer of the model)");
  }
  const Info info = Info::of(api, value);
  return {info.type(), info.shape(), data_of(api, value)};
}

namespace {

// Releases what a question was answered with; whether the answer was no error.
bool succeeded(const Api& api, Status* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

int64_t within(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return value;
  throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) + ", expected " +
                              std::to_string(least) + " to " + std::to_string(most));
}

}  // namespace

int64_t attribute(const Api& api, const KernelInfo* node, const char* name, int64_t least,
                  int64_t most) {
  int64_t value = 0;
  if (!succeeded(api, api.KernelInfoGetAttribute_int64(node, name, &value))) {
    throw std::invalid_argument(std::string("got no integer attribute ") + name);
  }
  return within(name, value, least, most);
}

std::vector<int64_t> attributes(const Api& api, const KernelInfo* node, const char* name,
                                size_t count, int64_t least, int64_t most) {
  size_t found = 0;
  std::vector<int64_t> values(count);
  if (!succeeded(api, api.KernelInfoGetAttributeArray_int64(node, name, nullptr, &found)) ||
      found != count ||
      !succeeded(api, api.KernelInfoGetAttributeArray_int64(node, name, values.data(), &found))) {
    throw std::invalid_argument(std::string(name) + ": expected an attribute of " +
                                std::to_string(count) + " integers");
  }
  for (const int64_t value : values) within(name, value, least, most);
  return values;
}

std::vector<int64_t> known_attributes(const Api& api, const ShapeInferContext* context,
                                      const char* name, size_t count, int64_t least, int64_t most) {
  const OpAttr* attribute = nullptr;
  std::vector<int64_t> values(count);
  size_t bytes = 0;
  const size_t wanted = count * sizeof(int64_t);
  if (!succeeded(api, api.ShapeInferContext_GetAttribute(context, name, &attribute)) ||
      attribute == nullptr ||
      !succeeded(api, api.ReadOpAttr(attribute, OpAttrType::ints, values.data(), wanted, &bytes)) ||
      bytes != wanted) {
    return {};
  }
  const auto fits = [&](int64_t value) { return value >= least && value <= most; };
  return std::all_of(values.begin(), values.end(), fits) ? values : std::vector<int64_t>{};
}

}  // namespace spfmt::ort
