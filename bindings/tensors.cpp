// Products of torch's tensors, from the objects that Python holds and without torch's headers, so
// that one build serves every torch. A compiled graph and an eager module call them directly: to
// torch's dispatcher and back costs ten times what the rest of a small product does.
//
// DLPack's table of C functions (Tensor.__dlpack_c_exchange_api__) tells where a tensor lies. Which
// structure lies where, spfmt/torch/values.py has found out and told with know(); which values are
// promised to be constant, with promise(). A structure that is not what was told is shown to Python
// once more; and what is not plain is declined with None, so that the long way can explain it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <unordered_map>

#include "fastcall.h"
#include "products.h"

namespace py = pybind11;
using spfmt::DType;
using spfmt::Op;
using spfmt::View;

namespace spfmt_python {
namespace {

// ------------------------------------------------------------------------------- torch's tensors

// DLPack's own declarations, whose layout its major version 1 fixes.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void *allocate, *from_object, *to_object;
  int (*view_of_object)(void* object, DLTensor* out);
  void* current_stream;
};

enum DLCode : uint8_t { kInt = 0, kFloat = 2 };
constexpr int32_t kCPU = 1;

struct Torch {
  const DLPackExchangeAPI* dlpack;
  PyTypeObject *tensor, *parameter;
  PyObject *refresh, *empty;
  PyObject* version = PyUnicode_InternFromString("_version");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
};
const Torch* torch = nullptr;

// refresh(structure) looks at a structure and tells what it is; empty(shape, strides, dtype)
// allocates.
void use_torch(const py::type& tensor, const py::type& parameter, const py::object& refresh,
               const py::object& empty) {
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* table = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw py::error_already_set();
  if (table->major != 1 || table->view_of_object == nullptr) {
    throw std::invalid_argument("torch's DLPack table is of another version than 1");
  }
  torch = new Torch{table, reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr()),
                    reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr()),
                    refresh.inc_ref().ptr(), empty.inc_ref().ptr()};  // for the life of the process
}

struct Tensor {
  PyObject* object;
  DLTensor view;

  int64_t size(int dim) const { return view.shape[dim]; }
  int64_t itemsize() const { return view.bits / 8; }
  bool contiguous() const { return view.shape[0] < 2 || view.strides[0] == 1; }  // one dimension
  void* data() const { return static_cast<char*>(view.data) + view.byte_offset; }
  DType dtype() const { return view.bits == 64 ? DType::f64 : DType::f32; }
  // (batch, features) as features by samples.
  View samples() const {
    return {data(), dtype(), size(1), size(0), view.strides[1], view.strides[0]};
  }
  View vector() const { return {data(), dtype(), size(0), 1, 1, 0}; }
};

// Whether an object is a strided CPU tensor of this rank and dtype, at a whole address. Only the
// exact types: a subclass may redefine operators.
bool plain(PyObject* object, int ndim, DLCode code, int bits, Tensor& t) {
  const PyTypeObject* type = Py_TYPE(object);
  if (type != torch->tensor && type != torch->parameter) return false;
  t.object = object;
  if (torch->dlpack->view_of_object(object, &t.view) != 0) {
    PyErr_Clear();  // no strides or no memory: a sparse tensor, for instance
    return false;
  }
  const DLTensor& v = t.view;
  if (v.device_type != kCPU || v.ndim != ndim || v.code != code || v.bits != bits) return false;
  if (v.lanes != 1 || v.strides == nullptr) return false;
  const bool empty = std::find(v.shape, v.shape + ndim, 0) != v.shape + ndim;
  if (v.data == nullptr && !empty) return false;  // one of torch's zero tensors
  return reinterpret_cast<uintptr_t>(t.data()) % t.itemsize() == 0;
}

// The same for an operand, whose elements must be what the memory says: a lazily negated view's are
// not.
bool plain_floats(PyObject* object, int ndim, int bits, Tensor& t) {
  if (!plain(object, ndim, kFloat, bits, t)) return false;
  const auto neg =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, torch->is_neg));
  if (!neg) throw py::error_already_set();
  return neg.ptr() == Py_False;
}

// -------------------------------------------------------------------------------- what is known

// Structure words begin with a header that carries a hash of all of them.
constexpr int kHeader = 5;
using Header = std::array<int32_t, kHeader>;

// A structure where it lies. The address may have been given to another since, and other words
// written there: header and version tell. Words that were changed one by one, without a new header
// and past the version counter, are no structure that anybody encoded.
struct Known {
  int64_t count, version;
  Header header;
  py::capsule plan;
};
// Values whose owner promises that they stay as they are while he holds them; counted writes end
// it.
struct Promise {
  int64_t count, version, number;
};

template <class Entry>
std::unordered_map<const void*, Entry>& all() {
  static auto* entries = new std::unordered_map<const void*, Entry>;  // outlives every user
  return *entries;
}

// Nothing for an inference tensor, which counts no writes.
std::optional<int64_t> version_of(const Tensor& t) {
  const auto version =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(t.object, torch->version));
  if (!version) {
    PyErr_Clear();
    return std::nullopt;
  }
  return integer(version.ptr());
}

py::capsule known_plan(const Tensor& structure) {
  const auto found = all<Known>().find(structure.data());
  if (found == all<Known>().end()) return {};
  const Known known = found->second;  // it may go while Python code runs
  if (known.count != structure.size(0)) return {};
  if (std::memcmp(known.header.data(), structure.data(), sizeof(Header)) != 0) return {};
  if (version_of(structure) != known.version) return {};
  return known.plan;
}

// The plan of a structure; Python is asked once where it is not known.
py::capsule plan_at(PyObject* structure) {
  Tensor words;
  if (!plain(structure, 1, kInt, 32, words) || !words.contiguous()) return {};
  if (words.size(0) < kHeader) return {};
  if (py::capsule plan = known_plan(words)) return plan;
  const auto done =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch->refresh, structure));
  if (!done) throw py::error_already_set();
  return known_plan(words);
}

int64_t constant_of(const Tensor& values) {
  const auto found = all<Promise>().find(values.data());
  if (found == all<Promise>().end()) return spfmt::kChanging;
  const Promise kept = found->second;  // it may go while Python code runs
  if (kept.count != values.size(0)) return spfmt::kChanging;
  return version_of(values) == kept.version ? kept.number : spfmt::kChanging;
}

void know(uintptr_t data, int64_t count, int64_t version, const Header& header,
          const py::capsule& plan) {
  all<Known>().insert_or_assign(reinterpret_cast<void*>(data), Known{count, version, header, plan});
}
void forget(uintptr_t data) { all<Known>().erase(reinterpret_cast<void*>(data)); }

void promise(uintptr_t data, int64_t count, int64_t version, int64_t number) {
  all<Promise>().insert_or_assign(reinterpret_cast<void*>(data), Promise{count, version, number});
}
void retract(uintptr_t data) { all<Promise>().erase(reinterpret_cast<void*>(data)); }

// ------------------------------------------------------------------------------------- products

// Whether an object is an int, perhaps a huge one, of this value.
bool is_size(PyObject* o, int64_t size) {
  int overflow = 0;
  return PyLong_Check(o) && PyLong_AsLongLongAndOverflow(o, &overflow) == size && overflow == 0;
}

// The plan of a structure that is of this shape, a tuple or list of two ints; null elsewhere. The
// capsule holds it, for what is known may go while Python code runs.
const spfmt::Plan* plan_of(const py::capsule& held, PyObject* shape) {
  const bool listed = PyTuple_Check(shape) || PyList_Check(shape);
  if (!held || !listed || PySequence_Fast_GET_SIZE(shape) != 2) return nullptr;
  const spfmt::Plan& plan = *held.get_pointer<PyPlan>()->plan;
  const bool fits = is_size(PySequence_Fast_GET_ITEM(shape, 0), spfmt::plan_rows(plan)) &&
                    is_size(PySequence_Fast_GET_ITEM(shape, 1), spfmt::plan_cols(plan));
  return fits ? &plan : nullptr;
}

// 32 or 64, or 0 where x is no plain matrix of floats.
int bits_of(PyObject* x, Tensor& t) {
  return plain_floats(x, 2, 32, t) ? 32 : plain_floats(x, 2, 64, t) ? 64 : 0;
}

// `given`, or a new tensor where that is None.
py::object output(PyObject* given, const py::tuple& shape, const py::tuple& strides,
                  PyObject* like) {
  if (given != Py_None) return py::reinterpret_borrow<py::object>(given);
  const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(like, torch->dtype));
  if (!dtype) throw py::error_already_set();
  return py::handle(torch->empty)(shape, strides, dtype);
}

Op operation(int64_t op, int64_t activation) {
  if (op < 0 || op > 1) throw py::index_error("no such operation");
  const int64_t last = op == 0 ? static_cast<int64_t>(spfmt::Activation::silu) : 0;
  if (activation < 0 || activation > last) throw py::index_error("no such activation");
  return static_cast<Op>(op);
}

// multiply_tensors(op, values, structure, x, bias, shape, activation, out, threads, written)
//   -> out, which is allocated where None is given; or None
PyObject* multiply(PyObject*, PyObject* const* arg, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    require_count(count, 10);
    const int64_t activation = integer(arg[6]);
    spfmt::Product p;
    p.op = operation(integer(arg[0]), activation);
    p.activation = static_cast<spfmt::Activation>(activation);
    Tensor values, x, bias, y;
    const int bits = torch == nullptr ? 0 : bits_of(arg[3], x);
    if (bits == 0 || !plain_floats(arg[1], 1, bits, values) || !values.contiguous()) Py_RETURN_NONE;
    const py::capsule held = plan_at(arg[2]);
    const spfmt::Plan* plan = plan_of(held, arg[5]);
    const auto level = level_in_use();
    if (plan == nullptr || !level || values.size(0) < spfmt::plan_nnz(*plan)) Py_RETURN_NONE;
    const int64_t rows = spfmt::plan_rows(*plan), cols = spfmt::plan_cols(*plan);
    const bool forward = p.op == Op::spmm;
    const int64_t n_in = forward ? cols : rows, n_out = forward ? rows : cols, batch = x.size(0);
    if (x.size(1) != n_in) Py_RETURN_NONE;
    if (arg[4] != Py_None) {
      if (!forward || !plain_floats(arg[4], 1, bits, bias)) Py_RETURN_NONE;
      if (!bias.contiguous() || bias.size(0) != rows) Py_RETURN_NONE;
      p.bias = bias.vector();
    }
    const py::object out =
        output(arg[7], py::make_tuple(batch, n_out), py::make_tuple(n_out, 1), arg[3]);
    if (!plain(out.ptr(), 2, kFloat, bits, y)) Py_RETURN_NONE;
    if (y.size(0) != batch || y.size(1) != n_out) Py_RETURN_NONE;
    p.values = values.vector();
    p.constant = arg[9] == Py_True ? spfmt::kWritten : constant_of(values);
    p.in = x.samples();
    p.out = y.samples();
    run(*plan, *level, p, threads_of(arg[8]));
    return out.inc_ref().ptr();
  });
}

// sample_tensors(structure, dy, x, shape, capacity, out, threads) -> out or None
// Elements of out behind nnz become zero; capacity counts where out is None.
PyObject* sample(PyObject*, PyObject* const* arg, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    require_count(count, 7);
    Tensor dy, x, gradient;
    const int bits = torch == nullptr ? 0 : bits_of(arg[1], dy);
    if (bits == 0 || !plain_floats(arg[2], 2, bits, x)) Py_RETURN_NONE;
    const py::capsule held = plan_at(arg[0]);
    const spfmt::Plan* plan = plan_of(held, arg[3]);
    const auto level = level_in_use();
    if (plan == nullptr || !level || dy.size(0) != x.size(0)) Py_RETURN_NONE;
    const bool fits = dy.size(1) == spfmt::plan_rows(*plan) && x.size(1) == spfmt::plan_cols(*plan);
    // torch's allocation takes ints proper and nothing else that stands for one.
    const int64_t nnz = spfmt::plan_nnz(*plan);
    const int64_t capacity = arg[5] == Py_None ? integer(arg[4]) : nnz;
    if (!fits || capacity < nnz) Py_RETURN_NONE;
    const py::object out = output(arg[5], py::make_tuple(capacity), py::make_tuple(1), arg[1]);
    if (!plain(out.ptr(), 1, kFloat, bits, gradient) || !gradient.contiguous()) Py_RETURN_NONE;
    if (gradient.size(0) < nnz) Py_RETURN_NONE;
    spfmt::Product p;
    p.op = Op::sddmm;
    p.values = gradient.vector();
    p.in = dy.samples();
    p.in2 = x.samples();
    run(*plan, *level, p, threads_of(arg[6]));
    clear_behind(p.values, nnz);
    return out.inc_ref().ptr();
  });
}

PyMethodDef kModule[] = {
    {"multiply_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(multiply)),
     METH_FASTCALL, nullptr},
    {"sample_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(sample)),
     METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void define_tensors(py::module_& m) {
  m.def("use_torch", &use_torch, py::arg("tensor"), py::arg("parameter"), py::arg("refresh"),
        py::arg("empty"));
  m.def("know", &know, py::arg("data"), py::arg("count"), py::arg("version"), py::arg("header"),
        py::arg("plan"));
  m.def("forget", &forget, py::arg("data"));
  m.def("promise", &promise, py::arg("data"), py::arg("count"), py::arg("version"),
        py::arg("number"));
  m.def("retract", &retract, py::arg("data"));
  if (PyModule_AddFunctions(m.ptr(), kModule) != 0) throw py::error_already_set();
}

}  // namespace spfmt_python
