// Attention over dual numbers, forward: the tangents stream beside the primal, in one pass over the keys.
//
// A block owns a tile of rows and goes over tiles of keys, as in attention_forward.h; a prime marks tangents:
//
//   S = Q K^T          S' = scale slope (Q' K^T + Q K'^T) + mask'      slope: of a soft cap
//   P = exp2((S - m) factor), and l, its row sums, as there
//   D = P (S' - c)     L = L exp2((m_before - m) factor) + row sums of D
//   O = O exp2((m_before - m) factor) + P V          O' likewise, + D V + P V'
//
// c is a constant of the row, the mean of S' over the first tile in which it sees anything: what is summed up stays
// small, and D is rounded to the dtype of V as P is. At the end mu = c + L / l is the tangent of lse, and
// O' / l - (L / l) O / l that of the output. Sinks are one more score, without a value.
//
// In shared memory are Q and Q' of the rows, K, K', V and V' of two tiles of keys, each half on its way (cp.async) while
// the other is worked on; in registers S and S', which become P and D, O and O'. A fragment of Q, K, V or P is read, or
// made, once for all products that it is in. What has no tangent is neither loaded nor multiplied, options are asked for
// while running: an arithmetic has one kernel for each size of heads. Keys are not cut into parts.
//
// Cost of a score: 3 (D + Dv) multiply-adds on tensor cores, three times those of the primal; one ex2 and some 12 other
// operations. From shared memory 2 (D + Dv) / 16 elements of keys and values, and 2 D of rows for each tile of keys. Budgets
// of registers and shared memory are in attention_shapes.h.
#pragma once

#include "attention_dual_tiles.h"
#include "attention_rows.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class M, class Shape>
struct DualForward {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = DualCall;
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * kWarp, kRowTiles = Shape::kRowTiles;
  static constexpr int kColumnWarps = Shape::kColumnWarps;  // that share rows, and divide the features of O
  static constexpr int kRows = kWarps / kColumnWarps * kRowTiles * 16, kKeys = Shape::kKeys;
  static constexpr int kKeyTiles = kKeys / 8, kFeatureTiles = Shape::kFeatures / 8 / kColumnWarps;
  using Rows = RowTile<kRows>;
  using FeatureTile = Tile<E, Shape::kFeatures>;
  using Dual = DualTile<E, Shape::kFeatures>;
  static constexpr int kSharedBytes = 2 * FeatureTile::bytes(kRows) + 8 * FeatureTile::bytes(kKeys);

  static FS_DEVICE void run(const DualCall& call) {
    const AttentionArgs& a = call.a;
    const AttentionTangents& tangents = call.tangents;
    const Rows rows = Rows::of_block(call);
    if (rows.count <= 0) return;
    const Sequence& s = rows.s;
    const int features = int(a.head_size), value_features = int(a.value_size);
    E* const shared = reinterpret_cast<E*>(shared_memory());
    constexpr int kOfRows = FeatureTile::bytes(kRows) / int(sizeof(E)),
                  kOfKeys = FeatureTile::bytes(kKeys) / int(sizeof(E));
    E* const stages = shared + 2 * kOfRows;
    const auto stage = [&](int i, int tile) { return FeatureTile{stages + (2 * i + tile % 2) * kOfKeys}; };
    const Dual queries{{shared}, {shared + kOfRows}, tangents.query.data != nullptr};
    const auto keys_of = [&](int tile) {
      return Dual{stage(0, tile), stage(1, tile), tangents.key.data != nullptr};
    };
    const auto values_of = [&](int tile) {
      return Dual{stage(2, tile), stage(3, tile), tangents.value.data != nullptr};
    };

    const Range some = rows.some(), all = rows.all();
    const int first_tile = some.begin / kKeys,
              end_tile = some.begin < some.end ? (some.end + kKeys - 1) / kKeys : first_tile;
    const auto fetch_keys = [&](int tile) {
      if (tile < end_tile)
        load_dual_keys<kThreads>(keys_of(tile), call, s, rows.kv_head, tile * kKeys, kKeys);
      copy_async_commit();
    };
    const auto fetch_values = [&](int tile) {
      if (tile < end_tile)
        load_dual_values<kThreads>(values_of(tile), call, s, rows.kv_head, tile * kKeys, kKeys);
      copy_async_commit();
    };
    load_dual_queries<kThreads>(queries, call, rows);
    fetch_keys(first_tile);
    fetch_values(first_tile);

    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int first_row = warp / kColumnWarps * kRowTiles * 16;
    const int first_column = warp % kColumnWarps * (Shape::kFeatures / kColumnWarps);
    const bool active = first_row < rows.count;
    const Scoring<T> scoring(call);
    const Band band(s);
    const Dropout<T> dropout(a);
    State state = {};
    Query<T> query[2 * kRowTiles];
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = first_row + lane / 4 + 8 * i;
      const int known = row < rows.count ? row : 0;  // of a row that is not there nothing is written
      query[i] = {rows.query(known), int(rows.head(known)), 0, 0, 0};
      state.highest[i] = sink_of(a, scoring, query[i].head);
      state.sum[i] = state.highest[i] > -T(INFINITY) && lane % 4 == 0 ? T(1) : T(0);
    }
    const auto query_at = [&](int m, int, int e) -> const Query<T>& { return query[2 * m + e / 2]; };
    const bool moves_products = tangents.query.data || tangents.key.data;
    const bool moves_scores = moves_products || tangents.mask.data;
    Sums<T> output[kRowTiles][kFeatureTiles], output_tangent[kRowTiles][kFeatureTiles];
    clear(output), clear(output_tangent);

    for (int tile = first_tile; tile < end_tile; ++tile) {
      const Orient<true> orient{first_row, tile * kKeys};
      const bool edge = tile * kKeys < all.begin || (tile + 1) * kKeys > all.end;
      const bool masked = a.mask.kind != MaskKind::kNone;
      fetch_keys(tile + 1);
      bool works = active;
      if (masked && active) works = mask_shows_any<E, T, kRowTiles, kKeyTiles>(call, s, orient, query_at);
      copy_async_wait<2>();
      sync_block();
      Sums<T> x[kRowTiles][kKeyTiles], change[kRowTiles][kKeyTiles];
      if (works) {
        multiply_dual<M>(x, change, queries, first_row, keys_of(tile), features);
        if (moves_products && scoring.cap != 0) multiply_by_slope_of_cap(scoring, x, change);
        score<true, E>(call, scoring, s, band, orient, query_at, edge, x);
        weigh(scoring, x, state.highest, state.sum, [&](int m, int half, T factor) {
          state.change[2 * m + half] *= factor;
          rescale_rows(output, m, half, factor), rescale_rows(output_tangent, m, half, factor);
        });
        if (moves_scores) {
          if (moves_products)
            for_elements<kRowTiles, kKeyTiles>(
                [&](int m, int n, int e) { change[m][n][e] *= scoring.scale; });
          if (tangents.mask.data) {
            for_mask<E, T, kRowTiles, kKeyTiles>(
                tangents.mask, call.pairs_of_mask_tangent, s, orient, query_at,
                [&](int m, int n, int e, T of_mask) { change[m][n][e] += of_mask; });
          }
          weigh_changes(x, change, state);
        }
        if (dropout.active) {
          const auto kept = dropout.template kept<kRowTiles, kKeyTiles>(a, s, orient, query_at);
          drop(kept, x), drop(kept, change);
        }
      }
      fetch_values(tile + 1);
      copy_async_wait<2>();
      const Dual values = values_of(tile);
      const bool special =
          any_in_block((edge || masked) && values.template loaded_special<kThreads>(kKeys, value_features));
      if (!works) continue;
      add_dual_product<M>(special, output, output_tangent, x, change, moves_scores, values, first_column,
                          value_features);
    }
    copy_async_wait<0>();
    if (active) finish(call, rows, scoring, first_row, first_column, state, output, output_tangent);
  }

 private:
  // Of a lane's rows: m; its part of l and of L; c.
  struct State {
    T highest[2 * kRowTiles], sum[2 * kRowTiles], change[2 * kRowTiles], center[2 * kRowTiles];
    uint32_t centered;  // a bit for each row that has a c
  };

  // In units of scores; -inf if there is none.
  static FS_DEVICE T sink_of(const AttentionArgs& a, const Scoring<T>& scoring, int64_t head) {
    return a.sinks ? static_cast<const T*>(a.sinks)[head] / scoring.unit : -T(INFINITY);
  }

  // Tangents of scores -> D. What is hidden may have any tangent.
  static FS_DEVICE void weigh_changes(const Sums<T> (&x)[kRowTiles][kKeyTiles],
                                      Sums<T> (&change)[kRowTiles][kKeyTiles], State& state) {
    constexpr uint32_t kAll = (1u << 2 * kRowTiles) - 1;
    if (any_in_warp(state.centered != kAll)) center(x, change, state);
    for_elements<kRowTiles, kKeyTiles>([&](int m, int n, int e) {
      const int i = 2 * m + e / 2;
      const T weight = x[m][n][e];
      change[m][n][e] = weight == 0 ? T(0) : weight * (change[m][n][e] - state.center[i]);
      state.change[i] += change[m][n][e];
    });
  }
  static FS_DEVICE void center(const Sums<T> (&x)[kRowTiles][kKeyTiles],
                               const Sums<T> (&change)[kRowTiles][kKeyTiles], State& state) {
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      T sum = 0, weighted = 0;
      FS_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        FS_UNROLL
        for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
          const T weight = x[i / 2][n][e];
          sum += weight;
          if (weight != 0) weighted = fma(weight, change[i / 2][n][e], weighted);
        }
      }
      FS_UNROLL
      for (int mask = 1; mask <= 2; mask *= 2)
        sum += shuffle_xor(sum, mask), weighted += shuffle_xor(weighted, mask);
      if (state.centered >> i & 1 || !(sum > 0)) continue;
      const T mean = weighted / sum;
      state.center[i] = is_finite(mean) ? mean : T(0);
      state.centered |= 1u << i;
    }
  }

  // What a sink adds to L.
  static FS_DEVICE T change_of_sink(const DualCall& call, const Scoring<T>& scoring, int64_t head, T highest,
                                    T center) {
    const T sink = sink_of(call.a, scoring, head), weight = weight_of(sink, highest, scoring.factor);
    if (!is_finite(sink) || !(weight != 0)) return T(0);
    const void* const tangent = call.tangents.sinks;
    return weight * ((tangent ? static_cast<const T*>(tangent)[head] : T(0)) - center);
  }

  static FS_DEVICE void finish(const DualCall& call, const Rows& rows, const Scoring<T>& scoring,
                               int first_row, int first_column, const State& state,
                               const Sums<T> (&output)[kRowTiles][kFeatureTiles],
                               const Sums<T> (&output_tangent)[kRowTiles][kFeatureTiles]) {
    const AttentionArgs& a = call.a;
    const AttentionTangents& tangents = call.tangents;
    const T kept_scale = T(1 / (1 - a.dropout_p));
    const int lane = thread_index() % kWarp, value_features = int(a.value_size);
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      T whole = state.sum[i], change = state.change[i];
      FS_UNROLL
      for (int mask = 1; mask <= 2; mask *= 2)
        whole += shuffle_xor(whole, mask), change += shuffle_xor(change, mask);
      const int row = first_row + lane / 4 + 8 * i;
      if (row >= rows.count) continue;
      const int index = rows.query(row);
      const int64_t head = rows.head(row);
      const bool nothing = whole == 0;
      if (a.sinks) change += change_of_sink(call, scoring, head, state.highest[i], state.center[i]);
      if (!nothing) change /= whole;
      const T inverse = nothing ? T(0) : kept_scale / whole;
      const auto value = [&](int n, int e) { return output[i / 2][n][i % 2 * 2 + e] * inverse; };
      write_with_remainder<E, kFeatureTiles>(a.output, a.remainder, rows.s, head, index, first_column,
                                             value_features, call.pairs_of_output, value);
      write_with_remainder<E, kFeatureTiles>(
          tangents.output, tangents.remainder, rows.s, head, index, first_column, value_features,
          call.pairs_of_output_tangent, [&](int n, int e) {
            return fma(-change, value(n, e), output_tangent[i / 2][n][i % 2 * 2 + e] * inverse);
          });
      if (lane % 4 != 0 || first_column != 0) continue;
      write_normalizer(call, scoring, rows.s, head, index, state.highest[i], whole);
      *rows.s.template of_query<T>(tangents.lse, head, index) = nothing ? T(0) : state.center[i] + change;
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
