// Attention's arguments as Python hands them over, the same for both engines; see arguments.h.
#pragma once

#include <cmath>

#include "arguments.h"
#include "tensor_view.h"

namespace fastseq {

inline HeadTensor read_head(Integers& from) {
  Integers head = from.nested();
  HeadTensor t = {head.pointer<void>(), {}};
  for (int64_t& stride : t.stride) stride = head.next();
  return t;
}
inline HeadRows read_rows(Integers& from) {
  Integers rows = from.nested();
  HeadRows t = {rows.pointer<void>(), {}};
  for (int64_t& stride : t.stride) stride = rows.next();
  return t;
}
inline AttentionMask read_mask(Integers& from) {
  Integers mask = from.nested();
  AttentionMask m = {mask.pointer<const void>(), MaskKind::kNone, {}};
  const int64_t kind = mask.next();
  if (kind < 0 || kind > int(MaskKind::kFloat32)) throw py::value_error("mask: unknown kind");
  m.kind = MaskKind(kind);
  for (int64_t& stride : m.stride) stride = mask.next();
  return m;
}

inline AttentionArgs read_sizes(Integers& from) {
  AttentionArgs a = {};
  a.dtype = dtype_of(from.next()), a.threads = int(from.next());
  a.batch = from.next(), a.heads = from.next(), a.kv_heads = from.next();
  a.queries = from.next(), a.keys = from.next(), a.head_size = from.next(), a.value_size = from.next();
  if (a.heads < 0 || a.kv_heads < 1 || a.heads % a.kv_heads != 0)
    throw py::value_error("heads: not a multiple of kv_heads");
  return a;
}

inline AttentionArgs read_problem(Integers& from, bool backward) {
  AttentionArgs a = read_sizes(from);
  a.left = from.next(), a.right = from.next(), a.bottom_right = from.next() != 0;
  a.seed = uint64_t(from.next());
  a.scale = from.real(), a.softcap = from.real(), a.dropout_p = from.real();
  a.cu_seqlens_q = from.pointer<const int64_t>(), a.cu_seqlens_k = from.pointer<const int64_t>();
  a.key_lengths = from.pointer<const int64_t>();
  a.query = read_head(from), a.key = read_head(from), a.value = read_head(from), a.output = read_head(from);
  if (!backward) a.lse = read_rows(from);
  a.highest = read_rows(from), a.inverse_sum = read_rows(from);
  a.mask = read_mask(from);
  a.alibi = read_rows(from);
  a.sinks = from.pointer<const void>();
  return a;
}

inline AttentionArgs read_forward(Integers& from) {
  AttentionArgs a = read_problem(from, false);
  a.weights = read_head(from);
  a.remainder = read_head(from);
  return a;
}

inline AttentionArgs read_backward(Integers& from) {
  AttentionArgs a = read_problem(from, true);
  a.grad_output = read_head(from), a.grad_lse = read_rows(from), a.grad_weights = read_head(from);
  a.grad_query = read_head(from), a.grad_key = read_head(from), a.grad_value = read_head(from);
  Integers mask = from.nested();
  a.grad_mask = mask.pointer<void>();
  for (int64_t& stride : a.grad_mask_stride) stride = mask.next();
  a.grad_sinks = from.pointer<void>();
  a.remainder = read_head(from);
  return a;
}

// attention_dual_forward: the numbers of attention_forward, then the tangents.
inline AttentionDualArgs read_dual_forward(Integers& from) {
  AttentionDualArgs a = {};
  a.primal = read_forward(from);
  a.query = read_head(from), a.key = read_head(from), a.value = read_head(from);
  a.mask = read_mask(from);
  a.sinks = from.pointer<const void>();
  a.output = read_head(from), a.remainder = read_head(from), a.lse = read_rows(from);
  return a;
}

// attention_dual_backward: the numbers of attention_backward, without grad_weights, then the tangents of all that it
// reads and writes.
inline AttentionDualArgs read_dual_backward(Integers& from) {
  AttentionDualArgs a = {};
  a.primal = read_backward(from);
  a.query = read_head(from), a.key = read_head(from), a.value = read_head(from);
  a.mask = read_mask(from);
  a.sinks = from.pointer<const void>();
  a.output = read_head(from), a.remainder = read_head(from), a.lse = read_rows(from);
  a.grad_output = read_head(from), a.grad_lse = read_rows(from);
  a.grad_query = read_head(from), a.grad_key = read_head(from), a.grad_value = read_head(from);
  Integers mask = from.nested();
  a.grad_mask = mask.pointer<void>();
  for (int64_t& stride : a.primal.grad_mask_stride) stride = mask.next();
  a.grad_sinks = from.pointer<void>();
  return a;
}

// query, key, value and output of (B, heads, rows, features) on a type of device, is_causal, scale, enable_gqa: a call
// without any other option. False if anything about the tensors is not as usual.
inline bool read_plain(PyObject* const* arguments, int device_type, AttentionArgs& a) {
  const int is_causal = PyObject_IsTrue(arguments[4]), enable_gqa = PyObject_IsTrue(arguments[6]);
  if (arguments[5] != Py_None) a.scale = PyFloat_AsDouble(arguments[5]);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!g_tensors) return false;
  TensorView view[4];
  HeadTensor* const tensors[4] = {&a.query, &a.key, &a.value, &a.output};
  for (int i = 0; i < 4; ++i) {
    if (!g_tensors.read(arguments[i], view[i], device_type) || view[i].rank != 4) return false;
    if (!view[i].has_type(view[0]) || view[i].device != view[0].device) return false;
    if (view[i].is_empty() || view[i].strides[3] != 1) return false;
    *tensors[i] = {view[i].data, {view[i].strides[0], view[i].strides[1], view[i].strides[2]}};
  }
  const int64_t *const q = view[0].shape, *const k = view[1].shape, *const v = view[2].shape,
                       *const o = view[3].shape;
  const bool heads_fit = q[1] == k[1] || (enable_gqa && q[1] % k[1] == 0);
  if (!dtype_of(view[0], a.dtype) || !heads_fit || q[0] != k[0] || q[0] != v[0] || k[1] != v[1] ||
      q[3] != k[3] || k[2] != v[2] || o[0] != q[0] || o[1] != q[1] || o[2] != q[2] || o[3] != v[3]) {
    return false;
  }
  a.batch = q[0], a.heads = q[1], a.kv_heads = k[1], a.queries = q[2], a.keys = k[2];
  a.head_size = q[3], a.value_size = v[3];
  if (arguments[5] == Py_None) a.scale = 1 / std::sqrt(double(a.head_size));
  a.left = -1, a.right = is_causal ? 0 : -1;
  return true;
}

}  // namespace fastseq
