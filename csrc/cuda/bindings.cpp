// The CUDA engine's functions in Python: addresses and sizes in, structs filled, the GIL released. Compiled into
// fastseq._C, and into the module of the host twin.
#include <cstring>

#include "../arguments.h"
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
  if (error) {
    throw std::runtime_error(std::string("given: a recurrent layer on CUDA device ") +
                             std::to_string(args.device) +
                             "\naccepted: a GPU that is free to run it; CUDA says: " + error +
                             "\ntry: python -m fastseq, which tells what is built and which GPUs there are");
  }
}

}  // namespace

void bind(py::module_& m) {
  bind_loop_plan(m);
  m.def("loop_forward", &run_loop<false>);
  m.def("loop_backward", &run_loop<true>);
}

}  // namespace fastseq::FASTSEQ_ISA
