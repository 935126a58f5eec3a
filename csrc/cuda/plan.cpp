#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <stdexcept>

namespace fastseq {
namespace {

// What a Hopper GPU does, in cycles of one multiprocessor at 1.7 GHz; only proportions matter.
constexpr double kCyclesPerMicrosecond = 1700;
constexpr double kSharedBytes = 128;  // read from shared memory in a cycle
constexpr double kMmaCycles = 8;      // of one of four sub-cores, m16n8k16 or m16n8k8 tf32
constexpr double kMmaLatency = 40;    // of a warp, for a pair: one mma after another and the operand's load
constexpr double kPlainLatency = 60;
constexpr double kRemoteBytes = 14;     // through distributed shared memory into one block
constexpr double kL2Bytes = 24;         // from L2 into one multiprocessor, while all of them read
constexpr double kMemoryBytes = 4e6;    // from memory, in a microsecond
constexpr double kClusterCycles = 500;  // messages: the way there, and the wait for the slowest block
constexpr double kGridCycles = 1900;    // flags through L2
constexpr double kBlockCycles = 60;     // a block barrier
constexpr double kStepCycles = 250;     // what every step has: gate math, latencies of its loads
constexpr double kRoundCycles = 120;    // each further round of items

// One product by cuBLAS and one kernel of a cell, in microseconds: what launching them takes (3 of it is Python and
// torch), and the least that they take on the GPU, a kernel's beginning and end included.
constexpr double kLaunchMicroseconds = 9;
constexpr double kProductMicroseconds = 5;
// Once for a persistent kernel: weights into tiles, and everything that comes before the first step.
constexpr double kLoopMicroseconds = 25;
constexpr double kPackedBytes = 1e6;  // in a microsecond

constexpr int kMostWarps = kLoopThreads / 32;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t to) { return divide_up(a, to) * to; }

// Sizes of the arithmetic, as in arithmetic.h.
struct Arithmetic {
  bool tensor;
  int element_bytes, scalar_bytes, storage_bytes;
  int vector() const { return 16 / element_bytes; }
  int rows() const { return tensor ? 8 : 2 * vector(); }
  int pair() const { return kPairBytes / element_bytes; }
  int64_t vectors_of(int64_t k) const { return tensor ? k / vector() : k; }
  int64_t line_stride(int64_t k) const { return vectors_of(k) + (tensor ? 1 : 0); }
  int64_t lines(int rows) const { return tensor ? rows : rows / vector(); }
};

Arithmetic arithmetic_of(const LoopProblem& p) {
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16,
             wide = p.dtype == DType::kFloat64;
  return {uses_tensor_cores(p.dtype, p.tf32), half ? 2 : wide ? 8 : 4, wide ? 8 : 4, half ? 2 : wide ? 8 : 4};
}

// What a product multiplies, before it is cut: gates and units of operand and results.
struct ProductFacts {
  int segments, out_gates;
  bool from_projected, to_projected;  // units of the projection instead of hidden units
  ProductWeights weights;
};

int products_of(const LoopProblem& p, ProductFacts (&facts)[kMaxProducts]) {
  const int gates = facts_of(p.cell).gates;
  const int64_t hidden = p.hidden_size, width = p.proj_size ? p.proj_size : hidden;
  const bool projected = p.proj_size > 0;
  const bool reset_before = p.cell == CellKind::kGruResetBefore;
  const ProductWeights gate_weights{
      false, p.backward, 0, hidden, width, p.backward ? width : hidden, p.backward ? hidden : width};
  const auto gates_from = [&](int first, int count) {
    ProductWeights weights = gate_weights;
    weights.first_gate = first;
    return p.backward ? ProductFacts{count, 1, false, projected, weights}
                      : ProductFacts{1, count, projected, false, weights};
  };
  if (reset_before) {
    facts[0] = p.backward ? gates_from(2, 1) : gates_from(0, 2);
    facts[1] = p.backward ? gates_from(0, 2) : gates_from(2, 1);
    return 2;
  }
  facts[projected && p.backward] = gates_from(0, gates);
  if (!projected) return 1;
  const ProductWeights projection{
      true, p.backward, 0, width, hidden, p.backward ? hidden : width, p.backward ? width : hidden};
  facts[!p.backward] = {1, 1, p.backward, !p.backward, projection};
  return 2;
}

// As the GPU says. Where it has not been asked a guess: some multiprocessors of each of its groups are left over.
int64_t clusters_at_once(const DeviceFacts& device, int blocks) {
  if (blocks == 1) return device.multiprocessors;
  for (int i = 0; i < int(std::size(device.clusters)); ++i) {
    if (blocks == 2 << i && device.clusters[i] > 0) return device.clusters[i];
  }
  return std::max<int64_t>(1, int64_t(device.multiprocessors * 0.95) / blocks);
}

// A way to cut the whole loop, while it is being tried.
struct Attempt {
  const LoopProblem& problem;
  const Arithmetic math;
  LoopPlan plan;
  double cycles;

  bool cluster() const { return plan.kernel == LoopKernelKind::kCluster; }
  int in_registers(int product) const {
    return register_units(math.tensor, plan.layout.products, plan.columns, plan.kernel, plan.exchange,
                          problem.backward, product);
  }
  LoopLayout& layout() { return plan.layout; }

  bool lay_out(int blocks, const ProductFacts (&facts)[kMaxProducts]);
  bool lay_out_product(int index, int64_t shared_left);
  double product_cycles(const ProductLayout& l, int in_registers) const;
  double exchange_cycles(const ProductLayout& l) const;
};

double Attempt::product_cycles(const ProductLayout& l, int in_registers) const {
  const LoopLayout& layout = plan.layout;
  const double pairs = double(l.units()) * l.tiles * l.warps();  // of all warps
  const double sub_core = double(l.units()) * l.tiles * double(divide_up(l.warps(), 4));
  double arithmetic, latency;
  if (math.tensor) {
    arithmetic = sub_core * 2 * plan.columns * kMmaCycles;
    latency = double(l.units()) * kMmaLatency * (plan.columns == 1 ? 1 : 2);
  } else {
    const double multiplies = sub_core * 2 * math.vector() * layout.rows;
    arithmetic = multiplies * (math.element_bytes == 8 ? 2 : 1);
    latency = double(l.units()) * kPlainLatency;
  }
  const double operand = double(l.units()) * l.warps() * layout.rows * kPairBytes;
  const double weights = double(l.shared_units) * l.warps() * l.tiles * 1024;
  const double sums =
      2.0 * l.slots * l.m_tiles * 16 * layout.rows * math.scalar_bytes / (l.scatter ? layout.blocks : 1);
  const double streamed =
      std::max(0.0, double(l.units() - in_registers - l.shared_units)) * l.warps() * l.tiles * 1024;
  return std::max({arithmetic, latency, (operand + weights + sums) / kSharedBytes, streamed / kL2Bytes}) +
         pairs * 0.01 + kBlockCycles * (2 + (l.passes - 1) * 0.5);
}

double Attempt::exchange_cycles(const ProductLayout& l) const {
  const LoopLayout& layout = plan.layout;
  if (cluster()) {
    if (layout.blocks == 1) return kBlockCycles;
    const double bytes =
        l.scatter ? double(l.slots) * layout.rows * l.out_units * math.scalar_bytes
                  : double(l.segments) * layout.blocks * l.in_units * layout.rows * math.element_bytes;
    return kClusterCycles + bytes / kRemoteBytes;
  }
  const double bytes = double(l.segments) * layout.blocks * l.in_units * layout.rows * math.element_bytes;
  return kGridCycles + bytes / kL2Bytes * l.passes * (l.chunks > 1 ? 1 : 1.0 / l.passes);
}

// How warps share product `index`, whose sizes are set: the fastest way that leaves room. Resident kernels need
// all weights in registers and shared memory.
bool Attempt::lay_out_product(int index, int64_t shared_left) {
  ProductLayout& l = layout().product[index];
  const int rows = layout().rows, most_warps = kMostWarps;
  const int64_t k = int64_t(l.segments) * l.in_units * (l.scatter ? 1 : layout().blocks);
  const int64_t all_pairs = divide_up(k, math.pair());
  const int64_t out_rows = int64_t(l.out_gates) * l.out_units * (l.scatter ? layout().blocks : 1);
  l.m_tiles = int(divide_up(out_rows, 16));
  const int in_registers = this->in_registers(index);
  double best = std::numeric_limits<double>::infinity();
  ProductLayout found = l;
  for (int tiles = 1; tiles <= std::min(kMostTiles, l.m_tiles); ++tiles) {
    for (int warps_m = 1; warps_m <= most_warps; ++warps_m) {
      if (warps_m > 1 && (warps_m - 1) * tiles >= l.m_tiles) break;
      for (int warps_k = 1; warps_k <= std::min<int64_t>(most_warps / warps_m, all_pairs); ++warps_k) {
        ProductLayout t = l;
        t.tiles = tiles, t.warps_m = warps_m, t.warps_k = warps_k;
        t.passes = int(divide_up(l.m_tiles, int64_t(warps_m) * tiles));
        t.pairs = int(divide_up(all_pairs, warps_k));
        t.slots = warps_k * (l.scatter ? layout().blocks : 1);
        t.sum_stride = l.scatter ? l.out_units + 4 : l.m_tiles * 16 + 4;
        const int64_t padded_k = int64_t(t.pairs) * warps_k * math.pair();
        const int64_t line_stride = math.line_stride(padded_k);
        if (line_stride > std::numeric_limits<int>::max() / 64) continue;
        t.line_stride = int(line_stride);
        t.image_bytes = math.lines(rows) * line_stride * 16;
        const int64_t sums = int64_t(t.slots) * rows * t.sum_stride * math.scalar_bytes * (l.scatter ? 2 : 1);
        int64_t operand = t.image_bytes * (l.scatter ? 1 : 2);
        t.chunks = 1, t.chunk_pairs = t.pairs;
        if (!cluster()) {
          // The operand comes whole if that leaves three quarters of the room, else in chunks, two at a time.
          operand = t.image_bytes;
          while (operand + sums > shared_left / 4 && t.chunk_pairs > 1) {
            t.chunks = t.chunks == 1 ? 2 : t.chunks + 1;
            t.chunk_pairs = int(divide_up(t.pairs, t.chunks));
            operand =
                2 * math.lines(rows) * math.line_stride(int64_t(t.chunk_pairs) * warps_k * math.pair()) * 16;
          }
          t.chunks = int(divide_up(t.pairs, t.chunk_pairs));
        }
        t.chunk_line_stride = int(math.line_stride(int64_t(t.chunk_pairs) * warps_k * math.pair()));
        const int64_t unit_bytes = int64_t(t.warps()) * t.unit_vectors() * 16,
                      left = shared_left - operand - sums;
        if (left < 0) continue;
        const int wanted = std::max(0, t.units() - in_registers);
        t.shared_units = int(std::min<int64_t>(wanted, left / unit_bytes));
        if (t.shared_units < wanted && !may_stream(plan.kernel)) continue;
        const double cycles = product_cycles(t, in_registers) + exchange_cycles(t);
        if (cycles < best) best = cycles, found = t;
      }
    }
  }
  if (best == std::numeric_limits<double>::infinity()) return false;
  l = found;
  return true;
}

bool Attempt::lay_out(int blocks, const ProductFacts (&facts)[kMaxProducts]) {
  const int64_t hidden = problem.hidden_size, projected = problem.proj_size;
  LoopLayout& layout = this->layout();
  layout.gates = facts_of(problem.cell).gates, layout.saved = facts_of(problem.cell).saved;
  layout.blocks = blocks;
  layout.rows = plan.columns * math.rows();
  layout.units = int(round_up(divide_up(hidden, blocks), 8));
  layout.projected_units = int(round_up(divide_up(projected, blocks), 8));
  const int state_units = std::max(layout.units, layout.projected_units);
  int64_t shared = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = shared;
    shared += round_up(bytes, 128);
    return int(at);
  };
  layout.arrivals_at = take(int64_t(layout.products) * 2 * 8);
  layout.state_at = take(int64_t(2) * state_units * layout.rows * math.scalar_bytes);
  layout.bias_at = take(int64_t(layout.gates) * layout.units * math.scalar_bytes);

  int64_t workspace = 0;
  const auto reserve = [&](int64_t bytes) {
    const int64_t at = workspace;
    workspace += round_up(bytes, 256);
    return at;
  };
  cycles = kStepCycles;
  int warps = 1;
  // Of two products the smaller first: it may have half of the room, the larger has all that is left.
  for (int left = layout.products; left > 0; --left) {
    const int i = problem.backward ? layout.products - left : left - 1;
    ProductLayout& l = layout.product[i];
    l.scatter = plan.exchange == Exchange::kSums;
    l.segments = facts[i].segments, l.out_gates = facts[i].out_gates;
    l.in_units = facts[i].from_projected ? layout.projected_units : layout.units;
    l.out_units = facts[i].to_projected ? layout.projected_units : layout.units;
    const int64_t room = problem.device.shared_bytes - shared - left * 3 * 128;
    if (room <= 0 || !lay_out_product(i, room / left)) return false;
    const int64_t sums = int64_t(l.slots) * layout.rows * l.sum_stride * math.scalar_bytes;
    const int64_t chunk = math.lines(layout.rows) * l.chunk_line_stride * 16;
    l.operand_at = take(cluster() ? l.image_bytes * (l.scatter ? 1 : 2) : chunk * (l.chunks > 1 ? 2 : 1));
    l.sums_at = take(sums * (l.scatter ? 2 : 1));
    l.weights_at = take(int64_t(l.warps()) * l.shared_units * l.unit_vectors() * 16);
    l.tiles_bytes = int64_t(l.warps()) * l.units() * l.unit_vectors() * 16;
    l.tiles_at = reserve(problem.directions * blocks * l.tiles_bytes);
    warps = std::max(warps, l.warps());
    cycles += product_cycles(l, in_registers(i)) + exchange_cycles(l);
    plan.weights[i] = facts[i].weights;
  }
  // Items need threads too, and the cheapest way to share a small product may have few warps.
  const int64_t items = int64_t(state_units) * layout.rows;
  warps = int(std::max<int64_t>(warps, std::min<int64_t>(kMostWarps, divide_up(items, 64))));
  layout.threads = 32 * warps;
  layout.shared_bytes = int(shared);
  cycles += kRoundCycles * double(divide_up(items, 2 * layout.threads) - 1);
  if (shared > problem.device.shared_bytes) return false;

  plan.groups = problem.directions * divide_up(problem.batch, layout.rows);
  const int64_t together = cluster() ? clusters_at_once(problem.device, blocks)
                                     : std::max<int64_t>(1, problem.device.multiprocessors / blocks);
  if (together < problem.directions) return false;  // they run at the same time
  plan.groups_at_once = std::min(plan.groups, cluster() ? plan.groups : together);
  if (!cluster()) {
    const int64_t launches = divide_up(plan.groups, plan.groups_at_once);
    for (int i = 0; i < layout.products; ++i) {
      layout.product[i].images_at = reserve(2 * plan.groups_at_once * layout.product[i].image_bytes);
    }
    layout.flags_of_copy = int(round_up(launches * plan.groups_at_once * blocks, 32));
    layout.flags_at = reserve(int64_t(kFlagCopies) * layout.flags_of_copy * 4);
  }
  layout.offsets_at = reserve(problem.packed ? (problem.steps + 1) * 8 : 0);
  layout.workspace_bytes = std::max<int64_t>(workspace, 256);
  double once = kLoopMicroseconds;
  for (int i = 0; i < layout.products; ++i) {
    once += double(problem.directions * blocks * layout.product[i].tiles_bytes) / kPackedBytes;
  }
  const double waves = double(divide_up(plan.groups, std::min(together, plan.groups)));
  plan.microseconds =
      cycles / kCyclesPerMicrosecond * waves + once / double(std::max<int64_t>(1, problem.steps));
  return true;
}

// A launch of each for every product of a step, for all directions.
LoopPlan steps_plan(const LoopProblem& p, const ProductFacts (&facts)[kMaxProducts], int products) {
  LoopPlan plan = {};
  plan.kernel = LoopKernelKind::kSteps;
  plan.groups = plan.groups_at_once = 1;
  plan.layout.gates = facts_of(p.cell).gates, plan.layout.saved = facts_of(p.cell).saved;
  plan.layout.products = products;
  plan.layout.rows = int(std::min<int64_t>(p.batch, std::numeric_limits<int>::max()));
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const double multiprocessors = p.device.multiprocessors;
  // Multiply-adds of a multiprocessor in a microsecond, of those that cuBLAS reaches.
  const double rate = multiprocessors * (half                         ? 1.7e6
                                         : p.dtype == DType::kFloat64 ? 1e5
                                         : p.tf32                     ? 8e5
                                                                      : 2e5);
  double weights = 0;
  for (int i = 0; i < products; ++i) {
    weights += double(std::max(facts[i].segments, facts[i].out_gates)) * double(facts[i].weights.outputs) *
               double(facts[i].weights.inputs) * p.directions;
  }
  const double bytes = weights * (half ? 2 : p.dtype == DType::kFloat64 ? 8 : 4);
  const double bandwidth =
      bytes < double(p.device.l2_bytes) ? multiprocessors * kL2Bytes * kCyclesPerMicrosecond : kMemoryBytes;
  const double gpu =
      products * kProductMicroseconds + std::max(weights * double(p.batch) / rate, bytes / bandwidth);
  plan.microseconds = std::max(products * kLaunchMicroseconds, gpu);
  return plan;
}

std::string describe(const LoopProblem& p) {
  return std::string(facts_of(p.cell).name) + (p.backward ? " backward" : " forward") + ", hidden size " +
         std::to_string(p.hidden_size) + ", " + std::to_string(p.device.multiprocessors) +
         " multiprocessors of " + std::to_string(p.device.shared_bytes) + " bytes of shared memory";
}

std::string describe(const ForcedLoopPlan& forced) {
  if (forced.kernel < 0) return "";
  std::string text = std::string(", and a forced plan, ") + kLoopKernelNames[forced.kernel];
  if (forced.blocks) text += ":" + std::to_string(forced.blocks);
  if (forced.columns) text += "x" + std::to_string(forced.columns);
  if (forced.exchange >= 0) text += std::string(":") + kExchangeNames[forced.exchange];
  return text;
}

}  // namespace

LoopPlan loop_plan(const LoopProblem& problem) {
  const Arithmetic math = arithmetic_of(problem);
  ProductFacts facts[kMaxProducts];
  const int products = products_of(problem, facts);
  LoopPlan best = {};
  best.microseconds = std::numeric_limits<double>::infinity();
  const ForcedLoopPlan& forced = problem.forced;
  for (const LoopKernelKind kernel :
       {LoopKernelKind::kCluster, LoopKernelKind::kGrid, LoopKernelKind::kStream}) {
    if (forced.kernel >= 0 && forced.kernel != int(kernel)) continue;
    const bool cluster = kernel == LoopKernelKind::kCluster;
    if (cluster && problem.device.major != 9)
      continue;  // they are compiled for sm_90a, which runs nowhere else
    for (int columns = 1; columns <= most_columns(math.tensor, products); columns *= 2) {
      if (forced.columns > 0 && forced.columns != columns) continue;
      // More columns than the batch has rows are of no use.
      if (!forced.columns && columns > 1 && columns / 2 * math.rows() >= problem.batch) continue;
      const int64_t widest = std::max(problem.hidden_size, problem.proj_size);
      const int most_blocks =
          int(std::min<int64_t>(cluster ? problem.device.most_cluster_blocks : problem.device.multiprocessors,
                                std::max<int64_t>(1, divide_up(widest, 8))));
      int before = 0;
      for (int wish = 1; wish <= most_blocks; wish = cluster ? 2 * wish : wish + 1) {
        if (forced.blocks > 0 && forced.blocks != wish) continue;
        // Without empty blocks where any number will do.
        const int64_t units = round_up(divide_up(widest, wish), 8);
        const int blocks = cluster || forced.blocks ? wish : int(divide_up(widest, units));
        if (blocks == before) continue;
        before = blocks;
        for (const Exchange exchange : {Exchange::kSums, Exchange::kOperand}) {
          const bool choice = cluster && problem.backward;
          if (choice ? forced.exchange >= 0 && forced.exchange != int(exchange)
                     : exchange == Exchange::kSums) {
            continue;
          }
          Attempt attempt{problem, math, {}, 0};
          attempt.plan.kernel = kernel, attempt.plan.exchange = exchange, attempt.plan.columns = columns;
          attempt.plan.layout.products = products;
          if (!attempt.lay_out(blocks, facts)) continue;
          if (attempt.plan.microseconds < best.microseconds) best = attempt.plan;
        }
      }
    }
  }
  const bool free = forced.kernel < 0 && forced.blocks == 0 && forced.columns == 0;
  if (free || forced.kernel == int(LoopKernelKind::kSteps)) {
    const LoopPlan steps = steps_plan(problem, facts, products);
    if (steps.microseconds < best.microseconds) best = steps;
  }
  if (best.microseconds == std::numeric_limits<double>::infinity()) {
    throw std::runtime_error(
        "given: " + describe(problem) + describe(forced) +
        "\naccepted: what fits one of the kernels cluster (compute capability 9.0), grid, "
        "stream, all directions at the same time, or steps\ntry: another FASTSEQ_CUDA_PLAN, or none, or the "
        "module on the CPU");
  }
  return best;
}

}  // namespace fastseq
