// Products of numpy arrays for callers in a hurry: no argument conversion, one call from operands
// to result. A small product takes less time than pybind11 needs for nine arguments.
//
// bind(plan) returns functions that carry their plan as `self`. They take plain arrays alone and
// return None for every other, which then goes the long way: there it is made plain, or what is
// wrong with it explained. Until then nothing has been written.
#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "../cpp/core/workspace.h"
#include "fastcall.h"
#include "products.h"

namespace py = pybind11;
using spfmt::DType;
using spfmt::Op;
using spfmt::View;

namespace spfmt_python {

std::optional<spfmt::Isa> level_in_use() {
  try {
    return spfmt::active_isa();
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
}

void run(const spfmt::Plan& plan, spfmt::Isa isa, const spfmt::Product& p, int threads) {
  const std::string error = spfmt::check(plan, p);
  if (!error.empty()) throw std::invalid_argument(error);
  if (forked_child) threads = 1;
  const spfmt::Executor executor = openmp_executor(threads);
  const py::gil_scoped_release others;
  spfmt::run(isa, plan, p, executor);
}

void clear_behind(const View& values, int64_t used) {
  const int64_t size = spfmt::size_of(values.dtype), left = values.rows - used;
  if (left > 0) std::memset(static_cast<char*>(values.data) + used * size, 0, left * size);
}

namespace {

Op operation(PyObject* o) {
  const int64_t op = integer(o);
  if (op < 0 || op >= spfmt::kOps) throw py::index_error("no such operation");
  return static_cast<Op>(op);
}

bool truth(PyObject* o) {
  const int found = PyObject_IsTrue(o);
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

// What numpy's objects are compared with; looked up once, when the module is made. In a product it
// would be too late: an import may hand the interpreter to a thread that then waits for its end.
struct Numpy {
  PyObject* ndarray = py::object(py::module_::import("numpy").attr("ndarray")).release().ptr();
  py::dtype f32 = py::dtype::of<float>(), f64 = py::dtype::of<double>();
};
const Numpy* numpy = nullptr;

// An ndarray proper, whose elements are aligned and a whole number of them apart.
bool plain(PyObject* o, const py::dtype& dtype) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(o)) != numpy->ndarray) return false;
  const auto* a = py::detail::array_proxy(o);
  // numpy keeps one object per native dtype, but equal ones can be made.
  const auto& api = py::detail::npy_api::get();
  if (a->descr != dtype.ptr() && !api.PyArray_EquivTypes_(a->descr, dtype.ptr())) return false;
  if (!(a->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) return false;
  for (int i = 0; i < a->nd; ++i) {
    if (a->strides[i] % dtype.itemsize() != 0) return false;
  }
  return true;
}

bool contiguous(PyObject* o) {
  return py::detail::array_proxy(o)->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_;
}

int64_t size_of(PyObject* o) {
  const auto* a = py::detail::array_proxy(o);
  int64_t size = 1;
  for (int i = 0; i < a->nd; ++i) size *= a->dimensions[i];
  return size;
}

// None stands for values that may change.
int64_t constant_of(PyObject* o) { return o == Py_None ? spfmt::kChanging : integer(o); }

// None stands for the level in use.
std::optional<spfmt::Isa> level_of(PyObject* o) {
  if (o == Py_None) return level_in_use();
  const int64_t isa = integer(o);
  if (isa < 0 || isa >= spfmt::kIsas || !spfmt::isa_supported(static_cast<spfmt::Isa>(isa))) {
    throw py::value_error("no such level on this CPU");
  }
  return static_cast<spfmt::Isa>(isa);
}

const spfmt::Plan& plan_of(PyObject* self) {
  return *static_cast<const PyPlan*>(PyCapsule_GetPointer(self, kPlanCapsule))->plan;
}

// The dtype that kernels compute in and an array has, if it is plain.
std::optional<DType> plain_dtype(PyObject* o) {
  if (plain(o, numpy->f32)) return DType::f32;
  if (plain(o, numpy->f64)) return DType::f64;
  return std::nullopt;
}

const py::dtype& dtype_of(DType dtype) { return dtype == DType::f64 ? numpy->f64 : numpy->f32; }

// (features, samples) of a vector, which is one sample, or of a matrix.
View operand(PyObject* o, bool batch_first, DType dtype) {
  const auto* a = py::detail::array_proxy(o);
  const int64_t size = spfmt::size_of(dtype);
  if (a->nd == 1) return {a->data, dtype, a->dimensions[0], 1, a->strides[0] / size, 0};
  const int f = batch_first ? 1 : 0, s = 1 - f;
  return {a->data,
          dtype,
          a->dimensions[f],
          a->dimensions[s],
          a->strides[f] / size,
          a->strides[s] / size};
}

// Any number of dimensions, one element after the other.
View flat(PyObject* o, DType dtype) {
  return {py::detail::array_proxy(o)->data, dtype, size_of(o), 1, 1, 0};
}

// The shape of a result in the layout that its operand came in.
struct Shape {
  int nd;
  std::array<Py_intptr_t, 2> dims;

  explicit Shape(int64_t count) : nd(1), dims{count, 1} {}
  Shape(const View& in, int64_t features, int rank, bool batch_first) : nd(rank) {
    dims = nd == 1 || !batch_first ? std::array<Py_intptr_t, 2>{features, in.cols}
                                   : std::array<Py_intptr_t, 2>{in.cols, features};
  }
  bool of(PyObject* o) const {
    const auto* a = py::detail::array_proxy(o);
    return a->nd == nd && std::equal(a->dimensions, a->dimensions + nd, dims.begin());
  }
};

// A new array that starts at a cache line, as numpy's own memory does not: kernels store a batch's
// features line by line, and half of the vectors would straddle two.
py::object new_array(const Shape& shape, const py::dtype& dtype) {
  size_t bytes = dtype.itemsize();
  for (int i = 0; i < shape.nd; ++i) {
    if (__builtin_mul_overflow(bytes, shape.dims[i], &bytes)) throw std::bad_alloc();
  }
  auto memory = std::make_unique<spfmt::Buffer>(bytes);
  void* data = memory->as<void>();
  py::capsule owner(memory.get(), [](void* buffer) { delete static_cast<spfmt::Buffer*>(buffer); });
  memory.release();
  const auto& api = py::detail::npy_api::get();
  constexpr int kFlags = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ |
                         py::detail::npy_api::NPY_ARRAY_ALIGNED_ |
                         py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  auto array = py::reinterpret_steal<py::object>(api.PyArray_NewFromDescr_(
      reinterpret_cast<PyTypeObject*>(numpy->ndarray), py::dtype(dtype).release().ptr(), shape.nd,
      shape.dims.data(), nullptr, data, kFlags, nullptr));
  if (!array || api.PyArray_SetBaseObject_(array.ptr(), owner.release().ptr()) < 0) {
    throw py::error_already_set();
  }
  return array;
}

// The addresses between which an array's elements lie.
struct Extent {
  const char *begin, *end;

  explicit Extent(PyObject* o) {
    const auto* a = py::detail::array_proxy(o);
    begin = end = a->data;
    if (size_of(o) == 0) return;
    for (int i = 0; i < a->nd; ++i) {
      const int64_t span = (a->dimensions[i] - 1) * a->strides[i];
      (span < 0 ? begin : end) += span;
    }
    end += py::reinterpret_borrow<py::dtype>(a->descr).itemsize();
  }
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// Whether a product may write to `out`: a plain array of its own memory. Where only the extents
// meet, as those of neighbouring columns do, the long way looks closer.
bool receives(PyObject* out, const Shape& shape, const py::dtype& dtype,
              std::initializer_list<PyObject*> operands) {
  if (!plain(out, dtype) || !shape.of(out)) return false;
  if (!(py::detail::array_proxy(out)->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_)) {
    return false;
  }
  const Extent written(out);
  return std::none_of(operands.begin(), operands.end(),
                      [&](PyObject* o) { return o != Py_None && written.meets(Extent(o)); });
}

spfmt::Activation activation_of(PyObject* o) {
  const int64_t code = integer(o);
  if (code < 0 || code > static_cast<int>(spfmt::Activation::silu)) {
    throw py::value_error("no such activation");
  }
  return static_cast<spfmt::Activation>(code);
}

// multiply(op, values, constant, x, bias, activation, batch_first, out, threads, level)
//   -> array, or None
PyObject* multiply_plain(const spfmt::Plan& plan, PyObject* const* arg) {
  PyObject *values = arg[1], *x = arg[3], *bias = arg[4], *out = arg[7];
  const bool batch_first = truth(arg[6]);
  const auto dtype = plain_dtype(x);
  const auto level = level_of(arg[9]);
  if (!dtype || !level || !plain(values, dtype_of(*dtype)) || !contiguous(values)) Py_RETURN_NONE;
  spfmt::Product p;
  p.op = operation(arg[0]);
  p.activation = activation_of(arg[5]);
  const int nd = py::detail::array_proxy(x)->nd;
  if ((nd != 1 && nd != 2) || p.op == Op::sddmm) Py_RETURN_NONE;
  p.values = flat(values, *dtype);
  p.constant = constant_of(arg[2]);
  p.in = operand(x, batch_first, *dtype);
  const int64_t rows = spfmt::plan_rows(plan), cols = spfmt::plan_cols(plan);
  const int64_t n_in = p.op == Op::spmm ? cols : rows;
  if (p.in.rows != n_in || p.values.rows < spfmt::plan_nnz(plan)) Py_RETURN_NONE;
  if (bias != Py_None) {
    if (p.op != Op::spmm || !plain(bias, dtype_of(*dtype)) || !contiguous(bias)) Py_RETURN_NONE;
    p.bias = flat(bias, *dtype);
    if (py::detail::array_proxy(bias)->nd != 1 || p.bias.rows != rows) Py_RETURN_NONE;
  }
  const Shape shape(p.in, rows + cols - n_in, nd, batch_first);
  if (out != Py_None && !receives(out, shape, dtype_of(*dtype), {x, values, bias})) Py_RETURN_NONE;
  py::object y =
      out == Py_None ? new_array(shape, dtype_of(*dtype)) : py::reinterpret_borrow<py::object>(out);
  p.out = operand(y.ptr(), batch_first, *dtype);
  run(plan, *level, p, threads_of(arg[8]));
  return y.release().ptr();
}

PyObject* multiply(PyObject* self, PyObject* const* arg, Py_ssize_t count) {
  return translated([&] {
    require_count(count, 10);
    return multiply_plain(plan_of(self), arg);
  });
}

// sample(dy, x, batch_first, out, threads, level) -> vector, or None
// What out has room for behind the structure's positions becomes zero.
PyObject* sample_plain(const spfmt::Plan& plan, PyObject* const* arg) {
  PyObject *dy = arg[0], *x = arg[1], *out = arg[3];
  const bool batch_first = truth(arg[2]);
  const auto dtype = plain_dtype(x);
  const auto level = level_of(arg[5]);
  if (!dtype || !level || !plain(dy, dtype_of(*dtype))) Py_RETURN_NONE;
  const int nd = py::detail::array_proxy(x)->nd;
  if ((nd != 1 && nd != 2) || py::detail::array_proxy(dy)->nd != nd) Py_RETURN_NONE;
  spfmt::Product p;
  p.op = Op::sddmm;
  p.in = operand(dy, batch_first, *dtype);
  p.in2 = operand(x, batch_first, *dtype);
  const bool fits = p.in.rows == spfmt::plan_rows(plan) && p.in2.rows == spfmt::plan_cols(plan);
  if (!fits || p.in.cols != p.in2.cols) Py_RETURN_NONE;
  Shape shape(spfmt::plan_nnz(plan));
  if (out != Py_None) {
    if (!plain(out, dtype_of(*dtype)) || py::detail::array_proxy(out)->nd != 1) Py_RETURN_NONE;
    if (!contiguous(out) || size_of(out) < shape.dims[0]) Py_RETURN_NONE;
    shape = Shape(size_of(out));
    if (!receives(out, shape, dtype_of(*dtype), {dy, x})) Py_RETURN_NONE;
  }
  py::object g =
      out == Py_None ? new_array(shape, dtype_of(*dtype)) : py::reinterpret_borrow<py::object>(out);
  p.values = flat(g.ptr(), *dtype);
  run(plan, *level, p, threads_of(arg[4]));
  clear_behind(p.values, spfmt::plan_nnz(plan));
  return g.release().ptr();
}

PyObject* sample(PyObject* self, PyObject* const* arg, Py_ssize_t count) {
  return translated([&] {
    require_count(count, 6);
    return sample_plain(plan_of(self), arg);
  });
}

PyMethodDef kBound[] = {
    {"multiply", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(multiply)),
     METH_FASTCALL, nullptr},
    {"sample", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(sample)), METH_FASTCALL,
     nullptr},
};

// (multiply, sample) of a plan.
py::tuple bind(const PyPlan& plan) {
  const py::capsule self(new PyPlan(plan), kPlanCapsule, [](PyObject* o) {
    delete static_cast<PyPlan*>(PyCapsule_GetPointer(o, kPlanCapsule));
  });
  py::tuple bound(std::size(kBound));
  for (size_t i = 0; i < std::size(kBound); ++i) {
    PyObject* function = PyCFunction_NewEx(&kBound[i], self.ptr(), nullptr);
    if (function == nullptr) throw py::error_already_set();
    bound[i] = py::reinterpret_steal<py::object>(function);
  }
  return bound;
}

// empty(count, dtype) -> a new vector of any dtype without Python objects, at a cache line
PyObject* empty(PyObject*, PyObject* const* arg, Py_ssize_t n) {
  return translated([&] {
    require_count(n, 2);
    if (!py::isinstance<py::dtype>(arg[1])) throw py::type_error("expected a numpy dtype");
    const auto dtype = py::reinterpret_borrow<py::dtype>(arg[1]);
    if (truth(dtype.attr("hasobject").ptr())) throw py::type_error("a dtype with Python objects");
    return new_array(Shape(count_of(arg[0])), dtype).release().ptr();
  });
}

PyMethodDef kModule[] = {
    {"empty", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(empty)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void define_arrays(py::module_& m) {
  numpy = new Numpy;  // for the life of the process
  m.def("bind", &bind, py::arg("plan"));
  if (PyModule_AddFunctions(m.ptr(), kModule) != 0) throw py::error_already_set();
}

}  // namespace spfmt_python
