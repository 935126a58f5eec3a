// The Python module fastseq._C: addresses and sizes in, structs filled, the GIL released. No math, no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/engine.h"
#include "cpu/team.h"
#include "fastseq.h"

namespace py = pybind11;
using fastseq::CellKind;
using fastseq::DType;
using fastseq::RecurrentArgs;
using fastseq::RecurrentDirection;
using fastseq::RecurrentPlan;

namespace {

struct Named {
  const char* name;
  int code;
};
constexpr Named kCellNames[] = {{"RNN_TANH", 0}, {"RNN_RELU", 1}, {"LSTM", 2}, {"GRU", 3}, {"GRU_RESET_BEFORE", 4}};
constexpr Named kDTypeNames[] = {{"float32", 0}, {"float64", 1}, {"bfloat16", 2}, {"float16", 3}};

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// The members of RecurrentDirection in the order of the contract: all pointers.
constexpr int kForwardPointers = 10, kPointers = 19;
static_assert(sizeof(RecurrentDirection) == kPointers * sizeof(void*));

void read_directions(RecurrentArgs& args, const py::tuple& directions, int pointers) {
  args.directions = int(directions.size());
  if (args.directions < 1 || args.directions > 2) throw py::value_error("directions: one or two tuples");
  for (int d = 0; d < args.directions; ++d) {
    const auto from = py::reinterpret_borrow<py::tuple>(directions[d]);
    if (int(from.size()) != pointers) throw py::value_error("directions: wrong number of addresses");
    uintptr_t addresses[kPointers] = {};
    for (int i = 0; i < pointers; ++i) addresses[i] = from[i].cast<uintptr_t>();
    static_assert(std::is_trivially_copyable<RecurrentDirection>::value);
    std::memcpy(&args.direction[d], addresses, sizeof addresses);
  }
}

RecurrentArgs arguments(int cell, int dtype, int threads, int64_t steps, int64_t batch, int64_t batch_sizes,
                        int64_t input_size, int64_t hidden_size, int64_t proj_size) {
  if (cell < 0 || cell >= fastseq::kCells) throw py::value_error("cell: unknown code");
  if (dtype < 0 || dtype >= fastseq::kDTypes) throw py::value_error("dtype: unknown code");
  RecurrentArgs args = {};
  args.cell = CellKind(cell), args.dtype = DType(dtype), args.threads = threads;
  args.shape = {steps, batch, pointer<const int64_t>(batch_sizes)};
  args.input_size = input_size, args.hidden_size = hidden_size, args.proj_size = proj_size;
  return args;
}

void recurrent_forward(int cell, int dtype, int threads, int64_t steps, int64_t batch, int64_t batch_sizes,
                       int64_t input_size, int64_t hidden_size, int64_t proj_size, int64_t input, int64_t input_t,
                       int64_t input_b, int64_t input_i, int64_t output, int64_t output_t, int64_t output_b,
                       const py::tuple& directions) {
  RecurrentArgs args = arguments(cell, dtype, threads, steps, batch, batch_sizes, input_size, hidden_size, proj_size);
  args.input = {pointer<const void>(input), {input_t, input_b, input_i}};
  args.output = {pointer<void>(output), {output_t, output_b, 1}};
  read_directions(args, directions, kForwardPointers);
  py::gil_scoped_release release;
  fastseq::recurrent_forward(args);
}

void recurrent_backward(int cell, int dtype, int threads, int64_t steps, int64_t batch, int64_t batch_sizes,
                        int64_t input_size, int64_t hidden_size, int64_t proj_size, int64_t input, int64_t input_t,
                        int64_t input_b, int64_t input_i, int64_t output, int64_t output_t, int64_t output_b,
                        int64_t grad_output, int64_t grad_output_t, int64_t grad_output_b, int64_t grad_output_i,
                        int64_t grad_input, int64_t grad_input_t, int64_t grad_input_b, const py::tuple& directions) {
  RecurrentArgs args = arguments(cell, dtype, threads, steps, batch, batch_sizes, input_size, hidden_size, proj_size);
  args.input = {pointer<const void>(input), {input_t, input_b, input_i}};
  args.output = {pointer<void>(output), {output_t, output_b, 1}};
  args.grad_output = {pointer<const void>(grad_output), {grad_output_t, grad_output_b, grad_output_i}};
  args.grad_input = {pointer<void>(grad_input), {grad_input_t, grad_input_b, 1}};
  read_directions(args, directions, kPointers);
  py::gil_scoped_release release;
  fastseq::recurrent_backward(args);
}

py::dict recurrent_plan(int cell, int dtype, int threads, int64_t steps, int64_t batch, int64_t input_size,
                        int64_t hidden_size, int64_t proj_size, int directions, bool backward) {
  const RecurrentArgs args = arguments(cell, dtype, threads, steps, batch, 0, input_size, hidden_size, proj_size);
  const RecurrentPlan plan = fastseq::recurrent_plan({args.cell, args.dtype, threads, steps, batch, input_size,
                                                      hidden_size, proj_size, directions, backward});
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
  m.doc() = "The compiled kernels of fastseq. Use the public functions of the package; addresses are not checked here.";
  fastseq::engine();  // an impossible FASTSEQ_ISA is an error of the import

  py::dict cells, dtypes;
  for (const Named& c : kCellNames) {
    py::dict facts;
    facts["code"] = c.code;
    facts["gates"] = fastseq::gates_of(CellKind(c.code));
    facts["saved"] = fastseq::saved_slots_of(CellKind(c.code));
    facts["cell_state"] = fastseq::has_cell_state(CellKind(c.code));
    cells[c.name] = facts;
  }
  for (const Named& d : kDTypeNames) dtypes[d.name] = d.code;
  m.attr("CELLS") = cells;
  m.attr("DTYPES") = dtypes;

  m.def("recurrent_forward", &recurrent_forward);
  m.def("recurrent_backward", &recurrent_backward);
  m.def("recurrent_plan", &recurrent_plan);
  m.def("cpu_info", [] {
    py::dict d;
    d["isa"] = fastseq::engine().isa;
    d["isas"] = split(fastseq::available_isas());
    d["compiled_isas"] = split(fastseq::compiled_isas());
    return d;
  });
  m.def("cuda_info", [] {
    py::dict d;
    d["built"] = bool(FASTSEQ_CUDA_BUILT);
    d["reason"] = std::string(FASTSEQ_CUDA_REASON);
    d["architectures"] = std::vector<std::string>{FASTSEQ_CUDA_ARCHITECTURES};
    return d;
  });
  m.def("fma_peak", [](int dtype, int threads, double seconds) {
    py::gil_scoped_release release;
    return fastseq::fma_peak(DType(dtype), threads, seconds) * 1e-9;
  });
}
