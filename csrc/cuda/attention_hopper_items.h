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
  int units;                    // packs of all heads and sequences
  int units_at_once;            // whose tiles alternate
  int tiles, pairs;             // of rows; of tiles that are worked on one after the other, 0: alone
};

// The first or the second tile of a pair; -1: there is none. The first tile of a section goes with its last, the second
// with the last but one, and so on: under causality, where the first see most, all pairs see the same.
FS_DEVICE int tile_of_pair(const HopperArgs& args, int pair, int second) {
  const int most = args.units_at_once * int(args.call.slots), pairs = (most + 1) / 2;
  const int section = pair / pairs, i = pair - section * pairs, begin = section * most;
  if (!second) return begin + i;
  const int other = smaller(most, args.tiles - begin) - 1 - i;
  return other > i ? begin + other : -1;
}

// Calls body(tile) for each tile of rows of the block, which shares them, or their pairs, with the others in turns. Its
// place among the blocks is the other way round every other time, so that nobody has the heavier one always.
template <class Body>
FS_DEVICE void for_items(const HopperArgs& args, Body body) {
  const int blocks = block_count(), in_pairs = args.pairs > 0, items = in_pairs ? args.pairs : args.tiles;
  FS_NO_UNROLL
  for (int step = 0;; ++step) {
    const int turn = step >> in_pairs;
    const int item = turn * blocks + (turn % 2 == 0 ? block_index() : blocks - 1 - block_index());
    if (item >= items) return;  // of which turn, it is the last
    const int tile = in_pairs ? tile_of_pair(args, item, step & 1) : item;
    if (tile >= 0) body(tile);
  }
}

// The rows of a tile; the key head is that of the pack. Units follow each other in sections, whose keys and values stay
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
