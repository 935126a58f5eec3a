// The CUDA engine's functions in Python: addresses and sizes in, structs filled, the GIL released. Compiled into
// fastseq._C, and into the module of the host twin.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "../attention_arguments.h"
#include "attention.h"
#include "attention_plan_bindings.h"
#include "hopper_primitives.h"
#include "plan_bindings.h"
#include "recurrent.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// The members of LoopDirection are pointers, and come in the order of the contract.
constexpr int kForwardPointers = 8, kPointers = 15;
static_assert(sizeof(LoopDirection) == kPointers * sizeof(void*), "one address for each member");

const LoopPlan& read_arguments(Integers& from, const py::handle& plan, bool backward,
                               RecurrentLoopArgs& args) {
  args.cell = cell_of(from.next()), args.dtype = dtype_of(from.next()), args.tf32 = from.next();
  args.device = int(from.next()), args.stream = from.pointer<void>();
  args.shape.steps = from.next(), args.shape.batch = from.next();
  args.shape.batch_sizes = from.pointer<const int64_t>();
  args.hidden_size = from.next(), args.proj_size = from.next();
  args.reversed = from.next();
  args.lengths = from.pointer<const int64_t>(), args.resets = from.pointer<const uint8_t>();
  if (backward) {
    args.grad_clip = from.real(), args.cuts = from.pointer<const uint8_t>();
    args.grad_clip_float = float(args.grad_clip);
  } else {
    args.saves_states = from.next();
  }
  args.pre = from.pointer<void>();
  read_sequence(from, 2, args.output);
  if (backward) read_sequence(from, 3, args.grad_output);
  args.workspace = from.pointer<void>();
  Integers directions = from.nested();
  args.directions = int(directions.left());
  if (args.directions < 1 || args.directions > 2) throw py::value_error("directions: one or two");
  for (int d = 0; d < args.directions; ++d) {
    Integers direction = directions.nested();
    void* addresses[kPointers] = {};
    for (int i = 0; i < (backward ? kPointers : kForwardPointers); ++i)
      addresses[i] = direction.pointer<void>();
    if (direction.left()) throw py::type_error("directions: too many addresses");
    std::memcpy(&args.direction[d], addresses, sizeof addresses);
  }
  if (from.left()) throw py::type_error("too many arguments; the signatures are in _C.pyi");
  return py::cast<const BoundLoopPlan&>(plan).plan;
}

void check(const char* error, int device, const char* what = "a recurrent network") {
  if (!error) return;
  throw std::runtime_error(std::string("given: ") + what + " on CUDA device " + std::to_string(device) +
                           "\naccepted: a GPU that is free to run it; CUDA says: " + error +
                           "\ntry: python -m fastseq, which tells what is built and which GPUs there are");
}

StepPart part_of(int64_t code) {
  if (code < 0 || code > 2) throw py::value_error("part: unknown code");
  return StepPart(code);
}

StepRows read_step_rows(Integers& from) {
  const int64_t t = from.next(), offset = from.next(), rows = from.next();
  return {t, offset, rows};
}

// What both structs of a step begin with.
template <class Args>
void read_step(Integers& from, Args& args) {
  args.cell = cell_of(from.next()), args.dtype = dtype_of(from.next());
  args.device = int(from.next()), args.stream = from.pointer<void>();
  args.part = part_of(from.next()), args.packed = from.next(), args.wide = from.next(),
  args.hidden_size = from.next();
}

// common and the directions' addresses are the same for all steps; `rows` is what changes.
struct StepArguments {
  Integers common, directions, rows;
  StepArguments(const py::tuple& common, const py::tuple& directions, const py::tuple& rows)
      : common(common), directions(directions), rows(rows) {}

  // read(i, direction i, its addresses, its rows) for each.
  template <class Args, class Read>
  void for_directions(Args& args, Read read) {
    args.directions = int(directions.left());
    if (args.directions < 1 || args.directions > 2) throw py::value_error("directions: one or two");
    for (int i = 0; i < args.directions; ++i) {
      Integers addresses = directions.nested(), of_rows = rows.nested();
      read(i, args.direction[i], addresses, of_rows);
      if (addresses.left() || of_rows.left()) throw py::type_error("directions: too many integers");
    }
    if (common.left() || rows.left())
      throw py::type_error("too many arguments; the signatures are in _C.pyi");
  }
};

// Of a direction.
void read_rows(Integers& from, StepRows& now, StepRows& other, bool& truncated) {
  now = read_step_rows(from), other = read_step_rows(from), truncated = from.next();
}

void read_addresses(Integers& from, CellStepDirection& d) {
  d.product = from.pointer<void>(), d.bias_hh = from.pointer<void>();
  d.h = from.pointer<void>(), d.c = from.pointer<void>();
  d.h_next = from.pointer<void>(), d.c_next = from.pointer<void>();
  d.saved = from.pointer<void>();
}

void read_addresses(Integers& from, CellGradDirection& d) {
  d.saved = from.pointer<void>();
  d.h0 = from.pointer<void>(), d.c0 = from.pointer<void>();
  d.grad = from.pointer<void>(), d.product = from.pointer<void>();
  d.grad_c = from.pointer<void>();
  d.grad_product = from.pointer<void>(), d.direct = from.pointer<void>();
  d.grad_c_previous = from.pointer<void>(), d.previous = from.pointer<void>();
  d.grad_candidate = from.pointer<void>(), d.grad_hidden = from.pointer<void>();
  d.operand = from.pointer<void>();
}

void read_common(Integers& from, CellStepTensors& tensors) {
  tensors.pre = from.pointer<void>();
  read_sequence(from, 2, tensors.output);
}

void read_common(Integers& from, CellGradTensors& tensors) {
  tensors.grad_pre = from.pointer<void>();
  read_sequence(from, 2, tensors.output);
  read_sequence(from, 3, tensors.grad_output);
}

void read_cell(StepArguments& from, CellStepArgs& args) {
  read_step(from.common, args);
  args.lengths = from.common.pointer<const int64_t>(), args.resets = from.common.pointer<const uint8_t>();
  args.saves_states = from.common.next(), args.weight_hh = from.common.pointer<void>();
  read_common(from.common, args);
}

void read_cell(StepArguments& from, CellGradArgs& args) {
  read_step(from.common, args);
  args.lengths = from.common.pointer<const int64_t>(), args.resets = from.common.pointer<const uint8_t>();
  args.grad_clip = from.common.real();
  read_common(from.common, args);
}

StepRows& other_step(CellStepDirection& d) { return d.next; }
StepRows& other_step(CellGradDirection& d) { return d.before; }
void** again(CellStepDualArgs& args) { return args.h_next_again; }
void** again(CellGradDualArgs& args) { return args.grad_product_again; }

template <class Args, const char* (*run)(const Args&)>
void run_cell(const py::tuple& common, const py::tuple& directions, const py::tuple& rows) {
  StepArguments from(common, directions, rows);
  Args args = {};
  read_cell(from, args);
  from.for_directions(args, [](int, auto& d, Integers& addresses, Integers& of_rows) {
    read_rows(of_rows, d.now, other_step(d), d.truncated);
    read_addresses(addresses, d);
  });
  const char* error;
  {
    py::gil_scoped_release release;
    error = run(args);
  }
  check(error, args.device);
}

// Over dual numbers: after what belongs to the numbers comes the same of their tangents.
template <class Args, const char* (*run)(const Args&)>
void run_cell_dual(const py::tuple& common, const py::tuple& directions, const py::tuple& rows) {
  StepArguments from(common, directions, rows);
  Args args = {};
  read_cell(from, args);
  read_common(from.common, args.tangents);
  args.row_step = int(from.common.next());
  from.for_directions(args, [&](int i, auto& d, Integers& addresses, Integers& of_rows) {
    read_rows(of_rows, d.now, other_step(d), d.truncated);
    read_addresses(addresses, d);
    read_addresses(addresses, args.tangents.direction[i]);
    args.product_of_weight_tangent[i] = addresses.pointer<void>();
    again(args)[i] = addresses.pointer<void>();
  });
  const char* error;
  {
    py::gil_scoped_release release;
    error = run(args);
  }
  check(error, args.device);
}

template <bool kBackward>
void run_loop(const py::handle& plan, const py::args& arguments) {
  Integers from(arguments);
  RecurrentLoopArgs args = {};
  const LoopPlan& read = read_arguments(from, plan, kBackward, args);
  const char* error;
  {
    py::gil_scoped_release release;
    error = kBackward ? recurrent_loop_backward(args, read) : recurrent_loop_forward(args, read);
  }
  check(error, args.device);
}

// What comes after the arguments that both engines take.
void read_device(Integers& from, AttentionArgs& a) {
  a.tf32 = from.next() != 0, a.one_pass = from.next() != 0;
  a.seed_address = from.pointer<const int64_t>();
  a.device = int(from.next()), a.stream = from.pointer<void>(), a.workspace = from.pointer<void>();
  if (from.left()) throw py::type_error("too many arguments; the signatures are in _C.pyi");
}

template <bool kBackward>
void run_attention(const py::handle& plan, const py::args& numbers) {
  Integers from(numbers);
  AttentionArgs args = kBackward ? read_backward(from) : read_forward(from);
  read_device(from, args);
  const GpuAttentionPlan& of_call = py::cast<const BoundAttentionPlan&>(plan).plan;
  const char* error;
  {
    py::gil_scoped_release release;
    error = kBackward ? attention_backward(args, of_call) : attention_forward(args, of_call);
  }
  check(error, args.device, "attention");
}

template <bool kBackward>
void run_attention_dual(const py::handle& plan, const py::args& numbers) {
  Integers from(numbers);
  AttentionDualArgs args = kBackward ? read_dual_backward(from) : read_dual_forward(from);
  read_device(from, args.primal);
  const GpuAttentionPlan& of_call = py::cast<const BoundAttentionPlan&>(plan).plan;
  const char* error;
  {
    py::gil_scoped_release release;
    error = kBackward ? attention_dual_backward(args, of_call) : attention_dual_forward(args, of_call);
  }
  check(error, args.primal.device, "attention");
}

// Whether the tensor memory accelerator can read it: see unfit() in tensor_map.h.
bool fits_tensor_map(const HeadTensor& t, const int64_t (&sizes)[3], int size) {
  bool fits = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = t.stride[i] * size;
    fits &= sizes[i] == 1 || (bytes > 0 && bytes % 16 == 0 && bytes * sizes[i] < int64_t(1) << 40);
  }
  return fits;
}

// cuda_attention(query, key, value, output, is_causal, scale, enable_gqa, device_type, tf32, facts, index, stream,
// workspace): attention without any other option, as attention() on a CPU. 0: done; less: nothing was done, for
// something is not as usual; more: nothing was done, for so many bytes of workspace are needed.
int64_t run_plain_attention(PyObject* const* arguments) {
  AttentionArgs a = {};
  const int device_type = int(PyLong_AsLong(arguments[7]));
  a.tf32 = PyObject_IsTrue(arguments[8]) == 1, a.device = int(PyLong_AsLong(arguments[10]));
  a.stream = PyLong_AsVoidPtr(arguments[11]), a.workspace = PyLong_AsVoidPtr(arguments[12]);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (!read_plain(arguments, device_type, a)) return -1;
  AttentionProblem p = {};
  p.dtype = a.dtype, p.tf32 = a.tf32;
  p.batch = a.batch, p.heads = a.heads, p.kv_heads = a.kv_heads, p.queries = a.queries, p.keys = a.keys;
  p.head_size = a.head_size, p.value_size = a.value_size;
  p.options = !(a.scale > kSmallScale), p.only_mask = true;
  const int size = element_size(a.dtype);
  p.tma = fits_tensor_map(a.query, {a.batch, a.heads, a.queries}, size) &&
          fits_tensor_map(a.key, {a.batch, a.kv_heads, a.keys}, size) &&
          fits_tensor_map(a.value, {a.batch, a.kv_heads, a.keys}, size);
  p.device = device_facts(py::reinterpret_borrow<py::tuple>(arguments[9]));
  const char* const forced = std::getenv("FASTSEQ_CUDA_ATTENTION_PLAN");
  read_forced_attention_plan(forced ? forced : "", p);
  const GpuAttentionPlan plan = attention_plan(p);
  if (plan.workspace_bytes && !a.workspace) return plan.workspace_bytes;
  const char* error;
  {
    py::gil_scoped_release release;
    error = attention_forward(a, plan);
  }
  check(error, a.device, "attention");
  return 0;
}
PyMethodDef g_fast_calls[] = {fast_call<run_plain_attention, 13>("cuda_attention"), {}};

// For the tests of prim_hopper.h.
void hopper_primitive(const std::string& name, int device, uintptr_t stream,
                      const std::vector<uintptr_t>& addresses, const std::vector<int64_t>& numbers) {
  HopperTest test = {};
  test.device = device, test.stream = reinterpret_cast<void*>(stream);
  if (addresses.empty() || addresses.size() > 1 + std::size(test.from) ||
      numbers.size() > std::size(test.number)) {
    throw py::value_error("hopper_primitive: too many addresses or numbers, or none");
  }
  test.to = reinterpret_cast<void*>(addresses[0]);
  for (size_t i = 1; i < addresses.size(); ++i) test.from[i - 1] = reinterpret_cast<void*>(addresses[i]);
  std::copy(numbers.begin(), numbers.end(), test.number);
  if (const char* error = run_hopper_primitive(name, test)) {
    throw std::runtime_error("given: hopper_primitive \"" + name + "\" on CUDA device " +
                             std::to_string(device) +
                             "\naccepted: a GPU of compute capability 9.0; CUDA says: " + error +
                             "\ntry: python -m fastseq, which tells which GPUs there are");
  }
}

}  // namespace

void bind(py::module_& m) {
  bind_loop_plan(m);
  bind_attention_plan(m);
  if (PyModule_AddFunctions(m.ptr(), g_fast_calls) != 0) throw py::error_already_set();
  m.def("cuda_attention_forward", &run_attention<false>);
  m.def("cuda_attention_backward", &run_attention<true>);
  m.def("cuda_attention_dual_forward", &run_attention_dual<false>);
  m.def("cuda_attention_dual_backward", &run_attention_dual<true>);
  m.def("loop_forward", &run_loop<false>);
  m.def("loop_backward", &run_loop<true>);
  m.def("cell_forward", &run_cell<CellStepArgs, cell_forward>);
  m.def("cell_backward", &run_cell<CellGradArgs, cell_backward>);
  m.def("cell_dual_forward", &run_cell_dual<CellStepDualArgs, cell_dual_forward>);
  m.def("cell_dual_backward", &run_cell_dual<CellGradDualArgs, cell_dual_backward>);
  m.def("hopper_primitive", &hopper_primitive, py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastseq::FASTSEQ_ISA
