#include "plan.h"

#include <algorithm>

namespace fastseq {
namespace {

// Costs in nanoseconds on one core of a current x86 server; only their proportions matter.
constexpr double kFlopsPerNs = 100;        // float32 products in the cache
constexpr double kNearBytesPerNs = 100;    // weights that stay in a core's own L2
constexpr double kFarBytesPerNs = 30;      // weights from L3
constexpr double kNearBytes = 700 * 1024;  // what of L2 the weights may take
constexpr double kFarBytes = 16 << 20;     // what of L3 the gradients may take
constexpr double kBarrierNs = 250;         // two threads meet
constexpr double kRegionNs = 4000;         // waking the threads
constexpr double kGateNs = 1.5;            // one gate of one unit of one row

double element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

double cost(const RecurrentProblem& p, int directions, int batch_parts, int unit_parts) {
  const double width = p.proj_size ? p.proj_size : p.hidden_size, slowdown = element_bytes(p.dtype) / 4;
  const double quanta = double((p.hidden_size + kUnitQuantum - 1) / kUnitQuantum);
  const double share = double(int64_t(quanta + unit_parts - 1) / unit_parts) / quanta;
  const double rows = double(p.planes * ((p.batch + batch_parts - 1) / batch_parts));
  const double weights = facts_of(p.cell).gates * double(p.hidden_size) * width * share;
  const double bytes = weights * element_bytes(p.dtype);
  const double product = std::max(2 * weights * rows * slowdown / kFlopsPerNs,
                                  bytes / (bytes <= kNearBytes ? kNearBytesPerNs : kFarBytesPerNs));
  const double gates = rows * double(p.hidden_size) * share * facts_of(p.cell).gates * kGateNs / 16;
  const double meetings = facts_of(p.cell).products + (p.proj_size ? 1 : 0);
  const double barrier = unit_parts > 1 ? meetings * kBarrierNs * (1 + unit_parts / 8.0) : 0;
  const double input = 2.0 * facts_of(p.cell).gates * double(p.hidden_size) * double(p.input_size) * rows *
                       share * slowdown / kFlopsPerNs;
  const double pack = facts_of(p.cell).gates * double(p.hidden_size) * (width + double(p.input_size)) *
                      share / batch_parts / 8;
  return directions * (double(p.steps) * (product + gates + barrier + input) + pack);
}

int64_t chunk_rows(const RecurrentProblem& p) {
  if (p.backward) {
    // Each chunk reads and writes all weight gradients: the more of them, the longer the chunks.
    const double width = p.proj_size ? p.proj_size : p.hidden_size;
    const double gradients = facts_of(p.cell).gates * double(p.hidden_size) * (width + double(p.input_size));
    return (gradients * element_bytes(p.dtype) > kFarBytes ? 1024 : 512) / p.planes;
  }
  // The projected inputs of a chunk stay in the cache until their steps are done.
  const int64_t row_bytes =
      p.planes * facts_of(p.cell).gates * p.hidden_size * int64_t(element_bytes(p.dtype));
  return std::clamp<int64_t>((int64_t(1) << 20) / std::max<int64_t>(row_bytes, 1), 48 / p.planes,
                             256 / p.planes);
}

}  // namespace

RecurrentPlan recurrent_plan(const RecurrentProblem& p) {
  const int most_units = int(std::min<int64_t>((p.hidden_size + kUnitQuantum - 1) / kUnitQuantum, 4096));
  const int most_batch = int(std::clamp<int64_t>(p.batch, 1, 4096));
  RecurrentPlan plan{1, 1, 1, chunk_rows(p)};
  if (const int* forced = p.forced_plan; forced[0] > 0) {
    plan.direction_parts = std::min({forced[0], p.directions, p.threads});
    plan.batch_parts = std::min({forced[1], most_batch, p.threads / plan.direction_parts});
    plan.unit_parts = std::min({forced[2], most_units, p.threads / plan.direction_parts / plan.batch_parts});
    if (forced[3] > 0) plan.chunk_rows = forced[3];
    return plan;
  }
  double best = cost(p, p.directions, 1, 1);
  for (int parts = 1; parts <= p.directions; ++parts) {
    const int threads = p.threads / parts;
    for (int batch = 1; batch <= std::min(threads, most_batch); ++batch) {
      const int units = std::min(threads / batch, most_units);
      for (const int unit : {1, units}) {
        if (parts * batch * unit == 1) continue;
        const double time = kRegionNs + cost(p, p.directions / parts, batch, unit);
        if (time < best) {
          best = time;
          plan.direction_parts = parts, plan.batch_parts = batch, plan.unit_parts = unit;
        }
      }
    }
  }
  return plan;
}

}  // namespace fastseq
