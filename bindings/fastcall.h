// Arguments of functions that Python calls with a bare array of objects (METH_FASTCALL).
#pragma once

#include <omp.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>

namespace spfmt_python {

// body() with C++ exceptions turned into Python's, as pybind11 would.
template <class Body>
PyObject* translated(const Body& body) {
  try {
    return body();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

inline void require_count(Py_ssize_t got, Py_ssize_t want) {
  if (got != want) throw pybind11::type_error("wrong number of arguments");
}

inline int64_t integer(PyObject* o) {
  const int64_t value = PyLong_AsLongLong(o);
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

inline void* address(PyObject* o) {
  void* value = PyLong_AsVoidPtr(o);
  if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

inline int64_t count_of(PyObject* o) {
  const int64_t count = integer(o);
  if (count < 0) throw pybind11::value_error("a negative count");
  return count;
}

// None stands for OpenMP's own setting.
inline int threads_of(PyObject* o) {
  return o == Py_None ? omp_get_max_threads() : static_cast<int>(integer(o));
}

}  // namespace spfmt_python
