// Attention in the Python module fastseq._C: addresses, strides and options in, structs filled, the GIL released.
#include <pybind11/pybind11.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "attention_arguments.h"
#include "cpu/engine.h"
#include "cpu/team.h"
#include "fastseq.h"

namespace fastseq {
namespace {

// FASTSEQ_ATTENTION_PLAN=HxR forces head parts and row parts. Read here, where the GIL keeps the environment still.
void read_forced_plan(int (&forced)[2]) {
  const char* const text = std::getenv("FASTSEQ_ATTENTION_PLAN");
  if (!text || !*text) return;
  int read = 0;
  if (std::sscanf(text, "%dx%d%n", &forced[0], &forced[1], &read) != 2 || text[read] || forced[0] < 1 ||
      forced[1] < 1) {
    throw std::runtime_error("given: FASTSEQ_ATTENTION_PLAN=\"" + std::string(text) +
                             "\"\naccepted: parts of heads and of rows, HxR\n"
                             "try: two positive numbers, 1x2 say, or unset it");
  }
}

void forward(py::args numbers) {
  Integers from(numbers);
  AttentionArgs a = read_forward(from);
  read_forced_plan(a.forced_plan);
  if (from.left()) throw py::type_error("too many arguments; the signatures are in _C.pyi");
  py::gil_scoped_release release;
  attention_forward(a);
}

void backward(py::args numbers) {
  Integers from(numbers);
  AttentionArgs a = read_backward(from);
  read_forced_plan(a.forced_plan);
  if (from.left()) throw py::type_error("too many arguments; the signatures are in _C.pyi");
  py::gil_scoped_release release;
  attention_backward(a);
}

void dual_forward(py::args numbers) {
  Integers from(numbers);
  AttentionDualArgs a = read_dual_forward(from);
  read_forced_plan(a.primal.forced_plan);
  if (from.left()) throw py::type_error("too many arguments; the signatures are in _C.pyi");
  py::gil_scoped_release release;
  attention_dual_forward(a);
}

void dual_backward(py::args numbers) {
  Integers from(numbers);
  AttentionDualArgs a = read_dual_backward(from);
  read_forced_plan(a.primal.forced_plan);
  if (from.left()) throw py::type_error("too many arguments; the signatures are in _C.pyi");
  py::gil_scoped_release release;
  attention_dual_backward(a);
}

// attention(threads, query, key, value, output, is_causal, scale, enable_gqa): attention without any other option, of
// (B, heads, rows, features), and True. False, and nothing was done, if anything about the tensors is not as usual:
// who calls then asks the operator, which says what.
bool run_plain(PyObject* const* arguments) {
  AttentionArgs a = {};
  const long threads = PyLong_AsLong(arguments[0]);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (threads < 1 || threads > 1 << 20) return false;
  if (!read_plain(arguments + 1, 1, a)) return false;
  read_forced_plan(a.forced_plan);
  a.threads = int(threads);
  py::gil_scoped_release release;
  attention_forward(a);
  return true;
}
PyMethodDef g_fast_calls[] = {fast_call<run_plain, 8>("attention"), {}};

py::dict plan(py::args numbers) {
  Integers from(numbers);
  AttentionArgs a = read_sizes(from);
  read_forced_plan(a.forced_plan);
  const bool backward = from.next() != 0;
  // Only whether they are there counts.
  if (from.next()) a.highest.data = &a;
  if (from.left()) {
    a.grad_mask = &a;
    for (int64_t& stride : a.grad_mask_stride) stride = from.next();
  }
  const AttentionPlan plan = attention_plan(a, available_threads(a.threads), backward);
  py::dict result;
  result["kernel"] = plan.direct ? "decode" : "tiles";
  result["threads"] = plan.head_parts * plan.row_parts;
  result["head_parts"] = plan.head_parts;
  result["row_parts"] = plan.row_parts;
  result["key_parts"] = plan.key_parts;
  result["split"] = plan.split;
  return result;
}

}  // namespace

void bind_attention(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), g_fast_calls) != 0) throw py::error_already_set();
  m.def("attention_forward", forward);
  m.def("attention_backward", backward);
  m.def("attention_dual_forward", dual_forward);
  m.def("attention_dual_backward", dual_backward);
  m.def("attention_plan", plan);
}

}  // namespace fastseq
