// Python bindings of the core: pointers, checks that memory safety needs, OpenMP. No logic.
#include <omp.h>
#include <pthread.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "../cpp/core/plan.h"
#include "../cpp/core/probe.h"
#include "../cpp/cost/cost.h"
#include "cost.h"
#include "products.h"

namespace py = pybind11;
using spfmt_python::forked_child;
using spfmt_python::PyPlan;

namespace {

void openmp_for_each(void* context, int64_t n, void (*body)(void*, int64_t), void* arg) {
  const int threads = *static_cast<int*>(context);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) body(arg, i);
}

}  // namespace

namespace spfmt_python {

std::atomic<bool> forked_child{false};

spfmt::Executor openmp_executor(int& threads) {
  if (threads <= 1) return spfmt::serial_executor();
  return {threads, &threads, openmp_for_each};
}

}  // namespace spfmt_python

namespace {

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

template <class T>
bool holds(const py::array& a) {
  return py::isinstance<py::array_t<T>>(a);
}

template <class T>
using Contiguous = py::array_t<T, py::array::c_style>;

// numpy makes arrays at any address; the compiler takes it that a T* is aligned.
template <class T>
T* elements(const py::array& a) {
  require(a.size() == 0 || reinterpret_cast<uintptr_t>(a.data()) % alignof(T) == 0,
          "array is not aligned");
  return static_cast<T*>(const_cast<void*>(a.data()));
}

PyPlan lists_plan(int64_t rows, int64_t cols, const Contiguous<int64_t>& indptr,
                  const Contiguous<int32_t>& col_indices) {
  require(rows >= 0 && indptr.size() == rows + 1, "indptr needs rows + 1 entries");
  require(indptr.data()[rows] == col_indices.size(),
          "indptr does not end at the last column index");
  const spfmt::Lists view{rows, cols, elements<const int64_t>(indptr),
                          elements<const int32_t>(col_indices)};
  const std::string error = spfmt::validate(view);
  require(error.empty(), error.c_str());
  return {spfmt::make_plan(view)};
}

PyPlan groups_plan(int64_t rows, int64_t cols, const Contiguous<int32_t>& row_perm,
                   const Contiguous<int64_t>& row_ptr, const Contiguous<int64_t>& col_begin,
                   const Contiguous<int64_t>& col_end, const Contiguous<int32_t>& col_indices,
                   const Contiguous<int64_t>& value_ptr) {
  const int64_t bands = col_begin.size();
  require(row_perm.size() == rows, "row_perm needs one entry per row");
  require(row_ptr.size() == bands + 1 && value_ptr.size() == bands + 1 && col_end.size() == bands,
          "row_ptr and value_ptr need bands + 1 entries, col_begin and col_end one per tile");
  const spfmt::Groups view{rows,
                           cols,
                           bands,
                           col_indices.size(),
                           elements<const int32_t>(row_perm),
                           elements<const int64_t>(row_ptr),
                           elements<const int64_t>(col_begin),
                           elements<const int64_t>(col_end),
                           elements<const int32_t>(col_indices),
                           elements<const int64_t>(value_ptr)};
  const std::string error = spfmt::validate(view);
  require(error.empty(), error.c_str());
  return {spfmt::make_plan(view)};
}

template <class T>
T* vector(const py::array& a, int64_t least) {
  require(holds<T>(a) && a.ndim() == 1 && a.size() >= least,
          "vector has the wrong dtype or length");
  require(a.size() <= 1 || a.strides(0) == sizeof(T), "vector is not contiguous");
  return elements<T>(a);
}

py::list kernel_table() {
  py::list rows;
  for (const spfmt::Kernel& k : spfmt::kernel_table()) {
    rows.append(py::make_tuple(spfmt::name_of(k.op, k.images), spfmt::name_of(k.layout),
                               spfmt::name_of(k.dtype), spfmt::name_of(k.isa),
                               spfmt::isa_supported(k.isa)));
  }
  return rows;
}

py::list emulated_levels() {
  py::list names;
  for (const spfmt::Isa isa : {spfmt::Isa::scalar, spfmt::Isa::avx2, spfmt::Isa::avx512}) {
    if (spfmt::isa_emulated(isa)) names.append(spfmt::name_of(isa));
  }
  return names;
}

spfmt::Isa level(const std::string& name) {
  for (const spfmt::Isa isa : {spfmt::Isa::scalar, spfmt::Isa::avx2, spfmt::Isa::avx512}) {
    if (name != spfmt::name_of(isa)) continue;
    require(spfmt::isa_supported(isa), "this CPU lacks the level's instructions");
    return isa;
  }
  throw std::invalid_argument("no such level");
}

// Runs body(i) for i < threads, each on a thread of its own.
template <class Body>
void on_threads(int threads, const Body& body) {
  if (forked_child) threads = 1;
  const py::gil_scoped_release release;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) body(i);
}

int64_t probe_fma(const std::string& isa, int64_t steps, int threads) {
  require(threads >= 1 && steps >= 0, "threads and steps are positive");
  const spfmt::Probe& probe = spfmt::probe(level(isa));
  on_threads(threads, [&](int) { probe.fma(steps); });
  return threads * steps * probe.flops_per_step;
}

int64_t probe_load(const std::string& isa, const py::array& data, int64_t rounds, int threads) {
  require(threads >= 1 && rounds >= 0, "threads and rounds are positive");
  const spfmt::Probe& probe = spfmt::probe(level(isa));
  const float* first = vector<float>(data, 0);
  const int64_t share = data.size() / threads / probe.load_step * probe.load_step;
  on_threads(threads, [&](int i) { probe.load(first + i * share, share, rounds); });
  return threads * rounds * share * static_cast<int64_t>(sizeof(float));
}

// The structure that a product works on, as the cost model sees it; may build its transpose.
spfmt::Summary summary(const PyPlan& plan, const std::string& op) {
  const auto wanted = op == "spmm_t" ? spfmt::Op::spmm_t : spfmt::Op::spmm;
  const py::gil_scoped_release release;
  return plan.plan->oriented(wanted).summary();
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "Compiled kernels of spfmt. Use spfmt.ops; this module checks only what memory needs.";
  pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
  py::class_<PyPlan>(m, "Plan")
      .def_property_readonly("nnz", [](const PyPlan& p) { return spfmt::plan_nnz(*p.plan); })
      .def_property_readonly("nbytes", [](const PyPlan& p) { return spfmt::plan_nbytes(*p.plan); })
      .def_property_readonly("shapes", [](const PyPlan& p) { return p.plan->shapes(); })
      .def_property_readonly("padding",
                             [](const PyPlan& p) { return spfmt::plan_padding(*p.plan); });
  m.def("lists_plan", &lists_plan, py::arg("rows"), py::arg("cols"), py::arg("indptr").noconvert(),
        py::arg("col_indices").noconvert());
  m.def("groups_plan", &groups_plan, py::arg("rows"), py::arg("cols"),
        py::arg("row_perm").noconvert(), py::arg("row_ptr").noconvert(),
        py::arg("col_begin").noconvert(), py::arg("col_end").noconvert(),
        py::arg("col_indices").noconvert(), py::arg("value_ptr").noconvert());
  spfmt_python::define_arrays(m);
  spfmt_python::define_tensors(m);
  spfmt_python::define_images(m);
  bind_cost(m);
  m.def("summary", &summary, py::arg("plan"), py::arg("op"));
  m.def("kernel_table", &kernel_table, "Rows (op, layout, dtype, isa, supported).");
  m.def("active_isa", [] { return spfmt::name_of(spfmt::active_isa()); });
  m.def("emulated_levels", &emulated_levels, "Levels that run in other instructions: tests only.");
  m.attr("WRITTEN") = spfmt::kWritten;
  m.def("openmp_threads", &omp_get_max_threads);
  m.def("in_forked_child", [] { return forked_child.load(); });
  m.def("probe_fma", &probe_fma, py::arg("isa"), py::arg("steps"), py::arg("threads"),
        "Runs chains of multiply-adds on every thread; returns their FLOPs.");
  m.def("probe_load", &probe_load, py::arg("isa"), py::arg("data").noconvert(), py::arg("rounds"),
        py::arg("threads"), "Loads float32 data, split between the threads; returns the bytes.");
}
