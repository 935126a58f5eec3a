// Attention, backward, the general kernels: deterministic, with gradients of queries, and of keys and values, in passes
// of their own. From what the forward pass divided each row by:
//
//   S = Q K^T, P = exp2((S - highest) factor) inverse_sum           as in the forward pass
//   dP = dO V^T, dS = P (dP - delta)                                delta: see Delta in attention_rows.h
//
//   GradQueries: a block owns rows and goes over keys               dQ = dQ + dS K
//   GradKeys: a block owns keys and goes over the rows that see     dV = dV + P^T dO, dK = dK + dS^T Q
//     them; S and dP are made transposed, S^T = K Q^T, dP^T = V dO^T
//
// In both, what is summed up over is the columns of S and dP in registers, which feed the next product from there:
// nothing between the products goes through shared memory. Seven products instead of the five that a single pass needs;
// GradKeys can also be that pass, see add_to_queries(), for who does not need the same bits every time. A tile of what a block goes over is on its way (cp.async, two
// stages) while the other is worked on; one barrier a tile.
//
// Cost of a score in GradQueries: 2 D + Dv multiply-adds on tensor cores, in GradKeys 2 D + 2 Dv; one ex2 and some ten other operations in each. Registers and shared memory: attention_shapes.h.
#pragma once

#include "attention_rows.h"

namespace fastseq::FASTSEQ_ISA::attention {

// Scores -> weights; products of output gradients and values -> gradients of scores. Weights become dropped ones, which
// are not yet divided by what is kept, which `kept` tells under dropout. What is hidden has neither, whatever else is
// NaN.
template <bool kAny, class E, class T, int kRowTiles, int kColumnTiles, class O, class Queries>
FS_DEVICE void grad_scores(const Call& call, const Scoring<T>& scoring, const Dropout<T>& dropout,
                           const Sequence& s, const O& orient, const Queries& queries,
                           Sums<T> (&x)[kRowTiles][kColumnTiles], Sums<T> (&dx)[kRowTiles][kColumnTiles],
                           Kept<kRowTiles>& kept) {
  const AttentionArgs& a = call.a;
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
    const Query<T>& q = queries(m, n, e);
    const T weight = weight_of(x[m][n][e], q.highest, scoring.factor);
    x[m][n][e] = weight == 0 ? T(0) : weight * q.inverse_sum;
  });
  if constexpr (kAny) {
    if (a.grad_weights.data) {
      for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
        const Query<T>& q = queries(m, n, e);
        if (x[m][n][e] != 0)
          dx[m][n][e] += T(widen(s.query_row<const E>(a.grad_weights, q.head, q.index)[orient.key(m, n, e)]));
      });
    }
    if (dropout.active) {
      kept = dropout.template kept<kRowTiles, kColumnTiles>(a, s, orient, queries);
      for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
        dx[m][n][e] = kept(m, n, e) ? dx[m][n][e] * dropout.kept_scale : T(0);
      });
    }
  }
}
template <bool kAny, class T, int kRowTiles, int kColumnTiles, class Queries>
FS_DEVICE void finish_grad_scores(const Queries& queries, const Sums<T> (&x)[kRowTiles][kColumnTiles],
                                  Sums<T> (&dx)[kRowTiles][kColumnTiles]) {
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
    const T weight = x[m][n][e];
    dx[m][n][e] = weight == 0 ? T(0) : weight * (dx[m][n][e] - queries(m, n, e).delta);
  });
}

template <class T>
FS_DEVICE Query<T> query_of(const Call& call, const Sequence& s, int64_t head, int index) {
  const AttentionArgs& a = call.a;
  const T delta = *s.of_query<T>(call.delta, head, index);
  return {index, int(head), *s.of_query<T>(a.highest, head, index),
          *s.of_query<T>(a.inverse_sum, head, index), delta};
}

// ---- gradients of queries ----

template <class M, class Shape, bool kAny>
struct GradQueries {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * kWarp, kRowTiles = Shape::kRowTiles;
  static constexpr int kColumnWarps = Shape::kColumnWarps;
  static constexpr int kRows = kWarps / kColumnWarps * kRowTiles * 16, kKeys = Shape::kKeys;
  static constexpr int kKeyTiles = kKeys / 8, kFeatureTiles = Shape::kFeatures / 8 / kColumnWarps;
  using Rows = RowTile<kRows>;
  using FeatureTile = Tile<E, Shape::kFeatures>;
  static constexpr int kSharedBytes = 2 * FeatureTile::bytes(kRows) + 4 * FeatureTile::bytes(kKeys);

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const Rows rows = Rows::of_block(call);
    if (rows.count <= 0) return;
    const Range some = rows.some(), all = rows.all();
    const int first_tile = some.begin / kKeys,
              end_tile = some.begin < some.end ? (some.end + kKeys - 1) / kKeys : first_tile;
    const bool few_keys =
        some.end - some.begin <= kFewKeys && end_tile - first_tile <= 1 && !a.grad_weights.data;
    if (!few_keys && !a.grad_query.data) return;  // there is no delta to make, see sum_few()
    const Sequence& s = rows.s;
    const int features = int(a.head_size), value_features = int(a.value_size);
    E* const shared = reinterpret_cast<E*>(shared_memory());
    constexpr int kOfRows = FeatureTile::bytes(kRows) / int(sizeof(E)),
                  kOfKeys = FeatureTile::bytes(kKeys) / int(sizeof(E));
    const FeatureTile queries{shared}, grads{shared + kOfRows};
    const auto keys_of = [&](int tile) { return FeatureTile{shared + 2 * kOfRows + tile % 2 * kOfKeys}; };
    const auto values_of = [&](int tile) {
      return FeatureTile{shared + 2 * kOfRows + (2 + tile % 2) * kOfKeys};
    };
    const auto fetch = [&](int tile) {
      if (tile < end_tile) {
        load_keys<kThreads>(keys_of(tile), a.key, s, rows.kv_head, tile * kKeys, kKeys, features,
                            call.aligned_key);
        load_keys<kThreads>(values_of(tile), a.value, s, rows.kv_head, tile * kKeys, kKeys, value_features,
                            call.aligned_value);
      }
      copy_async_commit();
    };
    load_queries<kThreads>(queries, a.query, rows, features, call.aligned_query);
    load_queries<kThreads>(grads, a.grad_output, rows, value_features, call.aligned_grad_output);
    fetch(first_tile);

    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int first_row = warp / kColumnWarps * kRowTiles * 16;
    const int first_column = warp % kColumnWarps * (Shape::kFeatures / kColumnWarps);
    const bool active = first_row < rows.count;
    const Scoring<T> scoring(call);
    const Band band(s);
    const Dropout<T> dropout(a);
    Query<T> query[2 * kRowTiles];
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = first_row + lane / 4 + 8 * i,
                known = row < rows.count ? row : 0;  // nothing is written of others
      query[i] = query_of<T>(call, s, rows.head(known), rows.query(known));
    }
    const auto query_at = [&](int m, int, int e) -> const Query<T>& { return query[2 * m + e / 2]; };
    Sums<T> grad[kRowTiles][kFeatureTiles];
    clear(grad);

    for (int tile = first_tile; tile < end_tile; ++tile) {
      const Orient<true> orient{first_row, tile * kKeys};
      const bool edge = tile * kKeys < all.begin || (tile + 1) * kKeys > all.end;
      const bool masked = kAny && a.mask.kind != MaskKind::kNone;
      copy_async_wait<0>();
      const bool special =
          any_in_block((edge || masked) && loaded_special<kThreads>(keys_of(tile), kKeys, features));
      fetch(tile + 1);
      if (!active || (masked && !mask_shows_any<E, T, kRowTiles, kKeyTiles>(call, s, orient, query_at)))
        continue;
      Sums<T> x[kRowTiles][kKeyTiles], dx[kRowTiles][kKeyTiles];
      Kept<kRowTiles> kept;
      multiply<M>(x, queries, first_row, keys_of(tile), features);
      score<kAny, E>(call, scoring, s, band, orient, query_at, edge, x);
      multiply<M>(dx, grads, first_row, values_of(tile), value_features);
      grad_scores<kAny, E>(call, scoring, dropout, s, orient, query_at, x, dx, kept);
      if (few_keys) sum_few(call, rows, first_row, x, dx, query);
      finish_grad_scores<kAny>(query_at, x, dx);
      if (kAny && scoring.cap != 0) {
        multiply<M>(x, queries, first_row, keys_of(tile), features);
        multiply_by_slope_of_cap(scoring, x, dx);
      }
      add_product<M>(special, grad, dx, keys_of(tile), first_column, features);
    }
    copy_async_wait<0>();
    if (!active || !a.grad_query.data) return;
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = first_row + lane / 4 + 8 * i;
      if (row >= rows.count) continue;
      write_row<E, kFeatureTiles>(s.query_row<E>(a.grad_query, rows.head(row), rows.query(row)), first_column,
                                  features, call.pairs_of_grad_query, [&](int n, int e) {
                                    return grad[i / 2][n][i % 2 * 2 + e] * scoring.scale;
                                  });
    }
  }

 private:
  // delta of the rows, all of whose keys are in this tile, here and where GradKeys reads it.
  static FS_DEVICE void sum_few(const Call& call, const Rows& rows, int first_row,
                                const Sums<T> (&x)[kRowTiles][kKeyTiles],
                                const Sums<T> (&dx)[kRowTiles][kKeyTiles], Query<T> (&query)[2 * kRowTiles]) {
    const AttentionArgs& a = call.a;
    const Sequence& s = rows.s;
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      T sum = 0;
      FS_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        FS_UNROLL
        for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
          if (x[i / 2][n][e] != 0) sum = fma(x[i / 2][n][e], dx[i / 2][n][e], sum);
        }
      }
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int lane = thread_index() % kWarp;
      if (first_row + lane / 4 + 8 * i >= rows.count) continue;
      const Query<T>& q = query[i];
      if (a.grad_lse.data) sum -= *s.of_query<const T>(a.grad_lse, q.head, q.index);
      query[i].delta = sum;
      if (lane % 4 == 0 && thread_index() / kWarp % kColumnWarps == 0) {
        *s.of_query<T>(call.delta, q.head, q.index) = sum;
      }
    }
  }
};

// ---- gradients of keys and values ----

// With kOnePass also those of queries, which are added up in any order: see add_to_queries().
template <class M, class Shape, bool kAny, bool kOnePass = false>
struct GradKeys {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * kWarp, kRowTiles = Shape::kRowTiles;
  static constexpr int kColumnWarps = Shape::kColumnWarps;
  static constexpr int kKeys = kWarps / kColumnWarps * kRowTiles * 16, kQueries = Shape::kKeys;
  static constexpr int kQueryTiles = kQueries / 8, kFeatureTiles = Shape::kFeatures / 8 / kColumnWarps;
  using FeatureTile = Tile<E, Shape::kFeatures>;
  static constexpr int kQueryBytes = int(sizeof(Query<T>)) * kQueries;
  static constexpr int kScoreStride = kKeys + 4;  // of one query's gradients of scores, in the one-pass form
  static constexpr int kScoreBytes = kOnePass ? score_bytes(sizeof(E), kQueries, kKeys) : 0;
  static constexpr int kSharedBytes =
      2 * FeatureTile::bytes(kKeys) + 4 * FeatureTile::bytes(kQueries) + 2 * kQueryBytes + kScoreBytes;
  static_assert(kQueries <= kThreads);

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const KeyTile<kKeys> own = KeyTile<kKeys>::of_block(call);
    if (own.count <= 0) return;
    const Sequence& s = own.s;
    const int first_key = own.first;
    const int features = int(a.head_size), value_features = int(a.value_size);
    E* const shared = reinterpret_cast<E*>(shared_memory());
    constexpr int kOfKeys = FeatureTile::bytes(kKeys) / int(sizeof(E)),
                  kOfQueries = FeatureTile::bytes(kQueries) / int(sizeof(E));
    const FeatureTile keys{shared}, values{shared + kOfKeys};
    const auto queries_of = [&](int tile) {
      return FeatureTile{shared + 2 * kOfKeys + tile % 2 * kOfQueries};
    };
    const auto grads_of = [&](int tile) {
      return FeatureTile{shared + 2 * kOfKeys + (2 + tile % 2) * kOfQueries};
    };
    unsigned char* const states = reinterpret_cast<unsigned char*>(shared + 2 * kOfKeys + 4 * kOfQueries);
    T* const scores = reinterpret_cast<T*>(states + 2 * kQueryBytes);
    const auto states_of = [&](int tile) {
      return reinterpret_cast<Query<T>*>(states + tile % 2 * kQueryBytes);
    };
    const int tiles = own.template tiles<kQueries>();
    const auto rows_of = [&](int tile) { return own.template rows<kQueries>(call, tile); };
    const auto fetch = [&](int tile) {
      if (tile < tiles) {
        const RowTile<kQueries> rows = rows_of(tile);
        load_queries<kThreads>(queries_of(tile), a.query, rows, features, call.aligned_query);
        load_queries<kThreads>(grads_of(tile), a.grad_output, rows, value_features, call.aligned_grad_output);
        if (const int i = thread_index(); i < kQueries) {
          const int known = i < rows.count ? i : 0;
          Query<T> q = query_of<T>(call, s, rows.head(known), rows.query(known));
          if (i >= rows.count) q.index = kFar;
          states_of(tile)[i] = q;
        }
      }
      copy_async_commit();
    };
    load_keys<kThreads>(keys, a.key, s, own.kv_head, first_key, kKeys, features, call.aligned_key);
    load_keys<kThreads>(values, a.value, s, own.kv_head, first_key, kKeys, value_features,
                        call.aligned_value);
    fetch(0);

    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int warp_key = warp / kColumnWarps * kRowTiles * 16;
    const int first_column = warp % kColumnWarps * (Shape::kFeatures / kColumnWarps);
    const bool active = first_key + warp_key < s.keys;
    const Scoring<T> scoring(call);
    const Band band(s);
    const Dropout<T> dropout(a);
    Sums<T> grad_key[kRowTiles][kFeatureTiles], grad_value[kRowTiles][kFeatureTiles];
    clear(grad_key), clear(grad_value);
    bool special_keys = false;
    if constexpr (kOnePass) {
      copy_async_wait<0>();
      special_keys = any_in_block(loaded_special<kThreads>(keys, kKeys, features));
    }

    for (int tile = 0; tile < tiles; ++tile) {
      const RowTile<kQueries> rows = rows_of(tile);
      const Range all = rows.all();
      const Orient<false> orient{0, first_key + warp_key};
      const bool edge = first_key < all.begin || first_key + kKeys > all.end || rows.count < kQueries;
      const bool masked = kAny && a.mask.kind != MaskKind::kNone;
      copy_async_wait<0>();
      const bool special = any_in_block((edge || masked) &&
                                        (loaded_special<kThreads>(queries_of(tile), kQueries, features) ||
                                         loaded_special<kThreads>(grads_of(tile), kQueries, value_features)));
      fetch(tile + 1);
      const Query<T>* const state = states_of(tile);
      const auto query_at = [&](int, int n, int e) -> const Query<T>& {
        return state[Orient<false>::of_column(n, e)];
      };
      const bool works =
          active && !(masked && !mask_shows_any<E, T, kRowTiles, kQueryTiles>(call, s, orient, query_at));
      Sums<T> x[kRowTiles][kQueryTiles], dx[kRowTiles][kQueryTiles];
      Kept<kRowTiles> kept;
      if (works) {
        multiply<M>(x, keys, warp_key, queries_of(tile), features);
        score<kAny, E>(call, scoring, s, band, orient, query_at, edge, x);
        multiply<M>(dx, values, warp_key, grads_of(tile), value_features);
        grad_scores<kAny, E>(call, scoring, dropout, s, orient, query_at, x, dx, kept);
        finish_grad_scores<kAny>(query_at, x, dx);
        if constexpr (kAny) {
          if (dropout.active) drop(kept, x);
        }
        add_product<M>(special, grad_value, x, grads_of(tile), first_column, value_features);
        if (kAny && scoring.cap != 0) {
          multiply<M>(x, keys, warp_key, queries_of(tile), features);
          multiply_by_slope_of_cap(scoring, x, dx);
        }
        add_product<M>(special, grad_key, dx, queries_of(tile), first_column, features);
      } else if (kOnePass) {
        clear(dx);
      }
      if constexpr (kOnePass) add_to_queries(call, s, rows, state, dx, scores, keys, special_keys);
    }
    copy_async_wait<0>();
    const auto write = [&](const HeadTensor& to, const Sums<T>(&grad)[kRowTiles][kFeatureTiles], int count,
                           T factor, bool pairs) {
      if (!to.data) return;
      FS_UNROLL
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int key = warp_key + lane / 4 + 8 * i;
        if (key >= own.count) continue;
        write_row<E, kFeatureTiles>(s.key_row<E>(to, own.kv_head, first_key + key), first_column, count,
                                    pairs,
                                    [&](int n, int e) { return grad[i / 2][n][i % 2 * 2 + e] * factor; });
      }
    };
    write(a.grad_key, grad_key, features, scoring.scale, call.pairs_of_grad_key);
    write(a.grad_value, grad_value, value_features, dropout.kept_scale, call.pairs_of_grad_value);
  }

 private:
  // dQ += dS K of a tile of queries and all keys of the block, whose warps have dS of their own keys: these are
  // exchanged through shared memory, [query][key], and then the warps divide the features. The sums over key tiles are
  // made in memory, by reduce-adds in float32 (or float64), in whatever order the blocks come.
  static FS_DEVICE void add_to_queries(const Call& call, const Sequence& s, const RowTile<kQueries>& rows,
                                       const Query<T>* state, const Sums<T> (&dx)[kRowTiles][kQueryTiles],
                                       T* scores, FeatureTile keys, bool special_keys) {
    const int warp = thread_index() / kWarp, features = int(call.a.head_size);
    if (warp % kColumnWarps == 0) {
      for_elements<kRowTiles, kQueryTiles>([&](int m, int n, int e) {
        const int key = warp / kColumnWarps * kRowTiles * 16 + Orient<false>::of_row(m, e);
        scores[Orient<false>::of_column(n, e) * kScoreStride + key] = dx[m][n][e];
      });
    }
    sync_block();
    constexpr int kTiles = Shape::kFeatures / 8 / kWarps;
    const int first_column = warp * kTiles * 8;
    if (first_column >= features) return;
    FS_UNROLL
    for (int first = 0; first < kQueries; first += 16) {
      Sums<T> of_scores[1][kKeys / 8], sums[1][kTiles];
      for_elements<1, kKeys / 8>([&](int m, int n, int e) {
        const int query = first + Orient<true>::of_row(m, e);
        of_scores[m][n][e] =
            query < kQueries ? scores[query * kScoreStride + Orient<true>::of_column(n, e)] : T(0);
      });
      clear(sums);
      add_product<M>(special_keys, sums, of_scores, keys, first_column, features);
      HeadTensor to = call.a.grad_query;
      to.data = call.grad_query_sums;
      for_elements<1, kTiles>([&](int m, int n, int e) {
        const int query = first + Orient<true>::of_row(m, e),
                  column = first_column + Orient<true>::of_column(n, e);
        if (query >= rows.count || column >= features) return;
        add_in_any_order(s.query_row<T>(to, state[query].head, state[query].index) + column, sums[m][n][e]);
      });
    }
  }
};

// What the one-pass form has summed up, times the scale, rounded. A thread has an element.
template <class M>
struct FinishQueries {
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kThreads = 128, kRows = kThreads;

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const int64_t i = int64_t(block_index()) * kThreads + thread_index();
    if (i >= (a.cu_seqlens_q ? 1 : a.batch) * a.heads * a.queries * a.head_size) return;
    narrow(static_cast<const T*>(call.grad_query_sums)[i] * T(a.scale),
           static_cast<E*>(a.grad_query.data)[i]);
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
