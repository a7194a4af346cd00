// Python's view of the cost model: dictionaries of coefficients, and predictions.
#include "cost.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <map>
#include <optional>
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
// The name of a product of matrices, or of images where a geometry comes with it.
spfmt::Op op_of(const std::string& name, bool images) {
  for (const spfmt::Op op : {spfmt::Op::spmm, spfmt::Op::spmm_t, spfmt::Op::sddmm}) {
    if (name == spfmt::name_of(op, images)) return op;
  }
  throw std::invalid_argument("unknown product " + name);
}
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

// Rows (name, layout, ops, largest batch).
py::list variants() {
  py::list rows;
  for (const spfmt::Variant* v : spfmt::kVariants) {
    py::list ops;
    for (int op = 0; op < spfmt::kOps; ++op) {
      if (v->does(static_cast<spfmt::Op>(op)))
        ops.append(spfmt::name_of(static_cast<spfmt::Op>(op), v->geometry));
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

// (size, out, kernel, stride, padding in front, dilation) of y and of x, and groups.
using Numbers = std::array<int64_t, 13>;

// What a prediction is asked for; geometry, where there is one, lives here.
class Asked {
 public:
  Asked(const std::string& op, int64_t batch, const std::string& dtype,
        const std::optional<Numbers>& n)
      : work_{op_of(op, n.has_value()), batch, dtype_of(dtype)} {
    if (!n) return;
    const auto& g = *n;
    geometry_ = {
        {g[0], g[1], g[2], g[3], g[4], g[5]}, {g[6], g[7], g[8], g[9], g[10], g[11]}, g[12]};
    for (const int64_t i : {1, 2, 3, 5, 7, 8, 9, 11, 12}) {
      if (g[i] < 1) throw std::invalid_argument("a geometry without outputs or cells");
    }
    work_.geometry = &geometry_;
  }
  Asked(const Asked&) = delete;
  Asked& operator=(const Asked&) = delete;
  const spfmt::Work& work() const { return work_; }

 private:
  spfmt::Work work_;
  spfmt::Geometry geometry_;
};

// The best level of this CPU, whatever is forced: dense libraries do not ask.
spfmt::Isa best_level() {
  for (const spfmt::Isa isa : {spfmt::Isa::avx512, spfmt::Isa::avx2}) {
    if (spfmt::isa_supported(isa) && !spfmt::isa_emulated(isa)) return isa;
  }
  return spfmt::Isa::scalar;
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
  m.def(
      "kernel_terms",
      [](const Coefficients& model, const std::string& variant, const spfmt::Summary& s,
         const std::string& op, int64_t batch, const std::string& dtype,
         const std::optional<Numbers>& geometry) {
        const spfmt::Variant& v = variant_of(spfmt::name_of(s.layout), variant);
        const Asked asked(op, batch, dtype, geometry);
        if (!v.takes(asked.work())) throw std::invalid_argument(variant + " does no " + op);
        return v.terms(from_dict(model), s, asked.work());
      },
      py::arg("model"), py::arg("variant"), py::arg("summary"), py::arg("op"), py::arg("batch"),
      py::arg("dtype"), py::arg("geometry") = py::none());
  m.def("dense_terms", [](const Coefficients& model, int64_t rows, int64_t cols, int64_t batch) {
    return spfmt::dense_terms(from_dict(model), rows, cols, batch);
  });
  m.def("dense_image_terms",
        [](const Coefficients& model, const std::string& op, int64_t rows, int64_t cols,
           int64_t batch, const Numbers& geometry, bool winograd) {
          const Asked asked(op, batch, "float32", geometry);
          return spfmt::dense_image_terms(from_dict(model), rows, cols, asked.work(), winograd);
        });
  m.def("dense_seconds", [](int64_t rows, int64_t cols, int64_t batch, int threads) {
    return spfmt::dense_seconds(spfmt::cost_model(), rows, cols, batch, threads);
  });
  m.def("best_level", [] { return spfmt::name_of(best_level()); });
  m.def("dense_image_seconds",
        [](const std::string& isa, const std::string& op, int64_t rows, int64_t cols, int64_t batch,
           const Numbers& geometry, int threads) {
          const Asked asked(op, batch, "float32", geometry);
          return spfmt::dense_image_seconds(spfmt::cost_model(), isa_of(isa), rows, cols,
                                            asked.work(), threads);
        });
  m.def(
      "choose",
      [](const std::string& isa, const std::string& op, const spfmt::Summary& s, int64_t batch,
         const std::string& dtype, int threads, const std::optional<Numbers>& geometry) {
        const Asked asked(op, batch, dtype, geometry);
        return as_tuple(spfmt::choose(spfmt::cost_model(), isa_of(isa), s, asked.work(), threads));
      },
      py::arg("isa"), py::arg("op"), py::arg("summary"), py::arg("batch"), py::arg("dtype"),
      py::arg("threads"), py::arg("geometry") = py::none());
}
