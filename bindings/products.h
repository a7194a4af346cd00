// What the files of bindings share: a plan as Python holds it, and the threads of OpenMP.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <optional>

#include "../cpp/core/spfmt.h"

namespace spfmt_python {

struct PyPlan {
  std::shared_ptr<const spfmt::Plan> plan;
};

// libgomp's threads do not survive fork(): a parallel region in the child would wait for ever.
extern std::atomic<bool> forked_child;

// OpenMP with `threads` threads, which must outlive the executor; serial for one.
spfmt::Executor openmp_executor(int& threads);

// Python holds a plan in a capsule of this name: the `self` of the functions that bind() returns,
// and what compiled code keeps.
constexpr const char* kPlanCapsule = "spfmt.plan";

// The level in use; nothing where SPFMT_ISA, which may change while the process runs, asks for one
// that does not exist. The long way says so.
std::optional<spfmt::Isa> level_in_use();

// Computes a product on up to `threads` threads, other Python threads running meanwhile. Throws
// std::invalid_argument where it does not fit the plan.
void run(const spfmt::Plan& plan, spfmt::Isa isa, const spfmt::Product& p, int threads);

// Of a result whose first elements a product has filled: what lies behind them becomes zero.
void clear_behind(const spfmt::View& values, int64_t used);

// Adds bind() to the module.
void define_arrays(pybind11::module_& m);

// Adds the products of torch's tensors to the module.
void define_tensors(pybind11::module_& m);

// Adds convolutions to the module.
void define_images(pybind11::module_& m);

}  // namespace spfmt_python
