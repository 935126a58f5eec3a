// Tensors as Python hands them over: address, shape and strides, read through the C function table that DLPack
// defines and torch.Tensor publishes as __dlpack_c_exchange_api__. It takes 50 ns a tensor, where asking for
// the same in Python takes 500, and needs no torch header. A torch without the table (before 2.10) is read in
// Python only.
//
// The structs below are DLPack's binary interface, major version 1.
#pragma once

#include <Python.h>

#include <cstdint>

#include "fastseq.h"

namespace fastseq {

struct TensorView {
  void* data;
  int32_t device_type, device;  // 1: CPU, 2: CUDA
  int32_t rank;
  uint8_t type_code, bits;  // 2: IEEE floating point, 4: bfloat16
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;

  bool has_type(const TensorView& other) const {
    return type_code == other.type_code && bits == other.bits && lanes == other.lanes;
  }
  bool is_empty() const {
    for (int i = 0; i < rank; ++i) {
      if (shape[i] == 0) return true;
    }
    return false;
  }
  // Whether it has this shape and lies in memory without gaps. Strides of dimensions of size 1 do not count.
  template <int kRank>
  bool is_dense(const int64_t (&wanted)[kRank]) const {
    if (rank != kRank) return false;
    bool even = true;
    int64_t stride = 1;
    for (int i = kRank - 1; i >= 0; --i) {
      if (shape[i] != wanted[i]) return false;
      even &= shape[i] == 1 || strides[i] == stride;
      stride *= shape[i];
    }
    return even || is_empty();
  }
};

// False if the dtype is none of ours.
inline bool dtype_of(const TensorView& view, DType& dtype) {
  const int code = view.type_code, bits = view.bits;
  if (view.lanes != 1) return false;
  if (code == 2 && bits == 32) return dtype = DType::kFloat32, true;
  if (code == 2 && bits == 64) return dtype = DType::kFloat64, true;
  if (code == 4 && bits == 16) return dtype = DType::kBFloat16, true;
  if (code == 2 && bits == 16) return dtype = DType::kFloat16, true;
  return false;
}

class TensorReader {
 public:
  // The classes that may be read: torch.Tensor and torch.nn.Parameter; subclasses may be anything. Returns
  // whether this torch publishes the table.
  bool use(PyObject* tensor, PyObject* parameter) {
    tensor_ = reinterpret_cast<PyTypeObject*>(tensor);
    parameter_ = reinterpret_cast<PyTypeObject*>(parameter);
    is_neg_ = PyUnicode_InternFromString("is_neg");
    PyObject* const capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    if (capsule) table_ = static_cast<const Table*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_XDECREF(capsule);
    PyErr_Clear();
    if (table_ && (table_->version.major != 1 || !table_->view)) table_ = nullptr;
    return table_ && is_neg_;
  }

  // False if it is not a tensor that lies, as it is, in the memory of this type of device: one may lie elsewhere, be
  // a view of negated numbers (the imaginary part of a conjugate), or have no memory at all. Leaves no Python error.
  bool read(PyObject* object, TensorView& view, int device_type = 1) const {
    if (Py_TYPE(object) != tensor_ && Py_TYPE(object) != parameter_) return false;
    if (table_->view(object, &view) != 0) {
      PyErr_Clear();
      return false;
    }
    PyObject* const negated = PyObject_CallMethodNoArgs(object, is_neg_);
    Py_XDECREF(negated);  // True and False outlive it
    if (negated != Py_False) {
      PyErr_Clear();
      return false;
    }
    if (!view.data) return view.device_type == device_type && view.is_empty();
    view.data = static_cast<char*>(view.data) + view.byte_offset;
    return view.device_type == device_type;
  }

  explicit operator bool() const { return table_ && is_neg_; }

 private:
  struct Version {
    uint32_t major, minor;
  };
  struct Table {  // DLPackExchangeAPI; only the members that are used have their types
    Version version;
    const void* prev_api;
    void (*managed_tensor_allocator)();
    void (*managed_tensor_from_py_object_no_sync)();
    void (*managed_tensor_to_py_object_no_sync)();
    int (*view)(void* object, TensorView* out);  // dltensor_from_py_object_no_sync
    void (*current_work_stream)();
  };

  PyObject* is_neg_ = nullptr;
  PyTypeObject* tensor_ = nullptr;  // classes of a package that is never unloaded
  PyTypeObject* parameter_ = nullptr;
  const Table* table_ = nullptr;
};

inline TensorReader g_tensors;

}  // namespace fastseq
