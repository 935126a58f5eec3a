// What the two backward kernels for compute capability 9.0 have in common: see attention_hopper_backward_keys.h.
#pragma once

#include <prim_hopper.h>

#include "attention_backward.h"
#include "attention_hopper_backward_shapes.h"
#include "attention_hopper_results.h"

namespace fastseq::FASTSEQ_ISA::attention {

constexpr int kConsumers = 2, kConsumerThreads = kConsumers * kWarpgroup,
              kConsumerWarps = kConsumerThreads / kWarp;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // 168 each before
// Numbers of barriers: of all consumers, and of the turns of the first and the second.
constexpr int kAllConsumers = 1, kFirstTurn = 2;

// Boxes are 64 features wide, and as many rows high as the kernel's tiles. `call.parts` are the query heads of a key
// head where a block has one of them.
struct HopperCall {
  TensorMap query, key, value, grad_output;
  Call call;
};

// All features of `rows` rows from `row` on, and so many bytes for `full`.
template <int kFeatures>
FS_DEVICE void load_features(unsigned char* to, const TensorMap& map, PhaseBarrier* full, int rows, int row,
                             int head, int batch) {
  FS_NO_UNROLL  // the producer has few registers
      for (int i = 0; i < (kFeatures + kTileColumns - 1) / kTileColumns; ++i) {
    load_tile(to + i * rows * kTileRowBytes, map, full, {i * kTileColumns, row, head, batch});
  }
}

// As new: or the compiler would make the operands of all steps before the loop, and keep them in registers.
FS_DEVICE uint64_t made_here(uint64_t operand) {
  return (operand & ~uint64_t(0xffffffff)) | as_new(uint32_t(operand));
}

// d = a b^T over the features: 64 rows of tiles that have a_rows, and kOther rows of others.
template <class E, int kFeatures, int kOther>
FS_DEVICE void multiply_features(float (&d)[kOther / 2], uint64_t a, int a_rows, const unsigned char* other) {
  const uint64_t b = operand_of_tiles<Major::k>(other, kOther);
  a = made_here(a);
  FS_UNROLL
  for (int step = 0; step < kFeatures / 16; ++step) {
    wgmma<E, kOther, Major::k, Major::k>(d, at_step<Major::k>(a, a_rows, step),
                                         at_step<Major::k>(b, kOther, step), step > 0);
  }
  wgmma_commit();
}
// d += a b over kOther rows of b.
template <class E, int kFeatures, int kOther>
FS_DEVICE void add_rows(float (&d)[kFeatures / 2], const uint32_t (&a)[kOther / 16][4],
                        const unsigned char* other) {
  const uint64_t b = operand_of_tiles<Major::mn>(other, kOther);
  FS_UNROLL
  for (int step = 0; step < kOther / 16; ++step) {
    wgmma<E, kFeatures, Major::mn>(d, a[step], at_step<Major::mn>(b, kOther, step), true);
  }
  wgmma_commit();
}
// The same where a, from `rows` on of tiles that have a_rows, is in shared memory.
template <class E, int kFeatures, int kOther>
FS_DEVICE void add_rows_of_tile(float (&d)[kFeatures / 2], const unsigned char* rows, int a_rows,
                                const unsigned char* other) {
  const uint64_t a = operand_of_tiles<Major::k>(rows, a_rows), b = operand_of_tiles<Major::mn>(other, kOther);
  FS_UNROLL
  for (int step = 0; step < kOther / 16; ++step) {
    wgmma<E, kFeatures, Major::k, Major::mn>(d, at_step<Major::k>(a, a_rows, step),
                                             at_step<Major::mn>(b, kOther, step), true);
  }
  wgmma_commit();
}
template <class E, int kCount>
FS_DEVICE void round_to_words(const float (&x)[kCount], uint32_t (&words)[kCount / 8][4]) {
  FS_UNROLL
  for (int i = 0; i < kCount / 2; ++i) words[i / 4][i % 4] = pack(x[2 * i], x[2 * i + 1], E{});
}

// Products -> scores, of a tile some of which is hidden: score() of attention_scores.h, with the mask as the only
// option. A warp's accumulators lie as Sums[1][kCount / 4], `orient` is of these; `edge` as there.
template <bool kMasked, class E, bool kQueriesAreRows, int kCount>
FS_DEVICE void score_and_hide(const Call& call, const Sequence& s, const Band& band,
                              const Orient<kQueriesAreRows>& orient, int head, bool edge,
                              float (&x)[kCount]) {
  const AttentionArgs& a = call.a;
  if constexpr (kMasked) {
    if (!call.product_units) {
      FS_UNROLL
      for (int i = 0; i < kCount; ++i) x[i] *= float(a.scale);
    }
    if (a.mask.kind != MaskKind::kNone) {
      // As new: or the addresses of all queries would be made first, and kept.
      const auto query_at = [&](int m, int n, int e) {
        return Query<float>{int(as_new(uint32_t(orient.query(m, n, e)))), head, 0, 0, 0};
      };
      return for_mask<E, float, 1, kCount / 4>(
          a.mask, call.pairs_of_mask, s, orient, query_at, !edge,
          [&](int query, int key) { return band.shows(query, key); },
          [&](int, int n, int e, float bias) { x[4 * n + e] = add_bias(x[4 * n + e], bias); });
    }
  }
  if (!edge) return;
  FS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (!band.shows(orient.query(0, i / 4, i % 4), orient.key(0, i / 4, i % 4))) x[i] = -float(INFINITY);
  }
}
// The first of a warp's 16 rows, of tiles of 128 or 64: then both consumers have the same.
FS_DEVICE int first_row_of_warp(int rows) { return (thread_index() - kWarpgroup) / kWarp * 16 % rows; }

// ---- NaN and infinity ----
//
// What is hidden has a factor of zero in the sums, and zero times NaN is NaN. So where some of a tile is hidden, the
// consumers look for what is not finite in what is summed up over. If there is any, it is added to the sums by itself,
// with factors that are not zero, and then the tile has zeros in its place: the sums of what is finite have the bits
// that they always have. All of this is for correctness, and slow.

template <class E>
FS_DEVICE uint32_t special_in(const unsigned char* tiles, int bytes) {
  uint32_t carries = 0;
  FS_NO_UNROLL
  for (int at = (thread_index() - kWarpgroup) * 16; at < bytes; at += kConsumerThreads * 16) {
    carries |= carries_of<E>(*reinterpret_cast<const Vector16*>(tiles + at));
  }
  return carries;
}
// Whether any thread of the consumers, who all call this, has found something; `flags` are the stage's own, which a
// phase of its barriers separates from the next time.
FS_DEVICE bool any_of_consumers(uint32_t found, int* flags) {
  const bool any = any_in_warp(found != 0);
  const int warp = (thread_index() - kWarpgroup) / kWarp;
  if (thread_index() % kWarp == 0) flags[warp] = any;
  named_sync(kAllConsumers, kConsumerThreads);
  int all = 0;
  FS_UNROLL
  for (int i = 0; i < kConsumerWarps; ++i) all |= flags[i];
  return any_in_warp(all);
}
// All of the consumers call it, when they have made what is not finite part of their sums.
template <class E>
FS_DEVICE void clear_special(unsigned char* tiles, int bytes) {
  FS_NO_UNROLL
  for (int at = (thread_index() - kWarpgroup) * 4; at < bytes; at += kConsumerThreads * 4) {
    uint32_t& word = *reinterpret_cast<uint32_t*>(tiles + at);
    const uint32_t carries = carries_of<E>(word);
    if (carries) word &= ~((carries >> 15) * 0xffff);
  }
}
template <class E>
FS_DEVICE void clear_special(unsigned char* first, int first_bytes, unsigned char* second, int second_bytes) {
  named_sync(kAllConsumers, kConsumerThreads);  // nobody looks at it any more
  clear_special<E>(first, first_bytes);
  clear_special<E>(second, second_bytes);
  fence_async();
  named_sync(kAllConsumers, kConsumerThreads);
}

// The sums of a warp's 16 rows: what is not finite in the tile, times what is not zero. A call on arrays in memory.
template <class E>
FS_DEVICE_CALL void add_special(float* d, int features, const float* left, int other,
                                const unsigned char* tiles) {
  const int lane = thread_index() % kWarp;
  FS_NO_UNROLL
  for (int row = 0; row < other; ++row) {
    // The factors of this row of the tile are with one lane of four.
    const int i = row / 8 * 4 + row % 2;
    const bool has = row / 2 % 4 == lane % 4;
    float factor[2] = {has ? left[i] : 0.0f, has ? left[i + 2] : 0.0f};
    FS_UNROLL
    for (int half = 0; half < 2; ++half) {
      factor[half] += shuffle_xor(factor[half], 1);
      factor[half] += shuffle_xor(factor[half], 2);
    }
    FS_NO_UNROLL
    for (int j = 0; j < features / 4; ++j) {
      const int column = j / 2 * 8 + lane % 4 * 2 + j % 2;
      const unsigned char* const tile = tiles + column / kTileColumns * other * kTileRowBytes;
      const float x = widen(*reinterpret_cast<const E*>(tile + tile_offset(row, column % kTileColumns)));
      if (is_finite(x)) continue;
      FS_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (factor[half] != 0) d[j / 2 * 4 + half * 2 + j % 2] += factor[half] * x;
      }
    }
  }
}
// Element by element, or the arrays would be in memory from the beginning.
template <class E, int kSums, int kFactors>
FS_DEVICE void add_special_rows(float (&d)[kSums], const float (&left)[kFactors],
                                const unsigned char* tiles) {
  float to[kSums], from[kFactors];
  FS_UNROLL
  for (int i = 0; i < kSums; ++i) to[i] = d[i];
  FS_UNROLL
  for (int i = 0; i < kFactors; ++i) from[i] = left[i];
  add_special<E>(to, 2 * kSums, from, 2 * kFactors, tiles);
  FS_UNROLL
  for (int i = 0; i < kSums; ++i) d[i] = to[i];
}

}  // namespace fastseq::FASTSEQ_ISA::attention
