// Python's view of the cost model: dictionaries of coefficients, predictions, the file.
#include "cost.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <map>
#include <stdexcept>

#include "../cpp/cost/cost.h"

namespace py = pybind11;

namespace {

using spfmt::CostModel;
using Coefficients = std::map<std::string, double>;

template <class Enum>
Enum from_name(const std::string& name, std::initializer_list<Enum> all,
               const char* (*name_of)(Enum)) {
  for (const Enum e : all) {
    if (name == name_of(e)) return e;
  }
  throw std::invalid_argument("unknown name " + name);
}
spfmt::Op op_of(const std::string& name) {
  using spfmt::Op;
  return from_name(name, {Op::spmm, Op::spmm_t, Op::sddmm}, spfmt::op_name);
}
spfmt::Isa isa_of(const std::string& name) {
  using spfmt::Isa;
  return from_name(name, {Isa::scalar, Isa::avx2, Isa::avx512}, spfmt::isa_name);
}
spfmt::Variant variant_of(const std::string& name) {
  using spfmt::Variant;
  return from_name(name, {Variant::tokens, Variant::octets, Variant::panels}, spfmt::variant_name);
}

spfmt::Layout layout_of(const std::string& name) {
  using spfmt::Layout;
  return from_name(name, {Layout::lists, Layout::groups}, spfmt::layout_name);
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

// Text of a file that may hold anything: no byte of it is an error.
py::object lenient_text(const std::string& bytes) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

py::dict read_file(const std::string& path) {
  const spfmt::Calibration found = spfmt::read_calibration(path);
  py::dict out;
  out["coefficients"] = to_dict(found.model);
  out["date"] = lenient_text(found.date);
  out["levels"] = lenient_text(found.levels);
  out["ignored"] = lenient_text(found.ignored);
  return out;
}

// As os.fsdecode does: paths are bytes, of any kind.
py::object cost_path() {
  const std::string path = spfmt::cost_file();
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

void force_variant(const std::optional<std::string>& name) {
  spfmt::force_variant(name ? std::optional(variant_of(*name)) : std::nullopt);
}

py::tuple as_tuple(const spfmt::Choice& choice) {
  return py::make_tuple(spfmt::variant_name(choice.variant), choice.threads, choice.seconds);
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
                             [](const spfmt::Summary& s) { return spfmt::layout_name(s.layout); })
      .def_readonly("rows", &spfmt::Summary::rows)
      .def_readonly("cols", &spfmt::Summary::cols)
      .def_readonly("nnz", &spfmt::Summary::nnz)
      .def_readonly("vectors", &spfmt::Summary::vectors)
      .def_readonly("octet_places", &spfmt::Summary::octet_places);
  m.def("cost_model", [] { return to_dict(spfmt::cost_model()); });
  m.def("default_cost_model", [] { return to_dict(spfmt::default_cost_model()); });
  m.def("set_cost_model", [](const Coefficients& c) { spfmt::set_cost_model(from_dict(c)); });
  m.def("read_calibration", &read_file, py::arg("path"));
  m.def("format_calibration",
        [](const Coefficients& c, const std::string& date, const std::string& levels) {
          return spfmt::format_calibration(from_dict(c), date, levels);
        });
  m.def("cost_file", &cost_path);
  m.def("cpu_key", &spfmt::cpu_key);
  m.def("force_variant", &force_variant, py::arg("variant").none(true));
  m.def("has_variant", [](const std::string& layout, const std::string& op,
                          const std::string& variant, int64_t batch) {
    return spfmt::has_variant(layout_of(layout), op_of(op), variant_of(variant), batch);
  });
  m.def("kernel_terms", [](const Coefficients& model, const std::string& variant,
                           const spfmt::Summary& s, int64_t batch) {
    return spfmt::kernel_terms(from_dict(model), variant_of(variant), s, batch);
  });
  m.def("dense_terms", [](const Coefficients& model, int64_t rows, int64_t cols, int64_t batch) {
    return spfmt::dense_terms(from_dict(model), rows, cols, batch);
  });
  m.def("kernel_seconds",
        [](const std::string& isa, const std::string& op, const std::string& variant,
           const spfmt::Summary& s, int64_t batch, int threads) {
          return spfmt::kernel_seconds(spfmt::cost_model(), isa_of(isa), op_of(op),
                                       variant_of(variant), s, batch, threads);
        });
  m.def("dense_seconds", [](int64_t rows, int64_t cols, int64_t batch, int threads) {
    return spfmt::dense_seconds(spfmt::cost_model(), rows, cols, batch, threads);
  });
  m.def("choose", [](const std::string& isa, const std::string& op, const spfmt::Summary& s,
                     int64_t batch, int threads) {
    return as_tuple(spfmt::choose(spfmt::cost_model(), isa_of(isa), op_of(op), s, batch, threads));
  });
}
