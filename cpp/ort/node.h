// What the operators share: how ONNX Runtime sees one, and a node of a session with its weight.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "../core/variant.h"
#include "pool.h"
#include "runtime.h"

namespace spfmt::ort {

constexpr int kDomainVersion = 1;
// A kernel's values never change: packed copies of them are made once.
constexpr int64_t kConstantValues = 0;

class Node;
struct SparseOp;

// What an operator does with a structure: how its nodes are made, and how shapes are inferred.
struct Kind {
  const char* name;
  bool adds;  // one input more, which is added to Y before the activation
  std::unique_ptr<Node> (*make)(const SparseOp&, const KernelInfo*);
  // Output shapes from those of the inputs and the attributes.
  void (*infer)(const SparseOp&, const ShapeInferContext*);
};
extern const Kind kLinear, kConv, kConvAdd;

// The activations that operators fuse, each under a name of its own: an attribute would be ignored
// by a library that does not know it.
struct Fused {
  Activation activation;
  const char* suffix;
};

// An operator as ONNX Runtime sees it, for one activation and one type of X, values, bias and Y.
struct SparseOp : CustomOp {
  Runtime runtime;
  const Structure* structure;
  const Kind* kind;
  Activation activation;
  std::string name;
  ElementType type;

  SparseOp(const Runtime&, const Structure&, const Kind&, const Fused&, ElementType);
  // Inputs are X, those of the structure, the bias, and what is added.
  size_t bias_index() const { return structure->inputs.size() + 1; }
  size_t input_count() const { return bias_index() + (kind->adds ? 2 : 1); }
};

// Hears of every run while one is set: how the cost model chose to run it.
using Listener = void (*)(const char* op, const char* isa, const char* variant, int threads);
extern std::atomic<Listener> listener;

// A node of a session. Thread-safe: ONNX Runtime may run it from several threads at once.
class Node {
 public:
  virtual ~Node() = default;
  virtual void compute(KernelContext* context) const = 0;
  const Api& api() const { return api_; }
  const char* name() const { return op_.name.c_str(); }

 protected:
  // Reads and checks the constants; throws std::invalid_argument.
  Node(const SparseOp& op, const KernelInfo* node, int64_t rows, int64_t cols);

  struct Input {
    const Value* value;
    std::vector<int64_t> shape;
  };
  // X, or what is added, of the type of the values.
  Input operand(const KernelContext* context, size_t index, const char* name) const;
  const SparseOp& op() const { return op_; }
  void* result(KernelContext* context, const std::vector<int64_t>& shape) const;
  // A product with the weight as it was read, or as `context` shows it.
  Product product() const;
  Product product(const KernelContext* context) const;
  // Runs a product on ONNX Runtime's threads.
  void run_on(KernelContext* context, const Product& product) const;

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }
  Isa isa() const { return isa_; }
  const Plan& plan() const { return *plan_; }

 private:
  Product product(const void* values, const void* bias) const;
  const void* input(const KernelContext* context, size_t index) const;
  int threads_for(const Work& work, Pool& pool) const;
  void tell(const Work& work, int threads) const;

  const Api& api_;
  const SparseOp& op_;
  int64_t rows_, cols_;
  DType dtype_ = DType::f32;
  Isa isa_ = Isa::scalar;
  std::shared_ptr<const Plan> plan_;
  const void *values_ = nullptr, *bias_ = nullptr;  // only while the node is made
  mutable std::mutex counting_;
  mutable std::atomic<int> threads_{1}, counts_{0};  // the session's threads; how often counted
  mutable std::atomic<int64_t> serial_batch_{-1};    // one thread is best for it, whoever counts
};

}  // namespace spfmt::ort
