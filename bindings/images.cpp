// Convolutions of numpy's arrays: pointers and checks of memory, no logic.
#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "products.h"

namespace py = pybind11;

namespace spfmt_python {
namespace {

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

spfmt::DType dtype_of(const py::array& a) {
  if (py::isinstance<py::array_t<float>>(a)) return spfmt::DType::f32;
  require(py::isinstance<py::array_t<double>>(a), "dtype is neither float32 nor float64");
  return spfmt::DType::f64;
}

void* memory(const py::array& a, int64_t size) {
  require(a.size() == 0 || reinterpret_cast<uintptr_t>(a.data()) % size == 0,
          "array is not aligned");
  return const_cast<void*>(a.data());
}

spfmt::View flat(const py::array& a) {
  const spfmt::DType dtype = dtype_of(a);
  const int64_t size = spfmt::size_of(dtype);
  require(a.ndim() == 1 && (a.size() <= 1 || a.strides(0) == size), "vector is not contiguous");
  return {memory(a, size), dtype, a.size()};
}

// (images, channels, y, x) with any strides that are whole numbers.
spfmt::View images(const py::array& a) {
  const spfmt::DType dtype = dtype_of(a);
  const int64_t size = spfmt::size_of(dtype);
  require(a.ndim() == 4, "images need four dimensions");
  for (int d = 0; d < 4; ++d) require(a.strides(d) % size == 0, "strides are no whole numbers");
  return {memory(a, size),     dtype,
          a.shape(1),          a.shape(0),
          a.strides(1) / size, a.strides(0) / size,
          a.strides(2) / size, a.strides(3) / size};
}

// (kernel, stride, padding in front, dilation) of y and x, and groups.
using Parameters = std::array<int64_t, 9>;

spfmt::Geometry geometry_of(const Parameters& p, const py::array& x, const py::array& y) {
  return {{x.shape(2), y.shape(2), p[0], p[1], p[2], p[3]},
          {x.shape(3), y.shape(3), p[4], p[5], p[6], p[7]},
          p[8]};
}

spfmt::Isa level(const std::optional<std::string>& wanted) {
  const std::string name = wanted.value_or(spfmt::name_of(spfmt::active_isa()));
  for (const spfmt::Isa isa : {spfmt::Isa::scalar, spfmt::Isa::avx2, spfmt::Isa::avx512}) {
    if (name == spfmt::name_of(isa) && spfmt::isa_supported(isa)) return isa;
  }
  throw std::invalid_argument("no such level on this CPU");
}

void multiply(const PyPlan& plan, bool turned, const std::optional<std::string>& isa,
              const py::array& values, const py::array& in, const std::optional<py::array>& bias,
              int activation, const Parameters& parameters, const py::array& out, int threads) {
  require(activation >= 0 && activation <= static_cast<int>(spfmt::Activation::silu),
          "no such activation");
  require(out.writeable(), "the result is read-only");
  spfmt::Product p;
  p.op = turned ? spfmt::Op::spmm_t : spfmt::Op::spmm;
  p.values = flat(values);
  p.in = images(in);
  p.out = images(out);
  if (bias) p.bias = flat(*bias);
  p.activation = static_cast<spfmt::Activation>(activation);
  const auto geometry = geometry_of(parameters, turned ? out : in, turned ? in : out);
  p.geometry = &geometry;
  run(*plan.plan, level(isa), p, threads);
}

void sample(const PyPlan& plan, const std::optional<std::string>& isa, const py::array& dy,
            const py::array& x, const Parameters& parameters, const py::array& gradient,
            int threads) {
  require(gradient.writeable(), "the gradient is read-only");
  spfmt::Product p;
  p.op = spfmt::Op::sddmm;
  p.values = flat(gradient);
  p.in = images(dy);
  p.in2 = images(x);
  const auto geometry = geometry_of(parameters, x, dy);
  p.geometry = &geometry;
  run(*plan.plan, level(isa), p, threads);
  clear_behind(p.values, spfmt::plan_nnz(*plan.plan));
}

}  // namespace

void define_images(py::module_& m) {
  m.def("convolve", &multiply, py::arg("plan"), py::arg("turned"), py::arg("isa"),
        py::arg("values").noconvert(), py::arg("x").noconvert(), py::arg("bias").noconvert(),
        py::arg("activation"), py::arg("parameters"), py::arg("out").noconvert(),
        py::arg("threads"));
  m.def("convolve_sampled", &sample, py::arg("plan"), py::arg("isa"), py::arg("dy").noconvert(),
        py::arg("x").noconvert(), py::arg("parameters"), py::arg("gradient").noconvert(),
        py::arg("threads"));
}

}  // namespace spfmt_python
