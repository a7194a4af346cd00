// What the two files of bindings share: a plan as Python holds it, and the threads of OpenMP.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>

#include "../cpp/spfmt.h"

namespace spfmt_python {

struct PyPlan {
  std::shared_ptr<const spfmt::Plan> plan;
  int64_t rows, cols;
};

// libgomp's threads do not survive fork(): a parallel region in the child would wait for ever.
extern std::atomic<bool> forked_child;

// OpenMP with `threads` threads, which must outlive the executor; serial for one.
spfmt::Executor openmp_executor(int& threads);

// Adds bind() and fingerprint() to the module.
void define_calls(pybind11::module_& m);

}  // namespace spfmt_python
