// The Python module fastseq._C: addresses and sizes in, structs filled, the GIL released. No math, no torch.
//
// One step of a cell takes the tensors themselves instead of addresses, because collecting those in Python would
// take longer than the step.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "cpu/engine.h"
#include "cpu/team.h"
#include "cuda/attention_plan_bindings.h"
#include "cuda/plan_bindings.h"
#include "cuda/probe.h"
#include "fastseq.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fastseq {
void bind_attention(py::module_& m);  // attention_bindings.cpp
}
namespace fastseq::cuda {
void bind(py::module_& m);  // csrc/cuda/bindings.cpp, where CUDA is built
}
using fastseq::cell_of;
using fastseq::CellKind;
using fastseq::DType;
using fastseq::dtype_of;
using fastseq::g_tensors;
using fastseq::Integers;
using fastseq::read_sequence;
using fastseq::RecurrentArgs;
using fastseq::RecurrentDirection;
using fastseq::RecurrentPlan;
using fastseq::RecurrentTensors;
using fastseq::SequenceTensor;
using fastseq::TensorView;

namespace {

struct Named {
  const char* name;
  int code;
};
constexpr Named kDTypeNames[] = {{"float32", 0}, {"float64", 1}, {"bfloat16", 2}, {"float16", 3}};

// The members of RecurrentDirection are pointers, and come in the order of the contract.
constexpr int kForwardPointers = 10, kPointers = 20;
static_assert(sizeof(RecurrentDirection) == kPointers * sizeof(void*), "one address for each member");

// Returns how many directions there are.
int read_tensors(Integers& from, bool backward, RecurrentTensors& tensors) {
  read_sequence(from, 3, tensors.input);
  read_sequence(from, 2, tensors.output);
  if (backward) {
    read_sequence(from, 3, tensors.grad_output);
    read_sequence(from, 2, tensors.grad_input);
  }
  Integers directions = from.nested();
  const int count = int(directions.left());
  if (count < 1 || count > 2) throw py::value_error("directions: one or two");
  for (int d = 0; d < count; ++d) {
    Integers direction = directions.nested();
    void* addresses[kPointers] = {};
    for (int i = 0; i < (backward ? kPointers : kForwardPointers); ++i) {
      addresses[i] = direction.pointer<void>();
    }
    if (direction.left()) throw py::type_error("directions: too many addresses");
    std::memcpy(&tensors.direction[d], addresses, sizeof addresses);
  }
  return count;
}

// FASTSEQ_PLAN=DxBxU or DxBxUxR forces the parts of the plan and the rows of a chunk. Read here, where the GIL
// keeps the environment still.
void read_forced_plan(int (&forced)[4]) {
  const char* const text = std::getenv("FASTSEQ_PLAN");
  if (!text || !*text) return;
  int read = 0, rest = 0;
  bool good = std::sscanf(text, "%dx%dx%d%n", &forced[0], &forced[1], &forced[2], &read) == 3;
  if (good && text[read] == 'x') {
    good = std::sscanf(text + read, "x%d%n", &forced[3], &rest) == 1 && forced[3] > 0;
  }
  if (!good || text[read + rest] || forced[0] < 1 || forced[1] < 1 || forced[2] < 1) {
    throw std::runtime_error(
        "given: FASTSEQ_PLAN=\"" + std::string(text) +
        "\"\naccepted: parts of directions, batch and units, DxBxU, or these and rows of a chunk, DxBxUxR\n"
        "try: three or four positive numbers, 1x2x1 say, or unset it");
  }
}

RecurrentArgs read_problem(Integers& from) {
  RecurrentArgs args = {};
  args.cell = cell_of(from.next()), args.dtype = dtype_of(from.next()), args.threads = int(from.next());
  read_forced_plan(args.forced_plan);
  args.shape.steps = from.next(), args.shape.batch = from.next();
  args.shape.batch_sizes = from.pointer<const int64_t>();
  args.input_size = from.next(), args.hidden_size = from.next(), args.proj_size = from.next();
  args.reversed = from.next(), args.resets = from.pointer<const uint8_t>();
  return args;
}

// Some tensors have a shape but no memory (torch's zero tensors, for one), which no kernel may find out.
void require_memory(const RecurrentArgs& args) {
  const bool rows = args.shape.steps > 0 && args.shape.batch > 0, inputs = args.input_size > 0;
  bool complete = (args.input.data || !rows || !inputs) && (args.output.data || !rows);
  for (int d = 0; d < args.directions; ++d) {
    const RecurrentDirection& t = args.direction[d];
    complete = complete && (t.weight_ih || !inputs) && t.weight_hh && (t.weight_hr || !args.proj_size);
  }
  if (!complete) {
    throw std::runtime_error(
        "given: input, output or weights without memory of their own\naccepted: dense tensors on the CPU\n"
        "try: tensor.clone()");
  }
}

// Reads the tensors too, and of duals their tangents, and runs.
void run(Integers& from, RecurrentArgs& args, bool backward, bool dual) {
  args.directions = read_tensors(from, backward, args);
  RecurrentTensors tangents = {};
  if (dual) {
    if (read_tensors(from, backward, tangents) != args.directions) {
      throw py::value_error("directions: those of the tangents are others");
    }
    args.tangents = &tangents;
  }
  if (from.left()) throw py::type_error("too many arguments; the signatures are in _C.pyi");
  require_memory(args);
  py::gil_scoped_release release;
  backward ? fastseq::recurrent_backward(args) : fastseq::recurrent_forward(args);
}

template <bool kDual>
void recurrent_forward(const py::args& arguments) {
  Integers from(arguments);
  RecurrentArgs args = read_problem(from);
  args.one_step = from.next(), args.saves_states = from.next();
  if (kDual) args.truncate = from.next(), args.known = from.next();
  run(from, args, false, kDual);
}

template <bool kDual>
void recurrent_backward(const py::args& arguments) {
  Integers from(arguments);
  RecurrentArgs args = read_problem(from);
  args.grad_clip = from.real(), args.truncate = from.next();
  if (kDual) args.known = from.next();
  run(from, args, true, kDual);
}

// recurrent_cell(cell, threads, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, h, c, saved): one step
// into h [B, H], c, and saved [B, slots, H] (None where there is none), and True. False, and nothing was done,
// if anything about the tensors is not as usual: who calls then asks the operator, which says what.
bool run_cell(PyObject* const* arguments) {
  const long code = PyLong_AsLong(arguments[0]), threads = PyLong_AsLong(arguments[1]);
  if (PyErr_Occurred()) throw py::error_already_set();
  PyObject *const input = arguments[2], *const weight_hh = arguments[6], *const none = Py_None;
  if (!g_tensors || code < 0 || code >= fastseq::kCells || threads < 1 || threads > 1 << 20) return false;
  const fastseq::CellFacts& facts = fastseq::kCellFacts[code];

  TensorView x, weight;
  RecurrentArgs args = {};
  RecurrentDirection& to = args.direction[0];
  if (!g_tensors.read(input, x) || x.rank != 2 || !fastseq::dtype_of(x, args.dtype)) return false;
  if (!g_tensors.read(weight_hh, weight) || weight.rank != 2) return false;
  const int64_t batch = x.shape[0], inputs = x.shape[1], rows = weight.shape[0], hidden = rows / facts.gates;
  if (hidden < 1 || rows % facts.gates) return false;

  const auto take = [&](PyObject* object, const auto& shape, auto& pointer) {
    TensorView view;
    if (!g_tensors.read(object, view) || !view.has_type(x) || !view.is_dense(shape)) return false;
    pointer = view.data;
    return true;
  };
  const auto take_any = [&](PyObject* object, const auto& shape, auto& pointer) {
    return object == none || take(object, shape, pointer);
  };
  const int64_t state[] = {batch, hidden}, bias[] = {rows}, input_weight[] = {rows, inputs},
                recurrent_weight[] = {rows, hidden}, slots[] = {batch, facts.saved, hidden};
  void* output = nullptr;
  PyObject *const c0 = arguments[4], *const bias_ih = arguments[7], *const bias_hh = arguments[8],
                  *const c = arguments[10];
  const bool fits = take_any(arguments[3], state, to.h0) && take_any(c0, state, to.c0) &&
                    take(arguments[5], input_weight, to.weight_ih) &&
                    take(weight_hh, recurrent_weight, to.weight_hh) && take_any(bias_ih, bias, to.bias_ih) &&
                    take_any(bias_hh, bias, to.bias_hh) && take(arguments[9], state, output) &&
                    take_any(c, state, to.c_n) && take_any(arguments[11], slots, to.saved) &&
                    (bias_ih == none) == (bias_hh == none) && (c != none) == facts.cell_state &&
                    (c0 == none || facts.cell_state);
  if (!fits) return false;
  args.cell = CellKind(code), args.threads = int(threads);
  read_forced_plan(args.forced_plan);
  args.shape = {1, batch, nullptr};
  args.input_size = inputs, args.hidden_size = hidden, args.directions = 1, args.one_step = true;
  args.input = {x.data, {0, x.strides[0], x.strides[1]}};
  args.output = {output, {0, hidden, 1}};
  py::gil_scoped_release release;
  fastseq::recurrent_forward(args);
  return true;
}

PyMethodDef g_fast_calls[] = {fastseq::fast_call<run_cell, 12>("recurrent_cell"), {}};

py::dict recurrent_plan(int cell, int dtype, int threads, int64_t steps, int64_t batch, int64_t input_size,
                        int64_t hidden_size, int64_t proj_size, int directions, bool backward, int planes) {
  int forced_plan[4] = {};
  read_forced_plan(forced_plan);
  const RecurrentPlan plan =
      fastseq::recurrent_plan({cell_of(cell), dtype_of(dtype), threads, steps, batch, input_size, hidden_size,
                               proj_size, directions, backward, planes, forced_plan});
  py::dict d;
  d["direction_parts"] = plan.direction_parts;
  d["batch_parts"] = plan.batch_parts;
  d["unit_parts"] = plan.unit_parts;
  d["threads"] = plan.direction_parts * plan.batch_parts * plan.unit_parts;
  d["chunk_rows"] = plan.chunk_rows;
  return d;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled kernels of fastseq. Use the public functions of the package; addresses are not checked "
      "here.";
  fastseq::engine();  // an impossible FASTSEQ_ISA is an error of the import

  py::dict cells, dtypes;
  for (int code = 0; code < fastseq::kCells; ++code) {
    const fastseq::CellFacts& facts = fastseq::kCellFacts[code];
    py::dict cell;
    cell["code"] = code;
    cell["gates"] = facts.gates;
    cell["saved"] = facts.saved;
    cell["cell_state"] = facts.cell_state;
    cells[facts.name] = cell;
  }
  for (const Named& d : kDTypeNames) dtypes[d.name] = d.code;
  m.attr("CELLS") = cells;
  m.attr("DTYPES") = dtypes;
  m.attr("MOST_FUSED_ROWS") = fastseq::kMostFusedRows;
  m.attr("UNIT_QUANTUM") = fastseq::kUnitQuantum;

  m.def("recurrent_forward", &recurrent_forward<false>);
  m.def("recurrent_backward", &recurrent_backward<false>);
  m.def("recurrent_dual_forward", &recurrent_forward<true>);
  m.def("recurrent_dual_backward", &recurrent_backward<true>);
  if (PyModule_AddFunctions(m.ptr(), g_fast_calls)) throw py::error_already_set();
  m.def("use_tensors",
        [](py::handle tensor, py::handle parameter) { return g_tensors.use(tensor.ptr(), parameter.ptr()); });
  m.def("recurrent_plan", &recurrent_plan);
  fastseq::bind_attention(m);
  m.def("available_threads", &fastseq::available_threads);
  m.def("cpu_info", [] {
    py::dict d;
    d["isa"] = fastseq::engine().isa;
    d["isas"] = split(fastseq::available_isas());
    d["compiled_isas"] = split(fastseq::compiled_isas());
    return d;
  });
  if constexpr (FASTSEQ_CUDA_BUILT) {
    fastseq::cuda::bind(m);
    m.def("cuda_device_facts", [](int device) {
      fastseq::DeviceFacts facts;
      if (const char* error = fastseq::cuda_device_facts(device, facts)) throw std::runtime_error(error);
      return py::make_tuple(facts.major, facts.minor, facts.multiprocessors, facts.shared_bytes,
                            facts.l2_bytes, facts.most_cluster_blocks, facts.clusters[0], facts.clusters[1],
                            facts.clusters[2], facts.clusters[3]);
    });
  } else {
    fastseq::bind_loop_plan(m);
    fastseq::bind_attention_plan(m);
  }
  m.def("cuda_info", [] {
    py::dict d;
    d["built"] = bool(FASTSEQ_CUDA_BUILT);
    d["reason"] = std::string(FASTSEQ_CUDA_REASON);
    d["devices"] = 0;  // that the driver shows
    if constexpr (FASTSEQ_CUDA_BUILT) d["devices"] = fastseq::cuda_device_count();
    d["architectures"] = std::vector<std::string>{FASTSEQ_CUDA_ARCHITECTURES};
    return d;
  });
  m.def("fma_peak", [](int dtype, int threads, double seconds) {
    const DType checked = dtype_of(dtype);
    py::gil_scoped_release release;
    return fastseq::fma_peak(checked, threads, seconds) * 1e-9;
  });
}
