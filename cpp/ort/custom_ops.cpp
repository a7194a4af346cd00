// The custom-op library: one ONNX operator per layout on top of the core, running on ONNX Runtime's
// own threads. No exception leaves a callback: every one becomes an OrtStatus.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdio>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "../core/variant.h"
#include "../core/workspace.h"
#include "ort_api.h"
#include "structure.h"

namespace spfmt::ort {
namespace {

constexpr const char* kDomain = "spfmt";
constexpr int kDomainVersion = 1;
// A kernel's values never change: packed copies of them are made once.
constexpr int64_t kConstantValues = 0;

// Hears of every run while one is set: how the cost model chose to run it.
using Listener = void (*)(const char* op, const char* isa, const char* variant, int threads);
std::atomic<Listener> listener{nullptr};

// A failure that ONNX Runtime reported, on its way back to it.
struct Failure {
  Status* status;
};

void check(Status* status) {
  if (status != nullptr) throw Failure{status};
}

// Without allocating: this also reports that memory ran out.
Status* report(const Api& api, ErrorCode code, const char* op, const char* what) noexcept {
  char message[512];
  std::snprintf(message, sizeof(message), "spfmt::%s: %s", op, what);
  return api.CreateStatus(code, message);
}

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
  static Info of(const Api& api, const Value* value) {
    TensorInfo* info = nullptr;
    check(api.GetTensorTypeAndShape(value, &info));
    return Info(api, info, true);
  }
  static Info input(const Api& api, const ShapeInferContext* context, size_t index) {
    TensorInfo* info = nullptr;
    check(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
    return Info(api, info, false);
  }
  static Info create(const Api& api) {
    TensorInfo* info = nullptr;
    check(api.CreateTensorTypeAndShapeInfo(&info));
    return Info(api, info, true);
  }
  Info(const Info&) = delete;
  Info& operator=(const Info&) = delete;
  ~Info() {
    if (owned_) api_.ReleaseTensorTypeAndShapeInfo(info_);
  }

  TensorInfo* get() const { return info_; }
  ElementType type() const {
    ElementType type = ElementType::undefined;
    check(api_.GetTensorElementType(info_, &type));
    return type;
  }
  std::vector<int64_t> shape() const {
    size_t rank = 0;
    check(api_.GetDimensionsCount(info_, &rank));
    std::vector<int64_t> shape(rank);
    check(api_.GetDimensions(info_, shape.data(), rank));
    return shape;
  }

 private:
  Info(const Api& api, TensorInfo* info, bool owned) : api_(api), info_(info), owned_(owned) {}

  const Api& api_;
  TensorInfo* info_;
  bool owned_;
};

// The C API lacks a way to read a const tensor; nothing here writes through the result.
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

int64_t attribute(const Api& api, const KernelInfo* node, const char* name) {
  int64_t value = 0;
  if (Status* status = api.KernelInfoGetAttribute_int64(node, name, &value)) {
    api.ReleaseStatus(status);
    throw std::invalid_argument(std::string("got no integer attribute ") + name);
  }
  return value;
}

int64_t extent(const Api& api, const KernelInfo* node, const char* name) {
  const int64_t value = attribute(api, node, name);
  if (value < 0 || value > INT32_MAX) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                ", expected a size in [0, 2^31)");
  }
  return value;
}

// One run of a node: lends ONNX Runtime's threads to the core.
struct Pool {
  const Api& api;
  const KernelContext* context;

  Executor executor(int threads) { return {threads, this, for_each}; }

  // The session's threads, as far as the machine has as many. ONNX Runtime does not tell: so many
  // bodies meet, each on a thread of its own, as arrive within half a millisecond.
  int count_threads() {
    struct Meeting {
      std::mutex mutex;
      std::vector<std::thread::id> present;
      const std::chrono::steady_clock::time_point end =
          std::chrono::steady_clock::now() + std::chrono::microseconds(500);

      size_t join() {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto me = std::this_thread::get_id();
        if (std::find(present.begin(), present.end(), me) == present.end()) present.push_back(me);
        return present.size();
      }
    } meeting;
    const int most = threads_of_machine();
    meeting.present.reserve(most);  // no body may throw
    const auto body = [](void* arg, int64_t) {
      Meeting& meeting = *static_cast<Meeting*>(arg);
      const auto all = static_cast<size_t>(threads_of_machine());
      while (meeting.join() < all && std::chrono::steady_clock::now() < meeting.end) {
        std::this_thread::yield();
      }
    };
    for_each(this, most, body, &meeting);
    return static_cast<int>(meeting.present.size());
  }

  static int threads_of_machine() {
    // Asking costs microseconds, more than a small product: a system call or a file under /sys.
    static const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    return threads;
  }

  static void for_each(void* self, int64_t n, void (*body)(void*, int64_t), void* arg) {
    struct Call {
      void (*body)(void*, int64_t);
      void* arg;
    } call{body, arg};
    const auto one = [](void* user, size_t i) {
      const Call& c = *static_cast<Call*>(user);
      c.body(c.arg, static_cast<int64_t>(i));
    };
    const Pool& pool = *static_cast<Pool*>(self);
    // Thrown at once: else layouts and values half packed would be kept for the requests to come.
    check(pool.api.KernelContext_ParallelFor(pool.context, one, static_cast<size_t>(n), 0, &call));
  }
};

// The activations that operators fuse, each under a name of its own: an attribute would be ignored
// by a library that does not know it.
struct Fused {
  Activation activation;
  const char* suffix;
};
constexpr Fused kFused[] = {
    {Activation::none, ""},     {Activation::relu, "Relu"},
    {Activation::gelu, "Gelu"}, {Activation::gelu_tanh, "GeluTanh"},
    {Activation::silu, "Silu"},
};

// The functions of one ONNX Runtime in this process.
struct Runtime {
  const Api* api;
  bool shows_shapes;  // has those of kShapesVersion

  bool operator<(const Runtime& other) const {
    return std::pair(api, shows_shapes) < std::pair(other.api, other.shows_shapes);
  }
};

// An operator as ONNX Runtime sees it, for one activation and one type of X, values, bias and Y.
struct LinearOp : CustomOp {
  Runtime runtime;
  const Operator* op;
  Activation activation;
  std::string name;
  ElementType type;

  LinearOp(const Runtime& provider, const Operator& described, const Fused& fused,
           ElementType element_type);
};

// A node of a session. Thread-safe: ONNX Runtime may run it from several threads at once.
class Linear {
 public:
  Linear(const LinearOp& linear, const KernelInfo* node)
      : api_(*linear.runtime.api), linear_(linear), op_(*linear.op) {
    const Api& api = api_;
    Constants constants{extent(api, node, "out_features"), extent(api, node, "in_features"), {}};
    rows_ = constants.rows;
    cols_ = constants.cols;
    for (size_t i = 0; i < op_.inputs.size(); ++i) {
      constants.inputs.push_back(constant_input(api, node, i + 1, op_.inputs[i]));
    }
    const Tensor& values = constants.inputs[0];
    const Tensor bias = constant_input(api, node, bias_index(), "bias");
    if (bias.shape != std::vector<int64_t>{rows_} || bias.type != values.type) {
      throw std::invalid_argument("bias: expected " + std::to_string(rows_) +
                                  " elements of the type of values");
    }
    check_type(values.type);
    if (values.shape.size() != 1) throw std::invalid_argument("values: expected one dimension");
    plan_ = op_.read(constants);
    if (values.type == ElementType::f32) {
      prepare<float>(values, bias);
    } else {
      prepare<double>(values, bias);
    }
  }

  void compute(KernelContext* context) const {
    if (dtype_ == DType::f32) {
      run_on<float>(context, ElementType::f32);
    } else {
      run_on<double>(context, ElementType::f64);
    }
  }

  const Api& api() const { return api_; }
  const char* name() const { return linear_.name.c_str(); }

 private:
  size_t bias_index() const { return op_.inputs.size() + 1; }

  void check_type(ElementType type) {
    if (type != ElementType::f32 && type != ElementType::f64) {
      throw std::invalid_argument(
          "values: expected float32 or float64; open the model without this library to run its "
          "standard operators");
    }
    dtype_ = type == ElementType::f32 ? DType::f32 : DType::f64;
    isa_ = active_isa();
  }

  // One sample makes the kernel pack the values for small batches: the first should not pay for it.
  template <class T>
  void prepare(const Tensor& values, const Tensor& bias) {
    const std::vector<T> x(cols_);
    std::vector<T> y(rows_);
    multiply(static_cast<const T*>(values.data), x.data(), static_cast<const T*>(bias.data),
             y.data(), 1, serial_executor());
  }

  template <class T>
  void multiply(const T* values, const T* x, const T* bias, T* y, int64_t batch,
                const Executor& executor) const {
    Product p;
    p.values = {const_cast<T*>(values), dtype_, plan_nnz(*plan_)};  // sddmm alone writes
    p.constant = kConstantValues;
    p.in = {const_cast<T*>(x), dtype_, cols_, batch, 1, cols_};
    p.out = {y, dtype_, rows_, batch, 1, rows_};
    p.bias = {const_cast<T*>(bias), dtype_, rows_};
    p.activation = linear_.activation;
    run(isa_, *plan_, p, executor);
  }

  void tell(int64_t batch, int threads) const {
    const Listener hears = listener.load(std::memory_order_acquire);
    if (hears == nullptr) return;
    const Choice choice = choose(isa_, *plan_, {Op::spmm, batch, dtype_}, threads);
    hears(op_.name, name_of(choice.isa), choice.variant->name, choice.threads);
  }

  // The leading dimensions of X and their product.
  int64_t batch_of(const std::vector<int64_t>& shape) const {
    if (shape.empty() || shape.back() != cols_) {
      throw std::invalid_argument("X: expected a last dimension of " + std::to_string(cols_));
    }
    int64_t batch = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) batch *= shape[i];
    return batch;
  }

  template <class T>
  const T* input(const KernelContext* context, size_t index) const {
    const Value* value = nullptr;
    check(api_.KernelContext_GetInput(context, index, &value));
    return static_cast<const T*>(data_of(api_, value));
  }

  // The shape of X. Where the runtime must describe it in new memory, that takes longer than a
  // small product.
  std::vector<int64_t> shape_of(const Value* x, ElementType wanted) const {
    const auto check_type = [&](ElementType type) {
      if (type != wanted) throw std::invalid_argument("X: expected the type of values");
    };
    if (!linear_.runtime.shows_shapes) {
      const Info info = Info::of(api_, x);
      check_type(info.type());
      return info.shape();
    }
    ElementType type = ElementType::undefined;
    const int64_t* dims = nullptr;
    size_t rank = 0;
    check(api_.GetTensorElementTypeAndShapeDataReference(x, &type, &dims, &rank));
    check_type(type);
    return {dims, dims + rank};
  }

  template <class T>
  void run_on(KernelContext* context, ElementType type) const {
    const Value* x = nullptr;
    check(api_.KernelContext_GetInput(context, 0, &x));
    std::vector<int64_t> shape = shape_of(x, type);
    const int64_t batch = batch_of(shape);
    shape.back() = rows_;
    Value* y = nullptr;
    check(api_.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &y));
    if (batch == 0 || rows_ == 0) return;
    Pool pool{api_, context};
    const int threads = threads_for(batch, pool);
    tell(batch, threads);
    multiply(input<T>(context, 1), static_cast<const T*>(data_of(api_, x)),
             input<T>(context, bias_index()), static_cast<T*>(const_cast<void*>(data_of(api_, y))),
             batch, pool.executor(threads));
  }

  // A plan for more threads than the session has would be one for another machine. They are counted
  // at the first products that would take more than one: more than once where some are missing, for
  // another run or program may have kept them.
  int threads_for(int64_t batch, Pool& pool) const {
    constexpr int kMostCounts = 4;
    const int known = threads_.load(std::memory_order_relaxed), most = Pool::threads_of_machine();
    if (known == most || counts_.load(std::memory_order_relaxed) >= kMostCounts) return known;
    if (batch <= serial_batch_.load(std::memory_order_relaxed)) return 1;
    if (choose(isa_, *plan_, {Op::spmm, batch, dtype_}, most).threads == 1) {
      serial_batch_.store(batch, std::memory_order_relaxed);
      return 1;
    }
    const std::unique_lock<std::mutex> lock(counting_, std::try_to_lock);
    if (!lock) return known;
    const int found = std::max(known, pool.count_threads());
    threads_.store(found, std::memory_order_relaxed);
    counts_.fetch_add(1, std::memory_order_relaxed);
    return found;
  }

  const Api& api_;
  const LinearOp& linear_;
  const Operator& op_;
  int64_t rows_ = 0, cols_ = 0;
  DType dtype_ = DType::f32;
  Isa isa_ = Isa::scalar;
  std::shared_ptr<const Plan> plan_;
  mutable std::mutex counting_;
  mutable std::atomic<int> threads_{1}, counts_{0};  // the session's threads; how often counted
  mutable std::atomic<int64_t> serial_batch_{-1};    // one thread is best for it, whoever counts
};

const LinearOp& self(const CustomOp* op) { return *static_cast<const LinearOp*>(op); }

Status* create(const CustomOp* op, const Api* api, const KernelInfo* node, void** kernel) noexcept {
  return guarded(*api, self(op).name.c_str(), [&] { *kernel = new Linear(self(op), node); });
}

Status* compute(void* kernel, KernelContext* context) noexcept {
  const Linear& linear = *static_cast<const Linear*>(kernel);
  return guarded(linear.api(), linear.name(), [&] { linear.compute(context); });
}

// Y is X with its last dimension replaced by the length of the bias; symbolic names are kept.
Status* infer_shape(const CustomOp* op, ShapeInferContext* context) noexcept {
  const Api& api = *self(op).runtime.api;
  return guarded(api, self(op).name.c_str(), [&] {
    const Info x = Info::input(api, context, 0);
    const Info bias = Info::input(api, context, self(op).op->inputs.size() + 1);
    std::vector<int64_t> shape = x.shape();
    if (shape.empty()) return;  // X of unknown rank: so is Y
    std::vector<const char*> names(shape.size());
    check(api.GetSymbolicDimensions(x.get(), names.data(), names.size()));
    const std::vector<int64_t> rows = bias.shape();
    shape.back() = rows.size() == 1 ? rows[0] : -1;
    names.back() = "";
    const Info y = Info::create(api);
    check(api.SetTensorElementType(y.get(), x.type()));
    check(api.SetDimensions(y.get(), shape.data(), shape.size()));
    check(api.SetSymbolicDimensions(y.get(), names.data(), names.size()));
    check(api.ShapeInferContext_SetOutputTypeShape(context, 0, y.get()));
  });
}

// Indices of any type match here: the kernel says which it expected when it is created. (All inputs
// of any type would need no variant per type, but ONNX Runtime before 1.21 cannot infer Y's then.)
ElementType input_type(const CustomOp* op, size_t index) {
  const bool indices = index > 1 && index <= self(op).op->inputs.size();
  return indices ? ElementType::undefined : self(op).type;
}

LinearOp::LinearOp(const Runtime& provider, const Operator& described, const Fused& fused,
                   ElementType element_type)
    : runtime(provider),
      op(&described),
      activation(fused.activation),
      name(std::string(described.name) + fused.suffix),
      type(element_type) {
  GetName = [](const CustomOp* o) { return self(o).name.c_str(); };
  GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  GetInputType = input_type;
  GetInputTypeCount = [](const CustomOp* o) { return self(o).op->inputs.size() + 2; };
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
  KernelDestroy = [](void* kernel) { delete static_cast<Linear*>(kernel); };
  InferOutputShapeFn = infer_shape;
  GetStartVersion = [](const CustomOp*) { return kDomainVersion; };
  GetEndVersion = [](const CustomOp*) { return kDomainVersion; };
}

// One domain per ONNX Runtime in the process. Sessions refer to it until they end, and nobody says
// when that is, so it is never released.
CustomOpDomain* domain_of(const Runtime& runtime) {
  static std::mutex mutex;
  static auto& domains = *new std::map<Runtime, CustomOpDomain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  CustomOpDomain*& domain = domains[runtime];
  if (domain != nullptr) return domain;
  const Api& api = *runtime.api;
  CustomOpDomain* fresh = nullptr;
  check(api.CreateCustomOpDomain(kDomain, &fresh));
  for (const Operator& op : operators()) {
    for (const Fused& fused : kFused) {
      for (const ElementType type : {ElementType::f32, ElementType::f64}) {
        check(api.CustomOpDomain_Add(fresh, new LinearOp(runtime, op, fused, type)));
      }
    }
  }
  return domain = fresh;
}

// The functions of the newest version that both know. The runtime's name tells which that is: asked
// for one that it lacks, it would complain on the user's terminal.
Runtime runtime_of(const ApiBase& base) {
  int major = 0, minor = 0;
  std::sscanf(base.GetVersionString(), "%d.%d", &major, &minor);
  const bool shows_shapes = major > 1 || (major == 1 && minor >= static_cast<int>(kShapesVersion));
  return {base.GetApi(shows_shapes ? kShapesVersion : kApiVersion), shows_shapes};
}

}  // namespace
}  // namespace spfmt::ort

// Sets who hears of every run, from the thread that runs it; null for nobody. Whoever heard before
// may be called once more by every run that has begun. spfmt.onnx.kernels_run shows the choices of
// kernels by it.
extern "C" __attribute__((visibility("default"))) void spfmt_ort_listen(
    spfmt::ort::Listener hears) {
  spfmt::ort::listener.store(hears, std::memory_order_release);
}

// ONNX Runtime calls it when the library is registered.
extern "C" __attribute__((visibility("default"))) spfmt::ort::Status* RegisterCustomOps(
    spfmt::ort::SessionOptions* options, const spfmt::ort::ApiBase* base) {
  using namespace spfmt::ort;
  const Runtime runtime = runtime_of(*base);
  const Api* api = runtime.api;
  if (api == nullptr) {
    // CreateStatus has been the first function since the first release.
    return base->GetApi(1)->CreateStatus(
        ErrorCode::fail, "spfmt: expected ONNX Runtime 1.17 or later; upgrade onnxruntime");
  }
  return guarded(*api, "RegisterCustomOps",
                 [&] { check(api->AddCustomOpDomain(options, domain_of(runtime))); });
}
