// What the kernels of attention are called with, and which part of the problem a block has.
//
// Rows are the queries of all query heads that share a key head, row = query * group + head within the group: so a tile
// of rows reads the keys of its head once for all of them, and its queries are near each other.
#pragma once

#include <prim.h>

#include "../fastseq.h"

namespace fastseq::FASTSEQ_ISA::attention {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr int kFar = 1 << 30;  // farther than any key

struct Call {
  AttentionArgs a;
  int group;  // query heads of a key head
  int64_t
      slots;  // tiles of rows (or of keys, where a block has keys) of a key head, of packed sequences at most
  int parts, part_keys;  // keys are cut into so many parts of so many keys, each with results of its own
  bool product_units;    // scores are in units of products: nothing is added to these
  // Rows of these begin at a multiple of 16 bytes.
  bool aligned_query, aligned_key, aligned_value, aligned_grad_output;
  bool aligned_deltas;  // output, what rounding took from it, and its gradient
  bool pairs_of_output, pairs_of_grad_query, pairs_of_grad_key,
      pairs_of_grad_value;                      // at one of two elements
  bool pairs_of_mask;                           // the mask's too, whose keys are next to each other
  void *part_output, *part_highest, *part_sum;  // [B, Hkv, parts, rows(, value_size)], in the dtype of sums
  HeadRows delta;                               // see attention_rows.h
  void* grad_query_sums;                        // like grad_query, in the dtype of sums: of the one-pass form
  int mask_parts;                               // the mask's gradient is summed up in so many parts
};

// A call over dual numbers. In the tangents' places what Call has for its tensors.
struct DualCall : Call {
  AttentionTangents tangents;
  bool aligned_query_tangent, aligned_key_tangent, aligned_value_tangent, aligned_grad_output_tangent;
  bool aligned_delta_tangents;  // those of aligned_deltas, and the tangents of these
  bool pairs_of_output_tangent, pairs_of_mask_tangent;
  bool pairs_of_grad_query_tangent, pairs_of_grad_key_tangent, pairs_of_grad_value_tangent;
  HeadRows delta_tangent;  // beside delta
};

FS_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }
FS_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
FS_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// Keys from begin to end.
struct Range {
  int begin, end;
};

// One sequence of the batch: which rows of the tensors are its own, and what its queries see.
struct Sequence {
  int index;
  int b;  // the index where tensors are not packed, else 0
  int first_query, first_key;
  int queries, keys, offset, left, right;

  FS_DEVICE Sequence(const AttentionArgs& a, int index)
      : index(index), b(index), first_query(0), first_key(0) {
    queries = int(a.queries), keys = int(a.keys);
    if (a.cu_seqlens_q) {
      b = 0;
      first_query = int(clamp(a.cu_seqlens_q[index], 0, a.queries));
      queries = int(clamp(a.cu_seqlens_q[index + 1], first_query, a.queries) - first_query);
      first_key = int(clamp(a.cu_seqlens_k[index], 0, a.keys));
      keys = int(clamp(a.cu_seqlens_k[index + 1], first_key, a.keys) - first_key);
    }
    if (a.key_lengths) keys = int(clamp(a.key_lengths[index], 0, a.keys));
    offset = a.bottom_right ? keys - queries : 0;
    left = a.left < 0 ? -1 : int(clamp(a.left, 0, kFar));
    right = a.right < 0 ? -1 : int(clamp(a.right, 0, kFar));
  }

  // The keys that query i can see as far as lengths, causality and window go: both ends never decrease with i.
  FS_DEVICE Range visible(int i) const {
    const int64_t at = int64_t(i) + offset;
    Range r{0, keys};
    if (left >= 0) r.begin = int(clamp(at - left, 0, keys));
    if (right >= 0) r.end = int(clamp(at + right + 1, 0, keys));
    return r;
  }
  // The queries that can see a key from first to last: from begin on, before end.
  FS_DEVICE Range seeing(int first, int last) const {
    Range r{0, queries};
    if (right >= 0) r.begin = int(clamp(int64_t(first) - right - offset, 0, queries));
    if (left >= 0) r.end = int(clamp(int64_t(last) + left - offset + 1, 0, queries));
    return r;
  }

  template <class E>
  FS_DEVICE E* query_row(const HeadTensor& t, int64_t head, int64_t i) const {
    return static_cast<E*>(t.data) + b * t.stride[0] + head * t.stride[1] + (first_query + i) * t.stride[2];
  }
  template <class E>
  FS_DEVICE E* key_row(const HeadTensor& t, int64_t head, int64_t j) const {
    return static_cast<E*>(t.data) + b * t.stride[0] + head * t.stride[1] + (first_key + j) * t.stride[2];
  }
  template <class T>
  FS_DEVICE T* of_query(const HeadRows& t, int64_t head, int64_t i) const {
    return static_cast<T*>(t.data) + b * t.stride[0] + head * t.stride[1] + first_query + i;
  }
};

// Which keys the queries of a sequence see, as far as lengths, causality and window go: those for which key - query
// is from low to high.
struct Band {
  int queries, keys, low, high;

  FS_DEVICE explicit Band(const Sequence& s) : queries(s.queries), keys(s.keys), low(-kFar), high(kFar) {
    if (s.left >= 0) low = int(clamp(int64_t(s.offset) - s.left, -kFar, kFar));
    if (s.right >= 0) high = int(clamp(int64_t(s.offset) + s.right, -kFar, kFar));
  }
  FS_DEVICE bool shows(int query, int key) const {
    const int distance = key - query;
    return query < queries && key < keys && distance >= low && distance <= high;
  }
  // All, or any, of `m` queries from `query` on and `n` keys from `key` on.
  FS_DEVICE bool shows_all(int query, int m, int key, int n) const {
    return query + m <= queries && key + n <= keys && key - (query + m - 1) >= low &&
           key + n - 1 - query <= high;
  }
  FS_DEVICE bool shows_any(int query, int m, int key, int n) const {
    const int last_query = smaller(query + m, queries) - 1, last_key = smaller(key + n, keys) - 1;
    return last_query >= query && last_key >= key && last_key - query >= low && key - last_query <= high;
  }
};

// The place of a block: which tile of `size` rows or keys of which sequence and key head.
//
// Packed sequences have different lengths, which only the device knows. Sequence b has the slots from
// floor(start_b / size) + b on, at least as many as it has tiles; so all together have floor(all / size) + B.
struct Place {
  int sequence, kv_head;
  int64_t tile;  // < 0: none
  int part;
};
// Whose slot it is, of packed sequences that begin at these rows of `all`, each row `times` rows of tiles.
FS_DEVICE void find_packed(Place& p, int64_t slot, const int64_t* starts, int64_t batch, int64_t all,
                           int64_t times, int size) {
  int64_t low = 0, high = batch;  // the last sequence that begins at this slot or before is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    const bool after = clamp(starts[middle], 0, all) * times / size + middle > slot;
    low = after ? low : middle, high = after ? middle : high;
  }
  p.sequence = int(low);
  p.tile = slot - (clamp(starts[low], 0, all) * times / size + low);
}
FS_DEVICE Place place_of_block(const Call& call, const int64_t* starts, int64_t all, int64_t times, int size,
                               bool last_first) {
  const AttentionArgs& a = call.a;
  int64_t index = block_index();
  int64_t slot = index % call.slots;
  index /= call.slots;
  Place p;
  p.part = int(index % call.parts);
  index /= call.parts;
  p.kv_head = int(index % a.kv_heads);
  if (!starts) {
    p.sequence = int(index / a.kv_heads);
    p.tile = last_first ? call.slots - 1 - slot : slot;
    return p;
  }
  find_packed(p, slot, starts, a.batch, all, times, size);
  return p;
}

// A tile of rows of one key head.
template <int kRows>
struct RowTile {
  Sequence s;
  int kv_head;
  int first_query, first_head;  // of the first row, the head within the group
  int count;                    // of its rows there are so many; 0: nothing to do
  int group, part;

  FS_DEVICE static RowTile of_block(const Call& call) {
    const AttentionArgs& a = call.a;
    const Place p = place_of_block(call, a.cu_seqlens_q, a.queries, call.group, kRows, true);
    return {call, p};
  }
  FS_DEVICE RowTile(const Call& call, const Place& p) : RowTile(call, Sequence(call.a, p.sequence), p) {}
  FS_DEVICE RowTile(const Call& call, const Sequence& s, const Place& p)
      : s(s), kv_head(p.kv_head), group(call.group), part(p.part) {
    const int64_t first = p.tile * kRows, rows = int64_t(s.queries) * group;
    count = p.tile < 0 ? 0 : int(clamp(rows - first, 0, kRows));
    first_query = int(group == 1 ? first : first / group), first_head = group == 1 ? 0 : int(first % group);
  }
  // Where the group divides kRows: so many queries. There is no division of 64 bits then, which is a call.
  FS_DEVICE RowTile(const Call& call, const Place& p, int queries)
      : s(call.a, p.sequence), kv_head(p.kv_head), first_head(0), group(call.group), part(p.part) {
    first_query = int(p.tile) * queries;
    count = p.tile < 0 ? 0 : smaller(larger(s.queries - first_query, 0), queries) * group;
  }

  FS_DEVICE int query(int row) const { return first_query + (group == 1 ? row : (first_head + row) / group); }
  FS_DEVICE int64_t head(int row) const {
    return group == 1 ? kv_head : int64_t(kv_head) * group + (first_head + row) % group;
  }
  FS_DEVICE Range some() const {  // keys that any row sees
    return {s.visible(first_query).begin, s.visible(query(count - 1)).end};
  }
  FS_DEVICE Range all() const {  // keys that all rows see
    return {s.visible(query(count - 1)).begin, s.visible(first_query).end};
  }
};

// A tile of keys, and the rows that see one of them.
template <int kKeys>
struct KeyTile {
  Sequence s;
  int kv_head, first;
  int count;  // of its keys there are so many, 0 or less: nothing to do
  // Rows count all query heads: of very long sequences more than 32 bits hold.
  int64_t first_row, end_row;

  FS_DEVICE static KeyTile of_block(const Call& call) {
    return {call, place_of_block(call, call.a.cu_seqlens_k, call.a.keys, 1, kKeys, false)};
  }
  FS_DEVICE KeyTile(const Call& call, const Place& p) : s(call.a, p.sequence), kv_head(p.kv_head) {
    first = int(p.tile * kKeys);
    // Where tensors are not packed, keys behind the sequence's length have gradients too: zero.
    const int all = call.a.cu_seqlens_k ? s.keys : int(call.a.keys);
    count = p.tile < 0 ? 0 : smaller(all - first, kKeys);
    const int last = smaller(first + kKeys, s.keys) - 1;
    const Range seeing = last >= first ? s.seeing(first, last) : Range{0, 0};
    first_row = int64_t(seeing.begin) * call.group, end_row = int64_t(seeing.end) * call.group;
  }

  template <int kRows>
  FS_DEVICE int tiles() const {
    return first_row < end_row ? int((end_row + kRows - 1) / kRows - first_row / kRows) : 0;
  }
  template <int kRows>
  FS_DEVICE RowTile<kRows> rows(const Call& call, int tile) const {
    return RowTile<kRows>(call, s, Place{s.index, kv_head, first_row / kRows + tile, 0});
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
