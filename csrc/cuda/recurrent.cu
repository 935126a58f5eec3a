// From a plan to launches: weights into tiles, then the persistent kernel, as many times as there are rounds of
// groups.
#include <launch.h>

#include <algorithm>

#include "recurrent.h"
#include "recurrent_kernels.h"
#include "recurrent_prepare.h"

namespace fastseq::FASTSEQ_ISA {

namespace {

constexpr int64_t kMostBlocks = 1024;  // of the small kernels, whose threads take turns

const char* send_offsets(const RecurrentLoopArgs& a, int64_t* to) {
  NumbersKernel::Args args;
  args.to = to, args.count = 0;
  int64_t offset = 0;
  for (int64_t t = 0; t <= a.shape.steps; ++t) {
    args.numbers[args.count++] = offset;
    if (t < a.shape.steps) offset += a.shape.batch_sizes[t];
    if (args.count < NumbersKernel::kMost && t < a.shape.steps) continue;
    if (const char* error = launch<NumbersKernel>({1, 128, 0, 1, false, a.stream}, args)) return error;
    args.to += args.count, args.count = 0;
  }
  return nullptr;
}

template <class M>
const char* pack(const RecurrentLoopArgs& a, const LoopPlan& plan) {
  for (int p = 0; p < plan.layout.products; ++p) {
    const ProductLayout& layout = plan.layout.product[p];
    typename PackKernel<M>::Args args = {
        layout,       plan.weights[p],
        {},           plan.layout.blocks,
        a.directions, static_cast<unsigned char*>(a.workspace) + layout.tiles_at};
    for (int d = 0; d < a.directions; ++d) {
      args.weight[d] = plan.weights[p].projection ? a.direction[d].weight_hr : a.direction[d].weight_hh;
    }
    const int64_t vectors = a.directions * plan.layout.blocks * layout.tiles_bytes / 16;
    const int64_t blocks = std::min(kMostBlocks, (vectors + 255) / 256);
    if (const char* error = launch<PackKernel<M>>({blocks, 256, 0, 1, false, a.stream}, args)) return error;
  }
  return nullptr;
}

template <class M>
const char* run(const RecurrentLoopArgs& a, const LoopPlan& plan, bool backward) {
  auto* const workspace = static_cast<unsigned char*>(a.workspace);
  const LoopLayout& layout = plan.layout;
  const bool cluster = plan.kernel == LoopKernelKind::kCluster;
  LoopKernelArgs args = {a, layout, 0};
  if (a.shape.batch_sizes) {
    auto* const offsets = reinterpret_cast<int64_t*>(workspace + layout.offsets_at);
    if (const char* error = send_offsets(a, offsets)) return error;
  }
  if (backward && a.direction[0].previous) {
    using Kernel = PreviousKernel<typename M::Storage>;
    const int64_t blocks = std::min(kMostBlocks, a.shape.steps * a.directions);
    if (const char* error = launch<Kernel>({blocks, 256, 0, 1, false, a.stream}, args)) return error;
  }
  if (const char* error = pack<M>(a, plan)) return error;
  if (!cluster) {  // operands of zero where no unit is, and flags that nobody has set
    const int64_t begin = layout.product[0].images_at;
    if (const char* error = fill_zero(workspace + begin, size_t(layout.offsets_at - begin), a.stream))
      return error;
  }
  // One step with one product ends before blocks would have to wait for each other.
  const bool waits = backward ? a.direction[0].grad_h0 || a.shape.steps > 1 || layout.products == 2
                              : a.shape.steps > 1 || layout.products == 2;
  for (int64_t first = 0; first < plan.groups; first += plan.groups_at_once) {
    args.first_group = first;
    LaunchShape shape;
    shape.blocks = std::min(plan.groups_at_once, plan.groups - first) * layout.blocks;
    shape.threads = layout.threads;
    shape.shared_bytes = size_t(layout.shared_bytes);
    shape.cluster = cluster ? layout.blocks : 1;
    shape.together = !cluster && waits && layout.blocks > 1;
    shape.stream = a.stream;
    const char* const error =
        cluster ? launch_cluster<M>(shape, args, backward, plan.columns)
                : launch_grid<M>(shape, args, backward, plan.kernel == LoopKernelKind::kStream, plan.columns);
    if (error) return error;
  }
  return nullptr;
}

const char* run(const RecurrentLoopArgs& args, const LoopPlan& plan, bool backward) {
  if (args.shape.batch == 0 || args.shape.steps == 0) return nullptr;
  if (plan.kernel == LoopKernelKind::kSteps) return "a plan of steps has no loop kernel";
  const DeviceGuard guard(args.device);
  switch (args.dtype) {
    case DType::kBFloat16:
      return run<Bfloat16Math>(args, plan, backward);
    case DType::kFloat16:
      return run<Float16Math>(args, plan, backward);
    case DType::kFloat32:
      return args.tf32 ? run<Tf32Math>(args, plan, backward) : run<Float32Math>(args, plan, backward);
    case DType::kFloat64:
      return run<Float64Math>(args, plan, backward);
  }
  return "unknown dtype";
}

}  // namespace

const char* recurrent_loop_forward(const RecurrentLoopArgs& args, const LoopPlan& plan) {
  return run(args, plan, false);
}
const char* recurrent_loop_backward(const RecurrentLoopArgs& args, const LoopPlan& plan) {
  return run(args, plan, true);
}

}  // namespace fastseq::FASTSEQ_ISA
