// Attention, forward: online softmax (Milakov & Gimelshein 2018; Dao et al. 2022) over tiles of keys, to base 2.
//
// A block owns a tile of rows (see attention_call.h) of one key head, a warp 16 or 32 of them, and goes over the tiles
// of keys that one of its rows sees, or over those of its part of the keys:
//
//   S = Q K^T                        Q and K from shared memory, S in registers
//   m' = max(m, row maxima of S), P = exp2((S - m') factor), l = l exp2((m - m') factor) + row sums of P
//   O = O exp2((m - m') factor) + P V     P from the registers of S, V from shared memory, O in registers
//
// Keys and values of the next tile are on their way (cp.async, two stages of each) while this one is worked on; a stage
// is free for the tile after next when all warps have met at the barrier that follows its use. Where keys are in parts,
// O, m and l of each part go to memory, and Combine (attention_rows.h) joins them.
//
// Cost of a score: D + Dv multiply-adds on tensor cores; an addition, a product, one ex2, and some four other operations on
// the others; 16 bits of 2 (D + Dv) / (16 or 32) elements from shared memory. H200: 16-bit products of mma.sync run at
// some 600 of 989 TFLOP/s, and 32 rows a warp keep shared memory (128 bytes a cycle) below half of that. The budgets of
// registers and shared memory are in attention_shapes.h.
#pragma once

#include "attention_rows.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class M, class Shape, bool kAny>
struct Forward {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * kWarp, kRowTiles = Shape::kRowTiles;
  static constexpr int kColumnWarps = Shape::kColumnWarps;  // that share rows, and divide the features of O
  static constexpr int kRows = kWarps / kColumnWarps * kRowTiles * 16, kKeys = Shape::kKeys;
  static constexpr int kKeyTiles = kKeys / 8, kFeatureTiles = Shape::kFeatures / 8 / kColumnWarps;
  using Rows = RowTile<kRows>;
  using FeatureTile = Tile<E, Shape::kFeatures>;
  static constexpr int kSharedBytes = FeatureTile::bytes(kRows) + 4 * FeatureTile::bytes(kKeys);

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const Rows rows = Rows::of_block(call);
    if (rows.count <= 0) return;
    const Sequence& s = rows.s;
    const int features = int(a.head_size), value_features = int(a.value_size);
    E* const shared = reinterpret_cast<E*>(shared_memory());
    constexpr int kOfTile = FeatureTile::bytes(kKeys) / int(sizeof(E));
    const FeatureTile queries{shared};
    E* const stages = shared + FeatureTile::bytes(kRows) / int(sizeof(E));
    const auto keys_of = [&](int tile) { return FeatureTile{stages + tile % 2 * kOfTile}; };
    const auto values_of = [&](int tile) { return FeatureTile{stages + (2 + tile % 2) * kOfTile}; };

    Range some = rows.some();
    const Range all = rows.all();
    if (call.parts > 1) {
      some = {larger(some.begin, rows.part * call.part_keys),
              smaller(some.end, (rows.part + 1) * call.part_keys)};
    }
    const int first_tile = some.begin / kKeys,
              end_tile = some.begin < some.end ? (some.end + kKeys - 1) / kKeys : first_tile;

    const auto fetch_keys = [&](int tile) {
      if (tile < end_tile) {
        load_keys<kThreads>(keys_of(tile), a.key, s, rows.kv_head, tile * kKeys, kKeys, features,
                            call.aligned_key);
      }
      copy_async_commit();
    };
    const auto fetch_values = [&](int tile) {
      if (tile < end_tile) {
        load_keys<kThreads>(values_of(tile), a.value, s, rows.kv_head, tile * kKeys, kKeys, value_features,
                            call.aligned_value);
      }
      copy_async_commit();
    };
    load_queries<kThreads>(queries, a.query, rows, features, call.aligned_query);
    fetch_keys(first_tile);
    fetch_values(first_tile);

    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int first_row = warp / kColumnWarps * kRowTiles * 16;
    const int first_column = warp % kColumnWarps * (Shape::kFeatures / kColumnWarps);
    const bool active = first_row < rows.count;
    const Scoring<T> scoring(call);
    const Band band(s);
    const Dropout<T> dropout(a);
    Query<T> query[2 * kRowTiles];
    T highest[2 * kRowTiles], sum[2 * kRowTiles];
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = first_row + lane / 4 + 8 * i;
      const int known = row < rows.count ? row : 0;  // of a row that is not there nothing is written
      query[i] = {rows.query(known), int(rows.head(known)), 0, 0, 0};
      const bool sink = a.sinks && (call.parts == 1 || rows.part == 0);
      highest[i] = sink ? static_cast<const T*>(a.sinks)[query[i].head] / scoring.unit : -T(INFINITY);
      sum[i] = highest[i] > -T(INFINITY) && lane % 4 == 0 ? T(1) : T(0);
    }
    const auto query_at = [&](int m, int, int e) -> const Query<T>& { return query[2 * m + e / 2]; };
    Sums<T> output[kRowTiles][kFeatureTiles];
    clear(output);

    for (int tile = first_tile; tile < end_tile; ++tile) {
      const Orient<true> orient{first_row, tile * kKeys};
      const bool edge = tile * kKeys < all.begin || (tile + 1) * kKeys > all.end;
      const bool masked = kAny && a.mask.kind != MaskKind::kNone;
      fetch_keys(tile + 1);
      bool works = active;
      if (masked && active) works = mask_shows_any<E, T, kRowTiles, kKeyTiles>(call, s, orient, query_at);
      copy_async_wait<2>();
      sync_block();
      Sums<T> x[kRowTiles][kKeyTiles];
      if (works) {
        multiply<M>(x, queries, first_row, keys_of(tile), features);
        score<kAny, E>(call, scoring, s, band, orient, query_at, edge, x);
        weigh(scoring, x, highest, sum,
              [&](int m, int half, T factor) { rescale_rows(output, m, half, factor); });
        if constexpr (kAny) {
          if (dropout.active) {
            const auto kept = dropout.template kept<kRowTiles, kKeyTiles>(a, s, orient, query_at);
            drop(kept, x);
          }
        }
      }
      fetch_values(tile + 1);
      copy_async_wait<2>();
      const bool special =
          any_in_block((edge || masked) && loaded_special<kThreads>(values_of(tile), kKeys, value_features));
      if (!works) continue;
      add_product<M>(special, output, x, values_of(tile), first_column, value_features);
    }
    copy_async_wait<0>();
    if (active) finish(call, rows, scoring, first_row, first_column, highest, sum, output);
  }

 private:
  static FS_DEVICE void finish(const Call& call, const Rows& rows, const Scoring<T>& scoring, int first_row,
                               int first_column, const T (&highest)[2 * kRowTiles],
                               const T (&sum)[2 * kRowTiles],
                               const Sums<T> (&output)[kRowTiles][kFeatureTiles]) {
    const AttentionArgs& a = call.a;
    const T kept_scale = T(1 / (1 - a.dropout_p));
    const int lane = thread_index() % kWarp;
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      T whole = sum[i] + shuffle_xor(sum[i], 1);
      whole += shuffle_xor(whole, 2);
      const int row_of_tile = first_row + lane / 4 + 8 * i;
      if (row_of_tile >= rows.count) continue;
      const int index = rows.query(row_of_tile);
      const int64_t head = rows.head(row_of_tile);
      const bool writes = lane % 4 == 0 && first_column == 0;
      if (call.parts > 1) {
        const int64_t row = int64_t(index) * call.group + head - rows.kv_head * call.group;
        const int64_t at = part_row(call, rows.s.index, rows.kv_head, rows.part, row);
        T* const to = static_cast<T*>(call.part_output) + at * a.value_size;
        FS_UNROLL
        for (int n = 0; n < kFeatureTiles; ++n) {
          const int column = first_column + 8 * n + 2 * (lane % 4);
          if (column < a.value_size) to[column] = output[i / 2][n][i % 2 * 2];
          if (column + 1 < a.value_size) to[column + 1] = output[i / 2][n][i % 2 * 2 + 1];
        }
        if (writes) {
          static_cast<T*>(call.part_highest)[at] = highest[i];
          static_cast<T*>(call.part_sum)[at] = whole;
        }
        continue;
      }
      const T inverse = whole == 0 ? T(0) : kept_scale / whole;
      const auto value = [&](int n, int e) { return output[i / 2][n][i % 2 * 2 + e] * inverse; };
      write_with_remainder<E, kFeatureTiles>(a.output, a.remainder, rows.s, head, index, first_column,
                                             int(a.value_size), call.pairs_of_output, value);
      if (writes) write_normalizer(call, scoring, rows.s, head, index, highest[i], whole);
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
