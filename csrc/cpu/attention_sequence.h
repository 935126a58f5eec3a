// Sequences of a batch: their sizes, which keys their queries see, where their rows lie, and the units of work that a
// plan makes of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../fastseq.h"
#include "attention_plan.h"
#include "vec.h"

namespace fastseq::FASTSEQ_ISA {

inline int64_t round_up(int64_t n, int64_t size) { return (n + size - 1) / size * size; }
inline int64_t round_down(int64_t n, int64_t size) { return n / size * size; }

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};
inline Range join(Range a, Range b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
}

constexpr int64_t kFar = int64_t(1) << 60;  // farther than any key, and no sum with it overflows

// One sequence of the batch, its first rows in the tensors, and what its queries see.
struct Sequence {
  int64_t index;
  int64_t b;  // the index where tensors are not packed, else 0
  int64_t queries, keys, first_query, first_key, offset, left, right;

  Sequence(const AttentionArgs& a, int64_t index)
      : index(index),
        b(a.cu_seqlens_q ? 0 : index),
        first_query(a.cu_seqlens_q ? a.cu_seqlens_q[index] : 0),
        first_key(a.cu_seqlens_k ? a.cu_seqlens_k[index] : 0),
        left(std::min(a.left, kFar)),
        right(std::min(a.right, kFar)) {
    const AttentionLengths lengths(a, index);
    queries = lengths.queries, keys = lengths.keys;
    offset = a.bottom_right ? keys - queries : 0;
  }

  // The keys that query i can see as far as lengths, causality and window go.
  Range visible(int64_t i) const {
    const int64_t at = i + offset;
    Range r{0, keys};
    if (left >= 0) r.begin = std::clamp<int64_t>(at - left, 0, keys);
    if (right >= 0) r.end = std::clamp<int64_t>(at + right + 1, 0, keys);
    return r;
  }

  template <class S>
  S* query_row(const HeadTensor& t, int64_t head, int64_t i) const {
    return static_cast<S*>(t.data) + b * t.stride[0] + head * t.stride[1] + (first_query + i) * t.stride[2];
  }
  template <class S>
  S* key_row(const HeadTensor& t, int64_t head, int64_t j) const {
    return static_cast<S*>(t.data) + b * t.stride[0] + head * t.stride[1] + (first_key + j) * t.stride[2];
  }
  template <class T>
  T* of_query(const HeadRows& t, int64_t head, int64_t i) const {
    return static_cast<T*>(t.data) + b * t.stride[0] + head * t.stride[1] + first_query + i;
  }
};

// A sequence's key and value head with all query heads that share it, or a part of its keys.
struct Unit {
  Sequence s;
  int64_t b, kv_head, part, parts;
  Range keys;  // of the part, at most as far as any query sees them
};

}  // namespace fastseq::FASTSEQ_ISA
