// The part of ONNX Runtime's C API that the custom-op library uses, declared on our own: no
// package ships the headers, and the table of functions only ever grows at its end. Version 17 of
// the table is asked for, so ONNX Runtime 1.17 and every later release serve it.
//
// tests/test_ort_header.py compares every slot, field and constant with a real header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spfmt::ort {

constexpr uint32_t kApiVersion = 17;
// The version from which a runtime shows a tensor's shape instead of describing it in new memory.
constexpr uint32_t kShapesVersion = 24;

// Opaque to us: only pointers to these cross the boundary.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct TensorInfo;
struct OpAttr;
struct Value;

enum class ErrorCode : int { fail = 1, invalid_argument = 2, runtime_exception = 6 };
enum class ElementType : int { undefined = 0, f32 = 1, u16 = 4, i32 = 6, f64 = 11 };
enum class Characteristic : int { required = 0 };
enum class MemoryType : int { standard = 0 };
enum class OpAttrType : int { ints = 2 };

// OrtApi: the functions in use, each at its place in the table.
struct Api {
  Status* (*CreateStatus)(ErrorCode code, const char* message);
  void* unused_1[25];
  Status* (*CreateCustomOpDomain)(const char* domain, CustomOpDomain** out);
  Status* (*CustomOpDomain_Add)(CustomOpDomain*, const struct CustomOp*);
  Status* (*AddCustomOpDomain)(SessionOptions*, CustomOpDomain*);
  void* unused_29[22];
  Status* (*GetTensorMutableData)(Value*, void** out);
  void* unused_52[5];
  Status* (*CreateTensorTypeAndShapeInfo)(TensorInfo** out);
  Status* (*SetTensorElementType)(TensorInfo*, ElementType);
  Status* (*SetDimensions)(TensorInfo*, const int64_t* dims, size_t count);
  Status* (*GetTensorElementType)(const TensorInfo*, ElementType* out);
  Status* (*GetDimensionsCount)(const TensorInfo*, size_t* out);
  Status* (*GetDimensions)(const TensorInfo*, int64_t* dims, size_t count);
  Status* (*GetSymbolicDimensions)(const TensorInfo*, const char** names, size_t count);
  void* unused_64;
  Status* (*GetTensorTypeAndShape)(const Value*, TensorInfo** out);
  void* unused_66[20];
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo*, const char* name, int64_t* out);
  void* unused_87[3];
  Status* (*KernelContext_GetInput)(const KernelContext*, size_t index, const Value** out);
  Status* (*KernelContext_GetOutput)(KernelContext*, size_t index, const int64_t* dims,
                                     size_t count, Value** out);
  void* unused_92;
  void (*ReleaseStatus)(Status*);
  void* unused_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(TensorInfo*);
  void* unused_100[63];
  Status* (*KernelInfoGetAttributeArray_int64)(const KernelInfo*, const char* name, int64_t* out,
                                               size_t* count);
  void* unused_164[85];
  Status* (*KernelInfoGetConstantInput_tensor)(const KernelInfo*, size_t index, int* is_constant,
                                               const Value** out);
  void* unused_250[18];
  Status* (*ShapeInferContext_GetInputTypeShape)(const ShapeInferContext*, size_t index,
                                                 TensorInfo** out);
  Status* (*ShapeInferContext_GetAttribute)(const ShapeInferContext*, const char* name,
                                            const OpAttr** out);
  Status* (*ShapeInferContext_SetOutputTypeShape)(const ShapeInferContext*, size_t index,
                                                  const TensorInfo*);
  Status* (*SetSymbolicDimensions)(TensorInfo*, const char** names, size_t count);
  Status* (*ReadOpAttr)(const OpAttr*, OpAttrType, void* data, size_t bytes, size_t* out);
  void* unused_273;
  Status* (*KernelContext_ParallelFor)(const KernelContext*, void (*fn)(void*, size_t),
                                       size_t total, size_t num_batch, void* user_data);
  // From here on for runtimes of kShapesVersion only.
  void* unused_275[139];
  Status* (*GetTensorElementTypeAndShapeDataReference)(const Value*, ElementType* type,
                                                       const int64_t** dims, size_t* count);
};

// OrtApiBase.
struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// OrtCustomOp as of version 17. Later releases append fields and look at `version` before they read
// them; the null pointers behind are for a release that would forget to.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*) = nullptr;
  const char* (*GetName)(const CustomOp*) = nullptr;
  const char* (*GetExecutionProviderType)(const CustomOp*) = nullptr;
  ElementType (*GetInputType)(const CustomOp*, size_t index) = nullptr;
  size_t (*GetInputTypeCount)(const CustomOp*) = nullptr;
  ElementType (*GetOutputType)(const CustomOp*, size_t index) = nullptr;
  size_t (*GetOutputTypeCount)(const CustomOp*) = nullptr;
  void (*KernelCompute)(void* kernel, KernelContext*) = nullptr;
  void (*KernelDestroy)(void* kernel) = nullptr;
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t index) = nullptr;
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t index) = nullptr;
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t index) = nullptr;
  int (*GetVariadicInputMinArity)(const CustomOp*) = nullptr;
  int (*GetVariadicInputHomogeneity)(const CustomOp*) = nullptr;
  int (*GetVariadicOutputMinArity)(const CustomOp*) = nullptr;
  int (*GetVariadicOutputHomogeneity)(const CustomOp*) = nullptr;
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*,
                            void** kernel) = nullptr;
  Status* (*KernelComputeV2)(void* kernel, KernelContext*) = nullptr;
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*) = nullptr;
  int (*GetStartVersion)(const CustomOp*) = nullptr;
  int (*GetEndVersion)(const CustomOp*) = nullptr;
  void* later_fields[8] = {};
};

// X(function, slot): the places in OrtApi.
#define SPFMT_ORT_API_SLOTS(X)                 \
  X(CreateStatus, 0)                           \
  X(CreateCustomOpDomain, 26)                  \
  X(CustomOpDomain_Add, 27)                    \
  X(AddCustomOpDomain, 28)                     \
  X(GetTensorMutableData, 51)                  \
  X(CreateTensorTypeAndShapeInfo, 57)          \
  X(SetTensorElementType, 58)                  \
  X(SetDimensions, 59)                         \
  X(GetTensorElementType, 60)                  \
  X(GetDimensionsCount, 61)                    \
  X(GetDimensions, 62)                         \
  X(GetSymbolicDimensions, 63)                 \
  X(GetTensorTypeAndShape, 65)                 \
  X(KernelInfoGetAttribute_int64, 86)          \
  X(KernelContext_GetInput, 90)                \
  X(KernelContext_GetOutput, 91)               \
  X(ReleaseStatus, 93)                         \
  X(ReleaseTensorTypeAndShapeInfo, 99)         \
  X(KernelInfoGetAttributeArray_int64, 163)    \
  X(KernelInfoGetConstantInput_tensor, 249)    \
  X(ShapeInferContext_GetInputTypeShape, 268)  \
  X(ShapeInferContext_GetAttribute, 269)       \
  X(ShapeInferContext_SetOutputTypeShape, 270) \
  X(SetSymbolicDimensions, 271)                \
  X(ReadOpAttr, 272)                           \
  X(KernelContext_ParallelFor, 274)

// Those that kShapesVersion added.
#define SPFMT_ORT_SHAPES_SLOTS(X) X(GetTensorElementTypeAndShapeDataReference, 414)

// X(field): the fields of OrtCustomOp, in order.
#define SPFMT_ORT_CUSTOM_OP_FIELDS(X) \
  X(version)                          \
  X(CreateKernel)                     \
  X(GetName)                          \
  X(GetExecutionProviderType)         \
  X(GetInputType)                     \
  X(GetInputTypeCount)                \
  X(GetOutputType)                    \
  X(GetOutputTypeCount)               \
  X(KernelCompute)                    \
  X(KernelDestroy)                    \
  X(GetInputCharacteristic)           \
  X(GetOutputCharacteristic)          \
  X(GetInputMemoryType)               \
  X(GetVariadicInputMinArity)         \
  X(GetVariadicInputHomogeneity)      \
  X(GetVariadicOutputMinArity)        \
  X(GetVariadicOutputHomogeneity)     \
  X(CreateKernelV2)                   \
  X(KernelComputeV2)                  \
  X(InferOutputShapeFn)               \
  X(GetStartVersion)                  \
  X(GetEndVersion)

#define SPFMT_ORT_CHECK_SLOT(function, slot) \
  static_assert(offsetof(Api, function) == slot * sizeof(void*), #function);
SPFMT_ORT_API_SLOTS(SPFMT_ORT_CHECK_SLOT)
SPFMT_ORT_SHAPES_SLOTS(SPFMT_ORT_CHECK_SLOT)
#undef SPFMT_ORT_CHECK_SLOT

}  // namespace spfmt::ort
