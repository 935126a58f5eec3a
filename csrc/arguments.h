// How the bindings read what Python hands over: integers off tuples, in the order of the signatures in _C.pyi.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <type_traits>

#include "fastseq.h"

namespace fastseq {

namespace py = pybind11;

// Reads integers, and a few real numbers, off a tuple, in order. pybind11's own conversion of forty arguments takes
// longer than a small step of a network does.
class Integers {
 public:
  explicit Integers(py::handle tuple) : tuple_(tuple.ptr()), size_(PyTuple_GET_SIZE(tuple_)) {}
  int64_t next() {
    if (at_ == size_) throw py::type_error("too few integers; the signatures are in _C.pyi");
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple_, at_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(next()));
  }
  double real() {
    if (at_ == size_) throw py::type_error("too few numbers; the signatures are in _C.pyi");
    const double value = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple_, at_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  // The tuple that comes next.
  Integers nested() {
    if (at_ == size_ || !PyTuple_Check(PyTuple_GET_ITEM(tuple_, at_)))
      throw py::type_error("expected a tuple");
    return Integers(PyTuple_GET_ITEM(tuple_, at_++));
  }
  py::ssize_t left() const { return size_ - at_; }

 private:
  PyObject* tuple_;
  py::ssize_t size_, at_ = 0;
};

template <class Pointer>
void read_sequence(Integers& from, int strides, SequenceTensor<Pointer>& tensor) {
  tensor.data = from.pointer<std::remove_pointer_t<Pointer>>();
  tensor.stride[2] = 1;
  for (int i = 0; i < strides; ++i) tensor.stride[i] = from.next();
}

// A function of so many arguments that says whether it has done anything, or what it needs, without pybind11's
// conversions, which would take as long as the rest.
template <auto run, Py_ssize_t kArguments>
PyObject* call_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments) {
    PyErr_SetString(PyExc_TypeError, "another number of arguments is needed; the signatures are in _C.pyi");
    return nullptr;
  }
  try {
    const auto result = run(arguments);
    if constexpr (std::is_same_v<decltype(run(arguments)), bool>) {
      return PyBool_FromLong(result);
    } else {
      return PyLong_FromLongLong(result);
    }
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}
template <auto run, Py_ssize_t kArguments>
PyMethodDef fast_call(const char* name) {
  const auto call = call_fast<run, kArguments>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL, nullptr};
}

inline CellKind cell_of(int64_t code) {
  if (code < 0 || code >= kCells) throw py::value_error("cell: unknown code");
  return CellKind(code);
}
inline DType dtype_of(int64_t code) {
  if (code < 0 || code >= kDTypes) throw py::value_error("dtype: unknown code");
  return DType(code);
}

}  // namespace fastseq
