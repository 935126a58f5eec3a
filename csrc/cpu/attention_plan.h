// Which threads do what in attention: a pure function of shape, dtype and thread count.
#pragma once

#include "../fastseq.h"

namespace fastseq {

// A unit of work is a sequence's key and value head with all query heads that share it, or a part of its keys.
// Units go to head_parts groups of row_parts threads each, as the groups become free. The threads of a group
// share the packed keys and values of their unit, and divide its tiles of queries. In the backward pass they
// are alone.
struct AttentionPlan {
  bool direct;  // few queries in all sequences: keys and values are read where they lie, once
  int head_parts;
  int row_parts;
  int64_t
      key_parts;  // the most of a unit's keys, summed up in order: of few queries, and in the backward pass
  bool split;     // each part of the keys is a unit of its own
  int64_t part_rows;  // the most rows of a unit whose keys are in parts
};

// Rows (queries of all query heads of a key head) of a tile; up to how many read keys and values as they lie.
constexpr int64_t kQueryTile = 128, kDirectRows = 8;

// Queries and keys of sequence b.
struct AttentionLengths {
  int64_t queries, keys;

  AttentionLengths(const AttentionArgs& a, int64_t b) : queries(a.queries), keys(a.keys) {
    if (a.cu_seqlens_q) queries = a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b];
    if (a.cu_seqlens_k) keys = a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b];
    if (a.key_lengths) keys = a.key_lengths[b];
  }
};

// Elements of the mask's gradient. Where it is summed over the batch, small ones are summed up in copies, of a number
// that depends on nothing but sizes, so that the bits do not depend on the threads.
int64_t grad_mask_size(const AttentionArgs& args);
bool is_broadcast(const AttentionArgs& args);  // the mask of which a gradient is wanted, in any dimension
int64_t grad_mask_copies(const AttentionArgs& args);

// Units of the backward pass that add to the same elements of the mask's gradient form a lane, which one thread runs in
// order: all units of the indices that these do not count.
struct AttentionLanes {
  int64_t batch, heads, parts;

  AttentionLanes(const AttentionArgs& a, int64_t key_parts)
      : batch(a.batch), heads(a.kv_heads), parts(key_parts) {
    if (!a.grad_mask) return;
    if (a.grad_mask_stride[0] == 0) batch = grad_mask_copies(a);
    if (a.grad_mask_stride[1] == 0) heads = 1;
    if (a.grad_mask_stride[3] == 0) parts = 1;
  }
  int64_t count() const { return batch * heads * parts; }
};

// How many parts the keys of a sequence are cut into. Depends on its own sizes alone: its bits must not depend
// on the others.
int64_t forward_key_parts(int64_t rows, int64_t keys);
int64_t backward_key_parts(int64_t keys);

AttentionPlan attention_plan(const AttentionArgs& args, int threads, bool backward);

}  // namespace fastseq
