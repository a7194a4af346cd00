// What the two files of bindings share: a plan as Python holds it, and the threads of OpenMP.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "../cpp/core/spfmt.h"

namespace spfmt_python {

struct PyPlan {
  std::shared_ptr<const spfmt::Plan> plan;
  int64_t rows, cols;
};

// libgomp's threads do not survive fork(): a parallel region in the child would wait for ever.
extern std::atomic<bool> forked_child;

// OpenMP with `threads` threads, which must outlive the executor; serial for one.
spfmt::Executor openmp_executor(int& threads);

constexpr int kOps = 3, kDTypes = 2, kLevels = 3;

// A plan with the kernels that backend="auto" takes for it. Python holds it in a capsule of this
// name, the `self` of the functions that bind() returns.
constexpr const char* kCallsCapsule = "spfmt.calls";

struct Calls {
  PyPlan plan;
  std::array<const spfmt::Kernel*, kOps * kDTypes * kLevels> kernels;

  // Null where SPFMT_ISA, which may change while the process runs, asks for what does not exist.
  const spfmt::Kernel* kernel(spfmt::Op op, bool f64) const {
    try {
      const int level = static_cast<int>(spfmt::active_isa());
      return kernels[(static_cast<int>(op) * kDTypes + f64) * kLevels + level];
    } catch (const std::invalid_argument&) {
      return nullptr;
    }
  }
};

// (features, samples) at some address, strides in elements.
struct Operand {
  void* data;
  int64_t features, samples, feature_stride, sample_stride;

  template <class T>
  spfmt::Matrix<T> matrix() const {
    return {static_cast<T*>(data), features, samples, feature_stride, sample_stride};
  }
};

// One product; `in2` is sddmm's, `bias` and `activation` are spmm's.
struct Product {
  spfmt::Op op;
  bool f64;
  void* values;
  int64_t version;
  Operand in, in2, out;
  const void* bias;
  int threads;
  spfmt::Activation activation = spfmt::Activation::none;
};

// Computes a product, other Python threads running meanwhile.
void run(const Calls& calls, const spfmt::Kernel& kernel, const Product& p);

// Adds bind() to the module.
void define_calls(pybind11::module_& m);

// Adds fingerprint() and the products of torch's tensors to the module.
void define_tensors(pybind11::module_& m);

}  // namespace spfmt_python
