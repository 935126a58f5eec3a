// The plan of the CUDA engine as Python sees it: an object that the loops take back, and its numbers in words.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../arguments.h"
#include "plan.h"

namespace fastseq {

// "grid", "grid:4", "grid:4x2": kernel, blocks of a group, columns of tiles; "cluster:4:sums", "cluster:operand": what
// the backward pass exchanges, too. "" forces nothing.
inline ForcedLoopPlan forced_loop_plan(const std::string& text) {
  ForcedLoopPlan forced;
  if (text.empty()) return forced;
  const auto named = [](const std::string& name, const auto& names) {
    for (int i = 0; i < int(std::size(names)); ++i) {
      if (name == names[i]) return i;
    }
    return -1;
  };
  const size_t colon = text.find(':');
  forced.kernel = named(text.substr(0, colon), kLoopKernelNames);
  // A number of one to six digits.
  const auto number = [&](size_t& at, int& value) {
    const size_t first = at;
    for (value = 0; at < text.size() && text[at] >= '0' && text[at] <= '9' && at - first < 6; ++at) {
      value = value * 10 + (text[at] - '0');
    }
    return at > first && value > 0;
  };
  bool good = forced.kernel >= 0;
  size_t at = std::min(colon, text.size());
  if (good && at + 1 < text.size() && text[at + 1] >= '0' && text[at + 1] <= '9') {
    good = forced.kernel != int(LoopKernelKind::kSteps) && number(++at, forced.blocks);
    if (good && at < text.size() && text[at] == 'x') good = number(++at, forced.columns);
  }
  if (good && at < text.size()) {
    forced.exchange = text[at] == ':' ? named(text.substr(at + 1), kExchangeNames) : -1;
    good = forced.exchange >= 0 && forced.kernel == int(LoopKernelKind::kCluster);
  }
  if (good) return forced;
  throw std::runtime_error("given: FASTSEQ_CUDA_PLAN=\"" + text +
                           "\"\naccepted: a kernel (cluster, grid, stream, steps), then, if wanted, blocks "
                           "of a group and columns of "
                           "tiles, of a cluster what it exchanges (sums, operand)\ntry: grid:64, stream:64x2 "
                           "or cluster:sums say, or unset it");
}

inline py::dict describe_product(const ProductLayout& l, int in_registers) {
  py::dict d;
  d["exchange"] = kExchangeNames[l.scatter];
  d["warps"] = py::make_tuple(l.warps_m, l.warps_k);
  d["passes"] = l.passes;
  d["units"] = l.units();
  d["register_units"] = std::min(l.units(), in_registers);
  d["shared_units"] = l.shared_units;
  d["streamed_units"] = std::max(0, l.units() - in_registers - l.shared_units);
  d["chunks"] = l.chunks;
  return d;
}

inline py::dict describe_plan(const LoopPlan& plan, bool tensor, bool backward) {
  const LoopLayout& layout = plan.layout;
  py::dict d;
  d["kernel"] = kLoopKernelNames[int(plan.kernel)];
  d["microseconds"] = plan.microseconds;
  if (plan.kernel == LoopKernelKind::kSteps) return d;
  d["blocks"] = layout.blocks;
  d["threads"] = layout.threads;
  d["rows"] = layout.rows;
  d["columns"] = plan.columns;
  d["units"] = layout.units;
  d["groups"] = plan.groups;
  d["groups_at_once"] = plan.groups_at_once;
  d["shared_bytes"] = layout.shared_bytes;
  d["workspace_bytes"] = layout.workspace_bytes;
  py::list products;
  for (int i = 0; i < layout.products; ++i) {
    const int in_registers =
        register_units(tensor, layout.products, plan.columns, plan.kernel, plan.exchange, backward, i);
    products.append(describe_product(layout.product[i], in_registers));
  }
  d["products"] = products;
  return d;
}

struct BoundLoopPlan {
  LoopPlan plan;
  bool tensor, backward;
};

inline DeviceFacts device_facts(const py::tuple& device) {
  Integers facts(device);
  DeviceFacts of_device = {};
  of_device.major = int(facts.next()), of_device.minor = int(facts.next());
  of_device.multiprocessors = int(facts.next());
  of_device.shared_bytes = facts.next(), of_device.l2_bytes = facts.next();
  of_device.most_cluster_blocks = facts.left() ? int(facts.next()) : of_device.major == 9 ? 16 : 1;
  for (int& count : of_device.clusters) count = facts.left() ? int(facts.next()) : 0;
  return of_device;
}

inline void bind_loop_plan(py::module_& m) {
  py::class_<BoundLoopPlan>(m, "LoopPlan", py::module_local())
      .def_property_readonly("kernel",
                             [](const BoundLoopPlan& p) { return kLoopKernelNames[int(p.plan.kernel)]; })
      .def_property_readonly("workspace_bytes",
                             [](const BoundLoopPlan& p) { return p.plan.layout.workspace_bytes; })
      .def("describe", [](const BoundLoopPlan& p) { return describe_plan(p.plan, p.tensor, p.backward); });
  m.def("loop_plan", [](int cell, int dtype, bool tf32, int64_t steps, int64_t batch, int64_t hidden_size,
                        int64_t proj_size, int directions, bool packed, bool backward,
                        const py::tuple& device, const std::string& forced) {
    const DeviceFacts of_device = device_facts(device);
    const DType type = dtype_of(dtype);
    const LoopProblem problem{cell_of(cell), type,        tf32,      steps,
                              batch,         hidden_size, proj_size, directions,
                              packed,        backward,    of_device, forced_loop_plan(forced)};
    return BoundLoopPlan{loop_plan(problem), uses_tensor_cores(type, tf32), backward};
  });
}

}  // namespace fastseq
