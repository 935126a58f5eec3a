// The Python module _cuda_host: the kernels as they run on the CPU, and what the tests need to test the twin itself.
// Arrays are given by their addresses, as to fastseq._C.
#include <launch.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "../tensor_view.h"
#include "faults.h"
#include "machine.h"
#include "primitives.h"
#include "sanitize.h"

namespace py = pybind11;

namespace fastseq::FASTSEQ_ISA {

void bind(py::module_& m);  // of csrc/cuda/bindings.cpp

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

template <FaultResult (*run)(const std::string&, bool)>
std::vector<float> values_of(const std::string& name, bool faulty) {
  FaultResult result = run(name, faulty);
  if (!result.error.empty()) throw std::runtime_error(result.error);
  return std::move(result.values);
}

}  // namespace

PYBIND11_MODULE(_cuda_host, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("sanitized") = kSanitized;
  py::enum_<Order>(m, "Order")
      .value("forward", Order::forward)
      .value("reverse", Order::reverse)
      .value("random", Order::random);
  m.def("use_tensors",
        [](py::handle tensor, py::handle parameter) { return g_tensors.use(tensor.ptr(), parameter.ptr()); });
  m.def("set_schedule", set_schedule, py::arg("order"), py::arg("seed") = 0, Unlocked());

  m.def("leave_out", leave_out, py::arg("what"), py::arg("turn") = 0, Unlocked());
  m.def("fault_names", fault_names);
  m.def("run_fault", values_of<run_fault>, py::arg("name"), py::arg("faulty"), Unlocked());
  m.def("hopper_fault_names", hopper_fault_names);
  m.def("run_hopper_fault", values_of<run_hopper_fault>, py::arg("name"), py::arg("faulty"), Unlocked());

  m.def(
      "mma",
      [](const std::string& type, uintptr_t a, uintptr_t b, uintptr_t d) {
        check(run_mma(type, at<const uint32_t>(a), at<const uint32_t>(b), at<float>(d)));
      },
      py::arg("type"), py::arg("a"), py::arg("b"), py::arg("d"), Unlocked());
  m.def(
      "load_matrices",
      [](uintptr_t rows, uintptr_t r, bool transposed) {
        check(run_load_matrices(at<const uint32_t>(rows), at<uint32_t>(r), transposed));
      },
      py::arg("rows"), py::arg("r"), py::arg("transposed") = false, Unlocked());
  m.def(
      "mma_double",
      [](uintptr_t a, uintptr_t b, uintptr_t d) {
        check(run_mma_double(at<const double>(a), at<const double>(b), at<double>(d)));
      },
      py::arg("a"), py::arg("b"), py::arg("d"), Unlocked());
  m.def(
      "copy_or_zero",
      [](uintptr_t from, uintptr_t to) {
        check(run_copy_or_zero(at<const unsigned char>(from), at<unsigned char>(to)));
      },
      py::arg("source"), py::arg("result"), Unlocked());
  m.def(
      "any", [](int rounds, uintptr_t result) { check(run_any(rounds, at<uint8_t>(result))); },
      py::arg("rounds"), py::arg("result"), Unlocked());
  m.def(
      "shuffle_xor",
      [](int bytes, int mask, uintptr_t value, uintptr_t result) {
        check(run_shuffle_xor(bytes, mask, at<const void>(value), at<void>(result)));
      },
      py::arg("bytes"), py::arg("mask"), py::arg("value"), py::arg("result"), Unlocked());
  m.def(
      "numbers",
      [](const std::string& function, int64_t count, uintptr_t from, uintptr_t to) {
        check(run_numbers(function, count, at<const void>(from), at<void>(to)));
      },
      py::arg("function"), py::arg("count"), py::arg("source"), py::arg("result"), Unlocked());
  m.def(
      "collective",
      [](const std::string& name, int count, int64_t blocks, int threads, bool together) {
        check(run_collective(name, count, blocks, threads, together));
      },
      py::arg("name"), py::arg("count"), py::arg("blocks"), py::arg("threads"), py::arg("together") = false,
      Unlocked());
  m.def(
      "nothing",
      [](int64_t blocks, int threads, size_t shared_bytes, int cluster, bool together) {
        check(run_nothing(blocks, threads, shared_bytes, cluster, together));
      },
      py::arg("blocks"), py::arg("threads"), py::arg("shared_bytes") = 0, py::arg("cluster") = 1,
      py::arg("together") = false, Unlocked());

  bind(m);
}

}  // namespace fastseq::FASTSEQ_ISA
