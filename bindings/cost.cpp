// Python's view of the cost model: dictionaries of coefficients, and predictions.
#include "cost.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <map>
#include <stdexcept>

#include "../cpp/core/variant.h"
#include "../cpp/cost/cost.h"

namespace py = pybind11;

namespace {

using spfmt::CostModel;
using Coefficients = std::map<std::string, double>;

template <class Enum>
Enum from_name(const std::string& name, int count) {
  for (int i = 0; i < count; ++i) {
    if (name == spfmt::name_of(static_cast<Enum>(i))) return static_cast<Enum>(i);
  }
  throw std::invalid_argument("unknown name " + name);
}
spfmt::Op op_of(const std::string& name) { return from_name<spfmt::Op>(name, spfmt::kOps); }
spfmt::Isa isa_of(const std::string& name) { return from_name<spfmt::Isa>(name, spfmt::kIsas); }
spfmt::DType dtype_of(const std::string& name) {
  return from_name<spfmt::DType>(name, spfmt::kDTypes);
}
spfmt::Layout layout_of(const std::string& name) {
  return from_name<spfmt::Layout>(name, spfmt::kLayouts);
}

const spfmt::Variant& variant_of(const std::string& layout, const std::string& name) {
  for (const spfmt::Variant* v : spfmt::kVariants) {
    if (v->layout == layout_of(layout) && name == v->name) return *v;
  }
  throw std::invalid_argument("no variant " + name + " of " + layout);
}

// Rows (name, layout, ops, largest batch, dtypes by level).
py::list variants() {
  py::list rows;
  for (const spfmt::Variant* v : spfmt::kVariants) {
    py::list ops;
    for (int op = 0; op < spfmt::kOps; ++op) {
      if (v->does(static_cast<spfmt::Op>(op)))
        ops.append(spfmt::name_of(static_cast<spfmt::Op>(op)));
    }
    rows.append(py::make_tuple(v->name, spfmt::name_of(v->layout), ops, v->largest_batch));
  }
  return rows;
}

Coefficients to_dict(CostModel model) {
  Coefficients out;
  for (const auto& [key, value] : spfmt::coefficients(model)) out[key] = *value;
  return out;
}

// Every coefficient must be given, so that none is a stale default by accident.
CostModel from_dict(const Coefficients& given) {
  CostModel model{};
  const auto places = spfmt::coefficients(model);
  for (const auto& [key, place] : places) {
    const auto found = given.find(key);
    if (found == given.end()) throw std::invalid_argument("no coefficient " + key);
    if (!std::isfinite(found->second) || found->second < 0) {
      throw std::invalid_argument(key + " is negative or no number");
    }
    *place = found->second;
  }
  if (given.size() != places.size()) throw std::invalid_argument("unknown coefficients");
  return model;
}

py::tuple as_tuple(const spfmt::Choice& choice) {
  return py::make_tuple(choice.variant->name, choice.threads, choice.seconds);
}

spfmt::Summary summary(const std::string& layout, int64_t rows, int64_t cols, int64_t nnz,
                       int64_t vectors, int64_t octet_places) {
  return {layout_of(layout), rows, cols, nnz, vectors, octet_places};
}

}  // namespace

void bind_cost(py::module_& m) {
  py::class_<spfmt::Summary>(m, "Summary", "What the cost model knows of a structure.")
      .def(py::init(&summary), py::arg("layout"), py::arg("rows"), py::arg("cols"), py::arg("nnz"),
           py::arg("vectors"), py::arg("octet_places") = 0)
      .def_property_readonly("layout",
                             [](const spfmt::Summary& s) { return spfmt::name_of(s.layout); })
      .def_readonly("rows", &spfmt::Summary::rows)
      .def_readonly("cols", &spfmt::Summary::cols)
      .def_readonly("nnz", &spfmt::Summary::nnz)
      .def_readonly("vectors", &spfmt::Summary::vectors)
      .def_readonly("octet_places", &spfmt::Summary::octet_places);
  m.def("cost_model", [] { return to_dict(spfmt::cost_model()); });
  m.def("default_cost_model", [] { return to_dict(spfmt::default_cost_model()); });
  m.def("set_cost_model", [](const Coefficients& c) { spfmt::set_cost_model(from_dict(c)); });
  m.def("variants", &variants, "Rows (name, layout, ops, largest batch).");
  m.def("force_variant", &spfmt::force_variant, py::arg("name"));
  m.def("kernel_terms",
        [](const Coefficients& model, const std::string& variant, const spfmt::Summary& s,
           const std::string& op, int64_t batch, const std::string& dtype) {
          const spfmt::Variant& v = variant_of(spfmt::name_of(s.layout), variant);
          return v.terms(from_dict(model), s, {op_of(op), batch, dtype_of(dtype)});
        });
  m.def("dense_terms", [](const Coefficients& model, int64_t rows, int64_t cols, int64_t batch) {
    return spfmt::dense_terms(from_dict(model), rows, cols, batch);
  });
  m.def("kernel_seconds",
        [](const std::string& isa, const std::string& op, const std::string& variant,
           const spfmt::Summary& s, int64_t batch, const std::string& dtype, int threads) {
          const spfmt::Variant& v = variant_of(spfmt::name_of(s.layout), variant);
          return spfmt::kernel_seconds(spfmt::cost_model(), isa_of(isa), v, s,
                                       {op_of(op), batch, dtype_of(dtype)}, threads);
        });
  m.def("dense_seconds", [](int64_t rows, int64_t cols, int64_t batch, int threads) {
    return spfmt::dense_seconds(spfmt::cost_model(), rows, cols, batch, threads);
  });
  m.def("choose", [](const std::string& isa, const std::string& op, const spfmt::Summary& s,
                     int64_t batch, const std::string& dtype, int threads) {
    return as_tuple(spfmt::choose(spfmt::cost_model(), isa_of(isa), s,
                                  {op_of(op), batch, dtype_of(dtype)}, threads));
  });
}
