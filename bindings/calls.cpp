// Products for callers in a hurry: no argument conversion, one call from operands to result. A
// small product takes less time than pybind11 needs for nine arguments.
//
// bind(plan, kernels) returns functions that carry their plan as `self`. They take the plain case
// alone and return None (multiply, sample) or False for every other, which then goes the long way,
// where errors are explained. Until then nothing has been written.
#include "calls.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../cpp/core/workspace.h"
#include "fastcall.h"

namespace py = pybind11;

namespace spfmt_python {
namespace {

class Unlocked {  // the interpreter runs other threads meanwhile
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

template <class T>
void run_typed(const Calls& calls, const spfmt::Kernel& kernel, const Product& p) {
  spfmt::Args<T> args{};
  args.values = static_cast<T*>(p.values);
  args.values_version = p.version;
  args.in = p.in.matrix<const T>();
  args.in2 = p.in2.matrix<const T>();
  args.out = p.out.matrix<T>();
  args.bias = static_cast<const T*>(p.bias);
  args.activation = p.activation;
  int threads = forked_child ? 1 : p.threads;
  const spfmt::Executor executor = openmp_executor(threads);
  const Unlocked others;
  spfmt::run(kernel, *calls.plan.plan, args, executor);
}

}  // namespace

void run(const Calls& calls, const spfmt::Kernel& kernel, const Product& p) {
  p.f64 ? run_typed<double>(calls, kernel, p) : run_typed<float>(calls, kernel, p);
}

namespace {

spfmt::Op operation(PyObject* o) {
  const int64_t op = integer(o);
  if (op < 0 || op >= kOps) throw py::index_error("no such operation");
  return static_cast<spfmt::Op>(op);
}

bool truth(PyObject* o) {
  const int found = PyObject_IsTrue(o);
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

int64_t version_of(PyObject* o) { return o == Py_None ? spfmt::kNoVersion : integer(o); }

const Calls& calls_of(PyObject* self) {
  return *static_cast<const Calls*>(PyCapsule_GetPointer(self, kCallsCapsule));
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

Operand operand(PyObject* o, bool batch_first, int64_t itemsize) {
  const auto* a = py::detail::array_proxy(o);
  if (a->nd == 1) return {a->data, a->dimensions[0], 1, a->strides[0] / itemsize, 0};
  const int f = batch_first ? 1 : 0, s = 1 - f;
  return {a->data, a->dimensions[f], a->dimensions[s], a->strides[f] / itemsize,
          a->strides[s] / itemsize};
}

// The shape of a result in the layout that its operand came in.
struct Shape {
  int nd;
  std::array<Py_intptr_t, 2> dims;

  explicit Shape(int64_t count) : nd(1), dims{count, 1} {}
  Shape(const Operand& in, int64_t features, int rank, bool batch_first) : nd(rank) {
    dims = nd == 1 || !batch_first ? std::array<Py_intptr_t, 2>{features, in.samples}
                                   : std::array<Py_intptr_t, 2>{in.samples, features};
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

spfmt::Activation activation_of(PyObject* o, spfmt::Op op) {
  const int64_t code = integer(o);
  if (code < 0 || code > static_cast<int>(spfmt::Activation::silu)) {
    throw py::value_error("no such activation");
  }
  if (code != 0 && op != spfmt::Op::spmm) throw py::value_error("only spmm has activations");
  return static_cast<spfmt::Activation>(code);
}

// multiply(op, values, version, x, bias, activation, batch_first, out, threads) -> array, or None
PyObject* multiply_plain(const Calls& calls, PyObject* const* arg) {
  PyObject *values = arg[1], *x = arg[3], *bias = arg[4], *out = arg[7];
  const bool is_f64 = plain(x, numpy->f64), batch_first = truth(arg[6]);
  const py::dtype& dtype = is_f64 ? numpy->f64 : numpy->f32;
  if (!plain(x, dtype) || !plain(values, dtype) || !contiguous(values)) Py_RETURN_NONE;
  const spfmt::Op op = operation(arg[0]);
  const spfmt::Activation activation = activation_of(arg[5], op);
  const PyPlan& plan = calls.plan;
  const int nd = py::detail::array_proxy(x)->nd;
  const spfmt::Kernel* kernel = calls.kernel(op, is_f64);
  if ((nd != 1 && nd != 2) || kernel == nullptr || op == spfmt::Op::sddmm) Py_RETURN_NONE;
  const Operand in = operand(x, batch_first, dtype.itemsize());
  const int64_t n_in = op == spfmt::Op::spmm ? plan.cols : plan.rows;
  if (in.features != n_in || size_of(values) < spfmt::plan_nnz(*plan.plan)) Py_RETURN_NONE;
  if (bias != Py_None) {
    if (op != spfmt::Op::spmm || !plain(bias, dtype) || !contiguous(bias)) Py_RETURN_NONE;
    const auto* b = py::detail::array_proxy(bias);
    if (b->nd != 1 || b->dimensions[0] != plan.rows) Py_RETURN_NONE;
  }
  const Shape shape(in, plan.rows + plan.cols - n_in, nd, batch_first);
  if (out != Py_None && !receives(out, shape, dtype, {x, values, bias})) Py_RETURN_NONE;
  py::object y = out == Py_None ? new_array(shape, dtype) : py::reinterpret_borrow<py::object>(out);
  run(calls, *kernel,
      {op, is_f64, py::detail::array_proxy(values)->data, version_of(arg[2]), in, Operand{},
       operand(y.ptr(), batch_first, dtype.itemsize()),
       bias == Py_None ? nullptr : py::detail::array_proxy(bias)->data, threads_of(arg[8]),
       activation});
  return y.release().ptr();
}

PyObject* multiply(PyObject* self, PyObject* const* arg, Py_ssize_t count) {
  return translated([&] {
    require_count(count, 9);
    return multiply_plain(calls_of(self), arg);
  });
}

// The gradient of a plan's nonzeros to `out`; what it has room for behind them becomes zero.
void sample_to(const Calls& calls, const spfmt::Kernel& kernel, bool f64, void* out, int64_t room,
               const Operand& dy, const Operand& x, int threads) {
  const int64_t size = f64 ? 8 : 4, nnz = spfmt::plan_nnz(*calls.plan.plan);
  run(calls, kernel,
      {spfmt::Op::sddmm, f64, out, spfmt::kNoVersion, dy, x, Operand{}, nullptr, threads});
  if (room > nnz) std::memset(static_cast<char*>(out) + nnz * size, 0, (room - nnz) * size);
}

// sample(dy, x, batch_first, out, threads) -> vector, or None
PyObject* sample_plain(const Calls& calls, PyObject* const* arg) {
  PyObject *dy = arg[0], *x = arg[1], *out = arg[3];
  const bool is_f64 = plain(x, numpy->f64), batch_first = truth(arg[2]);
  const py::dtype& dtype = is_f64 ? numpy->f64 : numpy->f32;
  if (!plain(x, dtype) || !plain(dy, dtype)) Py_RETURN_NONE;
  const int nd = py::detail::array_proxy(x)->nd;
  const spfmt::Kernel* kernel = calls.kernel(spfmt::Op::sddmm, is_f64);
  if ((nd != 1 && nd != 2) || py::detail::array_proxy(dy)->nd != nd || !kernel) Py_RETURN_NONE;
  const Operand from = operand(dy, batch_first, dtype.itemsize());
  const Operand in = operand(x, batch_first, dtype.itemsize());
  const PyPlan& plan = calls.plan;
  const bool fits = from.features == plan.rows && in.features == plan.cols;
  if (!fits || from.samples != in.samples) Py_RETURN_NONE;
  Shape shape(spfmt::plan_nnz(*plan.plan));
  if (out != Py_None) {
    const auto* room = py::detail::array_proxy(out);
    if (!plain(out, dtype) || room->nd != 1 || room->dimensions[0] < shape.dims[0]) Py_RETURN_NONE;
    shape = Shape(room->dimensions[0]);
    if (!contiguous(out) || !receives(out, shape, dtype, {dy, x})) Py_RETURN_NONE;
  }
  py::object g = out == Py_None ? new_array(shape, dtype) : py::reinterpret_borrow<py::object>(out);
  sample_to(calls, *kernel, is_f64, py::detail::array_proxy(g.ptr())->data, shape.dims[0], from, in,
            threads_of(arg[4]));
  return g.release().ptr();
}

PyObject* sample(PyObject* self, PyObject* const* arg, Py_ssize_t count) {
  return translated([&] {
    require_count(count, 5);
    return sample_plain(calls_of(self), arg);
  });
}

// (batch, features) at an address, with the strides (sample, feature) of a tensor.
Operand samples_at(PyObject* data, PyObject* strides, int64_t features, int64_t batch) {
  if (!PyTuple_Check(strides) || PyTuple_GET_SIZE(strides) != 2) {
    throw py::type_error("expected two strides");
  }
  return {address(data), features, batch, integer(PyTuple_GET_ITEM(strides, 1)),
          integer(PyTuple_GET_ITEM(strides, 0))};
}

// multiply_at(op, f64, values, version, x, strides, batch, out, bias, threads) -> whether it ran
// Addresses are those of memory that the caller has checked; out is (batch, features), contiguous.
PyObject* multiply_at(PyObject* self, PyObject* const* arg, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    require_count(count, 10);
    const Calls& calls = calls_of(self);
    const spfmt::Op op = operation(arg[0]);
    if (op == spfmt::Op::sddmm) throw py::value_error("sddmm multiplies nothing");
    const bool f64 = arg[1] == Py_True;
    const spfmt::Kernel* kernel = calls.kernel(op, f64);
    if (kernel == nullptr) Py_RETURN_FALSE;
    const PyPlan& plan = calls.plan;
    const int64_t n_in = op == spfmt::Op::spmm ? plan.cols : plan.rows;
    const int64_t n_out = plan.rows + plan.cols - n_in, batch = count_of(arg[6]);
    const void* bias = address(arg[8]);
    if (bias != nullptr && op != spfmt::Op::spmm) throw py::value_error("only spmm has a bias");
    run(calls, *kernel,
        {op, f64, address(arg[2]), version_of(arg[3]), samples_at(arg[4], arg[5], n_in, batch),
         Operand{}, Operand{address(arg[7]), n_out, batch, 1, n_out}, bias, threads_of(arg[9])});
    Py_RETURN_TRUE;
  });
}

// sample_at(f64, out, capacity, dy, strides, x, strides, batch, threads) -> whether it ran
// Elements of out behind nnz become zero.
PyObject* sample_at(PyObject* self, PyObject* const* arg, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    require_count(count, 9);
    const Calls& calls = calls_of(self);
    const bool f64 = arg[0] == Py_True;
    const spfmt::Kernel* kernel = calls.kernel(spfmt::Op::sddmm, f64);
    if (kernel == nullptr) Py_RETURN_FALSE;
    const PyPlan& plan = calls.plan;
    const int64_t room = count_of(arg[2]), batch = count_of(arg[7]);
    if (room < spfmt::plan_nnz(*plan.plan)) throw py::value_error("fewer elements than nonzeros");
    sample_to(calls, *kernel, f64, address(arg[1]), room,
              samples_at(arg[3], arg[4], plan.rows, batch),
              samples_at(arg[5], arg[6], plan.cols, batch), threads_of(arg[8]));
    Py_RETURN_TRUE;
  });
}

PyMethodDef kBound[] = {
    {"multiply", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(multiply)),
     METH_FASTCALL, nullptr},
    {"sample", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(sample)), METH_FASTCALL,
     nullptr},
    {"multiply_at", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(multiply_at)),
     METH_FASTCALL, nullptr},
    {"sample_at", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(sample_at)),
     METH_FASTCALL, nullptr},
};

// kernels: an index into the table per (op, dtype, level), -1 for none.
py::tuple bind(const PyPlan& plan, const std::vector<int64_t>& kernels) {
  auto calls = std::make_unique<Calls>(Calls{plan, {}});
  if (kernels.size() != calls->kernels.size()) throw std::invalid_argument("wrong kernel count");
  for (size_t i = 0; i < kernels.size(); ++i) {
    calls->kernels[i] = kernels[i] < 0 ? nullptr : &spfmt::kernel_table().at(kernels[i]);
  }
  const py::capsule self(calls.release(), kCallsCapsule, [](PyObject* o) {
    delete static_cast<Calls*>(PyCapsule_GetPointer(o, kCallsCapsule));
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

void define_calls(py::module_& m) {
  numpy = new Numpy;  // for the life of the process
  m.def("bind", &bind, py::arg("plan"), py::arg("kernels"));
  if (PyModule_AddFunctions(m.ptr(), kModule) != 0) throw py::error_already_set();
}

}  // namespace spfmt_python
