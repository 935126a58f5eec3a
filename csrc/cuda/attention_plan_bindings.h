// The plan of attention on CUDA as Python sees it; as plan_bindings.h for loops.
#pragma once

#include "attention_plan.h"
#include "plan_bindings.h"

namespace fastseq {

// "tiles", "decode", "hopper", "tiles:4": the kernel of the forward pass, and into how many parts keys are cut. Of the
// backward pass "tiles" forces the general kernels and "hopper" those for sm_90a; it has none of the rest. "" forces
// nothing.
inline void read_forced_attention_plan(const std::string& text, AttentionProblem& p) {
  p.forced_kernel = -1, p.forced_parts = 0;
  if (text.empty()) return;
  const size_t colon = text.find(':');
  for (int i = 0; i < int(std::size(kAttentionKernelNames)); ++i) {
    if (text.substr(0, colon) == kAttentionKernelNames[i]) p.forced_kernel = i;
  }
  bool good = p.forced_kernel >= 0;
  if (good && colon != std::string::npos) {
    const std::string digits = text.substr(colon + 1);
    good =
        !digits.empty() && digits.size() < 7 && digits.find_first_not_of("0123456789") == std::string::npos;
    if (good) p.forced_parts = std::stoi(digits);
    good = good && p.forced_parts > 0;
  }
  if (good) return;
  throw std::runtime_error(
      "given: FASTSEQ_CUDA_ATTENTION_PLAN=\"" + text +
      "\"\naccepted: a kernel (tiles, decode, hopper), then, if wanted, parts of the keys\n"
      "try: tiles, or decode:4 say, or unset it");
}

inline py::dict describe_pass(const TilePass& pass) {
  py::dict d;
  d["own"] = pass.own, d["other"] = pass.other, d["threads"] = pass.threads;
  d["shared_bytes"] = pass.shared_bytes, d["blocks"] = pass.blocks;
  return d;
}

struct BoundAttentionPlan {
  GpuAttentionPlan plan;
  bool backward, tma, dual;
};

// "blocks": there is no kernel, and the caller has other operations do it.
inline py::dict describe_dual_attention(const GpuAttentionPlan& plan) {
  py::dict d, passes;
  d["kernel"] = plan.not_tiles.empty() ? "tiles" : "blocks";
  d["not_tiles"] = plan.not_tiles;
  d["features"] = plan.features, d["workspace_bytes"] = plan.workspace_bytes;
  const auto add = [&](const char* name, const TilePass& pass) {
    if (pass.threads) passes[name] = describe_pass(pass);
  };
  add("forward", plan.forward), add("grad_queries", plan.grad_queries), add("grad_keys", plan.grad_keys);
  d["passes"] = passes;
  return d;
}

inline py::dict describe_attention(const BoundAttentionPlan& bound) {
  const GpuAttentionPlan& plan = bound.plan;
  if (bound.dual) return describe_dual_attention(plan);
  py::dict d;
  d["kernel"] = !bound.backward ? kAttentionKernelNames[int(plan.kernel)]
                : plan.hopper   ? plan.one_pass ? "hopper_one_pass" : "hopper"
                : plan.one_pass ? "one_pass"
                                : "two_passes";
  d["features"] = plan.kernel == AttentionKernelKind::kHopper ? plan.hopper_features : plan.features;
  d["options"] = plan.options;
  d["workspace_bytes"] = plan.workspace_bytes;
  d["not_hopper"] = plan.not_hopper;
  py::dict passes;
  const auto add = [&](const char* name, const TilePass& pass) {
    if (pass.threads) passes[name] = describe_pass(pass);
  };
  add("forward", plan.forward), add("weights", plan.weights), add("grad_queries", plan.grad_queries);
  add("grad_keys", plan.grad_keys), add("grad_mask", plan.grad_mask);
  d["passes"] = passes;
  if (bound.backward) {
    d["mask_parts"] = plan.mask_parts;
  } else {
    d["parts"] = plan.parts, d["part_keys"] = plan.part_keys, d["tma"] = bound.tma;
    if (plan.kernel == AttentionKernelKind::kHopper) {
      d["pack"] = plan.pack, d["units_at_once"] = plan.units_at_once, d["pairs"] = plan.pairs;
    }
  }
  return d;
}

inline void bind_attention_plan(py::module_& m) {
  py::class_<BoundAttentionPlan>(m, "AttentionPlan", py::module_local())
      .def_property_readonly("workspace_bytes",
                             [](const BoundAttentionPlan& b) { return b.plan.workspace_bytes; })
      .def("describe", describe_attention);
  // The numbers are those of AttentionProblem, in its order.
  m.def("cuda_attention_plan", [](const py::tuple& numbers, const py::tuple& device,
                                  const std::string& forced) {
    Integers from(numbers);
    AttentionProblem p = {};
    p.dtype = dtype_of(from.next());
    p.tf32 = from.next() != 0, p.packed = from.next() != 0, p.backward = from.next() != 0;
    p.batch = from.next(), p.heads = from.next(), p.kv_heads = from.next();
    p.queries = from.next(), p.keys = from.next(), p.head_size = from.next(), p.value_size = from.next();
    p.options = from.next() != 0, p.only_mask = from.next() != 0, p.tma = from.next() != 0;
    p.weights = from.next() != 0, p.of_mask = from.next() != 0;
    for (bool& has : p.mask_has) has = from.next() != 0;
    p.one_pass = from.next() != 0, p.dual = from.next() != 0;
    if (from.left()) throw py::type_error("too many arguments; the signatures are in _C.pyi");
    p.device = device_facts(device);
    read_forced_attention_plan(forced, p);
    return BoundAttentionPlan{attention_plan(p), p.backward, p.tma, p.dual};
  });
}

}  // namespace fastseq
