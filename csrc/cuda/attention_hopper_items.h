// What the blocks of the kernel for sm_90a have to do: which tiles of rows, in which order, over which tiles of keys.
#pragma once

#include <prim_hopper.h>

#include "attention_call.h"

namespace fastseq::FASTSEQ_ISA::attention {

struct HopperArgs {
  TensorMap query, key, value;  // (feature, head of pack, row, pack, batch); (feature, row, head, batch)
  Call call;                    // its group is the heads of a pack
  int packs;                    // of a key head
  int queries;                  // of a tile of rows
  int items, units;             // tiles of rows; packs of all heads and sequences
  int units_at_once;            // whose tiles alternate
};

// Calls body(number) for each item of the block. Its place among the blocks is the other way round every other time, so
// that nobody has the heavier one always.
template <class Body>
FS_DEVICE void for_items(const HopperArgs& args, Body body) {
  const int blocks = block_count();
  FS_NO_UNROLL
  for (int turn = 0; turn * blocks < args.items; ++turn) {
    const int index = turn * blocks + (turn % 2 == 0 ? block_index() : blocks - 1 - block_index());
    if (index < args.items) body(index);
  }
}

// The rows of an item; the key head is that of the pack. Units follow each other in sections, whose keys and values stay
// in the second-level cache while their tiles alternate, those that see most first.
template <int kRows>
FS_DEVICE RowTile<kRows> rows_of_item(const HopperArgs& args, int item) {
  const Call& call = args.call;
  const AttentionArgs& a = call.a;
  const int slots = int(call.slots), heads = int(a.kv_heads) * args.packs;
  const int begin = item / (args.units_at_once * slots) * args.units_at_once;
  const int count = smaller(args.units_at_once, args.units - begin), rest = item - begin * slots;
  const int unit = begin + rest % count, slot = slots - 1 - rest / count;
  Place p{unit / heads, unit % heads, slot, 0};
  if (a.cu_seqlens_q) find_packed(p, slot, a.cu_seqlens_q, a.batch, a.queries, call.group, kRows);
  return RowTile<kRows>(call, p, args.queries);
}

// Tiles of keys that a row sees, from begin to end; all rows see all of those from whole to edge. With a mask it is not
// known of any.
struct KeyTiles {
  int begin, whole, edge, end;
};
template <int kKeys, class Rows>
FS_DEVICE KeyTiles key_tiles_of(const Rows& rows, bool masked) {
  if (rows.count <= 0) return {};
  const Range some = rows.some(), all = rows.all();
  KeyTiles t;
  t.begin = some.begin / kKeys;
  t.end = some.begin < some.end ? (some.end + kKeys - 1) / kKeys : t.begin;
  t.whole = masked ? t.end : smaller(larger((all.begin + kKeys - 1) / kKeys, t.begin), t.end);
  t.edge = larger(smaller(all.end / kKeys, t.end), t.whole);
  return t;
}

}  // namespace fastseq::FASTSEQ_ISA::attention
