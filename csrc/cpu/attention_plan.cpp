#include "attention_plan.h"

#include <algorithm>
#include <cstdint>

namespace fastseq {
namespace {

// Costs in rows of a tile; only their proportions matter.
constexpr double kPackRows = 8;     // packing a unit's keys and values
constexpr double kMeetingRows = 1;  // two threads meet

constexpr double kThreadProducts = 1 << 18;  // multiply-adds: some 10 us of them between memory

constexpr int64_t kSplitRows = 64;  // with more rows there is work enough without cutting keys
constexpr int64_t kSplitKeys = 1024;
constexpr int64_t kGradKeys = 256, kMostGradParts = 8;  // each part keeps a copy of the queries' gradient
constexpr int64_t kMostMaskCopies = 8, kMostMaskBytes = 4 << 20;

int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace

int64_t forward_key_parts(int64_t rows, int64_t keys) {
  return rows <= kSplitRows ? std::max<int64_t>(1, ceil_div(keys, kSplitKeys)) : 1;
}

int64_t backward_key_parts(int64_t keys) { return std::clamp<int64_t>(keys / kGradKeys, 1, kMostGradParts); }

int64_t grad_mask_size(const AttentionArgs& a) {
  const int64_t sizes[4] = {a.batch, a.heads, a.queries, a.keys};
  int64_t size = 1;
  for (int i = 0; i < 4; ++i) size *= a.grad_mask_stride[i] ? sizes[i] : 1;
  return size;
}

bool is_broadcast(const AttentionArgs& a) {
  return grad_mask_size(a) != a.batch * a.heads * a.queries * a.keys;
}

int64_t grad_mask_copies(const AttentionArgs& a) {
  if (!a.grad_mask || a.grad_mask_stride[0] != 0) return 1;
  const int64_t bytes = grad_mask_size(a) * (a.dtype == DType::kFloat64 ? 8 : 4);
  const int64_t most = std::min(kMostMaskCopies, kMostMaskBytes / std::max<int64_t>(bytes, 1));
  return std::clamp<int64_t>(a.batch, 1, std::max<int64_t>(most, 1));
}

AttentionPlan attention_plan(const AttentionArgs& a, int threads, bool backward) {
  const int64_t group_heads = a.heads / std::max<int64_t>(a.kv_heads, 1);
  int64_t most_rows = 0;
  double work = 0;
  AttentionPlan plan = {};
  plan.key_parts = 1;
  for (int64_t b = 0; b < a.batch; ++b) {
    const AttentionLengths s(a, b);
    const int64_t rows = group_heads * s.queries;
    const int64_t parts = backward ? backward_key_parts(s.keys) : forward_key_parts(rows, s.keys);
    most_rows = std::max(most_rows, rows);
    work += double(s.queries) * double(s.keys);
    plan.key_parts = std::max(plan.key_parts, parts);
    if (parts > 1) plan.part_rows = std::max(plan.part_rows, rows);
  }
  // A thread more has to have something to do while it is being woken.
  const double products = work * double(a.heads) * double(a.head_size + a.value_size);
  if (a.forced_plan[0] == 0) threads = int(std::min(double(threads), 1 + products / kThreadProducts));
  plan.direct = !backward && !a.highest.data && most_rows <= kDirectRows;
  plan.split = !backward && plan.key_parts > 1;
  const int64_t heads = std::max<int64_t>(a.batch * a.kv_heads, 1);
  const int64_t units = plan.split ? heads * plan.key_parts : heads;
  plan.row_parts = 1;
  bool may_split = false;  // of the backward pass
  if (backward) {
    // A mask's gradient that is summed over keys has one order of its terms whatever the number of threads.
    may_split = plan.key_parts > 1 && !(a.grad_mask && a.grad_mask_stride[3] == 0);
    // Whole heads, or parts of them where that keeps more threads at work.
    const int64_t lanes = std::max<int64_t>(AttentionLanes(a, 1).count(), 1);
    const double whole = double(ceil_div(lanes, threads));
    const double parts = 1.05 * double(ceil_div(lanes * plan.key_parts, threads)) / double(plan.key_parts);
    plan.split = may_split && parts < whole;
    plan.head_parts = int(std::min<int64_t>(threads, plan.split ? lanes * plan.key_parts : lanes));
  } else {
    const int64_t tiles = std::max<int64_t>(ceil_div(most_rows, kQueryTile), 1);
    double best = 0;
    for (int row_parts = 1; row_parts <= std::min<int64_t>(tiles, threads); ++row_parts) {
      const int head_parts = int(std::min<int64_t>(threads / row_parts, units));
      const double meetings = row_parts > 1 ? kMeetingRows * (1 + row_parts / 8.0) : 0;
      const double rows = double(ceil_div(tiles, row_parts) * most_rows) / double(tiles);
      const double time = double(ceil_div(units, head_parts)) * (rows + kPackRows / row_parts + meetings);
      if (row_parts == 1 || time < best) {
        best = time;
        plan.head_parts = head_parts, plan.row_parts = row_parts;
      }
    }
  }
  if (a.forced_plan[0] > 0) {
    plan.head_parts = std::min(a.forced_plan[0], threads);
    plan.row_parts = std::min(a.forced_plan[1], threads / plan.head_parts);
    if (backward) {
      plan.split = may_split && plan.row_parts > 1;
      plan.head_parts *= plan.row_parts;
      plan.row_parts = 1;
    }
  }
  return plan;
}

}  // namespace fastseq
