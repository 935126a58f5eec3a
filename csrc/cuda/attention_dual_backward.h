// Attention over dual numbers, backward: the tangents of the gradients. The gradients themselves are those of the backward
// pass, which makes them if they are wanted as well: of second derivatives they are known.
//
// A prime marks tangents, P and dS are as in attention_backward.h, S' as in attention_dual_forward.h, and mu, the tangent
// of lse, comes from the forward pass, as delta' does from DualDelta:
//
//   G = dO V^T             G' = dO' V^T + dO V'^T
//   P' = P (S' - mu)       dS' = P' (G - delta) + P (G' - delta')      with the slope of a soft cap: dX, dX'
//
//   DualGradQueries: a block owns rows and goes over keys              dQ' = dQ' + dX' K + dX K'
//   DualGradKeys: a block owns keys and goes over the rows that        dV' = dV' + P'^T dO + P^T dO'
//     see them; S and G and their tangents are made transposed         dK' = dK' + dX'^T Q + dX^T Q'
//
// As there, what is summed up over is the columns of what lies in registers, and nothing between the products goes through
// shared memory, where own and other tiles lie with their tangents, others in two stages. What has no tangent is left out;
// options are asked for while running.
//
// Cost of a score, D = Dv, if all has tangents: 8 D multiply-adds on tensor cores in DualGradQueries, 10 D in DualGradKeys,
// where warps that share rows each make the six of S', G' and their like; one ex2 and some 25 other operations in each.
// Registers and shared memory: attention_shapes.h.
#pragma once

#include "attention_backward.h"
#include "attention_dual_tiles.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class T>
struct DualQuery : Query<T> {
  T mu, delta_tangent;
};
static_assert(sizeof(DualQuery<float>) == dual_query_bytes(4) &&
              sizeof(DualQuery<double>) == dual_query_bytes(8));

template <class T>
FS_DEVICE DualQuery<T> dual_query_of(const DualCall& call, const Sequence& s, int64_t head, int index) {
  return {query_of<T>(call, s, head, index), *s.of_query<T>(call.tangents.lse, head, index),
          *s.of_query<T>(call.delta_tangent, head, index)};
}

// Products -> P, P', and of G and G' what is kept. What is hidden has none of them, whatever else is NaN.
template <class E, class T, int kRowTiles, int kColumnTiles, class O, class Queries>
FS_DEVICE void dual_grad_scores(const DualCall& call, const Scoring<T>& scoring, const Dropout<T>& dropout,
                                const Sequence& s, const Band& band, const O& orient, const Queries& queries,
                                bool edge, Sums<T> (&x)[kRowTiles][kColumnTiles],
                                Sums<T> (&change)[kRowTiles][kColumnTiles],
                                Sums<T> (&grad)[kRowTiles][kColumnTiles],
                                Sums<T> (&grad_change)[kRowTiles][kColumnTiles], Kept<kRowTiles>& kept) {
  if (scoring.cap != 0) multiply_by_slope_of_cap(scoring, x, change);
  score<true, E>(call, scoring, s, band, orient, queries, edge, x);
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) { change[m][n][e] *= scoring.scale; });
  if (call.tangents.mask.data) {
    for_mask<E, T, kRowTiles, kColumnTiles>(
        call.tangents.mask, call.pairs_of_mask_tangent, s, orient, queries,
        [&](int m, int n, int e, T of_mask) { change[m][n][e] += of_mask; });
  }
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
    const DualQuery<T>& q = queries(m, n, e);
    const T weight = weight_of(x[m][n][e], q.highest, scoring.factor);
    x[m][n][e] = weight == 0 ? T(0) : weight * q.inverse_sum;
    change[m][n][e] = weight == 0 ? T(0) : x[m][n][e] * (change[m][n][e] - q.mu);
  });
  if (!dropout.active) return;
  kept = dropout.template kept<kRowTiles, kColumnTiles>(call.a, s, orient, queries);
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
    grad[m][n][e] = kept(m, n, e) ? grad[m][n][e] * dropout.kept_scale : T(0);
    grad_change[m][n][e] = kept(m, n, e) ? grad_change[m][n][e] * dropout.kept_scale : T(0);
  });
}
// G, G' -> dS, dS'.
template <class T, int kRowTiles, int kColumnTiles, class Queries>
FS_DEVICE void finish_dual_grad_scores(const Queries& queries, const Sums<T> (&x)[kRowTiles][kColumnTiles],
                                       const Sums<T> (&change)[kRowTiles][kColumnTiles],
                                       Sums<T> (&grad)[kRowTiles][kColumnTiles],
                                       Sums<T> (&grad_change)[kRowTiles][kColumnTiles]) {
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
    const DualQuery<T>& q = queries(m, n, e);
    const T weight = x[m][n][e], rest = grad[m][n][e] - q.delta,
            rest_change = grad_change[m][n][e] - q.delta_tangent;
    grad[m][n][e] = weight == 0 ? T(0) : weight * rest;
    grad_change[m][n][e] = weight == 0 ? T(0) : fma(change[m][n][e], rest, weight * rest_change);
  });
}
// dS, dS' -> dX, dX' of products under a soft cap, and of their tangents.
template <class T, int kRowTiles, int kColumnTiles>
FS_DEVICE void multiply_by_dual_slope_of_cap(const Scoring<T>& scoring,
                                             const Sums<T> (&products)[kRowTiles][kColumnTiles],
                                             const Sums<T> (&changes)[kRowTiles][kColumnTiles],
                                             Sums<T> (&grads)[kRowTiles][kColumnTiles],
                                             Sums<T> (&grad_changes)[kRowTiles][kColumnTiles]) {
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
    T &grad = grads[m][n][e], &grad_change = grad_changes[m][n][e];
    if (grad == 0 && grad_change == 0) return;  // as what is hidden, whatever its product is
    const T t = tanh(products[m][n][e] * scoring.cap_scale), slope = fma(-t, t, T(1));
    const T bend = T(-2) * t * slope * (changes[m][n][e] * scoring.cap_scale);
    grad_change = fma(bend, grad, slope * grad_change);
    grad *= slope;
  });
}

// delta' of each query, beside delta: see Delta in attention_rows.h.
template <class M, int kFeatures>
struct DualDelta {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = DualCall;
  using OfRow = DeltaRow<M, kFeatures>;
  static constexpr int kThreads = OfRow::kThreads, kRows = OfRow::kRows;

  static FS_DEVICE void run(const DualCall& call) {
    const AttentionArgs& a = call.a;
    const AttentionTangents& tangents = call.tangents;
    const OfRow row(call);
    const T sum = row.dot(a.grad_output, a.output, a.remainder, call.aligned_deltas);
    T change = row.dot(a.grad_output, tangents.output, tangents.remainder, call.aligned_delta_tangents);
    if (tangents.grad_output.data)
      change += row.dot(tangents.grad_output, a.output, a.remainder, call.aligned_delta_tangents);
    row.write(call.delta, sum, a.grad_lse);
    row.write(call.delta_tangent, change, tangents.grad_lse);
  }
};

// ---- gradients of queries ----

template <class M, class Shape>
struct DualGradQueries {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = DualCall;
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * kWarp, kRowTiles = Shape::kRowTiles;
  static constexpr int kColumnWarps = Shape::kColumnWarps;
  static constexpr int kRows = kWarps / kColumnWarps * kRowTiles * 16, kKeys = Shape::kKeys;
  static constexpr int kKeyTiles = kKeys / 8, kFeatureTiles = Shape::kFeatures / 8 / kColumnWarps;
  using Rows = RowTile<kRows>;
  using FeatureTile = Tile<E, Shape::kFeatures>;
  using Dual = DualTile<E, Shape::kFeatures>;
  using Scores = Sums<T>[kRowTiles][kKeyTiles];
  static constexpr int kSharedBytes = 4 * FeatureTile::bytes(kRows) + 8 * FeatureTile::bytes(kKeys);

  static FS_DEVICE void run(const DualCall& call) {
    const AttentionArgs& a = call.a;
    const AttentionTangents& tangents = call.tangents;
    const Rows rows = Rows::of_block(call);
    if (rows.count <= 0) return;
    const Range some = rows.some(), all = rows.all();
    const int first_tile = some.begin / kKeys,
              end_tile = some.begin < some.end ? (some.end + kKeys - 1) / kKeys : first_tile;
    const bool few_keys = some.end - some.begin <= kFewKeys && end_tile - first_tile <= 1;
    if (!few_keys && !tangents.grad_query.data) return;  // there is no delta to make, see sum_few()
    const Sequence& s = rows.s;
    const int features = int(a.head_size), value_features = int(a.value_size);
    E* const shared = reinterpret_cast<E*>(shared_memory());
    constexpr int kOfRows = FeatureTile::bytes(kRows) / int(sizeof(E)),
                  kOfKeys = FeatureTile::bytes(kKeys) / int(sizeof(E));
    E* const stages = shared + 4 * kOfRows;
    const auto own = [&](int i) { return FeatureTile{shared + i * kOfRows}; };
    const auto stage = [&](int i, int tile) { return FeatureTile{stages + (2 * i + tile % 2) * kOfKeys}; };
    const Dual queries{own(0), own(1), tangents.query.data != nullptr};
    const Dual grads{own(2), own(3), tangents.grad_output.data != nullptr};
    const auto keys_of = [&](int tile) {
      return Dual{stage(0, tile), stage(1, tile), tangents.key.data != nullptr};
    };
    const auto values_of = [&](int tile) {
      return Dual{stage(2, tile), stage(3, tile), tangents.value.data != nullptr};
    };
    const auto fetch = [&](int tile) {
      if (tile < end_tile) {
        load_dual_keys<kThreads>(keys_of(tile), call, s, rows.kv_head, tile * kKeys, kKeys);
        load_dual_values<kThreads>(values_of(tile), call, s, rows.kv_head, tile * kKeys, kKeys);
      }
      copy_async_commit();
    };
    load_dual_queries<kThreads>(queries, call, rows);
    load_dual_grads<kThreads>(grads, call, rows);
    fetch(first_tile);

    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int first_row = warp / kColumnWarps * kRowTiles * 16;
    const int first_column = warp % kColumnWarps * (Shape::kFeatures / kColumnWarps);
    const bool active = first_row < rows.count;
    const Scoring<T> scoring(call);
    const Band band(s);
    const Dropout<T> dropout(a);
    DualQuery<T> query[2 * kRowTiles];
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = first_row + lane / 4 + 8 * i,
                known = row < rows.count ? row : 0;  // nothing is written of others
      query[i] = dual_query_of<T>(call, s, rows.head(known), rows.query(known));
    }
    const auto query_at = [&](int m, int, int e) -> const DualQuery<T>& { return query[2 * m + e / 2]; };
    Sums<T> sums[kRowTiles][kFeatureTiles];
    clear(sums);

    for (int tile = first_tile; tile < end_tile; ++tile) {
      const Orient<true> orient{first_row, tile * kKeys};
      const bool edge = tile * kKeys < all.begin || (tile + 1) * kKeys > all.end;
      const bool masked = a.mask.kind != MaskKind::kNone;
      const Dual keys = keys_of(tile);
      copy_async_wait<0>();
      const bool special =
          any_in_block((edge || masked) && keys.template loaded_special<kThreads>(kKeys, features));
      fetch(tile + 1);
      if (!active || (masked && !mask_shows_any<E, T, kRowTiles, kKeyTiles>(call, s, orient, query_at)))
        continue;
      Scores x, change, grad, grad_change;
      Kept<kRowTiles> kept;
      multiply_dual<M>(x, change, queries, first_row, keys, features);
      multiply_dual<M>(grad, grad_change, grads, first_row, values_of(tile), value_features);
      dual_grad_scores<E>(call, scoring, dropout, s, band, orient, query_at, edge, x, change, grad,
                          grad_change, kept);
      if (few_keys) sum_few(call, rows, first_row, x, change, grad, grad_change, query);
      finish_dual_grad_scores(query_at, x, change, grad, grad_change);
      if (scoring.cap != 0) {
        multiply_dual<M>(x, change, queries, first_row, keys, features);
        multiply_by_dual_slope_of_cap(scoring, x, change, grad, grad_change);
      }
      add_tangent_of_product<M>(special, sums, grad, grad_change, keys, first_column, features);
    }
    copy_async_wait<0>();
    if (!active || !tangents.grad_query.data) return;
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = first_row + lane / 4 + 8 * i;
      if (row >= rows.count) continue;
      write_row<E, kFeatureTiles>(
          s.query_row<E>(tangents.grad_query, rows.head(row), rows.query(row)), first_column, features,
          call.pairs_of_grad_query_tangent,
          [&](int n, int e) { return sums[i / 2][n][i % 2 * 2 + e] * scoring.scale; });
    }
  }

 private:
  // delta and delta' of the rows, all of whose keys are in this tile, here and where DualGradKeys reads them.
  static FS_DEVICE void sum_few(const DualCall& call, const Rows& rows, int first_row, const Scores& x,
                                const Scores& change, const Scores& grad, const Scores& grad_change,
                                DualQuery<T> (&query)[2 * kRowTiles]) {
    const Sequence& s = rows.s;
    const int lane = thread_index() % kWarp;
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      T sum = 0, sum_change = 0;
      FS_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        FS_UNROLL
        for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
          const T weight = x[i / 2][n][e], of_grad = grad[i / 2][n][e];
          if (weight == 0) continue;
          sum = fma(weight, of_grad, sum);
          sum_change = fma(change[i / 2][n][e], of_grad, fma(weight, grad_change[i / 2][n][e], sum_change));
        }
      }
      FS_UNROLL
      for (int mask = 1; mask <= 2; mask *= 2)
        sum += shuffle_xor(sum, mask), sum_change += shuffle_xor(sum_change, mask);
      if (first_row + lane / 4 + 8 * i >= rows.count) continue;
      DualQuery<T>& q = query[i];
      const auto less = [&](T sum, const HeadRows& of_lse) {
        return of_lse.data ? sum - *s.of_query<const T>(of_lse, q.head, q.index) : sum;
      };
      q.delta = less(sum, call.a.grad_lse), q.delta_tangent = less(sum_change, call.tangents.grad_lse);
      if (lane % 4 == 0 && thread_index() / kWarp % kColumnWarps == 0) {
        *s.of_query<T>(call.delta, q.head, q.index) = q.delta;
        *s.of_query<T>(call.delta_tangent, q.head, q.index) = q.delta_tangent;
      }
    }
  }
};

// ---- gradients of keys and values ----

template <class M, class Shape>
struct DualGradKeys {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = DualCall;
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * kWarp, kRowTiles = Shape::kRowTiles;
  static constexpr int kColumnWarps = Shape::kColumnWarps;
  static constexpr int kKeys = kWarps / kColumnWarps * kRowTiles * 16, kQueries = Shape::kKeys;
  static constexpr int kQueryTiles = kQueries / 8, kFeatureTiles = Shape::kFeatures / 8 / kColumnWarps;
  using FeatureTile = Tile<E, Shape::kFeatures>;
  using Dual = DualTile<E, Shape::kFeatures>;
  using Scores = Sums<T>[kRowTiles][kQueryTiles];
  static constexpr int kQueryBytes = int(sizeof(DualQuery<T>)) * kQueries;
  static constexpr int kSharedBytes =
      4 * FeatureTile::bytes(kKeys) + 8 * FeatureTile::bytes(kQueries) + 2 * kQueryBytes;
  static_assert(kQueries <= kThreads);

  static FS_DEVICE void run(const DualCall& call) {
    const AttentionArgs& a = call.a;
    const AttentionTangents& tangents = call.tangents;
    const KeyTile<kKeys> own = KeyTile<kKeys>::of_block(call);
    if (own.count <= 0) return;
    const Sequence& s = own.s;
    const int features = int(a.head_size), value_features = int(a.value_size);
    E* const shared = reinterpret_cast<E*>(shared_memory());
    constexpr int kOfKeys = FeatureTile::bytes(kKeys) / int(sizeof(E)),
                  kOfQueries = FeatureTile::bytes(kQueries) / int(sizeof(E));
    E* const stages = shared + 4 * kOfKeys;
    const auto of_block = [&](int i) { return FeatureTile{shared + i * kOfKeys}; };
    const auto stage = [&](int i, int tile) { return FeatureTile{stages + (2 * i + tile % 2) * kOfQueries}; };
    const Dual keys{of_block(0), of_block(1), tangents.key.data != nullptr};
    const Dual values{of_block(2), of_block(3), tangents.value.data != nullptr};
    const auto queries_of = [&](int tile) {
      return Dual{stage(0, tile), stage(1, tile), tangents.query.data != nullptr};
    };
    const auto grads_of = [&](int tile) {
      return Dual{stage(2, tile), stage(3, tile), tangents.grad_output.data != nullptr};
    };
    unsigned char* const states = reinterpret_cast<unsigned char*>(stages + 8 * kOfQueries);
    const auto states_of = [&](int tile) {
      return reinterpret_cast<DualQuery<T>*>(states + tile % 2 * kQueryBytes);
    };
    const int tiles = own.template tiles<kQueries>();
    const auto fetch = [&](int tile) {
      if (tile < tiles) {
        const RowTile<kQueries> rows = own.template rows<kQueries>(call, tile);
        load_dual_queries<kThreads>(queries_of(tile), call, rows);
        load_dual_grads<kThreads>(grads_of(tile), call, rows);
        if (const int i = thread_index(); i < kQueries) {
          const int known = i < rows.count ? i : 0;
          DualQuery<T> q = dual_query_of<T>(call, s, rows.head(known), rows.query(known));
          if (i >= rows.count) q.index = kFar;
          states_of(tile)[i] = q;
        }
      }
      copy_async_commit();
    };
    load_dual_keys<kThreads>(keys, call, s, own.kv_head, own.first, kKeys);
    load_dual_values<kThreads>(values, call, s, own.kv_head, own.first, kKeys);
    fetch(0);

    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int warp_key = warp / kColumnWarps * kRowTiles * 16;
    const int first_column = warp % kColumnWarps * (Shape::kFeatures / kColumnWarps);
    const bool active = own.first + warp_key < s.keys;
    const Scoring<T> scoring(call);
    const Band band(s);
    const Dropout<T> dropout(a);
    Sums<T> grad_key[kRowTiles][kFeatureTiles], grad_value[kRowTiles][kFeatureTiles];
    clear(grad_key), clear(grad_value);

    for (int tile = 0; tile < tiles; ++tile) {
      const RowTile<kQueries> rows = own.template rows<kQueries>(call, tile);
      const Range all = rows.all();
      const Orient<false> orient{0, own.first + warp_key};
      const bool edge = own.first < all.begin || own.first + kKeys > all.end || rows.count < kQueries;
      const bool masked = a.mask.kind != MaskKind::kNone;
      const Dual queries = queries_of(tile), grads = grads_of(tile);
      copy_async_wait<0>();
      const bool special = any_in_block((edge || masked) &&
                                        (queries.template loaded_special<kThreads>(kQueries, features) ||
                                         grads.template loaded_special<kThreads>(kQueries, value_features)));
      fetch(tile + 1);
      const DualQuery<T>* const state = states_of(tile);
      const auto query_at = [&](int, int n, int e) -> const DualQuery<T>& {
        return state[Orient<false>::of_column(n, e)];
      };
      if (!active || (masked && !mask_shows_any<E, T, kRowTiles, kQueryTiles>(call, s, orient, query_at)))
        continue;
      Scores x, change, grad, grad_change;
      Kept<kRowTiles> kept;
      multiply_dual<M>(x, change, keys, warp_key, queries, features);
      multiply_dual<M>(grad, grad_change, values, warp_key, grads, value_features);
      dual_grad_scores<E>(call, scoring, dropout, s, band, orient, query_at, edge, x, change, grad,
                          grad_change, kept);
      finish_dual_grad_scores(query_at, x, change, grad, grad_change);
      if (dropout.active) drop(kept, x), drop(kept, change);
      add_tangent_of_product<M>(special, grad_value, x, change, grads, first_column, value_features);
      if (scoring.cap != 0) {
        multiply_dual<M>(x, change, keys, warp_key, queries, features);
        multiply_by_dual_slope_of_cap(scoring, x, change, grad, grad_change);
      }
      add_tangent_of_product<M>(special, grad_key, grad, grad_change, queries, first_column, features);
    }
    copy_async_wait<0>();
    const auto write = [&](const HeadTensor& to, const Sums<T>(&sums)[kRowTiles][kFeatureTiles], int count,
                           T factor, bool pairs) {
      if (!to.data) return;
      FS_UNROLL
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int key = warp_key + lane / 4 + 8 * i;
        if (key >= own.count) continue;
        write_row<E, kFeatureTiles>(s.key_row<E>(to, own.kv_head, own.first + key), first_column, count,
                                    pairs,
                                    [&](int n, int e) { return sums[i / 2][n][i % 2 * 2 + e] * factor; });
      }
    };
    write(tangents.grad_key, grad_key, features, scoring.scale, call.pairs_of_grad_key_tangent);
    write(tangents.grad_value, grad_value, value_features, dropout.kept_scale,
          call.pairs_of_grad_value_tangent);
  }
};

// The tangent of the gradient of a head's sink: see GradSinks.
template <class M>
struct DualGradSinks {
  using T = typename M::Sum;
  using Args = DualCall;
  static constexpr int kThreads = kWarp;

  static FS_DEVICE void run(const DualCall& call) {
    const AttentionArgs& a = call.a;
    const AttentionTangents& tangents = call.tangents;
    const Sequence s(a, int(block_index() / a.heads));
    const int64_t head = block_index() % a.heads;
    const Scoring<T> scoring(call);
    const T sink = static_cast<const T*>(a.sinks)[head] / scoring.unit;
    const T of_sink = tangents.sinks ? static_cast<const T*>(tangents.sinks)[head] : T(0);
    T sum = 0;
    for (int i = thread_index(); i < s.queries; i += kWarp) {
      const DualQuery<T> q = dual_query_of<T>(call, s, head, i);
      const T weight = weight_of(sink, q.highest, scoring.factor) * q.inverse_sum;
      if (weight != 0) sum = fma(-weight, fma(of_sink - q.mu, q.delta, q.delta_tangent), sum);
    }
    sum = sum_of_lanes(sum);
    if (thread_index() == 0) static_cast<T*>(tangents.grad_sinks)[s.index * a.heads + head] = sum;
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
