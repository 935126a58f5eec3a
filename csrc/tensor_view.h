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
  int32_t device_type, device;  // 1: CPU
  int32_t rank;
  uint8_t type_code, bits;  // 2: IEEE floating point, 4: bfloat16
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;

  bool has_type(const TensorView& other) const { return type_code == other.type_code && bits == other.bits; }
  // Whether it has this shape and lies in memory without gaps. Strides of dimensions of size 1 do not count.
  template <int kRank>
  bool is_dense(const int64_t (&wanted)[kRank]) const {
    if (rank != kRank) return false;
    bool empty = false, even = true;
    int64_t stride = 1;
    for (int i = kRank - 1; i >= 0; --i) {
      if (shape[i] != wanted[i]) return false;
      empty |= shape[i] == 0;
      even &= shape[i] == 1 || strides[i] == stride;
      stride *= shape[i];
    }
    return even || empty;
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
    tensor_ = reinterpret_cast<PyTypeObject*>(tensor),
    parameter_ = reinterpret_cast<PyTypeObject*>(parameter);
    PyObject* const capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    if (capsule) table_ = static_cast<const Table*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_XDECREF(capsule);
    PyErr_Clear();
    if (table_ && (table_->version.major != 1 || !table_->view)) table_ = nullptr;
    return table_;
  }

  // False if it is not a tensor in the memory of the CPU.
  bool read(PyObject* object, TensorView& view) const {
    if (Py_TYPE(object) != tensor_ && Py_TYPE(object) != parameter_) return false;
    if (table_->view(object, &view) != 0) {
      PyErr_Clear();
      return false;
    }
    view.data = static_cast<char*>(view.data) + view.byte_offset;
    return view.device_type == 1;
  }

  explicit operator bool() const { return table_; }

 private:
  struct Version {
    uint32_t major, minor;
  };
  struct Table {
    Version version;
    const void* older;
    void (*allocate)();
    void (*take_from_python)();
    void (*give_to_python)();
    int (*view)(void* object, TensorView* out);
    void (*current_stream)();
  };

  PyTypeObject* tensor_ = nullptr;
  PyTypeObject* parameter_ = nullptr;
  const Table* table_ = nullptr;
};

}  // namespace fastseq
