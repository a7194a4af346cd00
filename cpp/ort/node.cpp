#include "node.h"

#include <algorithm>

namespace spfmt::ort {

std::atomic<Listener> listener{nullptr};

// ----------------------------------------------------------------------------------- operators

namespace {

const SparseOp& self(const CustomOp* op) { return *static_cast<const SparseOp*>(op); }

Status* create(const CustomOp* op, const Api* api, const KernelInfo* node, void** kernel) noexcept {
  return guarded(*api, self(op).name.c_str(),
                 [&] { *kernel = self(op).kind->make(self(op), node).release(); });
}

Status* compute(void* kernel, KernelContext* context) noexcept {
  const Node& node = *static_cast<const Node*>(kernel);
  return guarded(node.api(), node.name(), [&] { node.compute(context); });
}

Status* infer_shape(const CustomOp* op, ShapeInferContext* context) noexcept {
  return guarded(*self(op).runtime.api, self(op).name.c_str(),
                 [&] { self(op).kind->infer(self(op), context); });
}

// Indices of any type match here: the kernel says which it expected when it is created. (All inputs
// of any type would need no variant per type, but ONNX Runtime before 1.21 cannot infer Y's then.)
ElementType input_type(const CustomOp* op, size_t index) {
  const bool indices = index > 1 && index < self(op).bias_index();
  return indices ? ElementType::undefined : self(op).type;
}

}  // namespace

SparseOp::SparseOp(const Runtime& provider, const Structure& described, const Kind& does,
                   const Fused& fused, ElementType element_type)
    : runtime(provider),
      structure(&described),
      kind(&does),
      activation(fused.activation),
      name(std::string(described.name) + does.name + fused.suffix),
      type(element_type) {
  GetName = [](const CustomOp* o) { return self(o).name.c_str(); };
  GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  GetInputType = input_type;
  GetInputTypeCount = [](const CustomOp* o) { return self(o).input_count(); };
  GetOutputType = [](const CustomOp* o, size_t) { return self(o).type; };
  GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  GetInputCharacteristic = [](const CustomOp*, size_t) { return Characteristic::required; };
  GetOutputCharacteristic = [](const CustomOp*, size_t) { return Characteristic::required; };
  GetInputMemoryType = [](const CustomOp*, size_t) { return MemoryType::standard; };
  GetVariadicInputMinArity = [](const CustomOp*) { return 0; };
  GetVariadicInputHomogeneity = [](const CustomOp*) { return 0; };
  GetVariadicOutputMinArity = [](const CustomOp*) { return 0; };
  GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  CreateKernelV2 = create;
  KernelComputeV2 = compute;
  KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  InferOutputShapeFn = infer_shape;
  GetStartVersion = [](const CustomOp*) { return kDomainVersion; };
  GetEndVersion = [](const CustomOp*) { return kDomainVersion; };
}

// --------------------------------------------------------------------------------------- nodes

Node::Node(const SparseOp& op, const KernelInfo* node, int64_t rows, int64_t cols)
    : api_(*op.runtime.api), op_(op), rows_(rows), cols_(cols) {
  Constants constants{rows, cols, {}};
  const auto& names = op.structure->inputs;
  for (size_t i = 0; i < names.size(); ++i) {
    constants.inputs.push_back(constant_input(api_, node, i + 1, names[i]));
  }
  const Tensor& values = constants.inputs[0];
  const Tensor bias = constant_input(api_, node, op.bias_index(), "bias");
  if (bias.shape != std::vector<int64_t>{rows} || bias.type != values.type) {
    throw std::invalid_argument("bias: expected " + std::to_string(rows) +
                                " elements of the type of values");
  }
  if (values.type != ElementType::f32 && values.type != ElementType::f64) {
    throw std::invalid_argument(
        "values: expected float32 or float64; open the model without this library to run its "
        "standard operators");
  }
  if (values.shape.size() != 1) throw std::invalid_argument("values: expected one dimension");
  dtype_ = values.type == ElementType::f32 ? DType::f32 : DType::f64;
  isa_ = active_isa();
  plan_ = op.structure->read(constants);
  values_ = values.data;
  bias_ = bias.data;
}

// Where the runtime must describe it in new memory, that takes longer than a small
// product.
Node::Input Node::operand(const KernelContext* context, size_t index, const char* name) const {
  const auto check_type = [&](ElementType type) {
    const ElementType wanted = dtype_ == DType::f32 ? ElementType::f32 : ElementType::f64;
    if (type != wanted) {
      throw std::invalid_argument(std::string(name) + ": expected the type of values");
    }
  };
  const Value* x = nullptr;
  check(api_.KernelContext_GetInput(context, index, &x));
  if (!op_.runtime.shows_shapes) {
    const Info info = Info::of(api_, x);
    check_type(info.type());
    return {x, info.shape()};
  }
  ElementType type = ElementType::undefined;
  const int64_t* dims = nullptr;
  size_t rank = 0;
  check(api_.GetTensorElementTypeAndShapeDataReference(x, &type, &dims, &rank));
  check_type(type);
  return {x, {dims, dims + rank}};
}

void* Node::result(KernelContext* context, const std::vector<int64_t>& shape) const {
  Value* y = nullptr;
  check(api_.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &y));
  return const_cast<void*>(data_of(api_, y));
}

Product Node::product(const void* values, const void* bias) const {
  Product p;
  p.values = {const_cast<void*>(values), dtype_, plan_nnz(*plan_)};  // sddmm alone writes
  p.constant = kConstantValues;
  p.bias = {const_cast<void*>(bias), dtype_, rows_};
  p.activation = op_.activation;
  return p;
}

Product Node::product() const { return product(values_, bias_); }

Product Node::product(const KernelContext* context) const {
  return product(input(context, 1), input(context, op_.bias_index()));
}

const void* Node::input(const KernelContext* context, size_t index) const {
  const Value* value = nullptr;
  check(api_.KernelContext_GetInput(context, index, &value));
  return data_of(api_, value);
}

void Node::run_on(KernelContext* context, const Product& p) const {
  const Work work{Op::spmm, p.in.cols, dtype_, true, p.geometry};
  Pool pool{api_, context};
  const int threads = threads_for(work, pool);
  tell(work, threads);
  run(isa_, *plan_, p, pool.executor(threads));
}

// A plan for more threads than the session has would be one for another machine. They are counted
// at the first products that would take more than one: more than once where some are missing, for
// another run or program may have kept them.
int Node::threads_for(const Work& work, Pool& pool) const {
  constexpr int kMostCounts = 4;
  const int known = threads_.load(std::memory_order_relaxed), most = Pool::threads_of_machine();
  if (known == most || counts_.load(std::memory_order_relaxed) >= kMostCounts) return known;
  const bool comparable = work.geometry == nullptr;  // a batch of images says nothing of their size
  if (comparable && work.batch <= serial_batch_.load(std::memory_order_relaxed)) return 1;
  if (choose(isa_, *plan_, work, most).threads == 1) {
    if (comparable) serial_batch_.store(work.batch, std::memory_order_relaxed);
    return 1;
  }
  const std::unique_lock<std::mutex> lock(counting_, std::try_to_lock);
  if (!lock) return known;
  const int found = std::max(known, pool.count_threads());
  threads_.store(found, std::memory_order_relaxed);
  counts_.fetch_add(1, std::memory_order_relaxed);
  return found;
}

void Node::tell(const Work& work, int threads) const {
  const Listener hears = listener.load(std::memory_order_acquire);
  if (hears == nullptr) return;
  const Choice choice = choose(isa_, *plan_, work, threads);
  hears(name(), name_of(choice.isa), choice.variant->name, choice.threads);
}

}  // namespace spfmt::ort
