// Products of torch's tensors, from the objects that Python holds and without torch's headers, so
// that one build serves every torch. A compiled graph and an eager module call them directly: to
// torch's dispatcher and back costs ten times what the rest of a small product does.
//
// DLPack's table of C functions (Tensor.__dlpack_c_exchange_api__) tells where a tensor lies, and
// two attributes tell what DLPack does not: its storage and its version. Nothing is decided here.
// Which structure lies where, and which version of its values was seen with it, is what
// spfmt/torch/_identity.py has found out and left in a Memo. A product runs when every tensor is
// what the Memo says; when one is not, Python is asked to look again, once; and what is not plain
// is declined with None, so that the long way can explain it.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "calls.h"
#include "fastcall.h"

namespace py = pybind11;

namespace spfmt_python {
namespace {

// -------------------------------------------------------------------------------- fingerprints

// Four chains, so that multiplications overlap. Each step is a bijection of its chain: one changed
// element always changes the result, several do but for one time in 2^64.
template <class Word>
uint64_t hash_elements(const char* data, int64_t count, int64_t step) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;
  uint64_t chain[4] = {1, 2, 3, 4};
  const auto mix = [&](uint64_t& state, int64_t i) {
    Word word;
    std::memcpy(&word, data + i * static_cast<int64_t>(sizeof(Word)), sizeof(Word));
    state = (state ^ word) * kOdd;
    state ^= state >> 32;
  };
  int64_t i = count - 1;
  for (; i >= 3 * step; i -= 4 * step) {
    for (int lane = 0; lane < 4; ++lane) mix(chain[lane], i - lane * step);
  }
  for (; i >= 0; i -= step) mix(chain[0], i);
  uint64_t all = 0;
  for (const uint64_t c : chain) all = (all ^ c) * kOdd;
  return all;
}

uint64_t fingerprint_of(const void* memory, int64_t count, int64_t itemsize) {
  const char* data = static_cast<const char*>(memory);
  const int64_t step = std::max<int64_t>(1, count / 256);
  return itemsize == 4 ? hash_elements<uint32_t>(data, count, step)
                       : hash_elements<uint64_t>(data, count, step);
}

// fingerprint(address, count, itemsize) -> int: about 256 evenly spread elements, the last included
PyObject* fingerprint(PyObject*, PyObject* const* arg, Py_ssize_t n) {
  return translated([&] {
    require_count(n, 3);
    const int64_t size = integer(arg[2]);
    if (size != 4 && size != 8) throw std::invalid_argument("elements of 4 or 8 bytes only");
    return PyLong_FromUnsignedLongLong(fingerprint_of(address(arg[0]), integer(arg[1]), size));
  });
}

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
  PyObject* storage = PyUnicode_InternFromString("untyped_storage");
  PyObject* cdata = PyUnicode_InternFromString("_cdata");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
};
const Torch* torch = nullptr;

// refresh(structure, values) brings the Memo up to date; empty(shape, strides, dtype) allocates.
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
  Operand samples() const {  // (batch, features)
    return {data(), size(1), size(0), view.strides[1], view.strides[0]};
  }
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

// ------------------------------------------------------------------------------------- identity

// What identifies the content of a vector, field by field as `_key` in spfmt/torch/_identity.py.
struct Content {
  const void *storage, *data;
  int64_t count, itemsize, version;
  uint64_t fingerprint;

  auto fields() const { return std::tie(storage, data, count, itemsize, version, fingerprint); }
  bool operator==(const Content& other) const { return fields() == other.fields(); }
};

using Place = std::pair<const void*, const void*>;  // storage and address

py::object attribute(PyObject* object, PyObject* name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
}

// False for an inference tensor, which has no version. `sampled` elements are fingerprinted.
bool read_content(const Tensor& t, int64_t sampled, Content& content) {
  const py::object version = attribute(t.object, torch->version);
  if (!version) {
    PyErr_Clear();
    return false;
  }
  const auto storage =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(t.object, torch->storage));
  if (!storage) throw py::error_already_set();
  const py::object cdata = attribute(storage.ptr(), torch->cdata);
  if (!cdata) throw py::error_already_set();
  content = {address(cdata.ptr()),
             t.data(),
             t.size(0),
             t.itemsize(),
             integer(version.ptr()),
             fingerprint_of(t.data(), sampled, t.itemsize())};
  return true;
}

// Whether an object is an int, perhaps a huge one, of this value.
bool is_size(PyObject* o, int64_t size) {
  int overflow = 0;
  return PyLong_Check(o) && PyLong_AsLongLongAndOverflow(o, &overflow) == size && overflow == 0;
}

// What Python found out about one structure buffer; it holds the Memo, weak references that keep
// storages from being given to others, and nothing else.
class Memo {
 public:
  Memo(py::capsule calls, std::string format)
      : calls_(std::move(calls)), format_(std::move(format)) {}
  ~Memo() { forget(); }
  Memo(const Memo&) = delete;
  Memo& operator=(const Memo&) = delete;

  static Memo* find(const Content& structure) {
    const auto known = all().find({structure.storage, structure.data});
    return known != all().end() && known->second->structure_ == structure ? known->second : nullptr;
  }

  void set_structure(const Content& structure) {
    forget();
    structure_ = structure;
    all()[{structure.storage, structure.data}] = this;
  }

  void set_values(const Content& values, int64_t version) {
    values_ = values;
    version_ = version;
  }

  bool saw(const Content& values) const { return values_ == values; }
  int64_t version() const { return version_; }
  const py::capsule& calls() const { return calls_; }

  // Whether this is the weight that a caller means: shape is a tuple or list of two ints.
  bool describes(PyObject* shape, PyObject* format) const {
    const bool listed = PyTuple_Check(shape) || PyList_Check(shape);
    if (!listed || PySequence_Fast_GET_SIZE(shape) != 2 || !PyUnicode_Check(format)) return false;
    PyObject *rows = PySequence_Fast_GET_ITEM(shape, 0), *cols = PySequence_Fast_GET_ITEM(shape, 1);
    const PyPlan& plan = calls_.get_pointer<Calls>()->plan;
    return is_size(rows, plan.rows) && is_size(cols, plan.cols) &&
           PyUnicode_CompareWithASCIIString(format, format_.c_str()) == 0;
  }

 private:
  static std::map<Place, Memo*>& all() {
    static auto* memos = new std::map<Place, Memo*>;  // outlives every Memo
    return *memos;
  }

  void forget() {
    const auto known = all().find({structure_.storage, structure_.data});
    if (known != all().end() && known->second == this) all().erase(known);
  }

  py::capsule calls_;
  std::string format_;
  Content structure_{}, values_{};
  int64_t version_ = spfmt::kNoVersion;
};

Content content(uintptr_t storage, uintptr_t data, int64_t count, int64_t itemsize, int64_t version,
                uint64_t fingerprint) {
  return {reinterpret_cast<void*>(storage),
          reinterpret_cast<void*>(data),
          count,
          itemsize,
          version,
          fingerprint};
}

constexpr int64_t kHeader = 4;  // structure words that carry a checksum of all of them

// The Memo for a structure and, where there are any, its values; null for inference tensors.
const Memo* recall(const Tensor& structure, const Tensor* values) {
  Content words, numbers;
  if (values != nullptr && !read_content(*values, values->size(0), numbers)) return nullptr;
  for (const bool asked : {false, true}) {
    if (!read_content(structure, std::min(kHeader, structure.size(0)), words)) return nullptr;
    const Memo* memo = Memo::find(words);
    if (memo != nullptr && (values == nullptr || memo->saw(numbers))) return memo;
    if (asked) break;
    PyObject* seen[] = {structure.object, values == nullptr ? Py_None : values->object};
    const auto done =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch->refresh, seen, 2, nullptr));
    if (!done) throw py::error_already_set();
  }
  return nullptr;
}

// ------------------------------------------------------------------------------------- products

// What a product takes from a Memo, which may go while Python code runs.
struct Weight {
  py::capsule held;
  int64_t version;

  const Calls& calls() const { return *held.get_pointer<Calls>(); }
  const PyPlan& plan() const { return calls().plan; }
  int64_t nnz() const { return spfmt::plan_nnz(*plan().plan); }
};

// Nothing where the structure is not plain, or is not of this shape and format.
std::optional<Weight> weight(PyObject* structure, const Tensor* values, PyObject* shape,
                             PyObject* format) {
  Tensor words;
  if (!plain(structure, 1, kInt, 32, words) || !words.contiguous()) return std::nullopt;
  const Memo* memo = recall(words, values);
  if (memo == nullptr || !memo->describes(shape, format)) return std::nullopt;
  return Weight{memo->calls(), memo->version()};
}

// 32 or 64, or 0 where x is no plain matrix of floats.
int bits_of(PyObject* x, Tensor& t) {
  return plain_floats(x, 2, 32, t) ? 32 : plain_floats(x, 2, 64, t) ? 64 : 0;
}

// None, or a vector of `size` floats.
bool plain_bias(PyObject* bias, int bits, int64_t size, Tensor& t) {
  if (bias == Py_None) return true;
  return plain_floats(bias, 1, bits, t) && t.contiguous() && t.size(0) == size;
}

// `given`, or a new tensor where that is None.
py::object output(PyObject* given, const py::tuple& shape, const py::tuple& strides,
                  PyObject* like) {
  if (given != Py_None) return py::reinterpret_borrow<py::object>(given);
  const py::object dtype = attribute(like, torch->dtype);
  if (!dtype) throw py::error_already_set();
  return py::handle(torch->empty)(shape, strides, dtype);
}

spfmt::Op operation(int64_t op, int64_t activation) {
  if (op < 0 || op > 1) throw py::index_error("no such operation");
  const int64_t last = op == 0 ? static_cast<int64_t>(spfmt::Activation::silu) : 0;
  if (activation < 0 || activation > last) throw py::index_error("no such activation");
  return static_cast<spfmt::Op>(op);
}

// multiply_tensors(op, values, structure, x, bias, shape, format, activation, out, threads)
//   -> out, which is allocated where None is given; or None
PyObject* multiply(PyObject*, PyObject* const* arg, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    require_count(count, 10);
    const int64_t activation = integer(arg[7]);
    const spfmt::Op op = operation(integer(arg[0]), activation);
    Tensor values, x, bias, y;
    const int bits = torch == nullptr ? 0 : bits_of(arg[3], x);
    if (bits == 0 || !plain_floats(arg[1], 1, bits, values) || !values.contiguous()) Py_RETURN_NONE;
    const auto a = weight(arg[2], &values, arg[5], arg[6]);
    if (!a || values.size(0) < a->nnz()) Py_RETURN_NONE;
    const bool forward = op == spfmt::Op::spmm;
    const int64_t rows = a->plan().rows, cols = a->plan().cols, batch = x.size(0);
    const int64_t n_in = forward ? cols : rows, n_out = forward ? rows : cols;
    if (x.size(1) != n_in || !plain_bias(arg[4], bits, forward ? rows : -1, bias)) Py_RETURN_NONE;
    const spfmt::Kernel* kernel = a->calls().kernel(op, bits == 64);
    if (kernel == nullptr) Py_RETURN_NONE;
    const py::object out =
        output(arg[8], py::make_tuple(batch, n_out), py::make_tuple(n_out, 1), arg[3]);
    if (!plain(out.ptr(), 2, kFloat, bits, y)) Py_RETURN_NONE;
    if (y.size(0) != batch || y.size(1) != n_out) Py_RETURN_NONE;
    run(a->calls(), *kernel,
        {op, bits == 64, values.data(), a->version, x.samples(), Operand{}, y.samples(),
         arg[4] == Py_None ? nullptr : bias.data(), threads_of(arg[9]),
         static_cast<spfmt::Activation>(activation)});
    return out.inc_ref().ptr();
  });
}

// sample_tensors(structure, dy, x, shape, format, capacity, out, threads) -> out or None
// Elements of out behind nnz become zero; capacity counts where out is None.
PyObject* sample(PyObject*, PyObject* const* arg, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    require_count(count, 8);
    Tensor dy, x, gradient;
    const int bits = torch == nullptr ? 0 : bits_of(arg[1], dy);
    if (bits == 0 || !plain_floats(arg[2], 2, bits, x)) Py_RETURN_NONE;
    const auto a = weight(arg[0], nullptr, arg[3], arg[4]);
    if (!a || dy.size(1) != a->plan().rows || x.size(1) != a->plan().cols) Py_RETURN_NONE;
    const spfmt::Kernel* kernel = a->calls().kernel(spfmt::Op::sddmm, bits == 64);
    if (kernel == nullptr || dy.size(0) != x.size(0)) Py_RETURN_NONE;
    // torch's allocation takes ints proper and nothing else that stands for one.
    const int64_t capacity = arg[6] == Py_None ? integer(arg[5]) : 0;
    if (arg[6] == Py_None && capacity < a->nnz()) Py_RETURN_NONE;
    const py::object out = output(arg[6], py::make_tuple(capacity), py::make_tuple(1), arg[1]);
    if (!plain(out.ptr(), 1, kFloat, bits, gradient) || !gradient.contiguous()) Py_RETURN_NONE;
    const int64_t nnz = a->nnz(), spare = gradient.size(0) - nnz, size = gradient.itemsize();
    if (spare < 0) Py_RETURN_NONE;
    run(a->calls(), *kernel,
        {spfmt::Op::sddmm, bits == 64, gradient.data(), spfmt::kNoVersion, dy.samples(),
         x.samples(), Operand{}, nullptr, threads_of(arg[7])});
    if (spare > 0) std::memset(static_cast<char*>(gradient.data()) + nnz * size, 0, spare * size);
    return out.inc_ref().ptr();
  });
}

PyMethodDef kModule[] = {
    {"fingerprint", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fingerprint)),
     METH_FASTCALL, nullptr},
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
  py::class_<Content>(m, "Content")
      .def(py::init(&content), py::arg("storage"), py::arg("data"), py::arg("count"),
           py::arg("itemsize"), py::arg("version"), py::arg("fingerprint"));
  py::class_<Memo>(m, "Memo")
      .def(py::init<py::capsule, std::string>(), py::arg("calls"), py::arg("format"))
      .def("set_structure", &Memo::set_structure, py::arg("structure"))
      .def("set_values", &Memo::set_values, py::arg("values"), py::arg("version"));
  if (PyModule_AddFunctions(m.ptr(), kModule) != 0) throw py::error_already_set();
}

}  // namespace spfmt_python
